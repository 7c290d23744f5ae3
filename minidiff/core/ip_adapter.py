"""IP-Adapter: a picture as a prompt, through a cross-attention of its own beside that of the text (arXiv 2308.06721).

    picture --image tower--> e --projection--> image tokens (B, M n, D), appended to the text (B, S, D)
    in each cross-attention:    softmax(Q K^T / √d) V + λ softmax(Q K'^T / √d) V'                      eq. 8

The image tower is CLIP's. Q, K and V are the U-Net's own and frozen. K' and V' come from the image tokens by two new linear
layers, which are trained together with the projection.

    B samples   M pictures for each sample   n tokens for each picture   S text tokens   D width of tokens   L cells of the map
    C width of a cross-attention   N its heads   d their width   E width of the tower's output   P patches, and a class token
"""

from collections import OrderedDict
from copy import deepcopy

import torch
from einops import rearrange
from torch import Tensor, nn

from minidiff.core.attention import CrossAttention, TransformerBlock, attention
from minidiff.core.unet import UNet2DConditionModel


class ImageProjection(nn.Module):
    """The base form: the embedding of a whole picture becomes n tokens."""

    def __init__(self, e_width: int, width: int, tokens: int = 4) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj, self.norm = nn.Linear(e_width, tokens * width), nn.LayerNorm(width)

    def forward(self, e: Tensor) -> Tensor:
        """(B, E) -> (B, n, D)."""
        return self.norm(rearrange(self.proj(e), "b (n d) -> b n d", n=self.tokens))


def full_projection(e_width: int, width: int) -> nn.Module:
    """The full-face form: each patch becomes a token, (B, P, E) -> (B, P, D)."""
    layers = nn.Linear(e_width, e_width), nn.GELU(), nn.Linear(e_width, width), nn.LayerNorm(width)
    return nn.Sequential(OrderedDict(proj=nn.Sequential(*layers)))


class LatentAttention(nn.Module):
    """Learned tokens ("latents") look at the patches and at each other, with heads of width 64."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_kv = nn.Linear(width, 64 * heads, bias=False), nn.Linear(width, 128 * heads, bias=False)
        self.to_out = nn.Linear(64 * heads, width, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """x (B, P, width), latents (B, n, width) -> (B, n, width)."""
        latents = self.norm2(latents)
        k, v = self.to_kv(torch.cat([self.norm1(x), latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (rearrange(y, "b l (n d) -> b n l d", n=self.heads) for y in (self.to_q(latents), k, v))
        return self.to_out(rearrange(attention(q, k, v), "b n l d -> b l (n d)"))


class Resampler(nn.Module):
    """The plus form: n learned tokens gather what the patches show (after Flamingo's resampler, arXiv 2204.14198)."""

    def __init__(self, e_width: int, width: int, tokens: int = 16, inner: int = 768, heads: int = 12, depth: int = 4) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, tokens, inner) / inner**0.5)
        self.proj_in, self.proj_out, self.norm_out = nn.Linear(e_width, inner), nn.Linear(inner, width), nn.LayerNorm(width)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            up, down = nn.Linear(inner, 4 * inner, bias=False), nn.Linear(4 * inner, inner, bias=False)
            think = nn.Sequential(nn.LayerNorm(inner), up, nn.GELU(), down)
            self.layers.append(nn.ModuleList([LatentAttention(inner, heads), think]))

    def forward(self, e: Tensor) -> Tensor:
        """(B, P, E) -> (B, n, D)."""
        x, latents = self.proj_in(e), self.latents.expand(len(e), -1, -1)
        for layer in self.layers:
            look, think = layer.children()
            latents = latents + look(x, latents)
            latents = latents + think(latents)
        return self.norm_out(self.proj_out(latents))


class ImageKeysAndValues(nn.Module):
    """The layers of K' and V' in one cross-attention. They start as copies of those of K and V."""

    def __init__(self, attn: CrossAttention) -> None:
        super().__init__()
        plain = [getattr(layer, "base", layer) for layer in (attn.to_k, attn.to_v)]  # without a LoRA
        self.to_k_ip, self.to_v_ip = (deepcopy(layer).requires_grad_(True) for layer in plain)
        self.scale, self.count = 1.0, 0  # λ; M n, the number of image tokens in the context


class ImageAttention(CrossAttention):
    """The cross-attention of a U-Net with an IP-Adapter. `inject` gives each attn2 this class."""

    image: tuple[ImageKeysAndValues]  # in a tuple, so that it does not become a part of the U-Net

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, L, C), context (B, S + M n, D) -> (B, L, C)."""
        (image,), q = self.image, self.split_heads(self.to_q(x))
        k, v = self.keys_and_values(x if context is None else context)
        S = k.shape[2] - image.count
        z = attention(q, k[:, :, :S], v[:, :, :S]) + image.scale * attention(q, k[:, :, S:], v[:, :, S:])  # 2308.06721 eq. 8
        return self.to_out[0](rearrange(z, "b n l d -> b l (n d)"))

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context (B, S + M n, D) -> k and v of the text and, behind them, k' and v' of the pictures: (B, N, S + M n, d)."""
        (image,) = self.image
        text, tokens = context.tensor_split([context.shape[1] - image.count], dim=1)
        k, v = super().keys_and_values(text)
        k_image, v_image = self.split_heads(image.to_k_ip(tokens)), self.split_heads(image.to_v_ip(tokens))
        return torch.cat([k, k_image], dim=2), torch.cat([v, v_image], dim=2)


class IPAdapter(nn.Module):
    """A projection, and K' and V' of every cross-attention. Attribute names are the keys of the published weights."""

    def __init__(self, image_proj: nn.Module, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.image_proj = image_proj
        self.ip_adapter = nn.ModuleDict({str(i): ImageKeysAndValues(attn) for i, attn in numbered(unet).items()})

    def forward(self, text: Tensor, e: Tensor) -> Tensor:
        """text (B, S, D), e (B, M, E) or (B, M, P, E) -> the U-Net's context (B, S + M n, D)."""
        tokens = rearrange(self.image_proj(e.flatten(0, 1)), "(b m) n d -> b (m n) d", b=len(e))
        for layer in self.ip_adapter.values():
            layer.count = tokens.shape[1]  # type: ignore[assignment]
        return torch.cat([text, tokens.to(text.dtype)], dim=1)


def numbered(unet: UNet2DConditionModel) -> dict[int, CrossAttention]:
    """Every attn2 by its number in the published weights. They count attentions in the order down, up, mid; attn1 are even."""
    parts = (unet.down_blocks, unet.up_blocks, unet.mid_block)
    blocks = [module for part in parts for module in part.modules() if isinstance(module, TransformerBlock)]
    return {2 * i + 1: block.attn2 for i, block in enumerate(blocks)}


def inject(unet: UNet2DConditionModel, adapter: IPAdapter) -> None:
    """Let every cross-attention read image tokens. Afterwards, `adapter(text, e)` is the text that the U-Net takes."""
    for attn, layer in zip(numbered(unet).values(), adapter.ip_adapter.values(), strict=True):
        attn.__class__, attn.image = ImageAttention, (layer,)  # type: ignore[assignment]


def eject(unet: UNet2DConditionModel) -> None:
    """The plain U-Net again."""
    for attn in numbered(unet).values():
        attn.__class__ = CrossAttention
        attn.__dict__.pop("image", None)
