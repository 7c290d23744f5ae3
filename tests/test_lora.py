"""LoRA: W x + (alpha / r) B A x, in and out of a model."""

import hashlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.adapters.lora import (
    LoRALinear,
    adapter_names,
    eject,
    inject,
    lora_layers,
    lora_state_dict,
    merge,
    print_trainable_parameters,
    set_adapters,
    trainable,
    unmerge,
)
from minidiff.config import SD15_UNET, TINY_UNET
from minidiff.errors import AdapterError
from minidiff.models.unet import UNet2DConditionModel


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(TINY_UNET)


def run(unet: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 7, 24, generator=g)
    with torch.no_grad():
        return unet(latents, torch.tensor([3, 900]), text)


def train_a_bit(unet: nn.Module, adapter_name: str = "default", size: float = 0.1) -> None:
    """Give every B numbers, as training would."""
    for i, layer in enumerate(lora_layers(unet).values()):
        B = layer.lora_B[adapter_name]
        B.data = size * torch.randn(B.shape, generator=torch.Generator().manual_seed(i))


def digest(unet: nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in unet.state_dict().items():
        total.update(name.encode() + tensor.numpy().tobytes())
    return total.hexdigest()


# --- the layer -------------------------------------------------------------------------------------------------------


def test_lora_eq3() -> None:
    """y = W x + (alpha / r) B A x, arXiv 2106.09685."""
    g = torch.Generator().manual_seed(0)
    base = nn.Linear(6, 5)
    A, B, x = torch.randn(2, 6, generator=g), torch.randn(5, 2, generator=g), torch.randn(3, 6, generator=g)
    layer = LoRALinear(base)
    layer.add("default", A, B, scale=8 / 2)
    expected = torch.stack([base.weight @ row + base.bias + 8 / 2 * B @ A @ row for row in x])
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=0)


def test_merging_w_plus_ba() -> None:
    """W' = W + (alpha / r) B A, section 4.1 of the paper."""
    layer = LoRALinear(nn.Linear(6, 5))
    W, A, B = layer.base.weight.clone(), torch.randn(2, 6), torch.randn(5, 2)
    layer.add("default", A, B, scale=3.0)
    layer.merge()
    torch.testing.assert_close(layer.base.weight, W + 3.0 * B @ A)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_are_fp32_and_output_has_the_dtype_of_the_base(dtype: torch.dtype) -> None:
    unet = tiny_unet().to(dtype)
    inject(unet, rank=2)
    assert {p.dtype for p in trainable(unet).values()} == {torch.float32}
    layer = next(iter(lora_layers(unet).values()))
    y = layer(torch.randn(3, layer.base.in_features, dtype=dtype))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert layer.lora_B["default"].grad.abs().sum() > 0 and layer.base.weight.grad is None


# --- inject and eject ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "count"), [(1, 199_296), (4, 797_184), (8, 1_594_368), (16, 3_188_736)])
def test_parameter_count_on_sd15(rank: int, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(SD15_UNET)
    assert len(inject(unet, rank)) == 128
    assert sum(p.numel() for p in trainable(unet).values()) == count
    if rank == 4:
        print_trainable_parameters(unet)
        line = "trainable params: 797,184 || all params: 860,318,148 || trainable%: 0.0927\n"
        assert capsys.readouterr().out == line


@pytest.mark.parametrize(
    ("targets", "modules", "count"),
    [
        (["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"], 64, 397_824),
        (["attn2.to_k", "attn2.to_v"], 32, 198_144),
        (["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"], 160, 1_496_064),
    ],
)
def test_targets_match_whole_words_at_the_end(targets: list[str], modules: int, count: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(SD15_UNET)
    assert len(inject(unet, 4, targets=targets)) == modules
    assert sum(p.numel() for p in trainable(unet).values()) == count


def test_b_zero_is_the_identity() -> None:
    unet = tiny_unet()
    before = run(unet)
    layers = inject(unet, rank=2)
    assert torch.equal(run(unet), before)
    train_a_bit(unet)
    assert not torch.allclose(run(unet), before, atol=1e-3)
    assert all(layer.lora_A["default"].abs().max() <= layer.base.in_features**-0.5 for layer in layers.values())


def test_only_the_adapter_is_trainable() -> None:
    unet = tiny_unet()
    inject(unet, rank=2)
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable(unet))
    assert len(trainable(unet)) == 2 * len(lora_layers(unet))


def test_a_is_a_function_of_seed_and_name() -> None:
    a, b, c = tiny_unet(), tiny_unet(), tiny_unet()
    inject(a, 2, seed=5)
    torch.randn(100)
    inject(b, 2, seed=5, targets=["to_out.0", "to_v", "to_k", "to_q"])
    inject(c, 2, seed=6)
    a_state, b_state, c_state = (lora_state_dict(unet) for unet in (a, b, c))
    assert all(torch.equal(a_state[key], b_state[key]) for key in a_state)
    As = [value for key, value in a_state.items() if "lora_A" in key]
    assert all(not torch.equal(x, y) for x, y in zip(As, As[1:], strict=False) if x.shape == y.shape)
    assert any(not torch.equal(a_state[key], c_state[key]) for key in a_state)


@pytest.mark.parametrize("merged", [False, True])
def test_eject_is_bit_identical(merged: bool) -> None:
    unet = tiny_unet()
    modules, before = dict(unet.named_modules()), digest(unet)
    inject(unet, rank=2)
    train_a_bit(unet)
    if merged:
        merge(unet)
    eject(unet)
    after = dict(unet.named_modules())
    assert modules.keys() == after.keys() and all(modules[name] is after[name] for name in modules)
    assert digest(unet) == before


# --- merge -----------------------------------------------------------------------------------------------------------


def test_merged_is_unmerged() -> None:
    unet = tiny_unet()
    inject(unet, rank=2, alpha=6)
    train_a_bit(unet)
    before, bits = run(unet), digest(unet)
    merge(unet)
    torch.testing.assert_close(run(unet), before, atol=1e-6, rtol=1e-6)
    assert digest(unet) != bits
    unmerge(unet)
    assert digest(unet) == bits and torch.equal(run(unet), before)


def test_unmerge_is_exact_in_half_precision() -> None:
    unet = tiny_unet().to(torch.float16)
    inject(unet, rank=2)
    train_a_bit(unet)
    bits = digest(unet)
    merge(unet)
    unmerge(unet)
    assert digest(unet) == bits


def test_merging_twice_and_unmerging_nothing_are_errors() -> None:
    unet = tiny_unet()
    with pytest.raises(AdapterError, match="has no adapter"):
        merge(unet)
    inject(unet, 2)
    with pytest.raises(AdapterError, match="nothing is merged"):
        unmerge(unet)
    merge(unet)
    with pytest.raises(AdapterError, match="merged already"):
        merge(unet)
    with pytest.raises(AdapterError, match="unmerge"):
        inject(unet, 2, adapter_name="second")


# --- several adapters ------------------------------------------------------------------------------------------------


def two_adapters() -> UNet2DConditionModel:
    unet = tiny_unet()
    inject(unet, 2, adapter_name="dog", seed=1)
    inject(unet, 3, alpha=6, targets=["attn2.to_k", "attn2.to_v"], adapter_name="style", seed=2)
    train_a_bit(unet, "dog")
    for layer in lora_layers(unet).values():
        if "style" in layer.lora_B:
            layer.lora_B["style"].data += 0.1
    return unet


def test_deltas_add_up_each_with_its_strength() -> None:
    unet = two_adapters()
    assert adapter_names(unet) == ["dog", "style"]
    set_adapters(unet, ["dog", "style"], [0.8, 0.5])
    layer = next(layer for name, layer in lora_layers(unet).items() if name.endswith("attn2.to_k"))
    dog = layer.lora_B["dog"] @ layer.lora_A["dog"]
    style = 2 * layer.lora_B["style"] @ layer.lora_A["style"]  # alpha / r = 6 / 3
    torch.testing.assert_close(layer.delta(), 0.8 * dog + 0.5 * style)
    x = torch.randn(3, layer.base.in_features)
    torch.testing.assert_close(layer(x), F.linear(x, layer.base.weight + layer.delta()))


def test_an_adapter_that_is_off_leaves_no_trace() -> None:
    unet, base = two_adapters(), run(tiny_unet())
    set_adapters(unet, [])
    assert torch.equal(run(unet), base)
    set_adapters(unet, ["style"])
    assert not torch.allclose(run(unet), base, atol=1e-4)


def test_a_new_adapter_is_the_only_one_that_trains() -> None:
    assert all(name.endswith(".style") for name in trainable(two_adapters()))


def test_set_adapters_refuses_unknown_names_and_wrong_counts() -> None:
    unet = two_adapters()
    with pytest.raises(AdapterError, match='Did you mean "style"'):
        set_adapters(unet, ["styel"])
    with pytest.raises(AdapterError, match="2 adapters .* 1 weights"):
        set_adapters(unet, ["dog", "style"], [1.0])


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 17}, "rank 17 is more than .* has: its weight is"),
        ({"rank": 2, "alpha": 0}, "alpha is 0"),
        ({"rank": 2, "alpha": float("nan")}, "alpha is nan"),
        ({"rank": 2, "targets": ["to_q", "to_out"]}, 'Did you mean "to_out.0"'),
        ({"rank": 2, "targets": "toq"}, 'matches nothing in UNet2DConditionModel. Did you mean "to_q"'),
        ({"rank": 2, "targets": ["conv1"]}, "names a Conv2d .* linear layers only"),
        ({"rank": 2, "targets": ["o_q"]}, "matches nothing"),
        ({"rank": 2, "targets": []}, "no targets"),
        ({"rank": 2, "adapter_name": "my.dog"}, "cannot name an adapter"),
        ({"rank": 2, "adapter_name": "keys"}, "cannot name an adapter"),
    ],
)
def test_bad_settings_change_nothing(settings: dict, message: str) -> None:
    unet = tiny_unet()
    with pytest.raises(AdapterError, match=message):
        inject(unet, **settings)
    assert not lora_layers(unet) and all(p.requires_grad for p in unet.parameters())


def test_the_same_name_twice_is_an_error() -> None:
    unet = tiny_unet()
    inject(unet, 2)
    with pytest.raises(AdapterError, match="is there already"):
        inject(unet, 2)
