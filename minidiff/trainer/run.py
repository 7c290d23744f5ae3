"""One run of training: it walks along the loop (core/train.py), saves, measures, draws, stops, resumes and reports.

It keeps three promises beside the loop's own.
- Nothing lost: after Ctrl-C, SIGTERM, a full disk or a power cut the last checkpoint is whole (checkpoint.py).
- No harm: three skipped updates in a row end the run with a message that names what broke first.
- Nothing silent: a tensor that gets no gradient is an error after the first update.

With several processes only the first writes; the others read the checkpoint from which all go on.
"""

import json
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from minidiff.core.errors import MinidiffError, SettingsError, WeightsError
from minidiff.core.train import LoopSettings, Update, train
from minidiff.draw.images import save_png
from minidiff.draw.speed import compile_unet, frozen_weights
from minidiff.files.atomic import fsync, write_bytes
from minidiff.files.values import to_toml
from minidiff.trainer import checkpoint, distributed
from minidiff.trainer.optimizers import EMA, load_optimizer_state, optimizer_of, optimizer_state
from minidiff.trainer.plot import METRICS, loss_curve, read_metrics
from minidiff.trainer.settings import FineTuneSettings, TrainSettings
from minidiff.trainer.signals import signals_call
from minidiff.trainer.task import Job, check_precision

PATIENCE = 3  # skipped updates in a row end a run
LOOP = (  # the settings that the loop has, too
    "learning_rate lr_warmup_steps lr_num_cycles lr_power gradient_accumulation_steps max_grad_norm mixed_precision seed"
).split()
CURVES = {"polynomial": "linear", "cosine_with_restarts": "cosine"}  # the loop's names; with a power, or cycles


@dataclass(frozen=True)
class Report:
    """How a run ended: updates made in all, and whether these are all of the updates."""

    done: int
    finished: bool


def fit(job: Job, settings: TrainSettings) -> Report:
    """Train for all updates, or until asked to stop; resume, save and report on the way.

    Writes metrics.jsonl, loss.png, samples/, checkpoint-*/ and at last the result into `settings.output_dir`. MinidiffError
    for settings that cannot work, a folder in use, numbers that stay non-finite, or a disk that cannot be written.
    """
    settings.check()
    total, world = settings.updates(job.samples_per_epoch), distributed.world()
    world.check(settings)
    device = next(iter(job.trainable.values())).device.type
    check_precision(settings.mixed_precision, device)
    if isinstance(settings, FineTuneSettings) and settings.compile:
        compile_unet(job.modules["unet"])
    run = Run(job, settings, total, world)
    asked: list[int] = []  # signals to stop

    def ask(number: int, _: object) -> None:
        """Stop after this update; a second Ctrl-C stops at once."""
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nStopping after this step; the state will be saved.\n")  # print is not safe in a handler

    claimed = checkpoint.claimed(settings) if run.writes else nullcontext()
    early = run.early.in_backward(settings.max_grad_norm) if run.early else nullcontext()
    with claimed, early, signals_call(ask), deterministic(device), frozen_weights(job.modules.values()):
        run.resume()
        often = 0.1 if sys.stderr.isatty() else 10.0  # seconds: in a log file, a line now and then
        bar = tqdm(initial=run.done, total=total, unit="step", mininterval=often, file=sys.stderr, disable=not run.writes)
        with bar:
            run.bar = bar
            task = replace(distributed.shared(job, world, settings), optimizer=run.optimizer)
            updates = train(task, run.loop, run.done)
            while not world.any(bool(asked)):
                began = time.perf_counter()
                if (update := next(updates, None)) is None:
                    break
                run.take(update, seconds=round(time.perf_counter() - began, 4))
                run.save_and_draw()
                bar.set_postfix_str(run.losses(), refresh=False)
                bar.update()
        run.end()
        world.wait()  # no process leaves before the first one has written everything
    return Report(run.done, finished=run.done == total)


class Run:
    """One call of `fit`: `total` updates in all, of which earlier sessions may have made some."""

    def __init__(self, job: Job, settings: TrainSettings, total: int, world: distributed.World) -> None:
        self.job, self.settings, self.total = job, settings, total
        same = {name: getattr(settings, name) for name in LOOP}
        curve = CURVES.get(settings.lr_scheduler, settings.lr_scheduler)
        self.loop = LoopSettings(updates=total, rank=world.rank, lr_scheduler=curve, **same)
        self.optimizer = job.optimizer or optimizer_of(job.trainable, settings)
        self.validate_every = settings.validate_every(job.samples_per_epoch)
        self.board: Any = None  # TensorBoard's
        self.early: Any = self.optimizer if settings.optimizer_in_backward else None  # it steps in the backward pass
        decay = job.ema_decay or (settings.ema_decay if settings.use_ema else None)
        self.ema = None if decay is None else EMA(job.trainable, decay)
        self.writes = world.rank == 0
        self.folder = Path(settings.output_dir)
        self.made_of = json.loads(json.dumps(settings.identity(total) | job.facts))  # with lists for tuples
        self.metrics: list[dict[str, Any]] = []
        self.recent: deque[float] = deque(maxlen=20)  # losses
        self.done = self.saved = self.skipped = 0  # updates; the newest checkpoint's; updates skipped in a row
        self.bar: tqdm | None = None

    def losses(self) -> str:
        """For the bar: the mean loss of the last updates, and the last validation loss."""
        mean = sum(self.recent) / len(self.recent) if self.recent else math.nan
        measured = next((row["val_loss"] for row in reversed(self.metrics) if row.get("val_loss") is not None), None)
        return f"loss {mean:.4f}" + ("" if measured is None else f", val_loss {measured:.4f}")

    # --- before the first update

    def resume(self) -> None:
        """Put everything back as the checkpoint has it."""
        if path := checkpoint.find(self.settings):
            self._restore(path)
        if not self.writes:
            return
        if path is None and self.settings.resume_from_checkpoint:
            print(f"{self.folder} has no checkpoint yet: starting at the beginning.", file=sys.stderr)
        self.metrics = [row for row in read_metrics(self.folder) if row["step"] <= self.done]
        with self._writing("its first files"):
            if self.settings.report_to == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(self.folder / self.settings.logging_dir, purge_step=self.done + 1)
            write_bytes(self.folder / checkpoint.CONFIG, to_toml(self.settings, self.settings.NOT_SAVED).encode())
            write_bytes(self.folder / METRICS, "".join(json.dumps(row) + "\n" for row in self.metrics).encode())
        if not self.done and not self.metrics and (measured := self._measure()):
            self._log(step=0, **measured)
        if self.done and not self._sheet().exists():  # the last session ended between the checkpoint and the sheet
            self._draw()

    def _restore(self, path: Path) -> None:
        manifest, tensors = checkpoint.load(path)
        checkpoint.check_same(manifest["made_of"], self.made_of, path)
        if manifest["step"] > self.total:
            raise SettingsError(f"--max_train_steps: {path} is further already than the {self.total} updates in all.")
        kinds = {name: (p.shape, p.dtype) for name, p in self.job.trainable.items()}
        try:
            for group in ("weights", "ema") if self.ema else ("weights",):
                if {name: (t.shape, t.dtype) for name, t in tensors.get(group, {}).items()} != kinds:
                    raise WeightsError(f"its {group} are not those that this task trains")
            load_optimizer_state(self.optimizer, tensors["optimizer"])
        except WeightsError as error:
            raise WeightsError(f"{path}: {error}; take another --output_dir.") from error
        for name, p in self.job.trainable.items():
            p.data.copy_(tensors["weights"][name])
            if self.ema:
                self.ema.average[name].copy_(tensors["ema"][name])
        self.done = self.saved = manifest["step"]

    # --- after each update

    def take(self, update: Update, seconds: float) -> None:
        """Look at an update, and write its line. An error where a tensor has no gradient, or too many updates were skipped."""
        freed = self.early.norms if self.early else {}
        if without := [name for name, p in self.job.trainable.items() if p.grad is None and p not in freed]:
            raise RuntimeError(f"{len(without)} of {len(self.job.trainable)} trainable tensors got no gradient: {without[:5]}")
        norm = self.early.norm() if self.early else update.grad_norm
        self.done, self.skipped = update.done, self.skipped + 1 if update.skipped else 0
        if self.skipped == min(PATIENCE, self.total):  # a shorter run has then learned nothing at all
            self._give_up(update)
        if self.ema:
            self.ema.update(self.done)
        if math.isfinite(update.loss):
            self.recent.append(update.loss)
        if self.writes:
            self._log(step=self.done, loss=update.loss, lr=update.lr, grad_norm=norm, seconds=seconds, **self._measure())

    def save_and_draw(self) -> None:
        """A checkpoint and a sample sheet, if they are due.

        While updates are skipped, the weights may be those that broke the loss: no checkpoint then, which could push out a
        good one.
        """
        if self.writes and not self.skipped and self._due(self.settings.checkpointing_steps):
            self._save()
        if self.writes:
            self._draw()

    def end(self) -> None:
        """A checkpoint, wherever the run was stopped; the curve; and if it is finished, the result."""
        if not self.writes:
            return
        finished = self.done == self.total
        if self.skipped:
            print(f"Note: the last {self.skipped} updates had no finite loss and gradient, and were skipped.", file=sys.stderr)
        if self.done != self.saved and (finished or not self.skipped):
            self._save()
        if finished:
            with self._writing("the result"), self._averaged():
                with checkpoint.put_in_place(self.folder) as hidden:
                    self.job.export(hidden)
                    self.job.card(hidden)
                checkpoint.prune(self.folder, self.settings.checkpoints_total_limit, self.done)  # if a full disk kept one
        else:
            print(f"Stopped after {self.done} updates. Go on with --resume_from_checkpoint latest.", file=sys.stderr)
        self._curve()

    def _give_up(self, update: Update) -> None:
        """End a run whose numbers stay broken, with the first gradient that broke."""
        grads = ((name, p.grad) for name, p in self.job.trainable.items() if p.grad is not None)
        tensor = next((name for name, grad in grads if not grad.isfinite().all()), "no tensor")
        often = f"{self.skipped} updates in a row" if self.skipped > 1 else "The only update was"
        raise MinidiffError(
            f"{often} without a finite loss and gradient (step {update.done}: loss {update.loss}, learning rate "
            f"{update.lr:g}). The first broken gradient is that of {tensor}. {self._advice()}"
        )

    def _measure(self) -> dict[str, float]:
        """The validation loss, if it is due."""
        if not self._due(self.validate_every) or self.job.validate is None:
            return {}
        with self._averaged(), self._announced("measuring val_loss"):
            return self.job.validate()

    def _log(self, **row: float) -> None:
        """One line in metrics.jsonl. JSON has no NaN: a number that is not finite is written as null."""
        self.metrics.append({k: v if math.isfinite(v) else None for k, v in row.items()})
        with self._writing(METRICS), open(self.folder / METRICS, "a") as file:
            file.write(json.dumps(self.metrics[-1]) + "\n")
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(name, value, row["step"])

    def _save(self) -> None:
        """A checkpoint, unless the weights themselves are broken: then the last good one stays the last."""
        if broken := [name for name, p in self.job.trainable.items() if not p.isfinite().all()]:
            raise MinidiffError(f"After step {self.done}, {broken[0]} holds NaN or infinity. {self._advice()}")
        tensors: checkpoint.Groups = {"weights": dict(self.job.trainable), "optimizer": optimizer_state(self.optimizer)}
        if self.ema:
            tensors["ema"] = self.ema.average.copy()
        with self._writing(f"the checkpoint of step {self.done}"):
            fsync(self.folder / METRICS)
            keep = self.settings.checkpoints_total_limit
            checkpoint.save(self.folder, self.done, tensors, self.made_of, self._export, keep)
        self.saved = self.done

    def _export(self, folder: Path) -> None:
        with self._averaged():
            self.job.export(folder)

    def _draw(self) -> None:
        """A sample sheet, if it is due, and the curve so far."""
        if not self._due(self.validate_every):
            return
        with self._averaged(), self._announced("drawing a sheet"):
            image = self.job.preview(self.done)
        if image is not None:
            self._curve()
            save_png(image, self._sheet())

    def _curve(self) -> None:
        if self.metrics:  # none where a finished run is resumed and they were lost
            with self._writing("loss.png"):
                loss_curve(self.metrics, self.folder / "loss.png")

    @contextmanager
    def _announced(self, what: str) -> Iterator[None]:
        """Inside the `with`, the bar says why it stands."""
        if self.bar is not None:
            self.bar.set_description_str(what)
        yield
        if self.bar is not None:
            self.bar.set_description_str("", refresh=False)

    def _sheet(self) -> Path:
        return self.folder / "samples" / f"step-{self.done:06d}.png"

    def _due(self, every: int) -> bool:
        """After every so many updates and at the end; 0: never."""
        return every > 0 and (self.done % every == 0 or self.done == self.total)

    def _averaged(self) -> AbstractContextManager[None]:
        return self.ema.applied() if self.ema else nullcontext()

    def _advice(self) -> str:
        good = checkpoint.last_good(self.folder)
        return f"Nothing was saved over. {good} Try a lower --learning_rate, or --mixed_precision no."

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """A full or unwritable disk, in words."""
        try:
            yield
        except OSError as error:
            good = checkpoint.last_good(self.folder)
            raise MinidiffError(f"{self.folder}: {what} could not be written ({error}). Make room. {good}") from error


# --- around the loop ---------------------------------------------------------------------------------------------------


@contextmanager
def deterministic(device: str) -> Iterator[None]:
    """Inside the `with`, torch's random state is ours, and a GPU runs only kernels that give the same bits each time.

    (Those of the CPU do so anyway.) If cuBLAS was in use before `chosen_device` could set it up, PyTorch only warns.
    """
    gpus = [torch.cuda.current_device()] if device == "cuda" else []
    memory: Any = torch.utils.deterministic
    before, filled = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    if gpus:
        torch.use_deterministic_algorithms(True, warn_only="CUBLAS_WORKSPACE_CONFIG" not in os.environ)
        memory.fill_uninitialized_memory = False  # writing zeros first is slow, and only hides bugs
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = filled
