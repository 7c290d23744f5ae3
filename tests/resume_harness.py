"""What a run must survive, for any task: stopped and resumed, it ends with the bytes of a run that never stopped.

A `Case` is a task and its settings, made anew for each session as a new process would. Tests of a new recipe add a case
and call `check_exact_resume`; test_kill.py and test_faults.py kill and starve the same cases.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_sizes import TINY_VAE
from torch import Tensor, nn

from minidiff.core.rng import hashed_seed, normal
from minidiff.core.vae import AutoencoderKL
from minidiff.files import weights
from minidiff.pocket.muon import Muon
from minidiff.trainer import checkpoint
from minidiff.trainer.dataset import read_folder
from minidiff.trainer.latents import LatentData
from minidiff.trainer.run import Report, fit, read_metrics
from minidiff.trainer.settings import FineTuneSettings, TrainSettings
from minidiff.trainer.task import Job

PATHS = {"train_config.toml", "metrics.jsonl", ".lock"}  # these hold paths or times; rows of metrics are compared apart


@dataclass(frozen=True)
class Case:
    """A task that can be made again and again, and the settings of its runs but for the folder."""

    make: Callable[[Any], Job]
    settings: TrainSettings

    def changed(self, **changes: Any) -> "Case":
        return replace(self, settings=replace(self.settings, **changes))

    def run(self, folder: Path) -> Report:
        """One session, from the latest checkpoint if there is one."""
        settings = replace(self.settings, output_dir=str(folder), resume_from_checkpoint="latest")
        return fit(self.make(settings), settings)

    def broken_run(self, folder: Path, step: int) -> None:
        """A session that ends in a crash when it wants the data of `step`."""
        settings = replace(self.settings, output_dir=str(folder), resume_from_checkpoint="latest")
        task = self.make(settings)
        plain = task.batch

        def batch(now: int, micro: int) -> dict[str, Tensor]:
            if (now, micro) == (step, settings.gradient_accumulation_steps - 1):
                raise Crash
            return plain(now, micro)

        try:
            fit(replace(task, batch=batch), settings)
        except Crash:
            return
        raise AssertionError(f"the run never came to step {step}")


class Crash(Exception):
    pass


def fingerprint(folder: Path) -> dict[str, str]:
    """sha256 of every file of a run: the result, all state in its checkpoints, sheets."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in PATHS)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(folder)]


def check_exact_resume(case: Case, home: Path, stops: Sequence[int]) -> None:
    """A run that crashes in each of the updates `stops`, counted from 0, ends as one that never does: files and metrics."""
    straight, broken = home / "straight" / "run", home / "broken" / "run"  # of one name, as results may be called after it
    assert case.run(straight).finished
    for step in stops:
        case.broken_run(broken, step)
    assert case.run(broken).finished
    assert fingerprint(broken) == fingerprint(straight)
    assert rows(broken) == rows(straight)


def check_whole(folder: Path) -> int:
    """Every visible checkpoint verifies; how many there are."""
    return len([checkpoint.verify(path) for path in checkpoint.checkpoints(folder)]) if folder.exists() else 0


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is one: a thousand fsyncs on a disk take minutes."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


# --- two tiny tasks --------------------------------------------------------------------------------------------------


def numbers(settings: TrainSettings, optimizer: str = "adamw") -> Job:
    """y = W x, with dropout, from numbered samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.Linear(6, 1))
    truth = torch.tensor([[1.0], [-2.0], [3.0], [0.5]])
    accumulation, size = settings.gradient_accumulation_steps, settings.train_batch_size

    def batch(step: int, micro: int) -> dict[str, Tensor]:
        first = (step * accumulation + micro) * size
        return {"x": torch.stack([normal((4,), settings.seed, "x", i) for i in range(first, first + size)])}

    def loss(batch: dict[str, Tensor], step: int, micro: int) -> Tensor:
        return (model(batch["x"]) - batch["x"] @ truth).square().mean()

    matrices, vectors = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    return Job(
        trainable=dict(model.named_parameters()),
        batch=batch,
        loss=loss,
        export=lambda folder: weights.save(model.state_dict(), folder / "model.safetensors"),
        preview=lambda done: Image.new("RGB", (4, 4), (done, 0, 0)),
        validate=lambda: {"val_loss": model[0].weight.square().mean().item()},
        facts={"data": "numbers"},
        optimizer=Muon(matrices, vectors, lr=0.02, adam_lr=0.02) if optimizer == "muon" else None,  # type: ignore[arg-type]
        modules={"model": model},
    )


def draw_pictures(folder: Path) -> Path:
    """Five small pictures that are not square, so that an epoch of five is no multiple of a batch."""
    folder.mkdir(parents=True)
    for i in range(5):
        Image.effect_noise((20 + i, 16), 60 + i).convert("RGB").save(folder / f"{i}.png")
    return folder


def pictures(settings: FineTuneSettings) -> Job:
    """A linear denoiser of latents, from picture files that are read at every step, perhaps in threads."""
    torch.manual_seed(hashed_seed(settings.seed, "vae"))
    vae = AutoencoderKL(TINY_VAE).requires_grad_(False)
    examples = read_folder(Path(settings.instance_data_dir or ""), settings.instance_prompt)
    data = LatentData(examples, settings, 16, vae, lambda prompts: {"text": torch.ones(len(prompts), 2, 4)}, 1000)
    side = data.batch(0, 0)["latents"].shape[1:]
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(side.numel(), side.numel()))

    def loss(batch: dict[str, Tensor], step: int, micro: int) -> Tensor:
        return (model(batch["latents"]) - batch["noise"].flatten(1)).square().mean()

    return Job(
        trainable=dict(model.named_parameters()),
        batch=data.batch,
        loss=loss,
        export=lambda folder: weights.save(model.state_dict(), folder / "model.safetensors"),
        facts=data.facts,
        samples_per_epoch=data.samples_per_epoch,
    )


NUMBERS = Case(
    numbers,
    TrainSettings(
        max_train_steps=6, checkpointing_steps=2, validation_steps=3, train_batch_size=4, learning_rate=0.05, use_ema=True
    ),
)


def picture_case(folder: Path) -> Case:
    """Five updates of two pictures and more, so that an epoch of five ends within an update."""
    settings = FineTuneSettings(
        instance_data_dir=str(folder),
        instance_prompt="a sks dog",
        cache_latents=False,
        center_crop=False,
        random_flip=True,
        train_batch_size=2,
        max_train_steps=5,
        checkpointing_steps=2,
        validation_steps=0,
        lr_scheduler="cosine",
        learning_rate=0.01,
        device="cpu",
    )
    return Case(pictures, settings)

