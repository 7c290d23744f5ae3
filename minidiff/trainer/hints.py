"""The conditioning pictures of a training set, the hints of a ControlNet: where they lie. latents.py reads them."""

from dataclasses import replace
from pathlib import Path

from minidiff.core.errors import DataError
from minidiff.files.bundled import here_or_bundled
from minidiff.trainer.dataset import METADATA, Example, file_in, is_picture, rows, some
from minidiff.trainer.settings import ControlNetSettings


def with_hints(examples: list[Example], s: ControlNetSettings, folder: Path) -> list[Example]:
    """The examples of a folder with the files of their hints, unless these are made. DataError if some have none."""
    if s.hint:
        return examples
    hints: dict[Path, Path] = {}
    if s.conditioning_data_dir:
        inside = sorted(here_or_bundled(Path(s.conditioning_data_dir)).iterdir())
        files = {path.stem: path for path in inside if is_picture(path)}
        hints = {example.path: files[example.path.stem] for example in examples if example.path.stem in files}
    else:
        folder, column = here_or_bundled(folder), s.conditioning_image_column
        for table in (folder / name for name in METADATA if (folder / name).is_file()):
            named = [(row, f"{table}, line {line}") for line, row in rows(table) if row.get(column)]
            hints |= {file_in(folder, row, s.image_column, at): file_in(folder, row, column, at) for row, at in named}
    if without := [example.path.name for example in examples if example.path not in hints]:
        few = f"{len(without)} of {len(examples)} pictures have no conditioning picture ({some(without)})"
        place = f'a column "{s.conditioning_image_column}" in the metadata, or a --conditioning_data_dir with their names'
        raise DataError(f"{few}. Give them {place}; or --hint canny, which makes them.")
    return [replace(example, hint=hints[example.path]) for example in examples]
