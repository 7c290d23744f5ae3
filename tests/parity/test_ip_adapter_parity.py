"""IP-Adapter beside diffusers: the same weights in both, on tiny models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_controlnet_parity import jittered
from test_models_parity import error, noise, pair
from tiny_families import xl_folder
from tiny_ip_adapters import answers, picture, set_scale, tiny_ip_adapter, tiny_tower_folder
from tiny_model import tiny_folder
from tiny_sizes import TINY_SD2, TINY_UNET, TINY_XL
from torch import Tensor

from minidiff.core.config import UNetConfig
from minidiff.core.controlnet import ControlNetModel
from minidiff.core.ip_adapter import IPAdapter, inject
from minidiff.core.unet import UNet2DConditionModel
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.folder import config_values
from minidiff.files.weights import save

diffusers = pytest.importorskip("diffusers")


def attach(theirs: Any, adapter: IPAdapter) -> list[Any]:
    """Give diffusers' U-Net our adapter, as the dictionaries of a .bin file; returns its processors."""
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in adapter.state_dict().items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor
    theirs._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
    return [p for p in theirs.attn_processors.values() if hasattr(p, "scale")]


@pytest.mark.parametrize(
    ("form", "pictures", "config"),
    [("base", 1, TINY_UNET), ("base", 3, TINY_SD2), ("plus", 1, TINY_UNET), ("plus", 2, TINY_XL), ("full", 1, TINY_UNET)],
    ids=lambda value: "" if isinstance(value, UNetConfig) else str(value),
)
def test_unet(form: str, pictures: int, config: UNetConfig) -> None:
    ours, theirs = pair(UNet2DConditionModel, config)
    adapter, e = tiny_ip_adapter(ours, form), answers(form, pictures)
    x, t, text = noise(2, 4, 8, 8), torch.tensor([3, 900]), noise(2, 7, config.cross_attention_dim)
    vector, added = (), {}
    if config is TINY_XL:
        pooled, ids = noise(2, 24), torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
        from minidiff.core.blocks import timestep_embedding

        vector = (torch.cat([pooled, timestep_embedding(ids.flatten(), 8).reshape(2, -1)], dim=1),)
        added = {"text_embeds": pooled, "time_ids": ids}
    inject(ours, adapter)
    scales = [0.3 + 0.1 * i for i in range(len(adapter.ip_adapter))]
    set_scale(adapter, scales)
    processors = attach(theirs, adapter)
    order = [name for name in theirs.attn_processors if name.endswith("attn2.processor")]
    order.sort(key=lambda name: ("down", "up_b", "mid_").index(name[:4]))  # a stable sort: the files' order
    for name, scale in zip(order, scales):
        theirs.attn_processors[name].scale = [scale]
    assert len(processors) == len(scales)
    with torch.no_grad():
        expected = theirs(x, t, text, added_cond_kwargs={"image_embeds": [e], **added}).sample
        assert error(ours(x, t, adapter(text, e), *vector), expected) <= 1e-6


# --- whole pipelines -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, a model; `image_encoder`; and a file of each form."""
    home = tiny_folder(tmp_path_factory.mktemp("ip")).parent
    tiny_tower_folder(home)
    unet = StableDiffusionPipeline.from_pretrained(home / "base").unet
    for form in ("base", "plus", "full"):
        save(tiny_ip_adapter(unet, form).state_dict(), home / f"{form}.safetensors")
    return home


@pytest.mark.parametrize(("form", "pictures"), [("base", 1), ("plus", 2), ("full", 1)])
def test_pipeline(home: Path, form: str, pictures: int) -> None:
    ours = StableDiffusionPipeline.from_pretrained(home / "base")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(home / "base", local_files_only=True)
    shown = [picture(seed, size) for seed, size in enumerate([(40, 31), (28, 28)][:pictures])]
    where = {"weight_name": f"{form}.safetensors", "image_encoder_folder": "image_encoder"}
    theirs.load_ip_adapter(str(home), subfolder="", **where, local_files_only=True, low_cpu_mem_usage=False)
    ours.load_ip_adapter(home, **where)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
        pipe.set_ip_adapter_scale(0.6)
    call = {"prompt": "a red dog", "negative_prompt": "photo", "latents": noise(1, 4, 8, 8), "output_type": "latent"}
    call |= {"num_inference_steps": 4, "guidance_scale": 5.0}
    expected = theirs(**call, ip_adapter_image=[shown]).images
    drawn = ours(**call, ip_adapter_image=shown).images
    assert error(drawn, expected) <= 5e-5
    assert error(ours(**call, ip_adapter_image=picture(9)).images, expected) > 1e-3  # the picture counts


def test_with_a_controlnet(home: Path) -> None:
    """The ControlNet reads the words alone, the U-Net words and picture."""
    ours = StableDiffusionPipeline.from_pretrained(home / "base")
    torch.manual_seed(0)
    ours.controlnet = jittered(ControlNetModel.from_unet(ours.unet, (8, 16)))
    net = ours.controlnet[0]
    their_net = diffusers.ControlNetModel(**config_values(net.config, "ControlNetModel")).eval()
    their_net.load_state_dict(net.state_dict())
    kind = diffusers.StableDiffusionControlNetPipeline
    theirs = kind.from_pretrained(home / "base", controlnet=their_net, local_files_only=True)
    where = {"weight_name": "base.safetensors", "image_encoder_folder": "image_encoder"}
    theirs.load_ip_adapter(str(home), subfolder="", **where, local_files_only=True, low_cpu_mem_usage=False)
    ours.load_ip_adapter(home, **where)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a red dog", "latents": noise(1, 4, 16, 16), "output_type": "latent", "num_inference_steps": 4}
    call |= {"guidance_scale": 5.0, "controlnet_conditioning_scale": 0.8, "ip_adapter_image": picture(0)}
    hint = picture(5, (32, 32))
    expected = theirs(**call, image=hint).images
    assert error(ours(**call, control_image=hint).images, expected) <= 5e-5
    assert error(ours(**call | {"controlnet_conditioning_scale": 0.0}, control_image=hint).images, expected) > 1e-3


def test_sdxl(tmp_path: Path) -> None:
    """The pictures stand behind the states of both encoders; of two prompts, both see them."""
    folder = xl_folder(tmp_path)
    ours = StableDiffusionPipeline.from_pretrained(folder)
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False)
    tiny_tower_folder(tmp_path)
    save(tiny_ip_adapter(ours.unet, "plus").state_dict(), tmp_path / "plus.safetensors")
    where = {"subfolder": "", "weight_name": "plus.safetensors", "image_encoder_folder": "image_encoder"}
    theirs.load_ip_adapter(str(tmp_path), **where, local_files_only=True, low_cpu_mem_usage=False)
    ours.load_ip_adapter(tmp_path, **where)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
        pipe.set_ip_adapter_scale(0.5)
    call = {"prompt": ["a red dog", "a cat"], "latents": noise(2, 4, 8, 8), "output_type": "latent", "num_inference_steps": 4}
    call |= {"guidance_scale": 5.0, "ip_adapter_image": picture(0)}
    assert error(ours(**call).images, theirs(**call).images) <= 5e-5
