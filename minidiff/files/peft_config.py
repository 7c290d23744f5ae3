"""How strong an adapter is, in peft's words: `adapter_config.json` in its folders, `lora_adapter_metadata` in diffusers' files.

    {"r": 4, "lora_alpha": 8, "use_rslora": false, "rank_pattern": {"attn2.to_k": 2}, "alpha_pattern": {}, …}

scale = lora_alpha / r, or lora_alpha / √r with rsLoRA. The patterns give single modules their own rank and alpha.
"""

import json
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from minidiff.core.errors import AdapterError
from minidiff.core.lora import LoRAWeights
from minidiff.files import names as keymaps
from minidiff.files.weights import TensorFile

PEFT_CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"
LONGEST = 500  # letters of a pattern
MOST = 1e30  # of alpha; JSON has whole numbers of any length, and floats end at 1e308
COMPONENTS = ("unet", "text_encoder")
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")  # ways to start that take the adapter out of the base's weights

Config = dict[str, Any]


# --- reading -----------------------------------------------------------------------------------------------------------


def read_configs(file: TensorFile) -> dict[str, Config]:
    """The configuration of each component, "unet" and "text_encoder"; empty where the file brings none."""
    beside = file.path.with_name(PEFT_CONFIG)
    if keymaps.lora_dialect(file.tensors) == "peft":
        if not beside.is_file():
            return {}
        config = parse_config(beside.read_bytes(), str(beside))
        return dict.fromkeys(COMPONENTS, config)
    if METADATA not in file.metadata:
        return {}
    where = f"{file.path}: {METADATA}"
    both = parse_config(file.metadata[METADATA].encode(), where)
    split = {c: {k.removeprefix(f"{c}."): v for k, v in both.items() if k.startswith(f"{c}.")} for c in COMPONENTS}
    return {component: check_config(config, where) for component, config in split.items() if config}


def parse_config(text: bytes, where: str) -> Config:
    try:
        config = json.loads(text)
        if not isinstance(config, dict):
            raise ValueError(f"it is {str(config):.100}, no table")
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{where} is not the configuration of a LoRA: {error}.") from error
    return check_config(config, where)


def check_config(config: Config, where: str) -> Config:
    """The same configuration, or an AdapterError if it is no LoRA's, or says things that minidiff cannot follow."""
    try:
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in (config.get(field) or {}).keys():
                if len(pattern) > LONGEST:
                    raise ValueError(f"{field} has a pattern of {len(pattern):,} letters; {LONGEST} are enough for a layer")
                ending(pattern)
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise AdapterError(f"{where} is not the configuration of a LoRA: {error}.") from error
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise AdapterError(f"{where}: unsupported adapter type {kind}; minidiff reads LoRA and DoRA.")
    if config.get("use_rslora") not in (None, True, False):
        raise AdapterError(f"{where}: use_rslora is {config['use_rslora']!r}; it must be true or false.")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(CHANGE_THE_BASE):
        raise AdapterError(
            f"{where}: init_lora_weights is {start}, which changes the base model too, so the adapter alone is not enough. "
            f"Save it again with peft's path_initial_model_for_weight_conversion."
        )
    return config


@cache
def ending(pattern: str) -> re.Pattern[str]:
    """peft's rule: a pattern means the end of a name, after a dot, or all of it."""
    return re.compile(rf"(.*\.)?({pattern})$")


def config_scale(config: Config, module: str, rank: int, path: Path) -> float:
    """alpha / r of one module (arXiv 2106.09685, section 4.1), or alpha / √r (rsLoRA, arXiv 2312.03732)."""
    name = module.replace("text_encoder.", keymaps.CLIP).removeprefix("unet.")
    said = by_pattern(config.get("rank_pattern"), name, config.get("r", rank))
    alpha = by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha"))
    if said != rank:
        raise AdapterError(f"{path}: {module} has rank {rank}, and its configuration says {said!r}.")
    if type(alpha) not in (int, float) or not 0 < alpha < MOST:
        raise AdapterError(f"{path}: alpha of {module} is {alpha!r:.100}; it must be a positive number.")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def by_pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """What is said of a name: the first pattern that fits counts."""
    for pattern, value in (patterns or {}).items():
        if ending(pattern).match(name):
            return value
    return default


# --- writing -----------------------------------------------------------------------------------------------------------


def peft_config(modules: Mapping[str, LoRAWeights]) -> Config:
    """The fields of peft's LoraConfig for modules by path; those that differ from the first one go into the patterns."""
    ranks = {name: weights.rank for name, weights in modules.items()}
    alphas = {name: alpha_of(weights) for name, weights in modules.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    dora = {name for name, weights in modules.items() if weights.magnitude is not None}
    if dora and len(dora) < len(modules):
        raise AdapterError(
            f"{len(dora)} of {len(modules)} modules are DoRA and the others plain LoRA; peft and diffusers have all or none. "
            f"The kohya style can hold both."
        )
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(modules),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "use_rslora": False,  # an rsLoRA's scale is in its alpha
        "use_dora": bool(dora),
        "bias": "none",
    }


def alpha_of(weights: LoRAWeights) -> float:
    """scale · r, and 8.0 as 8: alpha was divided by r and is multiplied by it again, which leaves a rounding error."""
    alpha = weights.scale * weights.rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha
