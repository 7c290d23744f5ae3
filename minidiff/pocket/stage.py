"""Code that the stages of pretraining share: the drawn world on disk, the results of earlier stages, a run on the loop.

N pictures   B batch
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidiff.core.errors import SettingsError
from minidiff.core.rng import generator
from minidiff.core.train import Batch
from minidiff.draw.device import chosen_device
from minidiff.draw.progress import progress
from minidiff.files import weights
from minidiff.files.atomic import whole_file
from minidiff.pocket.settings import PretrainSettings, Stage
from minidiff.pocket.world import Picture, draw, random_picture
from minidiff.trainer.run import fit
from minidiff.trainer.settings import TrainSettings
from minidiff.trainer.task import Job


@dataclass(frozen=True)
class World:
    """The training pictures: what is on them, and their pixels (N, 128, 128, 3), uint8, left on disk."""

    pictures: list[Picture]
    pixels: np.ndarray

    def batch(self, indices: list[int]) -> Tensor:
        """(B, 3, 128, 128) in [-1, 1]."""
        rows = torch.from_numpy(np.stack([self.pixels[i] for i in indices]))
        return rows.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def load_world(settings: PretrainSettings) -> World:
    """Picture i is `random_picture(Random(i))`, drawn with seed i; drawn once, then read from `world.npy`."""
    path, count = settings.home / "world.npy", settings.pictures
    pictures = [random_picture(random.Random(i)) for i in range(count)]
    if not path.exists():
        draw_all(pictures, path)
    pixels = np.load(path, mmap_mode="r")
    if len(pixels) < count:
        raise SettingsError(f"{path} holds {len(pixels)} pictures, --pictures asks for {count}; delete it to draw it again.")
    return World(pictures, pixels[:count])


def draw_all(pictures: list[Picture], path: Path) -> None:
    """Draw every picture into one file, which appears under its name when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"descr": "|u1", "fortran_order": False, "shape": (len(pictures), 128, 128, 3)}
    with whole_file(path) as file:  # not mapped into memory: on a full disk that ends the process without a word
        np.lib.format.write_array_header_1_0(file, about)
        for i, picture in enumerate(progress(pictures, "picture", "drawing")):
            file.write(np.asarray(draw(picture, i)).tobytes())


def chosen(settings: PretrainSettings, stage: str, step: int, batch: int) -> list[int]:
    """The pictures of one update: a function of the seed, the stage and the step."""
    return torch.randint(settings.pictures, (batch,), generator=generator(settings.seed, stage, step)).tolist()


def run(task: Job, settings: PretrainSettings, stage: Stage, steps: int, batch: int, warmup: int = 100) -> None:
    """One stage on the training loop, in a folder of its own; picks up its latest checkpoint."""
    device = chosen_device(settings.device)

    def loss(data: Batch, step: int, micro: int) -> Tensor:
        return task.loss({key: value.to(device, non_blocking=True) for key, value in data.items()}, step, micro)

    loop = TrainSettings(
        output_dir=str(settings.home / stage),
        resume_from_checkpoint="latest",
        seed=settings.seed,
        train_batch_size=batch,
        max_train_steps=steps,
        lr_scheduler="linear",
        lr_warmup_steps=min(warmup, steps // 2),
        checkpointing_steps=200,
        validation_steps=400,
        mixed_precision=settings.sizes.mixed_precision,
    )
    facts = {"init_from": settings.init_from, "pictures": settings.pictures}
    if not fit(replace(task, loss=loss, facts=facts), loop).finished:
        raise KeyboardInterrupt  # asked to stop: the stages after this one need its result


def begun(model: Any, settings: PretrainSettings, part: str) -> Any:
    """The new model on its device, with the weights of `init_from` if that is given."""
    if settings.init_from:
        weights.load_into(model, weights.find_weights(Path(settings.init_from) / part), torch.float32)
    return model.to(chosen_device(settings.device))


def first_of(settings: PretrainSettings, part: str, *names: str) -> Path:
    """The first of these files that an earlier stage wrote, or else the one of `init_from`."""
    files = [settings.home / name for name in names]
    if written := [path for path in files if path.exists()]:
        return written[0]
    if settings.init_from is None:
        raise SettingsError(f"--stages: {files[-1]} is missing; the stage that writes it has to run first.")
    return weights.find_weights(Path(settings.init_from) / part)


def tokenizer_folder(settings: PretrainSettings) -> Path:
    return Path(settings.init_from or settings.output_dir) / "tokenizer"
