"""What each command does, given its flags. cli.py turns words into flags, and errors into messages."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidiff.errors import DataError, SettingsError
from minidiff.file_flags import Bake, Convert, Extract, Inspect, Join, Resize
from minidiff.flags import DataCheck, Judge, Ladder, Lesson, Sample, Sampling, Sheet
from minidiff.pocket.settings import PretrainSettings
from minidiff.train.methods import (
    DreamBoothSettings,
    FullSettings,
    LoRASettings,
    PivotalSettings,
    TextualInversionSettings,
)
from minidiff.train.settings import FineTuneSettings

if TYPE_CHECKING:
    from PIL.Image import Image

    from minidiff.pipeline import StableDiffusionPipeline


# --- the commands --------------------------------------------------------------------------------------------------------


def sample(s: Sample) -> None:
    """One file for each picture; how it was made is written into the PNG."""
    from minidiff.images import save_png

    s.check()
    assert s.prompt is not None  # checked
    seeds = list(range(s.seed, s.seed + s.num_images_per_prompt))
    names = output_files(s.output, len(seeds))
    pipe = load(s)
    images = draw(pipe, s, s.prompt, seeds)
    for image, name, seed in zip(images, names, seeds):
        save_png(image, name, {"parameters": parameters(pipe, s, s.prompt, seed, image)})
    print(*names, sep="\n")


def sheet(s: Sheet) -> None:
    """The model before and after its LoRAs and new words, if there are any; the same prompts, the same seeds."""
    from minidiff.images import contact_sheet, save_png

    s.check()
    output_files(s.output, 1)
    pipe, rows, labels = load(replace(s, lora=(), lora_weight=(), textual_inversion=())), [], []
    for when in ("before", "after") if s.lora or s.textual_inversion else ("",):
        if when == "after":
            attach(pipe, s)
        for seed in range(s.seed, s.seed + s.num_images_per_prompt):
            rows.append([draw(pipe, s, prompt, [seed])[0] for prompt in s.prompts])
            labels.append(", ".join(filter(None, (when, f"seed {seed}" if s.num_images_per_prompt > 1 else ""))))
    about = parameters(pipe, s, " | ".join(s.prompts), s.seed, rows[0][0])
    save_png(contact_sheet(rows, labels if any(labels) else (), s.prompts, s.title), s.output, {"parameters": about})
    print(s.output)


def train(s: FineTuneSettings) -> None:
    from minidiff.train.distributed import joined
    from minidiff.train.loop import fit
    from minidiff.train.recipes import RECIPES

    with joined(s.device):
        report = fit(RECIPES[type(s)](s), s)
        if report.finished:
            print(f"{s.output_dir}: the result and its card, loss.png, and samples/ with a sheet for each stage")
    if not report.finished:
        sys.exit(130)  # asked to stop: not a failure, and not the result that a script waits for


def ladder(s: Ladder) -> None:
    s.check()
    from minidiff.train.ladder import run

    print(run(s))


def data_check(s: DataCheck) -> None:
    s.check()
    from minidiff.models.text import load_tokenizer, token_ids
    from minidiff.train.buckets import bucket_sizes
    from minidiff.train.check_data import as_table, check_dataset

    folder, tokenizer = Path(s.folder), load_tokenizer(Path(s.tokenizer)) if s.tokenizer else None
    problems = check_dataset(
        folder,
        s.instance_prompt,
        s.caption_column,
        s.resolution,
        masks=s.masked_loss,
        buckets=bucket_sizes(s.resolution, 64) if s.aspect_ratio_buckets else [],
        trigger=s.trigger,
        count_tokens=(lambda text: len(token_ids(tokenizer, text))) if tokenizer else None,
    )
    print(as_table(problems, folder))
    if any(problem.kind == "error" for problem in problems):
        raise DataError(f"{folder}: mend what is marked as an error above, or train with --skip_bad.")


def lesson(s: Lesson) -> None:
    folder = Path(__file__).parent.parent / "lessons"
    found = sorted(folder.glob(f"{s.number:02d}_*.py"))
    if not found:
        known = ", ".join(sorted(str(int(path.name[:2])) for path in folder.glob("[0-9][0-9]_*.py")))
        raise SettingsError(f"there is no lesson {s.number}; there are {known or 'none beside this installation'}.")
    if code := subprocess.run([sys.executable, str(found[0])], check=False).returncode:
        sys.exit(code)


def pretrain(s: PretrainSettings) -> None:
    s.check()
    from minidiff.pocket.pretrain import pretrain as run

    run(s)


def judge(s: Judge) -> None:
    s.check()
    import json

    from minidiff.pocket.judge import judge_checkpoint

    print(json.dumps(judge_checkpoint(s.folder, Path(s.judge), s.count), indent=2))


def tool(s: Inspect | Convert | Bake | Join | Extract | Resize) -> None:
    s.check()
    from minidiff.tools import TOOLS

    TOOLS[type(s)](s)


COMMANDS: dict[str, tuple[Any, Callable[[Any], None]]] = {
    "sample": (Sample, sample),
    "sheet": (Sheet, sheet),
    "train full": (FullSettings, train),
    "train dreambooth": (DreamBoothSettings, train),
    "train lora": (LoRASettings, train),
    "train textual_inversion": (TextualInversionSettings, train),
    "train pivotal": (PivotalSettings, train),
    "data check": (DataCheck, data_check),
    "inspect": (Inspect, tool),
    "convert": (Convert, tool),
    "merge bake": (Bake, tool),
    "merge join": (Join, tool),
    "merge extract": (Extract, tool),
    "merge resize": (Resize, tool),
    "ladder": (Ladder, ladder),
    "lesson": (Lesson, lesson),
    "pretrain": (PretrainSettings, pretrain),
    "judge": (Judge, judge),
}


# --- what they share -----------------------------------------------------------------------------------------------------


def output_files(output: str, count: int) -> list[Path]:
    """Where the pictures go. What minidiff drew is drawn over (it says how to draw it again); any other file is left alone."""
    from minidiff.images import read_png_text

    path = Path(output)
    if path.suffix.lower() != ".png":
        raise SettingsError(f'--output "{output}": pictures are written as PNG; give a name that ends in .png.')
    names = [path] if count == 1 else [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)]
    for name in names:
        try:
            ours = not name.exists() or "minidiff" in read_png_text(name).get("parameters", "")
        except DataError:  # no picture
            ours = False
        if not ours:
            raise SettingsError(f"--output {name} is there already, and minidiff did not draw it; choose another name.")
    return names


def load(s: Sampling) -> "StableDiffusionPipeline":
    """The model on its device, with its LoRAs attached."""
    import torch

    from minidiff.device import chosen_device
    from minidiff.pipeline import StableDiffusionPipeline
    from minidiff.weights import read_header

    device = chosen_device(s.device)
    dtype = getattr(torch, s.torch_dtype or ("float32" if device == "cpu" else "float16"))
    name = s.pretrained_model_name_or_path
    if single := Path(name).is_file():
        read_header(name)  # what is no model file at all is told first
    if single or name.endswith(".safetensors"):
        if s.tokenizer is None:
            raise SettingsError(
                f"{name}: a model in a single file holds no vocabulary; give --tokenizer, the tokenizer folder of SD 1.5. "
                "(If it is a LoRA, give it with --lora, and the model it belongs to here.)"
            )
        pipe = StableDiffusionPipeline.from_single_file(name, s.tokenizer, dtype)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(name, dtype)
    pipe.to(device)
    attach(pipe, s)
    return pipe


def attach(pipe: "StableDiffusionPipeline", s: Sampling) -> None:
    """All LoRAs of the command line at once, each at its weight; and all new words."""
    weights = s.lora_weight or (1.0,) * len(s.lora)
    names = [f"lora{i}" for i in range(len(s.lora))]
    for path, name in zip(s.lora, names):
        print(pipe.load_lora_weights(path, adapter_name=name), file=sys.stderr)
    if names:
        pipe.set_adapters(names, weights)
    for path in s.textual_inversion:
        print(pipe.load_textual_inversion(path), file=sys.stderr)


def draw(pipe: "StableDiffusionPipeline", s: Sampling, prompt: str, seeds: list[int]) -> "list[Image]":
    """One picture for each seed."""
    output = pipe(
        prompt,
        s.negative_prompt,
        num_images_per_prompt=len(seeds),
        seed=seeds,
        num_inference_steps=s.num_inference_steps,
        guidance_scale=s.guidance_scale,
        sampler=s.sampler,
        width=s.width,
        height=s.height,
    )
    images: list[Image] = output.images
    return images


def parameters(pipe: "StableDiffusionPipeline", s: Sampling, prompt: str, seed: int, image: "Image") -> str:
    """How a picture was made, in A1111's form."""
    from minidiff import __version__
    from minidiff.images import generation_text

    settings = {
        "Steps": s.num_inference_steps,
        "Sampler": s.sampler or pipe.sampler,
        "CFG scale": s.guidance_scale,
        "Seed": seed,
        "Size": f"{image.width}x{image.height}",
        "Model": Path(s.pretrained_model_name_or_path).name,
    }
    if s.lora:
        settings["Lora"] = ", ".join(s.lora)
    if s.textual_inversion:
        settings["TI"] = ", ".join(s.textual_inversion)
    return generation_text(prompt, s.negative_prompt, settings | {"Version": f"minidiff {__version__}"})
