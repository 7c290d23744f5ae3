"""The ladder: its two scores, and lesson 13, which climbs it."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from minidiff.cli.main import main
from minidiff.core.errors import WeightsError
from minidiff.files.weights import read_header
from minidiff.pocket.judge import ImageTower, forgetting_score, subject_score
from minidiff.trainer import run

ROOT = Path(__file__).parents[2]
POCKET = ROOT / "checkpoints" / "pocket"
LESSON = ROOT / "lessons" / "13_ladder.py"
FLAGS = ["--pretrained_model_name_or_path", str(POCKET), "--instance_data_dir", str(ROOT / "lessons/data/dog")]


def unit(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_subject_score_is_the_mean_over_all_pairs() -> None:
    """CLIP-I, arXiv 2208.12242, section 5.2."""
    drawn, real = unit(4, 0), unit(3, 1)
    pairs = [F.cosine_similarity(a, b, dim=0).item() for a in drawn for b in real]
    assert subject_score(drawn, real) == pytest.approx(sum(pairs) / 12, abs=1e-6)


def test_forgetting_score_is_zero_for_the_base_and_one_for_the_unlike() -> None:
    base = torch.eye(4)
    assert forgetting_score(base, base) == 0
    assert forgetting_score(base[[1, 0, 3, 2]], base) == 1
    assert forgetting_score(base[[1, 0, 2, 3]], base) == 0.5


@pytest.mark.parametrize("values", [{"hidden_size": "x"}, {"hidden_size": -1}, {"image_size": None}])
def test_an_image_encoder_that_cannot_be_built(tmp_path: Path, values: dict[str, object]) -> None:
    (tmp_path / "image_encoder").mkdir()
    (tmp_path / "image_encoder" / "config.json").write_text(json.dumps(values))
    with pytest.raises(WeightsError, match=r"config.json: not a usable image encoder: (.|\n)* Copy the file again"):
        ImageTower(tmp_path / "image_encoder")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rungs", "LoRa"], '--rungs "LoRa": there are full, .* Did you mean "LoRA"'),
        (["--pretrained_model_name_or_path", "{}"], "no image encoder here; the pocket checkpoint has one"),
        (["--pretrained_model_name_or_path", "nowhere/at/all"], "nowhere/at/all: there is no such folder"),
    ],
)
def test_wrong_flags_are_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["ladder", *FLAGS, "--output_dir", str(tmp_path / "out"), *(flag.format(tmp_path) for flag in flags)])
    said = capsys.readouterr().err
    assert leave.value.code == 2 and re.search(message, said), said


def climb(base: Path, home: Path) -> dict[str, Any]:
    """Lesson 13 with two rungs of two updates; what it defines."""
    flags = {"pretrained_model_name_or_path": str(base), "output_dir": str(home), "quick": True}
    return runpy.run_path(str(LESSON), {"FLAGS": flags | {"rungs": ("LoRA", "textual inversion")}})


def test_a_short_climb(tiny_with_tower: Path, tmp_path: Path) -> None:
    """Climbing again trains nothing anew; and a result that is not there is not taken for the base."""
    names = climb(tiny_with_tower, tmp_path)
    base, lora, word = names["rows"]
    assert (tmp_path / "ladder.png").is_file() and (tmp_path / "ladder.md").read_text().count("\n") == 5
    assert base["forgetting"] == pytest.approx(0, abs=1e-5) and base["trained"] == 0
    result = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    assert lora["trained"] == sum(p.numel() for p in read_header(result).read().values()) and word["trained"] == 4 * 24
    assert lora["megabytes"] == result.stat().st_size / 1e6
    assert lora["seconds"] > 0 and -1 <= lora["subject"] <= 1 and 0 <= lora["forgetting"] < 1
    assert climb(tiny_with_tower, tmp_path)["rows"] == names["rows"]
    result.unlink()
    with pytest.raises(WeightsError, match="lora holds no result of a training run"):
        names["load_result"](names["rungs"]["LoRA"])


def test_a_rung_that_was_stopped_ends_the_climb(tiny_with_tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its half would stand in the table as if it were the whole."""
    monkeypatch.setattr(run, "fit", lambda job, settings: run.Report(1, finished=False))
    with pytest.raises(KeyboardInterrupt):
        climb(tiny_with_tower, tmp_path)
    assert not list(tmp_path.glob("ladder.*"))
