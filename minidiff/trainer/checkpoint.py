"""A checkpoint is whole or absent, and a resumed run is bit-identical to one that never stopped.

    my-lora/
      .lock                        held by the one process that trains here
      train_config.toml            the settings; marks the folder as a run of minidiff's
      checkpoint-300/              has this name only once all of it is on the disk
        state/weights.safetensors    what is trained, in fp32
        state/optimizer.safetensors  AdamW's moments, or their 8-bit codes, and step counts
        state/ema.safetensors        averaged weights, where the task has them
        …                            what the task exports: the adapter of step 300, ready to use
        manifest.json                sizes, sha256, step, versions, threads, what the run was made of

The order that makes it so (`put_in_place`): write into a hidden folder, with the manifest last; fsync each file and folder;
rename into place; fsync the parent; and only then take old checkpoints away (they are first renamed out of sight, too).
Whenever the process dies, each visible checkpoint is complete. Nothing is pickled.
"""

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from minidiff import __version__
from minidiff.core.errors import SettingsError, WeightsError
from minidiff.files import weights
from minidiff.files.atomic import HIDDEN, fsync, fsync_tree, put_aside, remove, sha256, write_bytes
from minidiff.trainer import distributed
from minidiff.trainer.settings import TrainSettings

Groups = dict[str, dict[str, Tensor]]  # "weights" | "optimizer" | "ema" -> tensors by name
CONFIG = "train_config.toml"
STATE = {"state/weights.safetensors", "state/optimizer.safetensors"}  # what every checkpoint has


@contextmanager
def put_in_place(folder: Path, name: str | None = None) -> Iterator[Path]:
    """Inside the `with`, a hidden folder to write into. At the end, once all of it is on the disk, it becomes `folder/name`.

    Without a name, each piece of it replaces the one in `folder`, but for a .gitignore: the folder may be a clone of a
    repository with rules of its own. After an error inside the `with` nothing is replaced.
    """
    hidden = folder / f"{HIDDEN}{name or 'result'}"
    remove(hidden)
    hidden.mkdir(parents=True)
    try:
        yield hidden
        fsync_tree(hidden)
        for path in [hidden] if name else sorted(hidden.iterdir()):
            final = folder / (name or path.name)
            if path.name == ".gitignore" and final.exists():
                continue
            if final.is_dir() or path.is_dir():
                put_aside(final)
            os.replace(path, final)
        fsync(folder)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)  # what is left after an error: give the space back


def save(
    folder: Path, step: int, tensors: Groups, made_of: dict[str, Any], export: Callable[[Path], None], keep: int | None
) -> Path:
    """Write `folder/checkpoint-<step>`, then remove all but the `keep` newest. An OSError leaves the old ones whole."""
    name = f"checkpoint-{step}"
    with put_in_place(folder, name) as hidden:
        (hidden / "state").mkdir()
        for group, values in tensors.items():
            weights.save(values, hidden / "state" / f"{group}.safetensors")
        export(hidden)
        files = sorted(p for p in hidden.rglob("*") if p.is_file())
        listed = {p.relative_to(hidden).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
        manifest = {"step": step, "environment": environment(), "made_of": made_of, "files": listed}
        write_bytes(hidden / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False).encode())
    prune(folder, keep, step)
    return folder / name


def load(path: Path) -> tuple[dict[str, Any], Groups]:
    """A checkpoint's manifest and tensors. WeightsError unless every byte is as it was written."""
    manifest = verify(path)
    files = (path / name for name in manifest["files"] if name.startswith("state/"))  # none that the manifest does not know
    return manifest, {p.stem: weights.read_header(p).read() for p in files}


def verify(path: Path) -> dict[str, Any]:
    """The manifest, if each file it lists has its size and sha256; else a WeightsError with the file's name."""
    manifest = read_manifest(path)
    for name, want in manifest["files"].items():
        if sha256(path / name) != want["sha256"]:
            raise WeightsError(f"{path / name} is damaged: its bytes are not those that were saved.")
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files have the right sizes: `verify`, but in no time. Else a WeightsError."""
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text("utf-8"))
        files, step = manifest["files"], manifest["step"]
        tables = (files, manifest["made_of"], manifest["environment"])
        if type(step) is not int or step < 0 or not all(isinstance(table, dict) for table in tables):
            raise ValueError("its manifest.json makes no sense")
        if path.name.startswith("checkpoint-") and path.name != f"checkpoint-{step}":
            raise ValueError(f"by its manifest.json it is that of step {step}")
        for name in STATE | files.keys():
            if (path / name).stat().st_size != files[name]["bytes"] or "sha256" not in files[name]:
                raise ValueError(f"{name} is cut short")
        return manifest
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(f"{path} is no complete checkpoint ({type(error).__name__}: {error}).") from error


def checkpoints(folder: Path) -> list[Path]:
    """The folders that are named as checkpoints of a run, oldest first, complete or not."""
    found = [(p.name.removeprefix("checkpoint-"), p) for p in folder.glob("checkpoint-*")]
    return [p for _, p in sorted((int(step), p) for step, p in found if step.isascii() and step.isdecimal())]


def latest(folder: Path) -> Path | None:
    """The checkpoint with the highest step whose manifest verifies; says which ones do not."""
    for path in reversed(checkpoints(folder)):
        try:
            verify(path)
            return path
        except WeightsError as error:
            print(f"Passing over a checkpoint: {error}", file=sys.stderr)
    return None


def last_good(folder: Path) -> str:
    """For messages: from where a run that failed goes on."""
    good = latest(folder)
    again = "--resume_from_checkpoint latest continues from it."
    return f"The last good checkpoint is {good}. {again}" if good else "No checkpoint had been saved yet."


def prune(folder: Path, keep: int | None, step: int) -> None:
    """After `step`, take away all but the `keep` newest whole checkpoints (None: keep all), and what `sweep` takes.

    Damaged ones, and those with the name of a later step, do not count, and stay for a person to look at.
    """
    whole = []
    for path in checkpoints(folder) if keep else []:
        with suppress(WeightsError):
            if read_manifest(path)["step"] <= step:
                whole.append(path)
    for path in whole[: -keep if keep else None]:
        put_aside(path)
    sweep(folder)


def sweep(folder: Path) -> None:
    """Take away what a killed process of minidiff's left half done; hidden files of other names are not ours."""
    for path in [*folder.glob(f"{HIDDEN}*"), *folder.glob(f"samples/{HIDDEN}*")]:
        remove(path)


def find(settings: TrainSettings) -> Path | None:
    """The checkpoint that --resume_from_checkpoint means, or None where there is none yet to go on from."""
    wanted, folder = settings.resume_from_checkpoint, Path(settings.output_dir)
    if wanted is None:
        return None
    if wanted == "latest":
        newest = latest(folder)
        if newest is None and checkpoints(folder):
            raise SettingsError(f"{folder} has checkpoints, and none is whole. Start over with --overwrite_output_dir.")
        return newest
    path = next((p for p in (Path(wanted), folder / wanted) if p.is_dir()), None)
    if path is None:
        there = ", ".join(p.name for p in checkpoints(folder)) or "none"
        raise SettingsError(
            f'--resume_from_checkpoint {wanted}: no such folder. Checkpoints in {folder}: {there}; or "latest".'
        )
    step = verify(path)["step"]
    if newer := [p.name for p in checkpoints(folder) if int(p.name.removeprefix("checkpoint-")) > step]:
        raise SettingsError(
            f"--resume_from_checkpoint {wanted}: {folder} holds newer ones ({', '.join(newer)}), which this run would "
            'overwrite. Use "latest", another --output_dir, or move them away first.'
        )
    return path


def check_same(saved: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Refuse to go on with other settings or data than the run was made of; the SettingsError lists the differences."""
    # None, False, 0 and an empty value count as missing: a checkpoint from before a flag existed still fits.
    if keys := [k for k in saved | now if (saved.get(k) or None) != (now.get(k) or None)]:
        was, is_now = ([f"{json.dumps(values.get(k), ensure_ascii=False):.60}" for k in keys] for values in (saved, now))
        rows = "".join(f"\n  {k}: was {a}, is now {b}" for k, a, b in zip(keys, was, is_now))
        raise SettingsError(
            f"{path} was made with other settings or data:{rows}\nSet these back, or start in another --output_dir."
        )


def environment() -> dict[str, Any]:
    """Versions, threads and devices: apart from the settings, the last bits of a result depend on them."""
    return {
        "minidiff": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processes": distributed.world().size,
    }


# --- the folder of a run ---------------------------------------------------------------------------------------------


def check_folder(settings: TrainSettings) -> Path:
    """The output folder, unless it is a file, holds something else, or holds a run that was not mentioned."""
    folder = Path(settings.output_dir)
    if distributed.world().rank:
        return folder  # the first process looks; by now it may have begun the run
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"--output_dir {folder} is a file.")
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
    if names and CONFIG not in names:
        raise SettingsError(
            f"--output_dir {folder} holds other files ({', '.join(names[:3])}{' …' if len(names) > 3 else ''}) and no "
            f"{CONFIG} of an earlier run; choose a new or an empty folder."
        )
    if names and not (settings.resume_from_checkpoint or settings.overwrite_output_dir):
        raise SettingsError(
            f"--output_dir {folder} holds an earlier run. Go on with --resume_from_checkpoint latest, start over with "
            "--overwrite_output_dir, or choose another folder."
        )
    return folder


@contextmanager
def claimed(settings: TrainSettings) -> Iterator[Path]:
    """The output folder, checked, made if need be, and locked for this process. The system unlocks it when the process ends."""
    folder = check_folder(settings)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout as error:
        raise SettingsError(f"--output_dir {folder}: another process is training there at this moment.") from error
    with lock:
        check_folder(settings)  # again: another process may have come and gone
        if settings.overwrite_output_dir:
            clear(folder)
        if (folder / CONFIG).exists():
            sweep(folder)
        yield folder


def clear(folder: Path) -> None:
    """Remove an earlier run's checkpoints, metrics and sheets. The old result stays until the new one replaces it."""
    sheets = folder.glob("samples/step-*.png")  # beside which may lie a person's own pictures
    for path in [*checkpoints(folder), folder / "metrics.jsonl", folder / "loss.png", *sheets]:
        put_aside(path)
    sweep(folder)
