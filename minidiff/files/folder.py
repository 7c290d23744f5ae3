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
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from minidiff.core.config import ControlNetConfig, NoiseConfig, UNetConfig, VAEConfig
from minidiff.core.errors import SettingsError, WeightsError, did_you_mean
from minidiff.files.bundled import here_or_bundled
from minidiff.files.values import fits, near_path

MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}  # deleted in 2024

SD15_TEXT: dict[str, Any] = dict(  # CLIP ViT-L/14's text tower, openai/clip-vit-large-patch14
    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5, projection_dim=768,
    bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
)  # fmt: skip
SD2_TEXT: dict[str, Any] = SD15_TEXT | dict(  # OpenCLIP ViT-H/14's, without its last layer; no program reads these ids
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu",
    projection_dim=512, bos_token_id=0, eos_token_id=2, pad_token_id=1,
)  # fmt: skip
BIGG_TEXT: dict[str, Any] = SD2_TEXT | dict(  # OpenCLIP ViT-bigG/14's, SDXL's second
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
)  # fmt: skip

WORDS = "words.json"  # of a model with a small vocabulary: {"words": [all of its captions], "things": [what it draws]}
NO_PARTS = ("safety_checker", "feature_extractor", "image_encoder")  # parts that minidiff does not have
HARMLESS = (  # keywords that change nothing: safetensors are read, from the disk, without a network
    "use_safetensors", "local_files_only", "low_cpu_mem_usage", "force_download", "token", "use_auth_token", "variant",
    "requires_safety_checker", *NO_PARTS,
)  # fmt: skip
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # as diffusers and peft call them


def local_folder(name: str, cache_dir: str | None = None, revision: str | None = None, kind: str = "model") -> Path:
    """The folder itself, one that travels with the package, or the local copy of a hub id. Nothing is downloaded here."""
    if (folder := here_or_bundled(name)).is_dir():
        adapter = [one for one in LORA_FILES if (folder / one).is_file()]
        if adapter and not (folder / "model_index.json").exists():
            way = f"give it with --lora {name}, in Python to load_lora_weights"
            raise WeightsError(f"{name} holds a LoRA ({adapter[0]}), not a model; {way}")
        return folder
    if Path(name).is_file():
        raise WeightsError(
            f"{name} is a file, not a model folder; `minidiff convert {name} FOLDER --tokenizer …` makes one of a "
            "checkpoint in a single file, which in Python is read by from_single_file."
        )
    hub_id = MOVED.get(name, name)
    if name.count("/") == 1 and not name.startswith((".", "/")):
        from huggingface_hub import snapshot_download as snapshot
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot(hub_id, repo_type=kind, revision=revision, cache_dir=cache_dir, local_files_only=True))
        except (LocalEntryNotFoundError, ValueError):
            pass
    hint = f" {name} is gone from the hub; it lives on as {hub_id}." if hub_id != name else near_path(name)
    raise WeightsError(
        f"{name}: there is no such folder, and no hub model of that name in the local cache.{hint} "
        "checkpoints/README.md says where to get SD 1.5; checkpoints/pocket is in the package."
    )


def found(path: Any, given: dict[str, Any]) -> Path:
    """The path itself, or the local copy of a hub id (owner/name). Takes the keywords that say where it is out of `given`."""
    path = getattr(path, "path", path)  # of an adapter that was read or trained
    where = {name: given.pop(name, None) for name in ("cache_dir", "revision")}
    for name in HARMLESS:
        given.pop(name, None)
    if not Path(path).exists() and str(path).count("/") == 1:
        with suppress(WeightsError):  # whoever reads the path says that it is not there
            path = local_folder(str(path), **where)
    return Path(path, given.pop("subfolder", ""))


def read_json(path: Path, why: str) -> dict[str, Any]:
    if path.exists() and not path.is_file():  # reading a pipe would never end
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
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- JSON into dataclasses, and back -----------------------------------------------------------------------------------

Config = TypeVar("Config", UNetConfig, ControlNetConfig, VAEConfig, NoiseConfig)

ONLY: dict[type, dict[str, Any]] = {  # keys of the JSON, and the one value of each that minidiff implements
    UNetConfig: dict(
        act_fn="silu", center_input_sample=False, downsample_padding=1, dual_cross_attention=False, flip_sin_to_cos=True,
        freq_shift=0, mid_block_scale_factor=1, only_cross_attention=False, resnet_time_scale_shift="default",
        time_embedding_type="positional", class_embed_type=None, num_class_embeds=None, num_attention_heads=None,
        encoder_hid_dim=None, encoder_hid_dim_type=None, time_cond_proj_dim=None, cross_attention_norm=None,
        time_embedding_act_fn=None, time_embedding_dim=None, timestep_post_act=None, mid_block_only_cross_attention=None,
        reverse_transformer_layers_per_block=None,
    ),
    VAEConfig: dict(
        act_fn="silu", use_quant_conv=True, use_post_quant_conv=True, mid_block_add_attention=True, shift_factor=None,
        latents_mean=None, latents_std=None,
    ),
    NoiseConfig: dict(trained_betas=None, clip_sample=False, skip_prk_steps=True),
}  # fmt: skip
UNWRITTEN: dict[str, Any] = dict(  # the same, for keys of a U-Net that no folder has to have: not written
    mid_block_type="UNetMidBlock2DCrossAttn", resnet_skip_time_act=False, resnet_out_scale_factor=1.0, conv_in_kernel=3,
    conv_out_kernel=3, attention_type="default", dropout=0.0, class_embeddings_concat=False,
)  # fmt: skip
NEWER = ("use_linear_projection", "transformer_layers_per_block", "addition_embed_type", "addition_time_embed_dim",
         "projection_class_embeddings_input_dim")  # fmt: skip
ONLY[ControlNetConfig] = ONLY[UNetConfig]
NO_CONTROL = ("sample_size", "out_channels", "up_block_types", "center_input_sample", "dual_cross_attention",
              "time_embedding_type")  # what the config of a ControlNet does not have  # fmt: skip
BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
LARGEST, LEVELS, LAYERS = 65_536, 8, 16  # more than any SD model has; refused before a network of that size is built


def config_of(folder: Path, name: str = "config.json") -> tuple[dict[str, Any], str]:
    """The parsed configuration of one part, and its path for error messages."""
    path = folder / name
    return read_json(path, f"the {folder.name} of a model has one"), str(path)


def read_config(kind: type[Config], values: dict[str, Any], where: str) -> Config:
    """A dataclass of this kind from parsed JSON. WeightsError, which names the file `where`, for impossible values."""
    for key, only in (ONLY[kind] | (UNWRITTEN if issubclass(kind, UNetConfig) else {})).items():
        if values.get(key, only) not in (only, None):
            families = "networks of SD 1.x, SD 2.x and SDXL"
            raise WeightsError(f"{where}: {key} is {values[key]!r:.60}; minidiff builds {families}, where it is {only!r}.")
    hints = get_type_hints(kind)
    given: dict[str, Any] = {key: value for key, value in values.items() if key in hints}
    for key, value in given.items():
        least = 0 if key in ("steps_offset", "transformer_layers_per_block") else 1e-9
        numbers = [one for one in (value if isinstance(value, list) else [value]) if type(one) in (int, float)]
        if not fits(value, hints[key]) or not all(least <= one <= LARGEST for one in numbers):  # NaN is no number between
            raise WeightsError(f"{where}: {key} is {value!r:.60}; no SD model has that. Copy the file again.")
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
    widths, layers, groups = config.block_out_channels, config.layers_per_block, config.norm_num_groups
    heads = (1,) * len(widths)
    possible = 1 <= len(widths) <= LEVELS and layers <= LAYERS
    if isinstance(config, UNetConfig):
        down, up = config.down_block_types, config.up_block_types
        both = config.attention_head_dim, config.transformer_layers_per_block
        heads, depths = (one if isinstance(one, tuple) else (one,) * len(widths) for one in both)
        levels = {len(widths), len(down), len(up), len(heads), len(depths)}
        possible = possible and len(levels) == 1 and BLOCKS.issuperset(down + up)
        if len({getattr(config, key) is None for key in NEWER[-3:]}) > 1:
            raise WeightsError(f"{where}: addition_embed_type text_time needs {NEWER[-2]} and {NEWER[-1]}, and they need it.")
    if not possible or any(width % groups or width % n for width, n in zip(widths, heads)):
        sizes = f"{len(widths)} levels of {layers} layers, with widths {widths}, {groups} groups and {heads} heads"
        raise WeightsError(f"{where}: not a usable configuration: {sizes}, or blocks of another kind than SD has.")


def config_values(config: UNetConfig | VAEConfig | NoiseConfig, class_name: str) -> dict[str, Any]:
    """The JSON that other programs read, with the class that diffusers builds from it. None is left out: their default."""
    values = {key: value for key, value in {**asdict(config), **ONLY[type(config)]}.items() if value is not None}
    if isinstance(config, UNetConfig):  # the settings that SD 1.5 does not have come last, where they differ from its own
        newer = {key: values.pop(key) for key in NEWER if key in values}
        values |= {key: value for key, value in newer.items() if key == NEWER[0] or value != getattr(UNetConfig, key)}
    if isinstance(config, ControlNetConfig):
        values = {key: value for key, value in values.items() if key not in NO_CONTROL}
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
    "TCDScheduler": "tcd",
}
# for messages: the nearest sampler to names of other programs
NEAREST = SAMPLER_OF | {"plms": "pndm", "PLMS": "pndm", "dpm2": "heun", "dpmsolver++": "dpm++_2m", "lms": "dpm++_2m"}
DRAWN_AS: dict[str, tuple[Any, ...]] = {  # settings of diffusers' classes, and the values of them that minidiff follows
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),  # diffusers, too, takes "deis" for dpmsolver++
    "solver_order": (2,),
    "lower_order_final": (True,),
    "final_sigmas_type": ("zero",),
    "original_inference_steps": (50,),
    "timestep_type": ("discrete",),
    "interpolation_type": ("linear",),
    **dict.fromkeys(("thresholding", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas"), (False, None)),
    **dict.fromkeys(("use_flow_sigmas", "sigma_min", "sigma_max"), (False, None)),
}


def check_sampler(name: str) -> None:
    """SettingsError for a sampler that there is not, with the nearest."""
    known = [*SAMPLER_OF.values(), "dpm++_2m_sde"]
    if name not in known:
        hint = did_you_mean(NEAREST.get(name, name.lower()), known)
        raise SettingsError(f'sampler "{name}" is unknown; it is one of {", ".join(known)}.{hint}')


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


def is_turbo(noise: NoiseConfig, sampler: str) -> bool:
    """SD-Turbo and SDXL-Turbo have no other mark than their scheduler: Euler or Euler ancestral, trailing, of noise."""
    return sampler in ("euler", "euler_a") and (noise.timestep_spacing, noise.prediction_type) == ("trailing", "epsilon")


def scheduler_values(noise: NoiseConfig, sampler: str) -> dict[str, Any]:
    """scheduler_config.json of a model that is drawn with `sampler`. `sampler_of` reads it back."""
    solver = sampler.removesuffix("_sde")
    class_name = next(name for name, ours in SAMPLER_OF.items() if ours == solver)
    return config_values(noise, class_name) | ({"algorithm_type": "sde-dpmsolver++"} if solver != sampler else {})
