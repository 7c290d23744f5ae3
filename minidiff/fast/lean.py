"""Training that keeps little: what the backward needs of the U-Net's operations, and not what PyTorch keeps by default.

    B batch   C channels   H W height and width   L tokens   D width

Between forward and backward PyTorch keeps the inputs of every operation. Where the weights are frozen most of that is not
needed: the gradient of x in W x is Wᵀ dy, whatever x was. And of what is needed, some is made again in a moment:

                         PyTorch keeps                       here
    GroupNorm, SiLU      x, the norm's output                x, two numbers a group
    frozen layers        a convolution its input             nothing (layers.py)
    LayerNorm, GroupNorm x, two numbers a row or group       the same, and those who read the output need not keep it
    GEGLU                value, gate, GELU(gate)             value, gate
    concatenation        nothing, but who reads it keeps it  its parts, which others keep anyway

Each function here equals the plain one that stands on its first lines, and is that where nothing is to be saved: without
gradients, as in sampling, and in full fine-tuning, which has to keep what its weights' gradients are made of.

Made again: a tensor's `grad_fn` is the node of the graph that made it. The nodes below can make their output once more, so
a later operation that needs its input in the backward keeps nothing, and asks the node (`keep` and `kept`). That node's
own turn comes later in the backward, so it still has what it keeps.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from minidiff.fast.precision import wide

# --- the plain operations, and when they are replaced ------------------------------------------------------------------


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """SiLU(norm(x)); x (B, C, H, W)."""
    if not saves(x, norm):
        return F.silu(norm(x))
    return LeanGroupNorm.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, True)


def group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """norm(x); x (B, C, H, W)."""
    if not saves(x, norm):
        return norm(x)
    return LeanGroupNorm.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, False)


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """norm(x); x (B, L, D)."""
    if not saves(x, norm):
        return norm(x)
    return LeanLayerNorm.apply(x, norm.weight, norm.bias, norm.eps)


def geglu(pre: Tensor) -> Tensor:
    """GLU Variants Improve Transformer (arXiv 2002.05202), eq. 6: value ⊗ GELU(gate); pre (B, L, 2 D) -> (B, L, D)."""
    if not saves(pre):
        value, gate = pre.chunk(2, dim=-1)
        return value * F.gelu(gate) if torch.is_grad_enabled() else F.gelu(gate).mul_(value)
    return LeanGEGLU.apply(pre)


def join(x: Tensor, skip: Tensor, reader: nn.GroupNorm) -> Tensor:
    """x (B, C, H, W) beside skip (B, C', H, W) -> (B, C + C', H, W), for a norm to read."""
    if not (saves(x, reader) and saves(skip)):
        return torch.cat([x, skip], dim=1)
    return LeanJoin.apply(x, skip)


def recomputed(layer: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """layer(*inputs), keeping the inputs alone: the backward computes the layer again (arXiv 1604.06174, section 3).

    Equal to the bit, with dropout too: the state of torch's generator is put back for the second time.
    """
    return checkpoint(layer, *inputs, use_reentrant=False) if torch.is_grad_enabled() else layer(*inputs)


def saves(x: Tensor, module: nn.Module | None = None) -> bool:
    """Is x on the way of gradients, through a module without trained weights?"""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return False
    return module is None or not any(p.requires_grad for p in module._parameters.values() if p is not None)


# --- what a node keeps, and makes again ----------------------------------------------------------------------------------


def keep(ctx: Any, x: Tensor, *others: Tensor | None, again: Callable[[Any], Tensor] | None = None) -> None:
    """Save x, unless the node that made it can do so again, and the others. `again` makes this node's own output."""
    maker = x.grad_fn
    ctx.maker = maker if hasattr(maker, "again") else None
    ctx.save_for_backward(None if ctx.maker else x, *others)
    ctx.kept = ctx.output = None
    if again is not None:
        ctx.again = again


def kept(ctx: Any) -> tuple[Tensor, ...]:
    """What was saved, x included; fetched once, because under gradient checkpointing it can be fetched only once."""
    if ctx.kept is None:
        x, *others = ctx.saved_tensors
        ctx.kept = (made_again(ctx.maker) if x is None else x, *others)
    return ctx.kept


def made_again(ctx: Any) -> Tensor:
    """The output of a node, made again: once, however many ask for it."""
    if ctx.output is None:
        ctx.output = ctx.again(ctx)
    return ctx.output


def release(ctx: Any) -> None:
    """The node's turn is over, and so is that of all who read its output."""
    ctx.kept = ctx.output = None


# --- the functions -------------------------------------------------------------------------------------------------------


class LeanGroupNorm(torch.autograd.Function):
    """GroupNorm (arXiv 1803.08494, eq. 1), with SiLU behind it or without. Keeps x, and the mean and 1 / std of each group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        ctx.groups, ctx.eps, ctx.silu = groups, eps, silu
        y, mean, rstd = group_norm_of(x, weight, bias, groups, eps)
        keep(ctx, x, mean, rstd, weight, bias, again=LeanGroupNorm.again)
        return (F.silu(y, inplace=True) if silu else y).to(x.dtype)

    @staticmethod
    def again(ctx: Any) -> Tensor:
        x, _, _, weight, bias = kept(ctx)
        y, _, _ = group_norm_of(x, weight, bias, ctx.groups, ctx.eps)
        return (F.silu(y, inplace=True) if ctx.silu else y).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = kept(ctx)
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
    """In which order GroupNorm's kernels take x: a GPU's know one only."""
    as_it_is = x.is_contiguous(memory_format=torch.channels_last) and not x.is_cuda
    return torch.channels_last if as_it_is else torch.contiguous_format


class LeanLayerNorm(torch.autograd.Function):
    """LayerNorm (arXiv 1607.06450, eq. 4). Keeps x, and the mean and 1 / std of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        y, mean, rstd = torch.native_layer_norm(wide(x), weight.shape, wide(weight), wide(bias), eps)
        keep(ctx, x, mean, rstd, weight, bias, again=LeanLayerNorm.again)
        return y.to(x.dtype)

    @staticmethod
    def again(ctx: Any) -> Tensor:
        x, _, _, weight, bias = kept(ctx)
        return F.layer_norm(wide(x), weight.shape, wide(weight), wide(bias), ctx.eps).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = kept(ctx)
        numbers = (wide(d), wide(x), weight.shape, mean, rstd, wide(weight), wide(bias), [True, False, False])
        d_x, _, _ = torch.ops.aten.native_layer_norm_backward(*numbers)
        release(ctx)
        return d_x.to(x.dtype), None, None, None


class LeanGEGLU(torch.autograd.Function):
    """2002.05202, eq. 6. Keeps value and gate, one tensor; makes GELU(gate) again."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor) -> Tensor:
        keep(ctx, pre, again=LeanGEGLU.again)
        return LeanGEGLU.product(pre)

    @staticmethod
    def product(pre: Tensor) -> Tensor:
        value, gate = pre.chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)

    @staticmethod
    def again(ctx: Any) -> Tensor:
        return LeanGEGLU.product(kept(ctx)[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> Tensor:
        (pre,) = kept(ctx)
        value, gate = pre.chunk(2, dim=-1)
        d_pre = torch.empty_like(pre)
        d_value, d_gate = d_pre.chunk(2, dim=-1)
        torch.mul(d, F.gelu(gate), out=d_value)
        d_gate.copy_(torch.ops.aten.gelu_backward(d * value, gate))
        release(ctx)
        return d_pre


class LeanJoin(torch.autograd.Function):
    """A concatenation whose readers keep its parts. One of them, the skip, is kept on the way down anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor) -> Tensor:
        keep(ctx, x, skip, again=LeanJoin.again)
        return torch.cat([x, skip], dim=1)

    @staticmethod
    def again(ctx: Any) -> Tensor:
        return torch.cat(kept(ctx), dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:
        x, skip = kept(ctx)
        release(ctx)
        d_x, d_skip = d.split([x.shape[1], skip.shape[1]], dim=1)
        return d_x, d_skip
