"""The files of a Stable Diffusion model in the diffusers layout, which SD 1.5 has on the hub; their JSON, in and out.

model_index.json
unet/ vae/ text_encoder/    config.json and one .safetensors file each
scheduler/                  scheduler_config.json
tokenizer/                  vocab.json, merges.txt and two small tables
"""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidiff.core.config import NoiseConfig
from minidiff.core.errors import WeightsError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

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
NO_OTHER_SIGMAS = {"use_exponential_sigmas": (False, None), "use_beta_sigmas": (False, None)}
MULTISTEP: dict[str, tuple[Any, ...]] = {
    "solver_order": (2,),
    "thresholding": (False,),
    "lower_order_final": (True,),
    "final_sigmas_type": ("zero",),
    "use_flow_sigmas": (False,),
    **NO_OTHER_SIGMAS,
}
DRAWN_AS: dict[str, dict[str, tuple[Any, ...]]] = {  # settings that a class reads, and those values of them that we draw with
    "DDIMScheduler": {"thresholding": (False,)},
    "DDPMScheduler": {"thresholding": (False,), "variance_type": ("fixed_small", "fixed_small_log")},
    "EulerDiscreteScheduler": {
        "final_sigmas_type": ("zero",),
        "interpolation_type": ("linear",),
        "timestep_type": ("discrete",),
        "sigma_min": (None,),
        "sigma_max": (None,),
        **NO_OTHER_SIGMAS,
    },
    "HeunDiscreteScheduler": NO_OTHER_SIGMAS,
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),  # diffusers, too, takes "deis" for dpmsolver++,
        "solver_type": ("midpoint", "logrho", "bh1", "bh2"),  # and for midpoint what other classes call their solvers
        "use_lu_lambdas": (False,),
        "variance_type": (None,),
        **MULTISTEP,
    },
    "UniPCMultistepScheduler": {
        "solver_type": ("bh2", "midpoint", "heun", "logrho"),
        "predict_x0": (True,),
        "disable_corrector": ([],),
        **MULTISTEP,
    },
    "LCMScheduler": {"thresholding": (False,), "original_inference_steps": (50,), "timestep_scaling": (10.0,)},
}
MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}  # deleted in 2024

SD15_TEXT: dict[str, Any] = {  # CLIP ViT-L/14's text tower, openai/clip-vit-large-patch14
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
    "projection_dim": 768,
}
MODEL_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.30.0",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def local_folder(name: str) -> Path:
    """The folder itself, or the local copy of a hub id. Nothing is downloaded here."""
    if Path(name).is_dir():
        return Path(name)
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
        "checkpoints/README.md says where to get SD 1.5; checkpoints/pocket is in the repository."
    )


def config_of(folder: Path, name: str = "config.json") -> tuple[dict[str, Any], str]:
    """The parsed configuration of one part, and its path for error messages."""
    path = folder / name
    return read_json(path, f"the {folder.name} of a model has one"), str(path)


def sampler_of(scheduler: dict[str, Any], where: str) -> str:
    """The sampler that a scheduler_config.json names; DDIM, with a warning, where it names one that is not here.

    A warning, too, for settings under which diffusers' pictures are others than ours.
    """
    name = str(scheduler.get("_class_name", "PNDMScheduler"))
    if name not in SAMPLER_OF:
        warnings.warn(f"{where}: {name} is not among minidiff's samplers; ddim takes its place.", stacklevel=3)
        return "ddim"
    sampler = SAMPLER_OF[name]
    if sampler == "dpm++_2m" and str(scheduler.get("algorithm_type")).startswith("sde-"):
        sampler = "dpm++_2m_sde"
    for key, ours in DRAWN_AS.get(name, {}).items():
        if (value := scheduler.get(key, ours[0])) not in ours:
            warnings.warn(
                f"{where}: {key} is {value!r}, which minidiff's {sampler} does not have; its pictures differ a little from "
                "those of diffusers.",
                stacklevel=3,
            )
    return sampler


def scheduler_values(noise: NoiseConfig, sampler: str) -> dict[str, Any]:
    """What scheduler_config.json says of a model that is drawn with `sampler`: `sampler_of` reads it back."""
    solver = "dpm++_2m" if sampler == "dpm++_2m_sde" else sampler
    class_name = next(name for name, ours in SAMPLER_OF.items() if ours == solver)
    kind = {"algorithm_type": "sde-dpmsolver++"} if solver != sampler else {}
    return noise.to_dict(class_name) | kind


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


def save_tokenizer(tokenizer: "CLIPTokenizer", folder: Path) -> None:
    """SD 1.5's files. transformers 5 writes one `tokenizer.json` in place of the vocabulary and the merges."""
    tokenizer.save_pretrained(str(folder))
    if not (folder / "vocab.json").exists():
        tokenizer.backend_tokenizer.model.save(str(folder))
        (folder / "tokenizer.json").unlink()


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def check_class(index: dict[str, Any], path: Path) -> None:
    if (name := index.get("_class_name")) not in ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline"):
        raise WeightsError(f"{path} describes a {name}; minidiff reads Stable Diffusion 1.x (StableDiffusionPipeline).")
