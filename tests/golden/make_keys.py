"""Makes keys.json: how many tensors and parameters diffusers' U-Net of each family has, and a hash of their names and shapes.

    python tests/golden/make_keys.py

The networks are built on the device "meta", which has shapes and no memory. Needs diffusers.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("keys.json")

# unet/config.json of the published models, with the keys that change anything
SD2 = dict(
    block_out_channels=[320, 640, 1280, 1280], layers_per_block=2, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20],
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    use_linear_projection=True, sample_size=64, upcast_attention=True, dual_cross_attention=False, only_cross_attention=False,
)  # fmt: skip
SDXL = dict(
    block_out_channels=[320, 640, 1280], layers_per_block=2, cross_attention_dim=2048, attention_head_dim=[5, 10, 20],
    down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2, up_block_types=["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    transformer_layers_per_block=[1, 2, 10], use_linear_projection=True, sample_size=128, upcast_attention=None,
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip
REFINER = dict(
    block_out_channels=[384, 768, 1536, 1536], layers_per_block=2, cross_attention_dim=1280, attention_head_dim=[6, 12, 24, 24],
    down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    transformer_layers_per_block=4, use_linear_projection=True, sample_size=128, upcast_attention=None,
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2560,
)  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {"SD 2": SD2, "SDXL": SDXL, "SDXL refiner": REFINER}


def summary(state: Mapping[str, Any]) -> dict[str, Any]:
    """Of a state dict: the numbers of tensors and parameters, and the SHA-256 of its sorted lines "name shape"."""
    lines = sorted(f"{name} {list(tensor.shape)}\n" for name, tensor in state.items())
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    return {"tensors": len(state), "parameters": sum(tensor.numel() for tensor in state.values()), "sha256": digest}


def main() -> None:
    import diffusers
    import torch

    with torch.device("meta"):
        unets = {name: diffusers.UNet2DConditionModel(**config) for name, config in CONFIGS.items()}
    FILE.write_text(json.dumps({name: summary(unet.state_dict()) for name, unet in unets.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
