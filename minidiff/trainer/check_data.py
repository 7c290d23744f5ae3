"""Look over a folder of pictures before training: `minidiff data check FOLDER` lists everything that is wrong at once.

Errors stop a training run. Notices are things that it handles (a photo on its side is turned), or that it cannot know to
be wrong (two pictures that are the same).
"""

import hashlib
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from minidiff.core.errors import DataError
from minidiff.draw.images import FORMATS, load_image
from minidiff.trainer.buckets import Size
from minidiff.trainer.dataset import Example, scan_folder
from minidiff.trainer.latents import check_picture

MOST_TOKENS = 75  # of a prompt, that CLIP reads
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright


@dataclass(frozen=True)
class Problem:
    """One line of the table."""

    kind: Literal["error", "notice"]
    what: str  # begins with the file
    can_be_skipped: bool = False  # by --skip_bad


def check_dataset(
    folder: Path,
    prompt: str | None,
    column: str | None,
    resolution: int,
    *,
    masks: bool = False,
    buckets: Sequence[Size] = (),
    trigger: str | None = None,
    count_tokens: Callable[[str], int] | None = None,
) -> list[Problem]:
    """Everything that training on `folder` would stumble over, errors first; arguments as the flags of training.

    `trigger` is a word that every caption should hold; `count_tokens` says how long a caption is.
    """
    scan = scan_folder(folder, prompt, column, masks)
    found = [Problem("error", text) for text in scan.errors] + [Problem("notice", text) for text in scan.notices]
    seen: dict[str, Path] = {}
    known = {example.path for example in scan.examples}
    for example in scan.examples + [Example(path, "") for path in scan.pictures if path not in known]:
        found += _of_picture(example, resolution, buckets, seen)
    for example in scan.examples:
        found += _of_caption(example, trigger, count_tokens)
    return sorted(found, key=lambda problem: problem.kind)  # stable: in the order of the files


def _of_picture(example: Example, resolution: int, buckets: Sequence[Size], seen: dict[str, Path]) -> list[Problem]:
    """The problems of one picture; `seen` holds the hashes of the pictures before it."""
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            image = load_image(example.path)  # warns of animations
        check_picture(example, image, resolution, buckets)
    except DataError as error:
        return [Problem("error", str(error), can_be_skipped=True)]
    notices = [str(warning.message) for warning in said] + [f"{example.path}: {text}" for text in _kind_of(example.path)]
    pixels = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
    if pixels in seen:
        notices.append(f"{example.path}: the same picture as {seen[pixels].name}.")
    seen.setdefault(pixels, example.path)
    return [Problem("notice", text) for text in notices]


def _kind_of(path: Path) -> list[str]:
    """Unusual properties of a picture that can be read, and how training handles them."""
    with Image.open(path, formats=FORMATS) as image:
        kinds = {
            "16 bits a channel; brought to 8.": image.mode.startswith("I"),
            "CMYK; brought to RGB, and colours may shift.": image.mode == "CMYK",
            "transparent; laid over white.": image.has_transparency_data,
            "on its side; turned as its EXIF mark says.": image.getexif().get(ORIENTATION, 1) != 1,
        }
    return [text for text, holds in kinds.items() if holds]


def _of_caption(example: Example, trigger: str | None, count_tokens: Callable[[str], int] | None) -> list[Problem]:
    notices = []
    if trigger and not re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", example.caption, re.IGNORECASE):
        notices.append(f'{example.path}: the word "{trigger}" is not in its caption, "{example.caption:.60}".')
    if count_tokens and (count := count_tokens(example.caption)) > MOST_TOKENS:
        notices.append(f"{example.path}: its caption has {count} tokens, and CLIP reads {MOST_TOKENS}; the end is lost.")
    return [Problem("notice", text) for text in notices]


def as_table(problems: list[Problem], folder: Path) -> str:
    """For the terminal: a line each, files as seen from the folder, and a last line that counts."""
    rows = [f"{p.kind:<8}{p.what}".replace(f"{folder}/", "").replace("\n", " ") for p in problems]
    errors = sum(p.kind == "error" for p in problems)
    return "\n".join([*rows, f"{errors} errors, {len(problems) - errors} notices"])
