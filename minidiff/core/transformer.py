"""Attention, and the layer that the U-Net and the VAE build from it.

B batch   N heads   L query tokens   S key tokens   D width of one head   C = N·D channels
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.core.errors import SettingsError, did_you_mean
from minidiff.fast.frozen import Linear
from minidiff.fast.tiled_attention import tiled_attention

IMPLS = ("auto", "naive", "tiled", "sdpa")  # on any device
GPU_IMPLS = ("triton",)

# What `auto` takes on a GPU instead of sdpa, where it was measured to be faster there:
# (compute capability, dtype, D, S is at most SHORT_KEYS) -> impl. Nothing is measured yet, so there is nothing in it.
FASTER_THAN_SDPA: dict[tuple[tuple[int, int], torch.dtype, int, bool], str] = {}
SHORT_KEYS = 128  # a prompt has 77


def attention(q: Tensor, k: Tensor, v: Tensor, impl: str = "auto") -> Tensor:
    """softmax(q kᵀ / √D) v: "Attention Is All You Need" (arXiv 1706.03762), eq. 1.

    Takes q (B, N, L, D) and k, v (B, N, S, D) of any strides; gives (B, N, L, D). `impl` forces one way of computing
    it: `naive` is the formula, `tiled` FlashAttention in plain PyTorch, `sdpa` PyTorch's fused kernels, `triton` minidiff's
    own for NVIDIA GPUs; `auto` picks. SettingsError for an unknown `impl`, and for `triton` where it cannot run.
    """
    if impl == "auto":
        impl = fastest_impl(q, k)
    if impl == "naive":
        return naive_attention(q, k, v)
    if impl == "tiled":
        return tiled_attention(q, k, v)
    if impl == "sdpa":
        return F.scaled_dot_product_attention(q, k, v)
    if impl == "triton":
        from minidiff.fast.flash import flash_attention  # only now: Triton takes long to import, and may be missing

        return flash_attention(q, k, v)
    known = IMPLS + GPU_IMPLS
    raise SettingsError(f'attention impl "{impl}" is unknown; it is one of {", ".join(known)}.{did_you_mean(impl, known)}')


def fastest_impl(q: Tensor, k: Tensor) -> str:
    """What `auto` means for this device, dtype and shape: sdpa, unless FASTER_THAN_SDPA knows better."""
    if not q.is_cuda:
        return "sdpa"
    capability = torch.cuda.get_device_capability(q.device)
    return FASTER_THAN_SDPA.get((capability, q.dtype, q.shape[-1], k.shape[-2] <= SHORT_KEYS), "sdpa")


def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Eq. 1 as it is written. Keeps all L·S weights of every head in memory, which is why nobody runs it."""
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)  # (B, N, L, S); each row sums to 1
    return weights @ v


class CrossAttention(nn.Module):
    """Tokens look at a context: at each other (`context=None`, self-attention) or at the words of a prompt.

    Called `attn1` (self) and `attn2` (cross) in SD's files. q, k and v have no bias there; the output projection has.
    """

    remembered: tuple[Tensor, ...] | None = None  # the last prompt, its k and its v; empty before it, None: none is

    def __init__(self, width: int, context_width: int, heads: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(width, width, bias=qkv_bias)
        self.to_k = Linear(context_width, width, bias=qkv_bias)
        self.to_v = Linear(context_width, width, bias=qkv_bias)
        self.to_out = nn.ModuleList([Linear(width, width)])  # a list, because the files say `to_out.0`

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, L, C), context (B, S, C_context) -> (B, L, C)."""
        q = self.split_heads(self.to_q(x))
        k, v = self.keys_and_values(x) if context is None else self.read_once(context)
        merged = attention(q, k, v).transpose(1, 2).flatten(2)  # (B, N, L, D) -> (B, L, N·D)
        return self.to_out[0](merged)

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, C_context) -> k and v, each (B, N, S, D)."""
        return self.split_heads(self.to_k(context)), self.split_heads(self.to_v(context))

    def read_once(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """`keys_and_values`; inside `reading_once` those of the last prompt are remembered."""
        found = self.remembered  # read once here, too: another thread may draw with the same network
        if found is None:
            return self.keys_and_values(context)
        if not found or found[0] is not context:
            found = self.remembered = (context, *self.keys_and_values(context))
        return found[1], found[2]

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, L, N·D) -> (B, N, L, D); a view, nothing is copied."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


@contextmanager
def reading_once(model: nn.Module | None) -> Iterator[None]:
    """Inside the `with`, each layer makes k and v of a prompt once, and not at each step. Weights must not change there.

    None: of no model.
    """
    layers = [m for m in model.modules() if isinstance(m, CrossAttention)] if model else []
    for layer in layers:
        layer.remembered = ()
    try:
        yield
    finally:
        for layer in layers:
            layer.remembered = None


class SpatialAttention(CrossAttention):
    """The VAE's: self-attention over the cells of a feature map, one head, its norm and residual inside, biases on."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, channels, heads=1, qkv_bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        tokens = self.group_norm(x).flatten(2).mT  # (B, H·W, C)
        return x + super().forward(tokens).mT.unflatten(-1, x.shape[-2:])
