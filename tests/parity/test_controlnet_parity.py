"""ControlNets beside diffusers', on tiny models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_families import sd2_folder, xl_folder
from tiny_sizes import TINY_SD2, TINY_UNET, TINY_XL

import minidiff
from minidiff.core.config import UNetConfig
from minidiff.core.controlnet import ControlNetModel
from minidiff.core.unet import UNet2DConditionModel
from minidiff.files.controlnet import write_controlnet
from minidiff.files.folder import config_values

diffusers = pytest.importorskip("diffusers")

WIDTHS = (8, 16, 24, 32)


def jittered(model: Any) -> Any:
    """Zeros and ones hide mistakes: a little noise on every weight."""
    draws = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=draws)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("config", [TINY_UNET, TINY_SD2, TINY_XL], ids=["SD 1", "SD 2", "SDXL"])
def test_residuals_and_output(config: UNetConfig, guess: bool) -> None:
    torch.manual_seed(0)
    unet = jittered(UNet2DConditionModel(config))
    net = jittered(ControlNetModel.from_unet(unet, WIDTHS))
    their_unet = diffusers.UNet2DConditionModel.from_config(config_values(config, "UNet2DConditionModel")).eval()
    their_net = diffusers.ControlNetModel.from_unet(their_unet, conditioning_embedding_out_channels=WIDTHS).eval()
    their_unet.load_state_dict(unet.state_dict())
    their_net.load_state_dict(net.state_dict())
    x, text, hint = torch.randn(2, 4, 8, 8), torch.randn(2, 7, config.cross_attention_dim), torch.rand(2, 3, 64, 64)
    vector, more = None, {}
    if config.addition_embed_type:
        pooled, ids = torch.randn(2, 24), torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
        numbers = their_unet.add_time_proj(ids.flatten()).reshape(2, -1)
        vector, more = torch.cat([pooled, numbers], dim=1), {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
    t = torch.tensor([981, 20])
    control = net(x, t, *(one for one in (text, vector) if one is not None), hint=net.encode_hint(hint), scale=0.7, guess=guess)
    their = dict(controlnet_cond=hint, conditioning_scale=0.7, guess_mode=guess, return_dict=False)
    down, mid = their_net(x, t, text, **their, **more)
    for ours, theirs in zip(control, [*down, mid], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    both = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    theirs = their_unet(x, t, text, **both, **more).sample
    torch.testing.assert_close(unet(x, t, text, vector, control), theirs, rtol=1e-6, atol=1e-6)


# --- whole pipelines ---------------------------------------------------------------------------------------------------

START = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
HINTS = [Image.effect_noise((32, 32), 90 + i).convert("RGB") for i in range(2)]
CALLS: list[dict[str, Any]] = [
    {"control_guidance_start": 0.2, "control_guidance_end": 0.7},
    {"guess_mode": True},
    {"nets": 2, "controlnet_conditioning_scale": [0.6, 1.1], "control_guidance_start": [0.0, 0.3]},
    {"controlnet_conditioning_scale": 0.7, "image": HINTS[0].resize((50, 40)), "width": 32, "height": 32},
    {"strength": 0.6, "sampler": "EulerDiscreteScheduler"},
    {"sampler": "HeunDiscreteScheduler", "control_guidance_end": 0.5},
    {"pooled": True},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("tiny")
    base = sd2_folder(home)
    unet = minidiff.StableDiffusionPipeline.from_pretrained(base).unet
    for i in range(2):
        torch.manual_seed(i)
        write_controlnet(jittered(ControlNetModel.from_unet(unet, (8, 16))), home / f"net-{i}")
    return home


@pytest.mark.parametrize("call", CALLS, ids=lambda call: ", ".join(call) or "usual")
def test_latents(folder: Path, call: dict[str, Any]) -> None:
    call = dict(call)
    count, sampler, pooled = call.pop("nets", 1), call.pop("sampler", "DDIMScheduler"), call.pop("pooled", False)
    name = "StableDiffusionControlNetImg2ImgPipeline" if "strength" in call else "StableDiffusionControlNetPipeline"
    latents = []
    for library in (minidiff, diffusers):
        nets = [library.ControlNetModel.from_pretrained(folder / f"net-{i}") for i in range(count)]
        if pooled and library is diffusers:
            nets[0].register_to_config(global_pool_conditions=True)
        elif pooled:
            nets[0].config = replace(nets[0].config, global_pool_conditions=True)
        pipe = getattr(library, name).from_pretrained(folder / "model", controlnet=nets if count > 1 else nets[0])
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = getattr(library, sampler).from_config(pipe.scheduler.config)
        hints = HINTS[:count] if count > 1 else HINTS[0]
        given: dict[str, Any] = {"image": hints, "latents": START, "guidance_scale": 4.0} | call
        if "strength" in call:
            given |= {"image": HINTS[1], "control_image": HINTS[0], "generator": torch.Generator().manual_seed(3)}
            given.pop("latents")
        given |= {"negative_prompt": "snow", "num_inference_steps": 4, "output_type": "latent"}
        latents.append(pipe("a red dog on the beach!", **given).images)
    ours, theirs = latents
    assert ours.shape == theirs.shape and theirs.isfinite().all() and theirs.std() > 0.01
    assert (ours - theirs).abs().max() <= 5e-5 * theirs.abs().max()


@pytest.mark.parametrize("config", [TINY_UNET, TINY_SD2], ids=["SD 1", "SD 2"])
def test_a_single_file_through_diffusers_converter(config: UNetConfig, tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
    from safetensors.torch import load_file

    net = ControlNetModel.from_unet(UNet2DConditionModel(config), WIDTHS)
    write_controlnet(net, tmp_path / "net.safetensors")
    back = convert_controlnet_checkpoint(load_file(tmp_path / "net.safetensors"), config_values(net.config, "ControlNetModel"))
    assert back.keys() == net.state_dict().keys()
    assert all(torch.equal(back[key].reshape(tensor.shape), tensor) for key, tensor in net.state_dict().items())


def test_latents_of_sdxl(tmp_path: Path) -> None:
    base, latents = xl_folder(tmp_path), []
    unet = minidiff.StableDiffusionXLPipeline.from_pretrained(base).unet
    write_controlnet(jittered(ControlNetModel.from_unet(unet, (8, 16))), tmp_path / "net")
    for library in (minidiff, diffusers):
        net = library.ControlNetModel.from_pretrained(tmp_path / "net")
        pipe = library.StableDiffusionXLControlNetPipeline.from_pretrained(base, controlnet=net)
        pipe.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": 3, "latents": START, "output_type": "latent", "guess_mode": True, "guidance_scale": 4.0}
        latents.append(pipe("a red dog", image=HINTS[0], negative_prompt="snow", **call).images)
    assert (latents[0] - latents[1]).abs().max() <= 5e-5 * latents[1].abs().max()
