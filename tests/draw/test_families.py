"""Models around SD 1.5 on tiny folders: what a call warns of, and what a folder of another family says."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import sd2_folder

from minidiff.core.errors import WeightsError
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.weights import read_header, save


def pipe_of(folder: Path) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_turbo_draws_in_one_step_without_guidance_and_warns_of_guidance(tmp_path: Path) -> None:
    pipe = pipe_of(sd2_folder(tmp_path, "SD-Turbo"))
    call = {"seed": 0, "num_inference_steps": 1, "output_type": "latent"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = pipe("a red dog", guidance_scale=0.0, **call).images
    with pytest.warns(UserWarning, match="guidance_scale is 7.5; .* a turbo model, .* guidance_scale 0"):
        assert not torch.equal(pipe("a red dog", **call).images, plain)


@pytest.mark.parametrize("model", ["SD 2", "SD 2 v"])
def test_the_others_are_guided_without_a_warning(model: str, tmp_path: Path) -> None:
    pipe = pipe_of(sd2_folder(tmp_path, model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pipe("a red dog", seed=0, num_inference_steps=2, timestep_spacing="trailing", output_type="latent").images.any()


def test_a_scheduler_that_is_set_later_makes_no_turbo_model(tmp_path: Path) -> None:
    from minidiff import DiffusionPipeline, EulerDiscreteScheduler

    pipe = DiffusionPipeline.from_pretrained(sd2_folder(tmp_path))
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pipe("a red dog", num_inference_steps=2, output_type="latent").images.any()


def test_the_lightest_text_tower_leaves_sd2_to_transformers(tmp_path: Path) -> None:
    """fast/clip.py has quick_gelu alone; its tokenizer pads as the folder says."""
    from minidiff.fast import clip
    from minidiff.files.model import read_model

    folder = sd2_folder(tmp_path)
    model = read_model(folder, light=clip)
    expected = pipe_of(folder)
    parts = (model.unet, model.vae, model.text_encoder, model.tokenizer, model.noise_config, model.sampler)
    assert torch.equal(StableDiffusionPipeline(*parts).encode_prompt("a red dog!"), expected.encode_prompt("a red dog!"))


def test_a_u_net_of_sdxl_in_a_folder_with_one_text_encoder(tmp_path: Path) -> None:
    import json

    folder = sd2_folder(tmp_path)
    path = folder / "unet" / "config.json"
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 40}
    path.write_text(json.dumps(json.loads(path.read_text()) | added))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shapes = {"linear_1.weight": (64, 40), "linear_1.bias": (64,), "linear_2.weight": (64, 64), "linear_2.bias": (64,)}
    save(read_header(weights).read() | {f"add_embedding.{k}": torch.ones(v) for k, v in shapes.items()}, weights)
    with pytest.raises(WeightsError, match="the U-Net is SDXL's, which reads a second text encoder too"):
        pipe_of(folder)
