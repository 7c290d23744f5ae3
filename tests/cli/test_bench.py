"""The benchmark's own parts: order, statistics, counting, chart, output. No time is asserted: that is the machine's."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmarks import __main__ as bench
from benchmarks import chart, peers, report, training, work
from benchmarks.saved_bytes import flash_bytes, saved_bytes
from benchmarks.timing import Seconds, abba, measure, ratio_interval, rounds_of, summaries
from PIL import Image
from torch import Tensor, nn

from minidiff.cli import train_commands
from minidiff.cli.flags import Bench, Group
from minidiff.cli.main import main
from minidiff.draw.images import PAPER
from minidiff.trainer.task import Job

ROOT = Path(__file__).resolve().parents[2]

# --- order and statistics --------------------------------------------------------------------------------------------


def test_abba() -> None:
    assert abba(["A", "B", "C"], 3) == [["A", "B", "C"], ["C", "B", "A"], ["A", "B", "C"]]
    turns = rounds_of(["A", "B"])
    assert "".join(next(turns) for _ in range(8)) == "ABBAABBA"


def test_measure_takes_turns_in_whole_pairs_of_rounds() -> None:
    order: list[str] = []

    def contender(name: str, seconds: float) -> Any:
        return lambda: order.append(name) or Seconds(seconds, seconds)

    found = measure({"A": contender("A", 1.0), "B": contender("B", 2.0), "C": contender("C", 9.0)}, seconds=0.0)
    assert "".join(order) == "ABC" + "ABBA"  # warming up; then without C, which is hopeless
    assert {name: len(times) for name, times in found.items()} == {"A": 2, "B": 2, "C": 1}
    order.clear()
    measure({"A": contender("A", 1.0), "C": contender("C", 9.0)}, seconds=0.0, hopeless=float("inf"))
    assert "".join(order) == "AC" + "ACCA"


def test_ratio_interval_holds_the_true_ratio_and_narrows() -> None:
    rng = np.random.default_rng(0)

    def interval(rounds: int) -> tuple[float, float]:
        drift = 1 + 0.5 * rng.random(rounds)  # what slows a round slows both
        return ratio_interval(2.0 * drift * rng.normal(1, 0.02, rounds), 1.0 * drift * rng.normal(1, 0.02, rounds), draws=500)

    low, high = interval(200)
    wide_low, wide_high = interval(8)
    assert low < 2.0 < high and high - low < 0.2
    assert wide_high - wide_low > high - low
    assert ratio_interval([3.0] * 4, [1.5] * 6) == (2.0, 2.0)  # different counts: each side for itself


def test_rounds_stay_together() -> None:
    """A neighbour makes half of the rounds ten times slower, for both: the ratio of each round is still 2."""
    ours = np.array([1.0, 10.0] * 20)
    low, high = ratio_interval(2 * ours, ours)
    assert (low, high) == (2.0, 2.0)


def test_summary_is_over_ours() -> None:
    found = summaries({"minidiff": [1.0, 2.0, 3.0], "peer": [5.0, 6.0, 70.0]}, "minidiff")
    assert found["peer"].low is None  # three rounds are too few for an interval
    assert found["peer"].median == 6.0 and found["peer"].ratio == 3.0 and found["minidiff"].ratio == 1.0


# --- right before quick ------------------------------------------------------------------------------------------------


def test_a_wrong_contender_is_not_timed() -> None:
    right, x = torch.ones(4), {"runs": 0}

    def wrong() -> Tensor:
        x["runs"] += 1
        return right + 0.1

    rows, failed = work.run(work.Work("g", "w", {"minidiff": lambda: right, "peer": wrong}, 1e-3), seconds=0.0)
    assert [row.contender for row in rows] == ["minidiff"] and x["runs"] == 1
    assert failed == ["g: w: peer differs by 1.0e-01"]


def test_who_does_not_run_is_noted_and_minidiff_must_run() -> None:
    def broken() -> Tensor:
        raise RuntimeError("no compiler")

    made = work.Work("g", "w", {"minidiff": lambda: torch.ones(2), "peer": broken}, 1e-3, reference="peer")
    rows, failed = work.run(made, seconds=0.0)
    assert [row.contender for row in rows] == ["minidiff"] and not failed and "no compiler" in made.notes[0]
    with pytest.raises(RuntimeError, match="no compiler"):
        work.run(work.Work("g", "w", {"minidiff": broken}, 1e-3), seconds=0.0)


def test_nan_is_wrong() -> None:
    assert work.distance(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


def test_attention_contenders_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every implementation on this machine, forward and backward, on a small shape; and minidiff is the first."""
    monkeypatch.setattr(work, "SHAPES", [(40, 77, 40)])
    for made in work.attention_work("cpu", torch.float32, batch=1):
        answers = {name: call() for name, call in made.contenders.items()}
        assert list(answers)[0] == "minidiff" and {"minidiff naive", "sdpa math"} <= answers.keys()
        assert all(work.distance(answer, answers[made.reference]) < made.tolerance for answer in answers.values())


def test_peers_take_turns_inside_the_loop(tmp_path: Path) -> None:
    """minidiff's own `fit`, with a peer that trains the same weight by hand, and one that does something else."""
    from minidiff.trainer.run import fit
    from minidiff.trainer.settings import TrainSettings

    def loss(weight: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (weight * batch["x"]).square().mean()

    def trained(rate: float) -> Any:
        weight = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=1e-2)

        def step(batch: dict[str, Tensor]) -> Tensor:
            order.append(rate)
            value = loss(weight, batch)
            value.backward()
            nn.utils.clip_grad_norm_([weight], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return value.detach()

        return step

    order: list[float] = []
    settings = TrainSettings(
        output_dir=str(tmp_path / "run"), learning_rate=0.1, max_train_steps=1000, checkpointing_steps=1000, validation_steps=0
    )
    weight = nn.Parameter(torch.ones(3))
    task = Job(
        trainable={"w": weight},
        batch=lambda step, micro: {"x": torch.full((4, 3), 1.0 + step)},
        loss=lambda batch, step, micro: loss(weight, batch),
        export=lambda folder: None,
    )
    turns = training.Turns(task, {"same": trained(0.1), "other": trained(0.5)}, seconds=0.0, tolerance=1e-5)
    task.batch, task.loss, turns.task = turns.batch, turns.loss, training.replace(task)
    with pytest.raises(training.Enough):
        fit(task, settings)
    assert turns.wrong == ["other"] and turns.errors["same"] < 1e-6 < turns.errors["other"]
    assert len(turns.times["minidiff"]) == len(turns.times["same"]) == 4
    assert order.count(0.5) == training.CHECKED  # and no step more


# --- bytes that are kept -----------------------------------------------------------------------------------------------


def test_saved_bytes_of_a_linear_and_a_relu() -> None:
    with torch.device("meta"):
        layer, x = nn.Linear(8, 16), torch.empty(4, 8)
        found = saved_bytes(lambda: layer(x).relu().sum(), layer.parameters())
    assert found["bytes"] == 4 * (4 * 8 + 4 * 16)  # the input, for the weight's gradient; relu's result. Not the weight
    assert found["tensors"] == 2 and "(4, 8) float32" in found["by_shape"]


def test_a_view_is_counted_once() -> None:
    with torch.device("meta"):
        x = torch.empty(4, 4, requires_grad=True)
        found = saved_bytes(lambda: (x.exp()[None] * x.mT).sum())
    assert found["bytes"] == 4 * 16 * 2  # x, of which x.mT is a view; and exp's result, which the product keeps as well


def test_attention_is_counted_as_flash_keeps_it() -> None:
    with torch.device("meta"):
        q, k = (torch.empty(2, 8, length, 40, dtype=torch.float16, requires_grad=True) for length in (64, 77))
        v = torch.empty_like(k, requires_grad=True)
        found = saved_bytes(lambda: F.scaled_dot_product_attention(q, k, v).sum())
    assert found["bytes"] == flash_bytes(2, 8, 64, 77, 40)


def test_autocast_keeps_norms_in_fp32() -> None:
    half = torch.float16
    with torch.device("meta"):
        norm, x = nn.GroupNorm(2, 4).to(half), torch.empty(1, 4, 2, 2, dtype=half, requires_grad=True)
        plain, mixed = (saved_bytes(lambda: norm(x).sum(), norm.parameters(), cast) for cast in (None, half))
    assert mixed["bytes"] > plain["bytes"] and any("float32" in name for name in mixed["by_shape"])


# --- what comes out ----------------------------------------------------------------------------------------------------


def some_rows() -> list[report.Row]:
    wall = summaries({"minidiff": [0.01] * 4, "P0 diffusers + peft": [0.025] * 4, "sdpa math": [0.008] * 4}, "minidiff")
    return report.timed_rows("train", "lora step", wall, wall, {}) + report.counted_rows(
        "saved bytes", "step", {"minidiff": 1e6, "P0 diffusers + peft": 3e6}
    )


def test_table() -> None:
    text = report.table(some_rows())
    assert "train: lora step" in text and "2.50x  [2.50, 2.50]" in text and "3.00x" in text
    assert "1.00x" not in text  # minidiff beside itself says nothing


def test_chart_is_drawn(tmp_path: Path) -> None:
    chart.draw(some_rows(), tmp_path / "bench.png", "Times what minidiff needs", "a machine")
    with Image.open(tmp_path / "bench.png") as image:
        assert image.getpixel((2, 2)) == tuple(int(PAPER[i : i + 2], 16) for i in (1, 3, 5))
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**20) or []}
    assert {tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in (chart.QUICKER, chart.SLOWER)} <= colours


def test_without_peers_the_last_line_is_still_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "missing", lambda: "diffusers and peft cannot be imported (made up); pip install -e '.[bench]'")
    assert bench.main(Bench(quick=True, only=("saved",), output_dir=str(tmp_path))) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["contender"] for row in found["rows"]} == {"minidiff"} and found["failed"] == []
    assert any("only minidiff's own rows" in note for note in found["notes"])
    assert all(2e8 < row["value"] < 1.15e9 for row in found["rows"])  # bytes; diffusers + peft keep 1,142,790,144
    assert found == json.loads((tmp_path / "bench.json").read_text())
    assert "torch" in found["machine"]["versions"] and found["machine"]["cores"] >= 1


def test_what_breaks_is_said_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def breaks(session: bench.Session) -> Any:
        def task() -> Any:
            raise ValueError("made up")

        yield task
        yield lambda: (some_rows(), [], ["a note"])

    monkeypatch.setitem(bench.GROUPS, "saved", breaks)
    rows: list[report.Row] = []
    failed: list[str] = []
    notes: list[str] = []
    bench.collect("saved", bench.Session(Bench(quick=True), tmp_path), rows, failed, notes)
    assert len(rows) == 5 and failed == ["saved: ValueError: made up"] and notes == ["a note"]


def test_every_group_has_its_flag() -> None:
    assert set(bench.GROUPS) == set(get_args(Group))


# --- the command -------------------------------------------------------------------------------------------------------


def test_the_command_runs_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def run(command: list[str], env: dict[str, str], check: bool) -> Any:
        seen.append((command, env))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(train_commands.subprocess, "run", run)
    main(["bench", "--quick", "--only", "saved", "train"])
    command, environment = seen[0]
    assert command[0] == sys.executable and command[-3:-1] == ["-m", "benchmarks"]
    assert json.loads(command[-1])["only"] == ["saved", "train"] and json.loads(command[-1])["quick"] is True
    assert environment["PYTHONPATH"].startswith(str(ROOT / "tests"))


def test_without_a_checkout_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_commands, "CHECKOUT", tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["bench"])
    assert stop.value.code == 2 and "checkout" in capsys.readouterr().err


def test_an_unknown_group_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--only", "lunch"])
    assert stop.value.code == 2 and "lunch" in capsys.readouterr().err
