"""The `minidiff` command. Flags, help texts and checks come from dataclasses; here they only meet the code.

Nothing heavy is imported before a command runs: `minidiff --help` answers at once. Bad input ends with one message and exit
code 2; a traceback is a bug.
"""

import io
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from minidiff.errors import DataError, MinidiffError, SettingsError, did_you_mean
from minidiff.flags import Judge, Lesson, Sample, Sampling, Sheet
from minidiff.pocket.settings import PretrainSettings
from minidiff.train.settings import LoRASettings, from_toml

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
    """The model before and after its LoRAs, if there are any; the same prompts, the same seeds."""
    from minidiff.images import contact_sheet, save_png

    s.check()
    output_files(s.output, 1)
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

    if not fit(lora(s), s).finished:
        sys.exit(130)  # asked to stop: not a failure, and not the result that a script waits for
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
    s.check()
    from minidiff.pocket.pretrain import pretrain as run

    run(s)


def judge(s: Judge) -> None:
    s.check()
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

    device = chosen_device(s.device)
    dtype = getattr(torch, s.torch_dtype or ("float32" if device == "cpu" else "float16"))
    name = s.pretrained_model_name_or_path
    if name.endswith((".safetensors", ".ckpt")):
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
    """All LoRAs of the command line at once, each at its weight."""
    weights = s.lora_weight or (1.0,) * len(s.lora)
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
    if broken := [word for word in argv if any("\ud800" <= letter <= "\udfff" for letter in word)]:
        raise SettingsError(f"{broken[0]!r} is not UTF-8 text; is the terminal set to UTF-8?")
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


def run(argv: list[str]) -> None:
    """What the command line asks for."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
    elif argv[0] == "--version":
        from minidiff import __version__

        print(f"minidiff {__version__}")
    else:
        settings, function = parse(argv)
        function(settings)


def main(argv: list[str] | None = None) -> None:
    """The entry point: every error a person can mend becomes a message, and an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII alone
    warnings.showwarning = lambda message, *_: print(f"Note: {message}", file=sys.stderr)
    try:
        try:
            run(sys.argv[1:] if argv is None else argv)
        finally:
            if sys.stdout:  # None where it is closed
                sys.stdout.flush()  # here, where a broken pipe can still be caught
    except BrokenPipeError:  # whoever read our output has left, as `| head -1` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more at its end
        sys.exit(128 + 13)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"minidiff: {where}{error.strerror or error}. Check the path, the rights and the room there.", file=sys.stderr)
        sys.exit(2)
    except MinidiffError as error:
        print(f"minidiff: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|t allocate memory", str(error)):
            raise
        print(f"minidiff: out of memory. {OUT_OF_MEMORY}", file=sys.stderr)
        sys.exit(2)


OUT_OF_MEMORY = (
    "What helps, the cheapest first: --train_batch_size 1 with more --gradient_accumulation_steps, --mixed_precision bf16, "
    "a smaller --resolution (or --width and --height), a lower --rank. Checkpoints already written are whole."
)
