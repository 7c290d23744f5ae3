"""The `minidiff` command. Flags, help texts and checks come from dataclasses; here they only meet the code.

Nothing heavy is imported before a command runs: `minidiff --help` answers at once. Bad input ends with one message and exit
code 2; a traceback is a bug.
"""

import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from tyro.conf import Positional

from minidiff.errors import MinidiffError, SettingsError, did_you_mean
from minidiff.pocket.settings import PretrainSettings
from minidiff.train.settings import LoRASettings, from_toml

if TYPE_CHECKING:
    from PIL.Image import Image

    from minidiff.pipeline import StableDiffusionPipeline


@dataclass(frozen=True)
class Sampling:
    """What `sample` and `sheet` share."""

    pretrained_model_name_or_path: str = "checkpoints/pocket"
    """A model folder in SD 1.5's layout, a hub id in the local cache, or a single .safetensors file."""
    tokenizer: str | None = None
    """Folder of the tokenizer; only a single-file model needs one."""
    lora: tuple[str, ...] = ()
    """LoRA files or folders."""
    lora_weight: tuple[float, ...] = ()
    """Strength of each LoRA; default: 1."""
    negative_prompt: str = ""
    """What the pictures should not show."""
    num_inference_steps: int = 25
    """Calls of the U-Net."""
    guidance_scale: float = 5.0
    """How strongly the prompt is followed; 1 or less turns guidance off."""
    sampler: str | None = None
    """ddim, euler_a or dpm++_2m; default: the model's own."""
    seed: int = 0
    """Picture i is drawn from seed + i."""
    width: int | None = None
    """In pixels; default: the model's own."""
    height: int | None = None
    """In pixels; default: the model's own."""
    torch_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Number format of the U-Net and text encoder; default: float16 on a GPU, else float32."""
    device: str | None = None
    """cpu or cuda; default: cuda if there is one."""


@dataclass(frozen=True)
class Sample(Sampling):
    """Draw pictures from a prompt."""

    prompt: Positional[str] = ""
    """What the pictures should show."""
    num_images_per_prompt: int = 1
    """How many, from seed, seed + 1, …"""
    output: str = "picture.png"
    """The file; with several pictures: picture-0.png, picture-1.png, …"""


@dataclass(frozen=True)
class Sheet(Sampling):
    """Draw a labelled contact sheet: a column for each prompt; rows for the model before and after its LoRAs."""

    prompts: Positional[tuple[str, ...]] = ()
    """One column each."""
    num_images_per_prompt: int = 1
    """Rows, from seed, seed + 1, …, before and after alike."""
    title: str = ""
    """A heading above the sheet."""
    output: str = "sheet.png"
    """The file."""


@dataclass(frozen=True)
class Lesson:
    """Run a lesson; its figures go into outputs/lessons."""

    number: Positional[int]
    """0: the three stations. 11: LoRA."""


@dataclass(frozen=True)
class Judge:
    """Score a pocket checkpoint: does it draw what held-out prompts say, and how sharp is its autoencoder?"""

    folder: Positional[str] = "checkpoints/pocket"
    """The checkpoint."""
    count: int = 500
    """How many held-out prompts."""
    judge: str = "outputs/judge.safetensors"
    """The classifier; trained first if the file is not there."""


# --- the commands --------------------------------------------------------------------------------------------------------


def sample(s: Sample) -> None:
    """One file for each picture; how it was made is written into the PNG."""
    from minidiff.images import save_png

    pipe = load(s)
    seeds = [s.seed + i for i in range(s.num_images_per_prompt)]
    images = draw(pipe, s, s.prompt, seeds)
    path = Path(s.output)
    for i, (image, seed) in enumerate(zip(images, seeds)):
        name = path if len(images) == 1 else path.with_name(f"{path.stem}-{i}{path.suffix}")
        save_png(image, name, {"parameters": parameters(pipe, s, s.prompt, seed, image)})
        print(name)


def sheet(s: Sheet) -> None:
    """The model before and after its LoRAs, if there are any; the same prompts, the same seeds."""
    from minidiff.images import contact_sheet, save_png

    if not s.prompts:
        raise SettingsError('sheet: give one or more prompts: minidiff sheet "a red dog" "a blue cat".')
    pipe, rows, labels = load(replace(s, lora=(), lora_weight=())), [], []
    for when in ("before", "after") if s.lora else ("",):
        if when == "after":
            attach(pipe, s)
        for seed in range(s.seed, s.seed + s.num_images_per_prompt):
            rows.append([draw(pipe, s, prompt, [seed])[0] for prompt in s.prompts])
            labels.append(", ".join(filter(None, (when, f"seed {seed}" if s.num_images_per_prompt > 1 else ""))))
    about = parameters(pipe, s, " | ".join(s.prompts), s.seed, rows[0][0])
    save_png(contact_sheet(rows, labels if any(labels) else (), s.prompts, s.title), s.output, {"parameters": about})
    print(s.output)


def train_lora(s: LoRASettings) -> None:
    from minidiff.train.loop import fit
    from minidiff.train.recipes import lora

    if fit(lora(s), s).finished:
        print(f"{s.output_dir}: the adapter, loss.png, and samples/ with a sheet for each stage")


def lesson(s: Lesson) -> None:
    folder = Path(__file__).parent.parent / "lessons"
    found = sorted(folder.glob(f"{s.number:02d}_*.py"))
    if not found:
        known = ", ".join(sorted(str(int(path.name[:2])) for path in folder.glob("[0-9][0-9]_*.py")))
        raise SettingsError(f"there is no lesson {s.number}; there are {known or 'none beside this installation'}.")
    if code := subprocess.run([sys.executable, str(found[0])], check=False).returncode:
        sys.exit(code)


def pretrain(s: PretrainSettings) -> None:
    from minidiff.pocket.pretrain import pretrain as run

    run(s)


def judge(s: Judge) -> None:
    import json

    from minidiff.pocket.judge import judge_checkpoint

    print(json.dumps(judge_checkpoint(s.folder, Path(s.judge), s.count), indent=2))


COMMANDS: dict[str, tuple[Any, Callable[[Any], None]]] = {
    "sample": (Sample, sample),
    "sheet": (Sheet, sheet),
    "train lora": (LoRASettings, train_lora),
    "lesson": (Lesson, lesson),
    "pretrain": (PretrainSettings, pretrain),
    "judge": (Judge, judge),
}


# --- what they share -----------------------------------------------------------------------------------------------------


def load(s: Sampling) -> "StableDiffusionPipeline":
    """The model on its device, with its LoRAs attached."""
    import torch

    from minidiff.pipeline import StableDiffusionPipeline

    device = s.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SettingsError(f"--device {device}: there is no GPU that torch can use here; leave the flag out, or say cpu.")
    dtype = getattr(torch, s.torch_dtype or ("float32" if device == "cpu" else "float16"))
    name = s.pretrained_model_name_or_path
    if name.endswith((".safetensors", ".ckpt")):
        if s.tokenizer is None:
            raise SettingsError(f"{name}: a single file holds no vocabulary; give --tokenizer, the tokenizer folder of SD 1.5.")
        pipe = StableDiffusionPipeline.from_single_file(name, s.tokenizer, dtype)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(name, dtype)
    try:
        pipe.to(device)
    except RuntimeError as error:
        raise SettingsError(f"--device {device}: {str(error).splitlines()[0]}") from error
    attach(pipe, s)
    return pipe


def attach(pipe: "StableDiffusionPipeline", s: Sampling) -> None:
    """All LoRAs of the command line at once, each at its weight."""
    weights = s.lora_weight or (1.0,) * len(s.lora)
    if len(weights) != len(s.lora):
        raise SettingsError(f"--lora_weight has {len(weights)} numbers for {len(s.lora)} LoRAs; give one for each.")
    names = [f"lora{i}" for i in range(len(s.lora))]
    for path, name in zip(s.lora, names):
        print(pipe.load_lora_weights(path, adapter_name=name), file=sys.stderr)
    if names:
        pipe.set_adapters(names, weights)


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
    return generation_text(prompt, s.negative_prompt, settings | {"Version": f"minidiff {__version__}"})


# --- the command line ----------------------------------------------------------------------------------------------------


def usage() -> str:
    lines = [f"  minidiff {name:<11} {(kind.__doc__ or '').strip().splitlines()[0]}" for name, (kind, _) in COMMANDS.items()]
    return "\n".join(
        [
            "minidiff: Stable Diffusion you can read, and fine-tune.",
            "",
            *lines,
            "",
            "  minidiff COMMAND --help: its flags",
        ]
    )


def parse(argv: list[str]) -> tuple[Any, Callable[[Any], None]]:
    """The command's settings and its function. tyro itself leaves with code 2 for unknown flags, and names the nearest."""
    name = next((name for name in COMMANDS if argv[: len(name.split())] == name.split()), None)
    if name is None:
        if argv[:1] == ["train"]:
            raise SettingsError(
                f"minidiff train needs a recipe, and there is one: lora.{did_you_mean(' '.join(argv[1:2]), ['lora'])}"
            )
        raise SettingsError(f'"{argv[0]}" is no command.{did_you_mean(argv[0], COMMANDS)}\n\n{usage()}')
    kind, function = COMMANDS[name]
    rest, default = argv[len(name.split()) :], None
    if kind is LoRASettings and "--config" in rest:
        at = rest.index("--config")
        if at + 1 == len(rest):
            raise SettingsError("--config needs a TOML file, such as the train_config.toml of an earlier run.")
        default, rest = from_toml(kind, Path(rest[at + 1])), rest[:at] + rest[at + 2 :]
    return tyro.cli(kind, args=rest, prog=f"minidiff {name}", default=default), function


def main(argv: list[str] | None = None) -> None:
    """The entry point."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    if argv[0] == "--version":
        from minidiff import __version__

        print(f"minidiff {__version__}")
        return
    warnings.showwarning = lambda message, *_: print(f"Note: {message}", file=sys.stderr)
    try:
        settings, function = parse(argv)
        function(settings)
    except MinidiffError as error:
        print(f"minidiff: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        if "out of memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        print(f"minidiff: out of memory. {OUT_OF_MEMORY}", file=sys.stderr)
        sys.exit(2)


OUT_OF_MEMORY = (
    "What helps, the cheapest first: --train_batch_size 1 with more --gradient_accumulation_steps, --mixed_precision bf16, "
    "a smaller --resolution (or --width and --height), a lower --rank. Checkpoints already written are whole."
)
