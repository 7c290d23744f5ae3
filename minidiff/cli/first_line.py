"""The first line of a command that draws or trains: model, size, device, number format, steps, and about how long it takes."""

import sys
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from minidiff.core.train import DTYPES

LARGE = 50_000_000  # parameters of a U-Net that was not made for teaching alone


class Enough(Exception):
    """The measure is over."""


def measured(run: Callable[[Callable[[Any], None]], object]) -> tuple[float, Any]:
    """Seconds of a step: the least of three, or of two if they take long. `run` calls its argument with each step; the last
    one is returned, too."""
    marks, steps = [perf_counter()], list[Any]()

    def mark(step: Any) -> None:
        marks.append(perf_counter())
        steps.append(step)
        if len(steps) == 3 or marks[-1] - marks[0] > (1 if len(steps) == 2 else 20):
            raise Enough

    with suppress(Enough):
        run(mark)
    return min(b - a for a, b in zip(marks, marks[1:])), steps[-1]


def duration(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds > 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"


def line(name: str, unet: nn.Module, latents: Tensor, cell: int, dtype: torch.dtype, work: str, seconds: float) -> None:
    """Print it on stderr, above a progress bar. `cell`: pixels of a latent cell's side."""
    height, width = (cell * side for side in latents.shape[-2:])
    small = ", a small teaching model" if sum(p.numel() for p in unet.parameters()) < LARGE else ""
    where = f"{next(unet.parameters()).device.type}, {str(dtype).removeprefix('torch.')}"
    tqdm.write(f"{name}{small}: {width} x {height} pixels, {where}, {work}, about {duration(seconds)}", file=sys.stderr)


def of_drawing(pipe: Any, s: Any, pictures: int, draw: Callable[..., object]) -> None:
    """For so many pictures; `draw(callback)` draws one of them."""
    bar, pipe.progress_bar = pipe.progress_bar, False
    seconds, step = measured(draw)
    pipe.progress_bar = bar
    of, by = (f" of {s.num_inference_steps}", " (--strength)") if s.image and step.total < s.num_inference_steps else ("", "")
    work = f"{step.total}{of} steps of {s.sampler or pipe.sampler}{by}{f', {pictures} pictures' * (pictures > 1)}"
    line(pipe.name_or_path, pipe.unet, step.x, pipe.downscale, pipe.dtype, work, seconds * step.total * pictures)


def of_training(task: Any, s: Any) -> None:
    """The time is that of three forward passes for each update, as the backward pass takes two, and that of the sheets."""
    batch, unet, dtype = task.batch(0, 0), task.modules["unet"], DTYPES[s.mixed_precision]
    device = next(unet.parameters()).device
    updates, samples = s.updates(task.samples_per_epoch), s.train_batch_size * s.gradient_accumulation_steps
    cast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def run(mark: Callable[[Any], None]) -> None:
        with torch.no_grad(), cast:
            while True:
                mark(float(task.loss(batch, 0, 0)))

    forward, drawn = measured(run)[0], max(len(s.validation_prompt), 1) * s.num_validation_images
    every = s.validate_every(task.samples_per_epoch)
    sheets = -(-updates // every) * drawn * s.validation_inference_steps if every else 0
    seconds = forward * (3 * updates * s.gradient_accumulation_steps + 2 * sheets / s.train_batch_size)
    epochs = updates * samples / task.samples_per_epoch
    pictures = f"{task.samples_per_epoch} picture{'s'[: task.samples_per_epoch != 1]}"
    work = f"{pictures}, {updates} updates of {samples} = {epochs:.3g} epochs"
    cell = task.beside["VAE"].config.downscale
    line(s.pretrained_model_name_or_path, unet, batch["latents"], cell, dtype, work, seconds)
