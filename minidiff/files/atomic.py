"""The one way to write a file or a folder: it appears under its name whole and on the disk, or not at all.

Python's own calls do not wait for the disk: after a power cut a written file may be empty, and a renamed one may have its old
name again. fsync returns when the disk has the bytes.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from minidiff.core.errors import MinidiffError, SettingsError, WeightsError

PICKLES = (".ckpt", ".pt", ".pth", ".bin")  # the usual endings of pickled weights
HIDDEN = ".tmp-minidiff-"  # how the names of half-written files and folders begin


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which replaces `path` at the end of the `with`. After an error the old file stays.

    An OSError names `path`.
    """
    hidden = path.with_name(f"{HIDDEN}{path.name}.{os.getpid()}.tmp")
    remove(hidden)  # left by a killed process of this number
    try:
        with open(hidden, "xb") as file:  # x: never through a link that somebody put there
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, path)
    except OSError as error:  # a full disk does not say which file did not fit
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        remove(hidden)
    fsync(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file of these bytes, or replace it; make the folders that its path needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(data)


@contextmanager
def new_output(output: Path) -> Iterator[Path]:
    """A temporary path for a new file or folder, which becomes `output` at the end of the `with`. Errors name `output`.

    After an error nothing stays. SettingsError if `output` exists.
    """
    check_ending(output)
    asked, output = output, output.parent.resolve() / output.name  # "x/../dog.safetensors" needs no folder x
    check_new(output)
    beside = next(folder for folder in output.parents if folder.exists())
    with TemporaryDirectory(prefix=HIDDEN, dir=beside) as scratch:
        place = Path(scratch) / output.name
        with called(place, asked):
            yield place
        fsync_tree(place)
        output.parent.mkdir(parents=True, exist_ok=True)
        check_new(output)  # another program may have written it in the meantime
        place.rename(output)
    fsync(output.parent)


def check_ending(output: Path) -> None:
    """WeightsError for an output whose name says that it is a pickle."""
    if output.suffix in PICKLES:
        raise WeightsError(f"{output}: minidiff writes no {output.suffix} files; name a .safetensors file, or a folder.")


def check_new(output: Path) -> None:
    if os.path.lexists(output):
        raise SettingsError(f"{output} is there already, and nothing is overwritten; choose another name.")


@contextmanager
def called(path: Path, name: str | Path) -> Iterator[None]:
    """Errors inside the `with` say `name` in place of `path`, a temporary file."""
    try:
        yield
    except MinidiffError as error:
        raise type(error)(str(error).replace(str(path), str(name))) from error
    except OSError as error:
        error.filename = error.filename and str(error.filename).replace(str(path), str(name))
        raise


def fsync(path: Path) -> None:
    """Wait until the disk has a file's bytes, or a folder's names. (Windows has no such call for folders.)"""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(path: Path) -> None:
    """fsync a file, or a folder with its contents."""
    for each in [*path.rglob("*"), path]:
        fsync(each)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def put_aside(path: Path) -> None:
    """Remove a folder: hide it in one step first, so that nobody sees a half-removed checkpoint."""
    if path.exists():
        hidden = path.with_name(f"{HIDDEN}old-{path.name}")
        remove(hidden)
        os.rename(path, hidden)
        remove(hidden)


def remove(path: Path) -> None:
    """Remove a file, a folder with its contents, or a link (not its target)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
