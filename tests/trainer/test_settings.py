"""The settings of every method: their checks, as TOML, and what makes two runs the same."""

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from minidiff.core.errors import SettingsError
from minidiff.files.values import from_toml, to_toml
from minidiff.trainer.settings import (
    AdapterSettings,
    ControlNetSettings,
    DreamBoothSettings,
    FineTuneSettings,
    FullSettings,
    IPAdapterSettings,
    LoRASettings,
    PivotalSettings,
    TextualInversionSettings,
    TrainSettings,
    WordSettings,
)


def test_toml_round_trip(tmp_path: Path) -> None:
    settings = LoRASettings(
        instance_prompt='a "sks" dog, naïve \\ 🐕 \x7f \x01',
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
        ("rnak = 4", "has no rnak. Did you mean rank"),
        ('rank = "4"', "rank = '4' has the wrong type"),
        ("rank = true", "rank = True"),
        ("random_flip = 1", "random_flip = 1"),
        ('lr_scheduler = "step"', "lr_scheduler"),
        ("lora_targets = [1]", "lora_targets"),
        ("rank 4", "cannot be read as TOML"),
        ("x = " + "[" * 5000, "cannot be read as TOML"),
        ("seed = " + "9" * 5000, "cannot be read as TOML"),
        ("rank = 4.0", "has the wrong type; it must be int"),
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
    methods = (FullSettings, PivotalSettings, LoRASettings, ControlNetSettings, IPAdapterSettings)
    assert FineTuneSettings.HARMLESS <= {f.name for method in methods for f in fields(method)}
    here = LoRASettings(output_dir="a", validation_steps=1, device="cpu")
    assert here.identity(9) == LoRASettings(output_dir="b", checkpointing_steps=7, ema_decay=0.5).identity(9)
    assert here.identity(9) != replace(here, rank=8).identity(9) and here.identity(9) != replace(here, use_ema=True).identity(9)
    assert "max_train_steps" not in here.identity(9)
    by_epochs, by_steps = (replace(here, lr_scheduler="linear", **n) for n in ({"num_train_epochs": 3}, {"max_train_steps": 9}))
    assert by_epochs.identity(9) == by_steps.identity(9) and by_steps.identity(9)["max_train_steps"] == 9


def test_updates() -> None:
    assert TrainSettings().updates(None) == 400 and TrainSettings(max_train_steps=7).updates(10) == 7
    epochs = TrainSettings(num_train_epochs=3, train_batch_size=4, gradient_accumulation_steps=2)
    assert epochs.updates(16) == 6 and epochs.updates(17) == 7 and epochs.updates(1) == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        (TrainSettings(max_train_steps=400, num_train_epochs=2), "--num_train_epochs and --max_train_steps both say how long"),
        (TrainSettings(num_train_epochs=0), "--num_train_epochs must lie in 1 … 1000000; it is 0"),
        (TrainSettings(max_train_steps=0), "--max_train_steps must lie in 1 … 10000000; it is 0"),
        (TrainSettings(ema_decay=1.0), "--ema_decay must lie in"),
        (TrainSettings(dataloader_num_workers=-1), "--dataloader_num_workers must lie in 0 … 64; it is -1"),
        (TrainSettings(lr_scheduler="linear", lr_warmup_steps=401), "--lr_warmup_steps must not exceed the 400 updates"),
    ],
)
def test_settings_that_cannot_work(settings: TrainSettings, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        settings.check()


PICTURES: dict[str, Any] = {"instance_data_dir": "dog", "instance_prompt": "a sks dog"}
HUGE = 10**400  # more than a float can be


@pytest.mark.parametrize(
    ("name", "most"),
    [("max_train_steps", 10_000_000), ("num_train_epochs", 1_000_000), ("gradient_accumulation_steps", 4096),
     ("train_batch_size", 4096), ("resolution", 8192), ("num_validation_images", 1000), ("sample_batch_size", 4096)],
)  # fmt: skip
def test_absurd_numbers(name: str, most: int) -> None:
    if name != "num_train_epochs":
        FineTuneSettings(**PICTURES, **{name: most}).check()
    for more in (most + 1, HUGE):
        with pytest.raises(SettingsError, match=f"--{name} must lie in \\d+ … {most}; it is {more}"):
            FineTuneSettings(**PICTURES, **{name: more}).check()


def test_an_absurd_seed() -> None:
    with pytest.raises(SettingsError, match="--seed must fit in 64 bits"):
        FineTuneSettings(**PICTURES, seed=HUGE).check()


def test_more_epochs_than_anybody_lives() -> None:
    with pytest.raises(SettingsError, match="--num_train_epochs makes 25000000 updates, and a run has at most 10000000"):
        TrainSettings(num_train_epochs=1_000_000).updates(100)


@pytest.mark.parametrize("name", ["output_dir", "instance_data_dir", "validation_data_dir", "pretrained_model_name_or_path"])
def test_no_path_holds_a_nul(name: str) -> None:
    """A TOML file can: name = "a\\u0000"."""
    with pytest.raises(SettingsError, match=f"--{name} cannot hold a NUL character"):
        FineTuneSettings(**PICTURES | {name: "a\0"}).check()


def test_every_field_has_its_help() -> None:
    import ast
    import inspect

    for kind in (TrainSettings, FineTuneSettings, AdapterSettings, LoRASettings, WordSettings):
        body = ast.parse(inspect.getsource(kind)).body[0].body  # type: ignore[attr-defined]
        for here, after in zip(body, body[1:], strict=False):
            new = isinstance(here, ast.AnnAssign) and ast.unparse(here.target) not in kind.__base__.__dict__
            if new and "ClassVar" not in ast.unparse(here.annotation):
                assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), ast.unparse(here.target)


# --- the methods ---------------------------------------------------------------------------------------------------------

SKS: dict[str, Any] = {"instance_data_dir": "dog", "instance_prompt": "a photo of a sks dog"}
WORD: dict[str, Any] = {"instance_data_dir": "dog", "initializer_token": "dog", "placeholder_token": "<dog>"}
CLASS: dict[str, Any] = {"class_prompt": "a photo of a dog", "prior_from_base": True}


@pytest.mark.parametrize(
    "settings",
    [
        FullSettings(**SKS),
        DreamBoothSettings(**SKS, **CLASS),
        LoRASettings(**SKS, **CLASS, with_prior_preservation=True, lora_alpha=0.5, use_dora=True, lora_dropout=0.1),
        LoRASettings(train_data_dir="dog", rank_pattern=("resnets=8", "attn2.to_k=16")),
        TextualInversionSettings(**WORD),
        TextualInversionSettings(**WORD, instance_prompt="a <DOG> on the beach", num_vectors=75),
        PivotalSettings(train_data_dir="dog", initializer_token="red dog"),
    ],
)
def test_good_settings(settings: FineTuneSettings) -> None:
    settings.check()


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        (DreamBoothSettings, SKS, "--with_prior_preservation needs --class_prompt"),
        (DreamBoothSettings, SKS | {"class_prompt": "a dog"}, "--with_prior_preservation needs --class_data_dir"),
        (LoRASettings, SKS | {"rank": 0}, "--rank must be at least 1; it is 0"),
        (LoRASettings, SKS | {"lora_alpha": 0.0}, "--lora_alpha must be a number above 0; it is 0.0"),
        (LoRASettings, SKS | {"lora_targets": ()}, "--lora_targets must name at least one layer"),
        (LoRASettings, SKS | {"lora_dropout": 1.0}, "--lora_dropout must lie in [0, 1); it is 1.0"),
        (LoRASettings, SKS | {"rank_pattern": ("resnets:8",)}, "must give layers and ranks, such as resnets=8; it is"),
        (LoRASettings, SKS | {"rank_pattern": ("resnets=0",)}, "--rank_pattern must give layers and ranks"),
        (TextualInversionSettings, {"instance_data_dir": "dog"}, '--initializer_token is needed: a word near'),
        (TextualInversionSettings, WORD | {"num_vectors": 0}, "--num_vectors must lie in 1 … 75; it is 0"),
        (TextualInversionSettings, WORD | {"num_vectors": 76}, "--num_vectors must lie in 1 … 75; it is 76"),
        (TextualInversionSettings, WORD | {"instance_prompt": "a dog"}, "--instance_prompt must contain the new word"),
        (LoRASettings, SKS | {"rank_pattern": ("resnets=" + "9" * 5000,)}, "must give layers and ranks"),
        (
            TextualInversionSettings,
            WORD | CLASS | {"with_prior_preservation": True},
            "--with_prior_preservation means nothing here: the model is frozen",
        ),
        (
            PivotalSettings,
            WORD | CLASS | {"with_prior_preservation": True, "class_prompt": "a <Dog>"},
            "--class_prompt must be without the new word; it is 'a <Dog>'",
        ),
        (PivotalSettings, WORD | {"rank": 0}, "--rank must be at least 1"),
        (PivotalSettings, WORD | {"initializer_token": " "}, "--initializer_token is needed: a word"),
        (PivotalSettings, WORD | {"learning_rate_embedding": 0.0}, "--learning_rate_embedding must be a number above 0"),
        (PivotalSettings, WORD | {"train_text_encoder": True, "lora_alpha": -1.0}, "--lora_alpha must be a number above 0"),
    ],
)
def test_bad_settings(kind: type[FineTuneSettings], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        kind(**changes).check()


def test_ranks_of_some_layers() -> None:
    assert LoRASettings(rank_pattern=("resnets=8", "attn2.to_k=16")).rank_of == {"resnets": 8, "attn2.to_k": 16}


def test_what_pictures_are_called() -> None:
    assert LoRASettings(**SKS).prompt == "a photo of a sks dog"
    assert TextualInversionSettings(**WORD).prompt == "<dog>"  # in templates
    assert TextualInversionSettings(**WORD, instance_prompt="a <dog>").prompt == "a <dog>"
    assert PivotalSettings(train_data_dir="dog").prompt == "<subject>"  # for pictures without a caption


def test_what_two_runs_must_agree_in() -> None:
    """All that a method adds changes its result, but for what says that it does not."""
    for kind in (FullSettings, DreamBoothSettings, LoRASettings, TextualInversionSettings, PivotalSettings):
        added = {name for name in kind.__dataclass_fields__ if name not in FineTuneSettings.__dataclass_fields__}
        assert added - kind().identity(1).keys() == added & {"layerwise_casting", "preset", "repeats"}


def test_dreambooth_is_full_fine_tuning_with_a_prior() -> None:
    assert DreamBoothSettings().with_prior_preservation and not FullSettings().with_prior_preservation
    assert issubclass(DreamBoothSettings, FullSettings)
