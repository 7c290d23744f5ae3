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
"""

import re
from functools import cache
from typing import NamedTuple

from minidiff.core.config import UNetConfig
from minidiff.core.errors import AdapterError
from minidiff.files import names
from minidiff.files.weights import TensorFile, TensorInfo

WRITTEN = ("diffusers", "kohya", "peft")  # the dialects that are written: a1, c, d
ENDINGS = {
    "down": (".lora_A", ".lora.down", ".lora_linear_layer.down", "_lora.down", ".lora_down"),
    "up": (".lora_B", ".lora.up", ".lora_linear_layer.up", "_lora.up", ".lora_up"),
    "mid": (".lora_mid",),
    "alpha": (".alpha",),
    "magnitude": (".lora_magnitude_vector",),  # peft's DoRA: one number for each output
    "dora_scale": (".dora_scale",),  # LyCORIS' DoRA: for each output or each input, as its shape says
}
UNET = re.compile(  # every linear layer and convolution of an SD 1.x U-Net
    r"conv_in|conv_out|time_embedding\.linear_[12]|((down|up)_blocks\.\d+|mid_block)\.("
    r"attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.0\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)))|"
    r"resnets\.\d+\.(conv1|conv2|time_emb_proj|conv_shortcut)|(down|up)samplers\.0\.conv)"
)
TEXT = re.compile(r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")  # and of its text encoder
WORDS = re.compile(  # names with an underscore inside, in diffusers, CLIP and LDM; then any other
    r"(?:down|up|mid|transformer|input|middle|output)_blocks?|time_embedding|time_emb_proj|time_embed|linear_\d|to_(?:[qkv]|out)|"
    r"(?:conv|proj)_(?:in|out)|conv_shortcut|(?:[qkv]|out)_proj|self_attn|text_model|(?:in|out|emb)_layers|skip_connection|"
    r"[a-z0-9]+"
)


class Place(NamedTuple):
    """A part of a layer's adapter."""

    module: str
    part: str


class LoRAHeader(NamedTuple):
    """The tensors of a file by layer and part, and the names that belong to no adapter."""

    file: TensorFile
    dialect: str
    modules: dict[str, dict[str, TensorInfo]]
    unknown: list[str]


# --- reading -----------------------------------------------------------------------------------------------------------


def lora_header(file: TensorFile, config: UNetConfig) -> LoRAHeader:
    """The tensors of a file by layer. LDM counts layers, of a U-Net like `config`. AdapterError for another kind of file."""
    dialect, kind = names.lora_dialect(file.tensors), names.adapter_kind(file.tensors)
    if dialect is None:
        raise AdapterError(f"{file.path} is no LoRA. The file looks like {file.looks_like}.")
    if kind not in ("LoRA", "DoRA"):
        raise AdapterError(
            f"{file.path}: unsupported adapter type {kind}; minidiff reads LoRA, LoCon and DoRA. Bake it into a model with the "
            "program that made it: minidiff merge extract gets a LoRA out of that."
        )
    header = LoRAHeader(file, dialect, {}, [])
    for key, info in file.tensors.items():
        if (place := place_of(key, config)) is None:
            header.unknown.append(key)
        elif (other := header.modules.setdefault(place.module, {}).setdefault(place.part, info)) is not info:
            raise AdapterError(f"{file.path} has two tensors for one place: {other.key} and {key}.")
    return header


def place_of(key: str, config: UNetConfig) -> Place | None:
    """Layer and part of a tensor of any dialect; None for a name that no adapter of an SD model has."""
    name = key.removesuffix(".weight")
    for part, endings in ENDINGS.items():
        if ending := next((ending for ending in endings if name.endswith(ending)), None):
            stem = name.removesuffix(ending)
            module = module_of(dotted(stem, config) if stem.startswith("lora_") else stem)
            return Place(module, part) if module else None
    return None


def module_of(path: str) -> str | None:
    """minidiff's name for the layer of a dotted path, in dialects a, b and d."""
    path = path.removeprefix("base_model.model.")
    component = path.partition(".")[0]
    path = re.sub(r"^(unet|text_encoder)\.", "", path).removeprefix(names.CLIP)
    text = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", path)  # dialect b
    unet = re.sub(r"\.processor\.to_out$", ".to_out.0", path).replace(".processor.", ".")
    if component != "unet" and TEXT.fullmatch(text):
        return f"text_encoder.{text}"
    return f"unet.{unet}" if component != "text_encoder" and UNET.fullmatch(unet) else None


def dotted(stem: str, config: UNetConfig) -> str:
    """The dotted path of a kohya name: lora_unet_mid_block_… -> unet.mid_block.…; "" for an SDXL text encoder.

    Underscores cannot simply be split, because "proj_in" is one word: the name is cut into WORDS.
    """
    found = re.fullmatch(r"lora_(unet|te1?)_(.*)", stem)
    path = ".".join(WORDS.findall(found[2])) if found else ""
    if not found or underscored(path) != found[2]:
        return ""
    return f"unet.{names.rename(path, ldm_names(config))}" if found[1] == "unet" else f"text_encoder.{path}"


@cache
def ldm_names(config: UNetConfig) -> dict[str, str]:
    return names.inverse(names.unet_table(config))


def underscored(path: str) -> str:
    return path.replace(".", "_")


# --- writing -----------------------------------------------------------------------------------------------------------

PEFT_PARTS = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
KOHYA_PARTS = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha", "dora_scale": "dora_scale"}


def key_of(place: Place, dialect: str) -> str:
    """The name of a tensor in one of the dialects that are written."""
    component, _, path = place.module.partition(".")
    path = names.CLIP + path if component == "text_encoder" else path
    if dialect == "kohya":
        return f"lora_{'te' if component == 'text_encoder' else 'unet'}_{underscored(path)}.{KOHYA_PARTS[place.part]}"
    return f"{'base_model.model' if dialect == 'peft' else component}.{path}.{PEFT_PARTS[place.part]}"
