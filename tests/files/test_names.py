"""The names in other programs' files: the LDM map is exact in both directions, and files are recognised."""

import pytest
import torch
from tiny_sizes import TINY_UNET, TINY_VAE
from torch import Tensor, nn

from minidiff.core.config import SD15_UNET, SD15_VAE, UNetConfig
from minidiff.core.unet import UNet2DConditionModel
from minidiff.core.vae import AutoencoderKL
from minidiff.files import looks
from minidiff.files import names as keymaps


def build_on_meta(kind: type[nn.Module], config: UNetConfig) -> nn.Module:
    with torch.device("meta"):
        return kind(config)


@pytest.mark.parametrize(
    ("kind", "config", "table", "count"),
    [
        (UNet2DConditionModel, SD15_UNET, keymaps.unet_table(SD15_UNET), 686),
        (AutoencoderKL, SD15_VAE, keymaps.vae_table(SD15_VAE), 248),
        (UNet2DConditionModel, TINY_UNET, keymaps.unet_table(TINY_UNET), None),
        (AutoencoderKL, TINY_VAE, keymaps.vae_table(TINY_VAE), None),
    ],
)
def test_the_key_map_is_a_bijection(kind: type[nn.Module], config: UNetConfig, table: dict, count: int | None) -> None:
    keys = list(build_on_meta(kind, config).state_dict())
    theirs = [keymaps.rename(key, table) for key in keys]
    assert count in (len(keys), None)
    assert len(set(theirs)) == len(keys)
    assert [keymaps.rename(key, keymaps.inverse(table)) for key in theirs] == keys
    assert len(set(table.values())) == len(table)


LDM_NAMES = {  # facts about v1-5-pruned-emaonly.safetensors, one for each rule
    "conv_in.weight": "input_blocks.0.0.weight",
    "time_embedding.linear_2.bias": "time_embed.2.bias",
    "down_blocks.0.resnets.1.norm1.weight": "input_blocks.2.0.in_layers.0.weight",
    "down_blocks.1.resnets.0.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
    "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_out.0.bias": (
        "input_blocks.8.1.transformer_blocks.0.attn2.to_out.0.bias"
    ),
    "down_blocks.2.downsamplers.0.conv.weight": "input_blocks.9.0.op.weight",
    "down_blocks.3.resnets.1.time_emb_proj.weight": "input_blocks.11.0.emb_layers.1.weight",
    "mid_block.attentions.0.proj_in.weight": "middle_block.1.proj_in.weight",
    "mid_block.resnets.1.conv2.weight": "middle_block.2.out_layers.3.weight",
    "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
    "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
    "up_blocks.3.attentions.2.norm.weight": "output_blocks.11.1.norm.weight",
    "conv_norm_out.weight": "out.0.weight",
    "conv_out.weight": "out.2.weight",
}
LDM_VAE_NAMES = {
    "encoder.conv_norm_out.bias": "encoder.norm_out.bias",
    "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": "encoder.down.1.block.0.nin_shortcut.weight",
    "encoder.down_blocks.2.downsamplers.0.conv.bias": "encoder.down.2.downsample.conv.bias",
    "encoder.mid_block.resnets.1.norm2.weight": "encoder.mid.block_2.norm2.weight",
    "decoder.mid_block.attentions.0.group_norm.weight": "decoder.mid.attn_1.norm.weight",
    "decoder.mid_block.attentions.0.to_out.0.weight": "decoder.mid.attn_1.proj_out.weight",
    "decoder.up_blocks.0.resnets.2.conv1.weight": "decoder.up.3.block.2.conv1.weight",
    "decoder.up_blocks.2.upsamplers.0.conv.weight": "decoder.up.1.upsample.conv.weight",
    "post_quant_conv.weight": "post_quant_conv.weight",
}


@pytest.mark.parametrize("ours", [*LDM_NAMES, *LDM_VAE_NAMES])
def test_ldm_names_of_sd15(ours: str) -> None:
    table = keymaps.unet_table(SD15_UNET) if ours in LDM_NAMES else keymaps.vae_table(SD15_VAE)
    assert keymaps.rename(ours, table) == (LDM_NAMES | LDM_VAE_NAMES)[ours]


def one(*shape: int) -> Tensor:
    return torch.zeros(shape)


UNET, TO_K = "model.diffusion_model.", "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
VAE, TEXT = {"first_stage_model.quant_conv.weight": one(1)}, {"cond_stage_model.transformer.text_model.x": one(1)}
SINGLE = {UNET + TO_K: one(2, 768), UNET + "input_blocks.0.0.weight": one(2, 4, 3, 3)}
LOOKS = {
    "SD 1.x single": (SINGLE | VAE | TEXT, "an SD 1.x single file in the LDM layout"),
    "inpainting": (SINGLE | {UNET + "input_blocks.0.0.weight": one(2, 9, 3, 3)}, "an SD 1.x inpainting single file"),
    "SD 2 single": (SINGLE | {"cond_stage_model.model.ln_final.weight": one(2)}, "an SD 2.x single file"),
    "SDXL single": (SINGLE | {"conditioner.embedders.0.x": one(2)}, "an SDXL single file in the LDM layout"),
    "SD 2 U-Net": (
        {
            "conv_in.weight": one(2, 4, 3, 3),
            "time_embedding.linear_1.bias": one(2),
            "mid.attn2.to_k.weight": one(2, 1024),
        },
        "an SD 2.x U-Net in the diffusers layout",
    ),
    "bare LDM U-Net": (
        {TO_K: one(2, 768), "input_blocks.0.0.weight": one(2, 8, 3, 3)},
        "SD 1.x InstructPix2Pix U-Net in",
    ),
    "LDM VAE": ({"decoder.mid.block_1.norm1.weight": one(2)}, "a VAE in the LDM layout"),
    "ControlNet": ({"controlnet_cond_embedding.conv_in.weight": one(2)}, "a ControlNet"),
    "CLIP": ({"text_model.embeddings.token_embedding.weight": one(9, 768)}, "a CLIP text encoder of width 768"),
    "CLIP both": ({"vision_model.x": one(2), "text_model.x": one(2)}, "a CLIP model with an image encoder"),
    "embedding": ({"<cat-toy>": one(1, 768)}, "a textual inversion embedding of width 768"),
    "nothing known": ({"a.b": one(2, 2, 2)}, 'nothing that minidiff knows: 1 tensors, the first is "a.b"'),
    "no tensors": ({}, "an empty file"),
}


@pytest.mark.parametrize("name", LOOKS)
def test_what_a_file_looks_like(name: str) -> None:
    tensors, words = LOOKS[name]
    assert words in looks.describe(tensors)


@pytest.mark.parametrize(
    "key", ["x.attn2.to_k.weight", "conv_in.weight", "input_blocks.0.0.weight", "text_model.embeddings.token_embedding.weight"]
)
@pytest.mark.parametrize("shape", [(), (3,)])
def test_tensors_without_the_axes_that_tell(key: str, shape: tuple[int, ...]) -> None:
    tensors = {key: torch.ones(shape), "time_embedding.x": torch.ones(1)}
    assert looks.describe(tensors) and looks.cross_attention_width(tensors) is None
