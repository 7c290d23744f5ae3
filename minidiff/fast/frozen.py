"""Convolution and linear layers, as `nn.Conv2d` and `nn.Linear`, but better where their weights are frozen.

    B batch   C channels   H W height and width   L tokens   D width

- The gradient of x in y = W x + b is Wᵀ dy, whatever x was: so a frozen layer keeps no input for the backward.
- A frozen weight may have fewer bits than what is computed: fp16 as its file has it, under an fp32 x. Each layer widens its own
  for the moment in which it computes, there and back: layerwise casting. Half the memory, and the same numbers to the bit.
- On a CPU, what the fast ways (cpu.py) make of weights that stand still is made once.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minidiff.fast import conv as cpu
from minidiff.fast import lean
from minidiff.fast import memory as device
from minidiff.fast.precision import HALF, as_autocast


class Conv2d(nn.Conv2d):
    """An `nn.Conv2d` with a square kernel, which does not keep its input while it is frozen, and is fast on a CPU."""

    ready: tuple[cpu.Ready, cpu.Ready] | None = None  # what is made of weights that stand still: forward, backward

    def forward(self, x: Tensor) -> Tensor:
        stride, padding, ready = self.stride[0], int(self.padding[0]), self.ready
        if lean.saves(x, self):
            return FrozenConv2d.apply(as_autocast(x), self.weight, self.bias, stride, padding, ready)
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return super().forward(x)
        return cpu.conv2d(x, self.weight, self.bias, stride, padding, ready and ready[0])


class Linear(nn.Linear):
    """An `nn.Linear` that is fast on a CPU in half precision, too; frozen, its weight may have fewer bits than x."""

    def forward(self, x: Tensor) -> Tensor:
        if lean.saves(x, self):
            return FrozenLinear.apply(as_autocast(x), self.weight, self.bias)
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return super().forward(x)
        return cpu.linear(x, self.weight, self.bias)


def cast_layerwise(model: nn.Module, dtype: torch.dtype) -> None:
    """The model in `dtype`, but for half-precision weights of convolutions and linears, which are most of it: they stay."""
    for module in model.modules():
        for name, p in module._parameters.items():
            stays = isinstance(module, (Conv2d, Linear)) and name == "weight" and p is not None and p.dtype in HALF
            if p is not None and not stays:
                p.data = p.data.to(dtype)


@contextmanager
def standing_still(models: Iterable[nn.Module], large: bool) -> Iterator[None]:
    """Inside the `with`, no convolution of `models` changes, so what a CPU makes of its weights is made once.

    In training, where gradients flow, that holds for the frozen ones alone. It takes memory: of `large` weights up to four
    times their own, if the machine has it (`roomy`); without them, a few MB.
    """
    training = torch.is_grad_enabled()
    convolutions = [m for model in models for m in model.modules() if isinstance(m, Conv2d)]
    still = [m for m in convolutions if not (training and m.weight.requires_grad)]
    large = large and roomy(still)
    chosen = [m for m in still if large or m.weight.numel() <= cpu.MANY]
    before = [m.ready for m in chosen]
    for m in chosen:
        m.ready = m.ready or ({}, {})
    try:
        yield
    finally:
        for m, old in zip(chosen, before):
            m.ready = old


def roomy(convolutions: Iterable[Conv2d]) -> bool:
    """Has this machine four times the memory of these weights in fp32? (9 GB for SD 1.5's, whose copies take 2.5.)"""
    there = device.machine_memory()
    return there is None or 4 * sum(4 * m.weight.numel() for m in convolutions) <= there


# --- frozen, through which gradients pass -------------------------------------------------------------------------------


class FrozenLinear(torch.autograd.Function):
    """A linear through which gradients pass. Keeps nothing but the weight as it is, where PyTorch would keep it widened."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return cpu.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return cpu.linear(d, weight.mT, None), None, None


class FrozenConv2d(torch.autograd.Function):
    """A convolution through which gradients pass. Keeps the size of its input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: int,
        padding: int,
        ready: tuple[cpu.Ready, cpu.Ready] | None,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.how, ctx.ready = x.shape, (stride, padding), ready and ready[1]
        return cpu.conv2d(x, weight, bias, stride, padding, ready and ready[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        stride, padding = ctx.how
        return cpu.conv2d_backward(d, ctx.shape, weight, stride, padding, ctx.ready), *[None] * 5
