"""Training that saves little between forward and backward: the U-Net's operations, as subclasses of the plain ones.

    B batch   C channels   H W height and width   L tokens   D width

PyTorch saves the inputs of every operation for the backward pass. Where the weights are frozen, most of them are not needed:
the gradient of x in y = W x is W^T dy, whatever x was. Some others are cheap to compute again:

                         PyTorch saves                       here
    GroupNorm, SiLU      x, the norm's output                x, two numbers a group
    frozen layers        a convolution its input             nothing (frozen.py)
    LayerNorm, GroupNorm x, two numbers a row or group       the same; an operation that reads the output does not save it
    GEGLU                value, gate, GELU(gate)             value, gate
    concatenation        its reader saves the whole          its parts, which other operations save anyway

Each class falls back to its plain class where there is nothing to save: without gradients, as in sampling, and in full
fine-tuning, where the gradients of the weights need the inputs.

How an output is recomputed: `tensor.grad_fn` is the autograd node that produced the tensor. The nodes in this file can compute
their output again. So a later operation does not save its input: in its backward pass it asks that node (`save`, `saved`).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from minidiff.core.attention import GEGLU
from minidiff.core.blocks import NormSiLU, ResBlock
from minidiff.core.unet import DownLevel, Level, UpLevel
from minidiff.fast.conv import wide

# --- the classes ---------------------------------------------------------------------------------------------------------


class LeanNormSiLU(NormSiLU):
    """Equals `F.silu(norm(x))` in core/blocks.py."""

    def forward(self, x: Tensor) -> Tensor:
        how = self.num_groups, self.eps, True
        return GroupNormFunction.apply(x, self.weight, self.bias, *how) if saves(x, self) else super().forward(x)


class LeanGroupNorm(nn.GroupNorm):
    """Equals PyTorch's `F.group_norm(x)`."""

    def forward(self, x: Tensor) -> Tensor:
        how = self.num_groups, self.eps, False
        return GroupNormFunction.apply(x, self.weight, self.bias, *how) if saves(x, self) else super().forward(x)


class LeanLayerNorm(nn.LayerNorm):
    """Equals PyTorch's `F.layer_norm(x)`."""

    def forward(self, x: Tensor) -> Tensor:
        return LayerNormFunction.apply(x, self.weight, self.bias, self.eps) if saves(x, self) else super().forward(x)


class LeanGEGLU(GEGLU):
    """Equals `value * F.gelu(gate)` in core/attention.py."""

    def forward(self, x: Tensor) -> Tensor:
        pre = self.proj(x)
        return GEGLUFunction.apply(pre) if saves(pre) else GEGLUFunction.product(pre)


class LeanUpLevel(UpLevel):
    """Equals the concatenation in core/unet.py, `torch.cat([x, skip], dim=1)`."""

    def layer(self, i: int, time: Tensor, text: Tensor, x: Tensor, skip: Tensor | None = None) -> Tensor:
        reader: ResBlock = self.resnets[i]  # type: ignore[assignment]
        if skip is None or not (saves(x, reader.norm1) and saves(skip)):
            return super().layer(i, time, text, x, skip)
        return super().layer(i, time, text, ConcatFunction.apply(x, skip))


class Checkpointed(Level):
    """Saves only the inputs of each layer; the backward pass computes the layer again (arXiv 1604.06174, section 3).

    Equals `layer` in core/unet.py to the bit, with dropout too: the state of torch's generator is restored for the second time.
    """

    def layer(self, *inputs: Any) -> Tensor:
        plain = super().layer
        return checkpoint(plain, *inputs, use_reentrant=False) if torch.is_grad_enabled() else plain(*inputs)


class CheckpointedDownLevel(Checkpointed, DownLevel):
    """A `DownLevel`."""


class CheckpointedUpLevel(Checkpointed, LeanUpLevel):
    """An `UpLevel`."""


def saves(x: Tensor, module: nn.Module | None = None) -> bool:
    """Can memory be saved? Only if gradients flow through x, and `module` has no trained weights of its own."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return False
    return module is None or not any(p.requires_grad for p in module._parameters.values() if p is not None)


# --- what a node saves, and recomputes -----------------------------------------------------------------------------------


def save(ctx: Any, x: Tensor, *others: Tensor | None, recompute: Callable[[Any], Tensor] | None = None) -> None:
    """Save x and the others; but not x if the node that produced it can recompute it. `recompute` gives this node's output."""
    producer = x.grad_fn
    ctx.producer = producer if hasattr(producer, "recompute") else None
    ctx.save_for_backward(None if ctx.producer else x, *others)
    ctx.saved = ctx.output = None
    if recompute is not None:
        ctx.recompute = recompute


def saved(ctx: Any) -> tuple[Tensor, ...]:
    """The saved tensors, x included. They are fetched once, because gradient checkpointing allows no second time."""
    if ctx.saved is None:
        x, *others = ctx.saved_tensors
        ctx.saved = (recomputed(ctx.producer) if x is None else x, *others)
    return ctx.saved


def recomputed(ctx: Any) -> Tensor:
    """The output of a node, computed again: once, however many operations ask for it."""
    if ctx.output is None:
        ctx.output = ctx.recompute(ctx)
    return ctx.output


def release(ctx: Any) -> None:
    """Free the tensors of a node: its backward pass is over, and so are those of all that read its output."""
    ctx.saved = ctx.output = None


# --- the functions -------------------------------------------------------------------------------------------------------


class GroupNormFunction(torch.autograd.Function):
    """GroupNorm (arXiv 1803.08494, eq. 1), perhaps followed by SiLU. Saves x, and the mean and 1 / std of each group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        ctx.groups, ctx.eps, ctx.silu = groups, eps, silu
        y, mean, rstd = group_norm_of(x, weight, bias, groups, eps)
        save(ctx, x, mean, rstd, weight, bias, recompute=GroupNormFunction.recompute)
        return (F.silu(y, inplace=True) if silu else y).to(x.dtype)

    @staticmethod
    def recompute(ctx: Any) -> Tensor:
        x, _, _, weight, bias = saved(ctx)
        y, _, _ = group_norm_of(x, weight, bias, ctx.groups, ctx.eps)
        return (F.silu(y, inplace=True) if ctx.silu else y).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = saved(ctx)
        if ctx.silu:
            y, _, _ = group_norm_of(x, weight, bias, ctx.groups, ctx.eps)
            d = torch.ops.aten.silu_backward(wide(d), y)
        d, wide_x = (wide(tensor).contiguous(memory_format=layout_of(x)) for tensor in (d, x))
        b, c, cells = len(x), x.shape[1], x[0, 0].numel()
        sizes = (b, c, cells, ctx.groups, [True, False, False])
        d_x, _, _ = torch.ops.aten.native_group_norm_backward(d, wide_x, mean, rstd, wide(weight), *sizes)
        release(ctx)
        return d_x.to(x.dtype), None, None, None, None, None


def group_norm_of(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The norm in fp32 (or fp64), and the mean (B, groups) and 1 / std (B, groups) of each group."""
    x = wide(x).contiguous(memory_format=layout_of(x))
    return torch.native_group_norm(x, wide(weight), wide(bias), len(x), x.shape[1], x[0, 0].numel(), groups, eps)


def layout_of(x: Tensor) -> torch.memory_format:
    """The memory format in which GroupNorm's kernels take x. A GPU's kernels know only one."""
    as_it_is = x.is_contiguous(memory_format=torch.channels_last) and not x.is_cuda
    return torch.channels_last if as_it_is else torch.contiguous_format


class LayerNormFunction(torch.autograd.Function):
    """LayerNorm (arXiv 1607.06450, eq. 4). Saves x, and the mean and 1 / std of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        y, mean, rstd = torch.native_layer_norm(wide(x), weight.shape, wide(weight), wide(bias), eps)
        save(ctx, x, mean, rstd, weight, bias, recompute=LayerNormFunction.recompute)
        return y.to(x.dtype)

    @staticmethod
    def recompute(ctx: Any) -> Tensor:
        x, _, _, weight, bias = saved(ctx)
        return F.layer_norm(wide(x), weight.shape, wide(weight), wide(bias), ctx.eps).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = saved(ctx)
        numbers = (wide(d), wide(x), weight.shape, mean, rstd, wide(weight), wide(bias), [True, False, False])
        d_x, _, _ = torch.ops.aten.native_layer_norm_backward(*numbers)
        release(ctx)
        return d_x.to(x.dtype), None, None, None


class GEGLUFunction(torch.autograd.Function):
    """GEGLU (arXiv 2002.05202, eq. 5). Saves value and gate, one tensor; computes GELU(gate) again."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor) -> Tensor:
        save(ctx, pre, recompute=lambda ctx: GEGLUFunction.product(*saved(ctx)))
        return GEGLUFunction.product(pre)

    @staticmethod
    def product(pre: Tensor) -> Tensor:
        value, gate = pre.chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> Tensor:
        (pre,) = saved(ctx)
        value, gate = pre.chunk(2, dim=-1)
        d_pre = torch.empty_like(pre)
        d_value, d_gate = d_pre.chunk(2, dim=-1)
        torch.mul(d, F.gelu(gate), out=d_value)
        d_gate.copy_(torch.ops.aten.gelu_backward(d * value, gate))
        release(ctx)
        return d_pre


class ConcatFunction(torch.autograd.Function):
    """Concatenates channels. Saves the two parts; the skip is saved on the way down anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor) -> Tensor:
        save(ctx, x, skip, recompute=lambda ctx: torch.cat(saved(ctx), dim=1))
        return torch.cat([x, skip], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:
        x, skip = saved(ctx)
        release(ctx)
        d_x, d_skip = d.split([x.shape[1], skip.shape[1]], dim=1)
        return d_x, d_skip
