"""THE training loop. What is trained, on what, with which loss: all that is in a `Task`.

The loop keeps five promises.
- The same numbers: batch and loss are pure functions of (step, micro), so that resuming is "start at step N" and the
  result is bit for bit that of a run that never stopped. What networks draw themselves (dropout) is drawn from a seed of
  (step, micro), too.
- The same batches, whether one process trains or several do, each on its share (distributed.py).
- Nothing lost: Ctrl-C, SIGTERM, a full disk or a power cut leave the last checkpoint whole (checkpoint.py, run.py).
- No harm: a loss or gradient that is not finite skips the update; three in a row end the run, and name who broke.
  (in_backward.py can skip but the broken tensors.)
- Nothing silent: a tensor that gets no gradient is an error after the first step, not a disappointment after the last.

`step` counts from 0 where it says which data to use, and `done` = step + 1 is the number of updates made: metrics,
checkpoints and previews are named by `done`.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minidiff.core.rng import hashed_seed
from minidiff.draw.nonfinite import first_nonfinite
from minidiff.fast.compiled import compile_unet
from minidiff.fast.frozen import standing_still
from minidiff.fast.in_backward import in_backward
from minidiff.trainer import distributed
from minidiff.trainer.guards import check_gradients, check_trainable, deterministic, stop_signals
from minidiff.trainer.optimizers import EMA, adamw, clip_gradients, lr_factor, to_bf16, unscaled
from minidiff.trainer.run import PATIENCE, Run, progress
from minidiff.trainer.settings import FineTuneSettings, TrainSettings

if TYPE_CHECKING:
    from PIL.Image import Image

Batch = dict[str, Tensor]
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LOSS_SCALE = {"no": 1.0, "bf16": 1.0, "fp16": 4096.0}  # fp16's small gradients would vanish: arXiv 1710.03740, 3.2


@dataclass
class Task:
    """What the loop does not know. `batch` gives CPU tensors with a row for each sample.

    `loss` is a mean over the rows; with a prior it is the sum of two, each over its half of them.
    """

    trainable: dict[str, nn.Parameter]
    batch: Callable[[int, int], Batch]  # (step, micro) -> data, a pure function; threads may call it
    loss: Callable[[Batch, int, int], Tensor]  # (data, step, micro) -> scalar; moves the data to its device
    export: Callable[[Path], None]  # write the result into a folder: that of the run, or of a checkpoint
    card: Callable[[Path], None] = lambda folder: None  # what is written beside the result of the whole run alone
    preview: Callable[[int], "Image | None"] = lambda done: None  # a sample sheet
    validate: Callable[[], dict[str, float]] | None = None  # numbers that tell how good the model is now, for metrics.jsonl
    facts: dict[str, Any] = field(default_factory=dict)  # JSON; a resumed run must agree with it (base, data, …)
    samples_per_epoch: int | None = None  # None: it has no epochs
    optimizer: torch.optim.Optimizer | None = None  # None: AdamW with the settings' numbers
    ema_decay: float | None = None  # None: as the settings say. With it, export, preview and validate see averaged weights
    modules: dict[str, nn.Module] = field(default_factory=dict)  # looked through when the loss is not finite
    beside: dict[str, nn.Module] = field(default_factory=dict)  # what else there is, by what a person calls it, such as the VAE
    used_vae: bool = False  # do pictures go through it in this run, or did they, before training?
    describe: Callable[[int, int], str] | None = None  # (step, micro) -> which samples these are, such as file names


@dataclass(frozen=True)
class Report:
    """How a run ended: updates made in all, the smoothed loss, and whether all of the updates were made."""

    done: int
    loss: float
    finished: bool


def fit(task: Task, settings: TrainSettings) -> Report:
    """Train `task` for all its updates, or until asked to stop; resume, save and report on the way.

    Writes metrics.jsonl, loss.png, samples/ and checkpoint-*/ into `settings.output_dir`, and the result itself at the
    end. Raises MinidiffError for settings that cannot work, a folder that is in use, numbers that stay non-finite, or a
    disk that cannot be written.
    """
    settings.check()
    total, world = settings.updates(task.samples_per_epoch), distributed.world()
    world.check(settings.train_batch_size)
    device = check_trainable(task.trainable, settings)
    if settings.bf16_weights:
        to_bf16(task.trainable, settings)
    if isinstance(settings, FineTuneSettings) and settings.compile:
        compile_unet(task.modules["unet"])
    parameters = list(task.trainable.values())
    optimizer = task.optimizer or adamw(parameters, settings)
    rates = [group["lr"] for group in optimizer.param_groups]
    decay = task.ema_decay or (settings.ema_decay if settings.use_ema else None)
    ema = None if decay is None else EMA(task.trainable, decay)
    run = Run(task, settings, total, optimizer, ema, world)
    forward = Forward(task, settings, world, device)

    with in_backward(optimizer, settings, world) as early, run.claimed(), stop_signals() as asked, around(task, device):
        start = done = run.resume()
        skipped, smoothed = 0, math.nan
        with batches(task, settings, start, total) as data, progress(start, total, run.writes) as advance:
            while done < total and not world.any(bool(asked)):
                began, step = time.perf_counter(), done
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * lr_factor(step, total, settings)
                optimizer.zero_grad(set_to_none=True)

                mean = torch.zeros((), device=device)
                for micro in range(settings.gradient_accumulation_steps):  # their mean is the mean over one big batch
                    loss = forward(next(data), step, micro) / settings.gradient_accumulation_steps
                    (loss * forward.scale).backward()  # type: ignore[no-untyped-call]
                    mean += loss.detach()
                if step == start:
                    check_gradients(early.waiting(task.trainable) if early else task.trainable)
                world.average(unscaled(parameters, forward.scale))

                norm = early.norm() if early else clip_gradients(parameters, settings.max_grad_norm)
                value = world.mean(mean.item())
                if math.isfinite(norm) and math.isfinite(value):
                    optimizer.step()  # of all that have a gradient: none, where they moved in the backward pass
                    skipped = 0
                else:
                    skipped += 1
                    if skipped == min(PATIENCE, total):  # a shorter run has then learned nothing at all
                        run.give_up(step, skipped, value, *forward.culprit(step))
                done = step + 1
                if ema:
                    ema.update(done)

                lr, seconds = optimizer.param_groups[0]["lr"], round(time.perf_counter() - began, 4)
                run.log(step=done, loss=value, lr=lr, grad_norm=norm, seconds=seconds, **run.measure(done))
                smoothed = advance(value)
                run.save_and_draw(done, skipped)
        run.end(done, skipped)
        world.wait()  # nobody leaves before the first process has written everything
    return Report(done, smoothed, done == total)


@contextmanager
def around(task: Task, device: str) -> Iterator[None]:
    """Inside the `with`, kernels repeat themselves to the bit, and what is frozen stands still."""
    with deterministic(device), standing_still(task.modules.values(), large=False):
        yield


class Forward:
    """The loss of a micro batch: this process's share of it, in the number format of --mixed_precision."""

    def __init__(self, task: Task, settings: TrainSettings, world: distributed.World, device: str) -> None:
        self.task, self.settings, self.world = task, settings, world
        precision = settings.mixed_precision
        self.autocast = torch.autocast(device, DTYPES[precision], enabled=precision != "no")
        self.scale = LOSS_SCALE[precision]

    def __call__(self, batch: Batch, step: int, micro: int) -> Tensor:
        torch.manual_seed(hashed_seed(self.settings.seed, "torch", step, micro, self.world.rank))  # for dropout and the like
        with self.autocast:
            return self.task.loss(self.world.share(batch, self.settings.train_batch_size), step, micro)

    def culprit(self, step: int) -> tuple[str, str]:
        """Which samples of a step give a loss that is not finite, and what breaks: the step's forward passes, once more."""
        micros = range(self.settings.gradient_accumulation_steps)
        for micro in micros:
            samples, batch = self._samples(step, micro), self.task.batch(step, micro)
            if broken := [name for name, tensor in batch.items() if not tensor.isfinite().all()]:
                return samples, f"{broken[0]} in the batch"
            loss, module = first_nonfinite(self.task.modules, lambda: self(batch, step, micro))  # noqa: B023
            if module or not loss.isfinite():
                return samples, f"the output of {module}" if module else "the loss itself"
        return ", ".join(self._samples(step, micro) for micro in micros), "a gradient"

    def _samples(self, step: int, micro: int) -> str:
        if self.task.describe:
            return self.task.describe(step, micro)
        size = self.settings.train_batch_size
        first = (step * self.settings.gradient_accumulation_steps + micro) * size
        return f"samples {first} to {first + size - 1} of the run"


@contextmanager
def batches(task: Task, settings: TrainSettings, start: int, total: int) -> Iterator[Iterator[Batch]]:
    """All batches of the updates from `start` on, in order; --dataloader_num_workers threads, if any, prepare the next ones."""
    places = ((step, micro) for step in range(start, total) for micro in range(settings.gradient_accumulation_steps))
    workers = settings.dataloader_num_workers
    if workers == 0:
        yield (task.batch(step, micro) for step, micro in places)
        return
    pool = ThreadPoolExecutor(workers)

    def ahead() -> Iterator[Batch]:
        waiting = deque(pool.submit(task.batch, *place) for place in islice(places, 2 * workers))
        while waiting:
            batch = waiting.popleft().result()
            waiting.extend(pool.submit(task.batch, *place) for place in islice(places, 1))
            yield batch

    try:
        yield ahead()
    finally:
        pool.shutdown(cancel_futures=True)
