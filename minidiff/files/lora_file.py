"""LoRA files: an adapter on disk, in any program's dialect, and back into a model.

    read_lora("dog.safetensors").modules     {"unet.down_blocks.0.….attn1.to_q": LoRAWeights, "text_encoder.…": …}
    load_lora({"unet": unet, "text_encoder": text_encoder}, "dog.safetensors", "dog")
    save_lora(modules, "dog.safetensors", dialect="kohya")

The tensors alone do not say how strong an adapter is: scale = alpha / r, and alpha is a tensor of its own (kohya), a table in
the metadata (diffusers) or in a second file (peft). If the file is silent, all programs take alpha = r.

lora_names.py has the names of tensors, lora_module.py the tensors of one layer and peft's tables.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minidiff.core.config import SD15_UNET, UNetConfig
from minidiff.core.errors import AdapterError, did_you_mean
from minidiff.core.inject import adaptable_layers, adapted_layers, adapter_names, lora_layers, set_adapters, wrap
from minidiff.core.lora import LoRAWeights
from minidiff.files import lora_module, names
from minidiff.files.atomic import write_bytes
from minidiff.files.lora_module import COMPONENTS, METADATA, PEFT_CONFIG, alpha_of, check_parts, flat
from minidiff.files.lora_names import WRITTEN, LoRAHeader, Place, key_of, lora_header
from minidiff.files.values import listed
from minidiff.files.weights import file_at, find_weights, read_header, save

FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
LORA_FILES = (FILE_NAME, PEFT_FILE)


@dataclass(frozen=True)
class LoRAFile:
    """The adapter of a file. As a string, one line for people."""

    path: Path
    dialect: str
    modules: dict[str, LoRAWeights]
    alpha_known: bool  # False: the file does not say it for every layer, and alpha = r was taken
    metadata: dict[str, str]
    notes: tuple[str, ...] = ()  # for the person who loads it

    @property
    def scales(self) -> dict[str, float]:
        return {name: weights.scale for name, weights in self.modules.items()}

    @property
    def ranks(self) -> dict[str, int]:
        return {name: weights.rank for name, weights in self.modules.items()}

    def __str__(self) -> str:
        dora = "DoRA, " if any(weights.magnitude is not None for weights in self.modules.values()) else ""
        text = sum(name.startswith("text_encoder.") for name in self.modules)
        of_text = f" ({text} of the text encoder)" if text else ""
        sizes = f"rank {_few(self.ranks.values())}, alpha/r {_few(self.scales.values())}"
        line = f"{self.path}: {self.dialect} style, {dora}{len(self.modules)} layers{of_text}, {sizes}"
        silent = "" if self.alpha_known else " (the file does not say; alpha = rank is the rule then)"
        return "; ".join([line + silent, *self.notes])


def _few(values: Iterable[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


# --- reading -----------------------------------------------------------------------------------------------------------


def read_lora(path: str | Path, alpha: float | None = None, config: UNetConfig = SD15_UNET) -> LoRAFile:
    """Every layer of an adapter file, or of a folder that diffusers or peft wrote.

    `alpha` is for files that do not say it. `config` is the U-Net in which LDM's names are counted. A tensor that belongs to
    no adapter of an SD model is an AdapterError.
    """
    return read_modules(lora_header(read_header(find_weights(path, LORA_FILES)), config), alpha)


def read_modules(header: LoRAHeader, alpha: float | None) -> LoRAFile:
    """The data of a file whose header is known."""
    file, modules = header.file, header.modules
    if header.unknown or not modules:
        counts = f"{len(file.tensors) - len(header.unknown)} of {len(file.tensors)} tensors"
        what = f"{counts} have the names of an SD adapter. The file looks like {file.looks_like}."
        raise AdapterError(f"{file.path}: {what}\n{listed('others', header.unknown)}")
    for name, parts in modules.items():
        check_parts(f"{file.path}: {name}", parts)
    infos = [info for parts in modules.values() for info in parts.values()]
    tensors, configs = replace(file, tensors={info.key: info for info in infos}).read(), lora_module.read_configs(file)
    found, silent, zeros = {}, 0, 0
    for name, parts in modules.items():
        values = {part: tensors[info.key] for part, info in parts.items()}
        rank = len(values["down"])
        scale = 1.0 if alpha is None else alpha / rank
        if "alpha" in values:
            if (said := values["alpha"].item()) < 0:
                raise AdapterError(f"{file.path}: alpha of {name} is {said:g}; it must be a positive number.")
            scale = said / rank or 1.0  # kohya's rule: alpha 0 stands for the rank
            zeros += said == 0
        elif config := configs.get(name.partition(".")[0]):
            scale = lora_module.config_scale(config, name, rank, file.path)
        else:
            silent += 1
        found[name] = lora_module.weights_of(f"{file.path}: {name}", values, scale)
    check_alpha(header, alpha, silent > 0)
    notes = (f"alpha is 0 in {zeros} layers, which stands for the rank",) if zeros else ()
    return LoRAFile(file.path, header.dialect, found, alpha is not None or not silent, file.metadata, notes)


def check_alpha(header: LoRAHeader, alpha: float | None, silent: bool) -> None:
    """`alpha` may be given only if the file is silent. peft's folders never are, if both files are there."""
    path = header.file.path
    if alpha is None and silent and header.dialect == "peft":
        raise AdapterError(
            f"{path}: alpha is unknown, because {PEFT_CONFIG} is not beside it. Name the whole folder, or give alpha yourself: "
            "minidiff convert --alpha, or load_lora_weights(…, alpha=…)."
        )
    if alpha is not None and not silent:
        raise AdapterError(f"{path} says its alpha itself; --alpha is for files that do not.")
    if alpha is not None and not 0 < alpha < math.inf:
        raise AdapterError(f"--alpha is {alpha}; it must be a positive number.")


# --- into a model ------------------------------------------------------------------------------------------------------


def load_lora(
    models: Mapping[str, nn.Module],
    path: str | Path,
    adapter_name: str = "default",
    weight_name: str | None = None,
    alpha: float | None = None,
    strict: bool = True,
) -> LoRAFile:
    """Attach the adapter of a file to the models, {"unet": …, "text_encoder": …}, and make it the only active one.

    Every tensor must match a layer. If none or only a part of them does, or the shapes are another model's, that is an
    AdapterError, raised before anything is changed. With `strict=False` a part is attached, and `notes` says what was left.
    `weight_name` is a file in the folder `path`.
    """
    for model in models.values():
        check_new(model, adapter_name)
    file = read_header(Path(path) / weight_name if weight_name else find_weights(path, LORA_FILES))
    header = lora_header(file, getattr(models.get("unet"), "config", SD15_UNET))
    left, layers = check_match(models, header, strict), layers_of(models)
    matching = {name: parts for name, parts in header.modules.items() if name in layers}
    lora = read_modules(header._replace(modules=matching, unknown=[]), alpha)
    found = {name: lora_module.fitted(weights, layers[name].weight) for name, weights in lora.modules.items()}
    for part, model in models.items():
        attach(model, {n.removeprefix(f"{part}."): w for n, w in found.items() if n.startswith(f"{part}.")}, adapter_name)
        if lora_layers(model):
            set_adapters(model, [adapter_name] if adapter_name in adapter_names(model) else [])
    notes = (*lora.notes, f"{len(left)} tensors that match nothing were left out") if left else lora.notes
    return replace(lora, modules=found, notes=notes)


def attach(model: nn.Module, weights: Mapping[str, LoRAWeights], adapter_name: str = "default") -> None:
    """Add an adapter to a model, at strength 1: layer name -> its change, of that layer's shape."""
    check_new(model, adapter_name)
    for name, change in weights.items():
        wrap(model, name).add(adapter_name, change)


def check_new(model: nn.Module, adapter_name: str) -> None:
    """AdapterError unless an adapter of this name can be added."""
    if not adapter_name or "." in adapter_name or hasattr(nn.ParameterDict(), adapter_name):  # it keeps A and B, by name
        raise AdapterError(f'"{adapter_name}" cannot name an adapter; take a plain word such as "dog".')
    if adapter_name in adapter_names(model):
        raise AdapterError(f'an adapter called "{adapter_name}" is there already; choose another name, or eject first.')
    if lora_layers(model):
        adapted_layers(model)  # AdapterError while they are merged


def layers_of(models: Mapping[str, nn.Module]) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every layer that can have an adapter, by its name in adapter files."""
    return {f"{part}.{name}": layer for part, model in models.items() for name, layer in adaptable_layers(model).items()}


def check_match(models: Mapping[str, nn.Module], header: LoRAHeader, strict: bool = True) -> list[str]:
    """The tensors without a layer; none if `strict`. From the header alone, before any data is read."""
    file, modules, layers = header.file, header.modules, layers_of(models)
    width = names.cross_attention_width(models["unet"].state_dict()) if "unet" in models else None
    looks = f"The file looks like {file.looks_like}" + (f"; this model has cross-attention width {width}." if width else ".")
    unmatched = header.unknown + [info.key for name, parts in modules.items() if name not in layers for info in parts.values()]
    matched = len(file.tensors) - len(unmatched)
    if unmatched and (strict or not matched):
        networks = " and ".join(type(model).__name__ for model in models.values())
        counts = f"{matched} of {len(file.tensors)} tensors match {networks}."
        raise AdapterError(f"{file.path}: {counts} {looks}\n{listed('without a layer', unmatched)}")
    misfits = []
    for name in modules.keys() & layers.keys():
        check_parts(f"{file.path}: {name}", modules[name])
        shape, own = lora_module.changed_shape(modules[name]), tuple(layers[name].weight.shape)
        if shape != flat(own):
            misfits.append(f"{name} is for {shape}, the model has {own}")
    if misfits:
        raise AdapterError(f"{file.path} is for another model. {looks}\n{listed('misshapen', misfits)}")
    return unmatched


# --- writing -----------------------------------------------------------------------------------------------------------


def save_lora(
    modules: Mapping[str, LoRAWeights],
    path: str | Path,
    dialect: str = "diffusers",
    torch_dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write an adapter as "diffusers", "kohya" or "peft" has it, with its scale. Gives the path of the tensors' file.

    `path` is a `.safetensors` file, or a folder that gets one; for peft always a folder. `metadata` (texts) is for
    people and for other programs; what they need for loading is added.
    """
    if dialect not in WRITTEN:
        raise AdapterError(f'"{dialect}" is no style that minidiff writes.{did_you_mean(dialect, WRITTEN)}')
    if not modules:
        raise AdapterError("there is no adapter to save: it has no layers.")
    if dialect == "peft" and any(name.startswith("text_encoder.") for name in modules):
        raise AdapterError("a peft folder holds the adapter of one network, and this one is for the text encoder too.")
    if dialect == "peft" and Path(path).suffix == ".safetensors":
        raise AdapterError(f"{path}: peft's adapters are folders of two files; give the name of a folder.")
    path = file_at(path, PEFT_FILE if dialect == "peft" else FILE_NAME)
    tensors: dict[str, Tensor] = {}
    for name, weights in modules.items():
        parts = lora_module.parts_of(name, weights, dialect, torch_dtype)
        tensors |= {key_of(Place(name, part), dialect): tensor for part, tensor in parts.items()}
    about = {key: text for key, text in (metadata or {}).items() if key != METADATA}  # another file's, if it is there
    if dialect == "kohya":  # for kohya's scripts and A1111; the scale itself is in the tensors `alpha`
        dims, alphas = {str(w.rank) for w in modules.values()}, {f"{alpha_of(w):g}" for w in modules.values()}
        about["ss_network_module"] = "networks.lora"
        about["ss_network_dim"] = dims.pop() if len(dims) == 1 else "Dynamic"
        about["ss_network_alpha"] = alphas.pop() if len(alphas) == 1 else "Dynamic"
        save(tensors, path, about)
        return path
    split = {c: {n.removeprefix(f"{c}."): w for n, w in modules.items() if n.startswith(f"{c}.")} for c in COMPONENTS}
    configs = {component: lora_module.peft_config(mine) for component, mine in split.items() if mine}
    if dialect == "diffusers":
        table = {f"{component}.{key}": value for component, config in configs.items() for key, value in config.items()}
        save(tensors, path, about | {METADATA: json.dumps(table, sort_keys=True)})
        return path
    config = configs["unet"] | {"base_model_name_or_path": about.get("base_model", ""), "inference_mode": True}
    path.with_name(PEFT_CONFIG).unlink(missing_ok=True)  # the old one must not be taken for the new tensors'
    save(tensors, path, about)
    write_bytes(path.with_name(PEFT_CONFIG), f"{json.dumps(config, indent=2, sort_keys=True)}\n".encode())
    return path
