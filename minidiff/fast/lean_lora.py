"""Adapters in training that save little: core/lora.py's layers, by the methods of fast/lean.py.

    y = W x + bias + scale · B A x                                       LoRA (arXiv 2106.09685), eq. 3
    y = bias + W x + strength · ((g - 1) W x + g · scale · B A x)        DoRA (arXiv 2402.09353), eq. 5; g = m / ||V||

W is frozen, so x is needed only for the gradient of A, and A x, r wide, for the gradient of B. x is not saved where it can be
recomputed, as after a norm: then q, k and v of self-attention share one recomputed x. The gradient of g needs W x, too.

Shapes: W (out, in), for convolutions (out, in, kh, kw); A (r, in) or (r, in, kh, kw); B (out, r); g (out,); x (…, in) or
(batch, in, H, W).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minidiff.core.lora import LoRAConv2d, LoRALayer, LoRALinear
from minidiff.fast import conv
from minidiff.fast.conv import as_autocast, wide
from minidiff.fast.lean import release, save, saved

# --- the classes ---------------------------------------------------------------------------------------------------------


class LeanLoRALinear(LoRALinear):
    """Equals `LoRALayer.forward` in core/lora.py: eq. 3, or eq. 5."""

    def forward(self, x: Tensor) -> Tensor:
        if (name := one_adapter(self)) is None:
            return super().forward(x)
        base, A, B, scale, strength = self.base, self.lora_A[name], self.lora_B[name], self.scale[name], self.strength[name]
        if name not in self.lora_magnitude:
            return LoRALinearFunction.apply(as_autocast(x), base.weight, base.bias, A, B, strength * scale)
        y, thin = base(x), DownFunction.apply(as_autocast(x), A, None)
        return DoRAFunction.apply(y, thin, B, self.gain(name).flatten(), base.bias, scale, strength)


class LeanLoRAConv2d(LoRAConv2d):
    """Equals `LoRALayer.forward` in core/lora.py: eq. 3, or eq. 5."""

    def forward(self, x: Tensor) -> Tensor:
        if (name := one_adapter(self)) is None:
            return super().forward(x)
        base, A, B, scale, strength = self.base, self.lora_A[name], self.lora_B[name], self.scale[name], self.strength[name]
        how = (base.stride, base.padding, base.dilation, base.groups)
        y, thin = base(x), DownFunction.apply(as_autocast(x), A, how)
        if name not in self.lora_magnitude:
            return y + (strength * scale) * self.up(thin, B.to(thin.dtype))
        y, thin = y.movedim(1, -1), thin.movedim(1, -1)
        return DoRAFunction.apply(y, thin, B, self.gain(name).flatten(), base.bias, scale, strength).movedim(-1, 1)


def one_adapter(layer: LoRALayer) -> str | None:
    """The name of the active adapter, if it is the only one, trained and without dropout; else None.

    Only then can memory be saved. DoRA must have a length for each output.
    """
    active = [name for name, strength in layer.strength.items() if strength]
    if not torch.is_grad_enabled() or layer.unmerged_weight is not None or len(active) != 1:
        return None
    name, W = active[0], layer.base.weight
    drops = layer.training and layer.dropout[name] > 0
    for_inputs = name in layer.lora_magnitude and layer.lora_magnitude[name].shape != (len(W), *[1] * (W.ndim - 1))
    return name if layer.lora_A[name].requires_grad and not drops and not for_inputs else None


# --- the functions -------------------------------------------------------------------------------------------------------


class LoRALinearFunction(torch.autograd.Function):
    """LoRA's eq. 3; B A x is added in place. Saves A x, and x if it cannot be recomputed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        y = conv.linear(x, weight, bias)
        thin = F.linear(x, A.to(x.dtype))
        rows(y).addmm_(rows(scale * thin), B.to(y.dtype).mT)
        save(ctx, x, thin, weight, A, B)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, thin, weight, A, B = saved(ctx)
        d_rows, d_x = rows(d), None
        d_thin = ctx.scale * (d_rows @ B.to(d.dtype))
        d_A = (d_thin.mT @ rows(x)).to(A.dtype)
        d_B = (ctx.scale * (d_rows.mT @ rows(thin))).to(B.dtype)
        if ctx.needs_input_grad[0]:
            d_x = conv.linear(d_rows, weight.mT, None).addmm_(d_thin, A.to(d.dtype)).view(x.shape)
        release(ctx)
        return d_x, None, None, d_A, d_B, None


class DownFunction(torch.autograd.Function):
    """A x; for a convolution, `how` is stride, padding, dilation and groups. Saves x if it cannot be recomputed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, how: Any) -> Tensor:
        save(ctx, x, A)
        ctx.how = how
        return F.linear(x, A.to(x.dtype)) if how is None else F.conv2d(x, A.to(x.dtype), None, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, A = saved(ctx)
        if ctx.how is None:
            d_x = d @ A.to(d.dtype) if ctx.needs_input_grad[0] else None
            d_A = rows(d).mT @ rows(x)
        else:
            stride, padding, dilation, groups = ctx.how
            rest = (stride, padding, dilation, False, (0, 0), groups, (ctx.needs_input_grad[0], True, False))
            d_x, d_A, _ = torch.ops.aten.convolution_backward(d, x, A.to(d.dtype), None, *rest)
        release(ctx)
        return d_x, d_A.to(A.dtype), None


class DoRAFunction(torch.autograd.Function):
    """DoRA's y from the base's, W x + bias (…, out), and A x (…, r). Saves both; computes B A x again."""

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


def rows(x: Tensor) -> Tensor:
    """(…, C) -> (rows, C)."""
    return x.reshape(-1, x.shape[-1])
