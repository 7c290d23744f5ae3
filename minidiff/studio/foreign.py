"""What other programs write into their pictures, read as far as it maps to our settings.

    parameters   AUTOMATIC1111 and its forks: prompt, `Negative prompt: …`, `Steps: 20, Sampler: Euler a, …` (also as EXIF)
    prompt       ComfyUI: the graph of nodes as JSON, read by studio/comfyui.py

A `Reading` says what was taken over and, in its notes, what was not: nothing is dropped silently. Every text is material from
a stranger: it is cleaned of control characters, its numbers are checked, and reading takes time linear in its length.
"""

import json
import math
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from minidiff.core.errors import DataError
from minidiff.core.grids import SAMPLERS
from minidiff.draw.images import READ_ERRORS, read_png_text
from minidiff.draw.prompting import clip_skip_from_a1111

MAX_TEXT = 1_000_000  # characters: no program writes so much
MAX_LISTED = 12

SAMPLER_NAMES = {  # ours -> what A1111 shows and reads
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "pndm": "PLMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm++_2m": "DPM++ 2M",
    "dpm++_2m_sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
}
OURS = {name.lower(): ours for ours, name in SAMPLER_NAMES.items()}
AUTOMATIC_IS_KARRAS = ("dpm++_2m", "dpm++_2m_sde")  # A1111 1.9: what "Automatic" stands for
NUMBER = re.compile(r"[+-]?(?:[0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})(?:[eE][+-]?[0-9]{1,4})?")
COMMAND = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]")  # ECMA-48, 5.4: colours, cursor, erasing
HIDDEN = {"Cc", "Cs"}  # control characters, halves of surrogates
BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # they turn what follows around on a terminal


@dataclass(frozen=True)
class Reading:
    """Settings of ours by the names of their flags, and what a person should hear."""

    program: str
    settings: dict[str, object]
    notes: tuple[str, ...] = ()


# --- texts of strangers ----------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """Without what a terminal would obey: its commands, control characters other than line ends and tabs, and turns of
    direction."""
    kept = (
        c
        for c in COMMAND.sub("", text).replace("\r\n", "\n")
        if c in "\n\t" or not (unicodedata.category(c) in HIDDEN or c in BIDI)
    )
    return "".join(kept)


def shown(value: object, length: int = 60) -> str:
    """Anything from a file as part of one line of a message."""
    line = " ".join(clean(str(value)).split())
    return line if len(line) <= length else line[: length - 1] + "…"


def listing(names: Iterable[str]) -> str:
    """Such as `ENSD, Hires upscale`; a dozen at most."""
    short = [shown(name, 40) for name in dict.fromkeys(names)]
    return ", ".join(short[:MAX_LISTED]) + (f", and {len(short) - MAX_LISTED} more" if len(short) > MAX_LISTED else "")


def number(value: object, low: float, high: float, whole: bool = False) -> int | float | None:
    """A number of a text or of JSON, if it is one, finite and in [low, high]; else None."""
    if isinstance(value, str):
        if not NUMBER.fullmatch(value.strip()):
            return None
        value = int(value) if re.fullmatch(r"\s*[+-]?[0-9]+\s*", value) else float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or not math.isfinite(value):
        return None
    if whole:
        return int(value) if value == int(value) else None
    return value


LIMITS = {  # by our setting: the least, the most, whole numbers only
    "num_inference_steps": (1, 1000, True),
    "guidance_scale": (0, 100, False),
    "seed": (0, 2**64 - 1, True),
    "width": (8, 8192, True),
    "height": (8, 8192, True),
    "clip_skip": (0, 11, True),
    "eta": (0, 1, False),
}


def take(settings: dict[str, object], left: list[str], name: str, value: object, label: str) -> None:
    """Put a number into the settings; or, where it cannot be one, its label and value on the list of what is left out."""
    low, high, whole = LIMITS[name]
    if (found := number(value, low, high, whole)) is None:
        left.append(f"{label}: {shown(value, 20)}")
    else:
        settings[name] = found


# --- files -----------------------------------------------------------------------------------------------------------


def picture_texts(path: Path | str) -> dict[str, str]:
    """The texts of a PNG by key, or as `parameters` the comment of a GIF, or the EXIF comment of a JPEG or WebP.

    DataError for any over the limit.
    """
    texts = read_png_text(path) or comment(Path(path))
    for key, text in texts.items():
        if key in ("minidiff", "parameters", "prompt") and len(text) > MAX_TEXT:
            raise DataError(f'{path}: its text "{key}" has {len(text):,} characters, more than any program writes; not read.')
    return texts


def comment(path: Path) -> dict[str, str]:
    """{"parameters": …} of a GIF's comment, or of EXIF's UserComment, which A1111 writes as UTF-16 behind UNICODE; or {}."""
    try:
        with Image.open(path, formats=("JPEG", "WEBP", "GIF")) as image:
            if image.format == "GIF":
                return {"parameters": image.info.get("comment", b"").decode("utf-8", "replace")}
            found = image.getexif().get_ifd(0x8769).get(0x9286, b"")  # the Exif table, and UserComment in it
    except READ_ERRORS:
        return {}
    if not isinstance(found, bytes):
        return {}
    kind, text = found[:8], found[8 : 8 + 4 * MAX_TEXT]
    if kind == b"UNICODE\0":
        # the byte order is that of the file or of the program: a prompt is mostly ASCII, with its zeros on one side
        order = "utf-16-le" if text[1::2].count(0) > text[0::2].count(0) else "utf-16-be"
        return {"parameters": text.decode(order, "replace").lstrip("\ufeff")}
    return {"parameters": text.decode("utf-8", "replace")} if kind == b"ASCII\0\0\0" else {}


def parse_json(text: str, what: str) -> object:
    """JSON of a stranger; NaN becomes None (ComfyUI writes it). DataError if it is none, or nested too deep."""
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except RecursionError:
        raise DataError(f"{what} is nested too deep; no program writes that.") from None
    except ValueError as error:
        raise DataError(f"{what} is no JSON ({shown(error)}).") from None


# --- AUTOMATIC1111 ---------------------------------------------------------------------------------------------------


def read_a1111(text: str) -> Reading:
    """The text that A1111 and its forks write. Its grammar: `create_infotext` and `parse_generation_parameters` there."""
    prompt, negative, line = split_a1111(clean(text))
    values = fields_of(line)
    prompt, networks = without_networks(prompt)
    settings: dict[str, object] = {"prompt": prompt, "negative_prompt": negative}
    left: list[str] = []
    for label, name in (("Steps", "num_inference_steps"), ("CFG scale", "guidance_scale"), ("Seed", "seed")):
        if label in values:
            take(settings, left, name, values.pop(label), label)
    width, cross, height = values.pop("Size", "").partition("x")
    if cross:
        take(settings, left, "width", width, "Size")
        take(settings, left, "height", height, "Size")
    skip = values.pop("Clip skip", "1")  # theirs for the last layer; 0 is ours
    if (layer := number(skip, 1, 12, whole=True)) is None:
        left.append(f"Clip skip: {skip}")
    else:
        settings["clip_skip"] = clip_skip_from_a1111(int(layer))
    _sampler(values, settings, left)
    if settings.get("sampler") == "ddim" and (eta := values.pop("Eta DDIM", values.pop("Eta", None))):
        take(settings, left, "eta", eta, "Eta")
    notes = [*_models(values), *networks]
    if "Denoising strength" in values and not any(key.startswith("Hires") for key in values):
        notes.append(needs_picture(values.pop("Denoising strength")))
    rest = [f"{key}: {value}" for key, value in values.items() if key not in ("Version", "Schedule type")]
    if left or rest:
        notes.append(f"not taken over, because minidiff has no counterpart: {listing([*left, *rest])}")
    return Reading(f"A1111 {shown(values.get('Version', ''), 30)}".strip(), settings, tuple(notes))


def split_a1111(text: str) -> tuple[str, str, str]:
    """Prompt, negative prompt, line of settings. Prompts may have several lines; the last line of `Steps: …` counts."""
    lines = text.strip().split("\n")
    last = max((i for i, line in enumerate(lines) if line.lstrip().startswith("Steps: ")), default=len(lines))
    start = next((i for i, line in enumerate(lines[:last]) if line.lstrip().startswith("Negative prompt:")), last)
    negative = "\n".join(lines[start:last]).lstrip().removeprefix("Negative prompt:")
    return "\n".join(lines[:start]).strip(), negative.strip(), "".join(lines[last : last + 1]).strip()


QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


def fields_of(line: str) -> dict[str, str]:
    """`Steps: 20, Size: 512x512, Lora hashes: "a: 1, b: 2"` as a table; quotes are JSON's. Linear in its length."""
    values: dict[str, str] = {}
    at = 0
    while (colon := line.find(":", at)) >= 0:
        key = line[at:colon].strip(" ,")
        start = colon + 1 + (line[colon + 1 : colon + 2] == " ")
        quoted = QUOTED.match(line, start)
        comma = line.find(",", quoted.end() if quoted else start)
        end = len(line) if comma < 0 else comma
        value = line[start:end].strip()
        if quoted and value == quoted[0]:
            try:
                value = clean(str(json.loads(value)))
            except ValueError:
                pass  # quoted by another rule: as it stands
        values[key] = value
        at = end + 1
    return values


def _sampler(values: dict[str, str], settings: dict[str, object], left: list[str]) -> None:
    """`DPM++ 2M Karras`, or since version 1.9 `DPM++ 2M` and a `Schedule type`."""
    if (name := values.pop("Sampler", None)) is None:
        return
    plain = name.lower().removesuffix(" karras")
    schedule = "karras" if plain != name.lower() else values.pop("Schedule type", "").lower()
    if (ours := OURS.get(plain, plain if plain in SAMPLER_NAMES else None)) is None:
        left.append(f"Sampler: {shown(name)}")
        return
    settings["sampler"] = ours
    if not SAMPLERS[ours].karras:
        if schedule == "karras":
            left.append("Schedule type: Karras")
        return
    if schedule == "automatic":
        schedule = "karras" if ours in AUTOMATIC_IS_KARRAS else ""
    if schedule not in ("", "karras", "uniform", "normal"):
        left.append(f"Schedule type: {shown(schedule)}")
    settings["use_karras_sigmas"] = schedule == "karras"


def _models(values: dict[str, str]) -> list[str]:
    """What was loaded: files that we cannot know, by name and hash."""
    notes = []
    if name := values.pop("Model", values.get("Model hash")):
        hashed = values.pop("Model hash", "")
        notes.append(f"its model is {shown(name)}{f' (hash {shown(hashed)})' if hashed else ''}{GIVE_MODEL}")
    for label, flag in (("Lora hashes", "lora"), ("TI hashes", "textual_inversion")):
        if hashed := values.pop(label, ""):
            notes.append(f"{label} {shown(hashed, 200)}: give the files with --{flag}")
    return notes


GIVE_MODEL = ": give yours with --pretrained_model_name_or_path"


TAG = re.compile(r"<(lora|lyco|hypernet):([^<>:]*)(?::([^<>]*))?>", re.IGNORECASE)


def needs_picture(strength: object) -> str:
    """A note for image to image. (--strength without a picture would be an error, so it is not taken over.)"""
    return (
        f"it was made from another picture, which it does not hold: give it with --image and --strength {shown(strength, 20)}"
    )


def without_networks(prompt: str) -> tuple[str, list[str]]:
    """The prompt without its `<lora:name:weight>`, and a note for each of them."""
    notes = []
    for kind, name, weight in TAG.findall(prompt)[:MAX_LISTED]:
        flag = "no counterpart here" if kind == "hypernet" else f"give its file with --lora, and --lora_weight {weight or 1}"
        notes.append(f"it uses the {kind} {shown(name)} at {shown(weight or 1)}: {shown(flag)}")
    return TAG.sub("", prompt).strip(), notes
