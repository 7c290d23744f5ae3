"""How a picture was made: written into the PNG, and read back.

    save_png(image, path, recipe_texts(settings, pipe, image.size))     # settings: the values of the flags by name
    origin = read_origin("picture.png", Sample)                         # origin.settings draws the same pixels again
    notes = check_origin(origin, settings)                              # what differs here and may change pixels

A picture holds two texts. `parameters` has the form of AUTOMATIC1111 (studio/a1111.py). `minidiff` is JSON: every setting, the
sha256 of every file that was used, the versions and the machine, but no date, user or host, and no folder outside of the
working folder. A text in a picture may come from anybody: types and sizes are checked.
"""

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from typing import Any, get_type_hints

import torch

from minidiff import __version__
from minidiff.core.errors import DataError, MinidiffError, SettingsError
from minidiff.draw.device import chosen_device
from minidiff.draw.images import read_png_text
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.values import fits
from minidiff.studio.a1111 import Settings, parameters, read_a1111, strength_of, with_named_loras
from minidiff.studio.hashes import HASHES

SCHEMA, KEY = 1, "minidiff"
TAG = re.compile(r"<(?:lora|lyco):[^<>]*>", re.IGNORECASE)
MAX_DIGITS = 100  # no program writes larger numbers
PROMPTS = ("prompt", "negative_prompt")
# "machine" says which device and dtype were used
NOT_PIXELS = ("output", "num_images_per_prompt", "lora_dir", "compile", "plain", "device", "torch_dtype")
OURS = f"Version: {KEY} ".encode()  # stands in every file that minidiff draws

# --- writing -----------------------------------------------------------------------------------------------------------


def recipe_texts(settings: Settings, pipe: StableDiffusionPipeline, size: tuple[int, int]) -> dict[str, str]:
    """The texts of one picture of `size` (W, H), drawn alone from `seed`: in a batch, matrix products round differently."""
    values = with_named_loras(settings)
    values |= {"sampler": values["sampler"] or pipe.sampler, "strength": strength_of(values)}
    recipe = {
        "schema": SCHEMA,
        "settings": {name: _public(name, value) for name, value in values.items() if name not in NOT_PIXELS},
        "sha256": {name: [hashed(path) for path in several(values[name])] for name, hashed in HASHES.items() if values[name]},
        "size": size,
        "versions": versions(),
        "machine": machine(pipe.device) | {"dtype": str(pipe.dtype).removeprefix("torch.")},
    }
    return {"parameters": parameters(settings, pipe, size), KEY: json.dumps(recipe, separators=(",", ":"), allow_nan=False)}


def versions() -> dict[str, str]:
    libraries = {"torch": str(torch.__version__), "transformers": version("transformers")}  # not imported: it takes seconds
    return {"minidiff": __version__, **libraries, "python": platform.python_version()}


def machine(device: torch.device) -> dict[str, str]:
    """Everything that the last bit of a pixel depends on: the GPU, or the instructions of the CPU and its number of threads."""
    named = {"cuda": lambda: torch.cuda.get_device_name(device), "mps": platform.processor}
    kernels = named.get(device.type, torch.backends.cpu.get_cpu_capability)()
    return {"device": device.type, "threads": str(torch.get_num_threads()), "kernels": kernels}


def public_path(path: str) -> str:
    """A path as typed, if it leads down from the working folder (or is a hub id); else its last name alone."""
    pure = PureWindowsPath(path)  # knows both kinds of slash, and drives
    if not (path.startswith(("~", "/", "\\")) or pure.drive or ".." in pure.parts):
        return path
    return "unnamed" if pure.name in ("", "..") or path.startswith("~") and len(pure.parts) == 1 else pure.name


def _public(name: str, value: Any) -> Any:
    """The value of a setting without private folders."""
    if isinstance(value, (tuple, list)):
        return tuple(_public(name, one) for one in value)
    return public_path(value) if isinstance(value, str) and name not in PROMPTS else value


def several(value: Any) -> list[Any]:
    """One value, or many, or none, as a list."""
    return list(value) if isinstance(value, (tuple, list)) else [] if value is None else [value]


# --- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """How a picture says that it was made."""

    path: Path
    settings: dict[str, Any]  # by flag
    sha256: dict[str, list[Any]]  # by setting, one for each file
    made_with: dict[str, Any]  # versions and machine
    notes: list[str]


def read_origin(path: str | Path, kind: type) -> Origin:
    """The settings that draw a picture again: fields of the dataclass `kind`. DataError for a picture without a usable text."""
    path = Path(path)
    texts = read_png_text(path)
    text = texts.get(KEY) or texts.get("parameters", "").strip()
    if not text:
        why = "there is no text of minidiff or A1111 in it, which editors and messengers take out"
        raise DataError(f"{path} does not say how it was made: {why}. Look for the original PNG.")
    if KEY not in texts:
        note = f"{path} was made with A1111 or its like, so its noise is another, and so are the pixels. Taken over are its"
        settings, notes = read_a1111(text), [f"{note} prompts, steps, sampler, seed, size and guidance alone."]
        negative = settings["negative_prompt"]
        if tags := TAG.findall(negative):  # in A1111 they have no effect there
            settings["negative_prompt"] = TAG.sub("", negative).strip()
            notes.append(f"{path}: its negative prompt names {', '.join(tags)}, which is left out, as A1111 does.")
        return Origin(path, settings, {}, {}, notes)
    try:
        whole = json.loads(text, parse_int=lambda digits: int(digits) if len(digits) <= MAX_DIGITS else float(digits))
        return _own(path, whole, get_type_hints(kind))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        what = f'its text "{KEY}" is no recipe that minidiff {__version__} reads ({str(error)!r:.100})'
        raise DataError(f"{path}: {what}. Look for the original file.") from None


def _own(path: Path, recipe: Any, hints: Mapping[str, Any]) -> Origin:
    """The origin in a recipe of our own; one of several errors of Python for other JSON."""
    if recipe["schema"] != SCHEMA:
        raise ValueError(f"kind {recipe['schema']}")
    known = {name: value for name, value in recipe["settings"].items() if name in hints and name not in NOT_PIXELS}
    if wrong := [name for name in ("prompt", *known) if not fits(known[name], hints[name])]:
        raise ValueError(f"{wrong[0]} is {known[wrong[0]]}")
    json.dumps(known, ensure_ascii=False, allow_nan=False).encode()  # ValueError for infinity, and for halves of letters
    settings = {name: _public(name, value) for name, value in known.items()}
    unknown = [name for name in recipe["settings"] if name not in known]
    notes = [f"{path}: this minidiff does not have the settings {unknown!r:.200}. The pixels may differ."] if unknown else []
    sha256 = {name: several(found) for name, found in recipe["sha256"].items() if name in HASHES}
    made_with = {**recipe["versions"], **recipe["machine"]}
    if made_with.get("device") in ("cpu", chosen_device(None)):
        settings |= {"device": made_with["device"], "torch_dtype": made_with.get("dtype")}
    return Origin(path, settings, sha256, made_with, notes)


# --- drawing again -----------------------------------------------------------------------------------------------------


def check_origin(origin: Origin, settings: Settings) -> list[str]:
    """Notes on differences here that may change pixels. `settings`: the origin's, and over them the flags that were given.
    SettingsError for a file that is not here."""
    notes = list(origin.notes)
    for name, digests in origin.sha256.items():
        if settings[name] != origin.settings.get(name):
            continue  # a flag wins
        for path, digest in zip(several(settings[name]), digests):
            file = f"{path!r:.300} (sha256 {digest!r:.12})"
            try:
                same = HASHES[name](path) == digest
            except (MinidiffError, OSError, ValueError):
                raise SettingsError(f"{origin.path} was made with {file}, which is not here; give it with --{name}.") from None
            notes += [] if same else [f"{origin.path} was made with {file}; the file of that name here is another one."]
    now = versions() | machine(torch.device(chosen_device(settings["device"])))
    changed = [f"{key} {was!r:.40} (here {now[key]})" for key in now if (was := origin.made_with.get(key)) != now[key]]
    if origin.made_with and changed:
        notes.append(f"{origin.path} was made with {', '.join(changed)}; pixels may differ. OMP_NUM_THREADS sets the threads.")
    return notes
