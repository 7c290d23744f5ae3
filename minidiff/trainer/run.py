"""The files of a run, and what a person is told: state in and out, metrics, previews, the result, the last words.

With several processes only the first writes; the others read the checkpoint that all go on from.
"""

import json
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minidiff.core.errors import MinidiffError, SettingsError, WeightsError
from minidiff.draw.images import save_png
from minidiff.files.atomic import fsync, write_bytes
from minidiff.trainer import checkpoint
from minidiff.trainer.distributed import World
from minidiff.trainer.optimizers import EMA, Movement, load_optimizer_state, optimizer_state
from minidiff.trainer.plot import loss_curve
from minidiff.trainer.settings import TrainSettings

if TYPE_CHECKING:
    from minidiff.core.train import Task

METRICS = "metrics.jsonl"
PATIENCE = 3  # updates in a row without a finite loss and gradient end a run


class Run:
    """One call of `fit`: `total` updates in all, of which earlier sessions may have made some."""

    def __init__(
        self,
        task: "Task",
        settings: TrainSettings,
        total: int,
        optimizer: torch.optim.Optimizer,
        ema: EMA | None,
        world: World,
    ) -> None:
        self.task, self.settings, self.total, self.optimizer, self.ema = task, settings, total, optimizer, ema
        self.writes = world.rank == 0
        self.folder = Path(settings.output_dir)
        self.made_of = json.loads(json.dumps({**settings.identity(total), **task.facts}))
        self.movement = Movement(task.trainable)  # from the very start: `resume` comes later
        self.metrics: list[dict[str, Any]] = []
        self.saved = 0  # the step of the newest checkpoint

    def claimed(self) -> AbstractContextManager[Path | None]:
        """The output folder, for this run alone."""
        return checkpoint.claimed(self.settings) if self.writes else nullcontext()

    def resume(self) -> int:
        """Put everything back as the checkpoint has it; the number of updates already made."""
        path, done = checkpoint.find(self.settings), 0
        if path is not None:
            done = self._restore(checkpoint.load(path))
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

    def _restore(self, saved: checkpoint.Checkpoint) -> int:
        checkpoint.check_same(saved.facts["made_of"], self.made_of, saved.path)
        if saved.step > self.total:
            raise SettingsError(f"--max_train_steps: {saved.path} is further already than the {self.total} updates in all.")
        kinds = {name: (p.shape, p.dtype) for name, p in self.task.trainable.items()}
        for group in ("weights", "ema") if self.ema else ("weights",):
            if {name: (t.shape, t.dtype) for name, t in saved.tensors.get(group, {}).items()} != kinds:
                raise WeightsError(f"{saved.path} holds other {group} than this task trains; take another --output_dir.")
        try:
            load_optimizer_state(self.optimizer, saved.tensors["optimizer"])
        except WeightsError as error:
            raise WeightsError(f"{saved.path}: {error}; take another --output_dir.") from error
        for name, p in self.task.trainable.items():
            p.data.copy_(saved.tensors["weights"][name])
        if self.ema:
            self.ema.load(saved.tensors["ema"])
        for what, now in checkpoint.environment().items() if self.writes else []:
            if (was := saved.facts["environment"].get(what, now)) != now:
                print(f"Note: {what} was {was}, is now {now}: the result can differ in its last bits.", file=sys.stderr)
        self.saved = saved.step
        return saved.step

    def measure(self, done: int) -> dict[str, float]:
        """What the task measures after `done` updates, and how far the weights have gone; nothing where it is not asked for."""
        if not self.writes or not self._due(done, self.settings.validation_steps):
            return {}
        with self._averaged():
            return {"moved": self.movement.rms(), **(self.task.validate() if self.task.validate else {})}

    def log(self, **row: float | None) -> None:
        """One line in metrics.jsonl. JSON has no NaN: a number that is not finite is written as null."""
        if not self.writes:
            return
        clean = {k: v if v is not None and math.isfinite(v) else None for k, v in row.items()}
        self.metrics.append(clean)
        with self._writing(METRICS), open(self.folder / METRICS, "a") as file:
            file.write(json.dumps(clean) + "\n")

    def save_and_draw(self, done: int, skipped: int) -> None:
        """A checkpoint and a sample sheet, if they are due after `done` updates.

        While updates are being `skipped`, the weights are perhaps those that broke the loss: no checkpoint then, which
        could push out a good one.
        """
        if self.writes and not skipped and self._due(done, self.settings.checkpointing_steps):
            self._save(done)
        if self.writes:
            self._draw(done)

    def end(self, done: int, skipped: int) -> None:
        """A checkpoint, wherever the run was stopped; if it is finished, the result and the curve."""
        if not self.writes:
            return
        finished = done == self.total
        if skipped:
            print(f"Note: the last {skipped} updates had no finite loss and gradient, and were skipped.", file=sys.stderr)
        if done != self.saved and (finished or not skipped):
            self._save(done)
        if not finished:
            print(f"Stopped after {done} updates. Go on with --resume_from_checkpoint latest.", file=sys.stderr)
            return
        if still := self.movement.still():
            print(f"Note: {len(still)} trained tensors are where they were, such as {still[0]}.", file=sys.stderr)
        with self._writing("the result"):
            checkpoint.publish(self.folder, self._result)
            checkpoint.prune(self.folder, self.settings.checkpoints_total_limit, done)  # if a disk that was full kept one
            if self.metrics:  # none where a finished run is resumed and they were lost
                loss_curve(self.metrics, self.folder / "loss.png")

    def give_up(self, step: int, skipped: int, loss: float, samples: str, culprit: str) -> None:
        """End a run whose numbers stay broken, naming who broke first on the way forward, and on the way back."""
        grads = {name: p.grad for name, p in self.task.trainable.items() if p.grad is not None}
        tensor = next((name for name, g in grads.items() if not g.isfinite().all()), "no tensor")
        often = f"{skipped} updates in a row" if skipped > 1 else "The only update was"
        raise MinidiffError(
            f"{often} without a finite loss and gradient (step {step + 1}: loss {loss}, learning rate "
            f"{self.optimizer.param_groups[0]['lr']:g}, {samples}). The first to break is {culprit}, and the first broken "
            f"gradient is that of {tensor}.{self._advice()}"
        )

    def _save(self, done: int) -> None:
        """A checkpoint, unless the weights themselves are broken: then the last good one stays the last."""
        broken = [name for name, p in self.task.trainable.items() if not p.isfinite().all()]
        if broken:
            raise MinidiffError(f"After step {done}, {broken[0]} holds NaN or infinity.{self._advice()}")
        tensors: checkpoint.Groups = {"weights": dict(self.task.trainable), "optimizer": optimizer_state(self.optimizer)}
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
            image = self.task.preview(done)
        if image is not None:
            save_png(image, self._sheet(done))

    def _sheet(self, done: int) -> Path:
        return self.folder / "samples" / f"step-{done:06d}.png"

    def _export(self, folder: Path) -> None:
        with self._averaged():
            self.task.export(folder)

    def _result(self, folder: Path) -> None:
        self._export(folder)
        self.task.card(folder)

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
