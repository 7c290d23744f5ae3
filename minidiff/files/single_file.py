"""A whole model in one file, in the LDM layout of CompVis: all networks under one table of names, and nothing else."""

from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from minidiff.core.config import SD2_UNET, SD15_UNET, SD15_VAE, SDXL_UNET, SDXL_VAE, UNetConfig, VAEConfig
from minidiff.core.errors import WeightsError
from minidiff.core.unet import UNet2DConditionModel
from minidiff.core.vae import AutoencoderKL
from minidiff.files import names, weights
from minidiff.files.folder import BIGG_TEXT, SD2_TEXT, SD15_TEXT
from minidiff.files.text_files import from_openclip, to_file_keys, to_openclip
from minidiff.files.weights import TensorFile, TensorInfo


class Family(NamedTuple):
    """The networks of a family's models. `texts`: of each text encoder the beginning of its names, and its config."""

    unet: UNetConfig
    vae: VAEConfig
    texts: dict[str, dict[str, Any]]


FAMILIES = {
    "SDXL": Family(
        SDXL_UNET, SDXL_VAE, {"conditioner.embedders.0.transformer.": SD15_TEXT, "conditioner.embedders.1.model.": BIGG_TEXT}
    ),
    "SD 2": Family(SD2_UNET, SD15_VAE, {"cond_stage_model.model.": SD2_TEXT}),
    "SD 1": Family(SD15_UNET, SD15_VAE, {"cond_stage_model.transformer.": SD15_TEXT}),
}


def family_of(file: TensorFile) -> str:
    """The family of a model in one file, by the names of its last text encoder."""
    lasts = {name: [*family.texts][-1] for name, family in FAMILIES.items()}
    return next((name for name, last in lasts.items() if any(key.startswith(last) for key in file.tensors)), "SD 1")


def split_single_file(
    file: TensorFile, unet_config: UNetConfig = SD15_UNET, vae_config: VAEConfig = SD15_VAE, layers: int = 12
) -> dict[str, TensorFile]:
    """The networks of a single file under minidiff's names; no data is read. What training left behind is left out.

    `layers`: of SD 2's text encoder, whose file has one more.
    """
    texts = [*FAMILIES[family := family_of(file)].texts]
    openclip = [key for key in file.tensors if family != "SD 1" and key.startswith(texts[-1])]
    tables = {
        names.UNET_PREFIX: names.inverse(names.unet_table(unet_config)),
        names.VAE_PREFIX: names.inverse(names.vae_table(vae_config)),
        **dict.fromkeys(texts, dict[str, str]()),
    }
    parts: dict[str, dict[str, TensorInfo]] = {prefix: {} for prefix in tables}
    unknown = []
    for key, info in weights.without_leftovers(file.tensors, file.path, openclip).items():
        if prefix := next((prefix for prefix in tables if key.startswith(prefix)), None):
            parts[prefix][names.rename(key.removeprefix(prefix), tables[prefix])] = info
        else:
            unknown.append(key)
    absent = [prefix for prefix, tensors in parts.items() if not tensors]
    if absent or unknown:
        problems = {"parts missing": absent, "unknown": unknown}
        raise WeightsError(file.misfit(f"{file.path} is no SD 1.x, SD 2.x or SDXL checkpoint in one file.", problems))
    if openclip:
        parts[texts[-1]] = from_openclip(parts[texts[-1]], layers if family == "SD 2" else None)
    networks = ("unet", "vae", "text_encoder", "text_encoder_2")
    return {part: replace(file, tensors=tensors) for part, tensors in zip(networks, parts.values())}


def ldm_tensors(
    unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: nn.Module, text_encoder_2: Any = None
) -> dict[str, Tensor]:
    """The networks under the names of the LDM layout. SD 2 is known by its linear projections; its text is OpenCLIP's."""
    state, openclip = weights.named(text_encoder), unet.config.use_linear_projection and text_encoder_2 is None
    texts = [to_openclip(state) if openclip else to_file_keys(state)]
    texts += [] if text_encoder_2 is None else [to_openclip(weights.named(text_encoder_2))]
    family = FAMILIES["SDXL" if text_encoder_2 is not None else "SD 2" if openclip else "SD 1"]
    tensors = {prefix + key: value for prefix, text in zip(family.texts, texts) for key, value in text.items()}
    table = names.unet_table(unet.config)
    tensors |= {names.UNET_PREFIX + names.rename(key, table): value for key, value in unet.state_dict().items()}
    table = names.vae_table(vae.config)
    for key, value in vae.state_dict().items():
        weight = value[:, :, None, None] if names.is_vae_attention(key) else value
        tensors[names.VAE_PREFIX + names.rename(key, table)] = weight
    return tensors
