"""Code that the stages of pretraining share: one way to run a task on the training loop, and to choose and move its data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minidiff.core.errors import SettingsError
from minidiff.core.rng import generator
from minidiff.core.train import Batch
from minidiff.draw.device import chosen_device
from minidiff.files import weights
from minidiff.pocket.settings import PretrainSettings, Stage
from minidiff.trainer.run import fit
from minidiff.trainer.settings import TrainSettings
from minidiff.trainer.task import Job


def run(task: Job, settings: PretrainSettings, stage: Stage, steps: int, batch: int, warmup: int = 100) -> None:
    """One stage on the training loop, in a folder of its own; picks up its latest checkpoint."""
    device = chosen_device(settings.device)

    def loss(data: Batch, step: int, micro: int) -> torch.Tensor:
        return task.loss({key: value.to(device, non_blocking=True) for key, value in data.items()}, step, micro)

    loop = TrainSettings(
        output_dir=str(Path(settings.output_dir) / stage),
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


def first_of(files: list[Path], settings: PretrainSettings, part: str) -> Path:
    """The first file that an earlier stage wrote, or else the one in `init_from`."""
    if written := [path for path in files if path.exists()]:
        return written[0]
    if settings.init_from is None:
        raise SettingsError(f"--stages: {files[-1]} is missing; the stage that writes it has to run first.")
    return weights.find_weights(Path(settings.init_from) / part)


def chosen(settings: PretrainSettings, stage: str, step: int, batch: int) -> list[int]:
    """The pictures of one update: a function of the seed, the stage and the step."""
    return torch.randint(settings.pictures, (batch,), generator=generator(settings.seed, stage, step)).tolist()


def tokenizer_folder(home: Path, settings: PretrainSettings) -> Path:
    return Path(settings.init_from or home) / "tokenizer"
