"""A picture's own word on how it was made, read back: `minidiff sample --from picture.png`.

    origin = read_origin("picture.png")         settings that draw it again; those of A1111 and ComfyUI as far as they map
    notes = check_origin(origin, settings)      what differs here, once the flags that win have been put into the settings

Nothing in the picture is trusted: types, sizes and letters are checked, and a path in it leads down from the working folder
or the picture's own, to a file that must exist.

The same word decides what a drawing command may write over: see `output_files`.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch

from minidiff import __version__
from minidiff.cli.flags import Attention, Filmstrip, Morph, Sample, Sheet
from minidiff.core.config import fits
from minidiff.core.errors import DataError, MinidiffError, SettingsError
from minidiff.draw.images import check_writable
from minidiff.studio.comfyui import read_comfyui
from minidiff.studio.foreign import Reading, clean, listing, parse_json, picture_texts, read_a1111, shown
from minidiff.studio.hashes import HASHES, is_sha256, remembered_place
from minidiff.studio.recipe import CHUNK, NOT_PIXELS, SCHEMA, TEXTS, public_path, several, versions

Drawing = Sample | Sheet | Morph | Filmstrip | Attention
# The last line of A1111's text, as provenance.py and previews.py write it.
OURS = re.compile(r"Steps: .*, Version: minidiff [^,]+|minidiff preview, step [0-9]+ of [0-9]+")

# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """What a picture says of its making."""

    path: Path
    settings: Sample  # flags may change them before `check_origin` looks
    sha256: dict[str, tuple[str, ...]]  # by setting
    made_with: dict[str, str]  # versions and machine
    notes: tuple[str, ...]  # what could not be taken over


def read_origin(path: str | Path) -> Origin:
    """The settings that draw a picture again; by default beside it in the working folder, as NAME-again.png.

    DataError, one message, for a picture that says nothing or whose text is damaged, too long or no recipe.
    """
    path = Path(path)
    texts = picture_texts(path)
    if texts.get(CHUNK):
        return _own(path, texts[CHUNK])
    if texts.get("parameters", "").strip():
        reading = read_a1111(texts["parameters"])
    elif texts.get("prompt", "").strip():
        reading = read_comfyui(parse_json(texts["prompt"], f'{path}: its text "prompt"'), path)
    else:
        raise DataError(
            f"{path} does not say how it was made: there is no text of minidiff, A1111 or ComfyUI in it. Editors and "
            "messengers take it out; look for the original file."
        )
    return _foreign(path, reading)


def _foreign(path: Path, reading: Reading) -> Origin:
    known = {f.name for f in fields(Sample)}
    values = {name: value for name, value in reading.settings.items() if name in known}
    notes = [f"{path} was made with {reading.program}: settings are taken over, but its noise is another, so are the pixels."]
    notes += [f"{path}: {note}." for note in reading.notes]
    if strange := [f"{name}: {value}" for name, value in reading.settings.items() if name not in known]:
        notes.append(f"{path}: this minidiff has no such settings: {listing(strange)}.")
    settings = replace(Sample(output=f"{path.stem}-again.png"), **values)  # type: ignore[arg-type]
    return Origin(path, settings, {}, {}, tuple(notes))


def _own(path: Path, text: str) -> Origin:
    where = f'{path}: its text "{CHUNK}"'
    about = parse_json(text, where)
    if not isinstance(about, dict) or not isinstance(about.get("settings"), dict):
        raise DataError(f"{where} is no recipe of minidiff's. Look for the original file.")
    if (schema := about.get("schema")) != SCHEMA:
        raise DataError(f"{where} is a recipe of kind {shown(schema)}; this minidiff {__version__} reads kind {SCHEMA}.")
    values, notes = _values(about["settings"], path)
    made_with = {**_texts_of(about.get("versions")), **_texts_of(about.get("machine"))}
    hashes = {name: tuple(filter(is_sha256, several(sha256))) for name, sha256 in _table(about.get("sha256")).items()}
    for name, sha256 in hashes.items():
        if name in HASHES and values.get(name) and len(sha256) == len(several(values[name])):
            places = [_found(name, value, digest, path) for value, digest in zip(several(values[name]), sha256)]
            values[name] = tuple(places) if isinstance(values[name], tuple) else places[0]
    device, dtype = made_with.get("device"), made_with.get("dtype")
    if device == "cpu" or (device == "cuda" and torch.cuda.is_available()):
        values |= {"device": device}
        values |= {"torch_dtype": dtype} if dtype in ("float32", "float16", "bfloat16") else {}
    settings = replace(Sample(output=f"{path.stem}-again.png"), **values)
    return Origin(path, settings, hashes, made_with, tuple(notes))


def _values(given: Mapping[str, object], path: Path) -> tuple[dict[str, Any], list[str]]:
    """Settings out of JSON: of the right types, clean, and with paths that lead nowhere else; and notes."""
    values: dict[str, Any] = {}
    notes, hints = [], {name: hint for name, hint in get_type_hints(Sample).items() if name not in NOT_PIXELS}
    if strange := [f"{name}: {value}" for name, value in given.items() if name not in hints]:
        notes.append(f"{path}: this minidiff has no such settings: {listing(strange)}. The pixels may differ.")
    for name, value in given.items():
        if name not in hints:
            continue
        if not fits(value, hints[name]) or not _usable(value, name):
            raise DataError(f"{path}: its recipe says {name} is {shown(value)}, which cannot be. Look for the original file.")
        tidy = [clean(one) if isinstance(one, str) else one for one in several(value)]
        tidy = [public_path(one) if isinstance(one, str) and name not in TEXTS else one for one in tidy]
        if tidy != several(value):
            notes.append(f"{path}: {name} held letters or paths that minidiff does not write; they were left out.")
        values[name] = tuple(tidy) if isinstance(value, list) else tidy[0]
    return values, notes


def _usable(value: object, name: str) -> bool:
    """1e999 is valid JSON, and infinity; so is a whole number that no float holds. Any whole number is a seed."""
    return name == "seed" or all(abs(one) < 2**63 for one in several(value) if isinstance(one, (int, float)))


def _table(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _texts_of(value: object) -> dict[str, str]:
    return {shown(name, 20): shown(text, 40) for name, text in _table(value).items()}


def _found(name: str, value: str, sha256: str, picture: Path) -> str:
    """Where these very bytes are: as the recipe says, beside the picture, or where they were last seen; else as it says."""
    places = (value, str(picture.parent / value), remembered_place(sha256) or value)
    return next((place for place in dict.fromkeys(places) if _digest_at(name, place) == sha256), value)


def _digest_at(name: str, path: str) -> str | None:
    """The hash of what lies there, or None."""
    if not os.path.exists(path) and name != "pretrained_model_name_or_path":  # which may be a hub id
        return None
    hashed: Callable[[str], str] = HASHES[name]
    try:
        return hashed(path)
    except (MinidiffError, OSError):
        return None


# --- what may be written over ----------------------------------------------------------------------------------------


def drawn_here(path: Path) -> bool:
    """Does a file say that minidiff drew it? A model or a prompt of that name is not enough."""
    try:
        texts = picture_texts(path)
    except DataError:  # no picture
        return False
    return CHUNK in texts or OURS.fullmatch(texts.get("parameters", "").rpartition("\n")[2]) is not None


def output_files(s: Drawing, origin: Path | None = None) -> list[Path]:
    """Where a command's pictures go; SettingsError, before anything is loaded, where that would cost a file.

    What minidiff drew is drawn over (it says how to draw it again). Any other file is left alone, and so is every picture
    that the command reads; `origin` is that of --from.
    """
    path = Path(s.output)
    count, preview = (s.num_images_per_prompt, s.preview) if isinstance(s, Sample) else (1, None)
    for flag, given in (("--output", s.output), ("--preview", preview)):
        if given is not None and Path(given).suffix.lower() != ".png" and not isinstance(s, Morph):
            raise SettingsError(f'{flag} "{given}": pictures are written as PNG; give a name that ends in .png.')
    names = [path] if count == 1 else [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)]
    read = {"--image": s.image, "--mask_image": s.mask_image, "--from": origin}
    taken = {_identity(place): flag for flag, place in read.items() if place is not None}
    for flag, name in [("--output", name) for name in names] + [("--preview", Path(name)) for name in (preview,) if name]:
        if (other := taken.setdefault(_identity(name), flag)) != flag:
            raise SettingsError(f"{flag} {name} is the file of {other}, too; choose another name.")
        if os.path.lexists(name) and not drawn_here(name):
            raise SettingsError(f"{flag} {name} is there already, and does not say that minidiff drew it; choose another name.")
        check_writable(name)
    return names


def _identity(path: str | Path) -> tuple[int, int] | str:
    """Equal for one file by two names."""
    try:
        status = os.stat(path)
    except OSError:  # none yet
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


# --- comparing -------------------------------------------------------------------------------------------------------


def check_origin(origin: Origin, settings: Sample) -> list[str]:
    """Notes on what differs here and may change pixels. `settings` are the origin's with the flags that were given.

    SettingsError, naming the flag, for a file that is not here, and for an output that would replace the picture itself.
    """
    output_files(settings, origin.path)
    notes = list(origin.notes)
    for name, hashes in origin.sha256.items():
        if name not in HASHES or (value := getattr(settings, name, None)) != getattr(origin.settings, name, None):
            continue  # a flag wins
        for path, sha256 in zip(several(value) if value else [], hashes):
            if (here := _digest_at(name, path)) is None:
                what = f"{shown(path, 300)} (sha256 {sha256[:10]}…)"
                raise SettingsError(f"{origin.path} was made with {what}, which is not here; give it with --{name}.")
            if here != sha256:
                notes.append(f"{shown(path, 300)} is not the file that {origin.path} was made with (sha256 {sha256[:10]}…).")
    return notes + _differences(origin, settings)


def _differences(origin: Origin, settings: Sample) -> list[str]:
    """One note on versions and machine, if there is anything to say."""
    if not origin.made_with:
        return []
    here = {**versions(), "threads": str(torch.get_num_threads()), "device": _device(settings)}
    if here["device"] == "cpu" == origin.made_with.get("device"):
        here["kernels"] = torch.backends.cpu.get_cpu_capability()
    changed = [f"{name} {said} (here {here[name]})" for name in here if (said := origin.made_with.get(name, "?")) != here[name]]
    hint = " OMP_NUM_THREADS sets the threads." if any(text.startswith("threads") for text in changed) else ""
    return [f"{origin.path} was made with {', '.join(changed)}; pixels may differ.{hint}"] if changed else []


def _device(settings: Sample) -> str:
    return (settings.device or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")[0]
