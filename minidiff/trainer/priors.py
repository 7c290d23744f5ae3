"""DreamBooth's second half (arXiv 2208.12242, section 3.2): the model must not forget the class of the subject.

    batch = B samples of the instance, then B of the class      -> losses.prior_preservation

    with class pictures    drawn once by the base model; the class half is noise on these         `paired`
    from the base itself   the class half is other noise on the instance's latents, under the
                           class prompt, and its target is what the base model predicts there     `paired_by_base`

The paper has the first alone. The second is distillation from the model before training, as in Learning without Forgetting
(arXiv 1606.09282, section 3), which asks an old model about new pictures in the same way.

Shapes: B samples of each half, C h w a latent, L tokens, D width of the text.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minidiff.core.errors import DataError
from minidiff.core.rng import generator, hashed_seed, normal
from minidiff.core.train import DTYPES
from minidiff.draw.images import generation_text, read_png_text, save_png
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.draw.progress import progress
from minidiff.draw.prompting import literal
from minidiff.trainer import distributed
from minidiff.trainer.dataset import Example, is_picture, read_folder
from minidiff.trainer.latents import LatentData, Tensors, fingerprint
from minidiff.trainer.pictures import check_pictures
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


def paired(instance: LatentData, prior: LatentData, step: int, micro: int) -> Tensors:
    """`LatentData.batch` with 2B rows: each half goes through its own pictures at its own pace, the shorter one more often.

    The data have different seeds, else both halves would get the same noise.
    """
    first, second = instance.batch(step, micro), prior.batch(step, micro)
    return {name: torch.cat([first[name], second[name]]) for name in first}


def paired_by_base(instance: LatentData, class_prompt: Tensors, step: int, micro: int) -> Tensors:
    """`LatentData.batch` with 2B rows: the class half is the same latents, with other noise and timesteps.

    `class_prompt` is one row of text or ids. The target of the class half comes from core/recipes.py.
    """
    batch, numbers = instance.batch(step, micro), instance.numbers(step, micro)
    seed, shape, T = instance.settings.seed, batch["latents"].shape[1:], instance.timesteps
    prior = batch | {
        "noise": torch.stack([normal(shape, seed, "prior noise", n) for n in numbers]),
        "t": torch.stack([torch.randint(T, (), generator=generator(seed, "prior t", n)) for n in numbers]),
        "mask": torch.ones(len(numbers), 1, *shape[1:]),
        **{name: row.expand(len(numbers), *row.shape[1:]) for name, row in class_prompt.items()},
    }
    return {name: torch.cat([rows, prior[name]]) for name, rows in batch.items()}


def has_prior(settings: FineTuneSettings) -> bool:
    """Weight 0 is the plain loss: then the class half is not computed at all."""
    return settings.with_prior_preservation and settings.prior_loss_weight > 0


def with_prior(pipe: StableDiffusionPipeline, data: LatentData) -> tuple[Callable[[int, int], Tensors], dict[str, Any]]:
    """Batches and facts of the data, with the class half if the settings ask for one. The model must still be the base."""
    s, side = data.settings, data.resolution
    if not has_prior(s):
        return data.batch, data.facts
    if s.prior_from_base:
        class_prompt = {name: row.detach().cpu() for name, row in data.encode([s.class_prompt or ""]).items()}
        return partial(paired_by_base, data, class_prompt), data.facts
    examples = check_pictures(class_examples(pipe, s, side), [(side, side)], s.skip_bad)
    prior = data.of(examples, replace(s, seed=hashed_seed(s.seed, "class half")))
    return partial(paired, data, prior), data.facts | {"class_pictures": len(examples), "class_data": fingerprint(examples)}
