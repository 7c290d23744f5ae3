"""Files that survive a crash: what has a name that counts is whole, and on the disk.

Python's own calls stop halfway: a file that was written may still be in memory, and one that was renamed may have its old
name again, when the power comes back. fsync says that the disk has it.
"""

import hashlib
import os
import shutil
from pathlib import Path

HIDDEN = ".tmp-minidiff-"  # how the names of half-written files and folders begin; nobody else's do


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file in one go: a reader, or a crash, sees the old bytes or the new."""
    hidden = path.with_name(f"{HIDDEN}{path.name}")
    remove(hidden)
    with open(hidden, "xb") as file:  # x: never through a link that somebody laid there
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(hidden, path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, durable. (Windows has no such call for folders, and needs none.)"""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_tree(folder: Path) -> list[Path]:
    """fsync each file and each folder below `folder`; the files, sorted."""
    paths = sorted(folder.rglob("*"))
    for path in [*paths, folder]:
        fsync(path)
    return [p for p in paths if p.is_file()]


def put_aside(path: Path) -> None:
    """Out of sight in one step, so that no half-removed checkpoint is ever visible; then remove it."""
    if path.exists():
        hidden = path.with_name(f"{HIDDEN}old-{path.name}")
        remove(hidden)
        os.rename(path, hidden)
        remove(hidden)


def remove(path: Path) -> None:
    """A file, a folder with all that is in it, or the link alone, if it is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
