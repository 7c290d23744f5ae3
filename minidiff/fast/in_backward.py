"""The optimizer's step inside the backward pass: each tensor moves as soon as its gradient is there, and the gradient goes.

Usually the gradients of all tensors wait in memory for the last one: as much again as the weights. Here one waits at a time
(LOMO, Lv et al., arXiv 2306.09782, does so; torch's `register_post_accumulate_grad_hook` makes it easy). What
that costs:

- Clipping. The norm of all gradients together is known only when the first tensors have moved. So each tensor is clipped to
  the norm by itself, which clips less: no tensor's norm is larger than that of all.
- Accumulation. A gradient that is gone cannot be added to. So an update is one forward pass, in one process.
- A broken gradient. Its tensor stays where it was, and keeps the gradient for a person to see; but tensors that came before
  it in this pass have moved. The run counts the update as skipped all the same.

The norm is read back from a GPU for each tensor, so the GPU waits a little, each time. The saving is for those who need it.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from minidiff.core.errors import SettingsError
from minidiff.fast.adam8bit import LeanAdamW
from minidiff.trainer.distributed import World
from minidiff.trainer.optimizers import clip_gradients
from minidiff.trainer.settings import TrainSettings


class InBackward:
    """What happens between two calls of `norm`: one backward pass, and all its updates."""

    def __init__(self, optimizer: LeanAdamW, max_norm: float) -> None:
        self.optimizer, self.max_norm = optimizer, max_norm
        self.norms: dict[nn.Parameter, float] = {}

    def take(self, p: nn.Parameter) -> None:
        """Clip, update, forget: torch calls this when p.grad is complete, and nothing behind it needs the old weights."""
        assert p.grad is not None
        self.norms[p] = clip_gradients([p], self.max_norm)
        if math.isfinite(self.norms[p]):
            self.optimizer.update(p, p.grad)
            p.grad = None

    def waiting(self, trainable: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Those to which the backward pass has not come."""
        return {name: p for name, p in trainable.items() if p not in self.norms}

    def norm(self) -> float:
        """The norm that all gradients of this backward pass had together, before they were clipped."""
        norm = math.hypot(*self.norms.values())
        self.norms.clear()
        return norm


@contextmanager
def in_backward(optimizer: torch.optim.Optimizer, settings: TrainSettings, world: World) -> Iterator[InBackward | None]:
    """Inside the `with`, every backward pass updates the optimizer's parameters, and leaves no gradients.

    None, and nothing of the kind, without --optimizer_in_backward. SettingsError where it cannot be.
    """
    if not settings.optimizer_in_backward:
        yield None
        return
    if world.size > 1:
        raise SettingsError("--optimizer_in_backward is for one process: several would have to meet at every tensor.")
    if not isinstance(optimizer, LeanAdamW):
        raise SettingsError("--optimizer_in_backward: this task's own optimizer moves all tensors at once; leave the flag out.")
    early = InBackward(optimizer, settings.max_grad_norm)
    handles = [p.register_post_accumulate_grad_hook(early.take) for p in optimizer.places]
    try:
        yield early
    finally:
        for handle in handles:
            handle.remove()
