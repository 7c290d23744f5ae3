"""The convolutional bricks of the U-Net and the VAE.

    B batch   C channels   H W height and width   T width of the time embedding

The epsilon of each norm is a part of the model: SD has 1e-5 in the U-Net's ResBlocks, and 1e-6 before its transformers and
everywhere in the VAE. Most re-implementations get it wrong, and their pictures still look fine. Our tests count the norms.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """The timestep as cosines and sines (arXiv 1706.03762, section 3.5) of the frequencies 10000^(-2i / width).

    t is (B,) and may be fractional. Returns (B, width), fp32. In SD the cosines come first.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Two linear layers from the sinusoids (B, C) to the time embedding (B, T), which every ResBlock reads."""

    def __init__(self, width: int, embedding_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, embedding_width)
        self.linear_2 = nn.Linear(embedding_width, embedding_width)

    def forward(self, sinusoids: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class NormSiLU(nn.GroupNorm):
    """GroupNorm, then SiLU: the two always come together in SD."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class ResBlock(nn.Module):
    """norm, SiLU, conv; add the time; norm, SiLU, conv; add the input. In the VAE there is no time (`time_width=None`)."""

    def __init__(self, c_in: int, c_out: int, time_width: int | None, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = NormSiLU(groups, c_in, eps=eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        if time_width is not None:
            self.time_emb_proj = nn.Linear(time_width, c_out)
        self.norm2 = NormSiLU(groups, c_out, eps=eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x (B, C_in, H, W), time (B, T) -> (B, C_out, H, W)."""
        h = self.conv1(self.norm1(x))
        if time is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(self.norm2(h))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2), by a strided convolution. The VAE pads right and below only, the U-Net all around."""

    def __init__(self, channels: int, pad_all_around: bool) -> None:
        super().__init__()
        self.pad_all_around = pad_all_around
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if pad_all_around else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.pad_all_around else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W), or exactly `size`: repeat each cell, then smooth with a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return self.conv(F.interpolate(x, size, scale_factor=None if size else 2.0, mode="nearest"))
