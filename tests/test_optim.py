"""Learning rates, clipping, averages."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from minidiff.train.optim import EMA, Movement, adamw, clip_gradients, lr_factor
from minidiff.train.settings import TrainSettings


def rates(scheduler: str, warmup: int, total: int = 8) -> list[float]:
    settings = replace(TrainSettings(), lr_scheduler=scheduler, lr_warmup_steps=warmup)
    return [lr_factor(done, total, settings) for done in range(total + 1)]


def test_schedules() -> None:
    assert rates("constant", 0) == [1.0] * 9
    assert rates("constant_with_warmup", 4) == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert rates("linear", 4) == [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0]
    cosine = [0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(7)]
    assert rates("cosine", 2) == pytest.approx([0, 0.5, *cosine])
    assert rates("linear", 8) == [k / 8 for k in range(8)] + [1.0]  # warm-up to the very end: nothing left to decay


def test_adamw_algorithm_2() -> None:
    """Loshchilov & Hutter 2019, algorithm 2, worked out by hand for two updates."""
    settings = TrainSettings(learning_rate=0.1, adam_weight_decay=0.5, adam_beta1=0.8, adam_beta2=0.9)
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = adamw([p], settings)
    w, m, v = 2.0, 0.0, 0.0
    for t, g in enumerate([3.0, -1.0], start=1):
        p.grad = torch.tensor([g])
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        w -= 0.1 * (m / (1 - 0.8**t) / (math.sqrt(v / (1 - 0.9**t)) + 1e-8) + 0.5 * w)
    assert p.item() == pytest.approx(w, rel=1e-6)


def test_clipping_clips() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_gradients([a, b], 1.0) == pytest.approx(5.0)
    assert torch.cat([a.grad, b.grad]).norm().item() == pytest.approx(1.0, rel=1e-5)
    assert (a.grad[0] / b.grad[0]).item() == pytest.approx(3 / 4)  # the direction stays
    assert clip_gradients([a, b], 2.0) == pytest.approx(1.0, rel=1e-5)
    assert torch.cat([a.grad, b.grad]).norm().item() == pytest.approx(1.0, rel=1e-5)  # never scaled up


def test_clipping_leaves_a_broken_gradient_to_be_named() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([1.0]), torch.tensor([math.inf])
    assert clip_gradients([a, b], 1.0) == math.inf
    assert a.grad.item() == 1.0


def test_ema_formula() -> None:
    """a <- d a + (1 - d) w with d = min(decay, (1 + n) / (10 + n))."""
    p = nn.Parameter(torch.tensor([1.0]))
    ema, expected = EMA({"p": p}, 0.3), 1.0
    for n in range(1, 6):
        p.data.fill_(n * 10.0)
        ema.update(n)
        d = min(0.3, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * n * 10.0
    assert ema.average["p"].item() == pytest.approx(expected)


def test_ema_applied_is_undone_to_the_bit() -> None:
    p = nn.Parameter(torch.randn(5))
    ema = EMA({"p": p}, 0.9)
    ema.average["p"] += 1
    before, average = p.detach().clone(), ema.average["p"].clone()
    with pytest.raises(KeyError), ema.applied():
        assert torch.equal(p, average)
        raise KeyError
    assert torch.equal(p, before) and torch.equal(ema.average["p"], average)


def test_movement_is_the_rms_of_the_change() -> None:
    p, q, still = (nn.Parameter(torch.randn(n)) for n in (3, 5000, 1))
    movement = Movement({"p": p, "q": q, "still": still})
    assert movement.rms() == 0.0 and movement.still() == ["p", "q", "still"]
    p.data += 2.0
    q.data += 0.5
    kept = {"p": 3, "q": 1000, "still": 1}
    assert {name: len(values) for name, values in movement.start.items()} == kept
    assert movement.rms() == pytest.approx(math.sqrt((3 * 4 + 1000 * 0.25) / 1004), rel=1e-5)
    assert movement.still() == ["still"]
