"""IP-Adapter files, and the image tower that looks at pictures for them.

    ip-adapter_sd15.safetensors    `image_proj.proj.weight`, …, `ip_adapter.1.to_k_ip.weight`, …
    ip-adapter_sd15.bin            the same in two tables, as a pickle
    image_encoder/                 config.json, model.safetensors; perhaps preprocessor_config.json

The names of the tensors are the attributes in core/ip_adapter.py.
"""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import nn

from minidiff.core.errors import WeightsError
from minidiff.core.ip_adapter import ImageProjection, IPAdapter, Resampler, full_projection
from minidiff.core.unet import UNet2DConditionModel
from minidiff.files import weights
from minidiff.files.atomic import PICKLES, called
from minidiff.files.convert import read_pickle
from minidiff.files.folder import config_of, read_json
from minidiff.files.looks import IP_FORMS, HasShape, cross_attention_width, family, form_of

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

NOT_HERE = {  # forms that are told apart and not read: what they need
    "FaceID": "an embedding of the face by insightface's ArcFace network, and a LoRA in the same file",
    "FaceID plus": "an embedding of the face by insightface's ArcFace network beside CLIP's, and a LoRA in the same file",
    "InstantID": "an embedding of the face by insightface's antelopev2, and a ControlNet of the face's five points, for SDXL",
    "PhotoMaker": "SDXL, an image tower of its own that is fused into the prompt's words, and a LoRA in the same file",
}
NO_TOWER = (
    "{}: no image encoder here; the pocket checkpoint has one, SD 1.5 has not. Its IP-Adapters read CLIP ViT-H/14, the folder "
    "models/image_encoder of h94/IP-Adapter: give it with --image_encoder, in Python image_encoder_folder."
)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Pixels = tuple[int, tuple[float, ...], tuple[float, ...]]  # side of the tower's pictures; mean and std of their colours


def load_ip_adapter(path: Path, unet: UNet2DConditionModel) -> IPAdapter:
    """The adapter of a file, for this U-Net. WeightsError for another form or family, and for a file that is not whole."""
    with TemporaryDirectory() as scratch:
        opened = Path(scratch, f"{path.stem}.safetensors") if path.suffix in PICKLES else path
        with called(opened, path):
            if opened != path:
                weights.save(read_pickle(path), opened)
            file, reads = weights.read_header(opened), unet.config.cross_attention_dim
            form = form_of(file.tensors, IP_FORMS)
            if form is None:
                raise WeightsError(f"{path} is no IP-Adapter; it looks like {file.looks_like}.")
            if form in NOT_HERE:
                raise WeightsError(f"{path}: minidiff does not draw with the form {form}. It needs {NOT_HERE[form]}.")
            if cross_attention_width(file.tensors) not in (reads, None):
                raise WeightsError(f"{path} is {file.looks_like}; this model needs one for {family(reads)}.")
            try:
                adapter = IPAdapter(projection(form, file.tensors), unet)
            except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
                raise WeightsError(f"{path} is not whole: {error} is missing or misshapen. Get it again.") from error
            weights.load_into(adapter, file, torch.float32)
    return adapter.requires_grad_(False).eval()


def projection(form: str, tensors: Mapping[str, HasShape]) -> nn.Module:
    """The network of `image_proj`, in the sizes of a file."""
    shape = {name.removeprefix("image_proj."): tensor.shape for name, tensor in tensors.items()}
    if form == "base":
        (rows, e_width), (width,) = shape["proj.weight"], shape["norm.weight"]
        return ImageProjection(e_width, width, rows // width)
    if form == "full-face":
        return full_projection(shape["proj.0.weight"][1], shape["proj.2.weight"][0])
    (_, tokens, inner), (width, _), (_, e_width) = (shape[name] for name in ("latents", "proj_out.weight", "proj_in.weight"))
    depth = sum(name.endswith("to_q.weight") for name in shape)
    return Resampler(e_width, width, tokens, inner, shape["layers.0.0.to_q.weight"][0] // 64, depth)


def load_image_tower(*places: Path) -> "tuple[CLIPVisionModelWithProjection, Pixels]":
    """CLIP's image tower from the first of these folders that has one, frozen; and how it reads pictures."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    if (folder := next((place for place in places if (place / "config.json").is_file()), None)) is None:
        raise WeightsError(NO_TOWER.format(", ".join(map(str, dict.fromkeys(places)))))
    values, where = config_of(folder)
    try:
        with torch.device("meta"):
            tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**values))
        side = int(tower.config.image_size)  # type: ignore[arg-type]
    except Exception as error:  # transformers raises anything for numbers that build no network
        raise WeightsError(f"{where}: not a usable image encoder: {error}. Copy the file again.") from error
    weights.load_into(tower, weights.find_weights(folder), torch.float32)
    colours = folder / "preprocessor_config.json"
    said = read_json(colours, "it says how pictures become numbers") if colours.exists() else {}
    return tower.requires_grad_(False).eval(), (side, said.get("image_mean", CLIP_MEAN), said.get("image_std", CLIP_STD))
