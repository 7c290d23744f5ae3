"""The sizes of SD's networks shrunk to milliseconds. Heads and depths differ between levels, so that none can be mistaken."""

from dataclasses import replace

from minidiff.core.config import UNetConfig, VAEConfig

TINY_UNET = UNetConfig(
    sample_size=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(16, 32),
    layers_per_block=1,
    cross_attention_dim=24,
    attention_head_dim=2,
    norm_num_groups=8,
)
TINY_VAE = VAEConfig(sample_size=32, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
TINY_SD2 = replace(TINY_UNET, attention_head_dim=(2, 4), use_linear_projection=True)
TINY_XL = UNetConfig(
    sample_size=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(16, 32, 48),
    layers_per_block=2,
    cross_attention_dim=40,
    attention_head_dim=(1, 2, 3),
    norm_num_groups=8,
    use_linear_projection=True,
    transformer_layers_per_block=(1, 2, 3),
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=24 + 6 * 8,
)
TINY_REFINER = replace(
    TINY_XL,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(16, 32, 48, 48),
    attention_head_dim=(1, 2, 3, 6),
    transformer_layers_per_block=4,
    projection_class_embeddings_input_dim=24 + 5 * 8,
)
