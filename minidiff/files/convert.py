"""Convert a file into another form. What was written is read again, and one number says how far its values moved.

    convert_lora(read_lora("dog.safetensors"), path, "kohya", torch.float16)        max |ΔW - ΔW'|

A pickle (.ckpt, .pt, .bin) is opened only here, and becomes a safetensors file first.

Shapes: A (r, in[, kh, kw]), B (out, r), W any.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from torch import Tensor

from minidiff.core.config import SD15_UNET, UNetConfig
from minidiff.core.errors import AdapterError, MinidiffError, WeightsError
from minidiff.core.lora import LoRAWeights
from minidiff.files.lora_file import LoRAFile, read_lora, save_lora
from minidiff.files.weights import NAMES, first_bytes, foreign, is_finite, is_pickle
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


# --- adapters and words ------------------------------------------------------------------------------------------------


def convert_lora(lora: LoRAFile, path: Path, to: str, dtype: torch.dtype, config: UNetConfig = SD15_UNET) -> float:
    """Write an adapter in another dialect or dtype, with its metadata, and read it again. Returns max |ΔW - ΔW'|."""
    written = save_lora(lora.modules, path, to, dtype, kept_metadata(lora.metadata))
    return largest_change(lora.modules, read_lora(written.parent if to == "peft" else written, config=config).modules)


def kept_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of an adapter, without the keys that its writer sets anew and without hashes of the old file."""
    anew = ("format", "lora_adapter_metadata", "ss_network_module", "ss_network_dim", "ss_network_alpha")
    return {key: value for key, value in metadata.items() if key not in anew and "hash" not in key}


def largest_change(before: Mapping[str, LoRAWeights], after: Mapping[str, LoRAWeights]) -> float:
    """max |ΔW - ΔW'| over the modules of two adapters, with ΔW = scale · B A. Of DoRA, max |m - m'| counts too.

    AdapterError for a ΔW that is infinite.
    """
    if before.keys() != after.keys():
        raise MinidiffError("the file that was written has other layers than the one that was read. This is a bug.")
    largest = 0.0
    for name, weights in before.items():
        change = weights.product()
        if not is_finite(change):
            raise AdapterError(f"{name}: its numbers are so large that B A is infinite; no program can use this adapter.")
        pairs = [(change, after[name].product()), (weights.magnitude, after[name].magnitude)]
        differences = [(a.flatten() - b.flatten()).abs().max().item() for a, b in pairs if a is not None and b is not None]
        largest = max(largest, *differences)
    return largest


def convert_embedding(embedding: Embedding, path: Path, to: str, metadata: Mapping[str, str]) -> float:
    """Write a word's vectors as another program stores them, in fp32, and read them again. Returns max |v - v'|."""
    written = read_embedding(save_embedding(path, embedding.word, embedding.vectors, to, metadata))
    return (embedding.vectors - written.vectors).abs().max().item()


# --- models ------------------------------------------------------------------------------------------------------------


def largest_difference(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """max |W - W'| over two tables of tensors with the same names."""
    if before.keys() != after.keys():
        raise MinidiffError("the file that was written has other tensors than the one that was read. This is a bug.")
    pairs = [(tensor, after[key]) for key, tensor in before.items() if tensor.numel()]
    return max(((a.double() - b.double()).abs().max().item() for a, b in pairs), default=0.0)
