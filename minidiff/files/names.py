"""The names of a model's tensors in other programs' files.

    diffusers   down_blocks.0.resnets.1.norm1.weight              one file for each network; minidiff's own names
    LDM         model.diffusion_model.input_blocks.2.0.in_layers.0.weight     CompVis, A1111, ComfyUI: everything in one

LDM numbers the U-Net's layers from first to last, where diffusers nests blocks and layers. So the map between the two is
a table of module prefixes, made for given numbers of levels and layers, and read in either direction.
"""

import re
from collections.abc import Mapping
from functools import cache

from minidiff.core.config import ControlNetConfig, UNetConfig, VAEConfig
from minidiff.files.text_files import PREFIX as CLIP

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
NOT_NEEDED = re.compile(  # left by training: averages, losses, managers of words, CLIP's own scales; names without a dot
    r"(?P<table>(?:first_stage_model\.)?(?:loss|model_ema)|embedding_manager|denoiser|optimizer\w*|lr_scheduler\w*)\..+|"
    r"(?:cond_stage_model\.)?(?:transformer\.|model\.)?(?:text_model\.)?(?:logit_scale|text_projection(?:\.weight)?)|"
    r"(?:.*\.)?embeddings\.position_ids|[^.]+"
)
NO_WEIGHTS = re.compile(  # of these: the tables of the noise schedule, and the numbers 0 to 76
    r"betas|\w*alphas_cumprod\w*|posterior_\w+|lvlb_weights|logvar|scale_factor|.*position_ids"
)

RESNET = {  # diffusers -> LDM, inside one ResBlock of the U-Net
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


@cache
def unet_table(config: UNetConfig) -> dict[str, str]:
    """Module prefixes of the U-Net, diffusers -> LDM."""
    down, up, n = config.down_block_types, config.up_block_types, config.layers_per_block
    inputs, outputs = [["conv_in"]], list[list[str]]()  # the modules of each of LDM's layers
    for i, kind in enumerate(down):
        inputs += [layer(f"down_blocks.{i}", j, kind) for j in range(n)]
        inputs += [[f"down_blocks.{i}.downsamplers.0"]] if i + 1 < len(down) else []
    for i, kind in enumerate(up):
        outputs += [layer(f"up_blocks.{i}", j, kind) for j in range(n + 1)]
        outputs[-1] += [f"up_blocks.{i}.upsamplers.0"] if i + 1 < len(up) else []  # LDM has no layer for it alone
    table = {"conv_norm_out": "out.0", "conv_out": "out.2"}
    table |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    if config.addition_embed_type:
        table |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    blocks = {f"mid_block.{ours}": f"middle_block.{m}" for m, ours in enumerate(("resnets.0", "attentions.0", "resnets.1"))}
    for way, layers in (("input_blocks", inputs), ("output_blocks", outputs)):
        blocks |= {ours: f"{way}.{k}.{m}" for k, modules in enumerate(layers) for m, ours in enumerate(modules)}
    for ours, theirs in blocks.items():
        inside = RESNET if ".resnets." in ours else {"conv": "op"} if ".downsamplers." in ours else {}
        table |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in inside.items()} or {ours: theirs}
    return table


def layer(block: str, j: int, kind: str) -> list[str]:
    """The modules of a block's layer j, in diffusers' names."""
    return [f"{block}.resnets.{j}", *([f"{block}.attentions.{j}"] if "CrossAttn" in kind else [])]


def controlnet_table(config: ControlNetConfig) -> dict[str, str]:
    """Module prefixes of a ControlNet, diffusers -> LDM: the U-Net's way down, and what a ControlNet alone has."""
    up = ("up_blocks.", "conv_norm_out", "conv_out")
    table = {ours: theirs for ours, theirs in unet_table(config).items() if not ours.startswith(up)}
    skips = len(config.down_block_types) * (config.layers_per_block + 1)
    table |= {f"controlnet_down_blocks.{k}": f"zero_convs.{k}.0" for k in range(skips)}
    convs = 2 * len(config.conditioning_embedding_out_channels) - 2
    hint = ["conv_in", *(f"blocks.{j}" for j in range(convs)), "conv_out"]
    table |= {f"controlnet_cond_embedding.{ours}": f"input_hint_block.{2 * i}" for i, ours in enumerate(hint)}
    return table | {"controlnet_mid_block": "middle_block_out.0"}


def vae_table(config: VAEConfig) -> dict[str, str]:
    """Module prefixes of the VAE, diffusers -> LDM. LDM numbers the decoder's levels from the picture's side."""
    layers, last = config.layers_per_block, len(config.block_out_channels) - 1
    table: dict[str, str] = {}
    for half in ("encoder", "decoder"):
        table |= {f"{half}.conv_norm_out": f"{half}.norm_out"}
        table |= {f"{half}.mid_block.resnets.{j}": f"{half}.mid.block_{j + 1}" for j in range(2)}
        table |= {f"{half}.mid_block.attentions.0.{a}": f"{half}.mid.attn_1.{b}" for a, b in VAE_ATTENTION.items()}
    for i in range(last + 1):
        levels = ((f"encoder.down_blocks.{i}", f"encoder.down.{i}"), (f"decoder.up_blocks.{i}", f"decoder.up.{last - i}"))
        for ours, theirs in levels:
            for j in range(layers + ours.startswith("decoder")):
                table[f"{ours}.resnets.{j}"] = f"{theirs}.block.{j}"
                table[f"{ours}.resnets.{j}.conv_shortcut"] = f"{theirs}.block.{j}.nin_shortcut"
        if i < last:
            table[f"encoder.down_blocks.{i}.downsamplers.0"] = f"encoder.down.{i}.downsample"
            table[f"decoder.up_blocks.{i}.upsamplers.0"] = f"decoder.up.{last - i}.upsample"
    return table


def rename(key: str, table: Mapping[str, str]) -> str:
    """Replace the longest prefix of `key` that is in the table; a key without one stays as it is."""
    words = key.split(".")
    for n in range(len(words), 0, -1):
        if prefix := table.get(".".join(words[:n])):
            return ".".join([prefix, *words[n:]])
    return key


def inverse(table: Mapping[str, str]) -> dict[str, str]:
    """LDM -> diffusers. Exact, because no two prefixes share a value."""
    return {theirs: ours for ours, theirs in table.items()}


def is_vae_attention(key: str) -> bool:
    """Is it a weight that LDM stores as a 1x1 convolution (C, C, 1, 1) and diffusers as a linear layer (C, C)?"""
    return bool(re.search(r"mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight$", key))


OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # SD 1.4 and 1.5 repos


def modern(key: str) -> str:
    """One name for a tensor from a file of any year: the new attention names, CLIP without `text_model.`"""
    if old := re.search(r"mid_block\.attentions\.0\.(query|key|value|proj_attn)\.", key):
        key = key.replace(f".{old[1]}.", f".{OLD_VAE_ATTENTION[old[1]]}.")
    return key.removeprefix(CLIP)
