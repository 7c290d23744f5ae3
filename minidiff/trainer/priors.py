"""DreamBooth's second half (arXiv 2208.12242, section 3.2): the model must not forget the class of the subject.

    batch = B samples of the instance, then B of the class      -> losses.prior_preservation

    with class pictures    drawn once by the base model; the class half is noise on these         `PairedData`
    from the base itself   the class half is other noise on the instance's latents, under the
                           class prompt, and its target is what the base model predicts there     `BasePrior`

The paper has the first alone. The second is distillation from the model before training, as in Learning without Forgetting
(arXiv 1606.09282, section 3), which asks an old model about new pictures in the same way.

Shapes: B samples of each half, C h w a latent, L tokens, D width of the text.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidiff.core.errors import DataError
from minidiff.core.rng import generator, hashed_seed, normal
from minidiff.core.train import DTYPES
from minidiff.draw.images import generation_text, read_png_text, save_png
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.draw.progress import progress
from minidiff.draw.prompting import literal
from minidiff.trainer import distributed
from minidiff.trainer.dataset import Example, is_picture, read_folder
from minidiff.trainer.latents import LatentData, fingerprint
from minidiff.trainer.settings import FineTuneSettings


def class_examples(pipe: StableDiffusionPipeline, settings: FineTuneSettings, side: int) -> list[Example]:
    """The pictures in --class_data_dir under --class_prompt; the model, which must still be the base, draws missing ones.

    Picture i is drawn from a seed of its own and written whole, so an interrupted call goes on where it stopped.
    """
    s, folder, prompt = settings, Path(settings.class_data_dir or ""), settings.class_prompt or ""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; --class_data_dir is the folder of the class pictures.")
    have = sorted(filter(is_picture, folder.iterdir())) if folder.exists() else []
    if not have and s.num_class_images == 0:
        raise DataError(f"{folder} has no class pictures, and --num_class_images 0 draws none; give a number, such as 100.")
    for path in have:
        was = read_png_text(path).get("parameters", "").rpartition("\n")[0] if path.name.startswith("class-") else ""
        if was and was != prompt:
            hint = "Give that prompt, or another --class_data_dir."
            raise DataError(f'{path} was drawn for "{was}", and --class_prompt is "{prompt}". {hint}')
    if distributed.world().rank == 0:  # the first process draws for all
        files = [folder / f"class-{i:05d}.png" for i in range(s.num_class_images)]
        files = [file for file in files if not file.exists()][: max(0, s.num_class_images - len(have))]
        dtype = DTYPES[s.prior_generation_precision.replace("fp32", "no")]
        batches = [files[k : k + s.sample_batch_size] for k in range(0, len(files), s.sample_batch_size)]
        for some in progress(batches, "batch", "drawing class pictures", show=bool(files)):
            numbers = (int(file.stem[-5:]) for file in some)
            seeds = [hashed_seed(s.seed, "class picture", i) % 2**32 for i in numbers]  # 32 bits, as in other programs
            steps, scale = s.validation_inference_steps, s.validation_guidance_scale
            prompts = [literal(prompt)] * len(some)
            with torch.autocast(pipe.device.type, dtype, enabled=dtype != torch.float32):
                drawn = pipe(prompts, seed=seeds, guidance_scale=scale, num_inference_steps=steps, width=side, height=side)
            for file, seed, image in zip(some, seeds, drawn.images):
                how = {"Steps": steps, "CFG scale": scale, "Seed": seed}
                save_png(image, file, {"parameters": generation_text(prompt, "", how)})
    distributed.world().wait()
    return read_folder(folder, prompt, captions=False)


class PairedData:
    """Instance and class pictures: each half goes through its own pictures at its own pace, the shorter one more often.

    Their data have different seeds, else both halves would get the same noise.
    """

    def __init__(self, instance: LatentData, prior: LatentData) -> None:
        self.instance, self.prior = instance, prior

    @property
    def facts(self) -> dict[str, Any]:
        """Facts about the data. A resumed run must have the same."""
        pictures = self.prior.examples
        return self.instance.facts | {"class_pictures": len(pictures), "class_data": fingerprint(pictures)}

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        """As `LatentData.batch`, with 2B rows."""
        instance, prior = self.instance.batch(step, micro), self.prior.batch(step, micro)
        return {name: torch.cat([instance[name], prior[name]]) for name in instance}


class BasePrior:
    """Prior preservation without class pictures: the class half is the same latents, with other noise and timesteps.

    `class_prompt` is the class prompt as `instance.encode` gives it: one row of text or ids.
    """

    def __init__(self, instance: LatentData, class_prompt: dict[str, Tensor]) -> None:
        self.instance, self.class_prompt = instance, {name: row.detach().cpu() for name, row in class_prompt.items()}
        self.facts = instance.facts

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        """As `LatentData.batch`, with 2B rows. The target of the last B comes from core/recipes.py."""
        batch, numbers = self.instance.batch(step, micro), self.instance.numbers(step, micro)
        seed, shape, T = self.instance.settings.seed, batch["latents"].shape[1:], self.instance.timesteps
        prior = batch | {
            "noise": torch.stack([normal(shape, seed, "prior noise", n) for n in numbers]),
            "t": torch.stack([torch.randint(T, (), generator=generator(seed, "prior t", n)) for n in numbers]),
            "mask": torch.ones(len(numbers), 1, *shape[1:]),
            **{name: row.expand(len(numbers), *row.shape[1:]) for name, row in self.class_prompt.items()},
        }
        return {name: torch.cat([rows, prior[name]]) for name, rows in batch.items()}
