"""Settings of every recipe for the tiny model and three tiny pictures, and the models before and after."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.trainer.recipes import RECIPES
from minidiff.trainer.run import fit
from minidiff.trainer.settings import (
    DreamBoothSettings,
    FineTuneSettings,
    FullSettings,
    LoRASettings,
    PivotalSettings,
    TextualInversionSettings,
)
from minidiff.trainer.task import Job

SKS = {"instance_prompt": "a photo of a sks dog"}
WORD = {"placeholder_token": "<dog>", "initializer_token": "dog", "learning_rate": 1e-2, "num_vectors": 2}
PRIOR = {"with_prior_preservation": True, "class_prompt": "a photo of a dog", "prior_from_base": True}
METHODS: dict[str, FineTuneSettings] = {
    "full": FullSettings(**SKS),
    "full, text encoder too": FullSettings(**SKS, train_text_encoder=True),
    "dreambooth": DreamBoothSettings(**SKS, **PRIOR),
    "lora": LoRASettings(**SKS, learning_rate=1e-2, rank=2),
    "lora, text encoder too": LoRASettings(**SKS, learning_rate=1e-2, rank=2, train_text_encoder=True),
    "dora": LoRASettings(**SKS, learning_rate=1e-2, rank=2, use_dora=True, lora_targets=("attention", "resnets")),
    "textual inversion": TextualInversionSettings(**WORD),
    "pivotal": PivotalSettings(**WORD, rank=2),
}  # fmt: skip


def draw_pictures(folder: Path) -> Path:
    """Three pictures of noise that are not square."""
    folder.mkdir(parents=True)
    for i in range(3):
        Image.effect_noise((40, 32), 60 + 20 * i).convert("RGB").save(folder / f"picture-{i}.png")
    return folder


def tiny(method: str, base: Path, pictures: Path, output: Path, **changes: Any) -> Any:
    """A short run: three updates of two samples at 16 pixels."""
    few = {"max_train_steps": 3, "validation_steps": 0, "train_batch_size": 2, "resolution": 16, "device": "cpu"}
    few |= {"num_validation_images": 1, "validation_inference_steps": 2, "num_class_images": 3}
    here = {"pretrained_model_name_or_path": str(base), "instance_data_dir": str(pictures), "output_dir": str(output)}
    return replace(METHODS[method], **{**few, **here, **changes})


def train(settings: FineTuneSettings) -> Job:
    """The recipe, trained to its end."""
    task = RECIPES[type(settings)](settings)
    assert fit(task, settings).finished
    return task


def base_of(settings: FineTuneSettings) -> StableDiffusionPipeline:
    """The base, loaded anew."""
    pipe = StableDiffusionPipeline.from_pretrained(settings.pretrained_model_name_or_path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def trained(task: Job, settings: FineTuneSettings) -> StableDiffusionPipeline:
    """The networks as training left them, in memory; a text encoder that was put away is the base's."""
    pipe = base_of(settings)
    for name, network in task.modules.items():
        if not next(network.parameters()).is_meta:
            setattr(pipe, name, network.eval())
    return pipe


def loaded(folder: Path, settings: FineTuneSettings) -> StableDiffusionPipeline:
    """What a user has who loads the files of a run."""
    if (folder / "model_index.json").is_file():
        pipe = StableDiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        return pipe
    pipe = base_of(settings)
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        pipe.load_lora_weights(folder)
    if (folder / "learned_embeds.safetensors").is_file():
        pipe.load_textual_inversion(folder)
    return pipe


def picture(pipe: StableDiffusionPipeline, prompt: str | None) -> Tensor:
    """A latent drawn in two steps."""
    latents: Tensor = pipe(prompt or "", seed=0, num_inference_steps=2, width=16, height=16, output_type="latent").images
    return latents


def numbers(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor, under the names of the model without adapters and new words."""
    return {name.replace(".base.", "."): t.clone() for name, t in model.state_dict().items() if not added(name)}


def added(name: str) -> bool:
    return ".lora_" in name or ".vectors." in name


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
