"""Any file into any other form, with proof: what was written is read again, and must be what was there before.

A pickle (.ckpt, .pt, .bin) is opened here and nowhere else, and becomes a safetensors file first.

    convert_lora(read_lora("dog.safetensors"), path, "kohya", torch.float16)        a Proof: max |ΔW_before - ΔW_after|

A number that is rounded to another dtype moves by at most u of itself, u = eps / 2, or by half of the smallest number that
the dtype has. From that follows how far a product B A may move, and more is an error.

Shapes: A (r, in[, kh, kw]), B (out, r), W any.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from torch import Tensor

from minidiff.core.config import SD15_UNET, UNetConfig
from minidiff.core.errors import AdapterError, MinidiffError, SettingsError, WeightsError
from minidiff.core.lora import LoRAWeights
from minidiff.files.atomic import fsync
from minidiff.files.lora_file import LoRAFile, read_lora, save_lora
from minidiff.files.weights import NAMES, PICKLES, first_bytes, foreign, is_finite, is_pickle
from minidiff.files.word_file import Embedding, read_embedding, save_embedding

ADVICE = "Get the .safetensors version of it, or convert it where it was made."


# --- pickles -----------------------------------------------------------------------------------------------------------


class Fields:
    """Takes the place of two harmless classes that old files name. It keeps their fields and does nothing."""


HARMLESS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",  # in SD 1.4's checkpoint
    "torch.nn.modules.container.ParameterDict",  # in A1111's old embeddings
)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle by name; in tables within tables, the names are joined by "/". A single tensor has the name "".

    A pickle is a program: it can run any code when it is opened. PyTorch's reader with `weights_only` builds tensors and
    tables alone and refuses the rest. Of a training checkpoint, {"state_dict": …, "optimizer_states": …}, only the state dict
    is taken. WeightsError for a file that is refused, damaged, or unpacks to more bytes than it has.
    """
    start = first_bytes(path)
    if start[8:9] == b"{":
        raise WeightsError(f"{path} is a safetensors file under another name; rename it to {path.stem}.safetensors.")
    if not is_pickle(path):
        raise WeightsError(f"{path} {foreign(start)}")
    zipped, size = is_zipfile(path), path.stat().st_size
    try:
        if zipped and sum(entry.file_size for entry in ZipFile(path).infolist()) > size:
            raise WeightsError(f"{path} is refused: it is packed, and would unpack to more than its {size:,} bytes. {ADVICE}")
        with torch.serialization.safe_globals([(Fields, name) for name in HARMLESS]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except WeightsError:
        raise
    except Exception as error:  # a damaged file can fail in any way; PyTorch's own messages advise to run the code
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise WeightsError(f"{path} is refused: it asks for {asked[1]}, and no file's code is run. {ADVICE}") from None
        raise WeightsError(f"{path} cannot be read: it is damaged, or holds no weights of PyTorch. {ADVICE}") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    tensors: dict[str, Tensor] = {}
    for name, tensor in tensors_in(content):
        if name in tensors:
            raise WeightsError(f"{path} has two tensors of one name: {name}. {ADVICE}")
        if tensor.dtype not in NAMES or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise WeightsError(f"{path}: {name} is a tensor of an odd kind: complex, sparse, quantized or empty. {ADVICE}")
        tensors[name] = tensor
    if not tensors:
        raise WeightsError(f"{path} is no file of weights: there is no tensor in it.")
    if (wanted := sum(tensor.nbytes for tensor in tensors.values())) > 2 * size + 2**26:  # a view can repeat one number
        raise WeightsError(f"{path} is refused: its tensors would have {wanted:,} bytes, and it has {size:,}. {ADVICE}")
    return tensors


def tensors_in(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in tables and lists within each other."""
    if isinstance(content, Fields):
        content = vars(content).get("_parameters", {})
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, Mapping | list | tuple):
        for key, inner in content.items() if isinstance(content, Mapping) else enumerate(content):
            yield from tensors_in(inner, f"{name}/{key}" if name else str(key))


# --- how far numbers moved -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proof:
    """How far the numbers of a file moved, the furthest of them, and how far such numbers may move by rounding."""

    what: str
    moved: float
    bound: float
    within: bool  # each number within its own bound

    def __str__(self) -> str:
        return f"max |{self.what}_before − {self.what}_after| = {self.moved:.3g}; rounding may make it {self.bound:.3g}"


def check_proof(proof: Proof, path: Path) -> None:
    if not proof.within:
        raise MinidiffError(f"{path}: what was written is not what was read: {proof}. Nothing was kept; this is a bug.")


# --- adapters ----------------------------------------------------------------------------------------------------------


def convert_lora(lora: LoRAFile, path: Path, to: str, dtype: torch.dtype, config: UNetConfig = SD15_UNET) -> Proof:
    """Write an adapter in another dialect or dtype, with its metadata; then read it again and compare."""
    written = save_lora(lora.modules, path, to, dtype, kept_metadata(lora.metadata))
    after = read_lora(written.parent if to == "peft" else written, config=config).modules
    return compare_lora(lora.modules, after, dtype)


def kept_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """What is said about an adapter, without what the writer says anew, and without hashes of the old file."""
    anew = ("format", "lora_adapter_metadata", "ss_network_module", "ss_network_dim", "ss_network_alpha")
    return {key: value for key, value in metadata.items() if key not in anew and "hash" not in key}


def compare_lora(before: Mapping[str, LoRAWeights], after: Mapping[str, LoRAWeights], dtype: torch.dtype) -> Proof:
    """ΔW of each module; AdapterError if one is infinite.

    DoRA's ΔW needs a W, so there it is scale · B A and m: the same two give the same W' on any W.
    """
    moved = bound = 0.0
    within = before.keys() == after.keys()
    for name in before.keys() & after.keys():
        change = before[name].product()
        if not is_finite(change):
            raise AdapterError(f"{name}: its numbers are so large that B A is infinite; no program can use this adapter.")
        pairs = [(change, after[name].product(), product_bound(before[name], dtype))]
        if (m := before[name].magnitude) is not None and (n := after[name].magnitude) is not None:
            pairs.append((m.float(), n.float(), rounding(m, dtype)))
        within &= (before[name].magnitude is None) == (after[name].magnitude is None)
        for one, other, allowed in pairs:
            difference = (one.flatten(1) - other.flatten(1)).abs()
            within &= bool((difference <= allowed.flatten(1)).all())
            moved, bound = max(moved, difference.max().item()), max(bound, allowed.max().item())
    return Proof("ΔW", moved, bound, within)


def rounding(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """How far each number may move when it is rounded to `dtype` (Higham 2002, section 2.1, with underflow)."""
    kind = torch.finfo(dtype)
    return tensor.abs().float() * (kind.eps / 2) + kind.smallest_normal * kind.eps / 2


def product_bound(weights: LoRAWeights, dtype: torch.dtype) -> Tensor:
    """How far scale · B A may move when A and B are rounded: scale · ((|B| + b) (|A| + a) - |B| |A|).

    And, for it is computed twice in fp32, 2 (r + 4) eps of scale · |B| |A| (Higham 2002, section 3.1).
    """
    A, B = weights.A.float().flatten(1), weights.B.float()
    exact = B.abs() @ A.abs()
    rounded = (B.abs() + rounding(B, dtype)) @ (A.abs() + rounding(A, dtype))
    twice = 2 * (weights.rank + 4) * torch.finfo(torch.float32).eps
    return abs(weights.scale) * (rounded - exact + twice * rounded)


# --- textual inversion -------------------------------------------------------------------------------------------------


def convert_embedding(embedding: Embedding, path: Path, to: str, metadata: Mapping[str, str]) -> Proof:
    """Write a word's vectors as another program has them, in fp32."""
    written = read_embedding(save_embedding(path, embedding.word, embedding.vectors, to, metadata))
    moved = (embedding.vectors - written.vectors).abs().max().item()
    return Proof("vectors", moved, 0.0, moved == 0 and written.word == embedding.word)


# --- models ------------------------------------------------------------------------------------------------------------


def compare_weights(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Proof:
    """Every tensor of a model, in the dtypes of `after`."""
    moved = bound = 0.0
    within = before.keys() == after.keys()
    for key in before.keys() & after.keys():
        if not before[key].numel():  # no number of it can have moved
            within &= before[key].shape == after[key].shape
            continue
        difference = (before[key].double() - after[key].double()).abs()
        if before[key].dtype == after[key].dtype:
            within &= not difference.any()
        else:
            allowed = rounding(before[key], after[key].dtype)
            within &= bool((difference <= allowed).all())
            bound = max(bound, allowed.max().item())
        moved = max(moved, difference.max().item())
    return Proof("W", moved, bound, within)


# --- a file that appears whole or not at all ---------------------------------------------------------------------------


@contextmanager
def appearing(output: Path) -> Iterator[Path]:
    """A path to write to; when all has gone well, what is there becomes `output`, a file or a folder. Else nothing remains.

    The path lies in a temporary folder beside it, which is removed in any case; errors speak of `output`. Raises SettingsError
    if `output` is there.
    """
    if output.suffix in PICKLES:
        raise SettingsError(f"{output}: minidiff writes no {output.suffix} files; name a .safetensors file, or a folder.")
    check_new(output)
    asked, output = output, Path(os.path.realpath(output))  # "x/../dog.safetensors" is dog.safetensors, and needs no x
    check_new(output)
    beside = next(folder for folder in output.absolute().parents if folder.exists())
    with TemporaryDirectory(prefix=".minidiff-", dir=beside) as scratch:
        place = Path(scratch) / output.name
        with called(place, asked):
            yield place
        output.parent.mkdir(parents=True, exist_ok=True)
        check_new(output)  # another program may have been as slow as this one
        place.rename(output)
    fsync(output.parent)


@contextmanager
def called(path: Path, name: str | Path) -> Iterator[None]:
    """Errors inside say `name` for `path`, a temporary file, which will be gone when somebody reads them."""
    try:
        yield
    except MinidiffError as error:
        raise type(error)(str(error).replace(str(path), str(name))) from error
    except OSError as error:
        if isinstance(error.filename, str):
            error.filename = error.filename.replace(str(path), str(name))
        raise


def check_new(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise SettingsError(f"{output} is there already, and nothing is overwritten; choose another name.")
