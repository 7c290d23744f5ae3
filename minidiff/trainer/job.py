"""A `Job` is a task of the training loop and what surrounds it: its result, its sheets, its data ahead, its faults in words."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from minidiff.core.errors import SettingsError
from minidiff.core.train import Batch, LoopSettings, Task, micro_loss
from minidiff.draw.nonfinite import first_nonfinite
from minidiff.trainer.settings import TrainSettings

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Job(Task):
    """`batch` gives CPU tensors, and threads may call it; `loss` moves them to its device.

    With prior preservation a batch has two halves, and the loss is the sum of two means.
    """

    export: Callable[[Path], None] = lambda folder: None  # writes the result into a folder: that of the run, or of a checkpoint
    card: Callable[[Path], None] = lambda folder: None  # writes what stands beside the result of the whole run alone
    preview: Callable[[int], "Image | None"] = lambda done: None  # a sample sheet
    validate: Callable[[], dict[str, float]] | None = None  # numbers for metrics.jsonl that tell how good the model is now
    facts: dict[str, Any] = field(default_factory=dict)  # JSON; a resumed run must agree with it (base, data, …)
    samples_per_epoch: int | None = None  # None: it has no epochs
    ema_decay: float | None = None  # None: as the settings say. With it, export, preview and validate see averaged weights
    modules: dict[str, nn.Module] = field(default_factory=dict)  # searched where the loss is not finite
    beside: dict[str, nn.Module] = field(default_factory=dict)  # other networks in memory, such as the VAE, by a readable name
    used_vae: bool = False  # do pictures go through the VAE in this run, before or during training?
    describe: Callable[[int, int], str] | None = None  # (step, micro) -> which samples these are, such as file names


# --- before the first update -------------------------------------------------------------------------------------------


def check_trainable(trainable: Mapping[str, nn.Parameter], settings: TrainSettings) -> str:
    """Trained weights are fp32 (fp16 would lose steps below 2^-11 of a weight). Returns the type of their device."""
    wrong = [name for name, p in trainable.items() if p.dtype != torch.float32 or not p.requires_grad]
    if wrong or not trainable:
        raise RuntimeError(f"a task trains fp32 parameters that require gradients; not so: {wrong[:5] or 'none'}")
    device = next(iter(trainable.values())).device.type
    check_precision(settings.mixed_precision, device)
    return device


def check_precision(precision: str, device: str) -> None:
    """SettingsError where the device cannot train in that --mixed_precision."""
    if precision == "fp16" and device == "cpu":
        raise SettingsError("--mixed_precision fp16 needs a GPU; on the CPU use bf16 or no.")
    if precision == "bf16" and device != "cpu" and not torch.cuda.is_bf16_supported():
        raise SettingsError("--mixed_precision bf16 is more than this GPU can do; use fp16.")


def loop_settings(settings: TrainSettings, total: int, rank: int) -> LoopSettings:
    """The settings that the loop itself reads."""
    names = "learning_rate lr_scheduler lr_warmup_steps gradient_accumulation_steps max_grad_norm mixed_precision seed"
    return LoopSettings(updates=total, rank=rank, **{name: getattr(settings, name) for name in names.split()})


@contextmanager
def batches(job: Job, settings: TrainSettings, start: int, total: int) -> Iterator[Iterator[Batch]]:
    """All batches of the updates from `start` on, in order; --dataloader_num_workers threads, if any, prepare the next ones."""
    places = ((step, micro) for step in range(start, total) for micro in range(settings.gradient_accumulation_steps))
    workers = settings.dataloader_num_workers
    if workers == 0:
        yield (job.batch(step, micro) for step, micro in places)
        return
    pool = ThreadPoolExecutor(workers)

    def ahead() -> Iterator[Batch]:
        waiting = deque(pool.submit(job.batch, *place) for place in islice(places, 2 * workers))
        while waiting:
            batch = waiting.popleft().result()
            waiting.extend(pool.submit(job.batch, *place) for place in islice(places, 1))
            yield batch

    try:
        yield ahead()
    finally:
        pool.shutdown(cancel_futures=True)


# --- after broken updates ----------------------------------------------------------------------------------------------


def culprit(job: Job, settings: TrainSettings, loop: LoopSettings, step: int) -> tuple[str, str]:
    """Which samples of a step give a loss that is not finite, and what breaks: the forward passes of the step, once more."""
    micros = range(loop.gradient_accumulation_steps)
    for micro in micros:
        samples, batch = samples_of(job, settings, step, micro), job.batch(step, micro)
        if broken := [name for name, tensor in batch.items() if not tensor.isfinite().all()]:
            return samples, f"{broken[0]} in the batch"
        loss, module = first_nonfinite(job.modules, lambda: micro_loss(job, loop, step, micro))  # noqa: B023
        if module or not loss.isfinite():
            return samples, f"the output of {module}" if module else "the loss itself"
    return ", ".join(samples_of(job, settings, step, micro) for micro in micros), "a gradient"


def samples_of(job: Job, settings: TrainSettings, step: int, micro: int) -> str:
    """The samples of a micro batch, for a message."""
    if job.describe:
        return job.describe(step, micro)
    size = settings.train_batch_size
    first = (step * settings.gradient_accumulation_steps + micro) * size
    return f"samples {first} to {first + size - 1} of the run"


# --- around the loop ---------------------------------------------------------------------------------------------------


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C or SIGTERM asks to stop after this update; a second Ctrl-C stops at once."""
    asked: list[int] = []

    def ask(number: int, _: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nStopping after this step; the state will be saved.\n")  # print is not safe in a handler

    if threading.current_thread() is not threading.main_thread():  # Python takes signals in the main thread only
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deterministic(device: str) -> Iterator[None]:
    """The same bits each time: inside, torch's random state is ours, and a GPU runs only kernels that give the same bits again.

    (Those of the CPU do so anyway.) Afterwards all is as it was. If cuBLAS was in use before `chosen_device` could set it up,
    PyTorch only warns, and its attention takes kernels that can differ in the last bits.
    """
    gpus = [torch.cuda.current_device()] if device == "cuda" else []
    memory: Any = torch.utils.deterministic
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = memory.fill_uninitialized_memory
    if gpus:
        torch.use_deterministic_algorithms(True, warn_only="CUBLAS_WORKSPACE_CONFIG" not in os.environ)
        memory.fill_uninitialized_memory = False  # writing zeros first is slow, and only hides bugs
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        memory.fill_uninitialized_memory = filled
