"""The ladder: every way of fine-tuning on the same subject, with what it costs and what it does, in one table.

A CLIP image tower looks at the pictures, all drawn from fixed prompts and seeds:

    subject      how like the subject are pictures of it: CLIP-I of DreamBooth (arXiv 2208.12242, section 5.2), the mean
                 cosine similarity of all pairs (drawn picture, training picture)
    forgetting   how far pictures without the subject have moved: 1 - the mean cosine similarity to what the base draws from
                 the same prompt and seed; 0 is a model that forgot nothing

    N pictures   D width of the tower's embedding
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minidiff.core.errors import SettingsError, WeightsError, did_you_mean
from minidiff.draw.images import contact_sheet, load_image, save_png, to_tensor
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.folder import config_of, local_folder
from minidiff.files.lora_file import FILE_NAME as LORA_FILE
from minidiff.files.weights import find_weights, load_into
from minidiff.files.word_file import FILE_NAME as WORD_FILE
from minidiff.pocket.settings import LadderSettings
from minidiff.trainer.dataset import read_folder
from minidiff.trainer.methods import (
    DreamBoothSettings,
    FullSettings,
    LoRASettings,
    PivotalSettings,
    TextualInversionSettings,
)
from minidiff.trainer.recipes import RECIPES
from minidiff.trainer.run import fit, read_metrics
from minidiff.trainer.settings import FineTuneSettings

AnyFineTune = TypeVar("AnyFineTune", bound=FineTuneSettings)

SUBJECT = tuple(f"a photo of a sks dog{where}" for where in ("", " in the snow", " in the city", " on the moon"))
OTHERS = (
    "a photo of a red car on the beach",
    "a photo of a brown dog in the snow",
    "a drawing of a blue cat in a room",
    "a watercolor of a green house in a meadow",
)
SEEDS = (0, 1)
TUNED_FILE = "model_index.json"  # of a whole model
SUBJECTS = len(SUBJECT) * len(SEEDS)  # pictures


@dataclass(frozen=True)
class Row:
    """One rung of the ladder, measured."""

    rung: str
    trainable: int  # parameters
    megabytes: float  # of the result's weight files
    seconds: float  # of training, the base's loading and the encoding of pictures included
    subject: float
    forgetting: float


class ImageTower:
    """CLIP's image tower, `image_encoder/` of a model folder: pictures -> points on a sphere where like lies by like."""

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        if not (folder / "config.json").is_file():
            raise WeightsError(f"{folder}: no image encoder here; the pocket checkpoint has one, SD 1.5 has not.")
        values, where = config_of(folder)
        try:
            self.model = CLIPVisionModelWithProjection(CLIPVisionConfig(**values)).eval()
            self.side = int(self.model.config.image_size)
        except Exception as error:  # whatever transformers makes of numbers that build no network
            raise WeightsError(f"{where}: not a usable image encoder: {error}. Copy the file again.") from error
        load_into(self.model, find_weights(folder), torch.float32)

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, D), rows of length 1. The tower reads [-1, 1], as it was trained (pocket/towers.py)."""
        x = torch.stack([to_tensor(image.resize((self.side, self.side), Image.Resampling.LANCZOS)) for image in images])
        return F.normalize(self.model(pixel_values=x).image_embeds, dim=-1)


def subject_score(drawn: Tensor, real: Tensor) -> float:
    """CLIP-I: embeddings (N, D) and (M, D) -> the mean cosine similarity of all pairs (2208.12242, section 5.2)."""
    return (drawn @ real.mT).mean().item()


def forgetting_score(tuned: Tensor, base: Tensor) -> float:
    """1 - the mean cosine similarity of row i of one, (N, D), and row i of the other."""
    return 1 - (tuned * base).sum(-1).mean().item()


def rungs(flags: LadderSettings) -> dict[str, FineTuneSettings]:
    """The rungs with the numbers that suit the pocket checkpoint: its training is a hundred times shorter than SD 1.5's."""

    def settings(kind: type[AnyFineTune], name: str, steps: int, rate: float, **others: Any) -> AnyFineTune:
        return kind(
            pretrained_model_name_or_path=flags.pretrained_model_name_or_path,
            instance_data_dir=flags.instance_data_dir,
            output_dir=str(Path(flags.output_dir) / name),
            resume_from_checkpoint="latest",
            max_train_steps=steps,
            learning_rate=rate,
            validation_steps=0,
            checkpointing_steps=steps,
            **others,
        )

    sks = {"instance_prompt": SUBJECT[0]}
    rehearsal = {"with_prior_preservation": True, "class_prompt": "a photo of a dog"}
    prior = rehearsal | {"num_class_images": 40, "class_data_dir": str(Path(flags.output_dir) / "class-dog")}
    word = {"placeholder_token": "<my-dog>", "initializer_token": "dog"}
    return {
        "full": settings(FullSettings, "full", 200, 1e-4, **sks),
        "DreamBooth": settings(DreamBoothSettings, "dreambooth", 480, 2e-4, **sks, **prior, prior_loss_weight=0.3),
        "LoRA": settings(LoRASettings, "lora", 300, 1e-3, **sks, rank=8),
        "LoRA with prior": settings(LoRASettings, "lora-prior", 300, 1e-3, **sks, **rehearsal, prior_from_base=True, rank=8),
        "DoRA": settings(LoRASettings, "dora", 300, 1e-3, **sks, rank=8, use_dora=True),
        "LoRA, convolutions too": settings(
            LoRASettings, "locon", 300, 1e-3, **sks, rank=8, lora_targets=("attention", "resnets", "samplers")
        ),
        "textual inversion": settings(TextualInversionSettings, "textual-inversion", 300, 5e-2, **word, num_vectors=4),
        "pivotal": settings(
            PivotalSettings, "pivotal", 300, 1e-3, **word, num_vectors=2, learning_rate_embedding=1e-2, rank=8
        ),
    }


def run(flags: LadderSettings) -> str:
    """Climb, and write ladder.md and ladder.png; the table."""
    every, home = rungs(flags), Path(flags.output_dir)
    for name in flags.rungs:
        if name not in every:
            raise SettingsError(f'--rungs "{name}": there are {", ".join(every)}.{did_you_mean(name, every)}')
    tower = ImageTower(local_folder(flags.pretrained_model_name_or_path) / "image_encoder")
    rows = climb({name: every[name] for name in flags.rungs or every}, home, tower)
    text = table(rows)
    (home / "ladder.md").write_text(text + "\n", encoding="utf-8")
    return text


def climb(steps: dict[str, FineTuneSettings], home: Path, tower: ImageTower) -> list[Row]:
    """Train every rung (one that is finished is only measured again) and measure it; `home/ladder.png` shows them all."""
    first = next(iter(steps.values()))
    base = StableDiffusionPipeline.from_pretrained(first.pretrained_model_name_or_path)
    real = tower.embed([load_image(example.path) for example in read_folder(Path(first.instance_data_dir or ""), "")])
    before = drawings(base, SUBJECT[0])
    others = tower.embed(before[SUBJECTS:])

    def row(rung: str, trained: int, size: float, seconds: float, images: list[Image.Image]) -> Row:
        seen = tower.embed(images)
        scores = subject_score(seen[:SUBJECTS], real), forgetting_score(seen[SUBJECTS:], others)
        return Row(rung, trained, size, seconds, *scores)

    rows, sheet = [row("the base", 0, 0, 0, before)], [before]
    for name, settings in steps.items():
        print(f"== {name}", file=sys.stderr)
        task = RECIPES[type(settings)](settings)
        if not fit(task, settings).finished:
            raise KeyboardInterrupt  # asked to stop: a half-trained rung has no place in the table
        trained, after = sum(p.numel() for p in task.trainable.values()), drawings(load_result(settings), settings.prompt or "")
        rows.append(row(name, trained, megabytes(settings), seconds_of(settings), after))
        sheet.append(after)
    shown = [images[:: len(SEEDS)] for images in sheet]  # the first seed's: all of them would be too small to see
    save_png(contact_sheet(shown, [r.rung for r in rows], [*SUBJECT, *OTHERS], tile=160), home / "ladder.png")
    return rows


def drawings(pipe: StableDiffusionPipeline, prompt: str) -> list[Image.Image]:
    """SUBJECT's pictures, then OTHERS', each from every seed; `prompt` says how this rung calls its subject."""
    pipe.set_progress_bar_config(disable=True)
    called = prompt if " " in prompt else f"a photo of {prompt}"
    images: list[Image.Image] = []
    for words in (*(words.replace(SUBJECT[0], called) for words in SUBJECT), *OTHERS):
        images += pipe([words] * len(SEEDS), seed=SEEDS, guidance_scale=5.0, num_inference_steps=25).images
    return images


def load_result(settings: FineTuneSettings) -> StableDiffusionPipeline:
    """The base with what a finished run made of it; or the whole model that it wrote."""
    home = Path(settings.output_dir)
    if not any((home / name).is_file() for name in (TUNED_FILE, LORA_FILE, WORD_FILE)):
        raise WeightsError(f"{home} holds no result of a training run; remove the folder, and climb again.")
    tuned = (home / TUNED_FILE).is_file()
    pipe = StableDiffusionPipeline.from_pretrained(home if tuned else settings.pretrained_model_name_or_path)
    if (home / LORA_FILE).is_file():
        pipe.load_lora_weights(home)
    if (home / WORD_FILE).is_file():
        pipe.load_textual_inversion(home)
    return pipe


def seconds_of(settings: FineTuneSettings) -> float:
    """All training steps together."""
    return sum(row.get("seconds") or 0.0 for row in read_metrics(Path(settings.output_dir)))


def megabytes(settings: FineTuneSettings) -> float:
    """All weight files of the result, checkpoints left out."""
    home = Path(settings.output_dir)
    files = [p for p in home.rglob("*.safetensors") if not p.relative_to(home).parts[0].startswith(("checkpoint-", "."))]
    return sum(p.stat().st_size for p in files) / 1e6


def table(rows: Sequence[Row], header: bool = True) -> str:
    """Markdown."""
    head = "| rung | trainable parameters | file, MB | seconds | subject | forgetting |\n|---|---:|---:|---:|---:|---:|\n"
    lines = [
        f"| {r.rung} | {r.trainable:,} | {r.megabytes:.2f} | {r.seconds:.0f} | {r.subject:.3f} | {r.forgetting:.3f} |"
        for r in rows
    ]
    return (head if header else "") + "\n".join(lines)
