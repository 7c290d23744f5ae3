"""Pictures and captions in a folder -> a list of examples. Every mistake is named with its file and line.

one prompt        a folder of pictures, and --instance_prompt for all of them
metadata.jsonl    one JSON object a line: {"file_name": "a.png", "text": "a photo of …"}; or metadata.csv
sidecars          a.png and a.txt (or a.caption)
"""

import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minidiff.errors import DataError, did_you_mean

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv")
SIDECARS = (".txt", ".caption")
COLUMNS = ("text", "caption", "prompt")  # where captions are looked for, in this order


@dataclass(frozen=True)
class Example:
    """A picture's file and its caption."""

    path: Path
    caption: str


def read_folder(folder: Path, prompt: str | None, caption_column: str | None = None) -> list[Example]:
    """The examples in a folder, in the order of their names; `prompt` for all, or, if it is None, captions from files.

    Raises DataError for anything that is not as it should be. Files of other kinds are left alone, with one notice.
    """
    if not folder.is_dir():
        what = "a file, not a folder" if folder.exists() else "no folder that exists"
        raise DataError(f"{folder} is {what}; give the folder of the pictures.")
    names = sorted(p.name for p in folder.iterdir())
    pictures = [folder / n for n in names if n.lower().endswith(PICTURES) and not n.startswith(".")]
    tables = [n for n in names if n in METADATA]
    if prompt is not None:
        examples = [Example(p, prompt) for p in pictures]
    elif len(tables) == 2:
        raise DataError(f"{folder} has both {' and '.join(tables)}; remove one of them.")
    elif tables:
        examples = _from_table(folder / tables[0], caption_column)
    else:
        examples = _from_sidecars(folder, pictures, names)
    if not examples:
        raise DataError(_why_empty(folder, names))
    _notice_strays(folder, names, examples)
    return examples


def _from_sidecars(folder: Path, pictures: list[Path], names: list[str]) -> list[Example]:
    """a.png takes its caption from a.txt or a.caption."""
    examples, without = [], []
    for picture in pictures:
        found = [p for p in (picture.with_suffix(s) for s in SIDECARS) if p.is_file()]
        if len(found) == 2:
            raise DataError(f"{picture} has two captions, {found[0].name} and {found[1].name}; remove one.")
        if not found:
            without.append(picture.name)
            continue
        caption = _read_text(found[0]).strip()
        if not caption:
            raise DataError(f"{found[0]} is empty; write the caption of {picture.name} into it.")
        examples.append(Example(picture, " ".join(caption.split())))
    if without:
        odd = [n for n in names if n.lower().startswith("metadata")]
        hint = f'Is {odd[0]} meant to be "metadata.jsonl" (or metadata.csv)? ' if odd else ""
        raise DataError(
            f"{folder}: {len(without)} of {len(pictures)} pictures have no caption ({_some(without)}). {hint}"
            "Give them a metadata.jsonl, or a .txt file each; or one prompt for all, with --instance_data_dir and "
            "--instance_prompt."
        )
    return examples


def _from_table(table: Path, caption_column: str | None) -> list[Example]:
    """metadata.jsonl or metadata.csv; every complaint names the line."""
    rows = list(_csv_rows(table) if table.suffix == ".csv" else _jsonl_rows(table))
    if not rows:
        raise DataError(f"{table} is empty; one line for each picture is expected.")
    column = _caption_column(table, rows, caption_column)
    seen: dict[str, int] = {}
    examples = []
    for line, row in rows:
        where = f"{table}, line {line}"
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            raise DataError(f'{where}: no "file_name"; the columns here are {", ".join(map(str, row))}.')
        path = os.path.normpath(name)
        if os.path.isabs(path) or path.split(os.sep)[0] == "..":
            raise DataError(f"{where}: file_name {name!r} leads out of the folder; pictures lie in {table.parent}.")
        if path in seen:
            raise DataError(f"{where}: {name!r} was already on line {seen[path]}; each picture has one line.")
        seen[path] = line
        if not os.path.isfile(table.parent / path):  # False, too, for a name that no file can have
            files = [p.name for p in table.parent.iterdir() if _is_picture(p)]
            alike = [n for n in files if n.lower() == name.lower()]
            hint = f' Did you mean "{alike[0]}"?' if alike else did_you_mean(name, files)
            raise DataError(f"{where}: there is no file {name!r:.100} in {table.parent}.{hint}")
        examples.append(Example(table.parent / path, _caption(row, column, where)))
    return examples


def _jsonl_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = _read_text(table)
    for line, row in enumerate(text.split("\n"), start=1):  # not splitlines: a caption may hold U+2028
        if not row.strip():
            continue
        try:
            value = json.loads(row)
        except (ValueError, RecursionError) as error:
            spread = row.strip() in ("{", "[") or row.lstrip().startswith("[{")
            what = "an object spread over several lines" if spread else f"not JSON ({error})"
            like = '{"file_name": "a.png", "text": "a photo of a dog"}'
            raise DataError(f"{table}, line {line}: {what}. Write one object per line, such as {like}.") from error
        if not isinstance(value, dict):
            raise DataError(f"{table}, line {line}: not an object. Write one object per line, with a file_name.")
        yield line, value


def _csv_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_read_text(table), newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                where = f"{table}, line {reader.line_num}"
                raise DataError(f'{where}: more fields than columns; put "…" around a text with commas.')
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{table}, line {reader.line_num}: not CSV ({error}).") from error


def _caption_column(table: Path, rows: list[tuple[int, dict[str, Any]]], wanted: str | None) -> str:
    """The column asked for; or the first of text, caption, prompt; or the only one that holds strings."""
    columns = list(dict.fromkeys(k for _, row in rows for k in row))
    others = [c for c in columns if c != "file_name"]
    if wanted is not None:
        if wanted not in columns:
            hint = did_you_mean(wanted, others)
            raise DataError(f'{table} has no column "{wanted}" (--caption_column); it has {", ".join(columns)}.{hint}')
        return wanted
    usual = [c for c in COLUMNS if c in columns]
    strings = [c for c in others if all(isinstance(row.get(c), str) for _, row in rows)]
    if not usual and len(strings) != 1:
        has = ", ".join(columns)
        raise DataError(f"{table}: which column holds the captions? Say so with --caption_column; it has {has}.")
    return (usual or strings)[0]


def _caption(row: dict[str, Any], column: str, where: str) -> str:
    caption = row.get(column)
    if caption is None:
        raise DataError(f'{where}: no "{column}"; the columns here are {", ".join(map(str, row))}.')
    if not isinstance(caption, str):
        raise DataError(f'{where}: "{column}" is {caption!r}, not a text.')
    if not caption.strip():
        raise DataError(f'{where}: "{column}" is empty. For samples without a prompt there is --proportion_empty_prompts.')
    if not caption.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in caption):
        raise DataError(f'{where}: "{column}" holds half of a UTF-16 pair, {caption!r:.60}; write the letter itself.')
    return caption.strip()


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); put a file there, or remove it.") from error


def _why_empty(folder: Path, names: list[str]) -> str:
    """A folder without pictures: what it holds instead, and where they may be."""
    inside = [n for n in names if (folder / n).is_dir() and any(_is_picture(p) for p in (folder / n).iterdir())]
    if inside:
        return f"{folder} has no pictures itself, but {folder / inside[0]} has; point there."
    kinds = ", ".join(sorted({Path(n).suffix or n for n in names})) or "nothing"
    return f"{folder} has no pictures ({', '.join(PICTURES)}); it holds {kinds}."


def _notice_strays(folder: Path, names: list[str], examples: list[Example]) -> None:
    """One line about everything in the folder that is not used."""
    used = {e.path.relative_to(folder).parts[0] for e in examples} | set(METADATA)  # a picture, or the folder it is in
    used |= {str(Path(name).with_suffix(s)) for name in used for s in SIDECARS}
    strays = [n for n in names if n not in used]
    if strays:
        print(f"Note: {folder}: not used: {_some(strays)}.", file=sys.stderr)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES and not path.name.startswith(".")


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
