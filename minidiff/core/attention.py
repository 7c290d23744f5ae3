"""Attention, and the transformer that stands in the U-Net.

    B batch   N heads   L query tokens   S key tokens   D width of one head   C = N * D channels   H W a feature map
"""

import math

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v  ("Attention Is All You Need", arXiv 1706.03762, eq. 1), as PyTorch computes it.

    q is (B, N, L, D); k and v are (B, N, S, D). Returns (B, N, L, D).
    """
    return F.scaled_dot_product_attention(q, k, v)


def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, exactly as equation 1 is written."""
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)  # (B, N, L, S); each row sums to 1
    return weights @ v


class CrossAttention(nn.Module):
    """Tokens look at a context: at each other (self-attention, no context given) or at the words of the prompt."""

    def __init__(self, width: int, context_width: int, heads: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=qkv_bias)
        self.to_k = nn.Linear(context_width, width, bias=qkv_bias)
        self.to_v = nn.Linear(context_width, width, bias=qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])  # a list, because SD calls it `to_out.0`

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, L, C), context (B, S, C_context) -> (B, L, C)."""
        q = self.split_heads(self.to_q(x))
        k, v = self.keys_and_values(x if context is None else context)
        return self.to_out[0](rearrange(attention(q, k, v), "b n l d -> b l (n d)"))

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context (B, S, C_context) -> k and v, each (B, N, S, D)."""
        return self.split_heads(self.to_k(context)), self.split_heads(self.to_v(context))

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, L, N * D) -> (B, N, L, D)."""
        return rearrange(x, "b l (n d) -> b n l d", n=self.heads)


class SpatialAttention(CrossAttention):
    """The VAE's attention: every cell of a feature map looks at all cells. One head, a norm, a residual connection."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, channels, heads=1, qkv_bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        tokens = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        return x + rearrange(super().forward(tokens), "b (h w) c -> b c h w", h=x.shape[-2])


class GEGLU(nn.Module):
    """value * GELU(gate), both made by one linear layer ("GLU Variants Improve Transformer", arXiv 2002.05202, eq. 5)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Each token by itself: to four times its width, through a gate, and back (arXiv 2002.05202, eq. 6)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))  # net.1 was dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Look at the picture, look at the prompt, think: three residual steps. Each begins with a LayerNorm."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(width), CrossAttention(width, width, heads)
        self.norm2, self.attn2 = nn.LayerNorm(width), CrossAttention(width, context_width, heads)
        self.norm3, self.ff = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """x (B, L, C), text (B, S, C_context) -> (B, L, C)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer over the cells of a feature map. This is where the prompt enters the picture."""

    def __init__(self, channels: int, context_width: int, heads: int, groups: int, depth: int = 1, linear: bool = False):
        super().__init__()
        self.linear = linear  # SD 2 and SDXL project by linear layers, SD 1.x by 1x1 convolutions, which compute the same
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, context_width, heads) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """x (B, C, H, W), text (B, S, C_context) -> (B, C, H, W)."""
        tokens = rearrange(self.project(self.proj_in, self.norm(x)), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            tokens = block(tokens, text)
        return x + self.project(self.proj_out, rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[-2]))

    def project(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Each cell of x by itself: (B, C, H, W) -> (B, C, H, W)."""
        if not self.linear:
            return layer(x)
        return rearrange(layer(rearrange(x, "b c h w -> b (h w) c")), "b (h w) c -> b c h w", h=x.shape[-2])
