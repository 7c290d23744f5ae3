"""The ladder: its two scores, its rungs, and one short climb."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minidiff.cli.main import main
from minidiff.core.errors import SettingsError, WeightsError
from minidiff.pocket import ladder
from minidiff.pocket.settings import LadderSettings
from minidiff.trainer.methods import LoRASettings
from minidiff.trainer.run import Report

ROOT = Path(__file__).parents[2]
FLAGS = LadderSettings(str(ROOT / "checkpoints/pocket"), str(ROOT / "lessons/data/dog"))


def unit(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_subject_score_is_the_mean_over_all_pairs() -> None:
    """CLIP-I, arXiv 2208.12242, section 5.2."""
    drawn, real = unit(4, 0), unit(3, 1)
    pairs = [F.cosine_similarity(a, b, dim=0).item() for a in drawn for b in real]
    assert ladder.subject_score(drawn, real) == pytest.approx(sum(pairs) / 12, abs=1e-6)


def test_forgetting_score_is_zero_for_the_base_and_one_for_the_unlike() -> None:
    base = torch.eye(4)
    assert ladder.forgetting_score(base, base) == 0
    assert ladder.forgetting_score(base[[1, 0, 3, 2]], base) == 1
    assert ladder.forgetting_score(base[[1, 0, 2, 3]], base) == 0.5


def test_every_rung_has_settings_that_work() -> None:
    every = ladder.rungs(FLAGS)
    assert len({settings.output_dir for settings in every.values()}) == len(every)
    for settings in every.values():
        settings.check()


def test_a_rung_that_is_not_there() -> None:
    with pytest.raises(SettingsError, match='--rungs "LoRa": there are full, .* Did you mean "LoRA"'):
        ladder.run(replace(FLAGS, rungs=("LoRa",)))


def test_a_base_without_an_image_encoder(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no image encoder here; the pocket checkpoint has one"):
        ladder.run(replace(FLAGS, pretrained_model_name_or_path=str(tmp_path)))


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(WeightsError, match="nowhere/at/all: there is no such folder"):
        ladder.run(replace(FLAGS, pretrained_model_name_or_path="nowhere/at/all"))


@pytest.mark.parametrize("values", [{"hidden_size": "x"}, {"hidden_size": -1}, {"image_size": None}])
def test_an_image_encoder_that_cannot_be_built(tmp_path: Path, values: dict[str, object]) -> None:
    (tmp_path / "image_encoder").mkdir()
    (tmp_path / "image_encoder" / "config.json").write_text(json.dumps(values))
    with pytest.raises(WeightsError, match=r"config.json: not a usable image encoder: (.|\n)* Copy the file again"):
        ladder.ImageTower(tmp_path / "image_encoder")


def test_a_rung_that_was_stopped_ends_the_climb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its half would stand in the table as if it were the whole."""
    for name, value in {"SUBJECT": ladder.SUBJECT[:1], "OTHERS": ladder.OTHERS[:1], "SEEDS": (0,), "SUBJECTS": 1}.items():
        monkeypatch.setattr(ladder, name, value)
    monkeypatch.setattr(ladder, "RECIPES", {LoRASettings: lambda settings: None})
    monkeypatch.setattr(ladder, "fit", lambda task, settings: Report(1, 0.0, finished=False))
    flags = ["--pretrained_model_name_or_path", FLAGS.pretrained_model_name_or_path, "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as leave:
        main(["ladder", *flags, "--instance_data_dir", FLAGS.instance_data_dir, "--rungs", "LoRA"])
    assert leave.value.code == 130 and not list(tmp_path.iterdir())


def test_a_result_that_is_not_there_is_not_the_base(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="lora holds no result of a training run"):
        ladder.load_result(ladder.rungs(replace(FLAGS, output_dir=str(tmp_path)))["LoRA"])


def test_a_short_climb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One LoRA of two updates; one picture of the subject, one of another thing. Climbing again trains nothing anew."""
    for name, value in {"SUBJECT": ladder.SUBJECT[:1], "OTHERS": ladder.OTHERS[:1], "SEEDS": (0,), "SUBJECTS": 1}.items():
        monkeypatch.setattr(ladder, name, value)
    settings = ladder.rungs(replace(FLAGS, output_dir=str(tmp_path)))["LoRA"]
    assert isinstance(settings, LoRASettings)
    steps = {"LoRA": replace(settings, max_train_steps=2, checkpointing_steps=2)}
    tower = ladder.ImageTower(Path(FLAGS.pretrained_model_name_or_path) / "image_encoder")
    base, row = ladder.climb(steps, tmp_path, tower)
    assert (tmp_path / "ladder.png").is_file()
    assert base.forgetting == pytest.approx(0, abs=1e-5) and base.trainable == 0
    assert row.trainable == sum(p.numel() for p in _adapter(tmp_path))
    assert row.megabytes == pytest.approx(row.trainable * 4 / 1e6, rel=0.1)
    assert row.seconds > 0 and -1 <= row.subject <= 1 and 0 <= row.forgetting < 1
    assert ladder.climb(steps, tmp_path, tower)[1] == row


def _adapter(home: Path) -> list[torch.Tensor]:
    from minidiff.files.weights import read_header

    return list(read_header(home / "lora" / "pytorch_lora_weights.safetensors").read().values())


def test_the_table_is_markdown() -> None:
    row = ladder.Row("LoRA", 161792, 0.65, 41.4, 0.8123, 0.0456)
    assert ladder.table([row]).splitlines()[-1] == "| LoRA | 161,792 | 0.65 | 41 | 0.812 | 0.046 |"
    assert len({line.count("|") for line in ladder.table([row]).splitlines()}) == 1
