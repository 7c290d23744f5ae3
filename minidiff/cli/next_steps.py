"""Commands to type next, whole, as the settings of a run make them."""

import os
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from minidiff.cli.main import COMMANDS
from minidiff.trainer.presets import preset_values
from minidiff.trainer.settings import (
    ControlNetSettings,
    FineTuneSettings,
    FullSettings,
    IPAdapterSettings,
    TextualInversionSettings,
)


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
