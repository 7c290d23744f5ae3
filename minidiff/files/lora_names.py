"""Every program's names for the tensors of an adapter, and minidiff's own; and peft's table, which says how strong it is.

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

peft writes the scale into a table, `adapter_config.json` in its folders and `lora_adapter_metadata` in diffusers' files:

    {"r": 4, "lora_alpha": 8, "use_rslora": false, "rank_pattern": {"attn2.to_k": 2}, "alpha_pattern": {}, …}

The patterns give single layers their own rank and alpha.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from minidiff.core.config import SD15_UNET, SDXL_UNET, UNetConfig
from minidiff.core.errors import AdapterError
from minidiff.core.lora import LoRAWeights
from minidiff.files import names
from minidiff.files.text_files import PREFIX as CLIP

COMPONENTS = {"unet": "U-Net", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
DIALECTS = {  # how a program's names are known, by any one of them; the first that fits
    "peft": r"base_model\.model\.",
    "kohya": r"lora_(unet|te\d?|prior)_|lycoris_",
    "cloneofsimo": r"(unet|text_encoder):\d+:",
    "diffusers attention-processor (2023)": r".*(\.processor\.|\.self_attn\.).*_lora\.",
    "diffusers down/up": r".*\.lora(_linear_layer)?\.(down|up)\.",
    "diffusers": r".*\.lora_[AB]\.",
    "ComfyUI": r"(diffusion_model|text_encoders)\..*\.(lora_|lokr_|hada_|oft_|diff)",
    "OneTrainer": r".*\.(lora_(down|up)\.|lokr_|hada_|b?oft_)",
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


class Place(NamedTuple):
    """A part of a layer's adapter."""

    module: str
    part: str


def lora_dialect(keys: Iterable[str]) -> str | None:
    """The key style of an adapter file, from the first key that shows one; None if it is no adapter."""
    return next((name for key in keys for name, pattern in DIALECTS.items() if re.match(pattern, key)), None)


def adapter_kind(keys: Collection[str]) -> str:
    """LoRA, or one of its relatives."""
    return next((kind for kind, pattern in KINDS.items() if any(re.search(pattern, key) for key in keys)), "LoRA")


def bundled_words(keys: Iterable[str]) -> dict[str, str]:
    """The new words that a LoRA file brings along, and the names of their vectors."""
    form = re.compile(r"bundle_emb\.(.+)\.(emb_params|clip_l|string_to_param\.\*)")  # OneTrainer's, and A1111's
    return {found[1]: key for key in keys if (found := form.fullmatch(key))}


def unet_of(keys: Iterable[str]) -> UNetConfig:
    """The U-Net in which LDM's names are counted in an adapter with these names: SDXL's, or else SD 1.x's and 2.x's."""
    marks = re.compile(r"transformer_blocks[._][1-9]|lora_te2[._]|text_encoder_2\.|clip_g\.|label_emb|add_embedding")
    return SDXL_UNET if any(marks.search(key) for key in keys) else SD15_UNET


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
    component, part = (next(name for name in table if found[name] is not None) for table in (BEGINNINGS, ENDINGS))
    words = WORD.findall(found["path"])  # underscores cannot simply be split, because "proj_in" is one word
    if "_".join(words) != found["path"].replace(".", "_"):
        return None
    path = names.rename(".".join(words), names.inverse(names.unet_table(config)))
    unet = re.sub(r"\.processor\.to_out$", ".to_out.0", path).replace(".processor.", ".")  # diffusers in 2023
    text = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", path)
    if component in ("unet", "either") and UNET.fullmatch(unet):
        return Place(f"unet.{unet}", part)
    if component != "unet" and TEXT.fullmatch(text):
        return Place(f"{'text_encoder' if component == 'either' else component}.{text}", part)
    return None


# --- writing -----------------------------------------------------------------------------------------------------------

STARTS = {  # of the dialects that are written; peft's files hold one network
    "diffusers": {"unet": "unet.", "text_encoder": "text_encoder.text_model.", "text_encoder_2": "text_encoder_2.text_model."},
    "kohya": {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_", "text_encoder_2": "lora_te2_text_model_"},
    "peft": {"unet": "base_model.model.", "text_encoder": "base_model.model.text_model."},
}
A_AND_B = {"down": ".lora_A.weight", "up": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
DOWN_AND_UP = {"down": ".lora_down.weight", "up": ".lora_up.weight", "alpha": ".alpha", "dora_scale": ".dora_scale"}


def key_of(place: Place, dialect: str, xl: bool = False) -> str:
    """The name of a tensor in a dialect that is written. kohya's for SDXL has LDM's names, and numbers the encoders."""
    component, _, path = place.module.partition(".")
    start = STARTS[dialect][component]
    if dialect != "kohya":
        return start + path + A_AND_B[place.part]
    if xl:
        start, path = start.replace("lora_te_", "lora_te1_"), names.rename(path, names.unet_table(SDXL_UNET))
    return start + path.replace(".", "_") + DOWN_AND_UP[place.part]


# --- peft's table ------------------------------------------------------------------------------------------------------

PEFT_CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")  # initialisations that also change the base's weights
LONGEST = 500  # letters of a pattern
Config = dict[str, Any]


def alpha_of(weights: LoRAWeights) -> float:
    """scale · r, and 8.0 as 8: alpha / r · r has a rounding error."""
    alpha = weights.scale * weights.rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha


def read_configs(path: Path, dialect: str, metadata: Mapping[str, str]) -> dict[str, Config]:
    """The configuration of each component, "unet" and "text_encoder"; an empty one if the file `path` has none.

    AdapterError if it is no LoRA's, or asks for something that minidiff does not do.
    """
    where, text = f"{path}: {METADATA}", metadata.get(METADATA, "{}").encode()
    if dialect == "peft" and (beside := path.with_name(PEFT_CONFIG)).is_file():
        where, text = str(beside), beside.read_bytes()
    try:
        if not isinstance(table := json.loads(text), dict):
            raise ValueError(f"it is {str(table):.100}, no table")
        configs = {component: part_of(table, component) for component in COMPONENTS}
        for config in configs.values():
            check_config(config, where)
    except (ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise AdapterError(f"{where} is not the configuration of a LoRA: {error}.") from error
    return configs


def part_of(table: Config, component: str) -> Config:
    """diffusers writes "unet.r" and "text_encoder.r"; peft, and diffusers for one network, write "r"."""
    mine = {key.removeprefix(f"{component}."): value for key, value in table.items()}
    return {key: value for key, value in mine.items() if "." not in key}


def check_config(config: Config, where: str) -> None:
    for pattern in (p for field in ("rank_pattern", "alpha_pattern") for p in (config.get(field) or {}).keys()):
        ending(pattern)
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise AdapterError(f"{where}: unsupported adapter type {kind}; minidiff reads LoRA and DoRA.")
    if (start := str(config.get("init_lora_weights", "")).lower()).startswith(CHANGE_THE_BASE):
        what = f"init_lora_weights is {start}, which changes the base model too, so the adapter alone is not enough"
        raise AdapterError(f"{where}: {what}. Save it again with peft's path_initial_model_for_weight_conversion.")


@cache
def ending(pattern: str) -> re.Pattern[str]:
    """peft's rule: a pattern means the end of a name, after a dot, or all of it. ValueError if it is no pattern for a layer."""
    if len(pattern) > LONGEST:
        raise ValueError(f"it has a pattern of {len(pattern):,} letters; {LONGEST} are enough for a layer")
    return re.compile(rf"(.*\.)?({pattern})$")


def scale_of(path: Path, module: str, parts: Mapping[str, Tensor], configs: Mapping[str, Config]) -> float | None:
    """alpha / r of a layer (arXiv 2106.09685, section 4.1), or alpha / √r (rsLoRA, arXiv 2312.03732). None: no file says it."""
    rank, rslora = len(parts["down"]), False
    if "alpha" in parts:
        alpha: Any = parts["alpha"].item() or rank  # kohya's rule: 0 stands for the rank
    elif config := configs[module.partition(".")[0]]:
        name = re.sub(r"^text_encoder(_2)?\.", CLIP, module).removeprefix("unet.")
        if (said := by_pattern(config.get("rank_pattern"), name, config.get("r", rank))) != rank:
            raise AdapterError(f"{path}: {module} has rank {rank}, and its configuration says {said!r}.")
        alpha = by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha"))
        rslora = bool(config.get("use_rslora"))
    else:
        return None
    if type(alpha) not in (int, float) or not 0 < alpha < 1e38:  # fp32 holds no more
        raise AdapterError(f"{path}: alpha of {module} is {alpha!r:.100}; it must be a positive number.")
    return float(alpha) / (math.sqrt(rank) if rslora else rank)


def by_pattern(patterns: Config | None, name: str, default: Any) -> Any:
    """The value of the first pattern that fits the name."""
    return next((value for pattern, value in (patterns or {}).items() if ending(pattern).match(name)), default)


def peft_config(modules: Mapping[str, LoRAWeights]) -> Config:
    """peft's LoraConfig for layers by path. The first layer gives r and alpha; those that differ go into the patterns."""
    ranks = {name: weights.rank for name, weights in modules.items()}
    alphas = {name: alpha_of(weights) for name, weights in modules.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    dora = sum(weights.magnitude is not None for weights in modules.values())
    if 0 < dora < len(modules):
        some = f"{dora} of {len(modules)} modules are DoRA and the others plain LoRA"
        raise AdapterError(f"{some}; peft and diffusers have all or none. The kohya style can hold both.")
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(modules),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "use_rslora": False,  # an rsLoRA's scale is in its alpha
        "use_dora": dora > 0,
        "bias": "none",
    }
