"""Pictures and captions in a folder -> a list of examples. Every error names its file and line.

one prompt        a folder of pictures, and --instance_prompt for those that have no caption of their own
metadata.jsonl    one JSON object a line: {"file_name": "a.png", "text": "a photo of …"}; or metadata.csv
sidecars          a.png and a.txt (or a.caption, a.png.txt)
kohya's folders   10_sks dog/a.png: each picture comes 10 times an epoch; its caption is "sks dog" if it has no other
masks             a.mask.png beside a.png, a column "mask" of the metadata, or the picture's own alpha channel: white is learnt,
                  black is not; of a mask with an alpha channel, that says what is learnt
hints             of a ControlNet: a column "conditioning_image" of the metadata, or a folder with pictures of the same names
"""

import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from minidiff.core.errors import DataError, did_you_mean
from minidiff.draw.images import open_image
from minidiff.files.bundled import here_or_bundled
from minidiff.files.values import near_path, same_name

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv")
SIDECARS = (".txt", ".caption")
COLUMNS = ("text", "caption", "prompt")  # where captions are looked for, in this order
KOHYA = re.compile(r"[1-9][0-9]{0,4}_")
MASK = ".mask.png"  # a.mask.png is the mask of a.png (or a.jpg, …)

Size = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True)
class Example:
    """A picture's file and its caption."""

    path: Path
    caption: str
    mask: Path | None = None
    hint: Path | None = None  # of a ControlNet
    repeats: int = 1  # times an epoch
    size: Size | None = None  # to train at; None: not checked yet
    templates: tuple[str, ...] = ("{}",)  # each sample draws one; its {} is the caption

    @property
    def prompts(self) -> list[str]:
        return [template.replace("{}", self.caption) for template in self.templates]


# --- folders ---------------------------------------------------------------------------------------------------------


def read_folder(
    folder: Path, prompt: str | None, caption_column: str | None = None, masks: bool = False, captions: bool = True
) -> list[Example]:
    """`Scan.examples_of` a folder."""
    return Scan(prompt, caption_column, masks, captions).examples_of(folder)


def contents(folder: Path) -> list[Path]:
    """The files in a folder of pictures, in the order of their names. DataError where there is no such folder."""
    if not folder.is_dir():
        what = "a file, not a folder" if folder.exists() else "no folder that exists"
        raise DataError(f"{folder} is {what}; give the folder of the pictures.{near_path(str(folder))}")
    return sorted(folder.iterdir())


def kohya_in(folder: Path) -> list[Path]:
    """Folders with names such as "10_sks dog"."""
    return [p for p in sorted(folder.iterdir()) if KOHYA.match(p.name) and p.is_dir()]


@dataclass
class Scan:
    """The contents of a folder: examples without errors, all errors, and notices, which do not stop a training run."""

    prompt: str | None  # of pictures without a caption; None: all have one
    caption_column: str | None = None
    masks: bool = False
    captions: bool = True  # False: the prompt is for all
    image_column: str = "file_name"
    hint_column: str | None = None  # None: no hints are wanted
    hint_folder: str | None = None  # in place of the column
    examples: list[Example] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)  # used or not

    def __post_init__(self) -> None:
        hints = contents(here_or_bundled(self.hint_folder)) if self.hint_folder else []
        self.hints = {path.stem: path for path in hints if is_picture(path)}

    def examples_of(self, folder: Path) -> list[Example]:
        """The examples in a folder, in the order of their names. DataError for the first error; notices are printed."""
        if self.of(folder).errors:
            more = len(self.errors) - 1
            raise DataError(self.errors[0] + f"\n{more} more: minidiff data check {folder} lists them all." * bool(more))
        for notice in self.notices:
            print(f"Note: {notice}", file=sys.stderr)
        return self.examples

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """A DataError inside the `with` ends it, and goes to `errors`."""
        try:
            yield
        except DataError as error:
            self.errors.append(str(error))

    def notice(self, what: str, names: list[str], most: int = 5) -> None:
        if names:
            self.notices.append(f"{what}: {some(names, most)}.")

    def unused(self, folder: Path, names: list[str]) -> None:
        """One notice; files of one kind stand together."""
        self.notice(f"{folder}: not used", sorted(names, key=lambda name: (Path(name).suffix.lower(), name)), most=50)

    def of(self, folder: Path) -> Self:
        """All examples of a folder, or those of the folders in it; all errors and notices."""
        folder = here_or_bundled(folder)
        try:
            inside = contents(folder)
        except DataError as error:
            self.errors.append(str(error))
            return self
        flat = any(is_picture(p) or p.name in METADATA for p in inside)
        below = [] if flat or kohya_in(folder) else [p for p in inside if p.is_dir() and kohya_in(p)]
        if len(below) == 1:  # the folder above the one that is wanted
            folder, inside = below[0], sorted(below[0].iterdir())
        kohya = [folder] if flat and self.prompt is None and KOHYA.match(folder.name) else [] if flat else kohya_in(folder)
        for path in kohya:
            repeats, words = path.name.split("_", maxsplit=1)
            self.read(path, words.strip(), int(repeats))
        if not kohya:
            self.read(folder)
        elif not flat:
            self.unused(folder, [p.name for p in inside if p not in kohya])
        without = [e.path.name for e in self.examples if e.mask is None] if self.masks else []
        if without and len(without) == len(self.examples):
            wanted = f'{Path(without[0]).stem}{MASK} beside {without[0]}, or a column "mask" in the metadata'
            self.errors.append(f"{folder}: no picture has a mask, and --masked_loss needs some: {wanted}.")
        else:
            self.notice(f"{folder}: without a mask, and so learnt as a whole", without)
        if self.hint_column and (without := [e.path.name for e in self.examples if e.hint is None]):
            few = f"{len(without)} of {len(self.examples)} pictures have no conditioning picture ({some(without)})"
            place = f'a column "{self.hint_column}" in the metadata, or a --conditioning_data_dir with their names'
            self.errors.append(f"{few}. Give them {place}; or --hint canny, which makes them.")
        return self

    def read(self, folder: Path, fallback: str | None = None, repeats: int = 1) -> None:
        """Read one folder, without those in it. `fallback` is the caption of pictures that have none."""
        inside, before, found = sorted(folder.iterdir()), len(self.errors), list[Example]()
        pictures = [p for p in inside if is_picture(p)]
        tables = [p for p in inside if p.name in METADATA and (self.captions or self.hint_column)]
        with self.collecting():
            if len(tables) == 2:
                raise DataError(f"{folder} has both {tables[0].name} and {tables[1].name}; remove one of them.")
            found += self.from_table(tables[0]) if tables else ()
        used = {*tables, *(p for e in found for p in (e.path, e.hint) if p)}
        if self.prompt or not tables:
            beside = [p for p in pictures if p not in used]
            found += self.from_sidecars(folder, beside, fallback)
            used.update(beside, *(sidecars(p) for p in beside if self.captions))
        used.update(p for e in found for p in (e.mask, e.hint) if p)
        if not found and len(self.errors) == before:
            holds = ", ".join(sorted({p.suffix or p.name for p in inside})) or "nothing"
            self.errors.append(f"{folder} has no pictures ({', '.join(PICTURES)}); it holds {holds}.")
        names = {p.relative_to(folder).parts[0] for p in used if p.is_relative_to(folder)}  # a file, or the folder it is in
        self.unused(folder, [p.name for p in inside if p.name not in names])
        self.examples += [replace(e, repeats=repeats) for e in found]
        self.pictures += pictures

    def from_sidecars(self, folder: Path, pictures: list[Path], fallback: str | None) -> Iterator[Example]:
        """The caption of a.png is in a.txt or a.caption; or else it is the prompt."""
        without, joined = [], []
        for picture in pictures:
            with self.collecting():
                own = sidecar(picture) if self.captions else None
                if (text := " ".join(own.split()) if own else self.prompt or fallback) is None:
                    without.append(picture.name)
                    continue
                if own and "\n" in own:
                    joined.append(picture.name)
                yield Example(picture, text, self.mask_beside(picture), self.hints.get(picture.stem))
        self.notice(f"{folder}: captions of several lines are read as one", joined)
        if without:
            self.errors.append(
                f"{folder}: {len(without)} of {len(pictures)} pictures have no caption ({some(without)}). Give them a "
                "metadata.jsonl, or a .txt file each; or one prompt for all that have none: --instance_prompt."
            )

    def from_table(self, table: Path) -> Iterator[Example]:
        """metadata.jsonl or metadata.csv. The first row tells which column holds the captions."""
        column, lines = "", dict[Path, int]()
        for line, row in rows(table):
            where = f"{table}, line {line}"
            column = column or self.caption_column_of(row, where)
            with self.collecting():
                path = file_in(table.parent, row, self.image_column, where)
                if path in lines:
                    name = row[self.image_column]
                    raise DataError(f"{where}: {name!r} was already on line {lines[path]}; a picture has one line.")
                lines[path] = line
                own = self.masks and row.get("mask")
                mask = file_in(table.parent, row, "mask", where) if own else self.mask_beside(path)
                named = self.hint_column and not self.hint_folder and row.get(self.hint_column)
                hint = file_in(table.parent, row, str(self.hint_column), where) if named else self.hints.get(path.stem)
                text = self.prompt if self.prompt and not (self.captions and row.get(column)) else row.get(column)
                yield Example(path, checked(text, f'{where}: "{column}"'), mask, hint)
        if not column:
            raise DataError(f"{table} is empty; one line for each picture is expected.")

    def caption_column_of(self, row: dict[str, Any], where: str) -> str:
        """The column asked for; or the first of text, caption, prompt; or the only one of strings, which may be missing."""
        wanted, others = self.caption_column, [c for c in row if c not in (self.image_column, "mask", self.hint_column)]
        if wanted and wanted not in row:
            hint = did_you_mean(wanted, others)
            raise DataError(f'{where}: no column "{wanted}" (--caption_column); it has {", ".join(row)}.{hint}')
        usual, strings = [c for c in COLUMNS if c in row], [c for c in others if isinstance(row[c], str)]
        found = [wanted] if wanted else usual[:1] or strings
        if not self.captions or (self.prompt and not found):
            return COLUMNS[0]
        if len(found) != 1:
            raise DataError(f"{where}: which column holds the captions? Say so with --caption_column; it has {', '.join(row)}.")
        return found[0]

    def mask_beside(self, picture: Path) -> Path | None:
        """The file of a picture's mask, which may be the picture itself: its alpha channel."""
        if not self.masks or (mask := picture.with_name(picture.stem + MASK)).is_file():
            return mask if self.masks else None
        with suppress(DataError), open_image(picture) as image:
            return picture if image.has_transparency_data else None
        return None


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES and not path.name.startswith(".") and not path.name.endswith(MASK)


def some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- captions and metadata -------------------------------------------------------------------------------------------


def sidecar(picture: Path) -> str | None:
    """The caption in a file beside a picture, if there is one."""
    found = sidecars(picture)
    if len(found) > 1:
        raise DataError(f"{picture} has two captions, {found[0].name} and {found[1].name}; remove one.")
    return checked(read_text(found[0]), str(found[0])) if found else None


def sidecars(picture: Path) -> list[Path]:
    """The caption files beside a.png: a.txt, a.caption, a.png.txt, or in capitals."""
    endings = [ending for suffix in SIDECARS for ending in (suffix, suffix.upper())]
    names = [picture.with_name(stem + ending) for stem in (picture.stem, picture.name) for ending in endings]
    return list({path.stat().st_ino: path for path in names if path.is_file()}.values())  # where capitals mean nothing: one


def read_text(path: Path) -> str:
    """The text of a file, in UTF-8, perhaps with a byte order mark."""
    with suppress(UnicodeDecodeError, OSError):
        return path.read_text("utf-8-sig")
    raise DataError(f"{path} cannot be read as UTF-8 text; save it as UTF-8, or remove it.")


def rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a metadata.jsonl or metadata.csv, each with the number of its line."""
    if table.suffix == ".csv":
        yield from csv_rows(table)
        return
    for line, words in enumerate(read_text(table).split("\n"), start=1):  # not splitlines: a caption may hold U+2028
        try:
            row, wrong = json.loads(words) if words.strip() else {}, "not an object"
        except (ValueError, RecursionError) as error:
            row, wrong = None, f"not JSON ({error})"
        if not isinstance(row, dict):
            like = '{"file_name": "a.png", "text": "a photo of a dog"}'
            raise DataError(f"{table}, line {line}: {wrong}. Write one object per line, such as {like}.")
        if row:
            yield line, row


def csv_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(read_text(table), newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise csv.Error('more fields than columns; put "…" around a text with commas')
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{table}, line {reader.line_num}: not CSV ({error}).") from error


def file_in(folder: Path, row: dict[str, Any], column: str, where: str) -> Path:
    """The file that a row names, which lies in `folder`."""
    name = row.get(column)
    if not isinstance(name, str) or not name:
        raise DataError(f'{where}: no "{column}" that names a file in {folder}; the columns here are {", ".join(row)}.')
    path = os.path.normpath(name if os.path.isfile(folder / name) else name.replace("\\", "/"))  # as Windows writes them
    path = os.path.normpath(same_name(folder / path).relative_to(folder)) if not os.path.isabs(path) else path
    outside = os.path.isabs(path) or path.split(os.sep)[0] == ".."
    if outside or not os.path.isfile(folder / path):  # False, too, for a name that no file can have
        hint = did_you_mean(name, (p.name for p in folder.iterdir() if is_picture(p)))
        raise DataError(f"{where}: there is no file {name!r:.100} in {folder}.{hint}")
    return folder / path


def checked(caption: object, where: str) -> str:
    """A caption without spaces at its ends. DataError if it is no text, or has only spaces and invisible characters."""
    if not isinstance(caption, str):
        raise DataError(f"{where} is {caption!r}, not a text in quotes.")
    if not any(letter.isprintable() and not letter.isspace() for letter in caption):  # U+200B, say
        raise DataError(f"{where} is empty. For samples without a prompt there is --proportion_empty_prompts.")
    return caption.strip()
