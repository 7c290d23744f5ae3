"""Training that keeps little: the same numbers as the plain way, and how little, counted on the meta device."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmarks.saved_bytes import saved_bytes
from tiny_adapters import EVERYWHERE, random, shake, tiny_unet
from torch import Tensor, nn
from triton_tools import needs_gpu

from minidiff import fast
from minidiff.core.attention import GEGLU
from minidiff.core.blocks import NormSiLU
from minidiff.core.config import SD15_UNET
from minidiff.core.inject import inject, trainable
from minidiff.core.unet import UNet2DConditionModel
from minidiff.fast.frozen import FastConv2d
from minidiff.fast.lean import ConcatFunction, LeanGEGLU, LeanGroupNorm, LeanLayerNorm, LeanNormSiLU
from minidiff.fast.lean_lora import DoRAFunction, DownFunction, LoRALinearFunction

MIB = 2**20
Grads = dict[str, Tensor]


def double(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, seed=seed).double().requires_grad_()


def frozen(module: nn.Module) -> Any:
    """With numbers that are not those of a fresh norm, fp64."""
    for i, p in enumerate(module.parameters()):
        p.data = random(*p.shape, seed=20 + i)
    return module.double().requires_grad_(False)


# --- each function against its twin, and its gradient against differences --------------------------------------------------


def functions() -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Name -> the lean way, its plain twin, and what they take."""
    group, layer = frozen(LeanGroupNorm(2, 4, eps=1e-5)), frozen(LeanLayerNorm(6))
    silu, geglu = frozen(LeanNormSiLU(2, 4, eps=1e-5)), frozen(LeanGEGLU(6, 3))
    conv, stride = frozen(FastConv2d(4, 3, 3, padding=1)), frozen(FastConv2d(4, 3, 3, stride=2))
    image, tokens = double(2, 4, 5, 3), double(2, 3, 6)
    W, bias = random(5, 6, seed=3).double(), random(5, seed=4).double()
    A, B, g = double(2, 6, seed=5), double(5, 2, seed=6), double(5, seed=7)
    y, thin = double(2, 3, 5, seed=8), double(2, 3, 2, seed=9)
    how, A_conv = ((2, 1), (1, 0), (1, 2), 1), double(2, 4, 3, 2, seed=10)

    def dora_eq5(y: Tensor, thin: Tensor, B: Tensor, g: Tensor) -> Tensor:
        return y + 0.7 * ((g - 1) * (y - bias) + g * 1.5 * (thin @ B.mT))

    return {
        "GroupNorm and SiLU": (silu, lambda x: NormSiLU.forward(silu, x), (image,)),
        "GroupNorm": (group, lambda x: nn.GroupNorm.forward(group, x), (image,)),
        "LayerNorm": (layer, lambda x: nn.LayerNorm.forward(layer, x), (tokens,)),
        "GEGLU": (geglu, lambda x: GEGLU.forward(geglu, x), (tokens,)),
        "concatenation": (ConcatFunction.apply, lambda *parts: torch.cat(parts, dim=1), (image, double(2, 3, 5, 3))),
        "convolution": (conv, lambda x: F.conv2d(x, conv.weight, conv.bias, padding=1), (image,)),
        "strided convolution": (stride, lambda x: F.conv2d(x, stride.weight, stride.bias, 2), (image,)),
        "LoRA linear": (
            lambda x, A, B: LoRALinearFunction.apply(x, W, bias, A, B, 1.5),
            lambda x, A, B: F.linear(x, W, bias) + 1.5 * x @ A.mT @ B.mT,
            (tokens, A, B),
        ),
        "A of a linear": (lambda x, A: DownFunction.apply(x, A, None), F.linear, (tokens, A)),
        "A of a convolution": (
            lambda x, A: DownFunction.apply(x, A, how),
            lambda x, A: F.conv2d(x, A, None, *how),
            (image, A_conv),
        ),
        "DoRA": (lambda *xs: DoRAFunction.apply(*xs, bias, 1.5, 0.7), dora_eq5, (y, thin, B, g)),
    }


@pytest.mark.parametrize("name", functions())
def test_gradcheck(name: str) -> None:
    mine, _, inputs = functions()[name]
    assert "Function" in type(mine(*inputs).grad_fn).__name__ or "Frozen" in type(mine(*inputs).grad_fn).__name__
    assert torch.autograd.gradcheck(mine, inputs)


@pytest.mark.parametrize("name", functions())
def test_each_equals_its_plain_twin(name: str) -> None:
    mine, plain, inputs = functions()[name]
    direction = torch.randn_like(plain(*inputs))
    torch.testing.assert_close(mine(*inputs), plain(*inputs))
    pairs = zip(*(torch.autograd.grad(f(*inputs), inputs, direction) for f in (mine, plain)))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("silu", [False, True])
def test_group_norm_of_channels_last(device: str, silu: bool) -> None:
    """A GPU's kernel does not take that order: there the tensor is turned first."""
    kind = LeanNormSiLU if silu else LeanGroupNorm
    norm = frozen(kind(2, 4, eps=1e-5)).float().to(device)
    x, direction = (random(2, 4, 5, 3, seed=seed).to(device, memory_format=torch.channels_last) for seed in (0, 1))
    x.requires_grad_()
    mine, plain = norm(x), kind.__base__.forward(norm, x)  # type: ignore[attr-defined]
    torch.testing.assert_close(mine, plain)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, direction)[0] for y in (mine, plain)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_in_half_are_computed_in_fp32(dtype: torch.dtype) -> None:
    norm = frozen(LeanNormSiLU(2, 4)).to(dtype)
    x = (100 + random(2, 4, 5, 3)).to(dtype).requires_grad_()
    y = norm(x)
    wide = x.detach().float().requires_grad_()
    exact = F.silu(F.group_norm(wide, 2, norm.weight.float(), norm.bias.float(), norm.eps))
    assert y.dtype == dtype and torch.equal(y, exact.to(dtype))
    y.sum().backward()
    exact.sum().backward()
    torch.testing.assert_close(x.grad, wide.grad.to(dtype))


@pytest.mark.parametrize("why", ["no gradients", "x needs none", "the weights are trained"])
def test_the_plain_way_where_nothing_is_saved(why: str) -> None:
    norm, x = LeanNormSiLU(2, 4).requires_grad_(why == "the weights are trained"), random(2, 4, 5, 3)
    x.requires_grad_(why != "x needs none")
    with torch.set_grad_enabled(why != "no gradients"):
        y = norm(x)
    assert "Function" not in type(y.grad_fn).__name__ and torch.equal(y, NormSiLU.forward(norm, x))


# --- the tiny U-Net, whole ---------------------------------------------------------------------------------------------

ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoCon": {"targets": EVERYWHERE},
    "DoRA": {"targets": EVERYWHERE, "dora": True},
    "dropout": {"targets": EVERYWHERE, "dropout": 0.3},
}
with_none = pytest.mark.parametrize("kind", [*ADAPTERS, "none"])  # as in textual inversion: gradients of the text alone


def tuned(kind: str) -> UNet2DConditionModel:
    unet = tiny_unet()
    if kind == "none":
        unet.requires_grad_(False)
    else:
        inject(unet, 2, alpha=3, **ADAPTERS[kind])
        shake(unet)
    fast.install(unet)
    return unet.train()


def gradients(unet: UNet2DConditionModel, dtype: torch.dtype = torch.float32) -> Grads:
    """The output, and every gradient: of the latents and the text as well, where a text encoder would be trained."""
    unet.zero_grad()
    torch.manual_seed(5)  # for dropout
    x, text = (t.to(dtype).requires_grad_() for t in (random(2, 4, 8, 8, seed=1), random(2, 7, 24, seed=2)))
    y = unet(x, torch.tensor([3, 900]), text)
    (y * random(*y.shape, seed=9)).sum().backward()
    return {"output": y.detach(), "x": x.grad, "text": text.grad} | {n: p.grad.clone() for n, p in trainable(unet).items()}


def apart(ours: Grads, theirs: Grads) -> float:
    """How far all tensors together are from each other, relative to their size."""
    assert ours.keys() == theirs.keys()
    a, b = (torch.cat([t.flatten() for t in grads.values()]) for grads in (ours, theirs))
    return float((a - b).norm() / b.norm())


@with_none
def test_outputs_and_gradients_are_those_of_the_plain_classes(kind: str) -> None:
    """In fp64 to 1e-13, but for DoRA's norms, which are fp32. In fp32 each way is 1e-6 from that, and so is the other's."""
    single, double = tuned(kind), tuned(kind).double()
    ours, ours64 = gradients(single), gradients(double, torch.float64)
    fast.remove(single)
    fast.remove(double)
    theirs, theirs64 = gradients(single), gradients(double, torch.float64)
    assert apart(ours64, theirs64) < (1e-6 if kind == "DoRA" else 1e-13)
    assert apart({"y": ours["output"]}, {"y": theirs["output"]}) < 1e-6 and apart(ours, theirs) < 2e-6
    assert apart({n: t.double() for n, t in ours.items()}, theirs64) < 2e-6


@with_none
def test_checkpointing_changes_no_bit(kind: str) -> None:
    unet = tuned(kind)
    kept = gradients(unet)
    fast.install(unet, fast.CHECKPOINTED)
    made_again = gradients(unet)
    assert kept.keys() == made_again.keys() and all(torch.equal(kept[name], made_again[name]) for name in kept)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_five_steps_are_those_of_the_plain_classes(kind: str) -> None:
    def train(plain: bool) -> Grads:
        unet = tuned(kind)
        if plain:
            fast.remove(unet)
        optimizer = torch.optim.AdamW(trainable(unet).values(), lr=1e-3, eps=1e-5)
        for step in range(5):
            torch.manual_seed(step)
            x, noise = random(2, 4, 8, 8, seed=step), random(2, 4, 8, 8, seed=100 + step)
            (unet(x, torch.tensor([3, 900]), random(2, 7, 24, seed=2)) - noise).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: p.detach() for name, p in trainable(unet).items()}

    ours = train(plain=False)
    for name, theirs in train(plain=True).items():
        torch.testing.assert_close(ours[name], theirs, atol=1e-6, rtol=0)


def test_nothing_made_again_outlives_the_backward() -> None:
    norm = frozen(LeanLayerNorm(6))
    y = norm(double(2, 3, 6))
    node = y.grad_fn
    DownFunction.apply(y, double(2, 6), None).sum().backward()
    assert node.saved is None and node.output is None


# --- how little, at SD 1.5's size ----------------------------------------------------------------------------------------


def sd15(**how: Any) -> tuple[UNet2DConditionModel, Tensor, Tensor, Tensor]:
    """The U-Net in fp16 with a LoRA of rank 8, and one sample of 512 x 512 pixels. On meta: shapes without memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(SD15_UNET).to(torch.float16)
        inject(unet, 8, **how)
        fast.install(unet)
        half = {"dtype": torch.float16}
        return unet.train(), torch.empty(1, 4, 64, 64, **half), torch.empty(1), torch.empty(1, 77, 768, **half)


def kept_bytes(forward: Callable[[], object], weights: Iterable[Tensor]) -> int:
    return saved_bytes(forward, weights)["bytes"]  # type: ignore[no-any-return]


def kept(unet: UNet2DConditionModel, *inputs: Tensor) -> float:
    return kept_bytes(lambda: unet(*inputs), unet.parameters()) / MIB


def test_kept_bytes_of_a_lora_step() -> None:
    unet, *inputs = sd15()
    assert 400 < kept(unet, *inputs) < 456
    fast.remove(unet)
    assert kept(unet, *inputs) > 990


def test_kept_bytes_with_checkpointing() -> None:
    unet, *inputs = sd15()
    fast.install(unet, fast.CHECKPOINTED)
    assert 30 < kept(unet, *inputs) < 37


@pytest.mark.slow
@pytest.mark.parametrize("how, most", [({"targets": EVERYWHERE}, 498), ({"dora": True}, 593)])
def test_kept_bytes_of_other_adapters(how: dict[str, Any], most: float) -> None:
    unet, *inputs = sd15(**how)
    assert kept(unet, *inputs) < most


def test_kept_bytes_counts() -> None:
    """By hand: SiLU keeps its input; the second keeps the first's output; a weight is no activation."""
    x, linear = torch.empty(3, 5, requires_grad=True), nn.Linear(5, 5)
    assert kept_bytes(lambda: F.silu(F.silu(x)), []) == 2 * 15 * 4
    assert kept_bytes(lambda: linear(x), linear.parameters()) == 15 * 4
    linear.requires_grad_(False)
    assert kept_bytes(lambda: linear(x), linear.parameters()) == 0


def test_full_fine_tuning_saves_no_more_than_plain_classes() -> None:
    unet, x, text = tiny_unet(), random(2, 4, 8, 8), random(2, 7, 24)
    fast.install(unet)

    def size() -> int:
        return kept_bytes(lambda: unet(x, torch.tensor([3, 900]), text), unet.parameters())

    ours = size()
    fast.remove(unet)
    assert ours <= size()
