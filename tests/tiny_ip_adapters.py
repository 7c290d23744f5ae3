"""IP-Adapters of the three forms for tiny U-Nets, with random numbers in place of zeros and ones."""

import torch
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
