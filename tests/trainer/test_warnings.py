"""Said before training: a picture shown more often than others, a far resolution, a blind VAE; and the trigger word."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_sizes import TINY_VAE
from torch import Tensor

from minidiff.core.vae import AutoencoderKL
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.trainer.card import trigger_of
from minidiff.trainer.dataset import Example
from minidiff.trainer.latents import LatentData
from minidiff.trainer.pictures import warnings_of
from minidiff.trainer.settings import LoRASettings


def warned(tmp_path: Path, sizes: list[tuple[int, int]], own: int = 32, **changes: Any) -> list[str]:

    examples = []
    for i, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
        examples.append(Example(tmp_path / f"{i}.png", "p", size=size))
    settings = replace(LoRASettings(train_batch_size=4, cache_latents=False), **changes)

    def encode(prompts: list[str]) -> dict[str, Tensor]:
        return {"text": torch.zeros(len(prompts), 77, 24)}

    return list(warnings_of(LatentData(examples, settings, 32, AutoencoderKL(TINY_VAE).eval(), encode, 1000), own))


def test_a_lone_shape_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidiff.trainer.pictures.reconstruction", lambda vae, example, mean: 30.0)
    lone = [(32, 32)] * 4 + [(48, 24)]
    (said,) = warned(tmp_path, lone, aspect_ratio_buckets=True)
    assert "3.png 1 x, 4.png 4 x" in said and "--train_batch_size 1" in said
    assert not warned(tmp_path, lone) and not warned(tmp_path, lone, aspect_ratio_buckets=True, train_batch_size=1)


def test_a_resolution_that_is_far_from_the_models_own_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidiff.trainer.pictures.reconstruction", lambda vae, example, mean: 30.0)
    assert ["--resolution 32 is far from the 64 of the base" in text for text in warned(tmp_path, [(32, 32)], own=64)] == [True]
    assert not warned(tmp_path, [(32, 32)], own=40)


def test_pictures_that_the_vae_cannot_show_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = {"0.png": 30.0, "1.png": 12.0}
    monkeypatch.setattr("minidiff.trainer.pictures.reconstruction", lambda vae, example, mean: levels[example.path.name])
    (said,) = warned(tmp_path, [(32, 32)] * 2)
    assert said.startswith("from the VAE comes back 1.png with 12 dB. Below 20 dB")


# --- the trigger word, TensorBoard, the hub ----------------------------------------------------------------------------


@pytest.mark.parametrize("captions, word", [
    (["a photo of a sks dog", "sks in the snow"], "sks"),
    (["a photo of a dog", "a dog in the snow"], None),
    (["zanzibar by ohwx", "ohwx of zanzibar"], None),  # which of them?
    (["a photo of <my-dog>"], "<my-dog>"),
])  # fmt: skip
def test_trigger(captions: list[str], word: str | None) -> None:

    pipe: Any = SimpleNamespace(tokenizer=StableDiffusionPipeline.from_pretrained("checkpoints/pocket").tokenizer)
    data: Any = SimpleNamespace(examples=[Example(Path("a.png"), caption) for caption in captions])
    assert trigger_of(LoRASettings(), data, pipe) == word
    assert trigger_of(LoRASettings(trigger="given"), data, pipe) == "given"
