"""SDXL beside diffusers' pipelines: a tiny folder with its layout, unequal heads, depths and text towers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_families_parity import compare
from tiny_families import xl_folder

from minidiff.draw.pipeline import StableDiffusionPipeline

diffusers = pytest.importorskip("diffusers")

START = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
PROMPTS = ["a red dog on the beach", "a blue cat"]  # without "!": for diffusers' second tokenizer it is a padding mark
CALL: dict[str, Any] = {"latents": START, "num_inference_steps": 5, "guidance_scale": 5.0, "output_type": "latent"}
SIZES = {"original_size": (32, 40), "crops_coords_top_left": (3, 5), "target_size": (16, 16)}
NEGATIVE_SIZES = {"negative_original_size": (8, 8), "negative_crops_coords_top_left": (1, 2), "negative_target_size": (16, 24)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return xl_folder(tmp_path_factory.mktemp("tiny"))


def loaded(folder: Path, name: str = "StableDiffusionXLPipeline") -> tuple[Any, Any]:
    theirs = getattr(diffusers, name).from_pretrained(folder, local_files_only=True, add_watermarker=False)
    ours = StableDiffusionPipeline.from_pretrained(folder)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    theirs.text_encoder.__dict__["text_model"] = theirs.text_encoder  # where diffusers 0.42 looks, and transformers 5 has none
    return ours, theirs


@pytest.fixture(scope="module")
def pipes(folder: Path) -> tuple[Any, Any]:
    return loaded(folder)


@pytest.mark.parametrize("skip", [0, 1])
def test_both_encoders_and_the_pooled_vector(pipes: tuple[Any, Any], skip: int) -> None:
    ours, theirs = pipes
    states, pooled = ours.encode_prompt(PROMPTS, clip_skip=skip)
    expected, _, expected_pooled, _ = theirs.encode_prompt(PROMPTS, device="cpu", clip_skip=skip or None)
    assert torch.equal(states, expected) and torch.equal(pooled, expected_pooled)


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"negative_prompt": ""},
        {"negative_prompt": "snow"},
        {"negative_prompt": "snow", **SIZES},
        {"guidance_scale": 0.0, **SIZES},
        {"guidance_rescale": 0.5},
    ],
    ids=str,
)
def test_latents(pipes: tuple[Any, Any], call: dict[str, Any]) -> None:
    ours, theirs = pipes
    given = CALL | call
    negative = {"negative_prompt": [call["negative_prompt"]] * 2} if "negative_prompt" in call else {}
    compare(ours(PROMPTS, **given).images, theirs(PROMPTS, **given | negative).images)


def test_the_negative_sizes_of_one_picture(pipes: tuple[Any, Any]) -> None:
    """Of one alone: with several, diffusers 0.42 gives the sizes of the negative half to every second picture."""
    ours, theirs = pipes
    call = CALL | {"latents": START[:1], "negative_prompt": "snow", **SIZES, **NEGATIVE_SIZES}
    compare(ours(PROMPTS[0], **call).images, theirs(PROMPTS[0], **call).images)
    alone = [ours(p, **call | {"latents": START[i : i + 1]}).images for i, p in enumerate(PROMPTS)]
    compare(ours(PROMPTS, **call | {"latents": START}).images, torch.cat(alone))


def test_from_a_picture(folder: Path) -> None:
    from PIL import Image

    image = Image.effect_noise((16, 16), 80).convert("RGB")
    call = {"image": image, "strength": 0.6, "num_inference_steps": 5, "guidance_scale": 5.0, "output_type": "latent"}
    pipes = loaded(folder, "StableDiffusionXLImg2ImgPipeline")
    compare(*(pipe(PROMPTS[0], generator=torch.Generator().manual_seed(3), **call).images for pipe in pipes))


def test_a_folder_of_ours_in_diffusers(folder: Path, tmp_path: Path) -> None:
    ours, theirs = loaded(folder)
    ours.save_pretrained(tmp_path)
    again, others = loaded(tmp_path)
    assert torch.equal(again(PROMPTS, **CALL).images, ours(PROMPTS, **CALL).images)
    compare(again(PROMPTS, **CALL).images, others(PROMPTS, **CALL).images)
    assert others.tokenizer_2.pad_token_id == 0 and others.config.force_zeros_for_empty_prompt
