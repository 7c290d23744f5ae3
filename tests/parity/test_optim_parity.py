"""Beside torchao's AdamW8bit: the same values, the same codes, the same weights.

It differs in two things, on purpose. A tensor whose size is no multiple of 256 keeps fp32 moments there, and is packed here,
with a shorter last block. And a block whose largest number is under 1e-12, as second moments of small gradients are, is
divided by 1e-12 there, and by its largest here.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minidiff.fast.adam8bit import LeanAdamW, dequantize, quantize, tables

quant_utils: Any = pytest.importorskip("torchao.optim.quant_utils")
theirs: Any = pytest.importorskip("torchao.optim")

SIGNED = pytest.mark.parametrize("signed", [True, False])
RATES: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
SHAPES = [(64, 64), (5,), (16, 8, 8, 8)]  # the moments of the second are fp32


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wide(n: int, signed: bool) -> Tensor:
    """Numbers of many magnitudes."""
    x = draws(n) * 10 ** draws(n, seed=1)
    return x if signed else x.square()


@SIGNED
def test_tree_values(signed: bool) -> None:
    assert torch.equal(tables(signed, torch.device("cpu"))[0], torch.tensor(quant_utils.create_dynamic_map(signed)))


@SIGNED
def test_codes_and_scales(signed: bool) -> None:
    """All equal, but for one number in 10,000 that lies as near to one value as to the next, up to fp32's rounding."""
    x, values = wide(256 * 400, signed), tables(signed, torch.device("cpu"))[0]
    scaled, scale = quant_utils.scale_tensor(x, 256)
    their_codes, (codes, absmax) = quant_utils.quantize_8bit_with_qmap(scaled, values), quantize(x, signed)
    assert torch.equal(absmax, scale)
    other = codes != their_codes
    assert other.float().mean() < 1e-4
    near, far = ((values[c[other].int()] - scaled[other]).abs() for c in (codes, their_codes))
    assert torch.allclose(near, far, rtol=1e-3, atol=0)
    assert torch.equal(dequantize(codes, absmax, signed), quant_utils.dequant_with_qmap(codes, values, scale))


def test_twenty_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights agree to 1e-6, and of the codes all but one in a thousand, none of which is off by more than one."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # compiling takes longer than all else
    ours, others = ([nn.Parameter(draws(*shape, seed=i)) for i, shape in enumerate(SHAPES)] for _ in range(2))
    optimizer, their_optimizer = LeanAdamW(ours, **RATES), theirs.AdamW8bit(others, **RATES)
    for step in range(20):
        for i, (p, q) in enumerate(zip(ours, others, strict=True)):
            p.grad = draws(*p.shape, seed=100 * (step + 1) + i) + 0.3 * draws(*p.shape, seed=50 + i)
            q.grad = p.grad.clone()
        optimizer.step()
        their_optimizer.step()
    for p, q in zip(ours, others, strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)
        for name in ("exp_avg", "exp_avg_sq"):
            mine, other = optimizer.state[p][name], their_optimizer.state[q][name]
            if p.numel() == 5:
                assert torch.allclose(mine, other, rtol=1e-5)
                continue
            steps = (mine.int() - other.codes.int()).abs()
            assert steps.max() <= 1 and (steps > 0).float().mean() < 1e-3
            assert torch.allclose(optimizer.state[p][f"{name}_absmax"], other.scale, rtol=1e-5)


def test_where_the_two_differ() -> None:
    """Second moments of gradients about 1e-9, that is 1e-18: there a third of a block becomes zero."""
    v = (1e-9 * draws(256)).square()
    values = tables(False, torch.device("cpu"))[0]
    scaled, scale = quant_utils.scale_tensor(v, 256)
    their_v = quant_utils.dequant_with_qmap(quant_utils.quantize_8bit_with_qmap(scaled, values), values, scale)
    our_v = dequantize(*quantize(v, False), False)
    assert (our_v - v).norm() < 0.02 * v.norm() and (their_v - v).norm() > 0.1 * v.norm()
