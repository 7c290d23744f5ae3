"""Pickled weights (.ckpt, .pt, .bin): rewritten as safetensors by a process of their own, never opened in this one.

A pickle is a program that builds objects, and it can build anything: opening one can run any code. PyTorch has a reader that
builds tensors and tables alone and refuses the rest (`weights_only=True`). A child process asks it, which may use so much
memory, time and disk and no more; and what the child writes is read as strictly as any other file.

    file = unpickle("model.ckpt", folder)    ->    read_header(file); or content(file), for tables within tables
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import minidiff
from minidiff.core.errors import WeightsError
from minidiff.files.headers import NAMES, NOT_SAFETENSORS, check_ordinary
from minidiff.files.weights import read_header, save

STARTS = (b"PK", b"\x80")  # how PyTorch's files begin
REFUSED = 3  # the child's exit code when it can say why
SECONDS, GIB = 600, 2**30
ADVICE = "Get the .safetensors version of it, or have it converted where it was made."

Names = tuple[str, ...]  # of the tables that lead to a tensor, from the outermost inwards


def unpickle(path: str | Path, folder: str | Path, seconds: int = SECONDS) -> Path:
    """Write the tensors of a pickle into a folder, as `<name>.safetensors`; gives that file. WeightsError if it is refused.

    Of a training checkpoint, {"state_dict": …, "optimizer_states": …}, only the state dict is taken. `seconds` limits the
    child's computing time. Give a temporary folder: a child that is killed leaves its half of a file there.
    """
    path, target = Path(path), Path(folder) / f"{Path(path).stem}.safetensors"
    check_ordinary(path)
    check_start(path)
    if target.exists():
        raise WeightsError(f"{target} exists already; nothing is overwritten.")
    home = Path(minidiff.__file__).parents[1]
    command = [sys.executable, "-m", __name__, str(path.absolute()), str(target.absolute()), str(seconds)]
    try:  # from minidiff's own home: Python would import whatever lies in the present folder
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * seconds, cwd=home)
    except subprocess.TimeoutExpired:
        raise WeightsError(f"{path} was given up after {2 * seconds} seconds. {ADVICE}") from None
    if done.returncode == REFUSED:
        raise WeightsError(done.stdout.strip().replace(str(target.absolute()), str(path)))
    if done.returncode:
        raise WeightsError(f"{path} was given up: reading it took more memory or time than its size justifies. {ADVICE}")
    return target


def check_start(path: Path) -> None:
    """WeightsError for what is no pickle at all, by its first bytes."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise WeightsError(f"{path} is empty (0 bytes): an unfinished download? Get it again.")
    if start[8:9] == b"{":
        raise WeightsError(f"{path} is a safetensors file under another name; rename it to {path.stem}.safetensors.")
    for magic, what in NOT_SAFETENSORS.items():
        if start.startswith(magic) and magic not in STARTS:
            raise WeightsError(f"{path} {what}")


def content(path: str | Path) -> Any:
    """What the pickle held, from the child's file: a tensor, or tables of tensors within tables. Other values were left out."""
    file = read_header(path)
    names: dict[str, list[str]] = json.loads(file.metadata.get("names", "{}"))
    whole: dict[str, Any] = {}
    for key, tensor in file.read().items():
        *outer, last = ["", *names.get(key, [key])]
        table = whole
        for name in outer:
            table = table.setdefault(name, {})
        table[last] = tensor
    return whole[""]


# --- the child ---------------------------------------------------------------------------------------------------------


class StandIn:
    """What the child builds in place of two harmless classes of old files: a thing that keeps its fields and does nothing."""


STAND_INS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",  # SD 1.4's checkpoint names it
    "torch.nn.modules.container.ParameterDict",  # A1111's old embeddings are in one
)


def main(source: str, target: str, seconds: str) -> int:
    """Exit code 0 if `target` is written, `REFUSED` with the reason on stdout if not; anything else was not foreseen."""
    set_limits(Path(source).stat().st_size, int(seconds))
    try:
        rewrite(Path(source), Path(target))
    except WeightsError as error:
        print(error)
        return REFUSED
    return 0


def rewrite(source: Path, target: Path) -> None:
    """Read the pickle `source`, write its tensors as the safetensors file `target`."""
    tensors: dict[str, Tensor] = {}
    nested: dict[str, Names] = {}
    for names, tensor in tensors_of(load(source)):
        key = "/".join(names) or "tensor"
        if key in tensors:
            raise WeightsError(f"{source} has two tensors of one name: {key}. {ADVICE}")
        if tensor.dtype not in NAMES or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise WeightsError(f"{source}: {key} is a tensor of an odd kind: complex, sparse, quantized or empty. {ADVICE}")
        tensors[key] = tensor
        if len(names) != 1:
            nested[key] = names
    if not tensors:
        raise WeightsError(f"{source} is no file of weights: there is no tensor in it.")
    tables = {"/".join(names[:i]) for names in nested.values() for i in range(1, len(names))}
    if both := tables & tensors.keys():  # as of {1: tensor, "1": {…}}
        raise WeightsError(f"{source} has a tensor and a table of one name: {min(both)}. {ADVICE}")
    save(tensors, target, {"names": json.dumps(nested)} if nested else {})


def load(source: Path) -> Any:
    """What PyTorch's careful reader makes of the file. Its own messages fill a page, and advise to run the code."""
    try:
        with torch.serialization.safe_globals([(StandIn, name) for name in STAND_INS]):
            return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # an unsound file can make it fail in any way
        if "allocate" in str(error) or isinstance(error, MemoryError):
            raise
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise WeightsError(f"{source} was refused: it asks for {asked[1]}, and no file's code is run. {ADVICE}") from None
        raise WeightsError(f"{source} cannot be read: it is damaged, or holds no weights of PyTorch. {ADVICE}") from error


def set_limits(size: int, seconds: int) -> None:
    """Computing time; a file twice as large as the source; memory for three of them, beside what PyTorch itself takes."""
    if sys.platform != "linux":
        return  # elsewhere there are no such limits, and only the parent's clock
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + 3 * size + GIB
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size + GIB // 16,) * 2)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def tensors_of(loaded: Any) -> Iterator[tuple[Names, Tensor]]:
    """Every tensor in tables and lists within each other, by the names that lead to it."""
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    return walk(loaded, ())


def walk(value: Any, names: Names) -> Iterator[tuple[Names, Tensor]]:
    if isinstance(value, StandIn):
        value = vars(value).get("_parameters", {})
    if isinstance(value, Tensor):
        yield names, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from walk(inner, (*names, str(name)))
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from walk(inner, (*names, str(i)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
