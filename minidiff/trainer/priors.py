"""DreamBooth's second half (arXiv 2208.12242, section 3.2): the model must not forget the class of the subject.

    batch = B samples of the instance, then B of the class      -> losses.prior_preservation

    with class pictures    drawn once by the base model; the class half is noise on these         `PairedData`
    from the base itself   the class half is other noise on the instance's latents, under the
                           class prompt, and its target is what the base model answers there      `BasePrior`

The paper has the first alone. The second is distillation from the model before training, as in Learning without Forgetting
(arXiv 1606.09282, section 3), which asks an old model about new pictures in the same way.

Shapes: B samples of each half, C h w a latent, L tokens, D width of the text.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minidiff.core.errors import DataError
from minidiff.core.rng import generator, hashed_seed, normal
from minidiff.draw.images import generation_text, read_png_text, save_png
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.draw.progress import progress
from minidiff.trainer import distributed
from minidiff.trainer.dataset import PICTURES, Example, read_folder
from minidiff.trainer.latents import LatentData, fingerprint
from minidiff.trainer.settings import FineTuneSettings

DRAWN = "class-{:05d}.png"  # the names of pictures that we drew

# --- class pictures --------------------------------------------------------------------------------------------------


def class_examples(pipe: StableDiffusionPipeline, settings: FineTuneSettings, side: int) -> list[Example]:
    """The pictures in --class_data_dir under --class_prompt; the model, which must still be the base, draws missing ones.

    Picture i is drawn from a seed of its own and written whole, so an interrupted call goes on where it stopped.
    """
    folder, prompt = Path(settings.class_data_dir or ""), settings.class_prompt or ""
    have = _pictures_in(folder)
    if not have and settings.num_class_images == 0:
        raise DataError(f"{folder} has no class pictures, and --num_class_images 0 draws none; give a number, such as 100.")
    _check_prompt(have, prompt)
    free = (i for i in count() if not (folder / DRAWN.format(i)).exists())
    missing = list(islice(free, max(0, settings.num_class_images - len(have))))
    world = distributed.world()
    if world.rank == 0:  # the first process draws for all
        drawn = _drawn(pipe, settings, side, missing)
        for i, image in progress(drawn, "picture", "drawing class pictures", len(missing), show=bool(missing)):
            save_png(image, folder / DRAWN.format(i), {"parameters": _how(settings, i)})
    world.wait()
    return read_folder(folder, prompt)


def _pictures_in(folder: Path) -> list[Path]:
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; --class_data_dir is the folder of the class pictures.")
    files = sorted(folder.iterdir()) if folder.exists() else []
    return [p for p in files if p.suffix.lower() in PICTURES and not p.name.startswith(".")]


def _check_prompt(pictures: list[Path], prompt: str) -> None:
    """Pictures that were drawn for another prompt must not get this one."""
    for path in pictures:
        was = read_png_text(path).get("parameters", "").rpartition("\n")[0] if path.name.startswith("class-") else ""
        if was and was != prompt:
            raise DataError(
                f'{path} was drawn for "{was}", and --class_prompt is "{prompt}". Give that prompt, or another '
                "--class_data_dir."
            )


def _drawn(
    pipe: StableDiffusionPipeline, settings: FineTuneSettings, side: int, numbers: list[int]
) -> Iterator[tuple[int, Image.Image]]:
    """Class pictures, each with its number."""
    for first in range(0, len(numbers), settings.sample_batch_size):
        some = numbers[first : first + settings.sample_batch_size]
        images = pipe(
            [settings.class_prompt or ""] * len(some),
            seed=[class_seed(settings.seed, i) for i in some],
            guidance_scale=settings.validation_guidance_scale,
            num_inference_steps=settings.validation_inference_steps,
            width=side,
            height=side,
        ).images
        yield from zip(some, images)


def class_seed(seed: int, i: int) -> int:
    """The seed of class picture i, in 32 bits, which other programs accept too."""
    return hashed_seed(seed, "class picture", i) % 2**32


def _how(settings: FineTuneSettings, i: int) -> str:
    """How a class picture was drawn, for its file."""
    numbers = {
        "Steps": settings.validation_inference_steps,
        "CFG scale": settings.validation_guidance_scale,
        "Seed": class_seed(settings.seed, i),
        "Model": Path(settings.pretrained_model_name_or_path).name,
    }
    return generation_text(settings.class_prompt or "", "", numbers)


# --- batches of two halves -------------------------------------------------------------------------------------------


def class_settings(settings: FineTuneSettings) -> FineTuneSettings:
    """Settings for the `LatentData` of the class pictures: another seed, else both halves would get the same noise."""
    return replace(settings, seed=hashed_seed(settings.seed, "class half"))


class PairedData:
    """Instance and class pictures: each half goes through its own pictures at its own pace, the shorter one more often."""

    def __init__(self, instance: LatentData, prior: LatentData) -> None:
        self.instance, self.prior = instance, prior

    @property
    def facts(self) -> dict[str, Any]:
        """Facts about the data. A resumed run must have the same."""
        pictures = self.prior.examples
        return self.instance.facts | {"class_pictures": len(pictures), "class_data": fingerprint(pictures)}

    @property
    def used_vae(self) -> bool:
        return self.instance.used_vae or self.prior.used_vae

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        """As `LatentData.batch`, with 2B rows."""
        instance, prior = self.instance.batch(step, micro), self.prior.batch(step, micro)
        return {name: torch.cat([instance[name], prior[name]]) for name in instance}


class BasePrior:
    """Prior preservation without class pictures: the class half is the same latents, with other noise and timesteps.

    `class_prompt` is the class prompt as the data's other prompts are: encoded, (L, D); or token ids (L,).
    """

    def __init__(self, instance: LatentData, class_prompt: Tensor) -> None:
        self.instance, self.class_prompt = instance, class_prompt.detach().cpu()

    @property
    def facts(self) -> dict[str, Any]:
        """Facts about the data. A resumed run must have the same."""
        return self.instance.facts

    @property
    def used_vae(self) -> bool:
        return self.instance.used_vae

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        """As `LatentData.batch`, with 2B rows. The target of the last B comes from core/recipes.py's `base_target`."""
        batch, numbers = self.instance.batch(step, micro), self.instance.numbers(step, micro)
        seed, shape, T = self.instance.settings.seed, batch["latents"].shape[1:], self.instance.timesteps
        words = self.class_prompt.expand(len(numbers), *self.class_prompt.shape)
        prior = {
            "latents": batch["latents"],
            "noise": torch.stack([normal(shape, seed, "prior noise", n) for n in numbers]),
            "t": torch.stack([torch.randint(T, (), generator=generator(seed, "prior t", n)) for n in numbers]),
            "mask": torch.ones(len(numbers), 1, *shape[1:]),
            "text": words,
            "ids": words,
        }
        return {name: torch.cat([rows, prior[name]]) for name, rows in batch.items()}
