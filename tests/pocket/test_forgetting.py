"""`minidiff forgetting`: two numbers every few updates, one curve for each method."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from minidiff.cli.main import main
from minidiff.core.errors import SettingsError
from minidiff.files.weights import read_header
from minidiff.pocket.forgetting import METHODS, Ruler, compare, settings_of
from minidiff.pocket.settings import METHODS as NAMES
from minidiff.pocket.settings import ForgettingSettings
from minidiff.trainer import run

ROOT = Path(__file__).parents[2]
DOG = str(ROOT / "lessons/data/dog")


def tiny(base: Path, home: Path, **others: object) -> ForgettingSettings:
    """Two updates, measured after each, with one probe of two sampler steps."""
    values: dict[str, object] = {"max_train_steps": 2, "every": 1, "num_images_per_prompt": 1, "num_inference_steps": 2}
    values |= {"methods": ("full", "lora"), "probes": ("a photo of a red car",), "output_dir": str(home)}
    return ForgettingSettings(str(base), DOG, **(values | others))  # type: ignore[arg-type]


def numbers(home: Path) -> dict[tuple[str, int], list[float]]:
    """The table: (method, step) -> subject, forgetting."""
    cells = [re.findall(r"[^|\s]+", line) for line in (home / "forgetting.md").read_text().splitlines()[2:]]
    return {(method, int(step)): [float(value) for value in values] for method, step, *values in cells}


def test_the_base_against_itself_is_zero_and_other_weights_are_not(tiny_with_tower: Path, tmp_path: Path) -> None:
    ruler = Ruler(tiny(tiny_with_tower, tmp_path))
    before = ruler.scores(ruler.drawn())
    assert before["forgetting"] == pytest.approx(0, abs=1e-5) and -1 <= before["subject"] <= 1
    moved = []
    for size in (0.01, 0.1):
        for p in ruler.pipe.unet.parameters():
            p.data.mul_(1 - size)
        moved.append(ruler.scores(ruler.drawn())["forgetting"])
    assert 1e-5 < moved[0] < moved[1]


def test_a_short_comparison(tiny_with_tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each method and step; a second call trains nothing anew, and other probes are not mixed with these."""
    compare(tiny(tiny_with_tower, tmp_path))
    table = numbers(tmp_path)
    assert list(table) == [(method, step) for method in ("full", "LoRA") for step in (0, 1, 2)]
    assert table["full", 0] == table["LoRA", 0] and table["full", 0][1] == 0 < table["full", 2][1]
    assert Image.open(tmp_path / "forgetting.png").width > 600
    sheets = sorted(path.name for path in (tmp_path / "lora" / "samples").iterdir())
    assert sheets[-1] == "step-000002.png"
    result = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    first = {name: t.clone() for name, t in read_header(result).read().items()}

    compare(tiny(tiny_with_tower, tmp_path, methods=("lora",)))
    assert numbers(tmp_path) == {row: values for row, values in table.items() if row[0] == "LoRA"}
    assert all(torch.equal(t, first[name]) for name, t in read_header(result).read().items())
    with pytest.raises(SettingsError, match="probes: was .*red car.*, is now .*blue cat"):
        compare(tiny(tiny_with_tower, tmp_path, methods=("lora",), probes=("a photo of a blue cat",)))
    monkeypatch.setattr("minidiff.pocket.forgetting.fit", lambda job, settings: run.Report(1, 0.0, finished=False))
    with pytest.raises(KeyboardInterrupt):
        compare(tiny(tiny_with_tower, tmp_path / "stopped", methods=("lora",)))
    assert not (tmp_path / "stopped" / "forgetting.md").exists()


def test_every_method_has_settings_that_hold(tiny_with_tower: Path, tmp_path: Path) -> None:
    """And the two with a prior rehearse the class."""
    assert list(METHODS) == list(NAMES)
    made = {name: settings_of(tiny(tiny_with_tower, tmp_path), name) for name in METHODS}
    for settings in made.values():
        settings.check()
    assert [name for name, s in made.items() if s.with_prior_preservation] == ["dreambooth", "lora-prior"]


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
