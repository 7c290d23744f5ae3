"""The conditioning pictures of a training set, the hints of a ControlNet: where they lie. latents.py reads them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from minidiff.core.errors import DataError
from minidiff.files.bundled import here_or_bundled
from minidiff.trainer.dataset import METADATA, Example, file_in, is_picture, rows, some
from minidiff.trainer.settings import ControlNetSettings


def with_hints(examples: list[Example], s: ControlNetSettings, folder: Path) -> list[Example]:
    """The examples of a folder with the files of their hints, if they have any. DataError if some have none."""
    if s.hint:
        return examples
    hints = dict(hints_beside(examples, s, here_or_bundled(folder)))
    if without := [example.path.name for example in examples if example.path not in hints]:
        place = f'a column "{s.conditioning_image_column}" in the metadata, or a --conditioning_data_dir'
        place = f"files of the same names in {s.conditioning_data_dir}" if s.conditioning_data_dir else place
        few = f"{len(without)} of {len(examples)} pictures have no conditioning picture ({some(without)})"
        raise DataError(f"{few}. Give them {place}; or --hint canny, which makes them.")
    return [replace(example, hint=hints[example.path]) for example in examples]


def hints_beside(examples: list[Example], s: ControlNetSettings, folder: Path) -> Iterator[tuple[Path, Path]]:
    """Pictures and their hints."""
    if s.conditioning_data_dir:
        inside = sorted(here_or_bundled(Path(s.conditioning_data_dir)).iterdir())
        files = {path.stem: path for path in inside if is_picture(path)}
        yield from ((example.path, files[example.path.stem]) for example in examples if example.path.stem in files)
        return
    for table in (folder / name for name in METADATA if (folder / name).is_file()):
        for line, row in rows(table):
            if row.get(s.conditioning_image_column):
                where = f"{table}, line {line}"
                yield file_in(folder, row, s.image_column, where), file_in(folder, row, s.conditioning_image_column, where)
