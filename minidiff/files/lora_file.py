"""LoRA files: an adapter on disk, in any program's dialect, and back into a model.

    read_lora("dog.safetensors").modules     {"unet.down_blocks.0.….attn1.to_q": LoRAWeights, "text_encoder.…": …}
    load_lora({"unet": unet, "text_encoder": text_encoder}, "dog.safetensors", "dog")
    save_lora(modules, "dog.safetensors", dialect="kohya")

lora_names.py has the names of tensors, and peft's table of scales. The tensors of one layer:

    down            A: (r, in), or (r, in, kh, kw) for a convolution
    up              B: (out, r) or (out, r, 1, 1)
    mid             LoCon in Tucker's form only: (r, r, kh, kw), between a down and an up of 1 x 1
    alpha           kohya's scale · r, one number
    magnitude       peft's DoRA: (out,), for convolutions (1, out, 1, 1)
    dora_scale      LyCORIS' DoRA: (out, 1[, 1, 1]), or in older files (1, in[, 1, 1])

The two forms of DoRA's magnitude have the same shape (1, n, 1, 1), so a part is never read under the other's name.

The tensors alone do not say how strong an adapter is: scale = alpha / r, and alpha is a tensor of its own (kohya), a table in
the metadata (diffusers) or in a second file (peft). If the file is silent, all programs take alpha = r.
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
from minidiff.files import lora_names
from minidiff.files.atomic import write_bytes
from minidiff.files.few_steps import suggestion
from minidiff.files.folder import LORA_FILES
from minidiff.files.looks import cross_attention_width, family
from minidiff.files.lora_names import COMPONENTS, METADATA, PEFT_CONFIG, Place, alpha_of
from minidiff.files.values import listed, printable
from minidiff.files.weights import TensorFile, TensorInfo, file_at, find_weights, is_finite, read_header, save
from minidiff.files.word_file import FILE_NAME as WORD_FILE

FILE_NAME, PEFT_FILE = LORA_FILES
ANEW = (METADATA, "ss_network_module", "ss_network_dim", "ss_network_alpha")  # metadata that is never another file's
Models = Mapping[str, nn.Module]
Layers = Mapping[str, nn.Linear | nn.Conv2d]  # by their names in adapter files
Parts = dict[str, dict[str, TensorInfo]]  # the tensors of a file, by layer and part
Shape = tuple[int, ...]


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
    source: str | Path | TensorFile, alpha: float | None = None, config: UNetConfig | None = None,
    models: Models | None = None, strict: bool = True,
) -> LoRAFile:  # fmt: skip
    """Every layer of an adapter file, or of a folder that diffusers or peft wrote.

    `alpha` is for files that do not say it. `config`: the U-Net whose layers LDM's names count; None: that of the `models`,
    or else the one that the names show. AdapterError for a tensor that belongs to no adapter of an SD model, or to no layer
    of the `models`. With `strict=False` such tensors are left out and named in `notes`; AdapterError only if all are so.
    """
    file = source if isinstance(source, TensorFile) else read_header(find_weights(source, LORA_FILES))
    layers = None if models is None else layers_of(models)
    own_config = getattr((models or {}).get("unet"), "config", None)
    modules, left = by_layer(file, config or own_config or lora_names.unet_of(file.tensors), layers, strict)
    if not modules or (left and strict):
        what = "match the " + " and the ".join(COMPONENTS[c] for c in models) if models else "have the names of an SD adapter"
        counts = f"{len(file.tensors) - len(left)} of {len(file.tensors)} tensors {what}."
        raise AdapterError(file.misfit(f"{file.path}: {counts}", {"without a layer": left}))
    shapes = {name: changed_shape(f"{file.path}: {name}", parts) for name, parts in modules.items()}
    wanted = {name: tuple(layers[name].weight.shape) for name in shapes} if layers else {}
    if misfits := [f"{n} is for {shapes[n]}, the model has {own}" for n, own in wanted.items() if shapes[n] != flat(own)]:
        raise AdapterError(file.misfit(f"{file.path} is for another model.", {"misshapen": misfits}))
    lora = read_data(file, modules, alpha, layers)
    left_out = (listed("tensors that match nothing were left out", left).strip(),) if left else ()
    return replace(lora, notes=lora.notes + left_out)


def by_layer(file: TensorFile, config: UNetConfig, layers: Layers | None, strict: bool) -> tuple[Parts, list[str]]:
    """The tensors of a file by layer and part, and the names of those that belong to none of the `layers`.

    AdapterError for another kind of file, and for a LoRA of another family of models.
    """
    if lora_names.lora_dialect(file.tensors) is None:
        raise AdapterError(file.misfit(f"{file.path} is no LoRA."))
    modules: Parts = {}
    left, words = [], lora_names.bundled_words(file.tensors).values()
    for key, info in file.tensors.items():
        if key in words:
            continue
        place = lora_names.place_of(key, config)
        if place is None or (layers is not None and place.module not in layers):
            left.append(key)
        elif (other := modules.setdefault(place.module, {}).setdefault(place.part, info)) is not info:
            raise AdapterError(f"{file.path} has two tensors for one place: {other.key} and {key}.")
    if (kind := lora_names.adapter_kind(file.tensors)) not in ("LoRA", "DoRA") and (strict or not modules):
        rest = " In Python, load_lora_weights(…, strict=False) loads the rest and names what it leaves out." if modules else ""
        way = "Bake it into a model with the program that made it: minidiff merge extract gets a LoRA out of that."
        what = f"unsupported adapter type {kind}; minidiff reads LoRA, LoCon and DoRA"
        raise AdapterError(f"{file.path}: {what}. {way}{rest}")
    reads = cross_attention_width({f"{name}.weight": layer.weight for name, layer in (layers or {}).items()})
    if reads and cross_attention_width(file.tensors) not in (reads, None):
        raise AdapterError(f"{file.path} is {file.looks_like}; this model needs one for {family(reads)}.")
    return modules, left


def read_data(file: TensorFile, modules: Parts, alpha: float | None, layers: Layers | None) -> LoRAFile:
    """The numbers of the layers, and their scales."""
    infos = {info.key: info for parts in modules.values() for info in parts.values()}
    tensors, dialect, found = replace(file, tensors=infos).read(), str(lora_names.lora_dialect(file.tensors)), {}
    configs, known, zeros = lora_names.read_configs(file.path, dialect, file.metadata), True, 0
    for name, parts in modules.items():
        values = {part: tensors[info.key] for part, info in parts.items()}
        rank, scale = len(values["down"]), lora_names.scale_of(file.path, name, values, configs)
        known = known and scale is not None
        zeros += "alpha" in values and not values["alpha"]
        scale = (alpha or rank) / rank if scale is None else scale
        found[name] = weights_of(f"{file.path}: {name}", values, scale, layers[name].weight if layers else None)
    check_alpha(file.path, dialect, alpha, known)
    notes, words = [], tuple(lora_names.bundled_words(file.tensors))
    if zeros:
        notes.append(f"alpha is 0 in {zeros} layers, which stands for the rank")
    if words:
        notes.append(f"the new word {' and '.join(words)}, which load_textual_inversion gets from this file")
    if (beside := file.path.with_name(WORD_FILE)).is_file():  # as `train pivotal` leaves it
        notes.append(f"a new word in {beside.name} beside it, for load_textual_inversion")
    if how := file.metadata.get("modelspec.usage_hint") or suggestion(file.path):
        notes.append(f"draw with {printable(how):.200}")
    return LoRAFile(file.path, dialect, found, known or alpha is not None, file.metadata, tuple(notes), words)


def check_alpha(path: Path, dialect: str, alpha: float | None, known: bool) -> None:
    """`alpha` may be given only if the file is silent. peft's folders never are, if both files are there."""
    if alpha is None and not known and dialect == "peft":
        way = "Name the whole folder, or give alpha yourself: minidiff convert --alpha, or load_lora_weights(…, alpha=…)."
        raise AdapterError(f"{path}: alpha is unknown, because {PEFT_CONFIG} is not beside it. {way}")
    if alpha is not None and known:
        raise AdapterError(f"{path} says its alpha itself; alpha= or --alpha is for files that do not.")
    if alpha is not None and not 0 < alpha < math.inf:
        raise AdapterError(f"alpha is {alpha}; it must be a positive number.")


# --- the tensors of one layer ------------------------------------------------------------------------------------------


def changed_shape(where: str, parts: Mapping[str, TensorInfo]) -> Shape:
    """The shape of the W that a layer's tensors change, `flat`. AdapterError, which begins with `where`, unless they fit."""
    if not {"down", "up"} <= parts.keys():
        there = ", ".join(f"{info.key} {info.shape}" for info in parts.values())
        raise AdapterError(f"{where} has {there} and not the other half: the file is incomplete. Get it again.")
    shapes = {part: info.shape for part, info in parts.items()}
    down, up = shapes["down"], shapes["up"]
    mid = shapes.get("mid", (*down[:1], *down[:1], 1, 1))  # without one, as if it were the identity
    axes = len(down) in (2, 4) and len(flat(up)) == 2 and len(mid) == 4 and shapes.get("alpha", ()) in ((), (1,))
    if not axes or mid[:2] != (up[1], down[0]) or 0 in down + up + mid or ("mid" in shapes and len(flat(down)) != 2):
        there = ", ".join(f"{part} is {shape}" for part, shape in shapes.items())
        raise AdapterError(f"{where}: the shapes do not fit each other: {there}. The file is damaged; get it again.")
    return flat((up[0], down[1], *(mid if "mid" in shapes else down)[2:]))


def flat(shape: Shape) -> Shape:
    """(out, in) for 1 x 1 convolutions too: files have them with four axes or with two."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def weights_of(where: str, parts: Mapping[str, Tensor], scale: float, W: Tensor | None) -> LoRAWeights:
    """One layer in minidiff's form, fp32, with as many axes as W has."""
    A, B = parts["down"].float(), parts["up"].float().flatten(1)
    if "mid" in parts:  # ΔW_oi = U_or M_rs V_si: M V is one convolution, exactly
        A = torch.einsum("rshw,si->rihw", parts["mid"].float(), A.flatten(1))
    if W is not None:  # a 1 x 1 convolution in a file may be a linear layer in the model, or the reverse
        A = A.reshape(-1, *W.shape[1:])
    m = parts.get("magnitude", parts.get("dora_scale"))
    if m is not None:
        ones = (1,) * (A.ndim - 2)
        by_columns = "dora_scale" in parts and m.shape[:2] == (1, A.shape[1]) and len(B) != 1
        shape = (1, A.shape[1], *ones) if by_columns else (len(B), 1, *ones)
        if m.numel() != max(shape):
            raise AdapterError(f"{where}: DoRA's magnitude is {tuple(m.shape)}; for this layer it should be {shape}.")
        m = m.float().reshape(shape)
    return LoRAWeights(A.contiguous(), B, scale, m)


def parts_of(name: str, weights: LoRAWeights, dialect: str, torch_dtype: torch.dtype) -> dict[str, Tensor]:
    """One layer as the tensors of a dialect that is written: "diffusers", "kohya" or "peft"."""
    A, B, m = weights.A, weights.B, weights.magnitude
    parts = {"down": A, "up": B.reshape(*B.shape, *[1] * (A.ndim - 2))}
    if m is not None and dialect == "kohya":
        parts["dora_scale"] = m
    elif m is not None:
        if m.shape[0] != len(B):
            way = "Write it in the kohya style, or bake it into the model: minidiff merge bake."
            raise AdapterError(f"{name}: its DoRA measures the columns of W, and {dialect} knows only rows. {way}")
        parts["magnitude"] = m.flatten() if A.ndim == 2 else m.reshape(1, -1, 1, 1)
    parts = {part: tensor.to(torch_dtype) for part, tensor in parts.items()}
    if bad := [part for part, tensor in parts.items() if not is_finite(tensor)]:
        advice = "write it as fp32 or bf16" if torch_dtype == torch.float16 else "its weight is too large"
        raise AdapterError(f"{name}: its {bad[0]} has numbers that are not finite as {torch_dtype}; {advice}.")
    if dialect == "kohya":
        alpha = torch.tensor(float(alpha_of(weights)))
        rounded = alpha.to(torch_dtype)
        parts["alpha"] = rounded if rounded == alpha else alpha  # a rounded alpha would be another strength
    return parts


# --- into a model ------------------------------------------------------------------------------------------------------


def load_lora(
    models: Models, path: str | Path, adapter_name: str = "default", weight_name: str | None = None,
    alpha: float | None = None, strict: bool = True,
) -> LoRAFile:  # fmt: skip
    """Attach the adapter of a file to the models, {"unet": …, "text_encoder": …}, and make it the only active one.

    As `read_lora`, and any AdapterError comes before anything is changed. `weight_name` is a file in the folder `path`.
    """
    for model in models.values():
        check_new(model, adapter_name)
    lora = read_lora(Path(path, weight_name or ""), alpha, None, models, strict)
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
    modules: Mapping[str, LoRAWeights], path: str | Path, dialect: str = "diffusers",
    torch_dtype: torch.dtype = torch.float32, metadata: Mapping[str, str] | None = None,
) -> Path:  # fmt: skip
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
    tensors, xl = dict[str, Tensor](), lora_names.unet_of(modules) is SDXL_UNET
    for name, weights in modules.items():
        parts = parts_of(name, weights, dialect, torch_dtype)
        tensors |= {lora_names.key_of(Place(name, part), dialect, xl): tensor for part, tensor in parts.items()}
    about = {key: text for key, text in (metadata or {}).items() if key not in ANEW}
    if dialect == "kohya":  # for kohya's scripts and A1111; the scale itself is in the tensors `alpha`
        dims, alphas = {str(w.rank) for w in modules.values()}, {f"{alpha_of(w):g}" for w in modules.values()}
        about["ss_network_module"] = "networks.lora"
        about["ss_network_dim"] = dims.pop() if len(dims) == 1 else "Dynamic"
        about["ss_network_alpha"] = alphas.pop() if len(alphas) == 1 else "Dynamic"
    else:
        configs = {c: lora_names.peft_config(mine) for c in COMPONENTS if (mine := of_component(modules, c))}
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
