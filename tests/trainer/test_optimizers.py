"""Learning rates, clipping, averages; steps inside the backward pass, and which savings of memory cannot be joined."""

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_harness import NUMBERS, numbers
from torch import Tensor, nn

from minidiff.core.errors import MinidiffError, SettingsError, WeightsError
from minidiff.core.train import LoopSettings, clip_gradients, lr_factor
from minidiff.fast.adam8bit import LeanAdamW
from minidiff.trainer.distributed import World
from minidiff.trainer.optimizers import EMA, adamw, load_optimizer_state, optimizer_state
from minidiff.trainer.run import fit, read_metrics
from minidiff.trainer.settings import TrainSettings


def rates(scheduler: str, warmup: int, total: int = 8) -> list[float]:
    settings = LoopSettings(total, lr_scheduler=scheduler, lr_warmup_steps=warmup)
    return [lr_factor(done, settings) for done in range(total + 1)]


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


# --- the step inside the backward pass --------------------------------------------------------------------------------------

def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)), torch.randn(32, 8)


def pass_backward(model: nn.Module, x: Tensor) -> None:
    (model(x) - x.sum(1, keepdim=True)).square().mean().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("eight_bit", [False, True])
def test_in_backward_is_the_usual_step_where_nothing_is_clipped(eight_bit: bool) -> None:
    """To the bit: what a layer needs of the weights on the way back is read before they move."""
    results = []
    for early in (True, False):
        model, x = network()
        optimizer = LeanAdamW(model.parameters(), 0.05, eight_bit=eight_bit)
        with optimizer.in_backward(1e9) if early else nullcontext():
            for _ in range(3):
                optimizer.zero_grad()
                pass_backward(model, x)
                norm = optimizer.norm() if early else clip_gradients(list(model.parameters()), 1e9)
                optimizer.step()
        results.append(([p.detach() for p in model.parameters()], norm))
    (early_weights, early_norm), (weights, norm) = results
    assert all(map(torch.equal, early_weights, weights)) and early_norm == pytest.approx(norm)


def test_in_backward_holds_one_gradient_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network()
    optimizer = LeanAdamW(model.parameters(), 0.05)
    there: list[int] = []
    plain = optimizer.update

    def update(p: nn.Parameter, grad: Tensor) -> None:
        there.append(sum(q.grad is not None for q in model.parameters()))
        plain(p, grad)

    monkeypatch.setattr(optimizer, "update", update)
    with optimizer.in_backward(1e9):
        pass_backward(model, x)
    assert there == [1] * 6 and all(p.grad is None for p in model.parameters())
    pass_backward(model, x)  # outside, all is as usual
    assert len(there) == 6 and all(p.grad is not None for p in model.parameters())


def test_in_backward_clips_each_tensor_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told is the norm of all before clipping; each tensor was cut to the limit, and not all together to it."""
    model, x = network()
    pass_backward(model, x)
    grads = [p.grad for p in model.parameters()]
    limit = sorted(g.norm().item() for g in grads if g is not None)[2]
    model.zero_grad()
    optimizer = LeanAdamW(model.parameters(), 0.05)
    seen: dict[nn.Parameter, Tensor] = {}
    monkeypatch.setattr(optimizer, "update", lambda p, grad: seen.update({p: grad.clone()}))
    with optimizer.in_backward(limit):
        pass_backward(model, x)
        assert optimizer.norm() == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in grads if g is not None)))
    for p, g in zip(model.parameters(), grads, strict=True):
        assert g is not None and torch.allclose(seen[p], g * min(1.0, limit / g.norm().item()), rtol=1e-4)
    assert math.sqrt(sum(g.square().sum().item() for g in seen.values())) > 1.5 * limit  # not the global norm


def test_in_backward_leaves_a_broken_tensor_where_it_was() -> None:
    """It keeps its gradient, to be named; the tensors that came before it have moved."""
    model, x = network()
    broken = model[2].weight
    broken.register_hook(lambda grad: grad * math.inf)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = LeanAdamW(model.parameters(), 0.05)
    with optimizer.in_backward(1e9):
        pass_backward(model, x)
        assert not math.isfinite(optimizer.norm()) and not optimizer.norms
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert still == ["2.weight"] == [name for name, p in model.named_parameters() if p.grad is not None]


def test_a_run_in_backward_learns_and_tells_the_norm(tmp_path: Path) -> None:
    settings = replace(NUMBERS.settings, output_dir=str(tmp_path), optimizer_in_backward=True, use_ema=False)
    task = numbers(settings)
    assert fit(task, settings).finished
    rows = [row for row in read_metrics(tmp_path) if "loss" in row]
    assert all(row["grad_norm"] > 0 for row in rows) and rows[-1]["loss"] < rows[0]["loss"]
    assert all(p.grad is None for p in task.trainable.values())


def test_a_run_in_backward_that_breaks_names_the_tensor(tmp_path: Path) -> None:
    settings = replace(NUMBERS.settings, output_dir=str(tmp_path), optimizer_in_backward=True, use_ema=False)
    task = numbers(settings)
    task.trainable["2.weight"].register_hook(lambda grad: grad * math.nan)
    with pytest.raises(MinidiffError, match="3 updates in a row without .* The first broken gradient is that of 2.weight"):
        fit(task, settings)


def test_a_tensor_that_the_backward_pass_never_meets_is_a_bug(tmp_path: Path) -> None:
    settings = replace(NUMBERS.settings, output_dir=str(tmp_path), optimizer_in_backward=True, use_ema=False)
    task = numbers(settings)
    task.trainable["lost"] = nn.Parameter(torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"got no gradient: \['lost'\]"):
        fit(task, settings)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "accumulation": (
        {"optimizer_in_backward": True, "gradient_accumulation_steps": 2},
        "--optimizer_in_backward cannot be joined with --gradient_accumulation_steps",
    ),
    "fp16": (
        {"optimizer_in_backward": True, "mixed_precision": "fp16"},
        "--optimizer_in_backward cannot be joined with --mixed_precision fp16",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_savings_that_cannot_be_joined(name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(SettingsError, match=message):
        replace(TrainSettings(), **changes).check()


def test_a_saving_that_several_processes_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the folder is touched."""
    monkeypatch.setattr("minidiff.trainer.distributed.world", lambda: World(0, 2))
    settings = TrainSettings(output_dir=str(tmp_path / "run"), optimizer_in_backward=True)
    with pytest.raises(SettingsError, match="--optimizer_in_backward is for one process"):
        fit(numbers(settings), settings)
    assert not (tmp_path / "run").exists()


def test_which_optimizer_the_settings_mean() -> None:
    p, plain = nn.Parameter(torch.zeros(1)), TrainSettings()
    assert isinstance(adamw([p], plain), torch.optim.AdamW)
    for changes, eight_bit in (({"use_8bit_adam": True}, True), ({"optimizer_in_backward": True}, False)):
        optimizer = adamw([p], replace(plain, learning_rate=0.5, adam_beta1=0.1, **changes))
        assert isinstance(optimizer, LeanAdamW) and optimizer.eight_bit == eight_bit
        group = optimizer.param_groups[0]
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.1, 0.999), 1e-8, 1e-2)


@pytest.mark.parametrize("damage", ["floats for codes", "too many blocks"])
def test_8_bit_moments_of_something_else(damage: str) -> None:
    p = nn.Parameter(torch.zeros(5000))
    p.grad = torch.ones_like(p)
    optimizer = LeanAdamW([p], 0.1)
    optimizer.step()
    state = optimizer_state(optimizer)
    if damage == "floats for codes":
        state["0.exp_avg"] = state["0.exp_avg"].float()
    else:
        state["0.exp_avg_absmax"] = torch.ones(21)
    with pytest.raises(WeightsError, match="0.exp_avg"):
        load_optimizer_state(LeanAdamW([p], 0.1), state)


@pytest.mark.parametrize("eight_bit", [False, True])
def test_where_step_counts_go_in_a_resumed_run(eight_bit: bool) -> None:
    """torch's fused AdamW wants them beside the weights; `meta` stands for a GPU. Ours counts on the CPU."""
    p = nn.Parameter(torch.zeros(5000))
    p.grad = torch.ones_like(p)
    first = adamw([p], TrainSettings(use_8bit_adam=eight_bit))
    first.step()
    elsewhere = nn.Parameter(torch.zeros(5000, device="meta"))
    second = adamw([elsewhere], TrainSettings(use_8bit_adam=eight_bit))
    load_optimizer_state(second, optimizer_state(first))
    where = {name: tensor.device.type for name, tensor in second.state[elsewhere].items()}
    assert where.pop("step") == ("cpu" if eight_bit else "meta") and set(where.values()) == {"meta"}
