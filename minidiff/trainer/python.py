"""The recipes as functions: `minidiff.train_lora(pictures="my-dog", prompt="a photo of a sks dog", max_train_steps=200)`.

A keyword is a setting (settings.py); `pictures`, `prompt` and `model` are short for the long names. A function writes its
`output_dir` as the command does, and gives what was trained. What a command prints goes to the log "minidiff" here.
"""

import io
import logging
import re
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

from minidiff.core.errors import MinidiffError
from minidiff.draw.habits import StableDiffusionPipeline
from minidiff.draw.speed import keep_memory
from minidiff.files.controlnet import read_controlnet
from minidiff.files.lora_file import read_lora
from minidiff.files.values import settings_from, texts_of
from minidiff.files.word_file import read_embedding
from minidiff.trainer import memory
from minidiff.trainer import settings as kinds
from minidiff.trainer.card import upload
from minidiff.trainer.distributed import joined
from minidiff.trainer.recipes import RECIPES
from minidiff.trainer.run import fit

SHORT = {"model": "pretrained_model_name_or_path", "prompt": "instance_prompt", "pictures": "instance_data_dir"}


class Lines(io.TextIOBase):
    """A stream whose lines go to the log."""

    def write(self, text: str) -> int:
        for line in filter(str.strip, re.split("[\r\n]", text)):
            logging.getLogger("minidiff").info(line.removeprefix("Note: "))
        return len(text)


def settings_of(kind: type[kinds.FineTuneSettings], given: dict[str, Any]) -> kinds.FineTuneSettings:
    """The settings that keywords give. SettingsError for an unknown name, or a value of the wrong type."""
    if not given.get("prompt") and not issubclass(kind, kinds.WordSettings):  # then each picture has a caption of its own
        given = {"train_data_dir" if name == "pictures" else name: value for name, value in given.items()}
    given = {SHORT.get(name, name): str(value) if isinstance(value, Path) else value for name, value in given.items()}
    if given.get("preset") in kinds.POCKET:
        base = given.get("pretrained_model_name_or_path", kind.pretrained_model_name_or_path)
        given = kinds.preset_values(given["preset"], base) | given
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    return settings_from(kind, lists, "the recipe")


def keywords(text: str) -> str:
    """--instance_prompt -> prompt, --no-center_crop -> center_crop=False: flags as the keywords of a function."""
    short = {long: short for short, long in SHORT.items()}
    return re.sub(r"--(no-)?(\w+)", lambda flag: short.get(flag[2], flag[2]) + "=False" * bool(flag[1]), text)


def recipe(name: str, kind: type[kinds.FineTuneSettings], result: Callable[[str], Any]) -> Callable[..., Any]:
    """The function of a recipe, with its settings as signature and documentation."""

    def train(pictures: str | Path | None = None, prompt: str | None = None, **settings: Any) -> Any:
        given = {"pictures": pictures, "prompt": prompt, **settings}
        try:
            s = settings_of(kind, {name: value for name, value in given.items() if value is not None})
            keep_memory(not s.fit)
            with redirect_stdout(Lines()), redirect_stderr(Lines()), joined(s.device):
                task = RECIPES[kind](s)
                with memory.budgeted(task, s) as chosen:
                    report = fit(task, chosen)
            if not report.finished:
                raise KeyboardInterrupt(f'{report.done} updates are saved; go on with resume_from_checkpoint="latest".')
            if s.push_to_hub:
                upload(s)
            return result(s.output_dir)
        except MinidiffError as error:
            raise type(error)(keywords(str(error))) from None

    train.__name__ = train.__qualname__ = name
    short, texts = "\n".join(f"{short}: short for {long}" for short, long in SHORT.items()), texts_of(kind)
    lines = "\n".join(f"{field.name}={field.default!r}: {texts[field.name]}" for field in fields(kind))
    train.__doc__ = f"{kind.__doc__}\n\n{short}\n{keywords(lines)}"
    own = [Parameter(short, Parameter.POSITIONAL_OR_KEYWORD, default=None) for short in ("pictures", "prompt")]
    own += [Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default) for field in fields(kind)]
    train.__signature__ = Signature(own)  # type: ignore[attr-defined]
    return train


train_full = recipe("train_full", kinds.FullSettings, StableDiffusionPipeline.from_pretrained)
train_dreambooth = recipe("train_dreambooth", kinds.DreamBoothSettings, StableDiffusionPipeline.from_pretrained)
train_lora = recipe("train_lora", kinds.LoRASettings, read_lora)
train_textual_inversion = recipe("train_textual_inversion", kinds.TextualInversionSettings, read_embedding)
train_controlnet = recipe("train_controlnet", kinds.ControlNetSettings, read_controlnet)
train_ip_adapter = recipe("train_ip_adapter", kinds.IPAdapterSettings, lambda folder: Path(folder, "ip_adapter.safetensors"))
train_pivotal = recipe("train_pivotal", kinds.PivotalSettings, lambda folder: (read_embedding(folder), read_lora(folder)))
