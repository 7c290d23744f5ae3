"""Convert a file into another form. It is read again after writing, and one number says how far its values moved.

A pickle (.ckpt, .pt, .bin) is opened only here, and becomes a safetensors file first.

Shapes: A (r, in[, kh, kw]), B (out, r), W any.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from torch import Tensor

from minidiff.core.errors import AdapterError, SettingsError, WeightsError
from minidiff.core.lora import LoRAWeights
from minidiff.files.atomic import PICKLES, called
from minidiff.files.bundled import here_or_bundled
from minidiff.files.controlnet import read_controlnet, write_controlnet
from minidiff.files.looks import cross_attention_width, kind_of
from minidiff.files.lora_file import read_lora, save_lora
from minidiff.files.model import SINGLE_FILE, cast, empty_model, read_again, read_model, write_model
from minidiff.files.weights import NAMES, find_weights, first_bytes, foreign, is_finite, is_pickle, read_header, save
from minidiff.files.word_file import FILES_NAME, read_embedding, save_embedding

ADVICE = "Get the .safetensors version of it, or convert it where it was made."


def convert(source: Path, place: Path, to: str, flags: Mapping[str, Any]) -> list[str]:
    """Write a file or folder to the new path `place` in the form `to`. Returns lines for people, with how far it moved.

    `flags` are those that were given, of KINDS. SettingsError for a form or a flag that this kind of file does not have.
    """
    source = here_or_bundled(source)
    pickled = not source.is_dir() and (source.suffix in PICKLES or is_pickle(first_bytes(source)))
    path = place.parent / "opened" / f"{source.stem}.safetensors" if pickled else source
    with called(path, source):
        if pickled:
            save(tensors := read_pickle(source), path)
            if to == "safetensors" and all(name.startswith(FILES_NAME["A1111"]) for name in tensors):
                to = "diffusers"  # the new file names the word, which until now only the file's name did
        if pickled and to == "safetensors":
            kind = "a pickle"
        else:
            is_model = (path / "model_index.json").is_file()
            kind = "a model" if is_model else kind_of(read_header(find_weights(path, ())).tensors)
        forms, names, write = KINDS[kind]
        if to not in forms:
            raise SettingsError(f"{path} is {kind}, and that has no form --to {to}; it has {', '.join(forms)}.")
        if ignored := [flag for flag in flags if flag not in names]:
            raise SettingsError(f"{path} is {kind}, for which --{ignored[0]} means nothing; leave it out.")
        is_file = to in ("ldm", "safetensors")
        if kind not in ("a LoRA", "a textual inversion") and (place.suffix == SINGLE_FILE) != is_file:
            form = f"a file that ends in {SINGLE_FILE}" if is_file else "a folder"
            raise SettingsError(f"{place}: {kind} in the form {to} is {form}; choose another name, or another --to.")
        return write(path, place, to, *(flags.get(name) for name in names))


def convert_lora(
    path: Path, place: Path, to: str, alpha: float | None, dtype: torch.dtype | None, like: str | None
) -> list[str]:
    """`like` is a model's folder: LDM's names count the layers of its U-Net."""
    lora = read_lora(path, alpha, empty_model(like).unet.config if like else None)
    kinds = {info.dtype for info in read_header(lora.path).tensors.values() if len(info.shape) > 1}
    own = kinds.pop() if len(kinds) == 1 and kinds <= {torch.float16, torch.bfloat16} else torch.float32
    return [str(lora), *rewritten(lora.modules, place, to, dtype or own, lora.metadata)]


def convert_word(path: Path, place: Path, to: str, token: str | None) -> list[str]:
    old = read_embedding(path, token)
    new = read_embedding(save_embedding(place, old.word, old.vectors, to, read_header(old.path).metadata, old.second))
    both = [(a, b) for a, b in ((old.vectors, new.vectors), (old.second, new.second)) if a is not None and b is not None]
    lines = [str(old), f"max |v - v'| = {largest_difference(both):.3g}"]
    if to == "kohya" and place.stem != old.word:
        lines.append(f'Note: programs that read this form take the file\'s name for the word: "{place.stem}".')
    return lines + for_a1111(to, sum(old.widths))


def convert_model(path: Path, place: Path, to: str, dtype: torch.dtype | None, *known: str | None) -> list[str]:
    """`known`: a folder that says the sizes of a single file's networks, a tokenizer's folder, and the prediction type."""
    like, tokenizer, prediction_type = known
    model = read_model(path, like, tokenizer, prediction_type=prediction_type)
    before = model.weights()
    if dtype:
        cast(model, dtype)
    write_model(model, place)
    return [moved(before, read_again(model, place).weights())]


def convert_controlnet(path: Path, place: Path, to: str, dtype: torch.dtype | None, like: str | None) -> list[str]:
    """`like` is the folder of a model with the sizes of a single file that is of none of the known families."""
    unet = empty_model(like).unet.config if like else None
    net = read_controlnet(path, None, unet)
    write_controlnet(net, place, dtype)
    return [moved(net.state_dict(), read_controlnet(place, None, net.config).state_dict())]


def convert_tensors(path: Path, place: Path, to: str) -> list[str]:
    before = {key or "tensor": tensor for key, tensor in read_header(find_weights(path)).read().items()}
    save(before, place)
    return [moved(before, read_header(place).read())]


IN_ONE_FILE = ("tokenizer", "prediction_type")  # a model in one file does not have them
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[..., list[str]]]] = {  # forms, flags, function
    "a pickle": (("safetensors",), (), convert_tensors),
    "an IP-Adapter": (("safetensors",), (), convert_tensors),
    "a LoRA": (("diffusers", "kohya", "peft"), ("alpha", "dtype", "pretrained_model_name_or_path"), convert_lora),
    "a textual inversion": (("diffusers", "kohya"), ("token",), convert_word),
    "a ControlNet": (("diffusers", "ldm"), ("dtype", "pretrained_model_name_or_path"), convert_controlnet),
    "a model": (("diffusers", "ldm"), ("dtype", "pretrained_model_name_or_path", *IN_ONE_FILE), convert_model),
}


def rewritten(
    modules: Mapping[str, LoRAWeights], path: Path, to: str, dtype: torch.dtype, metadata: Mapping[str, str]
) -> list[str]:
    """Write an adapter and read it again. Returns max |ΔW - ΔW'| with ΔW = scale · B A, and a line about the new file.

    Of DoRA, max |m - m'| counts too. AdapterError for a ΔW that is infinite. Hashes of an old file in `metadata` are left out.
    """
    about = {key: value for key, value in metadata.items() if key != "format" and "hash" not in key}
    written = read_lora(file := read_header(save_lora(modules, path, to, dtype, about)))

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for name, old in modules.items():
            new, change = written.modules[name], old.product()
            if not is_finite(change):
                raise AdapterError(f"{name}: its numbers are so large that B A is infinite; no program can use this adapter.")
            yield change, new.product()
            if old.magnitude is not None and new.magnitude is not None:
                yield old.magnitude, new.magnitude

    notes = for_a1111(to, cross_attention_width(file.tensors))
    return [f"max |ΔW - ΔW'| = {largest_difference(pairs()):.3g}", str(written), *notes]


def for_a1111(to: str, width: int | None) -> list[str]:
    """A line for the kohya form of an adapter whose model A1111 does not have."""
    if to != "kohya" or width is None or width >= 768:
        return []
    return [f"Note: A1111 and ComfyUI cannot use it: it is for a model of width {width}, and theirs are 768 or more."]


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> str:
    """max |W - W'| over two tables of tensors with the same names."""
    return f"max |W - W'| = {largest_difference((tensor, after[key]) for key, tensor in before.items()):.3g}"


def largest_difference(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    flat = ((a.double().flatten(), b.double().flatten()) for a, b in pairs if a.numel())
    return max(((a - b).abs().max().item() for a, b in flat), default=0.0)


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
    start, size = first_bytes(path), path.stat().st_size
    if start[8:9] == b"{":
        raise WeightsError(f"{path} is a safetensors file under another name; rename it to {path.stem}.safetensors.")
    if not is_pickle(start):
        raise WeightsError(f"{path} {foreign(start, path)}")
    try:
        zipped = is_zipfile(path)
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
        name = re.sub("^(image_proj|ip_adapter|id_encoder|lora_weights)/", r"\1.", name)  # as their .safetensors have it
        if name.startswith("string_to_token/"):  # the id of a word's placeholder, in the original paper's embeddings
            continue
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
