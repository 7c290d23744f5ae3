"""A whole model on disk, in and out: a folder in the layout of SD 1.5 on the hub, or one LDM file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from minidiff.core import inject, textual_inversion
from minidiff.core.config import SD15_UNET, SD15_VAE, NoiseConfig, UNetConfig, VAEConfig
from minidiff.core.errors import WeightsError
from minidiff.core.unet import UNet2DConditionModel
from minidiff.core.vae import AutoencoderKL
from minidiff.fast.frozen import cast_layerwise
from minidiff.files import weights
from minidiff.files.folder import (
    MODEL_INDEX,
    SD15_TEXT,
    check_class,
    config_of,
    local_folder,
    read_json,
    sampler_of,
    save_tokenizer,
    scheduler_values,
    write_json,
)
from minidiff.files.text_files import build_text_encoder, load_tokenizer, to_file_keys

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


class ModelParts(NamedTuple):
    """What a pipeline is made of, in the order of its constructor."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: "CLIPTextModel"
    tokenizer: "CLIPTokenizer"
    noise_config: NoiseConfig
    sampler: str
    name_or_path: str


def read_folder(folder: str | Path, torch_dtype: torch.dtype, layerwise_casting: bool = False) -> ModelParts:
    """The folder, or the hub id in the local cache. The VAE is fp32 whatever `torch_dtype` says.

    With `layerwise_casting`, half-precision weights of the U-Net's layers stay as the file has them: see fast/frozen.py.
    Raises WeightsError for anything that is missing, damaged or does not fit.
    """
    home = local_folder(str(folder))
    parts = read_json(home / "model_index.json", "a model folder in the diffusers layout has one")
    check_class(parts, home / "model_index.json")
    with torch.device("meta"):  # no memory and no random numbers: the file's tensors become the weights
        unet = UNet2DConditionModel(UNetConfig.from_dict(*config_of(home / "unet")))
        vae = AutoencoderKL(VAEConfig.from_dict(*config_of(home / "vae")))
        text_encoder = build_text_encoder(*config_of(home / "text_encoder"))
    for model, part, dtype in (
        (unet, "unet", None if layerwise_casting else torch_dtype),
        (vae, "vae", torch.float32),
        (text_encoder, "text_encoder", torch_dtype),
    ):
        weights.load_into(model, weights.find_weights(home / part), dtype)
    if layerwise_casting:
        cast_layerwise(unet, torch_dtype)
    noise, where = config_of(home / "scheduler", "scheduler_config.json")
    sampler, tokenizer = sampler_of(noise, where), load_tokenizer(home / "tokenizer")
    noise_config = NoiseConfig.from_dict(noise, where)
    return ModelParts(frozen(unet), frozen(vae), frozen(text_encoder), tokenizer, noise_config, sampler, str(folder))


def read_single_file(path: str | Path, tokenizer: str | Path, torch_dtype: torch.dtype) -> ModelParts:
    """An SD 1.x checkpoint in one LDM/CompVis `.safetensors` file, which has no vocabulary: `tokenizer` is a folder."""
    files = weights.split_single_file(path)
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(SD15_UNET), AutoencoderKL(SD15_VAE)
        text_encoder = build_text_encoder(SD15_TEXT, "SD 1.5")
    for model, file, dtype in (
        (unet, files.unet, torch_dtype),
        (vae, files.vae, torch.float32),
        (text_encoder, files.text_encoder, torch_dtype),
    ):
        weights.load_into(model, file, dtype)
    words = load_tokenizer(Path(tokenizer))
    return ModelParts(frozen(unet), frozen(vae), frozen(text_encoder), words, NoiseConfig(), "ddim", str(path))


def write_folder(parts: Any, folder: str | Path, dtype: torch.dtype | None) -> None:
    """Write the folder that `read_folder` reads, and diffusers too; `parts` is a pipeline, or ModelParts.

    Raises AdapterError while a LoRA or a new word is attached.
    """
    home = Path(folder)
    inject.check_plain(parts.unet)
    inject.check_plain(parts.text_encoder)
    textual_inversion.check_plain(parts.text_encoder)
    scheduler = scheduler_values(parts.noise_config, parts.sampler)
    text_config = dict(sorted({**parts.text_encoder.config.to_diff_dict(), "architectures": ["CLIPTextModel"]}.items()))
    for part, model, config in (
        ("unet", parts.unet, parts.unet.config.to_dict("UNet2DConditionModel")),
        ("vae", parts.vae, parts.vae.config.to_dict("AutoencoderKL")),
        ("text_encoder", parts.text_encoder, text_config),
    ):
        state = to_file_keys(model.state_dict()) if part == "text_encoder" else model.state_dict()
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        tensors = {key: tensor.to(dtype or tensor.dtype) for key, tensor in state.items()}
        weights.save(tensors, home / part / f"{stem}.safetensors")
        write_json(home / part / "config.json", config)
    write_json(home / "scheduler" / "scheduler_config.json", scheduler)
    save_tokenizer(parts.tokenizer, home / "tokenizer")
    write_json(home / "model_index.json", MODEL_INDEX | {"scheduler": ["diffusers", scheduler["_class_name"]]})


def check_parts_fit(parts: Any) -> None:
    """The widths at which the networks meet; each alone may be sound, and yet from another model."""
    of = f"{parts.name_or_path}: the" if parts.name_or_path else "the"
    words, table = len(parts.tokenizer), parts.text_encoder.config.vocab_size
    if words != table:  # a smaller tokenizer would not fail: its ids mean other words, and the picture is another
        raise WeightsError(f"{of} tokenizer has {words} tokens and the text encoder {table}; they are from different models.")
    width, reads = parts.text_encoder.config.hidden_size, parts.unet.config.cross_attention_dim
    if width != reads:
        raise WeightsError(f"{of} text encoder is {width} wide and the U-Net reads {reads}; they are from different models.")
    channels, latent = parts.unet.config.in_channels, parts.vae.config.latent_channels
    if channels not in (latent, 2 * latent + 1):  # 9: noisy latents, the mask, and the latents of the masked picture
        what = {8: "an image-editing model", 5: "a depth model"}.get(channels, "another model")
        raise WeightsError(
            f"{of} U-Net has {channels} input channels ({what}); minidiff draws with {latent}, or {2 * latent + 1} for "
            "inpainting. Take such a model."
        )


def frozen(model: Any) -> Any:
    """For use, not for training: nothing asks for gradients until something is added."""
    nn.Module.requires_grad_(model, False)
    return model.eval()
