"""Folders of tiny models in the layouts of SD 2.x and SDXL, with the conventions that differ from SD 1.5's."""

import json
import runpy
from pathlib import Path
from typing import Any

from tiny_sizes import TINY_SD2, TINY_VAE, TINY_XL

from minidiff.core.config import NoiseConfig
from minidiff.core.unet import UNet2DConditionModel
from minidiff.core.vae import AutoencoderKL
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.text_files import build_text_encoder, load_tokenizer
from minidiff.pocket.tokenizer import build_tokenizer

WORDS = ["a photo of a red dog on the beach!", "a drawing of a blue cat in the snow"]
TURBO = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "timestep_type": "discrete"}
TURBO |= {"interpolation_type": "linear", "sigma_min": None, "sigma_max": None}
SCHEDULERS: dict[str, dict[str, Any]] = {  # scheduler_config.json of the published models, where it differs
    "SD 2": {"_class_name": "PNDMScheduler"},
    "SD 2 v": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "SD-Turbo": TURBO,
}


def sd2_folder(home: Path, model: str = "SD 2") -> Path:
    """SD 2's heads, linear projections and text tower (gelu, padding "!", the ids that no program reads)."""
    fill = runpy.run_path(str(Path(__file__).parent / "golden" / "make_models.py"))["fill"]
    build_tokenizer(home / "words", WORDS)
    padded_by_zeros(home / "words")
    tokenizer = load_tokenizer(home / "words")
    text = {"vocab_size": len(tokenizer), "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 2, "hidden_act": "gelu", "projection_dim": 16}
    text |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    unet, vae, encoder = map(fill, (UNet2DConditionModel(TINY_SD2), AutoencoderKL(TINY_VAE), build_text_encoder(text, "tiny")))
    folder = home / "model"
    StableDiffusionPipeline(unet, vae, encoder, tokenizer, NoiseConfig()).save_pretrained(folder)
    set_scheduler(folder, SCHEDULERS[model])
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"upcast_attention": True}))
    return folder


XL_SCHEDULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"} | dict(list(TURBO.items())[2:])

XL_TURBO = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}


def xl_folder(home: Path) -> Path:
    """SDXL's three levels, unequal depths and heads, two text towers of different widths, two paddings."""
    from dataclasses import replace

    fill = runpy.run_path(str(Path(__file__).parent / "golden" / "make_models.py"))["fill"]
    tokenizers = []
    for name in ("words", "words_2"):
        build_tokenizer(home / name, WORDS)
        if name == "words_2":
            padded_by_zeros(home / name)
        tokenizers.append(load_tokenizer(home / name))
    text = {"vocab_size": len(tokenizers[0]), "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    first = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    second = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    second |= {"hidden_act": "gelu", "projection_dim": 24}
    towers = build_text_encoder(text | first, "tiny"), build_text_encoder(text | second, "tiny", projected=True)
    vae = AutoencoderKL(replace(TINY_VAE, sample_size=16, scaling_factor=0.13025))
    unet, vae, one, two = map(fill, (UNet2DConditionModel(TINY_XL), vae, *towers))
    pipe = StableDiffusionPipeline(unet, vae, one, tokenizers[0], NoiseConfig(), text_encoder_2=two, tokenizer_2=tokenizers[1])
    pipe.save_pretrained(home / "model")
    set_scheduler(home / "model", XL_SCHEDULER)
    return home / "model"


def set_scheduler(folder: Path, values: dict[str, Any]) -> None:
    """Another scheduler in a model's folder."""
    for path, more in (
        (folder / "scheduler" / "scheduler_config.json", values),
        (folder / "model_index.json", {"scheduler": ["diffusers", values["_class_name"]]}),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | more))


def padded_by_zeros(folder: Path) -> None:
    """Make "!", token 0, the padding of a tokenizer, as OpenCLIP has it."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | {"pad_token": "!"}))
