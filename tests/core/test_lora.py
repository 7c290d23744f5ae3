"""LoRA on one layer: y = W x + scale · B A x, for linear layers and convolutions."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny_adapters import random
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minidiff.core.lora import LoRAConv2d, LoRALayer, LoRALinear, LoRAWeights

KINDS = {
    "linear": lambda: nn.Linear(6, 5),
    "linear without bias": lambda: nn.Linear(6, 5, bias=False),
    "3 x 3": lambda: nn.Conv2d(6, 5, 3, padding=1),
    "3 x 3 with stride 2": lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1),  # a downsampler of the U-Net
    "3 x 1 with holes": lambda: nn.Conv2d(6, 5, (3, 1), padding=(2, 0), dilation=(2, 1)),
    "1 x 1": lambda: nn.Conv2d(6, 5, 1),  # proj_in of SD 1.5
    "1 x 1 without bias": lambda: nn.Conv2d(6, 5, 1, bias=False),
}
HALVES = [torch.float16, torch.bfloat16]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, *HALVES])


def layer_and_x(kind: str, dtype: torch.dtype = torch.float32) -> tuple[LoRALayer, Tensor]:
    """A layer of 6 inputs and 5 outputs with no adapter yet, and something to put in."""
    torch.manual_seed(0)
    base = KINDS[kind]().to(dtype)
    if isinstance(base, nn.Linear):
        return LoRALinear(base), random(3, 6).to(dtype)
    return LoRAConv2d(base), random(2, 6, 5, 4).to(dtype)


def weights_for(layer: LoRALayer, rank: int = 2, scale: float = 1.5, seed: int = 1) -> LoRAWeights:
    W = layer.base.weight
    return LoRAWeights(random(rank, *W.shape[1:], seed=seed), random(len(W), rank, seed=seed + 100), scale)


def plain(layer: LoRALayer, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's function with another W."""
    if isinstance(layer, LoRALinear):
        return F.linear(x, W, bias)
    return F.conv2d(x, W, bias, layer.base.stride, layer.base.padding, layer.base.dilation)


# --- the equations ---------------------------------------------------------------------------------------------------


def test_lora_eq3() -> None:
    """y = W x + (alpha / r) B A x, arXiv 2106.09685, one row after the other."""
    layer, x = layer_and_x("linear")
    A, B, alpha, r = random(2, 6, seed=1), random(5, 2, seed=2), 8, 2
    layer.add("default", LoRAWeights(A, B, alpha / r))
    expected = torch.stack([layer.base.weight @ row + layer.base.bias + alpha / r * B @ (A @ row) for row in x])
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=0)


@every_kind
def test_forward_is_delta(kind: str) -> None:
    """The detour gives what the changed W would give, in every stride and with every padding."""
    layer, x = layer_and_x(kind)
    layer.add("default", weights_for(layer))
    W = layer.base.weight + layer.delta()
    torch.testing.assert_close(layer(x), plain(layer, x, W, layer.base.bias), atol=1e-5, rtol=1e-5)


def test_delta_of_a_convolution() -> None:
    """B mixes A's r kernels: ΔW[o] = scale · Σ over k of B[o, k] A[k]."""
    layer, _ = layer_and_x("3 x 3")
    change = weights_for(layer)
    expected = torch.stack([1.5 * sum(change.B[o, k] * change.A[k] for k in range(2)) for o in range(5)])
    torch.testing.assert_close(change.delta(layer.base.weight), expected)


@every_dtype
@every_kind
def test_b_zero_is_the_identity(kind: str, dtype: torch.dtype) -> None:
    layer, x = layer_and_x(kind, dtype)
    change = weights_for(layer)
    layer.add("default", LoRAWeights(change.A, torch.zeros_like(change.B), change.scale))
    assert torch.equal(layer(x), layer.base(x))
    assert not layer.delta().any()


# --- merging ---------------------------------------------------------------------------------------------------------


@every_kind
def test_merging_w_plus_ba(kind: str) -> None:
    """W' = W + (alpha / r) B A, section 4.1 of the paper."""
    layer, _ = layer_and_x(kind)
    W, change = layer.base.weight.clone(), weights_for(layer)
    layer.add("default", change)
    layer.merge()
    expected = W + 1.5 * (change.B @ change.A.flatten(1)).view(W.shape)
    torch.testing.assert_close(layer.base.weight, expected)
    torch.testing.assert_close(layer.delta(), expected - W)  # still that of the unmerged W


@every_dtype
@every_kind
def test_merged_is_unmerged_within_the_stated_bound(kind: str, dtype: torch.dtype) -> None:
    """The docstring of `merge`: (n + r + 4) · eps · (|W| |x| + strength · scale · |B| |A| |x| + |bias|)."""
    layer, x = layer_and_x(kind, dtype)
    layer.add("default", change := weights_for(layer))
    layer.strength["default"] = 0.7
    W, bias = layer.base.weight.detach().double(), layer.base.bias
    sizes = W.abs() + 0.7 * LoRAWeights(change.A.abs(), change.B.abs(), change.scale).product()
    magnitude = plain(layer, x.double().abs(), sizes, None if bias is None else bias.double().abs())
    before = layer(x)
    layer.merge()
    after = layer(x)
    bound = (W[0].numel() + change.rank + 4) * torch.finfo(dtype).eps * magnitude
    assert after.dtype == before.dtype == dtype
    assert ((after.double() - before.double()).abs() <= bound).all()


@every_dtype
@every_kind
def test_unmerge_is_exact(kind: str, dtype: torch.dtype) -> None:
    layer, x = layer_and_x(kind, dtype)
    layer.add("default", weights_for(layer))
    W, y = layer.base.weight.clone(), layer(x)
    layer.merge()
    assert not torch.equal(layer.base.weight, W)
    layer.unmerge()
    assert torch.equal(layer.base.weight, W) and torch.equal(layer(x), y)


def test_a_layer_merged_twice_still_knows_its_w() -> None:
    layer, x = layer_and_x("linear")
    layer.add("default", weights_for(layer))
    W, tuned = layer.base.weight.clone(), layer(x)
    layer.merge()
    layer.merge()
    torch.testing.assert_close(layer(x), tuned)
    layer.unmerge()
    assert torch.equal(layer.base.weight, W)


def test_the_kept_weight_is_in_no_file_and_follows_the_model() -> None:
    layer, _ = layer_and_x("linear")
    layer.add("default", weights_for(layer))
    layer.merge()
    assert "unmerged_weight" not in layer.state_dict()
    assert layer.to(torch.float64).unmerged_weight.dtype == torch.float64


# --- several adapters ------------------------------------------------------------------------------------------------


@every_kind
def test_deltas_add_up_each_with_its_strength(kind: str) -> None:
    """W' = W + Σ strength · ΔW; other ranks and scales do not matter."""
    layer, x = layer_and_x(kind)
    dog, style = weights_for(layer), weights_for(layer, rank=4, scale=0.25, seed=7)
    layer.add("dog", dog)
    layer.add("style", style)
    layer.strength.update(dog=0.8, style=-0.5)
    W = layer.base.weight
    delta = 0.8 * dog.delta(W) - 0.5 * style.delta(W)
    torch.testing.assert_close(layer.delta(), delta)
    torch.testing.assert_close(layer(x), plain(layer, x, W + delta, layer.base.bias), atol=1e-5, rtol=1e-5)


def test_an_adapter_that_is_off_leaves_no_trace() -> None:
    """Not even 0 · NaN."""
    layer, x = layer_and_x("linear")
    layer.add("broken", LoRAWeights(torch.full((2, 6), torch.nan), torch.ones(5, 2), 1.0))
    layer.strength["broken"] = 0.0
    assert torch.equal(layer(x), layer.base(x)) and not layer.delta().any()


# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@every_kind
def test_adapters_are_fp32_on_a_half_precision_base(kind: str, dtype: torch.dtype) -> None:
    layer, x = layer_and_x(kind, dtype)
    change = weights_for(layer)
    layer.add("default", LoRAWeights(change.A.to(dtype), change.B.to(dtype), change.scale))
    y = layer(x)
    y.float().sum().backward()
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    assert A.dtype == B.dtype == layer.delta().dtype == torch.float32 and y.dtype == dtype
    assert A.grad.abs().sum() > 0 and B.grad.abs().sum() > 0 and layer.base.weight.grad is None


def test_weights_go_in_and_out() -> None:
    layer, _ = layer_and_x("3 x 3")
    change = weights_for(layer)
    layer.add("default", change)
    back = layer.weights("default")
    assert torch.equal(back.A, change.A) and torch.equal(back.B, change.B)
    assert (back.scale, back.rank, back.magnitude) == (change.scale, 2, None) and not back.A.requires_grad


def test_two_layers_do_not_share_an_adapter() -> None:
    """A layer takes a copy: training one must not move the other, nor what was read from a file."""
    layer, _ = layer_and_x("linear")
    change = weights_for(layer)
    before = change.A.clone()
    layer.add("default", change)
    layer.lora_A["default"].data.add_(1.0)
    assert torch.equal(change.A, before)


# --- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_is_on_the_detour_alone_and_in_training_alone() -> None:
    layer, x = layer_and_x("linear")
    change = weights_for(layer)
    layer.add("default", change, dropout=0.5)
    torch.manual_seed(3)
    y = layer.train()(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)  # what is kept counts double
    torch.testing.assert_close(y, layer.base(x) + 1.5 * dropped @ change.A.T @ change.B.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.eval()(x), layer.base(x) + 1.5 * x @ change.A.T @ change.B.T, atol=1e-5, rtol=1e-5)


def test_dropout_is_seeded_by_torch() -> None:
    layer, x = layer_and_x("3 x 3")
    layer.add("default", weights_for(layer), dropout=0.5)

    def y(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(x)

    assert torch.equal(y(0), y(0)) and not torch.equal(y(0), y(1))


@pytest.mark.parametrize("kind", ["linear", "3 x 3 with stride 2"])
def test_recomputed_activations_give_the_same_gradients(kind: str) -> None:
    """Gradient checkpointing, although no input needs a gradient, and with dropout."""
    layer, x = layer_and_x(kind)
    layer.add("default", weights_for(layer), dropout=0.3)
    gradients = []
    for forward in (layer, partial(checkpoint, layer, use_reentrant=False)):
        layer.zero_grad()
        torch.manual_seed(3)
        forward(x).square().sum().backward()
        gradients.append([p["default"].grad.clone() for p in (layer.lora_A, layer.lora_B)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
