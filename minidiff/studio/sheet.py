"""Contact sheets over any one or two settings: how does guidance change the picture, from seed to seed?

    rows, columns = parse_axis("seed=0..3", Sampling), parse_axis("guidance_scale=1.5,5,20", Sampling)
    sheet = contact_sheet_of(settings, [rows, columns], draw)       # draw(settings) -> picture

An axis is a field of the settings' dataclass and the values that it takes. Names, types and choices come from the dataclass
itself, so that a new setting can be an axis on the day it is added.
"""

import csv
import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, get_type_hints

from PIL import Image

from minidiff.core.errors import MinidiffError, SettingsError, did_you_mean
from minidiff.draw.images import contact_sheet
from minidiff.draw.progress import progress
from minidiff.files.values import broken_rule, fits

MAX_TILES = 400
MAX_ABREAST = 6  # tiles of a single axis beside each other, before they are laid in rows
SHORT = {"guidance": "guidance_scale", "steps": "num_inference_steps", "model": "pretrained_model_name_or_path"}
NEEDS_LOADING = (
    *("pretrained_model_name_or_path", "tokenizer", "prediction_type", "lora", "lora_dir", "textual_inversion"),
    *("ip_adapter", "image_encoder", "controlnet", "torch_dtype", "device", "compile", "plain"),
)


@dataclasses.dataclass(frozen=True)
class Axis:
    """One setting and the values it takes, in order."""

    name: str
    values: tuple[Any, ...]

    @property
    def labels(self) -> list[str]:
        """The labels beside or above the tiles, such as "guidance 5" or "seed 2"; prompts and samplers stand for themselves."""
        short = {name: word for word, name in SHORT.items()} | {"prompts": "", "sampler": ""}
        return [f"{short.get(self.name, self.name.replace('_', ' '))} {shown(v)}".strip() for v in self.values]


def shown(value: Any) -> str:
    """5.0 -> "5"; a tuple as its parts."""
    if value in (None, ""):
        return "default" if value is None else "none"
    if isinstance(value, tuple):
        return " + ".join(map(shown, value)) or "none"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


# --- from words to an axis ---------------------------------------------------------------------------------------------


def parse_axis(text: str, kind: type, prompts: Sequence[str] = ()) -> Axis:
    """`guidance_scale=1.5,5,20`, `seed=0..3`, `sampler=ddim,unipc`, `lora_weight=0,0.5+1` -> an axis of the dataclass `kind`.

    `a..b` is every whole number from a to b; `none` a setting's own default, or no file; `x+y` one weight for each of several
    LoRAs; a value with commas stands in quotes, `negative_prompt=,"blurry, dark"`, and nothing is a value, too. `prompt`
    alone is the axis of `prompts`, which may hold commas. SettingsError for anything that cannot be an axis.
    """
    name, equals, listed = (part.strip() for part in text.partition("="))
    name = SHORT.get(name, name.replace("-", "_"))
    hints, names = get_type_hints(kind), [field.name for field in dataclasses.fields(kind)]
    if name in ("prompt", "prompts") and not equals:
        return Axis("prompts", tuple((prompt,) for prompt in prompts))
    if name not in names or name in ("prompt", "prompts"):
        hint = did_you_mean(name, [*names, *SHORT])
        raise SettingsError(f'"{text}" is no axis.{hint} Give "prompt" alone, or one of these with values: {", ".join(names)}.')
    values: list[Any] = []
    for word in map(str.strip, next(csv.reader([listed], skipinitialspace=True)) or [""]):
        if ends := re.fullmatch(r"(-?\d+)\.\.(-?\d+)", word):
            first, last = int(ends[1]), int(ends[2])
            if not first <= last < first + MAX_TILES:
                raise SettingsError(f"{text}: the second number has to be above the first, by {MAX_TILES - 1} at most.")
            values += range(first, last + 1)
        else:
            values.append(value_of(word, hints[name], name))
    return Axis(name, tuple(values))


def value_of(word: str, hint: Any, name: str) -> Any:
    """One word of an axis as a value of the type `hint`: the first reading that fits."""
    readings = [word, [word], _json(word), [_json(part) for part in word.split("+")]]
    for value in [None, [], *readings] if word.lower() == "none" else readings:
        if fits(value, hint):
            return tuple(value) if isinstance(value, list) else value
    kind = "a whole number" if hint is int else getattr(hint, "__name__", hint)
    raise SettingsError(f"{name}={word}: {broken_rule(word, hint) or f'must be {kind}'}.")


def _json(word: str) -> Any:
    """A number or true or false; any other word as it is."""
    try:
        return json.loads(word.lower())
    except ValueError:
        return word


# --- the sheet ---------------------------------------------------------------------------------------------------------


def contact_sheet_of(
    settings: Any,
    axes: Sequence[Axis],
    draw: Callable[[Any], Image.Image],
    title: str = "",
    tile: int = 256,
    check: Callable[[Any], None] = lambda settings: None,
    abreast: int | None = None,
) -> Image.Image:
    """Draw a picture for each value of one axis, or for each pair of values of rows and columns, and label them. `settings`
    is a dataclass; it stays as it is. `abreast`: tiles in a row, where there is one axis.

    `check` sees every tile's settings before the first is drawn. SettingsError for axes that cannot be; any error while
    drawing says which tile it was.
    """
    names, width = [axis.name for axis in axes], len(axes[-1].values)
    if len(set(names)) < len(names):
        raise SettingsError(f"rows and columns are both {names[0]}; give two settings, or one alone.")
    check_count(math.prod(len(axis.values) for axis in axes))
    tiles = [dataclasses.replace(settings, **dict(zip(names, values))) for values in product(*(axis.values for axis in axes))]
    for one in tiles:
        check(one)
    order, drawn = list(range(len(tiles))), dict[int, Image.Image]()
    if names[-1] in NEEDS_LOADING:  # column by column: what has to be loaded changes as seldom as possible
        order.sort(key=lambda i: i % width)
    labels = [", ".join(each) for each in product(*(axis.labels for axis in axes))]
    for i in progress(order, "picture", show=True):
        try:
            drawn[i] = draw(tiles[i])
        except MinidiffError as error:
            raise type(error)(f"{labels[i]}: {error}") from error
    pictures = [drawn[i] for i in range(len(tiles))]
    if len(axes) == 1:
        return gallery(pictures, labels, title, tile, abreast)
    grid = [pictures[i : i + width] for i in range(0, len(pictures), width)]
    return contact_sheet(grid, axes[0].labels, axes[1].labels, title, tile)


def check_count(pictures: int) -> None:
    if pictures > MAX_TILES:
        raise SettingsError(f"{pictures} pictures; a sheet holds {MAX_TILES} at most. Give fewer values.")


def gallery(
    images: Sequence[Image.Image], captions: Sequence[str], title: str = "", tile: int = 256, abreast: int | None = None
) -> Image.Image:
    """A sheet of captioned pictures in rows of `abreast`, or of equal length, or nearly so."""
    abreast = abreast or math.ceil(len(images) / math.ceil(len(images) / MAX_ABREAST))
    starts = range(0, len(images), abreast)
    rows = [row for i in starts for row in (images[i : i + abreast], captions[i : i + abreast])]
    return contact_sheet(rows, title=title, tile=tile)
