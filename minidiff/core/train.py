"""The training loop: a generator that yields an `Update` after each update. A `Task` says what is trained, and its loss.

    for update in train(task, settings):
        print(update.done, update.loss)

Metrics, checkpoints and previews live outside, in the code that iterates over it. Batch and loss are pure functions of (step,
micro): a batch can be cut into micro batches, whose gradients are added (gradient accumulation). So after update N, training
goes on with `train(task, settings, start=N)`, and its result is the same to the last bit.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minidiff.core.rng import hashed_seed

Batch = dict[str, Tensor]
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LoopSettings:
    """The number of updates, their learning rate, and the number format of the loss."""

    updates: int = 400
    learning_rate: float = 1e-4
    lr_scheduler: str = "constant"  # or linear, cosine
    lr_power: float = 1.0  # of linear: 2 falls as a parabola
    lr_num_cycles: int = 1  # of cosine
    lr_warmup_steps: int = 0
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"  # a key of DTYPES
    seed: int = 0
    rank: int = 0  # the number of this process, if several train together: each has its own dropout


@dataclass
class Task:
    """The trained weights, their data and their loss. A batch has a row for each sample; the loss is a mean over the rows."""

    trainable: dict[str, nn.Parameter]
    batch: Callable[[int, int], Batch]  # (step, micro) -> data: a pure function
    loss: Callable[[Batch, int, int], Tensor]  # (data, step, micro) -> scalar
    optimizer: torch.optim.Optimizer | None = None  # None: AdamW


@dataclass(frozen=True)
class Update:
    """One update, as numbers."""

    done: int  # updates made so far, with this one
    loss: float
    grad_norm: float  # before clipping
    lr: float
    skipped: bool  # the loss or a gradient was not finite, so no weight was changed


def train(task: Task, settings: LoopSettings, start: int = 0) -> Iterator[Update]:
    """Make all updates from number `start`, counted from 0. The gradients stay until the next update begins."""
    s, parameters = settings, list(task.trainable.values())  # a list: an iterator would be empty when gradients are clipped
    device = parameters[0].device
    optimizer = task.optimizer or torch.optim.AdamW(parameters, s.learning_rate)
    rates = [group["lr"] for group in optimizer.param_groups]
    scale = 4096.0 if s.mixed_precision == "fp16" else 1.0  # fp16's small gradients would vanish: arXiv 1710.03740, 3.2

    for step in range(start, s.updates):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * lr_factor(step, s)
        optimizer.zero_grad(set_to_none=True)

        mean = torch.zeros((), device=device)
        for micro in range(s.gradient_accumulation_steps):  # their mean is the mean over one big batch
            batch = task.batch(step, micro)
            torch.manual_seed(hashed_seed(s.seed, "torch", step, micro, s.rank))  # for dropout
            with torch.autocast(device.type, DTYPES[s.mixed_precision], enabled=s.mixed_precision != "no"):
                loss = task.loss(batch, step, micro)
            loss = loss / s.gradient_accumulation_steps
            (loss * scale).backward()  # type: ignore[no-untyped-call]
            mean += loss.detach()
        for p in parameters:
            if p.grad is not None and scale != 1.0:
                p.grad.div_(scale)

        norm, value = clip_gradients(parameters, s.max_grad_norm), mean.item()
        if finite := math.isfinite(norm + value):
            optimizer.step()
        yield Update(step + 1, value, norm, optimizer.param_groups[0]["lr"], skipped=not finite)


def lr_factor(done: int, settings: LoopSettings) -> float:
    """The factor of the learning rate, in [0, 1], for the update after `done` others.

    Warm-up goes 0, 1/w, 2/w, …, as in diffusers. A falling rate reaches zero after the last update.
    """
    s, warmup, total = settings, settings.lr_warmup_steps, settings.updates
    if done < warmup:
        return done / warmup
    part = min((done - warmup) / max(total - warmup, 1), 1.0)  # the share of updates made, without warm-up
    turn = part * s.lr_num_cycles % 1.0 if part < 1.0 else 1.0  # the share of a cosine's cycle
    return {"linear": (1.0 - part) ** s.lr_power, "cosine": 0.5 * (1.0 + math.cos(math.pi * turn))}.get(s.lr_scheduler, 1.0)


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients by min(1, max_norm / norm), if it is finite (arXiv 1211.5063, algorithm 1). Returns the norm."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if math.isfinite(value := float(norm)):
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return value
