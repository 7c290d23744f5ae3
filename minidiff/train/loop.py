"""THE training loop. What is trained, on what, with which loss: all that is in a `Task`.

The loop keeps four promises.
- The same numbers: batch and loss are pure functions of (step, micro), so that resuming is "start at step N" and the
  result is bit for bit that of a run that never stopped.
- Nothing lost: Ctrl-C, SIGTERM, a full disk or a power cut leave the last checkpoint whole (checkpoint.py).
- No harm: a loss or gradient that is not finite skips the update; three in a row end the run.
- Nothing silent: a tensor that gets no gradient is an error after the first step, not a disappointment after the last.

`step` counts from 0 where it says which data to use, and `done` = step + 1 is the number of updates made: metrics,
checkpoints and previews are named by `done`.
"""

import json
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minidiff.errors import MinidiffError, SettingsError, WeightsError
from minidiff.images import loss_curve, save_png
from minidiff.train import checkpoint
from minidiff.train.optim import EMA, adamw, clip_gradients, lr_factor
from minidiff.train.settings import TrainSettings

if TYPE_CHECKING:
    from PIL.Image import Image

Batch = dict[str, Tensor]
METRICS = "metrics.jsonl"
PATIENCE = 3  # updates in a row without a finite loss and gradient
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LOSS_SCALE = {"no": 1.0, "bf16": 1.0, "fp16": 4096.0}  # fp16's small gradients would vanish: arXiv 1710.03740, 3.2


@dataclass
class Task:
    """What the loop does not know. `batch` gives CPU tensors; `loss` moves them, and is a mean over them."""

    trainable: dict[str, nn.Parameter]
    batch: Callable[[int, int], Batch]  # (step, micro) -> data, a pure function
    loss: Callable[[Batch, int, int], Tensor]  # (data, step, micro) -> scalar
    export: Callable[[Path], None]  # write the result into a folder
    preview: Callable[[int], "Image | None"] = lambda done: None  # a sample sheet
    facts: dict[str, Any] = field(default_factory=dict)  # JSON; a resumed run must agree with it (base, data, …)
    optimizer: torch.optim.Optimizer | None = None  # None: AdamW with the settings' numbers
    ema_decay: float | None = None  # export and preview then see averaged weights


@dataclass(frozen=True)
class Report:
    """How a run ended: updates made in all, the smoothed loss, and whether all of the updates were made."""

    done: int
    loss: float
    finished: bool


def fit(task: Task, settings: TrainSettings) -> Report:
    """Train `task` until `max_train_steps`, or until asked to stop; resume, save and report on the way.

    Writes metrics.jsonl, loss.png, samples/ and checkpoint-*/ into `settings.output_dir`, and the result itself at the
    end. Raises MinidiffError for settings that cannot work, a folder that is in use, numbers that stay non-finite, or a
    disk that cannot be written.
    """
    settings.check()
    device = _check_trainable(task.trainable, settings)
    parameters = list(task.trainable.values())
    optimizer = task.optimizer or adamw(parameters, settings)
    rates = [group["lr"] for group in optimizer.param_groups]
    ema = None if task.ema_decay is None else EMA(task.trainable, task.ema_decay)
    run = _Run(task, settings, optimizer, ema)
    autocast = torch.autocast(device, DTYPES[settings.mixed_precision], enabled=settings.mixed_precision != "no")
    scale = LOSS_SCALE[settings.mixed_precision]

    with checkpoint.claimed(settings), _stop_signals() as asked, _deterministic(device):
        start = done = run.resume()
        skipped, smoothed = 0, math.nan
        with _progress(start, settings.max_train_steps) as show:
            while done < settings.max_train_steps and not asked:
                began, step = time.perf_counter(), done
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * lr_factor(step, settings)
                optimizer.zero_grad(set_to_none=True)

                total = torch.zeros((), device=device)
                for micro in range(settings.gradient_accumulation_steps):  # their mean is the mean over one big batch
                    with autocast:
                        loss = task.loss(task.batch(step, micro), step, micro) / settings.gradient_accumulation_steps
                    (loss * scale).backward()  # type: ignore[no-untyped-call]
                    total += loss.detach()
                if step == start:
                    _check_gradients(task.trainable)
                for p in parameters if scale != 1.0 else []:
                    p.grad.div_(scale)  # type: ignore[union-attr]

                norm, value = clip_gradients(parameters, settings.max_grad_norm), total.item()
                if math.isfinite(norm) and math.isfinite(value):
                    optimizer.step()
                    skipped = 0
                else:
                    skipped += 1
                    if skipped == PATIENCE:
                        run.give_up(step, value)
                done = step + 1
                if ema:
                    ema.update(done)

                lr, seconds = optimizer.param_groups[0]["lr"], time.perf_counter() - began
                run.log(step=done, loss=value, lr=lr, grad_norm=norm, seconds=round(seconds, 4))
                smoothed = show(value)
                if done % settings.checkpointing_steps == 0:
                    run.save(done)
                if settings.validation_steps and done % settings.validation_steps == 0:
                    run.preview(done)
        finished = done == settings.max_train_steps
        run.end(done, finished)
    return Report(done, smoothed, finished)


class _Run:
    """The run's files: state in and out, metrics, previews, the result."""

    def __init__(self, task: Task, settings: TrainSettings, optimizer: torch.optim.Optimizer, ema: EMA | None) -> None:
        self.task, self.settings, self.optimizer, self.ema = task, settings, optimizer, ema
        self.folder = Path(settings.output_dir)
        self.made_of = json.loads(json.dumps({**settings.identity(), **task.facts}))
        self.metrics: list[dict[str, Any]] = []
        self.saved = 0  # the step of the newest checkpoint

    def resume(self) -> int:
        """Put everything back as the checkpoint has it; the number of updates already made."""
        path, done = checkpoint.find(self.settings), 0
        if path is not None:
            done = self._restore(checkpoint.load(path))
        elif self.settings.resume_from_checkpoint:
            print(f"{self.folder} has no checkpoint yet: starting at the beginning.", file=sys.stderr)
        self.metrics = [row for row in read_metrics(self.folder) if row["step"] <= done]
        lines = "".join(json.dumps(row) + "\n" for row in self.metrics)
        with self._writing("its first files"):
            checkpoint.write_config(self.folder, self.settings)
            checkpoint.write_bytes(self.folder / METRICS, lines.encode())
        return done

    def _restore(self, saved: checkpoint.Checkpoint) -> int:
        checkpoint.check_same(saved.facts["made_of"], self.made_of, saved.path)
        if saved.step > self.settings.max_train_steps:
            raise SettingsError(f"--max_train_steps {self.settings.max_train_steps}: {saved.path} is further already.")
        weights = saved.tensors["weights"]
        if {k: v.shape for k, v in weights.items()} != {k: p.shape for k, p in self.task.trainable.items()}:
            raise WeightsError(f"{saved.path} holds other tensors than this task trains; take another --output_dir.")
        for name, p in self.task.trainable.items():
            p.data.copy_(weights[name])
        checkpoint.load_optimizer_state(self.optimizer, saved.tensors["optimizer"], saved.facts["optimizer_groups"])
        if self.ema:
            self.ema.load(saved.tensors["ema"])
        for what, now in checkpoint.environment().items():
            if (was := saved.facts["environment"].get(what)) != now:
                print(f"Note: {what} was {was}, is now {now}: the result can differ in its last bits.", file=sys.stderr)
        self.saved = saved.step
        return saved.step

    def log(self, **row: float | None) -> None:
        """One line in metrics.jsonl. JSON has no NaN: a number that is not finite is written as null."""
        clean = {k: v if v is not None and math.isfinite(v) else None for k, v in row.items()}
        self.metrics.append(clean)
        with self._writing(METRICS), open(self.folder / METRICS, "a") as file:
            file.write(json.dumps(clean) + "\n")

    def save(self, done: int) -> None:
        """A checkpoint, unless the weights themselves are broken: then the last good one stays the last."""
        broken = [name for name, p in self.task.trainable.items() if not p.isfinite().all()]
        if broken:
            raise MinidiffError(f"After step {done}, {broken[0]} holds NaN or infinity.{self._advice()}")
        moments, groups = checkpoint.optimizer_state(self.optimizer)
        tensors: checkpoint.Groups = {"weights": dict(self.task.trainable), "optimizer": moments}
        if self.ema:
            tensors["ema"] = self.ema.average
        facts = {"made_of": self.made_of, "optimizer_groups": groups}
        with self._writing(f"the checkpoint of step {done}"):
            checkpoint.fsync(self.folder / METRICS)
            checkpoint.save(self.folder, done, tensors, facts, self._export, self.settings.checkpoints_total_limit)
        self.saved = done

    def preview(self, done: int) -> None:
        with self._averaged():
            image = self.task.preview(done)
        if image is not None:
            save_png(image, self.folder / "samples" / f"step-{done:06d}.png")

    def end(self, done: int, finished: bool) -> None:
        """The last checkpoint, wherever the run ends; if it is finished, the last sheet, the result and the curve."""
        if done != self.saved:
            self.save(done)
        if not finished:
            print(f"Stopped after {done} updates. Go on with --resume_from_checkpoint latest.", file=sys.stderr)
            return
        if self.settings.validation_steps and done % self.settings.validation_steps:
            self.preview(done)
        with self._writing("the result"):
            checkpoint.publish(self.folder, self._export)
            if self.metrics:  # none where a finished run is resumed and they were lost
                loss_curve(self.metrics, self.folder / "loss.png")

    def give_up(self, step: int, loss: float) -> None:
        """End a run whose numbers stay broken, naming the first tensor to blame."""
        grads = {name: p.grad for name, p in self.task.trainable.items() if p.grad is not None}
        culprit = next((name for name, g in grads.items() if not g.isfinite().all()), "none")
        raise MinidiffError(
            f"{PATIENCE} updates in a row without a finite loss and gradient (step {step + 1}: loss {loss}, "
            f"learning rate {self.optimizer.param_groups[0]['lr']:g}, first broken gradient: {culprit})."
            f"{self._advice()}"
        )

    def _advice(self) -> str:
        good = checkpoint.latest(self.folder)
        kept = f"The last good checkpoint is {good}." if good else "No checkpoint had been saved yet."
        return f" Nothing was saved over. {kept} Try a lower --learning_rate, or --mixed_precision no."

    def _export(self, folder: Path) -> None:
        with self._averaged():
            self.task.export(folder)

    def _averaged(self) -> AbstractContextManager[None]:
        return self.ema.applied() if self.ema else nullcontext()

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """A full or unwritable disk, in words."""
        try:
            yield
        except OSError as error:
            good = checkpoint.latest(self.folder)
            kept = f"{good} is whole" if good else "no checkpoint had been saved yet"
            raise MinidiffError(
                f"{self.folder}: {what} could not be written ({error}); {kept}. Make room, then go on with "
                "--resume_from_checkpoint latest."
            ) from error


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, up to a line that a killed process or a power cut left broken."""
    path, rows = folder / METRICS, []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or type(row.get("step")) is not int or "loss" not in row:
            break
        rows.append(row)
    return rows


@contextmanager
def _progress(start: int, total: int) -> Iterator[Callable[[float], float]]:
    """A bar on stderr: updates, rate, time left, and the mean loss of the last twenty, which is returned."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    recent: deque[float] = deque(maxlen=20)
    seconds = 0.1 if sys.stderr.isatty() else 10.0  # in a log file, a line now and then
    with tqdm(initial=start, total=total, unit="step", dynamic_ncols=True, mininterval=seconds, file=sys.stderr) as bar:

        def show(loss: float) -> float:
            if math.isfinite(loss):
                recent.append(loss)
            mean = sum(recent) / len(recent) if recent else math.nan
            bar.set_postfix_str(f"loss {mean:.4f}", refresh=False)
            bar.update()
            return mean

        yield show


# --- checks and surroundings -----------------------------------------------------------------------------------------


def _check_trainable(trainable: dict[str, nn.Parameter], settings: TrainSettings) -> str:
    """What is trained is fp32 (fp16 steps below 2^-11 of a weight would be lost); the device type it is on."""
    wrong = [name for name, p in trainable.items() if p.dtype != torch.float32 or not p.requires_grad]
    if wrong or not trainable:
        raise RuntimeError(f"a task trains fp32 parameters that require gradients; not so: {wrong[:5] or 'none'}")
    device = next(iter(trainable.values())).device.type
    if settings.mixed_precision == "fp16" and device == "cpu":
        raise SettingsError("--mixed_precision fp16 needs a GPU; on the CPU use bf16 or no.")
    if settings.mixed_precision == "bf16" and device == "cuda" and not torch.cuda.is_bf16_supported():
        raise SettingsError("--mixed_precision bf16 is more than this GPU can do; use fp16.")
    return device


def _check_gradients(trainable: dict[str, nn.Parameter]) -> None:
    """After the first backward pass: a tensor that gets no gradient would silently stay what it is."""
    without = [name for name, p in trainable.items() if p.grad is None]
    if without:
        raise RuntimeError(f"{len(without)} of {len(trainable)} trainable tensors got no gradient: {without[:5]}")


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C or SIGTERM asks to stop after the step at hand; a second Ctrl-C stops at once."""
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
def _deterministic(device: str) -> Iterator[None]:
    """On a GPU, only kernels that give the same bits each time, where there is one. CPU kernels do so anyway."""
    if device == "cpu":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    memory: Any = torch.utils.deterministic
    before, filled = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # writing zeros first is slow, and only hides bugs
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = filled
