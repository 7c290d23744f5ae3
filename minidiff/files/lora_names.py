"""Every program's names for the tensors of an adapter, and minidiff's own.

A name has three pieces: a beginning, the path of a layer, and an ending that says which part of the layer's adapter it is.

    unet.                      down_blocks.0.….attn1.to_q    .lora_A.weight          diffusers; lora_B is the way up
    unet.                      down_blocks.0.….attn1.to_q    .lora.down.weight       its SD 1.5 scripts
    text_encoder.text_model.   encoder.layers.0.….q_proj     .lora_linear_layer.down.weight; text_encoder_2. is SDXL's second
                               down_blocks.0.….attn1.to_q    .lora_A.weight          its save_lora_adapter
    [unet.]                    ….attn1.processor.to_q        _lora.down.weight       in 2023; to_out stands for to_out.0
    base_model.model.          down_blocks.0.….attn1.to_q    .lora_A[.default].weight    peft
    lora_unet_, lora_te_       down_blocks_0_…_attn1_to_q    .lora_down.weight, .alpha   kohya, A1111, ComfyUI
    lora_te1_, lora_te2_       input_blocks_4_1_…            .lora_down.weight, .alpha   the same for SDXL, with LDM's names
    lora_unet_, lycoris_       …_resnets_0_conv1             .lora_mid.weight, .dora_scale   LyCORIS
    lora_unet., unet., clip_l.                               .lora_down.weight       OneTrainer: kohya's, with dots
    diffusion_model.           input_blocks.1.1.….to_q       .lora_down.weight       ComfyUI: LDM's names
    unet:0:up                                                                        cloneofsimo; counts layers, not read
    bundle_emb.                WORD                          .emb_params, .clip_l    a new word beside the LoRA

Any beginning, any path, in dots or underscores, with diffusers' or LDM's names, and any ending are read together. minidiff
calls layers by component and path, "unet.….attn1.to_q" and "text_encoder.encoder.layers.0.self_attn.q_proj", parts "down",
"up", "mid", "alpha", "magnitude" and "dora_scale".
"""

import re
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from minidiff.core.config import SD15_UNET, SDXL_UNET, UNetConfig
from minidiff.files import names


class Place(NamedTuple):
    """A part of a layer's adapter."""

    module: str
    part: str


class Dialect(NamedTuple):
    """How a program's names are known, by any one of them; and the pieces of those that minidiff writes."""

    pattern: str
    unet: str = ""
    text_encoder: str = ""
    dot: str = "."
    endings: dict[str, str] = {}


A_AND_B = {"down": ".lora_A.weight", "up": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
DOWN_AND_UP = {"down": ".lora_down.weight", "up": ".lora_up.weight", "alpha": ".alpha", "dora_scale": ".dora_scale"}
DIALECTS = {  # the first that fits
    "peft": Dialect(r"base_model\.model\.", "base_model.model.", "base_model.model.text_model.", ".", A_AND_B),
    "kohya": Dialect(r"lora_(unet|te\d?|prior)_|lycoris_", "lora_unet_", "lora_te_text_model_", "_", DOWN_AND_UP),
    "cloneofsimo": Dialect(r"(unet|text_encoder):\d+:"),
    "diffusers attention-processor (2023)": Dialect(r".*(\.processor\.|\.self_attn\.).*_lora\."),
    "diffusers down/up": Dialect(r".*\.lora(_linear_layer)?\.(down|up)\."),
    "diffusers": Dialect(r".*\.lora_[AB]\.", "unet.", "text_encoder.text_model.", ".", A_AND_B),
    "ComfyUI": Dialect(r"(diffusion_model|text_encoders)\..*\.(lora_|lokr_|hada_|oft_|diff)"),
    "OneTrainer": Dialect(r".*\.(lora_(down|up)\.|lokr_|hada_|b?oft_)"),
}
KINDS = {  # LoRA's relatives, by any of their names; the first that fits
    "LoKr": r"\.lokr_",
    "LoHa": r"\.hada_",
    "OFT": r"\.b?oft_",
    "IA3": r"\.(ia3_|on_input$)",
    "GLoRA": r"\.[ab][12]\.weight$",
    "full difference": r"\.(diff(_b)?|[wb]_norm)$",
    "DoRA": r"\.(dora_scale|lora_magnitude_vector)",
}
READ = ("LoRA", "DoRA")


def lora_dialect(keys: Iterable[str]) -> str | None:
    """The key style of an adapter file, from the first key that shows one; None if it is no adapter."""
    found = (name for key in keys for name, dialect in DIALECTS.items() if re.match(dialect.pattern, key))
    return next(found, None)


def adapter_kind(keys: Iterable[str]) -> str:
    """LoRA, or one of its relatives."""
    keys = list(keys)
    return next((kind for kind, pattern in KINDS.items() if any(re.search(pattern, key) for key in keys)), "LoRA")


# --- reading -----------------------------------------------------------------------------------------------------------

BEGINNINGS = {  # whose layer follows; after any other, the path says it
    "unet": r"lora_unet[._]|unet\.|(?:model\.)?diffusion_model\.|lycoris_",
    "text_encoder": r"lora_te1?[._]|text_encoder\.|(?:text_encoders\.)?clip_l\.(?:transformer\.)?",
    "text_encoder_2": r"lora_te2[._]|text_encoder_2\.|(?:text_encoders\.)?clip_g\.(?:transformer\.)?",
    "either": r"(?:base_model\.model\.)?",
}
ENDINGS = {
    "down": r"\.lora_A(?:\.\w+)?\.weight|(?:\.lora|\.lora_linear_layer|_lora)\.down\.weight|\.lora_down\.weight",
    "up": r"\.lora_B(?:\.\w+)?\.weight|(?:\.lora|\.lora_linear_layer|_lora)\.up\.weight|\.lora_up\.weight",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"\.alpha",
    "magnitude": r"\.lora_magnitude_vector(?:(?:\.\w+)?\.weight)?",  # peft's DoRA: one number for each output
    "dora_scale": r"\.dora_scale",  # LyCORIS' DoRA: for each output or each input, as its shape says
}


def one_of(patterns: dict[str, str]) -> str:
    """A pattern for any of these; the group's name says which one fits."""
    return f"(?:{'|'.join(f'(?P<{name}>{pattern})' for name, pattern in patterns.items())})"


NAME = re.compile(rf"{one_of(BEGINNINGS)}(?:text_model[._])?(?P<path>.+?){one_of(ENDINGS)}")
WORD = re.compile(  # of a path: those with an underscore inside, in diffusers, CLIP and LDM; then any other
    r"(?:down|up|mid|transformer|input|middle|output)_blocks?|time_embedding|time_emb_proj|time_embed|add_embedding|label_emb|linear_\d|to_(?:[qkv]|out)|"
    r"(?:conv|proj)_(?:in|out)|conv_shortcut|(?:[qkv]|out)_proj|self_attn|(?:in|out|emb)_layers|skip_connection|[a-z0-9]+"
)
UNET = re.compile(  # every linear layer and convolution of a U-Net
    r"conv_in|conv_out|(?:time|add)_embedding\.linear_[12]|((down|up)_blocks\.\d+|mid_block)\.("
    r"attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)))|"
    r"resnets\.\d+\.(conv1|conv2|time_emb_proj|conv_shortcut)|(down|up)samplers\.0\.conv)"
)
TEXT = re.compile(r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")  # and of its text encoder


def place_of(key: str, config: UNetConfig) -> Place | None:
    """Layer and part of a tensor of any dialect; None for a name that no adapter of an SD model has.

    LDM numbers layers from first to last: `config` says how many there are.
    """
    if not (found := NAME.fullmatch(key)):
        return None
    part = next(part for part in ENDINGS if found[part] is not None)
    words = WORD.findall(found["path"])  # underscores cannot simply be split, because "proj_in" is one word
    if "_".join(words) != found["path"].replace(".", "_"):
        return None
    path = names.rename(".".join(words), ldm_names(config))
    unet = re.sub(r"\.processor\.to_out$", ".to_out.0", path).replace(".processor.", ".")  # diffusers in 2023
    text = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", path)
    if found["unet"] is None and TEXT.fullmatch(text):
        return Place(f"text_encoder{'_2' if found['text_encoder_2'] else ''}.{text}", part)
    no_text = found["text_encoder"] is None and found["text_encoder_2"] is None
    return Place(f"unet.{unet}", part) if no_text and UNET.fullmatch(unet) else None


def bundled_words(keys: Iterable[str]) -> dict[str, str]:
    """The new words that a LoRA file brings along, and the names of their vectors."""
    form = re.compile(r"bundle_emb\.(.+)\.(emb_params|clip_l|string_to_param\.\*)")  # OneTrainer's, and A1111's
    return {found[1]: key for key in keys if (found := form.fullmatch(key))}


@cache
def ldm_names(config: UNetConfig) -> dict[str, str]:
    return names.inverse(names.unet_table(config))


# --- writing -----------------------------------------------------------------------------------------------------------


def key_of(place: Place, dialect: str, xl: bool = False) -> str:
    """The name of a tensor in a dialect that is written. kohya's for SDXL has LDM's names, and numbers the encoders."""
    written = DIALECTS[dialect]
    component, _, path = place.module.partition(".")
    start = getattr(written, component.removesuffix("_2"))
    if component == "text_encoder_2":
        start = start.replace("text_encoder.", "text_encoder_2.").replace("lora_te_", "lora_te2_")
    if xl and dialect == "kohya":
        start, path = start.replace("lora_te_", "lora_te1_"), names.rename(path, names.unet_table(SDXL_UNET))
    return start + path.replace(".", written.dot) + written.endings[place.part]


def unet_of(keys: Iterable[str]) -> UNetConfig:
    """The U-Net in which LDM's names are counted in an adapter with these names: SDXL's, or else SD 1.x's and 2.x's."""
    marks = re.compile(r"transformer_blocks[._][1-9]|lora_te2[._]|text_encoder_2\.|clip_g\.|label_emb|add_embedding")
    return SDXL_UNET if any(marks.search(key) for key in keys) else SD15_UNET
