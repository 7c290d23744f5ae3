"""The commands train, watch, data check, ladder, forgetting, lesson and bench, given their flags."""

import json
import os
import runpy
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidiff.cli.flags import Bench, DataCheck, Lesson, Watch
from minidiff.cli.main import COMMANDS
from minidiff.core.errors import DataError, SettingsError
from minidiff.files.bundled import HOME, here_or_bundled
from minidiff.files.folder import local_folder
from minidiff.files.values import near_path
from minidiff.pocket.settings import ForgettingSettings, LadderSettings
from minidiff.trainer.settings import (
    ControlNetSettings,
    FineTuneSettings,
    FullSettings,
    IPAdapterSettings,
    LoRASettings,
    TextualInversionSettings,
    preset_values,
    told,
)

if TYPE_CHECKING:
    from minidiff.trainer.run import Report

CHECKOUT = Path(__file__).parents[2]


def train(s: FineTuneSettings) -> None:
    """Train, and leave with code 130 if the run was asked to stop: a script must not take it for finished."""
    for folder in (getattr(s, f"{name}_data_dir", None) for name in ("instance", "train", "validation", "conditioning")):
        if folder and not Path(folder).is_dir() and not here_or_bundled(folder).is_dir():
            raise SettingsError(f"{folder}: there is no such folder.{near_path(folder)} Give that of the pictures.")
    from minidiff.cli.first_line import of_training  # only now: torch takes long to import
    from minidiff.draw.speed import keep_memory
    from minidiff.trainer import memory
    from minidiff.trainer.card import upload
    from minidiff.trainer.distributed import joined, world
    from minidiff.trainer.recipes import RECIPES
    from minidiff.trainer.run import fit

    if isinstance(s, LoRASettings) and s.preset:
        print(told(s))
    warn_of_words(s)
    keep_memory(not s.fit)  # with --fit, the peak has to be what the tensors need
    with joined(s.device):
        try:
            task = RECIPES[type(s)](s)
        except KeyboardInterrupt:
            print("\nNo update was made yet; the same command begins again.", file=sys.stderr)
            raise
        with memory.budgeted(task, s) as chosen:
            if world().rank == 0:
                of_training(task, chosen)
            report = fit(task, chosen)
        print(what_next(s, report, task.prompt))
        if report.finished and s.push_to_hub and world().rank == 0:
            print(f"Uploaded to {upload(s)}")
    if not report.finished:
        sys.exit(130)


def warn_of_words(s: FineTuneSettings) -> None:
    """Those of the prompts and captions that a small model does not know. The new word of a textual inversion is left out."""
    from minidiff.draw.speed import light_text
    from minidiff.files.text_files import load_tokenizer
    from minidiff.studio.tokens import warn_of_unknown_words
    from minidiff.trainer.dataset import Scan

    tokenizer = load_tokenizer(local_folder(s.pretrained_model_name_or_path) / "tokenizer", light_text())
    where = Path(s.instance_data_dir or s.train_data_dir or "")
    hints = getattr(s, "conditioning_image_column", None)  # no column of captions
    scan = Scan(s.prompt, s.caption_column, s.masked_loss, s.captions, s.image_column, hints).of(where)
    texts = [*(one.caption for one in scan.examples), s.class_prompt or "", *s.validation_prompt]
    new = {word: [0] for word in [getattr(s, "placeholder_token", "")] if word}
    warn_of_unknown_words(s.pretrained_model_name_or_path, tokenizer, texts, new)


# --- the commands to type next ----------------------------------------------------------------------------------------


def what_next(s: FineTuneSettings, report: "Report", prompt: str) -> str:
    """After a run: where its files are, and the commands to go on with."""
    from minidiff.trainer.checkpoint import checkpoints

    home, on = Path(s.output_dir), replace(s, resume_from_checkpoint="latest", overwrite_output_dir=False)
    sheets = ", and samples/ with a sheet for each stage" if (home / "samples").is_dir() else ""
    lines = [f"{home}: {'the result and its card, ' * report.finished}loss.png{sheets}"]
    if report.finished:
        lines += [f"Draw with it:\n  {drawing(s, prompt, home)}"]
        if s.lr_scheduler.startswith("constant"):  # else the rate has reached its end
            longer = replace(on, max_train_steps=2 * report.done, num_train_epochs=None)
            lines += [f"Not like the pictures yet? Train twice as long:\n  {command(longer)}"]
    else:
        lines += [f"Go on:\n  {command(on)}"]
        if saved := checkpoints(home):
            lines += [f"Draw with what it has learnt so far:\n  {drawing(s, prompt, saved[-1])}"]
    return "\n".join(lines)


def command(settings: Any) -> str:
    """The command of these settings: with the flags that differ from their defaults."""
    where = f"trainer.settings:{type(settings).__name__}"
    words = next(name.split() for name, (flags, _, _) in COMMANDS.items() if flags == where)
    preset = getattr(settings, "preset", None)
    usual = preset_values(preset, settings.pretrained_model_name_or_path) if preset else {}
    for field in fields(settings):
        value, flag = getattr(settings, field.name), f"--{field.name}"
        if value == usual.get(field.name, field.default):
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no_{field.name}")
        elif isinstance(value, tuple):
            words += [flag, *map(str, value)]
        else:
            words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return typed(words, ["torchrun", "--nproc_per_node", processes, "-m", "minidiff"] if processes != "1" else None)


def drawing(settings: FineTuneSettings, prompt: str, folder: Path) -> str:
    """The command that draws with a result, or with what a checkpoint holds of it."""
    words = ["sample", prompt]
    if isinstance(settings, FullSettings):
        return typed([*words, "--pretrained_model_name_or_path", str(folder)])
    if settings.pretrained_model_name_or_path != FineTuneSettings.pretrained_model_name_or_path:
        words += ["--pretrained_model_name_or_path", settings.pretrained_model_name_or_path]
    if isinstance(settings, ControlNetSettings):
        how = ["--hint", settings.hint] if settings.hint else []
        return typed([*words, "--controlnet", str(folder), "--control_image", "PICTURE", *how])
    if isinstance(settings, IPAdapterSettings):
        tower = ["--image_encoder", settings.image_encoder] if settings.image_encoder else []
        return typed([*words, "--ip_adapter", str(folder), "--ip_adapter_image", "PICTURE", *tower])
    word_alone = isinstance(settings, TextualInversionSettings)
    return typed([*words, "--textual_inversion" if word_alone else "--lora", str(folder)])


def typed(words: list[str], program: list[str] | None = None) -> str:
    """As it is typed into this system's shell; `program`: by default the one that runs now."""
    here = ["minidiff"] if Path(sys.argv[0]).stem == "minidiff" else ["python", "-m", "minidiff"]
    return (subprocess.list2cmdline if os.name == "nt" else shlex.join)([*(program or here), *words])


# --- beside training --------------------------------------------------------------------------------------------------


def watch(s: Watch) -> None:
    """Until Ctrl-C. The viewer is the one that Pillow finds on this system."""
    from PIL import Image, ImageShow

    from minidiff.trainer.checkpoint import CONFIG

    home, shown = Path(s.output_dir), dict[Path, int]()
    if not (home / CONFIG).is_file():
        what = f"holds no run of minidiff train: there is no {CONFIG} in it" if home.is_dir() else "does not exist"
        raise SettingsError(f"{home} {what}.{near_path(s.output_dir)}")
    print(f"Waiting for what changes in {home}; Ctrl-C stops.", flush=True)
    while True:
        for path in [*sorted(home.glob("samples/step-*.png"))[-1:], *home.glob("loss.png")]:
            if shown.get(path) != (changed := path.stat().st_mtime_ns):
                opened = ImageShow.show(Image.open(path), path.name)
                print(path, "" if opened else "(no program here shows pictures: open it yourself)", flush=True)
            shown[path] = changed
        time.sleep(2)


def data_check(s: DataCheck) -> None:
    import torch

    from minidiff.draw.device import chosen_device
    from minidiff.draw.progress import progress
    from minidiff.files.model import empty_model
    from minidiff.files.weights import find_weights, load_into
    from minidiff.trainer.dataset import Scan
    from minidiff.trainer.pictures import BELOW, as_table, check_scan, reconstruction, training_sizes

    scan = Scan(s.instance_prompt, s.caption_column, s.masked_loss, s.captions).of(Path(s.folder))
    base, unread = empty_model(s.pretrained_model_name_or_path), len(scan.errors)
    good = check_scan(scan, training_sizes(base.unet.config, base.vae.config, s.resolution, s.aspect_ratio_buckets)[1])
    load_into(base.vae, find_weights(local_folder(s.pretrained_model_name_or_path) / "vae"), torch.float32)
    base.vae.to(chosen_device(None))
    levels = [reconstruction(base.vae, e) for e in progress(good, "picture", "through the VAE")]
    lines = [f"{level:7.1f} dB  {e.path.name}" for e, level in zip(good, levels)]
    print("\n".join(["Each picture after the VAE, beside itself:", *lines, BELOW, as_table(scan, Path(s.folder))]))
    if scan.errors:
        skip = " --skip_bad leaves out pictures that are no use." if good and not unread else ""
        raise DataError(f"{s.folder}: mend what is marked as an error above.{skip}")


def ladder(s: LadderSettings) -> None:
    run_lesson(13, FLAGS=vars(s))


def forgetting(s: ForgettingSettings) -> None:
    run_lesson(14, FLAGS=vars(s))


def lesson(s: Lesson) -> None:
    run_lesson(s.number)


def run_lesson(number: int | None, **given: Any) -> None:
    """Without a number, list the lessons. SettingsError, with the list, for one that is not there."""
    if number in (files := lesson_files()):
        runpy.run_path(str(files[number]), init_globals=given, run_name="__main__")
        return
    headings = [path.read_text("utf-8").splitlines()[1] for path in files.values()]  # "# # Lesson 5: samplers"
    titles = [f"{n:>4}  {heading.partition(': ')[2]}" for n, heading in zip(files, headings)]
    if number is not None:
        raise SettingsError("\n".join([f"there is no lesson {number}. There are:", *titles]))
    print(*titles, "", "  minidiff lesson NUMBER: runs it", sep="\n")


def lesson_files() -> dict[int, Path]:
    return {int(path.name[:2]): path for path in sorted((HOME / "lessons").glob("[0-9][0-9]_*.py"))}


def bench(s: Bench) -> None:
    """Run tests/benchmarks, which is not part of the package."""
    if not (CHECKOUT / "tests" / "benchmarks").is_dir():
        way = 'Clone the repository, and install it with pip install -e ".[bench]".'
        raise SettingsError(f"there is no tests/benchmarks in {CHECKOUT}: the benchmark needs a checkout. {way}")
    places = os.pathsep.join(filter(None, (str(CHECKOUT / "tests"), str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks", json.dumps(asdict(s))]
    if code := subprocess.run(words, env=os.environ | {"PYTHONPATH": places}, check=False).returncode:
        sys.exit(code)
