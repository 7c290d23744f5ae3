"""The words of a command line become settings. A flag is a field of the command's dataclass; `-` and `_` are the same.

In commands that train, flags of the diffusers scripts that have another name here, or that nothing needs, are read, too.
"""

import re
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from minidiff.core.errors import SettingsError, WeightsError, did_you_mean
from minidiff.files.folder import local_folder
from minidiff.files.values import POSITIONAL, from_toml, our_name

SAME = {"save_steps": "checkpointing_steps", "dataset_name": "train_data_dir"}
NOT_NEEDED = {  # flag -> why
    "enable_xformers_memory_efficient_attention": "attention is fused", "allow_tf32": "PyTorch decides",
    "set_grads_to_none": "they always are", "pre_compute_text_embeddings": "prompts are encoded once",
    "tokenizer_name": "the model has its own", "tokenizer_max_length": "it is 77", "non_ema_revision": "there is one U-Net",
    "text_encoder_use_attention_mask": "CLIP has none", "class_labels_conditioning": "SD has none", "offload_ema": "small",
    "variant": "the file that is there is read", "foreach_ema": "it is quick", "image_interpolation_mode": "it is Lanczos",
    "validation_scheduler": "the model's own sampler draws", "skip_save_text_encoder": "only what is trained is saved",
    "save_as_full_pipeline": "the word's file is enough", "dataset_config_name": "a folder has none",
    "tracker_project_name": "--logging_dir names the folder", "hub_token": "`hf auth login` keeps it",
    "local_rank": "torchrun and accelerate say it",
}  # fmt: skip
SMALL_WORDS = {"a", "an", "the", "of", "on", "in", "at", "with", "and"}  # a prompt of one such word was not meant
NUMBERS = {int: "a whole number", float: "a number"}


def settings_of(name: str, kind: type, words: list[str]) -> Any:
    """The settings of a command. A default --output does not write over an earlier picture.

    --config TOML (training) and --from PICTURE (sample) give all other flags their defaults; --preset some of them.
    """
    given, usual, origin = values_of(name, kind, words), dict[str, Any](), None
    if "from" in given:
        from minidiff.studio.recipe import read_origin  # only now: torch takes long to import

        origin = read_origin(given.pop("from"), kind)
        usual = {"output": str(Path.cwd() / f"{origin.path.stem}-again.png"), **origin.settings}
    if "config" in given:
        usual = dict(vars(from_toml(kind, Path(given.pop("config")))))
    if preset := given.get("preset", usual.get("preset")):
        from minidiff.trainer.settings import preset_values

        base = "pretrained_model_name_or_path"
        usual |= preset_values(preset, (usual | given).get(base, getattr(kind, base)))
    missing = [field.name for field in fields(kind) if field.default is MISSING and field.name not in usual | given]
    if missing == ["prompt"]:
        raise SettingsError(f'minidiff {name} needs a prompt, before its flags: minidiff {name} "a photo of a red dog"')
    if missing:
        shown = " and ".join(flag.upper() if flags_of(kind)[flag][2] else f"--{flag}" for flag in missing)
        raise SettingsError(f"minidiff {name} needs {shown}. minidiff {name} --help says more.")
    settings = kind(**usual | given)
    if origin:
        from minidiff.cli.draw_commands import check_again

        check_again(settings, origin)
    return settings.beside() if hasattr(settings, "beside") and "output" not in usual | given else settings


def flags_of(kind: type) -> dict[str, tuple[Field[Any], Any, bool]]:
    """name -> (field, type, is it a positional?) for every flag of a command."""
    hints, marked = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    return {f.name: (f, hints[f.name], POSITIONAL in getattr(marked[f.name], "__metadata__", ())) for f in fields(kind)}


def values_of(name: str, kind: type, words: list[str]) -> dict[str, Any]:
    """field -> value, of all that the words say. A prompt needs no quotes. SettingsError, with the nearest flag, for others."""
    hints: dict[str, Any] = {flag: hint for flag, (_, hint, _) in flags_of(kind).items()}
    places = [flag for flag, (_, _, positional) in flags_of(kind).items() if positional]
    if name == "sample":
        hints["from"] = str
    if name.startswith("train "):
        hints |= {flag: hints[ours] for flag, ours in SAME.items()} | dict.fromkeys(NOT_NEEDED, tuple[str, ...])
        hints["config"] = str
    end = words.index("--") if "--" in words else len(words)  # behind it, words that look like flags are none
    free, given, room = list[str](), dict[str, list[str]](), 0.0  # room: for so many more words of the last flag
    for word in words[:end]:
        if word.startswith("--"):
            typed, equals, value = word[2:].partition("=")
            flag, off = known_flag(name, typed.replace("-", "_"), hints, places)
            given[flag] = [value] * bool(equals) + ["False"] * off
            room = 0 if given[flag] else float("inf") if get_origin(hints[flag]) is tuple else 1
        elif room and (hints[flag] is not bool or word in ("True", "False")):
            given[flag].append(word)
            room -= 1
        elif re.fullmatch("-[a-zA-Z]+", word):
            raise SettingsError(f"{word} is no flag of minidiff {name}; flags begin with two dashes: minidiff {name} --help.")
        else:
            free.append(word)
    free += words[end + 1 :]
    if left := ", ".join(f"--{flag} ({why})" for flag, why in NOT_NEEDED.items() if given.pop(flag, None) is not None):
        print(f"Note: not needed here: {left}.", file=sys.stderr)
    given |= placed(name, free, places)
    values = {flag: value_of(flag, texts or ["True"] * (hints[flag] is bool), hints[flag]) for flag, texts in given.items()}
    return {SAME.get(flag, flag): dataset(value) if flag == "dataset_name" else value for flag, value in values.items()}


def placed(name: str, free: list[str], places: list[str]) -> dict[str, list[str]]:
    """The words that belong to no flag, by positional."""
    if "prompts" in places:
        if SMALL_WORDS & {word.lower() for word in free}:
            raise SettingsError(f'put each prompt in quotes: minidiff {name} "{" ".join(free)}"')
        return {"prompts": free}
    if "prompt" in places:
        if sum(" " in word for word in free) > 1:
            raise SettingsError(f"minidiff {name} draws one prompt, and these are {len(free)}; minidiff sheet draws several.")
        return {"prompt": [" ".join(free)]} if free else {}
    if left := " ".join(free[len(places) :]):
        raise SettingsError(f'"{left}" belongs to no flag. A text with spaces needs quotes: --flag "several words"')
    return {place: [word] for place, word in zip(places, free)}


def known_flag(name: str, typed: str, hints: dict[str, Any], places: list[str]) -> tuple[str, bool]:
    """The field behind a flag, and does the flag switch it off? SettingsError with the nearest flag."""
    flag = typed if typed in hints else typed.removeprefix("no_")
    if flag in hints and flag not in places and (flag == typed or hints[flag] is bool):
        return flag, flag != typed
    if typed in places and typed in ("prompt", "prompts"):
        raise SettingsError(f'the prompt stands alone, without a flag: minidiff {name} "a photo of a red dog"')
    hint = f" Did you mean --{near}?" if (near := our_name(typed, hints)) else ""
    raise SettingsError(f"--{typed} is no flag of minidiff {name}.{hint} minidiff {name} --help lists them.")


def value_of(flag: str, words: list[str], hint: Any) -> Any:
    """The words of a flag as a value of its type. SettingsError, with the nearest choice, for words that are none."""
    if get_origin(hint) is tuple:
        return tuple(value_of(flag, [word], get_args(hint)[0]) for word in words)
    if len(words) != 1:
        raise SettingsError(f"--{flag}: expected one argument, not {len(words)}.")
    word, optional = words[0], NoneType in get_args(hint)
    kind = get_args(hint)[0] if optional else hint
    if optional and word == "None":
        return None
    if choices := choices_of(kind):
        if word not in choices:
            near = next((choice for choice in choices if word and choice.startswith(word)), word)
            raise SettingsError(f"--{flag} is one of {', '.join(choices)}; not {word!r}.{did_you_mean(near, choices)}")
        return word == "True" if kind is bool else word
    try:
        return kind(word)
    except ValueError:
        raise SettingsError(f"--{flag} must be {NUMBERS[kind]}; it is {word!r:.60}.") from None


def choices_of(hint: Any) -> list[str]:
    """The words that a type allows: those of a Literal, or of bool, also in a tuple or beside None; [] where any is right."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return ["True", "False"] if hint is bool else [choice for one in get_args(hint) for choice in choices_of(one)]


def dataset(name: str) -> str:
    """A folder of pictures: the name itself, or a data set of that name in the local cache of the Hugging Face hub."""
    try:
        folder = local_folder(name, kind="dataset")
    except WeightsError as error:
        where = "there is no such folder, and no data set of that name in the hub's cache"
        raise SettingsError(f"--dataset_name {name}: {where}. Give the folder of the pictures as --train_data_dir.") from error
    return name if Path(name).is_dir() else str(folder / "train" if (folder / "train").is_dir() else folder)
