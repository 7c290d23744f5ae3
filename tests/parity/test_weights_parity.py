"""Model files against diffusers: folders both ways, and the LDM layout at full size."""

import runpy
from pathlib import Path

import pytest
import torch
from tiny_sizes import TINY_UNET, TINY_VAE
from torch import Tensor

from minidiff.core.config import SD15_UNET, SD15_VAE, UNetConfig, VAEConfig
from minidiff.core.unet import UNet2DConditionModel
from minidiff.core.vae import AutoencoderKL
from minidiff.files import names as keymaps
from minidiff.files.folder import config_values, read_config
from minidiff.files.weights import find_weights, load_into, save

diffusers = pytest.importorskip("diffusers")
single_file_utils = pytest.importorskip("diffusers.loaders.single_file_utils")

CONFIGS = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_keys.py"))["CONFIGS"]
PAIRS = [
    (UNet2DConditionModel, "UNet2DConditionModel", TINY_UNET, SD15_UNET),
    (AutoencoderKL, "AutoencoderKL", TINY_VAE, SD15_VAE),
]


def theirs(name: str, config: UNetConfig | VAEConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    return getattr(diffusers, name).from_config(config_values(config, name))


@pytest.mark.parametrize(("kind", "name", "config", "_"), PAIRS)
def test_a_folder_saved_by_diffusers(tmp_path: Path, kind: type, name: str, config: UNetConfig, _: object) -> None:
    other = theirs(name, config)
    other.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = kind(config)
    load_into(model, find_weights(tmp_path))
    for key, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


@pytest.mark.parametrize(("kind", "name", "config", "_"), PAIRS)
def test_a_folder_for_diffusers(tmp_path: Path, kind: type, name: str, config: UNetConfig, _: object) -> None:
    model, other = kind(config), theirs(name, config)
    other.save_pretrained(tmp_path)
    save(model.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    again, info = getattr(diffusers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, value in again.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def as_ldm(state: dict[str, Tensor], prefix: str, table: dict[str, str]) -> dict[str, Tensor]:
    ldm = {}
    for key, value in state.items():
        ldm[prefix + keymaps.rename(key, table)] = value[:, :, None, None] if keymaps.is_vae_attention(key) else value
    return ldm


@pytest.mark.parametrize(("family", "count"), [("SD 1.5", 686), ("SD 2", 686), ("SDXL", 1680), ("SDXL refiner", 1220)])
def test_ldm_unet_names_at_full_size(family: str, count: int) -> None:
    """diffusers' converter takes minidiff's LDM names back to where they came from, each with its shape."""
    unet_config = SD15_UNET if family == "SD 1.5" else read_config(UNetConfig, CONFIGS[family], family)
    with torch.device("meta"):
        state = UNet2DConditionModel(unet_config).state_dict()
    ldm = as_ldm(state, keymaps.UNET_PREFIX, keymaps.unet_table(unet_config))
    config = {"class_embed_type": None, "addition_embed_type": None, **config_values(unet_config, "UNet2DConditionModel")}
    back = single_file_utils.convert_ldm_unet_checkpoint(ldm, config)
    assert len(back) == count and all(back[key] is state[key] for key in state)


def test_ldm_vae_names_at_full_size() -> None:
    torch.manual_seed(0)
    state = {key: torch.empty_like(value, device="cpu") for key, value in meta_vae().items()}
    ldm = as_ldm(state, keymaps.VAE_PREFIX, keymaps.vae_table(SD15_VAE))
    back = single_file_utils.convert_ldm_vae_checkpoint(ldm, config_values(SD15_VAE, "AutoencoderKL"))
    assert len(back) == 248
    assert all(back[key].data_ptr() == state[key].data_ptr() and back[key].shape == state[key].shape for key in state)


def meta_vae() -> dict[str, Tensor]:
    with torch.device("meta"):
        return AutoencoderKL(SD15_VAE).state_dict()
