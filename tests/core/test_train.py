"""The loop, on a task of three numbers: y = W x, learned from noise."""

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from minidiff.core.errors import MinidiffError, SettingsError, WeightsError
from minidiff.core.rng import hashed_seed, normal
from minidiff.files import weights
from minidiff.trainer import checkpoint
from minidiff.trainer.plot import VALIDATION_COLOURS, loss_curve
from minidiff.trainer.run import fit, read_metrics
from minidiff.trainer.settings import TrainSettings
from minidiff.trainer.task import Job

TRUTH = torch.tensor([[1.0, -2.0, 3.0]])
BASE = TrainSettings(
    max_train_steps=8, checkpointing_steps=3, validation_steps=0, learning_rate=0.05, train_batch_size=4
)


def toy(settings: TrainSettings, spoil: Callable[[int], float] = lambda step: 1.0) -> Job:
    """Samples are numbered through the whole run, so batch 4 and 4 x batch 1 see the same ones."""
    model = nn.Linear(3, 1, bias=True)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    accumulation, size = settings.gradient_accumulation_steps, settings.train_batch_size

    def batch(step: int, micro: int) -> dict[str, Tensor]:
        first = (step * accumulation + micro) * size
        return {"x": torch.stack([normal((3,), settings.seed, "x", i) for i in range(first, first + size)])}

    def loss(batch: dict[str, Tensor], step: int, micro: int) -> Tensor:
        return (model(batch["x"]) - batch["x"] @ TRUTH.T).square().mean() * spoil(step)

    def export(folder: Path) -> None:
        weights.save(model.state_dict(), folder / "model.safetensors")

    return Job(dict(model.named_parameters()), batch, loss, export=export, facts={"data": "toy"})


def result(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def into(folder: Path, **changes: Any) -> TrainSettings:
    return replace(BASE, output_dir=str(folder), **changes)


def test_it_learns(tmp_path: Path) -> None:
    settings = into(tmp_path, max_train_steps=100, checkpointing_steps=99, learning_rate=0.1, lr_scheduler="cosine")
    task = toy(settings)
    report = fit(task, settings)
    assert report.finished and report.done == 100 and read_metrics(tmp_path)[-1]["loss"] < 0.01
    assert torch.allclose(task.trainable["weight"], TRUTH, atol=0.05)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-99", "checkpoint-100"]
    assert result(tmp_path) == result(tmp_path / "checkpoint-100")


def test_accumulation_is_the_big_batch(tmp_path: Path) -> None:
    big, small = into(tmp_path / "a"), into(tmp_path / "b", train_batch_size=1, gradient_accumulation_steps=4)
    one, four = toy(big), toy(small)
    fit(one, big), fit(four, small)
    for name in one.trainable:
        assert torch.allclose(one.trainable[name], four.trainable[name], atol=1e-6)
    for a, b in zip(read_metrics(tmp_path / "a"), read_metrics(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-5
        )


class Crash(Exception):
    pass


def crash_at(step: int) -> Callable[[int], float]:
    def spoil(now: int) -> float:
        if now == step:
            raise Crash
        return 1.0

    return spoil


@pytest.mark.parametrize("when", [0, 1, 3, 4, 7])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_resume_is_exact_to_the_bit(tmp_path: Path, when: int, ema: float | None) -> None:
    def run(settings: TrainSettings, **spoil: Callable[[int], float]) -> None:
        task = toy(settings, **spoil)
        task.ema_decay = ema
        fit(task, settings)

    schedule: dict[str, Any] = {"lr_scheduler": "cosine", "lr_warmup_steps": 2}
    run(into(tmp_path / "straight", **schedule))
    with pytest.raises(Crash):
        run(into(tmp_path / "broken", **schedule), spoil=crash_at(when))
    run(into(tmp_path / "broken", resume_from_checkpoint="latest", **schedule))
    assert result(tmp_path / "straight") == result(tmp_path / "broken")
    rows = [read_metrics(tmp_path / name) for name in ("straight", "broken")]
    assert [r["step"] for r in rows[1]] == list(range(1, 9))  # no gap, no duplicate
    for key in ("loss", "lr", "grad_norm"):
        assert [r[key] for r in rows[0]] == [r[key] for r in rows[1]]


def test_going_further(tmp_path: Path) -> None:
    fit(toy(BASE), into(tmp_path / "straight"))
    short = into(tmp_path / "parts", max_train_steps=5)
    fit(toy(short), short)
    further = into(tmp_path / "parts", resume_from_checkpoint="latest")
    fit(toy(further), further)
    assert result(tmp_path / "straight") == result(tmp_path / "parts")
    again = fit(toy(further), further)  # nothing left to do: no harm
    assert again.done == 8 and result(tmp_path / "straight") == result(tmp_path / "parts")
    with pytest.raises(SettingsError, match="further already"):
        fit(toy(short), replace(short, resume_from_checkpoint="latest"))


@pytest.mark.parametrize("name, value", [("seed", 1), ("learning_rate", 0.1), ("train_batch_size", 2)])
def test_resume_refuses_other_settings(tmp_path: Path, name: str, value: object) -> None:
    fit(toy(BASE), into(tmp_path))
    before = result(tmp_path)
    changed = into(tmp_path, resume_from_checkpoint="latest", **{name: value})
    with pytest.raises(SettingsError, match=f"{name}: was"):
        fit(toy(changed), changed)
    task = toy(BASE)
    task.facts = {"data": "other"}
    with pytest.raises(SettingsError, match='data: was "toy", is now "other"'):
        fit(task, into(tmp_path, resume_from_checkpoint="latest"))
    assert result(tmp_path) == before


def test_latest_without_a_checkpoint_starts_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(toy(BASE), into(tmp_path / "run", resume_from_checkpoint="latest"))
    assert "no checkpoint yet" in capsys.readouterr().err


def test_max_train_steps_belongs_to_a_decaying_rate(tmp_path: Path) -> None:
    short = into(tmp_path, max_train_steps=5, lr_scheduler="linear")
    fit(toy(short), short)
    longer = replace(short, max_train_steps=8, resume_from_checkpoint="latest")
    with pytest.raises(SettingsError, match="max_train_steps: was 5, is now 8"):
        fit(toy(longer), longer)


def test_a_broken_step_is_skipped(tmp_path: Path) -> None:
    def spoil(step: int) -> float:
        return math.nan if step in (2, 3, 5) else 1.0

    task = toy(BASE, spoil)
    assert fit(task, into(tmp_path)).finished
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if row["loss"] is None] == [3, 4, 6]
    assert all(p.isfinite().all() for p in task.trainable.values())
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_three_broken_steps_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(MinidiffError) as error:
        fit(toy(BASE, lambda step: math.inf if step >= 4 else 1.0), into(tmp_path))
    message = str(error.value)
    assert "step 7: loss inf, learning rate 0.05)" in message
    assert "The first broken gradient is that of weight" in message
    assert "checkpoint-3" in message and "--learning_rate" in message
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-3"  # at 6, two had been skipped: perhaps the weights are bad
    assert not (tmp_path / "model.safetensors").exists()
    good = weights.read_header(tmp_path / "checkpoint-3" / "model.safetensors").read()
    assert all(t.isfinite().all() for t in good.values())


@pytest.mark.parametrize("steps, said", [(1, "The only update was without a finite loss"), (2, "2 updates in a row")])
def test_a_run_without_a_single_update_is_no_success(tmp_path: Path, steps: int, said: str) -> None:
    with pytest.raises(MinidiffError, match=f"{said}.*No checkpoint had been saved yet"):
        fit(toy(BASE, lambda step: math.nan), into(tmp_path, max_train_steps=steps))
    assert not (tmp_path / "model.safetensors").exists() and not checkpoint.checkpoints(tmp_path)


def test_a_run_whose_last_updates_were_skipped_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once in a while fp16 overflows; if that is in the last update, the run is none the worse."""
    assert fit(toy(BASE, lambda step: math.nan if step >= 6 else 1.0), into(tmp_path)).finished
    assert "Note: the last 2 updates had no finite loss and gradient, and were skipped" in capsys.readouterr().err
    assert result(tmp_path) == result(tmp_path / "checkpoint-6") and (tmp_path / "checkpoint-8").is_dir()


def test_stopped_while_updates_are_skipped_saves_nothing(tmp_path: Path) -> None:
    def spoil(step: int) -> float:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return math.nan if step == 4 else 1.0

    assert not fit(toy(BASE, spoil), into(tmp_path)).finished
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-3"


def test_broken_weights_are_not_saved(tmp_path: Path) -> None:
    settings = into(tmp_path)
    task = toy(settings)

    def spoil(step: int) -> float:
        if step == 5:
            task.trainable["weight"].data.fill_(math.nan)
        return 1.0

    plain = task.loss
    task.loss = lambda batch, step, micro: plain(batch, step, micro) * spoil(step)
    with pytest.raises(MinidiffError, match="After step 6, weight holds NaN.*checkpoint-3"):
        fit(task, settings)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-3"


def test_clipping_reaches_the_parameters(tmp_path: Path) -> None:
    settings = into(tmp_path, max_train_steps=1, max_grad_norm=1e-3)
    task = toy(settings)
    task.optimizer = torch.optim.SGD(task.trainable.values(), lr=1.0)
    fit(task, settings)
    step = torch.cat([p.detach().flatten() for p in task.trainable.values()])  # from zero
    assert step.norm().item() == pytest.approx(1e-3, rel=1e-4)
    assert read_metrics(tmp_path)[0]["grad_norm"] > 1


def test_parameter_groups_keep_their_own_rates(tmp_path: Path) -> None:
    settings = into(tmp_path, lr_scheduler="linear")
    task = toy(settings)
    groups = [{"params": [p], "lr": rate} for p, rate in zip(task.trainable.values(), (0.1, 0.4), strict=True)]
    task.optimizer = torch.optim.AdamW(groups)
    fit(task, settings)
    assert [g["lr"] for g in task.optimizer.param_groups] == pytest.approx([0.1 / 8, 0.4 / 8])


def test_export_has_the_average(tmp_path: Path) -> None:
    settings = into(tmp_path)
    task = toy(settings)
    task.ema_decay = 0.99
    fit(task, settings)
    saved = checkpoint.load(tmp_path / "checkpoint-8")[1]
    exported = weights.read_header(tmp_path / "model.safetensors").read()
    for name, p in task.trainable.items():
        assert torch.equal(saved["ema"][name], exported[name]) and torch.equal(saved["weights"][name], p)
    assert not torch.equal(exported["weight"], task.trainable["weight"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(
    tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(step: int) -> float:
        if step == 4:
            os.kill(os.getpid(), number)
        return 1.0

    handler = signal.getsignal(number)
    report = fit(toy(BASE, spoil), into(tmp_path / "run"))
    assert not report.finished and report.done == 5
    assert checkpoint.latest(tmp_path / "run") == tmp_path / "run" / "checkpoint-5"
    assert "--resume_from_checkpoint latest" in capsys.readouterr().err
    assert signal.getsignal(number) == handler
    fit(toy(BASE), into(tmp_path / "run", resume_from_checkpoint="latest"))
    fit(toy(BASE), into(tmp_path / "straight"))
    assert result(tmp_path / "run") == result(tmp_path / "straight")


@pytest.mark.parametrize("call", ["checkpoint", "metrics", "result"])
def test_a_full_disk_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    settings = into(tmp_path)
    task = toy(settings)
    real = checkpoint.save

    def full(*args: Any) -> Path:
        if call == "checkpoint" and args[1] > 3:
            raise OSError(28, "No space left on device")
        return real(*args)

    def full_end(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    if call == "result":
        task.card = full_end
    if call == "metrics":
        task.batch = lambda step, micro, batch=task.batch: (  # type: ignore[misc]
            (tmp_path / "metrics.jsonl").unlink() or (tmp_path / "metrics.jsonl").mkdir() or batch(step, micro)
            if step == 5
            else batch(step, micro)
        )
    with pytest.raises(MinidiffError, match=f"{call}.*could not be written.*The last good checkpoint is .*checkpoint-[38]"):
        fit(task, settings)


def test_previews_and_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidiff.trainer.run.loss_curve", loss_curve)
    settings = into(tmp_path, validation_steps=3)
    task, seen = toy(settings), []

    def preview(done: int) -> Image.Image:
        seen.append(done)
        return Image.new("RGB", (4, 4), (done, 0, 0))

    task.preview = preview
    fit(task, settings)
    assert seen == [3, 6, 8]
    (tmp_path / "samples" / "step-000008.png").unlink()  # as if killed before it was drawn
    fit(task, replace(settings, resume_from_checkpoint="latest"))
    fit(task, replace(settings, resume_from_checkpoint="latest"))
    assert seen == [3, 6, 8, 8]
    seen = [3, 6, 8]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [f"step-{n:06d}.png" for n in seen]
    assert Image.open(tmp_path / "loss.png").width > 100


def test_the_curve_comes_with_each_sheet_and_when_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr("minidiff.trainer.run.loss_curve", lambda rows, path: drawn.append(rows[-1]["step"]))
    task = toy(BASE, lambda step: os.kill(os.getpid(), signal.SIGTERM) or 1.0 if step == 3 else 1.0)
    task.preview = lambda done: Image.new("RGB", (4, 4))
    assert fit(task, into(tmp_path, validation_steps=3)).done == 4
    assert drawn == [3, 4]


def test_the_bar_says_why_it_stands_and_how_well_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = toy(settings := into(tmp_path, validation_steps=4))
    task.preview = lambda done: Image.new("RGB", (4, 4))
    task.validate = lambda: {"val_loss": 0.125}
    fit(task, settings)
    said = capsys.readouterr().err
    assert "measuring val_loss" in said and "drawing a sheet" in said and ", val_loss 0.1250" in said


def test_nothing_is_measured_anew_where_the_metrics_are_lost(tmp_path: Path) -> None:
    """What a resumed run measures is not what the base was."""
    settings = into(tmp_path, validation_steps=8)
    task = toy(settings)
    task.validate = lambda: {"val_loss": 1.0}
    fit(task, replace(settings, max_train_steps=5))
    (tmp_path / "metrics.jsonl").unlink()
    fit(task, replace(settings, resume_from_checkpoint="latest"))
    assert [row["step"] for row in read_metrics(tmp_path)] == [6, 7, 8]


@pytest.mark.parametrize("damage", ["shape of moments", "dtype", "no average"])
def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path, damage: str) -> None:
    settings = into(tmp_path, use_ema=True, ema_decay=0.5)
    fit(toy(settings), replace(settings, max_train_steps=5))
    manifest, tensors = checkpoint.load(path := tmp_path / "checkpoint-5")
    if damage == "shape of moments":
        tensors["optimizer"]["0.exp_avg"] = torch.zeros(7)
    if damage == "dtype":
        tensors["weights"]["weight"] = tensors["weights"]["weight"].to(torch.int8)
    if damage == "no average":
        del tensors["ema"]
    checkpoint.save(tmp_path, 5, tensors, manifest["made_of"], lambda folder: None, None)
    task, further = toy(settings), replace(settings, resume_from_checkpoint="latest")
    with pytest.raises(WeightsError, match=f"{path}.*take another --output_dir"):
        fit(task, further)
    assert all(p.eq(0).all() for p in task.trainable.values())  # nothing was loaded halfway


def test_validation_is_in_the_metrics_and_in_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidiff.trainer.run.loss_curve", loss_curve)
    settings = into(tmp_path, validation_steps=3, use_ema=True, ema_decay=0.5)
    task, seen = toy(settings), []

    def validate() -> dict[str, float]:
        seen.append(task.trainable["weight"].detach().clone())
        return {"val_loss": 10.0 - len(seen)}

    task.validate = validate
    fit(task, settings)
    measured = {row["step"]: row for row in read_metrics(tmp_path) if "val_loss" in row}
    assert {step: row["val_loss"] for step, row in measured.items()} == {0: 9.0, 3: 8.0, 6: 7.0, 8: 6.0}
    assert "loss" not in measured[0]
    assert torch.equal(seen[-1], weights.read_header(tmp_path / "model.safetensors").read()["weight"])  # the average
    colours = {colour for _, colour in Image.open(tmp_path / "loss.png").convert("RGB").getcolors(1 << 20) or []}
    assert tuple(bytes.fromhex(VALIDATION_COLOURS[0][1:])) in colours


def test_ema_by_settings(tmp_path: Path) -> None:
    by_task, by_settings = toy(BASE), toy(BASE)
    by_task.ema_decay = 0.9
    fit(by_task, into(tmp_path / "task"))
    fit(by_settings, into(tmp_path / "settings", use_ema=True, ema_decay=0.9))
    assert result(tmp_path / "task") == result(tmp_path / "settings")
    with pytest.raises(SettingsError, match="use_ema: was true, is now false"):
        fit(toy(BASE), into(tmp_path / "settings", resume_from_checkpoint="latest"))


def test_epochs(tmp_path: Path) -> None:
    settings = into(tmp_path, max_train_steps=None, num_train_epochs=2, gradient_accumulation_steps=2)
    task = toy(settings)
    with pytest.raises(SettingsError, match="--num_train_epochs needs a task with epochs; give --max_train_steps"):
        fit(task, settings)
    task.samples_per_epoch = 10
    assert fit(task, settings).done == 3  # 20 samples, 8 in an update


def test_what_networks_draw_themselves_is_a_function_of_the_seed_and_the_step(tmp_path: Path) -> None:
    drawn: list[float] = []
    settings = into(tmp_path, max_train_steps=2, gradient_accumulation_steps=2)
    task = toy(settings)
    plain = task.loss

    def loss(batch: dict[str, Tensor], step: int, micro: int) -> Tensor:
        drawn.append(torch.rand(()).item())
        assert torch.initial_seed() == hashed_seed(settings.seed, "torch", step, micro, 0)
        return plain(batch, step, micro)

    task.loss = loss
    torch.manual_seed(7)
    before = torch.get_rng_state()
    fit(task, settings)
    assert len(set(drawn)) == 4 and torch.equal(torch.get_rng_state(), before)  # all differ, and the caller's are his own


def test_metrics_and_a_torn_line(tmp_path: Path) -> None:
    fit(toy(BASE), into(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [["step", "loss", "lr", "grad_norm", "seconds"]] * 8
    for torn in ('{"step": 9, "lo', "\0\0\0\n"):
        (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + torn)
        assert read_metrics(tmp_path) == rows


def test_a_tensor_without_a_gradient_is_a_bug(tmp_path: Path) -> None:
    task = toy(BASE)
    task.trainable["unused"] = nn.Parameter(torch.zeros(1))
    with pytest.raises(RuntimeError, match="1 of 3 trainable tensors got no gradient.*unused"):
        fit(task, into(tmp_path / "a"))


def test_mixed_precision(tmp_path: Path) -> None:
    dtypes: list[torch.dtype] = []
    settings = into(tmp_path, mixed_precision="bf16")
    task, linear = toy(settings), nn.Linear(3, 1)
    plain = task.loss

    def loss(batch: dict[str, Tensor], step: int, micro: int) -> Tensor:
        dtypes.append(linear(batch["x"]).dtype)
        return plain(batch, step, micro)

    task.loss = loss
    fit(task, settings)
    assert set(dtypes) == {torch.bfloat16} and task.trainable["weight"].dtype == torch.float32
    half = into(tmp_path / "half", mixed_precision="fp16")
    with pytest.raises(SettingsError, match="needs a GPU"):
        fit(toy(half), half)
