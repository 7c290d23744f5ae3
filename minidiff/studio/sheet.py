"""Contact sheets over any one or two settings: what does guidance do, from seed to seed?

    columns = parse_axis("guidance_scale=1.5,5,20", Sampling)
    rows = parse_axis("seed=0..3", Sampling)
    sheet = contact_sheet_of(settings, columns, rows, draw)       # draw(settings) -> picture

An axis is a field of the settings' dataclass and the values that it takes. Names, types and choices come from the dataclass
itself, so that a new setting can be an axis on the day it is added.
"""

import dataclasses
import math
import re
import types
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from PIL import Image

from minidiff.core.errors import MinidiffError, SettingsError, did_you_mean
from minidiff.core.grids import sampler_named
from minidiff.draw.images import contact_sheet
from minidiff.draw.progress import progress

MAX_TILES = 400
MAX_ABREAST = 6  # tiles of a single axis beside each other, before they are laid in rows
SHORT = {  # words that people say, and the settings that they mean
    "guidance": "guidance_scale",
    "steps": "num_inference_steps",
    "model": "pretrained_model_name_or_path",
}
PATHS = ("pretrained_model_name_or_path", "tokenizer", "lora", "textual_inversion")
UNITS = {"num_inference_steps": "steps", "width": "wide", "height": "high"}  # said behind the number
NEEDS_LOADING = (*PATHS, "torch_dtype", "device")
S = TypeVar("S")


@dataclasses.dataclass(frozen=True)
class Axis:
    """One setting and the values it takes, in order."""

    name: str
    values: tuple[Any, ...]
    said: tuple[str, ...] = ()  # labels, where they are better known than from name and value

    def __post_init__(self) -> None:
        if not self.values:
            raise SettingsError(f"the axis {self.name} has no values; give one or more, as in seed=0,1,2.")
        doubled = [value for i, value in enumerate(self.values) if value in self.values[:i]]
        if doubled:
            raise SettingsError(f"the axis {self.name} has {shown(doubled[0])} twice; give each value once.")

    @property
    def labels(self) -> list[str]:
        """The labels beside or above the tiles."""
        if self.said:
            return list(self.said)
        if self.name in PATHS and not any(value in (None, ()) for value in self.values):
            return distinct_ends([" + ".join(value) if isinstance(value, tuple) else str(value) for value in self.values])
        return [label(self.name, value) for value in self.values]


# --- from words to an axis ---------------------------------------------------------------------------------------------


def parse_axis(text: str, kind: type, prompts: Sequence[str] = ()) -> Axis:
    """`guidance_scale=1.5,5,20`, `seed=0..3`, `sampler=ddim,unipc`, `lora_weight=0,0.5+1` -> an axis of the dataclass `kind`.

    `a..b` is every whole number from a to b; `none` a setting's own default, or no file; `x+y` one weight for each of several
    LoRAs. `prompt` alone is the axis of `prompts`, which may hold commas. SettingsError for anything that cannot be an axis.
    """
    name, equals, listed = (part.strip() for part in text.partition("="))
    name = name.replace("-", "_")
    name = SHORT.get(name, name)
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    if name in ("prompt", "prompts"):
        if equals:
            raise SettingsError(f'"{text}": a prompt may hold commas; give the prompts themselves, and "prompt" as the axis.')
        return Axis("prompt", tuple(prompts)) if "prompt" in names else Axis("prompts", tuple((prompt,) for prompt in prompts))
    if name not in names:
        hint = did_you_mean(name, [*names, *SHORT])
        raise SettingsError(f'"{name}" is no setting, so it cannot be an axis.{hint} There are: {", ".join(names)}.')
    if not equals:
        raise SettingsError(f'the axis "{text}" has no values; give them as in seed=0,1,2 or seed=0..3.')
    words = [word.strip() for word in listed.split(",")]
    if "" in words:
        raise SettingsError(f'the axis "{text}" has an empty value; give them as in {name}=a,b.')
    return Axis(name, tuple(value for word in words for value in values_of(word, hints[name], name)))


def values_of(word: str, hint: Any, name: str) -> list[Any]:
    """One word of an axis as values of the type `hint`; several for a range."""
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in choices and word.lower() == "none":
        return [None]
    (kind,) = (choice for choice in choices if choice is not type(None))
    if get_origin(kind) is tuple:
        if word.lower() == "none":
            return [()]
        inner = get_args(kind)[0]
        parts = [word] if inner is str else word.split("+")
        return [tuple(value for part in parts for value in values_of(part.strip(), inner, name))]
    if kind is int and (ends := re.fullmatch(r"(-?\d+)\.\.(-?\d+)", word)):
        return whole_numbers(int(ends[1]), int(ends[2]), name)
    return [value_of(word, kind, name)]


def whole_numbers(first: int, last: int, name: str) -> list[int]:
    """`first..last`, both included."""
    if not first <= last < first + MAX_TILES:
        raise SettingsError(f"{name}={first}..{last}: the second number has to be above the first, by {MAX_TILES - 1} at most.")
    return list(range(first, last + 1))


def value_of(word: str, kind: Any, name: str) -> Any:
    """One word as one value."""
    if get_origin(kind) is Literal:
        if word not in get_args(kind):
            hint = did_you_mean(word, get_args(kind))
            raise SettingsError(f"{name}={word}: it is one of {', '.join(get_args(kind))}.{hint}")
        return word
    if kind is bool:
        if word.lower() not in ("true", "false"):
            raise SettingsError(f"{name}={word}: it is true or false.")
        return word.lower() == "true"
    try:
        value = kind(word)
    except ValueError:
        value = math.nan
    if kind in (int, float) and not math.isfinite(value):
        what = "a whole number, or a range such as 0..3" if kind is int else "a number"
        raise SettingsError(f"{name}={word}: this is not {what}.")
    return value


# --- what stands beside the tiles --------------------------------------------------------------------------------------


def label(name: str, value: Any) -> str:
    """Such as "guidance 5", "25 steps", "euler_a", "seed 2"."""
    words = name.removeprefix("use_").replace("_", " ").replace("karras", "Karras").replace("lora", "LoRA")
    if value is None or value == ():
        return f"{'no' if value == () and name in PATHS else 'default'} {words}"
    if isinstance(value, bool):
        return f"{'with' if value else 'without'} {words}"
    if name in ("prompt", "prompts"):
        return value if isinstance(value, str) else " | ".join(value)
    if name == "negative_prompt":
        return f"not: {value}" if value else "no negative prompt"
    if name in UNITS:
        return f"{shown(value)} {UNITS[name] if value != 1 else UNITS[name].removesuffix('s')}"
    if isinstance(value, str) or name in PATHS:
        return shown(value)
    return f"{'guidance' if name == 'guidance_scale' else words} {shown(value)}"


def shown(value: Any) -> str:
    """5.0 -> "5"; a tuple as its parts; a path as its name."""
    if isinstance(value, tuple):
        return " + ".join(map(shown, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else str(value)
    return PurePath(value).name if isinstance(value, str) and value.strip("/. ") else str(value)


def distinct_ends(paths: Sequence[str]) -> list[str]:
    """The last parts of each path, as few as tell them apart: runs/a/model, runs/b/model -> a/model, b/model."""
    parts = [PurePath(path).parts for path in paths]
    for count in range(1, max(map(len, parts), default=1) + 1):
        ends = ["/".join(part[-count:]) for part in parts]
        if len(set(ends)) == len(ends):
            return ends
    return list(paths)


# --- the sheet ---------------------------------------------------------------------------------------------------------


def contact_sheet_of(
    settings: S,
    columns: Axis | None,
    rows: Axis | None,
    draw: Callable[[S], Image.Image],
    title: str = "",
    tile: int = 256,
    show: bool = True,
    check: Callable[[S], None] = lambda settings: None,
) -> Image.Image:
    """Draw a picture for each pair of values, and lay them out with labels. `settings` is a dataclass; it stays as it is.

    Every tile's settings are checked before the first is drawn, by themselves and by `check`.
    One axis alone is laid in rows, with captions. SettingsError for axes that cannot be; any error while drawing says which
    tile it was.
    """
    across, down = columns or Axis("", ("",)), rows or Axis("", ("",))
    cells = {(i, j): with_values(settings, [a for a in ((rows, i), (columns, j)) if a[0]]) for i, j in places(down, across)}
    for changed in cells.values():
        check(changed)
    tiles = {}
    for place in progress(cells, "picture", show=show):
        try:
            tiles[place] = draw(cells[place])
        except MinidiffError as error:
            raise type(error)(f"{', '.join(names_of(place, rows, columns)) or 'the picture'}: {error}") from error
    only = columns if rows is None else rows if columns is None else None
    if only is not None and len(only.values) > (MAX_ABREAST if only is columns else 0):
        return gallery([tiles[place] for place in sorted(tiles)], only.labels, title, tile)
    grid = [[tiles[i, j] for j in range(len(across.values))] for i in range(len(down.values))]
    return contact_sheet(grid, rows.labels if rows else (), columns.labels if columns else (), title, tile)


def gallery(images: Sequence[Image.Image], captions: Sequence[str], title: str = "", tile: int = 256) -> Image.Image:
    """A sheet of captioned pictures in rows of equal length, or nearly so."""
    rows = math.ceil(len(images) / MAX_ABREAST)
    abreast = math.ceil(len(images) / rows)
    starts = range(0, len(images), abreast)
    grid, texts = [images[i : i + abreast] for i in starts], [captions[i : i + abreast] for i in starts]
    return contact_sheet(grid, title=title, tile=tile, captions=texts)


def places(rows: Axis, columns: Axis) -> list[tuple[int, int]]:
    """(row, column) in the order of drawing: what has to be loaded changes as seldom as possible."""
    check_count(len(columns.values), len(rows.values))
    if rows.name == columns.name and rows.name:
        raise SettingsError(f"rows and columns are both {rows.name}; give two settings, or one alone.")
    pairs = [(i, j) for i in range(len(rows.values)) for j in range(len(columns.values))]
    return sorted(pairs, key=lambda pair: pair[::-1]) if columns.name in NEEDS_LOADING else pairs


def check_count(columns: int, rows: int) -> None:
    if columns * rows > MAX_TILES:
        raise SettingsError(
            f"{columns} columns by {rows} rows are {columns * rows} pictures; a sheet holds {MAX_TILES} at most. "
            "Give fewer values."
        )


def with_values(settings: S, chosen: Sequence[tuple[Axis | None, int]]) -> S:
    """The settings of one tile, checked where they know how."""
    values = {axis.name: axis.values[index] for axis, index in chosen if axis}
    changed: S = dataclasses.replace(settings, **values)  # type: ignore[type-var]
    if hasattr(changed, "check"):
        changed.check()
    if sampler := getattr(changed, "sampler", None):
        sampler_named(sampler)
    return changed


def names_of(place: tuple[int, int], rows: Axis | None, columns: Axis | None) -> list[str]:
    """The labels of a tile, row first."""
    return [axis.labels[index] for axis, index in zip((rows, columns), place) if axis]
