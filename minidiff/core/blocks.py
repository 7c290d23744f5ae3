"""The bricks of the U-Net and the VAE.

    B batch   C channels   H W height and width   L = H·W tokens   S text tokens   T width of the time embedding

The epsilon of each norm is part of the model: SD has 1e-5 in the U-Net's ResBlocks, 1e-6 in front of its transformers and
everywhere in the VAE. Most re-implementations get this wrong, and their pictures still look fine; the tests count them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.core.transformer import CrossAttention
from minidiff.fast import conv as cpu
from minidiff.fast.frozen import Conv2d, Linear
from minidiff.fast.lean import geglu, group_norm, layer_norm, norm_silu


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoids of the timestep: arXiv 1706.03762, section 3.5, with frequencies 10000^(-2i / width).

    t (B,), any dtype, fractions allowed -> (B, width) fp32. SD puts the cosines first.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Two linears that turn the sinusoids into what every ResBlock adds to its features."""

    def __init__(self, width: int, embedding_width: int) -> None:
        super().__init__()
        self.linear_1 = Linear(width, embedding_width)
        self.linear_2 = Linear(embedding_width, embedding_width)

    def forward(self, sinusoids: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class ResBlock(nn.Module):
    """norm, SiLU, conv; add the time; norm, SiLU, conv; add the input. The VAE's has no time (`time_width=None`)."""

    def __init__(self, c_in: int, c_out: int, time_width: int | None, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv1 = Conv2d(c_in, c_out, 3, padding=1)
        if time_width is not None:
            self.time_emb_proj = Linear(time_width, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.conv2 = Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x (B, C_in, H, W), time (B, T) -> (B, C_out, H, W)."""
        h = self.conv1(norm_silu(self.norm1, x))
        if time is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(norm_silu(self.norm2, h))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class GEGLU(nn.Module):
    """GLU Variants Improve Transformer (arXiv 2002.05202), eq. 6: x W ⊗ GELU(x V), with the exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        return geglu(self.proj(x))


class FeedForward(nn.Module):
    """Each token on its own: four times as wide, gated, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), Linear(4 * width, width))  # net.1: dropout

    def forward(self, x: Tensor) -> Tensor:
        return cpu.by_pieces(self.net, x)


class TransformerBlock(nn.Module):
    """Look at the picture, look at the prompt, think: three residual steps, each behind a LayerNorm."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(width), CrossAttention(width, width, heads)
        self.norm2, self.attn2 = nn.LayerNorm(width), CrossAttention(width, context_width, heads)
        self.norm3, self.ff = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """x (B, L, C), text (B, S, D) -> (B, L, C)."""
        x = x + self.attn1(layer_norm(self.norm1, x))
        x = x + self.attn2(layer_norm(self.norm2, x), text)
        return x + self.ff(layer_norm(self.norm3, x))


class SpatialTransformer(nn.Module):
    """A transformer over the cells of a feature map; this is where the prompt enters the picture."""

    def __init__(self, channels: int, context_width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = Conv2d(channels, channels, 1)  # SD 1.x: a 1x1 convolution; SD 2 has a linear
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_width, heads)])
        self.proj_out = Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """x (B, C, H, W), text (B, S, D) -> (B, C, H, W)."""
        tokens = self.proj_in(group_norm(self.norm, x)).flatten(2).mT  # (B, H·W, C)
        for block in self.transformer_blocks:
            tokens = block(tokens, text)
        return x + self.proj_out(tokens.mT.unflatten(-1, x.shape[-2:]))


class Downsample(nn.Module):
    """Half the side, by a strided convolution. The VAE's pads right and below only, the U-Net's all around."""

    def __init__(self, channels: int, pad_all_around: bool) -> None:
        super().__init__()
        self.pad_all_around = pad_all_around
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=1 if pad_all_around else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.pad_all_around else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the side, or exactly `size`: repeat each cell, then smooth with a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        x = F.interpolate(x, size=size, mode="nearest") if size else F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x)
