"""Settings as TOML, and what makes two runs the same."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from minidiff.errors import SettingsError
from minidiff.train.methods import LoRASettings
from minidiff.train.settings import FineTuneSettings, TrainSettings, from_toml, to_toml


def test_toml_round_trip(tmp_path: Path) -> None:
    settings = LoRASettings(
        instance_prompt='a "sks" dog, naïve \\ 🐕',
        validation_prompt=("one", "two"),
        learning_rate=1e-5,
        adam_weight_decay=0,
        checkpoints_total_limit=5,
        random_flip=True,
    )
    (tmp_path / "train_config.toml").write_text(to_toml(settings), "utf-8")
    assert from_toml(LoRASettings, tmp_path / "train_config.toml") == settings


@pytest.mark.parametrize(
    "line, message",
    [
        ("rnak = 4", 'Did you mean "rank"'),
        ('rank = "4"', "rank = '4' is not of its kind"),
        ("rank = true", "rank = True"),
        ("random_flip = 1", "random_flip = 1"),
        ('lr_scheduler = "step"', "lr_scheduler"),
        ("lora_targets = [1]", "lora_targets"),
        ("rank 4", "cannot be read as TOML"),
        ("x = " + "[" * 5000, "cannot be read as TOML"),
        ("seed = " + "9" * 5000, "cannot be read as TOML"),
        ("rank = 4.0", "not of its kind, int"),
    ],
)
def test_bad_toml(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "x.toml").write_text(line)
    with pytest.raises(SettingsError, match=message):
        from_toml(LoRASettings, tmp_path / "x.toml")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="x.toml: cannot be read"):
        from_toml(LoRASettings, tmp_path / "x.toml")


def test_harmless_fields_exist_and_are_left_out() -> None:
    assert FineTuneSettings.HARMLESS <= {f.name for f in fields(FineTuneSettings)}
    here = LoRASettings(output_dir="a", validation_steps=1, device="cpu")
    assert here.identity() == LoRASettings(output_dir="b", checkpointing_steps=7).identity()
    assert here.identity() != replace(here, rank=8).identity()
    assert "max_train_steps" not in here.identity()
    assert "max_train_steps" in replace(here, lr_scheduler="linear").identity()


def test_every_field_has_its_help() -> None:
    import ast
    import inspect

    for kind in (TrainSettings, FineTuneSettings, LoRASettings):
        body = ast.parse(inspect.getsource(kind)).body[0].body  # type: ignore[attr-defined]
        for here, after in zip(body, body[1:], strict=False):
            if isinstance(here, ast.AnnAssign) and "ClassVar" not in ast.unparse(here.annotation):
                assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), ast.unparse(here.target)
