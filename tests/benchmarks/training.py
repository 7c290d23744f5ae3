"""Training steps. minidiff's are those of the real loop, `minidiff.trainer.run.fit`, with logging and all that belongs to it.

The loop asks its task for each batch; there the peers get their turns. So all of them take the same batches, in one
process, in ABBA order, and nothing of minidiff's loop is copied here, where it could grow old.
"""

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import models, peers
from benchmarks.report import OURS, Row, timed_rows
from benchmarks.timing import Seconds, rounds_of, summaries, timed, wait_for_gpu
from minidiff.core.inject import adapter_weights
from minidiff.core.train import Batch
from minidiff.trainer.recipes import RECIPES
from minidiff.trainer.run import fit
from minidiff.trainer.settings import DreamBoothSettings, FineTuneSettings, LoRASettings, TextualInversionSettings
from minidiff.trainer.task import Job

METHODS = ("lora", "dora", "dreambooth", "textual_inversion")
CHECKED = 3  # steps whose losses must agree: the third one sees what two updates did
TOLERANCE = {"no": 1e-3, "bf16": 5e-2, "fp16": 5e-2}
INSTANCE, CLASS, WORD = "a photo of a sks dog", "a photo of a dog", "<thing>"


@dataclass(frozen=True)
class Size:
    """A model to train: its folder, side of the pictures in pixels, samples in a step."""

    name: str
    folder: Path
    side: int
    batch: int


def settings_of(method: str, size: Size, output: Path, device: str, precision: str) -> FineTuneSettings:
    """What a user would give on the command line."""
    common: dict[str, Any] = {
        "pretrained_model_name_or_path": str(size.folder),
        "instance_data_dir": str(models.DOG),
        "output_dir": str(output),
        "train_batch_size": size.batch,
        "resolution": size.side,
        "device": device,
        "mixed_precision": precision,
        "max_train_steps": 1_000_000,
        "checkpointing_steps": 1_000_000,
        "validation_steps": 0,
    }
    if method in ("lora", "dora"):
        return LoRASettings(**common, instance_prompt=INSTANCE, rank=8, use_dora=method == "dora")
    if method == "dreambooth":
        prior = {"class_prompt": CLASS, "class_data_dir": str(models.CHALK), "num_class_images": 0}
        return DreamBoothSettings(**common, instance_prompt=INSTANCE, **prior)
    word = {"placeholder_token": WORD, "initializer_token": "dog", "max_grad_norm": 1e9}  # the script does not clip
    return TextualInversionSettings(**common, instance_prompt=f"a photo of {WORD}", **word)


def plan_of(method: str, settings: FineTuneSettings, side: int) -> peers.Plan:
    """The same for the peers."""
    half = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.mixed_precision]
    prompt = settings.instance_prompt or ""
    prompts = [prompt] * settings.train_batch_size + [CLASS] * settings.train_batch_size * (method == "dreambooth")
    return peers.Plan(
        method=method,
        folder=settings.pretrained_model_name_or_path,
        prompts=tuple(prompts),
        pictures=tuple(sorted(models.DOG.glob("*.png"))),
        side=side,
        rank=8,
        learning_rate=settings.learning_rate,
        word=WORD,
        initializer="dog",
        device=settings.device or "cpu",
        half=half,
    )


def trainees(plan: peers.Plan, task: Job, compiled: bool, levels: tuple[str, ...] = peers.LEVELS) -> dict[str, peers.Trainee]:
    """The peers, which begin with the same adapters as `task`."""
    start = {}
    if plan.method in ("lora", "dora"):
        start = {name: weights.A for name, weights in adapter_weights(task.modules["unet"]).items()}
    return {peers.NAMES[level]: peers.trainee(plan, level, compiled, start) for level in levels}


class Enough(Exception):
    """Leaves the training loop: all is measured."""


class Turns:
    """The task's `batch` and `loss`, with the peers' steps in between and a clock on all of them."""

    def __init__(
        self, task: Job, others: dict[str, Callable[[Batch], Tensor]], seconds: float, tolerance: float, least: int = 4
    ) -> None:
        self.task, self.others, self.seconds = task, others, seconds
        self.tolerance, self.least = tolerance, least
        self.losses: dict[str, list[float]] = {name: [] for name in (OURS, *others)}
        self.times: dict[str, list[Seconds]] = {name: [] for name in (OURS, *others)}
        self.turns = rounds_of([OURS, *others])
        self.end, self.began = float("inf"), (0.0, 0.0)
        self.errors: dict[str, float] = {}
        self.wrong: list[str] = []

    def batch(self, step: int, micro: int) -> Batch:
        """The end of our step before this one, the others' turns, and the beginning of our next step."""
        self.stop_clock(step)
        if step < CHECKED:
            batch = self.task.batch(step, micro)
            for name, peer in self.others.items():
                with outside_the_loop():
                    self.losses[name].append(float(peer(batch)))
            return batch
        if step == CHECKED:
            self.compare()
            self.end = time.perf_counter() + self.seconds
        batch = self.task.batch(step, micro)  # once for the peers, and below once more on our own clock
        while (name := next(self.turns)) != OURS:
            with outside_the_loop():
                peer = self.others[name]
                self.times[name].append(timed(lambda: peer(batch))[0])  # noqa: B023
        whole = len({len(times) for times in self.times.values()}) == 1 and len(self.times[OURS]) % 2 == 0
        if whole and time.perf_counter() > self.end and len(self.times[OURS]) >= self.least:
            raise Enough
        wait_for_gpu()
        self.began = time.perf_counter(), time.process_time()
        return self.task.batch(step, micro)

    def stop_clock(self, step: int) -> None:
        if step > CHECKED:
            wait_for_gpu()
            wall, cpu = self.began
            self.times[OURS].append(Seconds(time.perf_counter() - wall, time.process_time() - cpu))

    def loss(self, batch: Batch, step: int, micro: int) -> Tensor:
        value = self.task.loss(batch, step, micro)
        if step < CHECKED:
            self.losses[OURS].append(float(value.detach()))
        return value

    def compare(self) -> None:
        """Peers whose losses are others do other work: they leave."""
        self.errors = {name: relative(found, self.losses[OURS]) for name, found in self.losses.items()}
        self.wrong = [name for name, error in self.errors.items() if not error <= self.tolerance]
        for name in self.wrong:
            del self.others[name], self.times[name]
        self.turns = rounds_of([OURS, *self.others])


def relative(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@contextmanager
def outside_the_loop() -> Iterator[None]:
    """A peer's turn: what the loop has switched on for itself is off (kernels that repeat themselves, autocast)."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


def training_rows(
    method: str,
    size: Size,
    folder: Path,
    device: str,
    precision: str,
    seconds: float,
    compiled: bool,
    with_peers: bool,
    compile_too: bool,
) -> tuple[list[Row], list[str]]:
    """Steps of one method: the rows, and what failed."""
    settings = settings_of(method, size, folder / f"{size.name}-{method}{'-compiled' * compile_too}", device, precision)
    settings = replace(settings, compile=compile_too)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        task = RECIPES[type(settings)](settings)
        others = trainees(plan_of(method, settings, size.side), task, compiled) if with_peers else {}
        turns = Turns(task, dict(others), seconds, TOLERANCE[precision])
        with contextlib.suppress(Enough):
            fit(replace(task, batch=turns.batch, loss=turns.loss), settings)
    work = f"{method.replace('_', ' ')} step, {size.name}, batch {size.batch}{', --compile' * compile_too}"
    wall = summaries({name: [t.wall for t in found] for name, found in turns.times.items()}, OURS)
    cpu = summaries({name: [max(t.cpu, 1e-9) for t in found] for name, found in turns.times.items()}, OURS)
    failed = [f"train: {work}: the losses of {name} differ by {turns.errors[name]:.1e}" for name in turns.wrong]
    return timed_rows("train", work, wall, cpu, turns.errors), failed
