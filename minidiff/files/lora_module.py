"""One layer's adapter as the tensors of a file, and as `LoRAWeights`; and peft's table, which says how strong it is.

    down            A: (r, in), or (r, in, kh, kw) for a convolution
    up              B: (out, r) or (out, r, 1, 1)
    mid             LoCon in Tucker's form only: (r, r, kh, kw), between a down and an up of 1 x 1
    alpha           kohya's scale · r, one number
    magnitude       peft's DoRA: (out,), for convolutions (1, out, 1, 1)
    dora_scale      LyCORIS' DoRA: (out, 1[, 1, 1]), or in older files (1, in[, 1, 1])

The two forms of DoRA's magnitude have the same shape (1, n, 1, 1), so a part is never read under the other's name.

peft writes the scale into a table, `adapter_config.json` in its folders and `lora_adapter_metadata` in diffusers' files:

    {"r": 4, "lora_alpha": 8, "use_rslora": false, "rank_pattern": {"attn2.to_k": 2}, "alpha_pattern": {}, …}

The patterns give single layers their own rank and alpha.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidiff.core.errors import AdapterError
from minidiff.core.lora import LoRAWeights
from minidiff.files.lora_names import lora_dialect
from minidiff.files.text_files import PREFIX as CLIP
from minidiff.files.weights import TensorFile, TensorInfo, is_finite

PEFT_CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"
COMPONENTS = {"unet": "U-Net", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")  # initialisations that also change the base's weights
LONGEST = 500  # letters of a pattern

Shape = tuple[int, ...]
Config = dict[str, Any]

# --- tensors -----------------------------------------------------------------------------------------------------------


def changed_shape(where: str, parts: Mapping[str, TensorInfo]) -> Shape:
    """The shape of the W that a layer's tensors change, `flat`. AdapterError, which begins with `where`, unless they fit."""
    if not {"down", "up"} <= parts.keys():
        there = ", ".join(f"{info.key} {info.shape}" for info in parts.values())
        raise AdapterError(f"{where} has {there} and not the other half: the file is incomplete. Get it again.")
    shapes = {part: info.shape for part, info in parts.items()}
    down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
    middle = (*down[:1], *down[:1], 1, 1) if mid is None else mid  # without one, as if it were the identity
    fit = len(down) in (2, 4) and len(flat(up)) == 2 and 0 not in down + up + middle and shapes.get("alpha", ()) in ((), (1,))
    if not fit or len(middle) != 4 or middle[:2] != (up[1], down[0]) or (mid and len(flat(down)) != 2):
        there = ", ".join(f"{part} is {shape}" for part, shape in shapes.items())
        raise AdapterError(f"{where}: the shapes do not fit each other: {there}. The file is damaged; get it again.")
    return flat((up[0], down[1], *(mid or down)[2:]))


def flat(shape: Shape) -> Shape:
    """(out, in) for 1 x 1 convolutions too: files have them with four axes or with two."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def weights_of(where: str, parts: Mapping[str, Tensor], scale: float) -> LoRAWeights:
    """One layer in minidiff's form, fp32."""
    A, B = parts["down"].float(), parts["up"].float().flatten(1)
    if "mid" in parts:  # ΔW_oi = U_or M_rs V_si: M V is one convolution, exactly
        A = torch.einsum("rshw,si->rihw", parts["mid"].float(), A.flatten(1))
    m = parts.get("magnitude", parts.get("dora_scale"))
    if m is not None:
        ones = (1,) * (A.ndim - 2)
        by_columns = "dora_scale" in parts and m.shape[:2] == (1, A.shape[1]) and len(B) != 1
        shape = (1, A.shape[1], *ones) if by_columns else (len(B), 1, *ones)
        if m.numel() != max(shape):
            raise AdapterError(f"{where}: DoRA's magnitude is {tuple(m.shape)}; for this layer it should be {shape}.")
        m = m.float().reshape(shape)
    return LoRAWeights(A.contiguous(), B, scale, m)


def fitted(weights: LoRAWeights, W: Tensor) -> LoRAWeights:
    """With as many axes as W has: a 1 x 1 convolution in a file may be a linear layer in the model, or the reverse."""
    m, ones = weights.magnitude, (1,) * (W.ndim - 2)
    m = None if m is None else m.reshape(*m.shape[:2], *ones)
    return replace(weights, A=weights.A.reshape(-1, *W.shape[1:]), magnitude=m)


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


def alpha_of(weights: LoRAWeights) -> float:
    """scale · r, and 8.0 as 8: alpha / r · r has a rounding error."""
    alpha = weights.scale * weights.rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha


# --- peft's table ------------------------------------------------------------------------------------------------------


def read_configs(file: TensorFile) -> dict[str, Config]:
    """The configuration of each component, "unet" and "text_encoder"; an empty one if the file has none.

    AdapterError if it is no LoRA's, or asks for something that minidiff does not do.
    """
    beside = file.path.with_name(PEFT_CONFIG)
    if lora_dialect(file.tensors) == "peft" and beside.is_file():
        where, text = str(beside), beside.read_bytes()
    else:
        where, text = f"{file.path}: {METADATA}", file.metadata.get(METADATA, "{}").encode()
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
        if len(pattern) > LONGEST:
            raise ValueError(f"it has a pattern of {len(pattern):,} letters; {LONGEST} are enough for a layer")
        ending(pattern)
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise AdapterError(f"{where}: unsupported adapter type {kind}; minidiff reads LoRA and DoRA.")
    if (start := str(config.get("init_lora_weights", "")).lower()).startswith(CHANGE_THE_BASE):
        what = f"init_lora_weights is {start}, which changes the base model too, so the adapter alone is not enough"
        raise AdapterError(f"{where}: {what}. Save it again with peft's path_initial_model_for_weight_conversion.")


@cache
def ending(pattern: str) -> re.Pattern[str]:
    """peft's rule: a pattern means the end of a name, after a dot, or all of it."""
    return re.compile(rf"(.*\.)?({pattern})$")


def scale_of(
    path: Path, module: str, parts: Mapping[str, TensorInfo], tensors: Mapping[str, Tensor], configs: Mapping[str, Config]
) -> float | None:
    """alpha / r of a layer (arXiv 2106.09685, section 4.1), or alpha / √r (rsLoRA, arXiv 2312.03732). None: no file says it."""
    rank, rslora = parts["down"].shape[0], False
    if "alpha" in parts:
        alpha: Any = tensors[parts["alpha"].key].item() or rank  # kohya's rule: 0 stands for the rank
    elif config := configs[module.partition(".")[0]]:
        name = re.sub(r"^text_encoder(_2)?\.", CLIP, module).removeprefix("unet.")
        if (said := by_pattern(config.get("rank_pattern"), name, config.get("r", rank))) != rank:
            raise AdapterError(f"{path}: {module} has rank {rank}, and its configuration says {said!r}.")
        alpha = by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha"))
        rslora = bool(config.get("use_rslora"))
    else:
        return None
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
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
