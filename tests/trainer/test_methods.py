"""The settings of each method: their checks, and what they make of their flags."""

import re
from typing import Any

import pytest

from minidiff.core.errors import SettingsError
from minidiff.trainer.settings import (
    DreamBoothSettings,
    FineTuneSettings,
    FullSettings,
    LoRASettings,
    PivotalSettings,
    TextualInversionSettings,
)

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
        (TextualInversionSettings, {"instance_data_dir": "dog"}, '--initializer_token must be a word such as "dog"'),
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
        (PivotalSettings, WORD | {"initializer_token": " "}, "--initializer_token must be a word"),
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
    assert PivotalSettings(train_data_dir="dog").prompt is None  # captions


def test_what_two_runs_must_agree_in() -> None:
    """All that a method adds changes its result, but for what says that it does not."""
    for kind in (FullSettings, DreamBoothSettings, LoRASettings, TextualInversionSettings, PivotalSettings):
        added = {name for name in kind.__dataclass_fields__ if name not in FineTuneSettings.__dataclass_fields__}
        assert added - kind().identity(1).keys() == added & {"layerwise_casting"}


def test_dreambooth_is_full_fine_tuning_with_a_prior() -> None:
    assert DreamBoothSettings().with_prior_preservation and not FullSettings().with_prior_preservation
    assert issubclass(DreamBoothSettings, FullSettings)
