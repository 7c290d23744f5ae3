"""Block-wise 8-bit AdamW. The section numbers are those of arXiv 2110.02861."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from minidiff.core.config import SD15_UNET
from minidiff.core.unet import UNet2DConditionModel
from minidiff.fast import adam8bit
from minidiff.fast.adam8bit import BLOCK, LEAST, LeanAdamW, dequantize, quantize, tables
from minidiff.files import weights
from minidiff.trainer.optimizers import load_optimizer_state, optimizer_state

CPU = torch.device("cpu")
SIGNED = pytest.mark.parametrize("signed", [True, False])


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- 8-bit numbers -----------------------------------------------------------------------------------------------------


@SIGNED
def test_dynamic_tree_section_1_3(signed: bool) -> None:
    """Decade i below 1 has 2^(6 - i) values, or 2^(7 - i) without a sign, evenly spread; and there are 0 and 1."""
    values = tables(signed, CPU)[0]
    assert len(values.unique()) == 256 and 0.0 in values and values.max() == 1.0
    positive = values[(values > 0) & (values < 1)]
    for i in range(7):
        decade = positive[(positive > 0.1 * 10**-i) & (positive < 10**-i)]
        assert len(decade) == 2 ** (6 - i if signed else 7 - i)
        assert decade.diff().tolist() == pytest.approx([0.9 * 10**-i / len(decade)] * (len(decade) - 1), rel=1e-3)
    negative = values[values < 0]
    assert torch.equal(-negative.flip(0), positive) if signed else len(negative) == 0


@SIGNED
@pytest.mark.parametrize("n", [1, 256, 1000])
def test_quantize_takes_the_nearest_value_section_1_2(signed: bool, n: int) -> None:
    x = draws(n) * 10 ** (2 * draws(n, seed=1))
    x = x if signed else x.abs()
    codes, absmax = quantize(x, signed)
    assert codes.dtype == torch.uint8 and codes.shape == (n,) and absmax.shape == (math.ceil(n / BLOCK),)
    values, scale = tables(signed, CPU)[0], absmax.repeat_interleave(BLOCK)[:n]
    distance = ((x / scale)[:, None].double() - values.double()).abs()  # (n, 256), the slow way
    assert torch.allclose(distance.gather(1, codes[:, None].long())[:, 0], distance.amin(dim=1), rtol=0, atol=1e-8)
    assert torch.equal(dequantize(codes, absmax, signed), values[codes.int()] * scale)


def test_blocks_section_2_1() -> None:
    """One outlier spoils its own block alone; the largest of a block is remembered as it is."""
    x = draws(4 * BLOCK).abs()
    spoilt = x.clone()
    spoilt[300] = 1e6  # in the second block
    back, back_spoilt = (dequantize(*quantize(y, False), False) for y in (x, spoilt))
    others = torch.arange(4) != 1
    assert torch.equal(back.view(4, -1)[others], back_spoilt.view(4, -1)[others])
    assert (back_spoilt - spoilt).view(4, -1)[1].abs().max() > 10 * (back - x).abs().max()
    assert back_spoilt[300] == 1e6 and torch.equal(back.view(4, -1).amax(1), x.view(4, -1).amax(1))


@SIGNED
def test_zeros_and_very_small_numbers(signed: bool) -> None:
    x = torch.cat([torch.zeros(BLOCK), draws(BLOCK).abs() * 1e-30])
    back = dequantize(*quantize(x, signed), signed)
    assert torch.equal(back[:BLOCK], x[:BLOCK])
    assert ((back - x)[BLOCK:].abs().max() / x.max()).item() < 0.5 * 0.9 / 64  # half of the widest step


# --- the optimizer -----------------------------------------------------------------------------------------------------


def trained(optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> list[Tensor]:
    """The optimizer's parameters after gradients that lean one way, tensor by tensor, and tremble."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        for i, p in enumerate(parameters):
            p.grad = (0.3 * draws(*p.shape, seed=seed + i) + draws(*p.shape, seed=1000 * (step + 1) + i)).to(p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(draws(*shape, seed=50 + i)) for i, shape in enumerate(shapes)]


RATES = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
SHAPES = [(70, 80), (5,), (16, 8, 6, 7)]  # 8 bits: 5600 and 5376 numbers, neither a multiple of 256; fp32: 5


def test_adamw_algorithm_2_with_fp32_moments() -> None:
    """Loshchilov & Hutter 2019: torch's own AdamW, which test_optim.py works out by hand."""
    lean = trained(LeanAdamW(parameters(*SHAPES), **RATES, eight_bit=False), 10)
    plain = trained(torch.optim.AdamW(parameters(*SHAPES), **RATES), 10)
    for a, b in zip(lean, plain, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_update_comes_before_rounding_section_2() -> None:
    """The first update is that of fp32 moments, to the bit; the second is not."""
    packed, full = (LeanAdamW(parameters(*SHAPES), **RATES, eight_bit=bits) for bits in (True, False))
    assert all(map(torch.equal, trained(packed, 1), trained(full, 1)))
    assert [torch.equal(a, b) for a, b in zip(trained(packed, 1), trained(full, 1), strict=True)] == [False, True, False]


def test_second_moment_has_no_sign_section_2_2() -> None:
    """So its steps are half as wide as the first moment's: both are remembered to half a step of the widest."""
    (p,) = parameters((70, 80))
    p.grad = draws(70, 80)
    optimizer = LeanAdamW([p], **RATES)
    optimizer.step()
    state, errors = optimizer.state[p], []
    for name, exact in (("exp_avg", 0.2 * p.grad), ("exp_avg_sq", 0.05 * p.grad.square())):  # 1 - beta
        back = dequantize(state[name].flatten(), state[f"{name}_absmax"], signed=name == "exp_avg")
        scale = state[f"{name}_absmax"].repeat_interleave(BLOCK)[: p.numel()]
        errors.append(((back - exact.flatten()) / scale).abs().max().item())
    assert 0.5 * 0.9 / 128 < errors[0] <= 0.5 * 0.9 / 64 + 1e-6
    assert errors[1] <= 0.5 * 0.9 / 128 + 1e-6


def test_8_bits_go_where_32_bits_go() -> None:
    """After 50 updates they are apart by less than 2 % of the way (measured: 0.9 %)."""
    start = parameters(*SHAPES)
    packed, full = (trained(LeanAdamW(parameters(*SHAPES), **RATES, eight_bit=bits), 50) for bits in (True, False))
    for p, a, b in zip(start, packed, full, strict=True):
        way, apart = (b - p).norm(), (a - b).norm()
        assert apart < 0.02 * way
    assert not torch.equal(packed[0], full[0])


def test_bytes_of_state() -> None:
    """2 + 8 / 256 for each weight; on SD 1.5's U-Net 2.034 with its small tensors, which keep 8."""
    (p,) = parameters((64, 64))
    optimizer = LeanAdamW([p], 0.1)
    trained(optimizer, 1)
    assert sum(t.nbytes for t in optimizer.state[p].values()) == 4096 * (2 + 8 / 256) + 4  # and a step count
    with torch.device("meta"):
        unet = UNet2DConditionModel(SD15_UNET)
    kinds = [kind for p in unet.parameters() for kind in optimizer.kinds(p).values()]
    state = sum(shape.numel() * dtype.itemsize for shape, dtype in kinds)
    assert state / sum(p.numel() for p in unet.parameters()) < 2.035


def test_small_tensors_keep_fp32() -> None:
    small, large = parameters((LEAST - 1,), (LEAST,))
    optimizer = LeanAdamW([small, large], 0.1)
    trained(optimizer, 1)
    assert [optimizer.state[p]["exp_avg"].dtype for p in (small, large)] == [torch.float32, torch.uint8]


@pytest.mark.parametrize("eight_bit", [True, False])
def test_pieces_and_layout_change_nothing(eight_bit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(LeanAdamW(parameters(*SHAPES), **RATES, eight_bit=eight_bit), 3)
    monkeypatch.setattr(adam8bit, "PIECE", 2 * BLOCK)
    turned = parameters(*SHAPES)
    turned[2].data = turned[2].data.to(memory_format=torch.channels_last)
    pieces = trained(LeanAdamW(turned, **RATES, eight_bit=eight_bit), 3)
    assert all(map(torch.equal, whole, pieces))


@pytest.mark.parametrize("eight_bit", [True, False])
def test_state_through_a_file(tmp_path: Path, eight_bit: bool) -> None:
    """Two updates, a file, two more: the bits of four. Codes stay codes (torch's own loading makes floats of them)."""
    first, straight = (LeanAdamW(parameters(*SHAPES), **RATES, eight_bit=eight_bit) for _ in range(2))
    trained(first, 2)
    weights.save(optimizer_state(first), tmp_path / "state.safetensors")
    second = LeanAdamW([nn.Parameter(p.detach().clone()) for p in first.groups], **RATES, eight_bit=eight_bit)
    load_optimizer_state(second, weights.read_header(tmp_path / "state.safetensors").read())
    trained(straight, 2)
    assert all(map(torch.equal, trained(second, 2, seed=9), trained(straight, 2, seed=9)))
    one, other = optimizer_state(second), optimizer_state(straight)
    assert one.keys() == other.keys() and all(one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one)
