"""Pictures and captions in a folder -> a list of examples. Every mistake is named with its file and line.

one prompt        a folder of pictures, and --instance_prompt for all of them
metadata.jsonl    one JSON object a line: {"file_name": "a.png", "text": "a photo of …"}; or metadata.csv
sidecars          a.png and a.txt (or a.caption)
kohya's folders   10_sks dog/a.png: each picture comes 10 times an epoch; without a caption of its own, "sks dog" is it
masks             a.mask.png beside a.png, or a column "mask" of the table: white is learnt, black is not
"""

import os
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minidiff.core.errors import DataError, did_you_mean
from minidiff.trainer.tables import csv_rows, jsonl_rows, read_text

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv")
SIDECARS = (".txt", ".caption")
COLUMNS = ("text", "caption", "prompt")  # where captions are looked for, in this order
MASK = ".mask.png"  # a.mask.png is the mask of a.png (or a.jpg, …)


@dataclass(frozen=True)
class Example:
    """A picture's file and its caption."""

    path: Path
    caption: str
    mask: Path | None = None
    repeats: int = 1  # times an epoch
    size: tuple[int, int] | None = None  # width and height to train at, where that is not a square: see buckets.py


@dataclass
class Scan:
    """The contents of a folder: the examples, all errors, and notices about files that are not used."""

    examples: list[Example] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)  # used or not


def read_folder(folder: Path, prompt: str | None, caption_column: str | None = None, masks: bool = False) -> list[Example]:
    """The examples in a folder, in the order of their names; `prompt` for all, or, if it is None, captions from files.

    Raises DataError for anything that is not as it should be. Files of other kinds are left alone, with one notice.
    """
    scan = scan_folder(folder, prompt, caption_column, masks)
    if scan.errors:
        more = len(scan.errors) - 1
        raise DataError(scan.errors[0] + (f"\n{more} more: minidiff data check {folder} lists them all." if more else ""))
    for notice in scan.notices:
        print(f"Note: {notice}", file=sys.stderr)
    return scan.examples


def scan_folder(folder: Path, prompt: str | None, caption_column: str | None = None, masks: bool = False) -> Scan:
    """Like `read_folder`, but collects all errors instead of raising the first. `examples` has those without errors."""
    if not folder.is_dir():
        what = "a file, not a folder" if folder.exists() else "no folder that exists"
        return Scan(errors=[f"{folder} is {what}; give the folder of the pictures."])
    names = sorted(p.name for p in folder.iterdir())
    own = any(_is_picture(folder / n) or n in METADATA for n in names)
    numbered = [n for n in names if re.match(r"[0-9]+_", n) and (folder / n).is_dir()]
    if numbered and not own:
        scan = _from_numbered(folder, names, numbered, prompt, caption_column, masks)
    else:
        scan = _scan_flat(folder, names, prompt, None, caption_column, masks)
    if not scan.examples and not scan.errors:
        scan.errors.append(_why_empty(folder, names))
    if masks and scan.examples:
        _check_masks(folder, scan)
    return scan


def _scan_flat(
    folder: Path, names: list[str], prompt: str | None, fallback: str | None, caption_column: str | None, masks: bool
) -> Scan:
    """One folder, without those in it; `fallback` is the caption of pictures that have none."""
    pictures = [folder / n for n in names if _is_picture(folder / n)]
    pictures = [p for p in pictures if not _masked_by(p, pictures)]
    scan, tables = Scan(pictures=pictures), [n for n in names if n in METADATA]
    if prompt is not None:
        scan.examples = [Example(p, prompt) for p in pictures]
    elif len(tables) == 2:
        scan.errors.append(f"{folder} has both {' and '.join(tables)}; remove one of them.")
    elif tables:
        try:
            scan.examples = _from_table(folder / tables[0], caption_column, masks, scan.errors)
        except DataError as error:
            scan.errors.append(str(error))
    else:
        scan.examples = _from_sidecars(folder, pictures, names, fallback, scan.errors)
    if masks:
        scan.examples = [replace(e, mask=e.mask or _mask_beside(e.path)) for e in scan.examples]
    meant = [e.path for e in scan.examples] if tables and prompt is None else pictures  # with or without a caption
    if strays := _strays(folder, names, meant + [e.mask for e in scan.examples if e.mask]):
        scan.notices.append(f"{folder}: not used: {_some(strays)}.")
    return scan


# --- kohya's folders -------------------------------------------------------------------------------------------------


def _from_numbered(
    folder: Path, names: list[str], numbered: list[str], prompt: str | None, caption_column: str | None, masks: bool
) -> Scan:
    """A folder of folders: each picture comes as often as the number before its folder's name says."""
    whole = Scan()
    for name in numbered:
        number, words = name.split("_", maxsplit=1)
        inside, count = folder / name, int(number)
        if not 1 <= count <= 10_000:
            whole.errors.append(f"{inside}: {number} repeats; the number in front can be 1 to 10000.")
        part = _scan_flat(inside, sorted(p.name for p in inside.iterdir()), prompt, words.strip(), caption_column, masks)
        if not part.examples and not part.errors:
            part.errors.append(f"{inside} has no pictures ({', '.join(PICTURES)}).")
        whole.examples += [replace(e, repeats=count) for e in part.examples]
        whole.errors += part.errors
        whole.notices += part.notices
        whole.pictures += part.pictures
    if others := [n for n in names if n not in numbered]:
        folders = any((folder / n).is_dir() for n in others)
        hint = ' (pictures lie in folders named like "10_sks dog", with the number of repeats in front)' if folders else ""
        whole.notices.append(f"{folder}: not used: {_some(others)}{hint}.")
    return whole


# --- masks -----------------------------------------------------------------------------------------------------------


def _masked_by(path: Path, pictures: list[Path]) -> bool:
    """Is this a.mask.png, with the picture that it masks beside it?"""
    stem = path.name.removesuffix(MASK)
    return stem != path.name and any(p.stem == stem for p in pictures)


def _mask_beside(picture: Path) -> Path | None:
    mask = picture.with_name(picture.stem + MASK)
    return mask if mask.is_file() else None


def _check_masks(folder: Path, scan: Scan) -> None:
    without = [e.path.name for e in scan.examples if e.mask is None]
    if len(without) == len(scan.examples):
        scan.errors.append(
            f"{folder}: no picture has a mask, and --masked_loss needs some: {Path(without[0]).stem}{MASK} beside "
            f'{without[0]}, or a column "mask" in the metadata.'
        )
    elif without:
        scan.notices.append(f"{folder}: without a mask, and so learnt as a whole: {_some(without)}.")


# --- captions --------------------------------------------------------------------------------------------------------


def _from_sidecars(
    folder: Path, pictures: list[Path], names: list[str], fallback: str | None, errors: list[str]
) -> list[Example]:
    """a.png takes its caption from a.txt or a.caption; what is wrong goes into `errors`."""
    examples, without = [], []
    for picture in pictures:
        try:
            caption = _sidecar(picture) or fallback
        except DataError as error:
            errors.append(str(error))
            continue
        if caption:
            examples.append(Example(picture, caption))
        else:
            without.append(picture.name)
    if without:
        odd = [n for n in names if n.lower().startswith("metadata")]
        hint = f'Is {odd[0]} meant to be "metadata.jsonl" (or metadata.csv)? ' if odd else ""
        errors.append(
            f"{folder}: {len(without)} of {len(pictures)} pictures have no caption ({_some(without)}). {hint}"
            "Give them a metadata.jsonl, or a .txt file each; or one prompt for all, with --instance_data_dir and "
            "--instance_prompt."
        )
    return examples


def _sidecar(picture: Path) -> str | None:
    """The caption beside a picture; None if there is no file of it."""
    found = [p for p in (picture.with_suffix(s) for s in SIDECARS) if p.is_file()]
    if len(found) == 2:
        raise DataError(f"{picture} has two captions, {found[0].name} and {found[1].name}; remove one.")
    if not found:
        return None
    caption = " ".join(read_text(found[0]).split())
    if _is_blank(caption):
        raise DataError(f"{found[0]} is empty; write the caption of {picture.name} into it.")
    return caption


def _from_table(table: Path, caption_column: str | None, masks: bool, errors: list[str]) -> list[Example]:
    """metadata.jsonl or metadata.csv; every complaint names the line. Those about one line go into `errors`."""
    rows = list(csv_rows(table) if table.suffix == ".csv" else jsonl_rows(table, errors))
    if not rows and not errors:
        raise DataError(f"{table} is empty; one line for each picture is expected.")
    column = _caption_column(table, rows, caption_column) if rows else ""
    seen: dict[Path, int] = {}
    examples = []
    for line, row in rows:
        where = f"{table}, line {line}"
        try:
            path = _file_in(table.parent, row, "file_name", where)
            if path in seen:
                raise DataError(f"{where}: {row['file_name']!r} was already on line {seen[path]}; each picture has one line.")
            seen[path] = line
            mask = _file_in(table.parent, row, "mask", where) if masks and row.get("mask") else None
            examples.append(Example(path, _caption(row, column, where), mask))
        except DataError as error:
            errors.append(str(error))
    return examples


def _file_in(folder: Path, row: dict[str, Any], column: str, where: str) -> Path:
    """The file that a row names, which lies in `folder`."""
    if column not in row:
        raise DataError(f'{where}: no "{column}"; the columns here are {", ".join(map(str, row))}.')
    name = row[column]
    if not isinstance(name, str) or not name:
        raise DataError(f'{where}: "{column}" is {name!r}; it must be the name of a file in {folder}.')
    path = os.path.normpath(name)
    if os.path.isabs(path) or path.split(os.sep)[0] == "..":
        raise DataError(f"{where}: {column} {name!r} leads out of the folder; pictures lie in {folder}.")
    if not os.path.isfile(folder / path):  # False, too, for a name that no file can have
        files = [p.name for p in folder.iterdir() if _is_picture(p)]
        alike = [n for n in files if n.lower() == name.lower()]
        hint = f' Did you mean "{alike[0]}"?' if alike else did_you_mean(name, files)
        raise DataError(f"{where}: there is no file {name!r:.100} in {folder}.{hint}")
    return folder / path


def _caption_column(table: Path, rows: list[tuple[int, dict[str, Any]]], wanted: str | None) -> str:
    """The column asked for; or the first of text, caption, prompt; or the only one that holds strings."""
    columns = list(dict.fromkeys(k for _, row in rows for k in row))
    others = [c for c in columns if c not in ("file_name", "mask")]
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
    if column not in row:
        raise DataError(f'{where}: no "{column}"; the columns here are {", ".join(map(str, row))}.')
    caption = row[column]
    if not isinstance(caption, str):
        raise DataError(f'{where}: "{column}" is {"empty" if caption is None else repr(caption)}, not a text in quotes.')
    if not caption.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in caption):
        raise DataError(f'{where}: "{column}" holds half of a UTF-16 pair, {caption!r:.60}; write the letter itself.')
    if _is_blank(caption):
        raise DataError(f'{where}: "{column}" is empty. For samples without a prompt there is --proportion_empty_prompts.')
    return caption.strip()


def _is_blank(caption: str) -> bool:
    """Nothing to see in it: spaces, line ends, invisible characters such as U+200B."""
    return not any(letter.isprintable() and not letter.isspace() for letter in caption)


def _why_empty(folder: Path, names: list[str]) -> str:
    """A folder without pictures: what it holds instead, and where they may be."""
    inside = [n for n in names if (folder / n).is_dir() and any(_is_picture(p) for p in (folder / n).iterdir())]
    if inside:
        return f"{folder} has no pictures itself, but {folder / inside[0]} has; point there."
    kinds = ", ".join(sorted({Path(n).suffix or n for n in names})) or "nothing"
    return f"{folder} has no pictures ({', '.join(PICTURES)}); it holds {kinds}."


def _strays(folder: Path, names: list[str], files: list[Path]) -> list[str]:
    """Everything in the folder that is none of `files`, nor a caption beside one."""
    used = {p.relative_to(folder).parts[0] for p in files} | set(METADATA)  # a file, or the folder it is in
    used |= {str(Path(name).with_suffix(s)) for name in used for s in SIDECARS}
    return [n for n in names if n not in used]


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES and not path.name.startswith(".")


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
