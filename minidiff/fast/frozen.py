"""Convolutions and linear layers with frozen weights, and the keys and values of a prompt: less memory, and less time on a CPU.

    B batch   C channels   H W height and width   L tokens   D width   S tokens of a prompt

- The gradient of x in y = W x + b is W^T dy, whatever x was. So a frozen layer does not save its input for the backward pass.
- A frozen weight may have a smaller dtype than the computation: fp16 as in its file, under an fp32 x. Each layer casts its own
  weight for as long as it computes, forward and backward: layerwise casting. Half the memory, and the same numbers to the bit.
- On a CPU the fast methods (conv.py) need reordered copies of the weights; these are cached while weights do not change.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minidiff.core.attention import CrossAttention, FeedForward, TransformerBlock
from minidiff.core.ip_adapter import ImageAttention
from minidiff.fast import conv, memory
from minidiff.fast.conv import HALF, as_autocast
from minidiff.fast.lean import saves

PIECE = 512  # tokens that go through a feed-forward together, so that its results fit the processor's cache
Caches = tuple[conv.Cache, conv.Cache]  # for forward and backward

# --- the classes ---------------------------------------------------------------------------------------------------------


class FastConv2d(nn.Conv2d):
    """Equals PyTorch's `F.conv2d(x, weight, bias)`, for square kernels; up to rounding on a CPU."""

    caches: Caches | None = None  # copies of the weight for forward and backward; None: do not cache

    def forward(self, x: Tensor) -> Tensor:
        stride, padding, caches = self.stride[0], int(self.padding[0]), self.caches
        if saves(x, self):
            return FrozenConv2d.apply(as_autocast(x), self.weight, self.bias, stride, padding, caches)
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return super().forward(x)
        return conv.conv2d(x, self.weight, self.bias, stride, padding, caches and caches[0])


class FastLinear(nn.Linear):
    """Equals PyTorch's `F.linear(x, weight, bias)`. If it is frozen, its weight may have a smaller dtype than x."""

    def forward(self, x: Tensor) -> Tensor:
        if saves(x, self):
            return FrozenLinear.apply(as_autocast(x), self.weight, self.bias)
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return super().forward(x)
        return conv.linear(x, self.weight, self.bias)


class FeedForwardInPieces(FeedForward):
    """Equals `self.net(x)` in core/attention.py, for some tokens at a time; all at once if gradients are needed."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.is_grad_enabled() or x.shape[1] <= PIECE:
            return super().forward(x)
        return torch.cat([self.net(piece) for piece in x.split(PIECE, dim=1)], dim=1)


class CachedAttention(CrossAttention):
    """Equals `keys_and_values` in core/attention.py. `frozen_weights` may have it compute k and v of a prompt only once."""

    prompt: tuple[Tensor, ...] | None = None  # of the last call, with its k and v. (): nothing stored yet; None: do not cache

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        found = self.prompt  # read only once, because another thread may draw with the same network
        if found is None:
            return super().keys_and_values(context)
        if not found or found[0] is not context:
            found = self.prompt = (context, *super().keys_and_values(context))
        return found[1], found[2]


class CachedImageAttention(CachedAttention, ImageAttention):
    """The same for a U-Net with an IP-Adapter: the prompt's k and v, with those of the pictures behind them."""


# --- while weights do not change -----------------------------------------------------------------------------------------


@contextmanager
def frozen_weights(models: Iterable[nn.Module], large: bool, prompt: bool = False) -> Iterator[None]:
    """Use this while the weights of `models` do not change: their convolutions then cache rearranged copies of them.

    In training it applies only to frozen layers. `large` caches copies of large weights, too, if the machine has four times
    the memory of all these weights in fp32 (9 GB for SD 1.5, whose copies take 2.5 GB). With `prompt`, each cross-attention
    computes k and v of a prompt once, not at each step.
    """
    modules = [m for model in models for m in model.modules()]
    frozen = [m for m in modules if isinstance(m, FastConv2d) and not (torch.is_grad_enabled() and m.weight.requires_grad)]
    bytes_here = memory.machine_memory()
    large = large and (bytes_here is None or 4 * sum(4 * m.weight.numel() for m in frozen) <= bytes_here)
    before = [(m, m.caches) for m in frozen if large or m.weight.numel() <= conv.MANY]
    blocks = [m for m in modules if prompt and isinstance(m, TransformerBlock)]
    attention = [block.attn2 for block in blocks if isinstance(block.attn2, CachedAttention)]
    for m, caches in before:
        m.caches = caches or ({}, {})
    for layer in attention:
        layer.prompt = ()
    try:
        yield
    finally:
        for m, caches in before:
            m.caches = caches
        for layer in attention:
            layer.prompt = None


def cast_layerwise(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model with fast classes to `dtype`, except half-precision weights of its convolutions and linear layers."""
    for module in model.modules():
        for name, p in module._parameters.items():
            stays = isinstance(module, FastConv2d | FastLinear) and name == "weight" and p is not None and p.dtype in HALF
            if p is not None and not stays:
                p.data = p.data.to(dtype)


# --- the functions -------------------------------------------------------------------------------------------------------


class FrozenLinear(torch.autograd.Function):
    """A linear layer that gradients flow through. Saves only the weight as it is; PyTorch would save the cast one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return conv.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return conv.linear(d, weight.mT, None), None, None


class FrozenConv2d(torch.autograd.Function):
    """A convolution that gradients flow through. Saves only the weight, and the shape of its input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, caches: Caches | None
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.how, ctx.cache = x.shape, (stride, padding), caches and caches[1]
        return conv.conv2d(x, weight, bias, stride, padding, caches and caches[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        stride, padding = ctx.how
        return conv.conv2d_backward(d, ctx.shape, weight, stride, padding, ctx.cache), *[None] * 5
