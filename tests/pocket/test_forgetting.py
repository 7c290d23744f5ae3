"""`minidiff forgetting` and lesson 14, which it runs: two numbers every few updates, one curve for each method."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from minidiff.cli.main import main
from minidiff.core.errors import SettingsError
from minidiff.files.weights import read_header
from minidiff.pocket.settings import METHODS
from minidiff.trainer import run

ROOT = Path(__file__).parents[2]
DOG = str(ROOT / "lessons/data/dog")
LESSON = ROOT / "lessons" / "14_forgetting.py"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lesson's figures go into the folder where one stands."""
    monkeypatch.chdir(tmp_path)


def compare(base: Path, home: Path, **others: object) -> dict[str, Any]:
    """The lesson with two updates a method, measured after each, with one probe of two sampler steps; what it defines."""
    flags: dict[str, object] = {"max_train_steps": 2, "every": 1, "num_images_per_prompt": 1, "num_inference_steps": 2}
    flags |= {"methods": ("full", "lora"), "probes": ("a photo of a red car",), "output_dir": str(home)}
    flags |= {"pretrained_model_name_or_path": str(base), "instance_data_dir": DOG}
    return runpy.run_path(str(LESSON), {"FLAGS": flags | others})


def numbers(home: Path) -> dict[tuple[str, int], list[float]]:
    """The table: (method, step) -> subject, forgetting."""
    cells = [re.findall(r"[^|\s]+", line) for line in (home / "forgetting.md").read_text().splitlines()[2:]]
    return {(method, int(step)): [float(value) for value in values] for method, step, *values in cells}


def test_a_short_comparison(tiny_with_tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each method and step; a second call trains nothing anew, and other probes are not mixed with these."""
    names = compare(tiny_with_tower, tmp_path)
    check_the_ruler(names)
    table = numbers(tmp_path)
    assert list(table) == [(method, step) for method in ("full", "LoRA") for step in (0, 1, 2)]
    assert table["full", 0] == table["LoRA", 0] and table["full", 0][1] == 0 < table["full", 2][1]
    assert Image.open(tmp_path / "forgetting.png").width > 600
    sheets = sorted(path.name for path in (tmp_path / "lora" / "samples").iterdir())
    assert sheets[-1] == "step-000002.png"
    result = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    first = {name: t.clone() for name, t in read_header(result).read().items()}

    compare(tiny_with_tower, tmp_path, methods=("lora",))
    assert numbers(tmp_path) == {row: values for row, values in table.items() if row[0] == "LoRA"}
    assert all(torch.equal(t, first[name]) for name, t in read_header(result).read().items())
    with pytest.raises(SettingsError, match="probes: was .*red car.*, is now .*blue cat"):
        compare(tiny_with_tower, tmp_path, methods=("lora",), probes=("a photo of a blue cat",))
    monkeypatch.setattr(run, "fit", lambda job, settings: run.Report(1, finished=False))
    with pytest.raises(KeyboardInterrupt):
        compare(tiny_with_tower, tmp_path / "stopped", methods=METHODS)
    assert not (tmp_path / "stopped" / "forgetting.md").exists()


def check_the_ruler(names: dict[str, Any]) -> None:
    """The base against itself is zero, and other weights are not."""
    before = names["at_start"]
    assert before["forgetting"] == pytest.approx(0, abs=1e-5) and -1 <= before["subject"] <= 1
    moved = []
    for size in (0.01, 0.1):
        for p in names["pipe"].unet.parameters():
            p.data.mul_(1 - size)
        moved.append(names["scores"](names["drawings_now"]())["forgetting"])
    assert 1e-5 < moved[0] < moved[1]


def test_every_method_has_settings_that_hold(tiny_with_tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the two with a prior rehearse the class."""
    monkeypatch.setattr(run, "fit", lambda job, settings: run.Report(0, finished=True))  # trains nothing
    names = compare(tiny_with_tower, tmp_path, methods=METHODS, num_class_images=1)
    assert list(names["methods"]) == list(METHODS)
    assert [name for name, s in names["runs"].items() if s.with_prior_preservation] == ["dreambooth", "lora-prior"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "full", "lorra"], "lorra"),
        (["--probes"], "--probes names none"),
        (["--every", "0"], "--every must lie in 1"),
        (["--pretrained_model_name_or_path", "{}"], "no image encoder here"),
        (["--pretrained_model_name_or_path", "nowhere/at/all"], "nowhere/at/all: there is no such folder"),
        (["--instance_data_dir", "{}/none"], "none is no folder that exists"),
    ],
)
def test_wrong_flags_are_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["forgetting", "--output_dir", str(tmp_path / "out"), *(flag.format(tmp_path) for flag in flags)])
    said = capsys.readouterr().err
    assert leave.value.code == 2 and re.search(message, said), said
    assert not (tmp_path / "out").exists()
