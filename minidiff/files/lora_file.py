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

from minidiff.core.config import SDXL_UNET, UNetConfig
from minidiff.core.errors import AdapterError
from minidiff.core.inject import adaptable_layers, adapted_layers, adapter_names, lora_layers, set_adapters, wrap
from minidiff.core.lora import LoRAWeights
from minidiff.files import lora_module
from minidiff.files.atomic import write_bytes
from minidiff.files.few_steps import suggestion
from minidiff.files.looks import FAMILIES, cross_attention_width
from minidiff.files.lora_module import COMPONENTS, METADATA, PEFT_CONFIG, alpha_of, flat
from minidiff.files.lora_names import READ, Place, adapter_kind, bundled_words, key_of, lora_dialect, place_of, unet_of
from minidiff.files.values import listed, printable
from minidiff.files.weights import TensorFile, TensorInfo, file_at, find_weights, read_header, save
from minidiff.files.word_file import FILE_NAME as WORD_FILE

FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
LORA_FILES = (FILE_NAME, PEFT_FILE)
Models = Mapping[str, nn.Module]
Parts = dict[str, dict[str, TensorInfo]]  # the tensors of a file, by layer and part


@dataclass(frozen=True, repr=False)
class LoRAFile:
    """The adapter of a file. As a string, one line for people."""

    path: Path
    dialect: str
    modules: dict[str, LoRAWeights]
    alpha_known: bool  # False: the file does not say it for every layer, and alpha = r was taken
    metadata: dict[str, str]
    notes: tuple[str, ...] = ()  # for the person who loads it
    words: tuple[str, ...] = ()  # that the file brings along

    @property
    def scales(self) -> dict[str, float]:
        return {name: weights.scale for name, weights in self.modules.items()}

    @property
    def ranks(self) -> dict[str, int]:
        return {name: weights.rank for name, weights in self.modules.items()}

    def __str__(self) -> str:
        dora = "DoRA, " if any(weights.magnitude is not None for weights in self.modules.values()) else ""
        text = sum(name.startswith("text_encoder") for name in self.modules)
        of_text = f" ({text} of the text encoder)" if text else ""
        sizes = f"rank {_few(self.ranks.values())}, alpha/r {_few(self.scales.values())}"
        line = f"{self.path}: {self.dialect} style, {dora}{len(self.modules)} layers{of_text}, {sizes}"
        silent = "" if self.alpha_known else " (the file does not say; alpha = rank is the rule then)"
        return "; ".join([line + silent, *self.notes])

    __repr__ = __str__  # not the tensors, in a notebook


def _few(values: Iterable[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


# --- reading -----------------------------------------------------------------------------------------------------------


def read_lora(
    source: str | Path | TensorFile,
    alpha: float | None = None,
    config: UNetConfig | None = None,
    models: Models | None = None,
    strict: bool = True,
) -> LoRAFile:
    """Every layer of an adapter file, or of a folder that diffusers or peft wrote.

    `alpha` is for files that do not say it. `config`: the U-Net whose layers LDM's names count; None: the one that the names
    show. AdapterError for a tensor that belongs to no adapter of an SD model, or to no layer of the `models`. With
    `strict=False` such tensors are left out and named in `notes`; AdapterError only if all are so.
    """
    file = source if isinstance(source, TensorFile) else read_header(find_weights(source, LORA_FILES))
    modules, left = by_layer(file, config or unet_of(file.tensors), strict)
    layers = layers_of(models or {})
    if models is not None:
        left += [info.key for name, parts in modules.items() if name not in layers for info in parts.values()]
        modules = {name: parts for name, parts in modules.items() if name in layers}
    width = cross_attention_width({f"{name}.weight": layer.weight for name, layer in layers.items()})
    here = f"; this model has cross-attention width {width}" if width else ""
    here += f", as {FAMILIES[width]}" if width in FAMILIES else ""
    if not modules or (left and strict):
        what = "match the " + " and the ".join(COMPONENTS[c] for c in models) if models else "have the names of an SD adapter"
        counts = f"{len(file.tensors) - len(left)} of {len(file.tensors)} tensors {what}."
        raise AdapterError(file.misfit(f"{file.path}: {counts}", {"without a layer": left}, here))
    misfits = []
    for name, parts in modules.items():
        shape = lora_module.changed_shape(f"{file.path}: {name}", parts)
        if models is not None and shape != flat(own := tuple(layers[name].weight.shape)):
            misfits.append(f"{name} is for {shape}, the model has {own}")
    if misfits:
        raise AdapterError(file.misfit(f"{file.path} is for another model.", {"misshapen": misfits}, here))
    lora = read_data(file, modules, alpha)
    if models is not None:
        lora = replace(lora, modules={n: lora_module.fitted(w, layers[n].weight) for n, w in lora.modules.items()})
    left_out = (listed("tensors that match nothing were left out", left).strip(),) if left else ()
    return replace(lora, notes=lora.notes + left_out)


def by_layer(file: TensorFile, config: UNetConfig, strict: bool) -> tuple[Parts, list[str]]:
    """The tensors of a file by layer and part, and the names that belong to no LoRA. AdapterError for another kind of file."""
    if lora_dialect(file.tensors) is None:
        raise AdapterError(file.misfit(f"{file.path} is no LoRA."))
    modules: Parts = {}
    left, words = [], bundled_words(file.tensors).values()
    for key, info in file.tensors.items():
        if key in words:
            continue
        if (place := place_of(key, config)) is None:
            left.append(key)
        elif (other := modules.setdefault(place.module, {}).setdefault(place.part, info)) is not info:
            raise AdapterError(f"{file.path} has two tensors for one place: {other.key} and {key}.")
    if (kind := adapter_kind(file.tensors)) not in READ and (strict or not modules):
        rest = " In Python, load_lora_weights(…, strict=False) loads the rest and names what it leaves out." if modules else ""
        way = "Bake it into a model with the program that made it: minidiff merge extract gets a LoRA out of that."
        what = f"unsupported adapter type {kind}; minidiff reads LoRA, LoCon and DoRA"
        raise AdapterError(f"{file.path}: {what}. {way}{rest}")
    return modules, left


def read_data(file: TensorFile, modules: Parts, alpha: float | None) -> LoRAFile:
    """The numbers of the layers, and their scales."""
    infos = [info for parts in modules.values() for info in parts.values()]
    tensors, configs = replace(file, tensors={info.key: info for info in infos}).read(), lora_module.read_configs(file)
    scales = {name: lora_module.scale_of(file.path, name, parts, tensors, configs) for name, parts in modules.items()}
    known = None not in scales.values()
    check_alpha(file, alpha, known)
    found = {}
    for name, parts in modules.items():
        values = {part: tensors[info.key] for part, info in parts.items()}
        rank, scale = len(values["down"]), scales[name]
        scale = (alpha or rank) / rank if scale is None else scale
        found[name] = lora_module.weights_of(f"{file.path}: {name}", values, scale)
    notes, words = [], tuple(bundled_words(file.tensors))
    if zeros := sum(not tensors[parts["alpha"].key] for parts in modules.values() if "alpha" in parts):
        notes.append(f"alpha is 0 in {zeros} layers, which stands for the rank")
    if words:
        notes.append(f"the new word {' and '.join(words)}, which load_textual_inversion gets from this file")
    if (beside := file.path.with_name(WORD_FILE)).is_file():  # as `train pivotal` leaves it
        notes.append(f"a new word in {beside.name} beside it, for load_textual_inversion")
    if how := file.metadata.get("modelspec.usage_hint") or suggestion(file.path):
        notes.append(f"draw with {printable(how):.200}")
    dialect = str(lora_dialect(file.tensors))
    return LoRAFile(file.path, dialect, found, known or alpha is not None, file.metadata, tuple(notes), words)


def check_alpha(file: TensorFile, alpha: float | None, known: bool) -> None:
    """`alpha` may be given only if the file is silent. peft's folders never are, if both files are there."""
    if alpha is None and not known and lora_dialect(file.tensors) == "peft":
        way = "Name the whole folder, or give alpha yourself: minidiff convert --alpha, or load_lora_weights(…, alpha=…)."
        raise AdapterError(f"{file.path}: alpha is unknown, because {PEFT_CONFIG} is not beside it. {way}")
    if alpha is not None and known:
        raise AdapterError(f"{file.path} says its alpha itself; alpha= or --alpha is for files that do not.")
    if alpha is not None and not 0 < alpha < math.inf:
        raise AdapterError(f"alpha is {alpha}; it must be a positive number.")


# --- into a model ------------------------------------------------------------------------------------------------------


def load_lora(
    models: Models,
    path: str | Path,
    adapter_name: str = "default",
    weight_name: str | None = None,
    alpha: float | None = None,
    strict: bool = True,
) -> LoRAFile:
    """Attach the adapter of a file to the models, {"unet": …, "text_encoder": …}, and make it the only active one.

    As `read_lora`, and any AdapterError comes before anything is changed. `weight_name` is a file in the folder `path`.
    """
    for model in models.values():
        check_new(model, adapter_name)
    file = read_header(Path(path) / weight_name if weight_name else find_weights(path, LORA_FILES))
    lora = read_lora(file, alpha, getattr(models.get("unet"), "config", None), models, strict)
    for component, model in models.items():
        attach(model, of_component(lora.modules, component), adapter_name)
        if lora_layers(model):
            set_adapters(model, [adapter_name] if adapter_name in adapter_names(model) else [])
    return lora


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


def of_component(modules: Mapping[str, LoRAWeights], component: str) -> dict[str, LoRAWeights]:
    """The layers of one network, by path."""
    return {name.removeprefix(f"{component}."): w for name, w in modules.items() if name.startswith(f"{component}.")}


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
    if not modules:
        raise AdapterError("there is no adapter to save: it has no layers.")
    if dialect == "peft" and any(name.startswith("text_encoder") for name in modules):
        raise AdapterError("a peft folder holds the adapter of one network, and this one is for the text encoder too.")
    if dialect == "peft" and Path(path).suffix == ".safetensors":
        raise AdapterError(f"{path}: peft's adapters are folders of two files; give the name of a folder.")
    path = file_at(path, PEFT_FILE if dialect == "peft" else FILE_NAME)
    tensors, xl = dict[str, Tensor](), unet_of(modules) is SDXL_UNET
    for name, weights in modules.items():
        parts = lora_module.parts_of(name, weights, dialect, torch_dtype)
        tensors |= {key_of(Place(name, part), dialect, xl): tensor for part, tensor in parts.items()}
    about = {key: text for key, text in (metadata or {}).items() if key != METADATA}  # another file's, if it is there
    if dialect == "kohya":  # for kohya's scripts and A1111; the scale itself is in the tensors `alpha`
        dims, alphas = {str(w.rank) for w in modules.values()}, {f"{alpha_of(w):g}" for w in modules.values()}
        about["ss_network_module"] = "networks.lora"
        about["ss_network_dim"] = dims.pop() if len(dims) == 1 else "Dynamic"
        about["ss_network_alpha"] = alphas.pop() if len(alphas) == 1 else "Dynamic"
    else:
        configs = {c: lora_module.peft_config(mine) for c in COMPONENTS if (mine := of_component(modules, c))}
    if dialect == "diffusers":
        table = {f"{component}.{key}": value for component, config in configs.items() for key, value in config.items()}
        about[METADATA] = json.dumps(table, sort_keys=True)
    beside = path.with_name(PEFT_CONFIG)
    if dialect == "peft":
        beside.unlink(missing_ok=True)  # the old one must not be taken for the new tensors'
    save(tensors, path, about)
    if dialect == "peft":
        config = configs["unet"] | {"base_model_name_or_path": about.get("base_model", ""), "inference_mode": True}
        write_bytes(beside, f"{json.dumps(config, indent=2, sort_keys=True)}\n".encode())
    return path
