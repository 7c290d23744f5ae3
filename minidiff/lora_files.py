"""LoRA files: an adapter on disk, and back into a model.

minidiff writes the diffusers/peft style, one file `pytorch_lora_weights.safetensors`:

    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight      (r, in)
    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight      (out, r)
    __metadata__: lora_adapter_metadata = {"unet.r": 4, "unet.lora_alpha": 8, "unet.target_modules": […], …}

The tensors alone do not say how strong the adapter is: alpha is in the metadata only, and programs that find none take
alpha = r. minidiff reads this style and peft's folders (`adapter_model.safetensors`, `adapter_config.json`).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from minidiff import keymaps
from minidiff.adapters.lora import (
    check_adapter_name,
    linear_layers,
    lora_layers,
    lora_state_dict,
    set_adapters,
    wrap,
)
from minidiff.errors import AdapterError, listed
from minidiff.weights import WEIGHT_DTYPES, TensorFile, read_header, save

FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIXES = {"diffusers": "unet.", "peft": "base_model.model."}  # the dialects that are read


@dataclass(frozen=True)
class LoadedLoRA:
    """What was loaded; as a string, one line for people."""

    path: Path
    dialect: str
    scales: dict[str, float]  # module name -> alpha / r
    ranks: dict[str, int]  # module name -> r
    alpha_known: bool  # False: the file does not say, and alpha = r was taken

    def __str__(self) -> str:
        ranks, scales = (sorted(set(values.values())) for values in (self.ranks, self.scales))
        text = (
            f"{self.path}: {self.dialect} style, {len(self.ranks)} layers, rank {_few(ranks)}, alpha/r {_few(scales)}"
        )
        return text if self.alpha_known else f"{text} (the file does not say; alpha = rank is the rule then)"


def _few(values: list[Any]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


# --- writing ---------------------------------------------------------------------------------------------------------


def save_lora(
    model: nn.Module,
    path: str | Path,
    adapter_name: str = "default",
    base_model: str = "",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write one adapter of a U-Net so that diffusers loads it, at the right scale. Gives the path of the file.

    `path` is a `.safetensors` file, or a folder that gets `pytorch_lora_weights.safetensors`. `base_model` (a folder or
    hub id) and `metadata` (strings) are for people; nothing reads them.
    """
    path = Path(path)
    path = path if path.suffix == ".safetensors" else path / FILE_NAME
    tensors = {f"unet.{key}": tensor for key, tensor in lora_state_dict(model, adapter_name).items()}
    if not tensors:
        raise AdapterError(f'{type(model).__name__} has no adapter called "{adapter_name}" to save.')
    notes = {"base_model": base_model, **(metadata or {})}
    config = {f"unet.{field}": value for field, value in peft_config(model, adapter_name).items()}
    save(tensors, path, {**notes, "lora_adapter_metadata": json.dumps(config, sort_keys=True)})
    return path


def peft_config(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """The adapter in the fields of peft's LoraConfig; layers that differ from the first one go into the patterns."""
    layers = {name: layer for name, layer in lora_layers(model).items() if adapter_name in layer.lora_A}
    ranks = {name: len(layer.lora_A[adapter_name]) for name, layer in layers.items()}
    alphas = {name: _whole(layer.scale[adapter_name] * ranks[name]) for name, layer in layers.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(layers),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "bias": "none",
    }


def _whole(alpha: float) -> float:
    """8.0 as 8: alpha was divided by r and is multiplied by it again, which leaves a rounding error for some r."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha


# --- reading ---------------------------------------------------------------------------------------------------------


def load_lora(
    model: nn.Module, path: str | Path, adapter_name: str = "default", weight_name: str | None = None
) -> LoadedLoRA:
    """Put the adapter of a file into a U-Net, and switch it on alone (`set_adapters` mixes several).

    `path` is a file, a folder that diffusers or peft wrote, or any folder with `weight_name`. Every tensor must find
    its layer: no match, a part that matches, another model's shapes and other key styles are AdapterErrors.
    """
    check_adapter_name(model, adapter_name)
    file = read_header(find_lora(path, weight_name))
    dialect = check_dialect(file)
    config = read_config(file, dialect)
    prefix = PREFIXES[dialect]
    file = replace(
        file, tensors={key.removeprefix(prefix): info for key, info in file.tensors.items() if key.startswith(prefix)}
    )
    ranks = check_fit(model, file)
    scales = {name: lora_scale(config, name, rank, file.path) for name, rank in ranks.items()}
    tensors = file.read()
    for name, scale in scales.items():
        wrap(model, name).add(adapter_name, tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"], scale)
    set_adapters(model, [adapter_name])
    return LoadedLoRA(file.path, dialect, scales, ranks, alpha_known=config is not None)


def find_lora(path: str | Path, weight_name: str | None) -> Path:
    """The file that is meant by a file or a folder."""
    path = Path(path)
    if weight_name is not None:
        return path / weight_name
    if not path.is_dir():
        return path
    for name in (FILE_NAME, PEFT_FILE):
        if (path / name).is_file():
            return path / name
    there = sorted(p.name for p in path.glob("*.safetensors"))
    hint = f"it has {', '.join(there)}: say which with weight_name" if there else "there is no .safetensors file in it"
    raise AdapterError(f"{path} has no {FILE_NAME} and no {PEFT_FILE}; {hint}.")


def check_dialect(file: TensorFile) -> str:
    """ "diffusers" or "peft", or an AdapterError that says what the file is instead."""
    dialect, kind = keymaps.lora_dialect(file.tensors), keymaps.adapter_kind(file.tensors)
    if dialect is None:
        raise AdapterError(f"{file.path} is no LoRA. The file looks like {file.looks_like}.")
    if kind != "LoRA":
        raise AdapterError(f"{file.path}: unsupported adapter type {kind}; minidiff reads plain LoRA so far.")
    if dialect not in PREFIXES:
        raise AdapterError(
            f"{file.path} is {file.looks_like}; minidiff reads the diffusers/peft style so far. "
            f"Three of its keys: {', '.join(list(file.tensors)[:3])}."
        )
    others = [key for key in file.tensors if not key.startswith(PREFIXES[dialect])]
    if others:
        raise AdapterError(
            f"{file.path}: {len(others)} of {len(file.tensors)} tensors are not for the U-Net; minidiff reads adapters "
            f"of the U-Net alone so far.\n{listed('others', others)}"
        )
    return dialect


def read_config(file: TensorFile, dialect: str) -> dict[str, Any] | None:
    """The fields of peft's LoraConfig that come with the file; None where the style allows none, and alpha = r."""
    beside = file.path.with_name(PEFT_CONFIG)
    if dialect == "peft":
        if not beside.is_file():
            raise AdapterError(
                f"{file.path}: alpha is unknown, because {PEFT_CONFIG} is not beside it. Copy the whole folder."
            )
        text, where = beside.read_bytes(), str(beside)
    else:
        text, where = file.metadata.get("lora_adapter_metadata", "").encode(), f"{file.path}: lora_adapter_metadata"
        if not text:
            return None
    try:
        config = {key.removeprefix("unet."): value for key, value in json.loads(text).items()}
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in (config.get(field) or {}).keys():
                check_pattern(pattern)
    except (ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise AdapterError(f"{where} is not the configuration of a LoRA: {error}.") from error
    kind = "DoRA" if config.get("use_dora") else config.get("peft_type", "LORA")
    if kind != "LORA":
        raise AdapterError(f"{where}: unsupported adapter type {kind}; minidiff reads plain LoRA so far.")
    return config


def check_pattern(pattern: str) -> None:
    """Raise ValueError or re.error for a pattern that cannot be used; nested repeats can take for ever on a short name."""
    re.compile(pattern)
    if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 4:
        raise ValueError(f"the pattern {pattern!r:.100} repeats too much")


def check_fit(model: nn.Module, file: TensorFile) -> dict[str, int]:
    """Every module of the file with its rank, once all of them are whole and fit layers of the model."""
    linears = linear_layers(model)
    modules = list(dict.fromkeys(re.sub(r"\.lora_[AB]\.weight$", "", key) for key in file.tensors))
    strangers = [key for key in file.tensors if re.sub(r"\.lora_[AB]\.weight$", "", key) not in linears]
    if strangers:
        matched = len(file.tensors) - len(strangers)
        raise AdapterError(
            f"{file.path}: {matched} of {len(file.tensors)} tensors match {type(model).__name__}. "
            f"{_families(model, file)}\n{listed('without a linear layer', strangers)}"
        )
    ranks, misfits = {}, []
    for name in modules:
        A, B = (file.tensors.get(f"{name}.lora_{side}.weight") for side in "AB")
        if A is None or B is None:
            raise AdapterError(f"{file.path}: {name} has lora_{'B' if A is None else 'A'} and not the other half.")
        if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != B.shape[1]:
            raise AdapterError(f"{file.path}: the ranks of {name} differ: lora_A is {A.shape}, lora_B is {B.shape}.")
        if {A.dtype, B.dtype} - set(WEIGHT_DTYPES):
            raise AdapterError(f"{file.path}: {name} is of type {A.dtype} and {B.dtype}; a LoRA is of floating-point numbers.")
        ranks[name] = A.shape[0]
        if (B.shape[0], A.shape[1]) != linears[name].weight.shape:
            misfits.append(
                f"{name} is for {(B.shape[0], A.shape[1])}, the model has {tuple(linears[name].weight.shape)}"
            )
    if misfits:
        raise AdapterError(
            f"{file.path} is for another model. {_families(model, file)}\n{listed('misshapen', misfits)}"
        )
    return ranks


def _families(model: nn.Module, file: TensorFile) -> str:
    width = keymaps.cross_attention_width(model.state_dict())
    return f"The file looks like {file.looks_like}; this model has cross-attention width {width}."


def lora_scale(config: dict[str, Any] | None, name: str, rank: int, path: Path) -> float:
    """alpha / r of one module, or alpha / √r (rsLoRA, arXiv 2312.03732); 1 without a config, as diffusers has it."""
    if config is None:
        return 1.0
    said = by_pattern(config.get("rank_pattern"), name, config.get("r", rank))
    alpha = by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha"))
    if said != rank:
        raise AdapterError(f"{path}: {name} has rank {rank}, and its configuration says {said!r}.")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise AdapterError(f"{path}: alpha of {name} is {alpha!r}; it must be a positive number.")
    if config.get("use_rslora") not in (None, True, False):
        raise AdapterError(f"{path}: use_rslora is {config['use_rslora']!r}; it must be true or false.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def by_pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """peft's rule: the first pattern (a regular expression) that is the end of the name, after a dot, or all of it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
