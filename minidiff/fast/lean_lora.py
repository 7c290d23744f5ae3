"""Adapters in training, keeping little: fast/lean.py's ways, for the detours of lora.py.

    y = W x + bias + scale · B A x                                       LoRA (arXiv 2106.09685), eq. 3
    y = bias + W x + strength · ((g - 1) W x + g · scale · B A x)        DoRA (arXiv 2402.09353), eq. 5; g = m / ||V||

W is frozen, so x is needed for the gradient of A alone, and A x, r wide, for that of B. x is not kept where it can be made
again, as behind a norm: then q, k and v of self-attention share one x that is made once. g's gradient needs W x too.

Shapes: W (out, in), for convolutions (out, in, kh, kw); A (r, in) or (r, in, kh, kw); B (out, r); g (out,); x (…, in) or
(batch, in, H, W).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minidiff.fast import conv as cpu
from minidiff.fast.lean import keep, kept, release
from minidiff.fast.precision import as_autocast, wide


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W x + bias + scale · B A x, in the dtype that W x has; A and B are rounded to it for the products."""
    return LeanLoRALinear.apply(as_autocast(x), weight, bias, A, B, scale)


def down(x: Tensor, A: Tensor, how: Any = None) -> Tensor:
    """A x; for a convolution `how` says stride, padding, dilation and groups."""
    return LeanDown.apply(as_autocast(x), A, how)


def dora(y: Tensor, thin: Tensor, B: Tensor, g: Tensor, bias: Tensor | None, scale: float, strength: float) -> Tensor:
    """DoRA's y out of that of the base, W x + bias (…, out), and A x (…, r)."""
    return LeanDoRA.apply(y, thin, B, g, bias, scale, strength)


class LeanLoRALinear(torch.autograd.Function):
    """LoRA's eq. 3, with the detour added into the base's product. Keeps A x, and x if it must."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        y = cpu.linear(x, weight, bias)
        thin = F.linear(x, A.to(x.dtype))
        rows(y).addmm_(rows(scale * thin), B.to(y.dtype).mT)
        keep(ctx, x, thin, weight, A, B)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, thin, weight, A, B = kept(ctx)
        d_rows, needed = rows(d), ctx.needs_input_grad
        d_thin = ctx.scale * (d_rows @ B.to(d.dtype))
        d_A = (d_thin.mT @ rows(x)).to(A.dtype) if needed[3] else None
        d_B = (ctx.scale * (d_rows.mT @ rows(thin))).to(B.dtype) if needed[4] else None
        d_x = cpu.linear(d_rows, weight.mT, None).addmm_(d_thin, A.to(d.dtype)).view(x.shape) if needed[0] else None
        release(ctx)
        return d_x, None, None, d_A, d_B, None


class LeanDown(torch.autograd.Function):
    """A x. Keeps x if it must."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, how: Any) -> Tensor:
        keep(ctx, x, A)
        ctx.how = how
        return F.linear(x, A.to(x.dtype)) if how is None else F.conv2d(x, A.to(x.dtype), None, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, A = kept(ctx)
        needed = ctx.needs_input_grad[:2]
        if ctx.how is None:
            d_x = d @ A.to(d.dtype) if needed[0] else None
            d_A = rows(d).mT @ rows(x) if needed[1] else None
        else:
            d_x, d_A = conv_backward(d, x, A.to(d.dtype), ctx.how, needed)
        release(ctx)
        return d_x, None if d_A is None else d_A.to(A.dtype), None


class LeanDoRA(torch.autograd.Function):
    """DoRA's eq. 5 for one layer. Keeps the base's y and A x; makes B A x again."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, thin: Tensor, B: Tensor, g: Tensor, bias: Tensor | None, scale: float, strength: float
    ) -> Tensor:
        ctx.save_for_backward(y, thin, B, g, bias)
        ctx.scale, ctx.strength = scale, strength
        Wx, detour = parts(y, thin, B, bias, scale)
        return y + (strength * ((g - 1) * Wx + g * detour)).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        y, thin, B, g, bias = ctx.saved_tensors
        Wx, detour = parts(y, thin, B, bias, ctx.scale)
        d_change = ctx.strength * wide(d)
        d_g = rows(d_change * (Wx + detour)).sum(dim=0).to(g.dtype)
        d_detour = (ctx.scale * g * d_change).to(thin.dtype)
        d_thin = d_detour @ B.to(thin.dtype)
        d_B = (rows(d_detour).mT @ rows(thin)).to(B.dtype)
        d_y = d + ((g - 1) * d_change).to(d.dtype)
        return d_y, d_thin, d_B, d_g, None, None, None


def parts(y: Tensor, thin: Tensor, B: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """W x and scale · B A x, in fp32 or fp64."""
    return wide(y) if bias is None else wide(y) - wide(bias), scale * wide(thin @ B.to(thin.dtype).mT)


def conv_backward(d: Tensor, x: Tensor, weight: Tensor, how: Any, needed: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight, where `needed`; `how`: stride, padding, dilation and groups."""
    stride, padding, dilation, groups = how
    rest = (stride, padding, dilation, False, (0, 0), groups, (*needed, False))
    d_x, d_weight, _ = torch.ops.aten.convolution_backward(d, x, weight, None, *rest)
    return d_x, d_weight


def rows(x: Tensor) -> Tensor:
    """(…, C) -> (all of them, C)."""
    return x.reshape(-1, x.shape[-1])
