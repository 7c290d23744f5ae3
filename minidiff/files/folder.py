"""The folder of a Stable Diffusion model in the diffusers layout, and the JSON in it. model.py reads its weights.

    model_index.json
    unet/ vae/ text_encoder/    config.json and one .safetensors file each
    scheduler/                  scheduler_config.json
    tokenizer/                  vocab.json, merges.txt and two small tables

The JSON becomes one of core/config's dataclasses. A key that minidiff does not know is fine. A key whose value it cannot
follow is an error.
"""

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from minidiff.core.config import NoiseConfig, UNetConfig, VAEConfig
from minidiff.core.errors import WeightsError
from minidiff.files.bundled import here_or_bundled
from minidiff.files.values import fits

MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}  # deleted in 2024

SD15_TEXT: dict[str, Any] = dict(  # CLIP ViT-L/14's text tower, openai/clip-vit-large-patch14
    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5, projection_dim=768,
    bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
)  # fmt: skip


def local_folder(name: str) -> Path:
    """The folder itself, one that travels with the package, or the local copy of a hub id. Nothing is downloaded here."""
    if (folder := here_or_bundled(name)).is_dir():
        return folder
    if Path(name).is_file():
        raise WeightsError(
            f"{name} is a file, not a model folder; `minidiff convert {name} FOLDER --tokenizer …` makes one of a "
            "checkpoint in a single file, which in Python is read by from_single_file."
        )
    hub_id = MOVED.get(name, name)
    if name.count("/") == 1 and not name.startswith((".", "/")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(hub_id, local_files_only=True))
        except (LocalEntryNotFoundError, ValueError):
            pass
    hint = f" {name} is gone from the hub; it lives on as {hub_id}." if hub_id != name else ""
    raise WeightsError(
        f"{name}: there is no such folder, and no hub model of that name in the local cache.{hint} "
        "checkpoints/README.md says where to get SD 1.5; checkpoints/pocket is in the package."
    )


def read_json(path: Path, why: str) -> dict[str, Any]:
    if path.exists() and not path.is_file():  # a pipe with nobody at its other end would wait for ever
        raise WeightsError(f"{path} is no ordinary file; {why}. Copy it again.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist; {why}. Is {path.parent} complete?") from None
    except (ValueError, OSError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}. Copy it again.") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds no JSON object; {why}. Copy it again.")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# --- JSON into dataclasses, and back -----------------------------------------------------------------------------------

Config = TypeVar("Config", UNetConfig, VAEConfig, NoiseConfig)

ONLY: dict[type, dict[str, Any]] = {  # keys of the JSON, and the one value of each that minidiff implements
    UNetConfig: dict(
        act_fn="silu", center_input_sample=False, downsample_padding=1, dual_cross_attention=False, flip_sin_to_cos=True,
        freq_shift=0, mid_block_scale_factor=1, only_cross_attention=False, resnet_time_scale_shift="default",
        time_embedding_type="positional", use_linear_projection=False, class_embed_type=None, addition_embed_type=None,
        num_class_embeds=None,
    ),
    VAEConfig: dict(
        act_fn="silu", use_quant_conv=True, use_post_quant_conv=True, mid_block_add_attention=True, shift_factor=None
    ),
    NoiseConfig: dict(trained_betas=None, clip_sample=False, skip_prk_steps=True),
}  # fmt: skip
BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
LARGEST, LEVELS, LAYERS = 65_536, 8, 16  # more than any SD 1.x model has; refused before a network of that size is built


def config_of(folder: Path, name: str = "config.json") -> tuple[dict[str, Any], str]:
    """The parsed configuration of one part, and its path for error messages."""
    path = folder / name
    return read_json(path, f"the {folder.name} of a model has one"), str(path)


def read_config(kind: type[Config], values: dict[str, Any], where: str) -> Config:
    """A dataclass of this kind from parsed JSON. WeightsError, which names the file `where`, for impossible values."""
    for key, only in ONLY[kind].items():
        if values.get(key, only) not in (only, None):
            family = {"1024": " This is an SD 2.x model.", "2048": " This is an SDXL model."}
            hint = family.get(str(values.get("cross_attention_dim")), "")
            raise WeightsError(f"{where}: {key} is {values[key]!r}; minidiff builds SD 1.x models, where it is {only!r}.{hint}")
    hints = get_type_hints(kind)
    given: dict[str, Any] = {key: value for key, value in values.items() if key in hints}
    for key, value in given.items():
        least = 0 if key == "steps_offset" else 1e-9
        numbers = [one for one in (value if isinstance(value, list) else [value]) if type(one) in (int, float)]
        if not fits(value, hints[key]) or not all(least <= one <= LARGEST for one in numbers):  # NaN is no number between
            raise WeightsError(f"{where}: {key} is {value!r:.60}; no SD 1.x model has that. Copy the file again.")
        if isinstance(value, list):
            given[key] = tuple(value)
    config = kind(**given)
    check_noise(config, where) if isinstance(config, NoiseConfig) else check_sizes(config, where)
    return config


def check_noise(config: NoiseConfig, where: str) -> None:
    """WeightsError if there is no such noise schedule."""
    if not 0 < config.beta_start <= config.beta_end < 1:
        raise WeightsError(f"{where}: beta_start {config.beta_start}, beta_end {config.beta_end}; they rise and lie in (0, 1).")
    if config.rescale_betas_zero_snr and config.prediction_type != "v_prediction":
        raise WeightsError(f"{where}: rescale_betas_zero_snr is true and prediction_type is epsilon; it needs v_prediction.")


def check_sizes(config: UNetConfig | VAEConfig, where: str) -> None:
    """WeightsError if no network of these sizes can be built."""
    widths, layers, groups, heads = config.block_out_channels, config.layers_per_block, config.norm_num_groups, 1
    possible = 1 <= len(widths) <= LEVELS and layers <= LAYERS
    if isinstance(config, UNetConfig):
        heads, down, up = config.attention_head_dim, config.down_block_types, config.up_block_types
        possible = possible and len(widths) == len(down) == len(up) and BLOCKS.issuperset(down + up)
    if not possible or any(width % groups or width % heads for width in widths):
        sizes = f"{len(widths)} levels of {layers} layers, with widths {widths}, {groups} groups and {heads} heads"
        raise WeightsError(f"{where}: not a usable configuration: {sizes}, or blocks of another kind than SD 1.x has.")


def config_values(config: UNetConfig | VAEConfig | NoiseConfig, class_name: str) -> dict[str, Any]:
    """The JSON that other programs read, with the class that diffusers builds from it. None is left out: their default."""
    values = {key: value for key, value in {**asdict(config), **ONLY[type(config)]}.items() if value is not None}
    if isinstance(config, VAEConfig):
        levels = len(config.block_out_channels)
        values |= {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    if isinstance(config, NoiseConfig):  # two settings that not every class knows are written only where they are on
        values = {k: v for k, v in values.items() if v or k not in ("use_karras_sigmas", "rescale_betas_zero_snr")}
    return {"_class_name": class_name, "_diffusers_version": "0.30.0", **values}


# --- the scheduler -----------------------------------------------------------------------------------------------------

SAMPLER_OF = {  # `_class_name` in scheduler_config.json -> our sampler; of dpm++_2m_sde another key tells, see `sampler_of`
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "pndm",  # SD 1.5's
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpm++_2m",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
}
DRAWN_AS: dict[str, tuple[Any, ...]] = {  # settings of diffusers' classes, and the values of them that minidiff follows
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),  # diffusers, too, takes "deis" for dpmsolver++
    "solver_order": (2,),
    "lower_order_final": (True,),
    "final_sigmas_type": ("zero",),
    "original_inference_steps": (50,),
    **dict.fromkeys(("thresholding", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas"), (False, None)),
    **dict.fromkeys(("use_flow_sigmas", "sigma_min", "sigma_max"), (False, None)),
}


def noise_values(scheduler: dict[str, Any]) -> dict[str, Any]:
    """A scheduler_config.json as the reference's pipeline reads it: it sets steps_offset to 1, and its DDIM ends at alpha 1."""
    return {"set_alpha_to_one": scheduler.get("_class_name") == "DDIMScheduler", **scheduler, "steps_offset": 1}


def sampler_of(scheduler: dict[str, Any], where: str) -> str:
    """The sampler that a scheduler_config.json names; DDIM, with a warning, if minidiff does not have it.

    It also warns of settings with which the pictures of diffusers are different from minidiff's.
    """
    name = str(scheduler.get("_class_name", "PNDMScheduler"))
    if name not in SAMPLER_OF:
        warnings.warn(f"{where}: {name} is not among minidiff's samplers; ddim takes its place.", stacklevel=3)
        return "ddim"
    for key in DRAWN_AS.keys() & scheduler.keys():
        if scheduler[key] not in DRAWN_AS[key]:
            what = f"{key} is {scheduler[key]!r}, which minidiff's samplers do not have"
            warnings.warn(f"{where}: {what}; its pictures differ a little from those of diffusers.", stacklevel=3)
    sde = name == "DPMSolverMultistepScheduler" and str(scheduler.get("algorithm_type")).startswith("sde-")
    return "dpm++_2m_sde" if sde else SAMPLER_OF[name]


def scheduler_values(noise: NoiseConfig, sampler: str) -> dict[str, Any]:
    """scheduler_config.json of a model that is drawn with `sampler`. `sampler_of` reads it back."""
    solver = sampler.removesuffix("_sde")
    class_name = next(name for name, ours in SAMPLER_OF.items() if ours == solver)
    return config_values(noise, class_name) | ({"algorithm_type": "sde-dpmsolver++"} if solver != sampler else {})
