"""A CPU's own ways of computing convolutions equal PyTorch's, and what they remember is never out of date."""

from collections.abc import Callable, Iterator
from itertools import product as combinations

import pytest
import torch
import torch.nn.functional as F
from tiny_sizes import TINY_UNET
from torch import Tensor, nn

from minidiff import fast
from minidiff.core.attention import FeedForward, TransformerBlock
from minidiff.core.config import SD15_UNET
from minidiff.core.unet import UNet2DConditionModel
from minidiff.fast import conv as cpu
from minidiff.fast.conv import slow_half
from minidiff.fast.frozen import FastConv2d, FastLinear, frozen_weights

LAYOUTS = (torch.contiguous_format, torch.channels_last)
# B, C, O, H, W, kernel, stride, padding; and the way it goes, with weights that may change and with weights that stand still
CASES = [
    ((1, 64, 96, 32, 32, 3, 1, 1), "winograd", "winograd"),
    ((2, 64, 64, 33, 38, 3, 1, 1), "winograd", "winograd"),  # the last tiles stand over
    ((1, 320, 384, 16, 17, 3, 1, 1), "product", "winograd"),  # by tiles of 2 x 2
    ((2, 640, 256, 8, 8, 3, 1, 1), "product", "product"),
    ((1, 384, 640, 9, 9, 3, 2, 1), "product", "product"),
    ((1, 1024, 1032, 5, 4, 1, 1, 0), "product", "product"),
    ((2, 24, 40, 16, 16, 3, 1, 1), "direct", "direct"),
    ((2, 24, 40, 15, 16, 3, 2, 1), "direct", "direct"),
    ((1, 8, 12, 17, 17, 3, 2, 0), "direct", "direct"),  # the VAE's step down
    ((3, 16, 24, 6, 6, 1, 1, 0), "product", "product"),
    ((2, 1024, 1032, 4, 4, 1, 2, 0), "direct", "direct"),  # none of SD's, but right all the same
    ((2, 6, 8, 9, 9, 2, 1, 1), "direct", "direct"),
    ((1, 4, 64, 40, 40, 3, 1, 1), "direct", "direct"),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(found: Tensor, right: Tensor) -> float:
    """The largest difference, in units of the largest number."""
    assert found.shape == right.shape
    return float((found.double() - right).abs().max() / right.abs().max())


# --- the ways --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [2, 4])
def test_toom_cook(m: int) -> None:
    """One axis of eq. 8: Aᵀ [(G g) ⊙ (Bᵀ d)] are the m sums of products of d, m + 2 numbers long, with g."""
    n = m + 2
    AA, BB, GG = cpu.transforms(m, torch.float64)
    g, d = drawn(3, 3, dtype=torch.float64), drawn(n, n, seed=1, dtype=torch.float64)
    tile = (AA @ ((GG @ g.flatten()) * (BB @ d.flatten()))).view(m, m)
    right = F.conv2d(d[None, None], g[None, None])[0, 0]
    torch.testing.assert_close(tile, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", [32, 18])  # tiles of 4 x 4, and of 2 x 2
def test_winograd_eq8(side: int) -> None:
    """arXiv 1509.09308: with every channel and tile, in fp64."""
    x, w, b = (drawn(*s, seed=i, dtype=torch.float64) for i, s in enumerate([(2, 5, side, side + 1), (7, 5, 3, 3), (7,)]))
    torch.testing.assert_close(cpu.winograd(x, w, b, 1, 1, None), F.conv2d(x, w, b, padding=1), rtol=1e-11, atol=1e-11)


def test_tiles_are_transformed_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = drawn(1, 6, 40, 36), drawn(8, 6, 3, 3, seed=1)
    whole = cpu.winograd(x, w, None, 1, 1, None)
    monkeypatch.setattr(cpu, "AT_ONCE", 36 * 9 * 8 * 3)  # three rows of tiles: 3, 3, 3 and 1
    torch.testing.assert_close(cpu.winograd(x, w, None, 1, 1, None), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "way", "still_way"), CASES, ids=str)
def test_a_convolution_equals_the_plain_one(shape: tuple[int, ...], way: str, still_way: str) -> None:
    """Forward and backward, in both layouts, at the first call and at a later one, to 1e-5 of an fp64 answer."""
    batch, channels, out, height, width, kernel, stride, padding = shape
    x, bias = drawn(batch, channels, height, width), drawn(out, seed=1)
    w = drawn(out, channels, kernel, kernel, seed=2) / (channels * kernel**2) ** 0.5
    wide_x = x.double().requires_grad_()
    right = F.conv2d(wide_x, w.double(), bias.double(), stride, padding)
    d = drawn(*right.shape, seed=3)
    (right_dx,) = torch.autograd.grad(right, wide_x, d.double())
    assert cpu.method_of(x.shape, w, stride, padding, may_cache=False) == way
    assert cpu.method_of(x.shape, w, stride, padding, may_cache=True) == still_way
    there: cpu.Cache = {}
    back: cpu.Cache = {}
    for layout, (forward, backward), _ in combinations(LAYOUTS, [(None, None), (there, back)], range(2)):
        y = cpu.conv2d(x.contiguous(memory_format=layout), w, bias, stride, padding, forward)
        d_x = cpu.conv2d_backward(d.contiguous(memory_format=layout), x.shape, w, stride, padding, backward)
        assert error(y, right.detach()) < 1e-5 and error(d_x, right_dx) < 1e-5
    if (kernel, stride) == (1, 1):  # its weights are in order as they are
        assert there == back == {}


def test_which_way_the_layers_of_sd15_go() -> None:
    """Its 98 convolutions at 512 x 512, as sampling calls them: with guidance, and with weights that stand still."""
    ways: dict[str, int] = {}

    def look(module: FastConv2d, inputs: tuple[Tensor]) -> None:
        way = cpu.method_of(inputs[0].shape, module.weight, module.stride[0], int(module.padding[0]), may_cache=True)
        ways[way] = ways.get(way, 0) + 1

    with torch.device("meta"):
        unet = UNet2DConditionModel(SD15_UNET)
        fast.install(unet)
        for module in unet.modules():
            if isinstance(module, FastConv2d):
                module.register_forward_pre_hook(look)  # type: ignore[arg-type]
        with torch.no_grad():
            unet(torch.empty(2, 4, 64, 64), torch.empty(2), torch.empty(2, 77, 768))
    assert ways == {"winograd": 33, "product": 62, "direct": 3}


def test_other_dtypes_and_devices_go_the_plain_way() -> None:
    x, w = drawn(1, 8, 12, 12, dtype=torch.float64), drawn(8, 8, 3, 3, dtype=torch.float64)
    assert torch.equal(cpu.conv2d(x, w, None, 1, 1, {}), F.conv2d(x, w, padding=1))
    assert cpu.conv2d(x.to("meta"), w.to("meta"), None, 1, 1, {}).shape == x.shape


def test_without_the_packing_functions_it_is_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = drawn(1, 8, 12, 12), drawn(8, 8, 3, 3)
    monkeypatch.setattr(cpu, "can_pack", lambda: False)
    cache: cpu.Cache = {}
    assert torch.equal(cpu.conv2d(x, w, None, 1, 1, cache), F.conv2d(x, w, padding=1)) and not cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_as_fp32_where_there_are_no_instructions(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """One rounding at the end, so it is nearer to the right answer than anything computed in half."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    x, w, b = drawn(2, 64, 8, 8, dtype=dtype), drawn(64, 64, 3, 3, seed=1, dtype=dtype), drawn(64, seed=2, dtype=dtype)
    assert slow_half(x) and not slow_half(x.float())
    right = F.conv2d(x.float(), w.float(), b.float(), padding=1).to(dtype)
    torch.testing.assert_close(cpu.conv2d(x, w, b, 1, 1), right, rtol=2**-7, atol=1e-4)
    tokens, thin = x.flatten(2).mT, w[:, :, 0, 0]
    assert torch.equal(cpu.linear(tokens, thin, b), F.linear(tokens.float(), thin.float(), b.float()).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        y = cpu.conv2d(x.float(), w.float(), b.float(), 1, 1)
    assert y.dtype == torch.bfloat16
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert not slow_half(x)


@pytest.mark.parametrize("trained", [True, False])
def test_a_layer_under_autograd(trained: bool) -> None:
    """A trained convolution is PyTorch's own; a frozen one passes the same gradients on."""
    layer, plain = FastConv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
    plain.load_state_dict(layer.state_dict())
    layer.requires_grad_(trained)
    x = drawn(1, 64, 32, 32)
    found, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    with frozen_weights([layer], large=True):
        layer(found).square().sum().backward()
    plain(right).square().sum().backward()
    assert found.grad is not None and right.grad is not None and error(found.grad, right.grad.double()) < 1e-5
    if trained:
        assert layer.weight.grad is not None and plain.weight.grad is not None
        assert torch.equal(layer.weight.grad, plain.weight.grad)


def test_a_linear_under_autograd() -> None:
    layer = FastLinear(6, 5)
    layer(drawn(3, 6)).sum().backward()
    assert layer.weight.grad is not None and layer.bias.grad is not None


def test_tokens_go_through_a_feed_forward_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = FeedForward(8), drawn(2, 21, 8)
    fast.install(layer)
    whole = layer(x).detach()
    monkeypatch.setattr("minidiff.fast.frozen.PIECE", 5)
    sizes: list[int] = []
    layer.net.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[1]))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), whole, rtol=1e-5, atol=1e-6)
    assert sizes == [5, 5, 5, 5, 1]
    layer(x)
    assert sizes[5:] == [21]  # where gradients flow: what is kept is what the lean step keeps


# --- what is remembered ------------------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every time that something is made of a weight, by name."""
    made: list[str] = []
    cached = cpu.cached

    def watched(cache: cpu.Cache | None, purpose: str, weight: Tensor, make: Callable[[], Tensor]) -> Tensor:
        def noted() -> Tensor:
            made.append(purpose)
            return make()

        return cached(cache, purpose, weight, noted)

    monkeypatch.setattr(cpu, "cached", watched)
    return made


@torch.no_grad()
def test_what_is_made_of_weights_is_made_once_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    made, layer, x = counted(monkeypatch), FastConv2d(64, 64, 3, padding=1), drawn(1, 64, 32, 32)
    for _ in range(3):
        layer(x)
    assert made == ["winograd 4"] * 3
    with frozen_weights([layer], large=True):
        for _ in range(3):
            layer(x)
    assert made[3:] == ["winograd 4"]
    layer.weight.mul_(2)
    assert error(layer(x), F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)) < 1e-5
    with frozen_weights([layer], large=True):
        assert error(layer(x), F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)) < 1e-5


@torch.no_grad()
def test_a_weight_that_changes_all_the_same_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, or by another one: `frozen_weights` is a promise, and this is what happens if it is broken."""
    layer, x = FastConv2d(64, 64, 3, padding=1), drawn(1, 64, 32, 32)
    with frozen_weights([layer], large=True):
        before = layer(x)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        assert error(layer(x), 2 * before.double()) < 1e-5
        layer.weight.data = layer.weight.data * 2
        layer.bias.mul_(2)
        assert error(layer(x), 4 * before.double()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_winograd_is_not_for_half_precision(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Where a processor computes in half itself, its transforms would lose a digit."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(cpu, "winograd", None)
    x, w = drawn(1, 64, 32, 32, dtype=dtype), drawn(64, 64, 3, 3, dtype=dtype)
    assert torch.equal(cpu.conv2d(x, w, None, 1, 1, {}), F.conv2d(x, w, padding=1))


def test_a_frozen_weight_with_a_bias_that_learns() -> None:
    layer = FastConv2d(4, 4, 3)
    layer.weight.requires_grad_(False)
    layer(drawn(1, 4, 5, 5).requires_grad_()).sum().backward()
    assert layer.bias is not None and layer.bias.grad is not None


@torch.no_grad()
def test_inside_another_what_is_there_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sheet that is drawn while the model is trained."""
    made, layer, x = counted(monkeypatch), FastConv2d(8, 8, 3, padding=1), drawn(1, 8, 8, 8)
    with frozen_weights([layer], large=False):
        layer(x)
        with frozen_weights([layer], large=True):
            layer(x)
        layer(x)
        assert made == ["packed"]
    assert layer.caches is None


def test_an_error_inside_forgets_too() -> None:
    layer = FastConv2d(8, 8, 3, padding=1)
    with pytest.raises(ZeroDivisionError), frozen_weights([layer], large=True):
        raise ZeroDivisionError
    assert layer.caches is None


def test_in_training_only_what_is_frozen_stands_still() -> None:
    moves, frozen, large = FastConv2d(8, 8, 3), FastConv2d(8, 8, 3), FastConv2d(512, 512, 3)
    for layer in (frozen, large):
        layer.requires_grad_(False)
    layers = nn.ModuleList([moves, frozen, large])
    with frozen_weights([layers], large=False):
        assert [layer.caches is None for layer in (moves, frozen, large)] == [True, False, True]
    with torch.no_grad(), frozen_weights([layers], large=True):
        assert not [layer for layer in (moves, frozen, large) if layer.caches is None]


@torch.no_grad()
def test_a_small_machine_is_not_crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of large weights only where there is four times their memory."""
    small, large = FastConv2d(8, 8, 3, padding=1), FastConv2d(512, 512, 3, padding=1)
    weights = 4 * (small.weight.numel() + large.weight.numel())
    for memory, kept in ((4 * weights, True), (4 * weights - 1, False), (None, True)):
        monkeypatch.setattr("minidiff.fast.memory.machine_memory", lambda memory=memory: memory)
        with frozen_weights([nn.ModuleList([small, large])], large=True):
            assert small.caches is not None and (large.caches is not None) == kept


@torch.no_grad()
def test_keys_and_values_of_a_prompt_are_computed_once() -> None:
    block, x = TransformerBlock(6, 6, heads=2), drawn(1, 4, 6)
    fast.install(block)
    layer = block.attn2
    prompt, other = drawn(1, 7, 6, seed=1), drawn(1, 7, 6, seed=2)
    calls: list[Tensor] = []
    layer.to_k.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0]))
    plain = [layer(x, text) for text in (prompt, other)]
    calls.clear()
    with frozen_weights([block], large=True, prompt=True):
        found = [layer(x, text) for text in (prompt, other) for _ in range(3)]
        assert len(calls) == 2 and all(torch.equal(y, plain[i // 3]) for i, y in enumerate(found))
        assert block.attn1.prompt is None  # the keys of self-attention are new each time
    layer.to_k.weight.mul_(2)
    assert not torch.equal(layer(x, other), plain[1])


@torch.no_grad()
def test_a_whole_unet_is_the_same_with_all_of_it() -> None:
    unet = UNet2DConditionModel(TINY_UNET)
    fast.install(unet)
    x, text = drawn(2, 4, 8, 8), drawn(2, 77, TINY_UNET.cross_attention_dim, seed=1)
    plain = unet(x, 500, text)
    with frozen_weights([unet], large=True, prompt=True):
        first, second = unet(x, 500, text), unet(x, 500, text)
    assert error(first, plain.double()) < 1e-5 and torch.equal(first, second)
