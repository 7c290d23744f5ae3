"""ControlNets on disk: folders as diffusers writes them."""

from pathlib import Path

import torch

from minidiff.core.config import ControlNetConfig
from minidiff.core.controlnet import ControlNetModel
from minidiff.files import weights
from minidiff.files.folder import config_of, config_values, read_config, write_json

CLASS, FILE = "ControlNetModel", "diffusion_pytorch_model.safetensors"


def read_controlnet(path: str | Path, dtype: torch.dtype = torch.float32) -> ControlNetModel:
    """The ControlNet of a folder, frozen."""
    folder = Path(path)
    values, where = config_of(folder)
    without_up = {"up_block_types": ["UpBlock2D"] * len(values.get("down_block_types", ()))}
    with torch.device("meta"):
        net = ControlNetModel(read_config(ControlNetConfig, values | without_up, where))
    weights.load_into(net, weights.read_header(weights.find_weights(folder)), dtype)
    return net.requires_grad_(False).eval()


def write_controlnet(net: ControlNetModel, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """The folder that `read_controlnet` and diffusers read."""
    weights.save({name: tensor.to(dtype) for name, tensor in net.state_dict().items()}, folder / FILE)
    write_json(folder / "config.json", config_values(net.config, CLASS))
