"""IP-Adapters of the three forms for tiny U-Nets, with random numbers in place of zeros and ones."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from minidiff.core.ip_adapter import ImageProjection, IPAdapter, Resampler, full_projection
from minidiff.core.unet import UNet2DConditionModel

E = 32  # width of the image tower's states and, in these tests, of its embedding


def tiny_projection(form: str, width: int = 24) -> nn.Module:
    if form == "plus":
        return Resampler(E, width, tokens=5, inner=16, heads=2)  # 4 deep: diffusers knows no other
    return ImageProjection(E, width, tokens=4) if form == "base" else full_projection(E, width)


def tiny_ip_adapter(unet: UNet2DConditionModel, form: str = "base") -> IPAdapter:
    """Every layer has weights of its own, so that none can be mistaken for another."""
    torch.manual_seed(1)
    adapter = IPAdapter(tiny_projection(form, unet.config.cross_attention_dim), unet)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return adapter.requires_grad_(False)


def answers(form: str, pictures: int = 1, seed: int = 3) -> torch.Tensor:
    """Of the image tower, for two samples: one vector for each picture, or the states of 7 patches."""
    shape = (2, pictures, E) if form == "base" else (2, pictures, 7, E)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def set_scale(adapter: IPAdapter, scales: list[float]) -> None:
    for layer, scale in zip(adapter.ip_adapter.values(), scales, strict=True):
        layer.scale = scale


def tiny_tower_folder(home: Path) -> Path:
    """An image tower that reads 28 x 28 pixels as 16 patches, in transformers' layout."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(2)
    sizes = {"hidden_size": E, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "projection_dim": E}
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=28, patch_size=7, hidden_act="gelu"))
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    tower.save_pretrained(home / "image_encoder")
    return home / "image_encoder"


def picture(seed: int, size: tuple[int, int] = (40, 31)) -> Image.Image:
    """Noise, as a picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)
