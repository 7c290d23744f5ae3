"""The header of a safetensors file: what it says of each tensor, checked entry by entry.

Strict, because files come from anywhere: every size is held against the file's before a byte of data is read. `weights.py`
reads and writes whole files.
"""

import json
import os
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minidiff.core.errors import WeightsError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PICKLES = (".ckpt", ".pt", ".pth", ".bin")  # how the names of pickled weights end
MAX_HEADER = 100_000_000  # bytes, the format's own limit

PICKLE = "which can run code when it is opened; get the .safetensors version of it, or `minidiff convert` it."
NOT_SAFETENSORS = {  # how other files begin
    b"version https://git-lfs": "is a git-LFS pointer, not the file itself; run `git lfs pull` in its folder.",
    b"PK": f"is a PyTorch pickle (zip), {PICKLE}",
    b"\x80": f"is a Python pickle, {PICKLE}",
    b"GGUF": "is a GGUF file; get the .safetensors version of it.",
    b"<": "is a web page, not a model: the download did not give the file. Look into it, and download again.",
}


class TensorInfo(NamedTuple):
    """What a header says of a tensor; `key` is its name in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    key: str


def check_ordinary(path: Path) -> None:
    """WeightsError unless this is a file in the plain sense: no folder, no pipe, no device, no link into the void."""
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; name a .safetensors file in it.")
    if not path.is_file():
        what = "leads nowhere: a link without its file" if path.is_symlink() else "is no ordinary file"
        raise WeightsError(f"{path} {what if os.path.lexists(path) else 'does not exist'}.")


def is_pickle(path: Path) -> bool:
    """By its first bytes. A safetensors file can begin with any eight, the length of its header, and then has a brace."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(9)
    return start.startswith((b"PK", b"\x80")) and start[8:] != b"{"


def check_pickle(path: Path) -> None:
    """WeightsError for what is no pickle at all, by its first bytes."""
    check_ordinary(path)
    if is_pickle(path):
        return
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise WeightsError(f"{path} is empty (0 bytes): an unfinished download? Get it again.")
    if start[8:9] == b"{":
        raise WeightsError(f"{path} is a safetensors file under another name; rename it to {path.stem}.safetensors.")
    what = next((what for magic, what in NOT_SAFETENSORS.items() if start.startswith(magic)), "is no pickle of PyTorch.")
    raise WeightsError(f"{path} {what}")


def check_start(path: Path, start: bytes, size: int) -> int:
    """The length of the JSON header, if the first bytes are those of a safetensors file."""
    if start[8:9] != b"{":
        for magic, what in NOT_SAFETENSORS.items():
            if start.startswith(magic):
                raise WeightsError(f"{path} {what}")
        raise WeightsError(f"{path} is not a safetensors file (no header where one should be). Is it the right one?")
    (length,) = struct.unpack("<Q", start[:8])
    if length > MAX_HEADER:
        raise WeightsError(f"{path} is not a safetensors file: its header would be {length:,} bytes long.")
    if length > size - 8:
        raise WeightsError(f"{path} is cut off: {size:,} bytes, and its header alone has {length:,}. Get it again.")
    return int(length)


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=no_twins)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is damaged: its header is not JSON ({error}).") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{path} is damaged: its header is not a JSON object.")
    return header


def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For the JSON reader: a name that stands twice would mean one tensor here and another one elsewhere."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name stands in it twice")
    return table


def tensor_info(path: Path, name: str, entry: Any, data_size: int) -> TensorInfo:
    """One entry of the header, checked against the size of the file."""
    try:
        shape, dtype = tuple(entry["shape"]), str(entry["dtype"])
        begin, end = entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise ValueError("sizes are whole numbers")
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} is damaged: the header's entry for {name:.100} makes no sense.") from error
    if dtype not in DTYPES:
        raise WeightsError(f"{path}: {name} is of type {dtype}, which minidiff does not read.")
    if end > data_size:
        raise WeightsError(
            f"{path} is cut off: {name} ends at byte {end:,} of the data, and there are {data_size:,}. Get it again."
        )
    if end - begin != prod(shape) * DTYPES[dtype].itemsize:
        raise WeightsError(f"{path} is damaged: {name} has {end - begin:,} bytes, which is not {dtype} {shape}.")
    return TensorInfo(DTYPES[dtype], shape, name)
