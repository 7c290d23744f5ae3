"""DoRA in one layer: W' = m · V / ||V||, V = W + scale · B A (arXiv 2402.09353)."""

import pytest
import torch
from test_lora import every_dtype, every_kind, layer_and_x, plain, weights_for
from tiny_adapters import answer, digest, random, shake, tiny_unet
from torch import Tensor, nn

from minidiff.core.inject import inject, lora_layers, merge, set_adapters, trainable, unmerge
from minidiff.core.lora import LoRAConv2d, LoRALayer, LoRALinear, LoRAWeights, fresh, lengths
from minidiff.core.rng import generator

AXES = ["output", "input"]


def dora_weights(layer: LoRALayer, axis: str = "output", rank: int = 2, scale: float = 1.5, seed: int = 0) -> LoRAWeights:
    """A trained DoRA adapter."""
    change, W = weights_for(layer, rank, scale, seed), layer.base.weight
    ones = (1,) * (W.ndim - 2)
    shape = (len(W), 1, *ones) if axis == "output" else (1, W.shape[1], *ones)
    return LoRAWeights(change.A, change.B, scale, 1 + random(*shape, seed=seed + 2).abs())


def by_hand(weights: LoRAWeights, W: Tensor, axis: str) -> Tensor:
    """W' of eq. 5, one output, or one input, at a time."""
    V, tuned = W + weights.scale * (weights.B @ weights.A.flatten(1)).view(W.shape), torch.empty_like(W)
    for i, m in enumerate(weights.magnitude.flatten()):
        if axis == "output":
            tuned[i] = m * V[i] / V[i].square().sum().sqrt()
        else:
            tuned[:, i] = m * V[:, i] / V[:, i].square().sum().sqrt()
    return tuned


def fresh_dora(layer: LoRALayer) -> LoRAWeights:
    return fresh(layer.base.weight.detach(), 2, 3.0, rslora=False, dora=True, random=generator(0, "lora_A", "layer"))


@pytest.mark.parametrize("axis", AXES)
@every_kind
def test_dora_eq5(kind: str, axis: str) -> None:
    layer, x = layer_and_x(kind)
    W, weights = layer.base.weight.detach().clone(), dora_weights(layer, axis)
    layer.add("default", weights)
    tuned = by_hand(weights, W, axis)
    torch.testing.assert_close(weights.delta(W), tuned - W)
    torch.testing.assert_close(layer(x), plain(layer, x, tuned, layer.base.bias), atol=2e-5, rtol=1e-5)
    norms = lengths(W + layer.delta(), weights.magnitude.shape)
    torch.testing.assert_close(norms, weights.magnitude)  # what m is: the length of the tuned rows


@pytest.mark.parametrize("axis", AXES)
def test_one_output_or_one_input(axis: str) -> None:
    """The shapes of m at which outputs and inputs could be taken for each other."""
    for base, x in (
        (nn.Linear(4, 1), random(3, 4)),
        (nn.Linear(1, 4), random(3, 1)),
        (nn.Linear(1, 1, bias=False), random(3, 1)),
    ):
        layer = LoRALinear(base)
        weights = dora_weights(layer, axis, rank=1)
        layer.add("default", weights)
        expected = plain(layer, x, by_hand(weights, base.weight.detach(), axis), base.bias)
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@every_dtype
@every_kind
def test_dora_starts_as_the_base_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    layer, x = layer_and_x(kind, dtype)
    layer.add("default", fresh_dora(layer))
    assert layer.lora_magnitude["default"].shape == (5, *[1] * (layer.base.weight.ndim - 1))
    assert torch.equal(layer(x), layer.base(x)) and not layer.delta().any()


def test_a_row_of_zeros_is_no_nan() -> None:
    layer = LoRALinear(nn.Linear(6, 5))
    layer.base.weight.data[2] = 0
    layer.add("default", fresh_dora(layer))
    x = random(4, 6)
    assert torch.equal(layer(x), layer.base(x))
    layer.lora_B["default"].data += 0.1
    layer(x).sum().backward()
    assert layer(x).isfinite().all() and layer.lora_magnitude["default"].grad.isfinite().all()


@every_kind
def test_norm_is_a_constant_in_the_gradient(kind: str) -> None:
    """Section 4.3: eq. 5 with ||V|| held fixed, by autograd on W' itself."""
    layer, x = layer_and_x(kind)
    weights = dora_weights(layer)
    layer.add("default", weights)
    layer(x).square().sum().backward()
    A, B, m = (tensor.clone().requires_grad_() for tensor in (weights.A, weights.B, weights.magnitude))
    V = layer.base.weight.detach() + 1.5 * (B @ A.flatten(1)).view(layer.base.weight.shape)
    plain(layer, x, m / lengths(V.detach(), m.shape) * V, layer.base.bias).square().sum().backward()
    for mine, theirs in ((layer.lora_A, A), (layer.lora_B, B), (layer.lora_magnitude, m)):
        torch.testing.assert_close(mine["default"].grad, theirs.grad, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("axis", AXES)
@every_kind
def test_strength_leads_straight_from_w_to_the_tuned_w(kind: str, axis: str) -> None:
    layer, x = layer_and_x(kind)
    W, weights = layer.base.weight.detach().clone(), dora_weights(layer, axis)
    layer.add("default", weights)
    for strength in (0.0, 0.3, 1.0, 2.0):
        layer.strength["default"] = strength
        expected = W + strength * (by_hand(weights, W, axis) - W)
        torch.testing.assert_close(W + layer.delta(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer(x), plain(layer, x, expected, layer.base.bias), atol=5e-5, rtol=1e-5)


@every_kind
def test_dora_and_lora_add_up(kind: str) -> None:
    layer, x = layer_and_x(kind)
    W, one, two, three = (
        layer.base.weight.detach().clone(),
        dora_weights(layer),
        dora_weights(layer, "input", seed=5),
        weights_for(layer),
    )
    for name, weights in (("one", one), ("two", two), ("three", three)):
        layer.add(name, weights)
    layer.strength = {"one": 0.8, "two": 0.5, "three": -0.25}
    delta = 0.8 * one.delta(W) + 0.5 * two.delta(W) - 0.25 * three.delta(W)
    torch.testing.assert_close(layer.delta(), delta)
    torch.testing.assert_close(layer(x), plain(layer, x, W + delta, layer.base.bias), atol=5e-5, rtol=1e-5)
    layer.merge()
    torch.testing.assert_close(layer(x), plain(layer, x, W + delta, layer.base.bias), atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(layer.delta(), delta)


def test_dora_with_dropout_drops_the_detour_alone() -> None:
    layer = LoRAConv2d(nn.Conv2d(6, 5, 3))
    layer.add("default", fresh_dora(layer), dropout=0.5)
    x = random(2, 6, 7, 7)
    assert torch.equal(layer.train()(x), layer.base(x))  # B is zero


@pytest.mark.parametrize("axis", AXES)
@every_kind
def test_the_norm_is_no_other_under_autocast(kind: str, axis: str) -> None:
    """Mixed precision would round V; then m / ||V||, 1 here to the bit, would be another than in the exported file."""
    layer, x = layer_and_x(kind)
    change = dora_weights(layer, axis)
    m = lengths(layer.base.weight.detach() + change.product(), change.magnitude.shape)
    layer.add("default", LoRAWeights(change.A, change.B, change.scale, m))
    exact = layer.delta()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer.base(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(layer.dora("default", x, y), layer.lora("default", x).float())
        assert torch.equal(layer.delta(), exact)


# --- in a model ------------------------------------------------------------------------------------------------------


def test_dora_in_a_unet() -> None:
    unet = tiny_unet()
    before = answer(unet)
    inject(unet, 2, alpha=3, targets=["attention", "resnets", "samplers"], dora=True)
    assert torch.equal(answer(unet), before)
    kinds = {name.split(".")[-2] for name in trainable(unet)}
    assert kinds == {"lora_A", "lora_B", "lora_magnitude"} and len(trainable(unet)) == 3 * len(lora_layers(unet))
    shake(unet)
    tuned, bits = answer(unet), digest(unet)
    assert not torch.allclose(tuned, before, atol=1e-2)
    merge(unet)
    torch.testing.assert_close(answer(unet), tuned, atol=1e-5, rtol=1e-5)
    unmerge(unet)
    assert digest(unet) == bits and torch.equal(answer(unet), tuned)
    set_adapters(unet, [])
    assert torch.equal(answer(unet), before)
