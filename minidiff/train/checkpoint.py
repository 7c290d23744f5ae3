"""A checkpoint is whole or absent, and a resumed run is bit-identical to one that never stopped.

    my-lora/
      .lock                        held by the one process that trains here
      train_config.toml            the settings; marks the folder as a run of minidiff's
      checkpoint-300/              has this name only once all of it is on the disk
        state/weights.safetensors    what is trained, fp32
        state/optimizer.safetensors  AdamW's moments and step counts
        state/ema.safetensors        averaged weights, where the task has them
        …                            what the task exports: the adapter of step 300, ready to use
        manifest.json                sizes, sha256, step, versions, threads, what the run was made of

The order that makes it so: write into a hidden folder, fsync each file, write the manifest, fsync, rename into place,
fsync the parent, and only then take old checkpoints away (they are first renamed out of sight, too). Whenever the
process dies, each visible checkpoint is complete. Nothing is pickled.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidiff import weights
from minidiff.errors import SettingsError, WeightsError
from minidiff.train import distributed
from minidiff.train.settings import TrainSettings, to_toml

Groups = dict[str, dict[str, Tensor]]  # "weights" | "optimizer" | "ema" -> tensors by name
CONFIG = "train_config.toml"


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: tensors by group, and a dictionary of JSON values."""

    path: Path
    step: int
    tensors: Groups
    facts: dict[str, Any]


def save(
    folder: Path, step: int, tensors: Groups, facts: dict[str, Any], export: Callable[[Path], None], keep: int | None
) -> Path:
    """Write `folder/checkpoint-<step>`, then remove all but the `keep` newest. An OSError leaves the old ones whole."""
    final, hidden = folder / f"checkpoint-{step}", folder / f".tmp-checkpoint-{step}"
    try:
        _remove(hidden)
        os.makedirs(hidden / "state")
        for name, group in tensors.items():
            weights.save(group, hidden / "state" / f"{name}.safetensors")
        export(hidden)
        _write_manifest(hidden, step, facts)
        _put_aside(final)  # exists only if it is damaged: an intact one is never written again
        os.rename(hidden, final)
        fsync(folder)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)  # give the space back
        raise
    prune(folder, keep)
    return final


def load(path: Path) -> Checkpoint:
    """Read a checkpoint back; raises WeightsError unless every byte is as it was written."""
    manifest = verify(path)
    tensors = {p.stem: weights.read_header(p).read() for p in sorted((path / "state").glob("*.safetensors"))}
    return Checkpoint(path, manifest["step"], tensors, manifest)


def verify(path: Path) -> dict[str, Any]:
    """The manifest, if each file it lists has its size and sha256; else a WeightsError with the file's name."""
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text("utf-8"))
        files: dict[str, dict[str, Any]] = manifest["files"]
        for name, want in files.items():
            if (path / name).stat().st_size != want["bytes"] or sha256(path / name) != want["sha256"]:
                raise WeightsError(f"{path / name} is damaged: its bytes are not those that were saved.")
        if type(manifest["step"]) is not int:
            raise ValueError("its step is no whole number")
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} is no complete checkpoint ({type(error).__name__}: {error}).") from error


def checkpoints(folder: Path) -> list[Path]:
    """The visible checkpoints of a run, oldest first, whole or not."""
    found = [(p.name.removeprefix("checkpoint-"), p) for p in folder.glob("checkpoint-*")]
    return [p for _, p in sorted((int(step), p) for step, p in found if step.isdigit())]


def latest(folder: Path) -> Path | None:
    """The checkpoint with the highest step whose manifest verifies; says which ones do not."""
    for path in reversed(checkpoints(folder)):
        try:
            verify(path)
            return path
        except WeightsError as error:
            print(f"Passing over a checkpoint: {error}", file=sys.stderr)
    return None


def prune(folder: Path, keep: int | None) -> None:
    """Take away all but the `keep` newest checkpoints (None: keep all), and what a killed process left half done."""
    for path in [] if keep is None else checkpoints(folder)[:-keep]:
        _put_aside(path)
    for left in (".tmp-*", ".*.part", "samples/.*.part"):  # .part: pictures, see images.save_png
        for path in folder.glob(left):
            _remove(path)


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
    newer = [p.name for p in checkpoints(folder) if int(p.name.split("-")[1]) > step]
    if newer:
        raise SettingsError(
            f"--resume_from_checkpoint {wanted}: {folder} holds newer ones ({', '.join(newer)}), which this run would "
            'overwrite. Use "latest", another --output_dir, or move them away first.'
        )
    return path


def check_same(saved: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Refuse to go on with other settings or data than the run was made of; the SettingsError lists the differences."""
    # What is off (None, False, 0, nothing) is as if not there: a checkpoint from before a flag existed still fits.
    keys = [k for k in {**saved, **now} if (saved.get(k) or None) != (now.get(k) or None)]
    if keys:
        rows = "".join(f"\n  {k}: was {_short(saved.get(k))}, is now {_short(now.get(k))}" for k in keys)
        raise SettingsError(
            f"{path} was made with other settings or data:{rows}\nSet these back, or start in another --output_dir."
        )


def environment() -> dict[str, Any]:
    """What, apart from the settings, the last bits of a result hang on."""
    try:
        own = metadata.version("minidiff")
    except metadata.PackageNotFoundError:  # read from a clone, not installed
        own = "not installed"
    versions = {"minidiff": own, "torch": torch.__version__, "python": platform.python_version()}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    here = {"threads": torch.get_num_threads(), "machine": platform.machine(), "gpu": gpu}
    return {**versions, **here, "processes": distributed.world().size}


# --- the optimizer's state as tensors and JSON -----------------------------------------------------------------------


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Moments and step counts by "<parameter number>.<name>", and the parameter groups' numbers."""
    state = optimizer.state_dict()
    return {f"{i}.{k}": v for i, values in state["state"].items() for k, v in values.items()}, state["param_groups"]


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> None:
    """The reverse. JSON turned tuples, such as Adam's betas, into lists: they become tuples again."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    restored = [{k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in g.items()} for g in groups]
    optimizer.load_state_dict({"state": state, "param_groups": restored})


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
    """The output folder, checked, made if need be, and locked for this process."""
    folder = check_folder(settings)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        if not _try_lock(lock.fileno()):
            raise SettingsError(f"--output_dir {folder}: another process is training there at this moment.")
        check_folder(settings)  # again: another process may have come and gone
        if settings.overwrite_output_dir:
            clear(folder)
        if (folder / CONFIG).exists():
            prune(folder, None)  # of what a killed process left
        yield folder


def write_config(folder: Path, settings: TrainSettings) -> None:
    write_bytes(folder / CONFIG, to_toml(settings).encode())


def clear(folder: Path) -> None:
    """Remove an earlier run's checkpoints, metrics and sheets. The old result stays until the new one replaces it."""
    for path in [*checkpoints(folder), folder / "metrics.jsonl", folder / "loss.png", folder / "samples"]:
        _put_aside(path)
    prune(folder, None)


def publish(folder: Path, export: Callable[[Path], None]) -> None:
    """Let `export` write into a hidden folder, then move what it wrote into `folder`, each piece whole."""
    hidden = folder / ".tmp-export"
    _remove(hidden)
    hidden.mkdir()
    export(hidden)
    _fsync_tree(hidden)
    for path in sorted(hidden.iterdir()):
        if (folder / path.name).is_dir():
            _put_aside(folder / path.name)
        os.replace(path, folder / path.name)
    fsync(folder)
    prune(folder, None)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file in one go: a reader, or a crash, sees the old bytes or the new."""
    hidden = path.with_name(f".tmp-{path.name}")
    with open(hidden, "wb") as file:
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


def _try_lock(descriptor: int) -> bool:
    """An advisory lock that the system drops when the process ends, however it ends."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def _write_manifest(folder: Path, step: int, facts: dict[str, Any]) -> None:
    """The last file to be written, after all others are on the disk."""
    files = _fsync_tree(folder)
    listed = {str(p.relative_to(folder).as_posix()): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
    manifest = {"step": step, "environment": environment(), **facts, "files": listed}
    write_bytes(folder / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False).encode())


def _fsync_tree(folder: Path) -> list[Path]:
    """fsync each file and each folder below `folder`; the files, sorted."""
    paths = sorted(folder.rglob("*"))
    for path in [*paths, folder]:
        fsync(path)
    return [p for p in paths if p.is_file()]


def _put_aside(path: Path) -> None:
    """Out of sight in one step, so that no half-removed checkpoint is ever visible; then remove it."""
    if path.exists():
        hidden = path.with_name(f".tmp-old-{path.name}")
        _remove(hidden)
        os.rename(path, hidden)
        _remove(hidden)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
