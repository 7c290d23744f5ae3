"""The lessons: each runs from top to bottom, and each exercise's check refuses wrong answers.

The runs take about a minute each, so they are marked slow: pytest -m slow tests/test_lessons.py. The last two would take a
quarter of an hour: tests/pocket, test_ladder.py and test_forgetting.py, run them with two updates a method.
"""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted((ROOT / "lessons").glob("[0-9][0-9]_*.py"))
LONG = ("13_ladder", "14_forgetting")
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
needs_checkpoint = pytest.mark.skipif(
    not (ROOT / "checkpoints/pocket/model_index.json").is_file(),
    reason="checkpoints/pocket is absent: train it with `minidiff pretrain`, or fetch it with the repository",
)


def cells(path: Path) -> list[tuple[str, str]]:
    """The percent format: (what stands behind `# %%`, the cell's text)."""
    parts = re.split(r"^# %%(.*)\n", path.read_text("utf-8"), flags=re.MULTILINE)
    assert not parts[0].strip(), f"{path.name} has text before its first cell"
    return [(mark.strip(), body) for mark, body in zip(parts[1::2], parts[2::2], strict=True)]


def tagged(path: Path, tag: str) -> list[str]:
    return [body for mark, body in cells(path) if f'"{tag}"' in mark]


def names_in(path: Path) -> dict:
    """What the cells of the setup, the checks and the solutions define; nothing else of the lesson runs."""
    names: dict = {"__file__": str(path), "__name__": path.stem}
    for body in [*tagged(path, "setup"), *tagged(path, "check")]:
        exec(compile(body, path.name, "exec"), names)
    (solutions,) = tagged(path, "solution")
    exec(compile(solutions, path.name, "exec"), names)  # calls each check with its solution
    return names


# --- the form --------------------------------------------------------------------------------------------------------


@each_lesson
def test_form(path: Path) -> None:
    found = cells(path)
    assert found[0][0] == "[markdown]" and found[0][1].startswith("# # Lesson ")
    assert len(tagged(path, "setup")) == 1 and len(tagged(path, "check")) == 2
    assert '"solution"' in found[-1][0] and "check_1(" in found[-1][1] and "check_2(" in found[-1][1]
    for mark, body in found:
        if mark == "[markdown]":
            assert all(line.startswith("# ") or line == "#" for line in body.strip().splitlines()), body
        else:
            assert mark == "" or re.fullmatch(r"tags=\[.*\]", mark), f"{path.name}: an unknown mark, {mark}"
    text = path.read_text("utf-8")
    assert "what breaks if" in text.lower() and "**Experiment" in text


@each_lesson
def test_defines_nothing_that_the_library_has(path: Path) -> None:
    library = {name for file in (ROOT / "minidiff").rglob("*.py") for name in definitions(file)}
    assert not library & definitions(path)


@cache
def definitions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_show_is_the_same_everywhere() -> None:
    """The only lines that lessons share."""
    assert len({re.search(r"^def show\(.*?^    return .*?$", p.read_text(), re.M | re.S)[0] for p in LESSONS}) == 1  # type: ignore[index]


# --- the exercises ---------------------------------------------------------------------------------------------------


def wrong_answers_0() -> dict[str, list]:
    def forgets_minus_one(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        return (1 + scale) * a - scale * b

    def other_way_round(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        return scale * b - (scale - 1) * a

    def ddim(model, x, a_bar, steps, step_noise, eta, with_noise=True, with_direction=True):  # type: ignore[no-untyped-def]
        for i, t in enumerate(range(1 + (steps - 1) * (1000 // steps), 0, -(1000 // steps))):
            a, a_prev = a_bar[t], a_bar[max(t - 1000 // steps, 0)]
            sigma = eta * ((1 - a_prev) / (1 - a)).sqrt() * (1 - a / a_prev).sqrt()
            eps = model(x, t)
            x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
            x = a_prev.sqrt() * x0 + (1 - a_prev - sigma**2 * with_direction).sqrt() * eps
            x = x + with_noise * sigma * step_noise(i)
        return x

    return {
        "check_1": [forgets_minus_one, other_way_round, lambda a, b, scale: a, lambda a, b, scale: 7.5],
        "check_2": [
            lambda *args: ddim(*args[:-1], 0.0),
            lambda *args: ddim(*args, with_noise=False),
            lambda *args: ddim(*args, with_direction=False),
            lambda model, x, *rest: x,
            lambda *args: None,
        ],
    }


def wrong_answers_11() -> dict[str, list]:
    def layers(model: torch.nn.Module, targets: tuple[str, ...]) -> list:
        return [m for name, m in model.named_modules() if name.endswith(tuple(f".{t}" for t in targets))]

    def best(A: torch.Tensor, B: torch.Tensor, rank: int) -> tuple:
        U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
        return Vh[:rank], U[:, :rank] * S[:rank]

    return {
        "check_1": [
            lambda model, rank, targets: sum(rank * m.in_features * m.out_features for m in layers(model, targets)),
            lambda model, rank, targets: sum(2 * rank * m.in_features for m in layers(model, targets)),
            lambda model, rank, targets: sum(m.in_features + m.out_features for m in layers(model, targets)),
            lambda model, rank, targets: 797_184,
        ],
        "check_2": [
            lambda A, B, rank: (A[:rank], B[:, :rank]),
            lambda A, B, rank: (best(A, B, rank)[0], best(A, B, rank)[1] * 0.5),
            lambda A, B, rank: (A, B),
            lambda A, B, rank: (torch.zeros(rank, A.shape[1]), torch.zeros(B.shape[0], rank)),
        ],
    }


def wrong_answers_5() -> dict[str, list]:
    def heun(direction, x, sigma, sigma_next, weight=0.5, euler_last=True):  # type: ignore[no-untyped-def]
        d = direction(x, sigma)
        end = x + (sigma_next - sigma) * d
        if sigma_next == 0 and euler_last:
            return end
        return x + (sigma_next - sigma) * ((1 - weight) * d + weight * direction(end, sigma_next))

    def karras(high: float, low: float, steps: int, rho: float) -> torch.Tensor:
        return torch.linspace(high ** (1 / rho), low ** (1 / rho), steps) ** rho

    return {
        "check_1": [
            lambda direction, x, s, s_next: x + (s_next - s) * direction(x, s),
            lambda *args: heun(*args, weight=1.0),
            lambda *args: heun(*args, euler_last=False),
            lambda direction, x, s, s_next: None,
        ],
        "check_2": [
            lambda high, low, steps, rho: torch.linspace(high, low, steps),
            lambda high, low, steps, rho: karras(low, high, steps, rho),
            lambda high, low, steps, rho: karras(high, low, steps, 7.0),
            lambda high, low, steps, rho: karras(high, low, steps + 1, rho),
            lambda high, low, steps, rho: None,
        ],
    }


def wrong_answers_13() -> dict[str, list]:
    def best(rows, most, forgetting, key="subject"):  # type: ignore[no-untyped-def]
        good = [r for r in rows if r["megabytes"] <= most and r["forgetting"] <= forgetting]
        return max(good, key=lambda row: row[key])["rung"] if good else None

    return {
        "check_1": [
            lambda tuned, base: (tuned * base).sum(-1).mean().item(),
            lambda tuned, base: 1 - (tuned @ base.mT).mean().item(),
            lambda tuned, base: 0.0,
            lambda tuned, base: None,
        ],
        "check_2": [
            lambda rows, most, forgetting: best(rows, 1e9, forgetting),
            lambda rows, most, forgetting: best(rows, most, 1.0),
            lambda rows, most, forgetting: best(rows, most, forgetting, "forgetting"),
            lambda rows, most, forgetting: None,
        ],
    }


def wrong_answers_14() -> dict[str, list]:
    def stop_at(rows, most, better=max, key="subject"):  # type: ignore[no-untyped-def]
        good = [row for row in rows if row["forgetting"] <= most]
        return better(good, key=lambda row: row[key])["step"] if good else None

    def price(rows, subject, between=False):  # type: ignore[no-untyped-def]
        for a, b in zip(rows, rows[1:]):
            if b["subject"] >= subject:
                return (a["forgetting"] + b["forgetting"]) / 2 if between else b["forgetting"]
        return None

    return {
        "check_1": [
            lambda rows, most: stop_at(rows, 1e9),
            lambda rows, most: stop_at(rows, most, min),
            lambda rows, most: stop_at(rows[::-1], most),
            lambda rows, most: stop_at(rows, most, key="step"),
            lambda rows, most: None,
        ],
        "check_2": [
            price,
            lambda rows, subject: price(rows, subject, between=True),
            lambda rows, subject: rows[-1]["forgetting"],
            lambda rows, subject: None,
        ],
    }


WRONG = {
    "00_three_stations": wrong_answers_0,
    "05_samplers": wrong_answers_5,
    "11_lora": wrong_answers_11,
    "13_ladder": wrong_answers_13,
    "14_forgetting": wrong_answers_14,
}


@each_lesson
def test_checks_take_the_solutions_and_refuse_wrong_answers(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = names_in(path)
    assert "check 1: right" in (said := capsys.readouterr().out) and "check 2: right" in said
    for check, answers in WRONG[path.stem]().items():
        for i, answer in enumerate(answers):
            with pytest.raises(AssertionError) as refused:
                names[check](answer)
            assert str(refused.value), f"{path.name}, {check}: wrong answer {i} gets no hint"
    assert "right" not in capsys.readouterr().out


# --- the runs --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_checkpoint
@pytest.mark.parametrize("path", [p for p in LESSONS if p.stem not in LONG], ids=lambda path: path.stem)
def test_runs(path: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.rstrip().endswith("check 2: right")
    figures = re.findall(r"^\[figure\] (.+)$", run.stdout, flags=re.MULTILINE)
    assert len(figures) >= 6
    assert all((tmp_path / figure).is_file() for figure in figures)
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
