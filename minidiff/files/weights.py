"""Weight files, in and out. Safetensors only, and strict: a file fits the model exactly, or an error says how it does not.

A safetensors file is 8 bytes (n, little-endian), n bytes of JSON (for each tensor its dtype, shape and place; and a
`__metadata__` of strings), and the data. So everything can be checked before any data is read:

    file = read_header("unet/diffusion_pytorch_model.safetensors")      # names, shapes, dtypes
    load_into(unet, file, torch_dtype=torch.float32)                    # checks, then reads
"""

import json
import os
import struct
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minidiff.core.errors import WeightsError
from minidiff.files import looks
from minidiff.files import names as keymaps
from minidiff.files.atomic import PICKLES, check_ending, whole_file
from minidiff.files.bundled import here_or_bundled
from minidiff.files.values import listed, near_path

DTYPES = {  # by their names in a header
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
METADATA = "__metadata__"  # the one name in a header that is no tensor's
LARGE = 2**28  # bytes: 256 MB
MODEL_FILES = tuple(f"{stem}{end}.safetensors" for stem in ("diffusion_pytorch_model", "model") for end in ("", ".fp16"))

PICKLE = "which can run code when opened; get the .safetensors version of it, or make it: minidiff convert {} NEW.safetensors"
OTHER_FILES = {  # their first bytes, and what to say of them
    b"version https://git-lfs": "is a git-LFS pointer, not the file itself; run `git lfs pull` in its folder.",
    b"PK": f"is a PyTorch pickle (zip), {PICKLE}",
    b"\x80": f"is a Python pickle, {PICKLE}",
    b"GGUF": "is a GGUF file; get the .safetensors version of it.",
    b"<": "is a web page, not a model: the download did not give the file. Look into it, and download again.",
}


class TensorInfo(NamedTuple):
    """A header's entry for a tensor, or for some of its rows; `key` is its name in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    key: str
    rows: tuple[int, int] | None = None  # from, to; None: all
    transposed: bool = False  # the file holds its transpose


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file, or a part of one under other names. Holds no data: `read` gets it."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    looks_like: str

    def misfit(self, what: str, problems: Mapping[str, Iterable[str]] = {}) -> str:
        """A message: `what` is wrong, the kind that the file looks like, and ten names of each problem."""
        lines = [listed(problem, names) for problem, names in problems.items() if names]
        return "\n".join([f"{what} The file looks like {self.looks_like}.", *lines])

    def read(self, torch_dtype: torch.dtype | None = None, mapped: bool = False) -> dict[str, Tensor]:
        """Every tensor, cast to `torch_dtype` if one is given. WeightsError for NaN and infinity.

        With `mapped`, tensors of LARGE files that need no cast are memory-mapped and not checked, because checking 4 GB takes
        three times as long as the rest of loading. A NaN in them is found when a picture is drawn.
        """
        tensors = {}
        unchecked = mapped and sum(prod(info.shape) * info.dtype.itemsize for info in self.tensors.values()) > LARGE
        try:
            with safe_open(self.path, framework="pt") as file:
                for name, info in self.tensors.items():
                    tensor = file.get_slice(info.key)[slice(*info.rows)] if info.rows else file.get_tensor(info.key)
                    tensors[name] = (tensor.mT.contiguous() if info.transposed else tensor).to(torch_dtype or info.dtype)
                    if not (unchecked and tensors[name].dtype == info.dtype) and not is_finite(tensors[name]):
                        what = f"{info.key} has NaN or infinite values (as {tensors[name].dtype})"
                        raise WeightsError(f"{self.path}: {what}. Get the file again; if it was cast to half, use float32.")
        except SafetensorError as error:
            raise WeightsError(f"{self.path} is damaged: {error}.") from error
        return tensors


def is_finite(tensor: Tensor) -> bool:
    """One pass and no copy: NaN survives min and max. (`isfinite().all()` takes twelve times as long.)"""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype not in WEIGHT_DTYPES:
        tensor = tensor.half()  # fp8, which PyTorch cannot compare
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


# --- reading ---------------------------------------------------------------------------------------------------------


def read_header(path: str | Path) -> TensorFile:
    """Names, dtypes and shapes of a safetensors file. WeightsError if it is missing, damaged or something else."""
    path = Path(path)
    start = first_bytes(path)
    if start[8:9] != b"{":
        raise WeightsError(f"{path} {foreign(start, path)}")
    try:
        with safe_open(path, framework="pt"), path.open("rb") as file:  # safe_open checks each entry against the file's size
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length), object_pairs_hook=unique_names)
    except (SafetensorError, ValueError) as error:
        raise WeightsError(f"{path} is damaged or cut off ({error}). Get it again.") from error
    metadata = header.pop(METADATA, {})
    if odd := next((name for name, entry in header.items() if entry["dtype"] not in DTYPES), None):
        raise WeightsError(f"{path}: {odd} is of type {header[odd]['dtype']}, which minidiff does not read.")
    tensors = {name: TensorInfo(DTYPES[entry["dtype"]], tuple(entry["shape"]), name) for name, entry in header.items()}
    return TensorFile(path, tensors, metadata, looks.describe(tensors))


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For the JSON reader. A name that stands twice would mean one tensor here and another in another program."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name stands in its header twice")
    return table


def first_bytes(path: Path) -> bytes:
    """The first 64 bytes. WeightsError for a folder, a pipe, a device, a broken link, or an empty file."""
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; name a .safetensors file in it.")
    if not path.is_file():
        what = "leads nowhere: a link without its file" if path.is_symlink() else "is no ordinary file"
        raise WeightsError(f"{path} {what if os.path.lexists(path) else 'does not exist'}.{near_path(str(path))}")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise WeightsError(f"{path} is empty (0 bytes): an unfinished download? Get it again.")
    return start


def foreign(start: bytes, path: Path) -> str:
    """For a message: the kind of a file that begins so and is no safetensors file."""
    unknown = "is not a safetensors file (no header where one should be). Is it the right one?"
    return next((what for magic, what in OTHER_FILES.items() if start.startswith(magic)), unknown).format(path)


def is_pickle(start: bytes) -> bool:
    """Does a pickle begin so? A safetensors file can begin with any eight bytes, and then has a brace."""
    return start.startswith((b"PK", b"\x80")) and start[8:9] != b"{"


def find_weights(path: str | Path, names: Sequence[str] = MODEL_FILES) -> Path:
    """The file itself; in a folder, the first of `names` that it has, or the only .safetensors file there."""
    path = here_or_bundled(path)
    if not path.is_dir():
        return path
    weights = sorted(path.glob("*.safetensors"))
    usual = [path / name for name in names if path / name in weights]
    if usual or len(weights) == 1:
        return (usual or weights)[0]
    if not weights and (pickle := next((file for file in sorted(path.iterdir()) if file.suffix in PICKLES), None)):
        way = f"minidiff convert {pickle} {path}/model.safetensors --to safetensors"
        what = f"has its weights only as a pickle ({pickle.name}), which can run code when it is opened"
        raise WeightsError(f"{path} {what}. Get the .safetensors version of it, or make it: {way}")
    if any(path.glob("*.index.json")):
        raise WeightsError(f"{path}: the weights are split over several files; minidiff reads single ones.")
    if weights:
        raise WeightsError(f"{path} has several weight files, {', '.join(file.name for file in weights)}: name one of them.")
    raise WeightsError(f"{path} has no .safetensors file. Is it the right folder?")


# --- into a model ----------------------------------------------------------------------------------------------------


def load_into(model: nn.Module, source: str | Path | TensorFile, torch_dtype: torch.dtype | None = None) -> None:
    """Give `model` the tensors of a file, which must be exactly its own: no name missing, extra or of another shape.

    Checked against the header before any data is read. The file's tensors become the parameters, in their own dtype or in
    `torch_dtype`, so build the model under `torch.device("meta")`: it takes no time and no memory.
    """
    file = source if isinstance(source, TensorFile) else read_header(source)
    given = check_fit(model, file)
    tensors = replace(file, tensors=given).read(torch_dtype, mapped=True)
    state = {key: tensors[keymaps.modern(key)].reshape(old.shape) for key, old in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    for module in model.modules():  # CLIP's one tensor that no file needs: a model built on "meta" has it without numbers
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor) and ids.is_meta:
            module.position_ids = torch.arange(ids.shape[-1]).expand(ids.shape)


def named(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors by their modern names."""
    return {keymaps.modern(key): tensor for key, tensor in model.state_dict().items()}


def check_fit(model: nn.Module, file: TensorFile) -> dict[str, TensorInfo]:
    """The file's tensors by their modern names; WeightsError with the first ten keys of each kind of misfit."""
    wanted = named(model)
    modern = {keymaps.modern(key): info for key, info in file.tensors.items()}
    given = without_leftovers(modern, file.path, wanted)
    misfits = []
    for name in wanted.keys() & given.keys():
        model_shape, shape = tuple(wanted[name].shape), given[name].shape
        if shape != model_shape and not (keymaps.is_vae_attention(name) and shape == (*model_shape, 1, 1)):
            misfits.append(f"{name} is {shape}, in the model {model_shape}")
        elif given[name].dtype not in WEIGHT_DTYPES:
            misfits.append(f"{name} is {given[name].dtype}, which is no dtype for weights here")
    missing, extra = wanted.keys() - given.keys(), given.keys() - wanted.keys()
    problems = {"missing": missing, "not in the model": extra, "misshapen": misfits}
    if any(problems.values()):
        raise WeightsError(file.misfit(f"{file.path} does not fit {type(model).__name__}.", problems))
    return given


def without_leftovers(tensors: Mapping[str, TensorInfo], path: Path, wanted: Collection[str] = ()) -> dict[str, TensorInfo]:
    """The tensors that a network can need, and those that are `wanted`. One warning names the rest, which training left."""
    kept, left = {}, Counter[str]()
    for key, info in tensors.items():
        if key in wanted or not (found := keymaps.NOT_NEEDED.fullmatch(key)):
            kept[key] = info
        elif not keymaps.NO_WEIGHTS.fullmatch(key):
            left[found["table"] or key] += 1
    if names := [f"{name} ({count} tensors)" if count > 1 else name for name, count in sorted(left.items())]:
        warnings.warn(f"{path}: not needed for drawing, and left out: {', '.join(names)}", stacklevel=2)
    return kept


# --- writing ---------------------------------------------------------------------------------------------------------


def save(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file: the whole of it appears under `path`, or nothing.

    The same tensors and metadata give the same bytes (the safetensors package shuffles the metadata): wide dtypes first,
    then by name. Views, shared and strided tensors are written in full. An OSError names the path.
    """
    path = Path(path)
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {METADATA: {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        dtype, shape = NAMES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data starts at a multiple of 8
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def file_at(path: str | Path, name: str) -> Path:
    """Where to write: `path` itself if it is a `.safetensors` file, else `name` in the folder `path`."""
    path = Path(path)
    check_ending(path)
    return path if path.suffix == ".safetensors" else path / name
