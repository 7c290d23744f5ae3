"""Every program's names for the tensors of an adapter, and minidiff's own.

A tensor's name in a file says its layer and its part. minidiff calls layers by component and path, "unet.….attn1.to_q" and
"text_encoder.encoder.layers.0.self_attn.q_proj", and parts by what they do: "down", "up", "mid", "alpha", "magnitude" and
"dora_scale".

    a1      unet.….attn1.to_q.lora_A.weight                                 diffusers; lora_B is the way up
    a2      unet.….attn1.to_q.lora.down.weight                              its SD 1.5 scripts, with a1 for convolutions
            text_encoder.….q_proj.lora_linear_layer.down.weight
    b       [unet.]….attn1.processor.to_q_lora.down.weight                  diffusers in 2023; to_out stands for to_out.0
    c       lora_unet_down_blocks_0_…_attn1_to_q.lora_down.weight           kohya, A1111, ComfyUI; with .alpha
            …_resnets_0_conv1.lora_mid.weight, ….dora_scale                 LyCORIS: LoCon with a kernel in between, DoRA
    d       base_model.model.….attn1.to_q.lora_A.weight                     peft
    e       unet:0:up, unet:0:down, …                                       cloneofsimo; it counts layers, and is not read
    f       lora_unet_input_blocks_1_1_…                                    kohya's form, LDM's names for the modules

kohya's underscores cannot be undone by splitting ("proj_in" is one word, "mid_block" too). So all names that a U-Net and a
text encoder of the SD family can have are written down dotted, and looked up by their underscored form.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from minidiff.core.config import UNetConfig
from minidiff.core.errors import AdapterError
from minidiff.files import names, word_file
from minidiff.files.weights import TensorFile, TensorInfo

WRITTEN = ("diffusers", "kohya", "peft")  # the dialects that are written: a1, c, d


class Place(NamedTuple):
    """A part of a layer's adapter."""

    module: str
    part: str


# --- a file ------------------------------------------------------------------------------------------------------------

USE_INVERSION = "A textual inversion is used by --textual_inversion, in Python by load_textual_inversion."
Headers = dict[str, dict[str, TensorInfo]]  # layer -> its tensors by part


@dataclass(frozen=True)
class LoRAHeader:
    """The tensors of a file by layer and part, and the names that belong to no adapter."""

    file: TensorFile
    dialect: str
    modules: Headers
    unknown: list[str]


def check_dialect(file: TensorFile) -> str:
    """The style of the file, or an AdapterError that says what the file is instead."""
    dialect, kind = names.lora_dialect(file.tensors), names.adapter_kind(file.tensors)
    if dialect is None:
        hint = f" {USE_INVERSION}" if word_file.is_embedding(file.tensors) else ""
        raise AdapterError(f"{file.path} is no LoRA. The file looks like {file.looks_like}.{hint}")
    if kind not in ("LoRA", "DoRA"):
        raise AdapterError(
            f"{file.path}: unsupported adapter type {kind}; minidiff reads LoRA, LoCon and DoRA. Bake it into a model with the "
            "program that made it: minidiff merge extract gets a LoRA out of that."
        )
    if dialect == "cloneofsimo":
        raise AdapterError(
            f"{file.path} is {file.looks_like}, which counts layers and does not name them; minidiff does not read that. "
            f"Three of its tensors: {', '.join(list(file.tensors)[:3])}."
        )
    return dialect


def lora_header(file: TensorFile, config: UNetConfig) -> LoRAHeader:
    """The tensors of a file by layer. LDM counts layers, of a U-Net like `config`. AdapterError for another kind of file."""
    dialect, modules, unknown = check_dialect(file), Headers(), []
    for key, info in file.tensors.items():
        if (place := place_of(key, config)) is None:
            unknown.append(key)
        elif (other := modules.setdefault(place.module, {}).setdefault(place.part, info)) is not info:
            raise AdapterError(f"{file.path} has two tensors for one place: {other.key} and {key}.")
    return LoRAHeader(file, dialect, modules, unknown)


# --- reading -----------------------------------------------------------------------------------------------------------

ENDINGS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".lora_magnitude_vector": "magnitude",  # peft's DoRA: one number for each output
    ".lora_magnitude_vector.weight": "magnitude",
    ".dora_scale": "dora_scale",  # LyCORIS' DoRA: for each output or each input, as its shape says
}
UNET_START = re.compile(r"(down_blocks|up_blocks|mid_block|time_embedding|conv_in|conv_out)(\.[\w.]+)?$")
TEXT_START = re.compile(r"encoder\.layers\.[\w.]+$")
OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # dialect b, in the text encoder


def place_of(key: str, config: UNetConfig) -> Place | None:
    """Layer and part of a tensor of any dialect; None for a name that no adapter of an SD model has.

    `config` is needed for LDM's names, which count layers.
    """
    for ending, part in ENDINGS.items():
        if key.endswith(ending):
            stem = key.removesuffix(ending)
            module = kohya_names(config).get(stem) if stem.startswith("lora_") else dotted_name(stem)
            return Place(module, part) if module else None
    return None


def dotted_name(stem: str) -> str | None:
    """minidiff's name for a layer of the dialects a, b and d; the first word of a path tells its component."""
    path = stem.removeprefix("base_model.model.")
    component, _, rest = path.partition(".")
    path = rest if component in ("unet", "text_encoder") else path
    path = path.removeprefix(names.CLIP)
    if TEXT_START.match(path) and component != "unet":
        parent, _, last = path.rpartition(".")
        return f"text_encoder.{parent}.{OLD_TEXT.get(last, last)}"
    if UNET_START.match(path) and component != "text_encoder":
        if ".processor." in path:
            path = re.sub(r"\.to_out$", ".to_out.0", path.replace(".processor.", "."))
        return f"unet.{path}"
    return None


@cache
def kohya_names(config: UNetConfig) -> dict[str, str]:
    """Underscored name -> minidiff's name, for every layer that can be adapted; with LDM's names for this U-Net."""
    found = {}
    ldm = names.unet_table(config)
    for path in unet_paths():
        for form in (path, names.rename(path, ldm)):
            found[f"lora_unet_{underscored(form)}"] = f"unet.{path}"
    for path in text_paths():
        for prefix in ("lora_te", "lora_te1"):  # SDXL's lora_te2 is a second text encoder
            for form in (path, names.CLIP + path):
                found[f"{prefix}_{underscored(form)}"] = f"text_encoder.{path}"
    return found


def underscored(path: str) -> str:
    return path.replace(".", "_")


def unet_paths(blocks: int = 8, layers: int = 8) -> Iterator[str]:
    """Paths of the linear layers and convolutions in U-Nets of up to this many levels, and layers in each level."""
    yield from ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
    for block in ["mid_block", *(f"{way}_blocks.{i}" for way in ("down", "up") for i in range(blocks))]:
        for j in range(layers):
            attention, resnet = f"{block}.attentions.{j}", f"{block}.resnets.{j}"
            yield from (f"{attention}.proj_in", f"{attention}.proj_out")
            for attn in ("attn1", "attn2"):
                for last in ("to_q", "to_k", "to_v", "to_out.0"):
                    yield f"{attention}.transformer_blocks.0.{attn}.{last}"
            yield from (f"{attention}.transformer_blocks.0.ff.net.{last}" for last in ("0.proj", "2"))
            yield from (f"{resnet}.{last}" for last in ("conv1", "conv2", "time_emb_proj", "conv_shortcut"))
        yield from (f"{block}.downsamplers.0.conv", f"{block}.upsamplers.0.conv")


def text_paths(layers: int = 32) -> Iterator[str]:
    """Paths of the linear layers in a CLIP text encoder of up to this many layers."""
    for i in range(layers):
        for last in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"encoder.layers.{i}.self_attn.{last}"
        yield from (f"encoder.layers.{i}.mlp.{last}" for last in ("fc1", "fc2"))


# --- writing -----------------------------------------------------------------------------------------------------------

PEFT_PARTS = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
PARTS = {
    "diffusers": PEFT_PARTS,
    "peft": PEFT_PARTS,
    "kohya": {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha", "dora_scale": "dora_scale"},
}


def key_of(place: Place, dialect: str) -> str:
    """The name of a tensor in one of the dialects that are written."""
    component, _, path = place.module.partition(".")
    path = names.CLIP + path if component == "text_encoder" else path
    stem = {
        "diffusers": f"{component}.{path}",
        "kohya": f"lora_{'te' if component == 'text_encoder' else 'unet'}_{underscored(path)}",
        "peft": f"base_model.model.{path}",
    }[dialect]
    return f"{stem}.{PARTS[dialect][place.part]}"
