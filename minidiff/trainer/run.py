"""One run of training: it walks along the loop (core/train.py), saves, measures, draws, stops, resumes and reports.

It keeps three promises beside the loop's own.
- Nothing lost: after Ctrl-C, SIGTERM, a full disk or a power cut the last checkpoint is whole (checkpoint.py).
- No harm: three skipped updates in a row end the run with a message that names what broke first.
- Nothing silent: a tensor that gets no gradient is an error after the first update.

With several processes only the first writes; the others read the checkpoint from which all go on.
"""

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minidiff.core.errors import MinidiffError, SettingsError, WeightsError
from minidiff.core.train import Batch, Task, Update, train
from minidiff.draw.images import save_png
from minidiff.draw.speed import compile_unet, frozen_weights
from minidiff.files.atomic import fsync, write_bytes
from minidiff.trainer import checkpoint, distributed
from minidiff.trainer.ema import EMA
from minidiff.trainer.job import Job, batches, check_trainable, culprit, deterministic, loop_settings, stop_signals
from minidiff.trainer.optimizers import adamw, load_optimizer_state, optimizer_state, stepping_in_backward, to_bf16
from minidiff.trainer.plot import loss_curve
from minidiff.trainer.settings import FineTuneSettings, TrainSettings

METRICS = "metrics.jsonl"
PATIENCE = 3  # skipped updates in a row end a run


@dataclass(frozen=True)
class Report:
    """How a run ended: updates made in all, the smoothed loss, and whether all of the updates were made."""

    done: int
    loss: float
    finished: bool


def fit(job: Job, settings: TrainSettings) -> Report:
    """Train for all updates, or until asked to stop; resume, save and report on the way.

    Writes metrics.jsonl, loss.png, samples/ and checkpoint-*/ into `settings.output_dir`, and the result itself at the
    end. Raises MinidiffError for settings that cannot work, a folder that is in use, numbers that stay non-finite, or a
    disk that cannot be written.
    """
    settings.check()
    total, world = settings.updates(job.samples_per_epoch), distributed.world()
    world.check(settings.train_batch_size)
    device = check_trainable(job.trainable, settings)
    if settings.bf16_weights:
        to_bf16(job.trainable)
    if isinstance(settings, FineTuneSettings) and settings.compile:
        compile_unet(job.modules["unet"])
    run = Run(job, settings, total, world)

    caching = frozen_weights(job.modules.values())
    with run.claimed(), run.in_backward(), stop_signals() as asked, deterministic(device), caching:
        start = run.resume()
        with batches(job, settings, start, total) as data, progress(start, total, run.writes) as advance:
            updates, smoothed = train(run.task(data), run.loop, start), math.nan
            while not world.any(bool(asked)):
                began = time.perf_counter()
                if (update := next(updates, None)) is None:
                    break
                update = run.take(update, first=update.done == start + 1)
                run.record(update, round(time.perf_counter() - began, 4))
                smoothed = advance(update.loss)
                run.save_and_draw()
        run.end()
        world.wait()  # no process leaves before the first one has written everything
    return Report(run.done, smoothed, run.done == total)


class Run:
    """One call of `fit`: `total` updates in all, of which earlier sessions may have made some."""

    def __init__(self, job: Job, settings: TrainSettings, total: int, world: distributed.World) -> None:
        self.job, self.settings, self.total, self.world = job, settings, total, world
        self.loop = loop_settings(settings, total, world.rank)
        self.optimizer = job.optimizer or adamw(list(job.trainable.values()), settings)
        self.early = stepping_in_backward(self.optimizer, settings, world)
        decay = job.ema_decay or (settings.ema_decay if settings.use_ema else None)
        self.ema = None if decay is None else EMA(job.trainable, decay)
        self.writes = world.rank == 0
        self.folder = Path(settings.output_dir)
        self.made_of = json.loads(json.dumps({**settings.identity(total), **job.facts}))
        self.metrics: list[dict[str, Any]] = []
        self.done = self.saved = self.skipped = 0  # updates; the newest checkpoint's; updates skipped in a row

    def task(self, data: Iterator[Batch]) -> Task:
        """The job as the loop trains it, with batches that were perhaps prepared ahead."""
        own = distributed.own_share(self.job, self.world, self.settings.train_batch_size)
        task = distributed.averaged(own, self.world, self.settings.gradient_accumulation_steps)
        return replace(task, batch=lambda step, micro: next(data), optimizer=self.optimizer)

    def in_backward(self) -> AbstractContextManager[None]:
        """Inside the `with`, the optimizer steps in the backward pass, if --optimizer_in_backward asks for it."""
        return self.early.in_backward(self.settings.max_grad_norm) if self.early else nullcontext()

    def claimed(self) -> AbstractContextManager[Path | None]:
        """The output folder, for this run alone."""
        return checkpoint.claimed(self.settings) if self.writes else nullcontext()

    def resume(self) -> int:
        """Put everything back as the checkpoint has it; the number of updates already made."""
        path = checkpoint.find(self.settings)
        if path is not None:
            self._restore(checkpoint.load(path))
        done = self.done
        if not self.writes:
            return done
        if path is None and self.settings.resume_from_checkpoint:
            print(f"{self.folder} has no checkpoint yet: starting at the beginning.", file=sys.stderr)
        self.metrics = [row for row in read_metrics(self.folder) if row["step"] <= done]
        lines = "".join(json.dumps(row) + "\n" for row in self.metrics)
        with self._writing("its first files"):
            checkpoint.write_config(self.folder, self.settings)
            write_bytes(self.folder / METRICS, lines.encode())
        if not done and not self.metrics and (measured := self.measure(0)):
            self.log(step=0, **measured)
        if done and not self._sheet(done).exists():  # the last session ended between the checkpoint and the sheet
            self._draw(done)
        return done

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        checkpoint.check_same(saved.facts["made_of"], self.made_of, saved.path)
        if saved.step > self.total:
            raise SettingsError(f"--max_train_steps: {saved.path} is further already than the {self.total} updates in all.")
        kinds = {name: (p.shape, p.dtype) for name, p in self.job.trainable.items()}
        for group in ("weights", "ema") if self.ema else ("weights",):
            if {name: (t.shape, t.dtype) for name, t in saved.tensors.get(group, {}).items()} != kinds:
                raise WeightsError(f"{saved.path} holds other {group} than this task trains; take another --output_dir.")
        try:
            load_optimizer_state(self.optimizer, saved.tensors["optimizer"])
        except WeightsError as error:
            raise WeightsError(f"{saved.path}: {error}; take another --output_dir.") from error
        for name, p in self.job.trainable.items():
            p.data.copy_(saved.tensors["weights"][name])
            if self.ema:
                self.ema.average[name].copy_(saved.tensors["ema"][name])
        for what, now in checkpoint.environment().items() if self.writes else []:
            if (was := saved.facts["environment"].get(what, now)) != now:
                print(f"Note: {what} was {was}, is now {now}: the result can differ in its last bits.", file=sys.stderr)
        self.done = self.saved = saved.step

    def take(self, update: Update, first: bool) -> Update:
        """Look at an update: an error where a tensor has no gradient, or where too many in a row were skipped."""
        if first:
            self._check_gradients()
        if self.early:
            update = replace(update, grad_norm=self.early.norm())
        self.done, self.skipped = update.done, self.skipped + 1 if update.skipped else 0
        if self.skipped == min(PATIENCE, self.total):  # a shorter run has then learned nothing at all
            self._give_up(update)
        if self.ema:
            self.ema.update(self.done)
        return update

    def record(self, update: Update, seconds: float) -> None:
        """One line in metrics.jsonl, with what is measured after this update."""
        measured = self.measure(self.done)
        self.log(step=self.done, loss=update.loss, lr=update.lr, grad_norm=update.grad_norm, seconds=seconds, **measured)

    def measure(self, done: int) -> dict[str, float]:
        """The validation loss after `done` updates; empty where it is not due."""
        if not self.writes or not self.job.validate or not self._due(done, self.settings.validation_steps):
            return {}
        with self._averaged():
            return self.job.validate()

    def log(self, **row: float | None) -> None:
        """One line in metrics.jsonl. JSON has no NaN: a number that is not finite is written as null."""
        if not self.writes:
            return
        clean = {k: v if v is not None and math.isfinite(v) else None for k, v in row.items()}
        self.metrics.append(clean)
        with self._writing(METRICS), open(self.folder / METRICS, "a") as file:
            file.write(json.dumps(clean) + "\n")

    def save_and_draw(self) -> None:
        """A checkpoint and a sample sheet, if they are due.

        While updates are skipped, the weights are perhaps those that broke the loss: no checkpoint then, which could push
        out a good one.
        """
        if self.writes and not self.skipped and self._due(self.done, self.settings.checkpointing_steps):
            self._save(self.done)
        if self.writes:
            self._draw(self.done)

    def end(self) -> None:
        """A checkpoint, wherever the run was stopped; if it is finished, the result and the curve."""
        if not self.writes:
            return
        done, skipped = self.done, self.skipped
        finished = done == self.total
        if skipped:
            print(f"Note: the last {skipped} updates had no finite loss and gradient, and were skipped.", file=sys.stderr)
        if done != self.saved and (finished or not skipped):
            self._save(done)
        if not finished:
            print(f"Stopped after {done} updates. Go on with --resume_from_checkpoint latest.", file=sys.stderr)
            return
        with self._writing("the result"):
            checkpoint.publish(self.folder, self._result)
            checkpoint.prune(self.folder, self.settings.checkpoints_total_limit, done)  # if a disk that was full kept one
            if self.metrics:  # none where a finished run is resumed and they were lost
                loss_curve(self.metrics, self.folder / "loss.png")

    def _check_gradients(self) -> None:
        """A tensor without a gradient would silently stay what it is."""
        moved = self.early.norms if self.early else {}
        without = [name for name, p in self.job.trainable.items() if p.grad is None and p not in moved]
        if without:
            raise RuntimeError(f"{len(without)} of {len(self.job.trainable)} trainable tensors got no gradient: {without[:5]}")

    def _give_up(self, update: Update) -> None:
        """End a run whose numbers stay broken, with the first module or data and the first gradient that broke."""
        own = distributed.own_share(self.job, self.world, self.settings.train_batch_size)
        assert isinstance(own, Job)
        samples, broken = culprit(own, self.settings, self.loop, update.done - 1)
        grads = {name: p.grad for name, p in self.job.trainable.items() if p.grad is not None}
        tensor = next((name for name, g in grads.items() if not g.isfinite().all()), "no tensor")
        often = f"{self.skipped} updates in a row" if self.skipped > 1 else "The only update was"
        raise MinidiffError(
            f"{often} without a finite loss and gradient (step {update.done}: loss {update.loss}, learning rate "
            f"{update.lr:g}, {samples}). The first to break is {broken}, and the first broken gradient is that of "
            f"{tensor}.{self._advice()}"
        )

    def _save(self, done: int) -> None:
        """A checkpoint, unless the weights themselves are broken: then the last good one stays the last."""
        broken = [name for name, p in self.job.trainable.items() if not p.isfinite().all()]
        if broken:
            raise MinidiffError(f"After step {done}, {broken[0]} holds NaN or infinity.{self._advice()}")
        tensors: checkpoint.Groups = {"weights": dict(self.job.trainable), "optimizer": optimizer_state(self.optimizer)}
        if self.ema:
            tensors["ema"] = self.ema.average
        facts = {"made_of": self.made_of}
        with self._writing(f"the checkpoint of step {done}"):
            fsync(self.folder / METRICS)
            checkpoint.save(self.folder, done, tensors, facts, self._export, self.settings.checkpoints_total_limit)
        self.saved = done

    def _due(self, done: int, every: int) -> bool:
        """After every so many updates and at the end; 0: never."""
        return every > 0 and (done % every == 0 or done == self.total)

    def _draw(self, done: int) -> None:
        """A sample sheet, if it is due."""
        if not self._due(done, self.settings.validation_steps):
            return
        with self._averaged():
            image = self.job.preview(done)
        if image is not None:
            save_png(image, self._sheet(done))

    def _sheet(self, done: int) -> Path:
        return self.folder / "samples" / f"step-{done:06d}.png"

    def _export(self, folder: Path) -> None:
        with self._averaged():
            self.job.export(folder)

    def _result(self, folder: Path) -> None:
        self._export(folder)
        self.job.card(folder)

    def _averaged(self) -> AbstractContextManager[None]:
        return self.ema.applied() if self.ema else nullcontext()

    def _advice(self) -> str:
        good = checkpoint.latest(self.folder)
        kept = f"The last good checkpoint is {good}." if good else "No checkpoint had been saved yet."
        return f" Nothing was saved over. {kept} Try a lower --learning_rate, or --mixed_precision no."

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


# --- around the loop ---------------------------------------------------------------------------------------------------


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, up to a line that a killed process or a power cut left broken."""
    path, rows = folder / METRICS, []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            break
        if not all(value is None or type(value) in (int, float) for value in row.values()):
            break
        rows.append(row)
    return rows


@contextmanager
def progress(start: int, total: int, show: bool) -> Iterator[Callable[[float], float]]:
    """A bar on stderr: updates, rate, time left, and the mean loss of the last twenty, which is returned."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    recent: deque[float] = deque(maxlen=20)
    seconds = 0.1 if sys.stderr.isatty() else 10.0  # in a log file, a line now and then
    with tqdm(
        initial=start, total=total, unit="step", dynamic_ncols=True, mininterval=seconds, file=sys.stderr, disable=not show
    ) as bar:

        def step(loss: float) -> float:
            if math.isfinite(loss):
                recent.append(loss)
            mean = sum(recent) / len(recent) if recent else math.nan
            bar.set_postfix_str(f"loss {mean:.4f}", refresh=False)
            bar.update()
            return mean

        yield step
