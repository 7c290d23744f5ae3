"""The sizes of SD 1.5's networks shrunk to milliseconds."""

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
