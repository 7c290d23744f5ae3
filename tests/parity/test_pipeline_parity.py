"""The whole road from prompt to picture beside diffusers' StableDiffusionPipeline, on the tiny folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minidiff.draw.pipeline import StableDiffusionPipeline

diffusers = pytest.importorskip("diffusers")

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpm++_2m": "DPMSolverMultistepScheduler",
}
PROMPTS, NEGATIVES = ["a photo of a red dog", "a drawing of a blue cat in the snow"], ["the beach", ""]


@pytest.fixture(scope="module")
def ours(tiny_folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def theirs(tiny_folder: Path) -> Any:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def both(ours: Any, theirs: Any, sampler: str, **call: Any) -> tuple[Any, Any]:
    """The same call to both, each with a generator of its own in the same state."""
    theirs.scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(theirs.scheduler.config)
    call = {"prompt": PROMPTS, "negative_prompt": NEGATIVES, "guidance_scale": 5.0, "num_inference_steps": 12} | call
    ours_too = {"sampler": sampler, "generator": torch.Generator().manual_seed(7)}
    a = ours(**call, **ours_too).images
    b = theirs(**call, generator=torch.Generator().manual_seed(7)).images
    return a, b


def compare(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape and b.isfinite().all() and b.std() > 0.01
    assert (a - b).abs().max() <= 1e-4 * b.abs().max(), f"{(a - b).abs().max():.1e} of {b.abs().max():.1e}"


@pytest.mark.parametrize("steps", [1, 4, 12, 30])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_latents_from_the_same_generator(ours: Any, theirs: Any, sampler: str, steps: int) -> None:
    compare(*both(ours, theirs, sampler, num_inference_steps=steps, output_type="latent"))


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_latents_from_the_same_start(ours: Any, theirs: Any, sampler: str) -> None:
    """Given latents leave the generator alone: the noise of the steps is its first."""
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    compare(*both(ours, theirs, sampler, latents=start, output_type="latent"))


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0},
        {"negative_prompt": None},
        {"num_images_per_prompt": 2},
        {"width": 24, "height": 40},
        {"prompt": PROMPTS[0], "negative_prompt": NEGATIVES[0]},
    ],
    ids=str,
)
def test_latents_of_other_calls(ours: Any, theirs: Any, call: dict[str, Any]) -> None:
    compare(*both(ours, theirs, "euler_a", output_type="latent", **call))


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_pictures(ours: Any, theirs: Any, sampler: str) -> None:
    """The last byte may round the other way, no more; and nearly none does."""
    a, b = both(ours, theirs, sampler)
    for mine, other in zip(a, b, strict=True):
        difference = np.abs(np.asarray(mine).astype(int) - np.asarray(other).astype(int))
        assert difference.max() <= 1 and difference.mean() < 0.01
        assert np.asarray(mine).std() > 10


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler"])
@pytest.mark.parametrize(("offset", "last"), [(0, True), (0, None), (None, None), (1, False)])
def test_scheduler_configs_of_old_models(tmp_path: Path, ours: Any, name: str, offset: int | None, last: bool | None) -> None:
    """Settings that are missing, or that the reference's pipeline changes."""
    ours.save_pretrained(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    changed = {"_class_name": name, "steps_offset": offset, "set_alpha_to_one": last}
    values = {key: value for key, value in (json.loads(path.read_text()) | changed).items() if value is not None}
    path.write_text(json.dumps(values))
    index = json.loads((tmp_path / "model_index.json").read_text()) | {"scheduler": ["diffusers", name]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    mine = StableDiffusionPipeline.from_pretrained(tmp_path)
    other = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    for pipe in (mine, other):
        pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    call = {"prompt": "a dog", "latents": latents, "num_inference_steps": 3, "output_type": "latent"}
    compare(mine(**call).images, other(**call).images)


def test_v_prediction(tmp_path: Path, ours: Any) -> None:
    ours.save_pretrained(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    mine = StableDiffusionPipeline.from_pretrained(tmp_path)
    other = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    for pipe in (mine, other):
        pipe.set_progress_bar_config(disable=True)
    compare(*both(mine, other, "dpm++_2m", output_type="latent"))
