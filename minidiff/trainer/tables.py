"""The rows of a metadata.jsonl or metadata.csv, and the text of files. Every mistake is named with its file and line."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minidiff.core.errors import DataError


def jsonl_rows(table: Path, errors: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a metadata.jsonl, each with the number of its line; what is wrong with a line goes into `errors`."""
    for line, row in enumerate(read_text(table).split("\n"), start=1):  # not splitlines: a caption may hold U+2028
        if not row.strip():
            continue
        try:
            value = json.loads(row, object_pairs_hook=_no_doubled_names)
        except (ValueError, RecursionError) as error:
            spread = row.strip() in ("{", "[") or row.lstrip().startswith("[{")
            what = "an object spread over several lines" if spread else f"not JSON ({error})"
            like = '{"file_name": "a.png", "text": "a photo of a dog"}'
            errors.append(f"{table}, line {line}: {what}. Write one object per line, such as {like}.")
            if spread:
                return  # the lines to come are the rest of it
            continue
        if isinstance(value, dict):
            yield line, value
        else:
            errors.append(f"{table}, line {line}: not an object. Write one object per line, with a file_name.")


def _no_doubled_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For the JSON reader, which would silently take the last of two values of one name."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands in it twice")
    return dict(pairs)


def csv_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a metadata.csv by their columns' names, each with the number of its last line."""
    reader = csv.DictReader(io.StringIO(read_text(table), newline=""), strict=True)
    try:
        columns = reader.fieldnames or []
        if len(set(columns)) < len(columns):
            raise DataError(f"{table}: two columns have the same name ({', '.join(columns)}); rename or remove one.")
        for row in reader:
            if None in row:
                where = f"{table}, line {reader.line_num}"
                raise DataError(f'{where}: more fields than columns; put "…" around a text with commas.')
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{table}, line {reader.line_num}: not CSV ({error}).") from error


def read_text(path: Path) -> str:
    """The text of a file, in UTF-8, perhaps with a byte order mark."""
    if not path.is_file():  # a pipe with nobody at its other end would wait for ever
        raise DataError(f"{path} cannot be read (it is no ordinary file); put a file there, or remove it.")
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); put a file there, or remove it.") from error
