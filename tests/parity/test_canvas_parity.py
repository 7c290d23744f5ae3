"""Image to image and inpainting beside diffusers' pipelines, on the tiny folder, with the same generator."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import minidiff
from minidiff.core.controlnet import ControlNetModel
from minidiff.core.rng import normal
from minidiff.draw.images import to_pil
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.controlnet import write_controlnet

diffusers = pytest.importorskip("diffusers")

SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
PROMPT, NEGATIVE = "a photo of a red dog", "the beach"


def picture(seed: int = 0) -> Image.Image:
    small = normal((1, 3, 4, 4), seed, "picture")
    return to_pil(torch.nn.functional.interpolate(small, (16, 16), mode="bicubic").clamp(-1, 1))[0]


def mask() -> Image.Image:
    image = Image.new("L", (16, 16))
    image.paste(255, (4, 2, 12, 10))
    return image


def pair(folder: Path, kind: str) -> tuple[StableDiffusionPipeline, Any]:
    ours = StableDiffusionPipeline.from_pretrained(folder)
    theirs = getattr(diffusers, kind).from_pretrained(folder, local_files_only=True)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    return ours, theirs


def both(ours: Any, theirs: Any, sampler: str, ours_too: dict[str, Any], theirs_too: dict[str, Any]) -> Any:
    theirs.scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(theirs.scheduler.config)
    call: dict[str, Any] = {"negative_prompt": NEGATIVE, "guidance_scale": 5.0, "num_inference_steps": 10}
    call |= {"output_type": "latent"}
    a = ours(PROMPT, **call, **ours_too, sampler=sampler, generator=torch.Generator().manual_seed(7)).images
    b = theirs(PROMPT, **call, **theirs_too, generator=torch.Generator().manual_seed(7)).images
    return a, b


@pytest.fixture(scope="module")
def image_to_image(tiny_folder: Path) -> Any:
    return pair(tiny_folder, "StableDiffusionImg2ImgPipeline")


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_image_to_image(image_to_image: Any, sampler: str, strength: float) -> None:
    call = {"image": picture(), "strength": strength}
    a, b = both(*image_to_image, sampler, call, call)
    assert (a - b).abs().max() <= 1e-4 * b.abs().max() and b.std() > 0.01


@pytest.mark.parametrize("strength", [0.5, 0.9])
def test_inpainting_with_an_ordinary_model(tiny_folder: Path, strength: float) -> None:
    """DDIM: noising the known part afresh with the first noise, as they do, and knowing its x0, as we do, are one thing."""
    ours, theirs = pair(tiny_folder, "StableDiffusionInpaintPipeline")
    call = {"image": picture(), "mask_image": mask(), "strength": strength}
    a, b = both(ours, theirs, "ddim", call, {**call, "height": 16, "width": 16})
    inside = (slice(None), slice(None), slice(1, 5), slice(2, 6))
    assert (a[inside] - b[inside]).abs().max() <= 1e-4 * b.abs().max()


@pytest.fixture(scope="module")
def inpainter_folder(tiny_folder: Path, tmp_path_factory: Any) -> Path:
    """The tiny folder with a U-Net of nine input channels."""
    folder = tmp_path_factory.mktemp("inpainter")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True)
    torch.manual_seed(0)
    config = {**theirs.unet.config, "in_channels": 9}
    theirs.unet = diffusers.UNet2DConditionModel.from_config(config)
    theirs.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionInpaintPipeline"}))
    return folder


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpm++_2m"])
def test_inpainting_with_a_model_for_it(inpainter_folder: Path, sampler: str, strength: float) -> None:
    ours, theirs = pair(inpainter_folder, "StableDiffusionInpaintPipeline")
    call = {"image": picture(), "mask_image": mask(), "strength": strength}
    a, b = both(ours, theirs, sampler, call, {**call, "height": 16, "width": 16})
    assert (a - b).abs().max() <= 1e-4 * b.abs().max() and b.std() > 0.01


@pytest.mark.parametrize("trained_for_it", [False, True])
def test_inpainting_with_a_controlnet(tiny_folder: Path, inpainter_folder: Path, trained_for_it: bool, tmp_path: Path) -> None:
    """An ordinary model (inside the mask: see above) and one for inpainting, whose net has four channels all the same."""
    plain = StableDiffusionPipeline.from_pretrained(tiny_folder).unet
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(plain, (8, 16))
    for p in net.parameters():
        p.data += 0.02 * torch.randn(p.shape)
    write_controlnet(net, tmp_path / "net")
    hint, latents = Image.effect_noise((16, 16), 90).convert("RGB"), []
    for library in (minidiff, diffusers):
        pipe = library.StableDiffusionControlNetInpaintPipeline.from_pretrained(
            inpainter_folder if trained_for_it else tiny_folder,
            controlnet=library.ControlNetModel.from_pretrained(tmp_path / "net"),
        )
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = library.DDIMScheduler.from_config(pipe.scheduler.config)
        call = {"image": picture(), "mask_image": mask(), "control_image": hint, "controlnet_conditioning_scale": 0.8}
        call |= {"strength": 0.9, "num_inference_steps": 10, "guidance_scale": 5.0, "output_type": "latent"}
        latents.append(pipe(PROMPT, height=16, width=16, generator=torch.Generator().manual_seed(7), **call).images)
    a, b = latents if trained_for_it else [z[:, :, 1:5, 2:6] for z in latents]
    assert (a - b).abs().max() <= 1e-4 * latents[1].abs().max() and b.std() > 0.01
