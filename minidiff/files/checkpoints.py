"""A whole model of either layout, with the weights just as its files have them: for what reads, changes and writes models.

    read_model("checkpoints/pocket")                              a folder in the diffusers layout
    read_model("sd15.safetensors")                                a single file in the LDM layout, SD 1.x
    read_model("pocket.safetensors", like="checkpoints/pocket")   a single file of another architecture

`pipeline.py` loads models to draw with: it picks the dtypes, and needs a tokenizer. Here neither is so.

Shapes: any; only names and sizes are looked at.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from minidiff.core.config import SD15_UNET, SD15_VAE, UNetConfig, VAEConfig
from minidiff.core.errors import WeightsError
from minidiff.core.unet import UNet2DConditionModel
from minidiff.core.vae import AutoencoderKL
from minidiff.files import names as keymaps
from minidiff.files.folder import SD15_TEXT, check_class, config_of, local_folder, read_json
from minidiff.files.text_files import build_text_encoder
from minidiff.files.weights import find_weights, is_finite, load_into, split_single_file

if TYPE_CHECKING:
    from transformers import CLIPTextModel

SINGLE_FILE = ".safetensors"


@dataclass(frozen=True)
class Model:
    """The three networks. `home`: the folder with vocabulary and schedule, where one is known."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: "CLIPTextModel"
    home: Path | None

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}

    @property
    def adaptable(self) -> dict[str, nn.Module]:
        """The networks that adapters change."""
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    def weights(self) -> dict[str, Tensor]:
        """Every tensor, by network and minidiff's name; the tensors themselves, not copies."""
        return {
            f"{part}.{keymaps.modern(key)}": tensor
            for part, model in self.networks.items()
            for key, tensor in model.state_dict().items()
        }


def empty_model(name: str | Path | None) -> Model:
    """A model of the sizes that a folder (or hub id) says, or of SD 1.5's; it has shapes and no numbers."""
    home = None if name is None else local_folder(str(name))
    if home:
        index = home / "model_index.json"
        check_class(read_json(index, "a model folder in the diffusers layout has one"), index)
    with torch.device("meta"):
        if home is None:
            return Model(
                UNet2DConditionModel(SD15_UNET), AutoencoderKL(SD15_VAE), build_text_encoder(SD15_TEXT, "SD 1.5"), None
            )
        unet = UNet2DConditionModel(UNetConfig.from_dict(*config_of(home / "unet")))
        vae = AutoencoderKL(VAEConfig.from_dict(*config_of(home / "vae")))
        return Model(unet, vae, build_text_encoder(*config_of(home / "text_encoder")), home)


def read_model(name: str | Path, like: str | Path | None = None) -> Model:
    """A model folder, a hub id in the local cache, or a single file; each tensor keeps its dtype.

    A single file does not say how its networks are built. It is taken for SD 1.x, or for what `like`, a folder, is.
    """
    if is_single_file(name):
        model = empty_model(like)
        files = split_single_file(name, model.unet.config, model.vae.config)
        for part, network in model.networks.items():
            load_into(network, getattr(files, part))
    else:
        model = empty_model(name)
        assert model.home is not None  # of the folder just named
        for part, network in model.networks.items():
            load_into(network, find_weights(model.home / part))
    return model


def is_single_file(name: str | Path) -> bool:
    return Path(name).is_file() or Path(name).suffix == SINGLE_FILE


def cast(model: Model, dtype: torch.dtype) -> None:
    """All weights to another dtype, in place; WeightsError for a number that it cannot hold."""
    for key, tensor in model.weights().items():
        if not is_finite(tensor.to(dtype)):
            raise WeightsError(f"{key} has numbers too large for {dtype}; take bfloat16 or float32.")
    for network in model.networks.values():
        network.to(dtype)
