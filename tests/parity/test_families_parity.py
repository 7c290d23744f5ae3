"""Pictures of the models around SD 1.5 beside diffusers' pipelines, on tiny folders in their layouts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import SCHEDULERS, sd2_folder

from minidiff.draw.pipeline import StableDiffusionPipeline

diffusers = pytest.importorskip("diffusers")

BOUND = 5e-5  # of the largest number; a wrong constant shows as 1e-3 or more
START = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
PROMPT = {"prompt": "a red dog on the beach!", "latents": START, "output_type": "latent"}
GUIDED = {"negative_prompt": "snow", "guidance_scale": 5.0}
CALLS = [
    ("SD 2", GUIDED | {"num_inference_steps": 5}),
    ("SD 2 v", GUIDED | {"num_inference_steps": 5}),
    ("SD-Turbo", {"guidance_scale": 0.0, "num_inference_steps": 1}),
    ("SD-Turbo", {"guidance_scale": 0.0, "num_inference_steps": 2}),
    ("SD-Turbo", {"guidance_scale": 0.0, "num_inference_steps": 4}),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {model: sd2_folder(tmp_path_factory.mktemp("tiny"), model) for model in SCHEDULERS}


def pipes(folder: Path) -> tuple[Any, Any]:
    ours = StableDiffusionPipeline.from_pretrained(folder)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    return ours, theirs


def compare(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape and theirs.isfinite().all() and theirs.std() > 0.01
    assert (ours - theirs).abs().max() <= BOUND * theirs.abs().max()


@pytest.mark.parametrize(("model", "call"), CALLS, ids=str)
def test_latents(folders: dict[str, Path], model: str, call: dict[str, Any]) -> None:
    ours, theirs = pipes(folders[model])
    compare(ours(**PROMPT, **call).images, theirs(**PROMPT, **call).images)


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_clip_skip_counts_from_the_last_layer_there_is(folders: dict[str, Path], skip: int) -> None:
    """SD 2's folder has 23 of OpenCLIP's 24 layers; diffusers, too, counts from the 23rd."""
    ours, theirs = pipes(folders["SD 2"])
    theirs.text_encoder.__dict__["text_model"] = theirs.text_encoder  # where diffusers 0.42 looks, and transformers 5 has none
    expected, _ = theirs.encode_prompt("a red dog!", "cpu", 1, False, clip_skip=skip or None)
    compare(ours.encode_prompt("a red dog!", clip_skip=skip), expected)


def test_the_padding_is_the_tokenizers_own(folders: dict[str, Path]) -> None:
    ours, _ = pipes(folders["SD 2"])
    assert ours.tokenizer.pad_token_id == 0
    expected = ours.encode_prompt("a red dog")
    ours.tokenizer.pad_token = ours.tokenizer.eos_token  # as in SD 1.x
    assert not torch.allclose(ours.encode_prompt("a red dog"), expected, atol=1e-3)


def test_a_folder_of_ours_in_diffusers(folders: dict[str, Path], tmp_path: Path) -> None:
    """What `save_pretrained` writes is read by both, with the same answers."""
    ours, _ = pipes(folders["SD-Turbo"])
    ours.save_pretrained(tmp_path)
    again, theirs = pipes(tmp_path)
    call = {"guidance_scale": 0.0, "num_inference_steps": 2}
    assert torch.equal(again(**PROMPT, **call).images, ours(**PROMPT, **call).images)
    compare(again(**PROMPT, **call).images, theirs(**PROMPT, **call).images)
    assert theirs.unet.config.attention_head_dim == [2, 4] and type(theirs.scheduler).__name__ == "EulerDiscreteScheduler"


def test_a_single_file_through_diffusers_converters(folders: dict[str, Path], tmp_path: Path) -> None:
    """Tensor by tensor; what diffusers does not know of the text tower is the layer that A1111 alone wants."""
    from diffusers.loaders import single_file_utils
    from safetensors.torch import load_file

    from minidiff.files.model import ldm_tensors
    from minidiff.files.weights import save

    ours, theirs = pipes(folders["SD 2"])
    save(ldm_tensors(ours.unet, ours.vae, ours.text_encoder), tmp_path / "sd2.safetensors")
    unet, vae, text = (load_file(tmp_path / "sd2.safetensors") for _ in range(3))
    unet = single_file_utils.convert_ldm_unet_checkpoint(unet, dict(theirs.unet.config))
    vae = single_file_utils.convert_ldm_vae_checkpoint(vae, dict(theirs.vae.config))
    text = single_file_utils.convert_open_clip_checkpoint(theirs.text_encoder, text)
    text = {key.removeprefix("text_model."): tensor for key, tensor in text.items()}
    made_up = {key for key in text if ".layers.3." in key} | {"text_projection.weight"}
    for back, network, extra in ((unet, theirs.unet, set()), (vae, theirs.vae, set()), (text, theirs.text_encoder, made_up)):
        state = network.state_dict()
        assert back.keys() - extra == state.keys() - {"embeddings.position_ids"}
        assert all(torch.equal(back[key].reshape(tensor.shape), tensor) for key, tensor in state.items())
