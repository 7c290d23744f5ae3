"""Adapters in training, keeping little: models/lean.py's ways, for the detours of lora.py.

    y = W x + bias + scale · B A x

W is frozen, so x is needed for the gradient of A alone, and A x, r wide, for that of B. x is not kept where it can be made
again, as behind a norm: then q, k and v of self-attention share one x that is made once.

Shapes: W (out, in); A (r, in); B (out, r); x (…, in).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minidiff.models.lean import as_autocast, keep, kept, release


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W x + bias + scale · B A x, in the dtype that W x has; A and B are rounded to it for the products."""
    return LeanLoRALinear.apply(as_autocast(x), weight, bias, A, B, scale)


class LeanLoRALinear(torch.autograd.Function):
    """LoRA (arXiv 2106.09685), eq. 3, with the detour added into the base's product. Keeps A x, and x if it must."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        y = F.linear(x, weight, bias)
        thin = F.linear(x, A.to(x.dtype))
        rows(y).addmm_(rows(thin), B.to(y.dtype).mT, alpha=scale)
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
        d_x = (d_rows @ weight).addmm_(d_thin, A.to(d.dtype)).view(x.shape) if needed[0] else None
        release(ctx)
        return d_x, None, None, d_A, d_B, None


def rows(x: Tensor) -> Tensor:
    """(…, C) -> (all of them, C)."""
    return x.reshape(-1, x.shape[-1])
