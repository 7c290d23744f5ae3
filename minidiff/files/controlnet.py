"""ControlNets on disk: folders as diffusers writes them, and single files with LDM's names, as A1111 and ComfyUI read them.

    config.json, diffusion_pytorch_model.safetensors      a folder
    control_v11p_sd15_canny.safetensors                   `control_model.input_blocks.…`, …; v1.0 beside a whole SD model
    (other programs' files)                               the same without `control_model.`, or with diffusers' names
"""

import re
from dataclasses import asdict, replace
from pathlib import Path

import torch

from minidiff.core.config import SD2_UNET, SD15_UNET, SDXL_UNET, ControlNetConfig, UNetConfig
from minidiff.core.controlnet import ControlNetModel
from minidiff.core.errors import WeightsError
from minidiff.files import names, weights
from minidiff.files.folder import config_of, config_values, local_folder, read_config, write_json
from minidiff.files.looks import CONTROL_FORMS, cross_attention_width, form_of
from minidiff.files.weights import TensorFile

CLASS, FILE, PREFIX = "ControlNetModel", "diffusion_pytorch_model.safetensors", "control_model."
SIZES = {768: SD15_UNET, 1024: SD2_UNET, 2048: SDXL_UNET}  # by the width of the text: those of single files
HINT = re.compile(r"(?:input_hint_block|controlnet_cond_embedding\.(?:conv_in|blocks))\.(?:(\d+)\.)?weight")


def read_controlnet(
    path: str | Path, dtype: torch.dtype | None = torch.float32, like: UNetConfig | None = None
) -> ControlNetModel:
    """The ControlNet of a folder, a hub id in the local cache or a single file; frozen. WeightsError for anything else.

    `like`: the U-Net's sizes for a single file of another family than SD 1.x, SD 2.x and SDXL.
    """
    place = Path(path) if Path(path).exists() else local_folder(str(path))
    file = weights.read_header(weights.find_weights(place))
    if (form := form_of(file.tensors, CONTROL_FORMS)) != "ControlNet":
        what = f"a {form}" if form else "no ControlNet"
        raise WeightsError(file.misfit(f"{file.path} is {what}; minidiff reads ControlNets whose tensors are all in the file."))
    home = place if place.is_dir() else place.parent
    if any(key.startswith(PREFIX) for key in file.tensors):  # a v1.0 file also has the model that it was trained with
        own = {key.removeprefix(PREFIX): info for key, info in file.tensors.items() if key.startswith(PREFIX)}
        file = replace(file, tensors=own)
    ours = any(key.startswith("controlnet_") for key in file.tensors)
    if ours and (home / "config.json").is_file():
        values, where = config_of(home)
        up = {"up_block_types": ["UpBlock2D"] * len(values.get("down_block_types", ()))}
        config = read_config(ControlNetConfig, values | up, where)
    else:
        config = sizes_of(file, like)
    if not ours:
        table = names.inverse(names.controlnet_table(config))
        file = replace(file, tensors={names.rename(key, table): info for key, info in file.tensors.items()})
    with torch.device("meta"):
        net = ControlNetModel(config)
    weights.load_into(net, file, dtype)
    return net.requires_grad_(False).eval()


def sizes_of(file: TensorFile, like: UNetConfig | None) -> ControlNetConfig:
    """The sizes of a ControlNet without a config.json, from those of its family's U-Net and its own hint encoder."""
    unet = SIZES.get(cross_attention_width(file.tensors) or 0, like)
    if unet is None:
        raise WeightsError(file.misfit(f"{file.path}: its sizes are not known; give the folder with its config.json."))
    convs = sorted((int(found[1] or -1), key) for key in file.tensors if (found := HINT.fullmatch(key)))
    widths = tuple(file.tensors[key].shape[0] for _, key in convs[::2])  # each width has two, one of which may halve the side
    return ControlNetConfig(**asdict(unet) | {"conditioning_embedding_out_channels": widths})


def write_controlnet(net: ControlNetModel, place: Path, dtype: torch.dtype | None = None) -> None:
    """As a folder for `read_controlnet` and diffusers; or, if the name ends in .safetensors, as a file with LDM's names."""
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in net.state_dict().items()}
    if place.suffix == ".safetensors":
        table = names.controlnet_table(net.config)
        return weights.save({PREFIX + names.rename(key, table): tensor for key, tensor in tensors.items()}, place)
    weights.save(tensors, place / FILE)
    write_json(place / "config.json", config_values(net.config, CLASS))
