"""The committed pocket checkpoint in diffusers, unchanged: the same pictures for the same latents; and a LoRA for it."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from minidiff import StableDiffusionPipeline
from minidiff.core.inject import adapter_weights, inject, lora_layers
from minidiff.core.rng import normal
from minidiff.draw.images import load_image
from minidiff.files.lora_file import save_lora

diffusers = pytest.importorskip("diffusers")

POCKET = Path(__file__).parent.parent.parent / "checkpoints" / "pocket"
PROMPTS = ["a photo of a red dog on the beach", "a pixel art of a blue house at night"]
CALL = {"num_inference_steps": 6, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def theirs():  # type: ignore[no-untyped-def]
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(POCKET)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def ours() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(POCKET)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same_pictures(a: list, b: list) -> None:  # type: ignore[type-arg]
    for x, y in zip(a, b, strict=True):
        assert np.abs(np.asarray(x, int) - np.asarray(y, int)).max() <= 1  # of 255


def test_same_pictures(ours: StableDiffusionPipeline, theirs) -> None:  # type: ignore[no-untyped-def]
    latents = normal((2, 4, 16, 16), 0, "parity")
    same_pictures(ours(PROMPTS, latents=latents, **CALL).images, theirs(PROMPTS, latents=latents, **CALL).images)


CLASSES = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("sampler", CLASSES)
def test_same_picture_with_every_sampler(
    ours: StableDiffusionPipeline,
    theirs,
    sampler: str,
    karras: bool,  # type: ignore[no-untyped-def]
) -> None:
    """One prompt and four steps; given latents, both draw the noise of the steps from the same generator."""
    if karras and sampler not in ("euler", "heun", "dpm++_2m", "dpm++_2m_sde", "unipc"):
        pytest.skip(f"diffusers has no Karras sigmas for {sampler}")
    name, settings = CLASSES[sampler]
    before = theirs.scheduler
    theirs.scheduler = getattr(diffusers, name).from_config(
        before.config, **settings, **({"use_karras_sigmas": True} if karras else {})
    )
    call = CALL | {"prompt": PROMPTS[0], "latents": normal((1, 4, 16, 16), 0, "parity"), "num_inference_steps": 4}
    a, b = (
        pipe(**call, **own, generator=torch.Generator().manual_seed(3)).images
        for pipe, own in ((ours, {"sampler": sampler, "use_karras_sigmas": karras or None}), (theirs, {}))
    )
    theirs.scheduler = before
    same_pictures(a, b)
    assert np.asarray(a[0]).std() > 10


def test_image_tower_loads(theirs) -> None:  # type: ignore[no-untyped-def]
    assert type(theirs.image_encoder).__name__ == "CLIPVisionModelWithProjection"
    with torch.no_grad():
        assert theirs.image_encoder(torch.zeros(1, 3, 128, 128)).image_embeds.shape == (1, 128)


def test_lora_has_the_same_effect(ours: StableDiffusionPipeline, theirs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("peft")
    latents = normal((2, 4, 16, 16), 1, "parity")
    plain = ours(PROMPTS, latents=latents, **CALL).images
    inject(ours.unet, rank=4, alpha=8)
    for name, layer in lora_layers(ours.unet).items():
        layer.lora_B["default"].data = 0.1 * normal(layer.lora_B["default"].shape, 2, name)
    save_lora({f"unet.{name}": weights for name, weights in adapter_weights(ours.unet).items()}, tmp_path)
    theirs.load_lora_weights(tmp_path)
    tuned = ours(PROMPTS, latents=latents, **CALL).images
    same_pictures(tuned, theirs(PROMPTS, latents=latents, **CALL).images)
    theirs.unload_lora_weights()
    assert np.abs(np.asarray(tuned[0], int) - np.asarray(plain[0], int)).max() > 20


def test_a_folder_in_half_precision_draws_in_diffusers_without_torch_dtype(ours, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """transformers would load the text encoder as the file has it, and diffusers the other networks in fp32."""
    ours.save_pretrained(tmp_path, torch.float16)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert {n.dtype for n in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    pipe(PROMPTS[0], num_inference_steps=1)


def test_the_ip_adapter(ours: StableDiffusionPipeline, theirs) -> None:  # type: ignore[no-untyped-def]
    """The committed file and the pocket's own image tower, with what its folder says about pictures."""
    tower = POCKET / "image_encoder"
    theirs.register_modules(
        image_encoder=transformers.CLIPVisionModelWithProjection.from_pretrained(tower, torch_dtype=torch.float32),
        feature_extractor=transformers.CLIPImageProcessor.from_pretrained(tower),
    )
    where = {"subfolder": "", "weight_name": "ip_adapter.safetensors"}
    theirs.load_ip_adapter(str(POCKET.parent / "pocket-ip"), **where, local_files_only=True, low_cpu_mem_usage=False)
    ours.load_ip_adapter(POCKET.parent / "pocket-ip", **where)
    x, dog = normal((1, 4, 16, 16), 0, "latents"), load_image(POCKET.parents[1] / "lessons" / "data" / "dog" / "01.png")
    drawn = [pipe("", latents=x, ip_adapter_image=dog, **CALL).images for pipe in (ours, theirs)]
    theirs.unload_ip_adapter()
    same_pictures(*drawn)
