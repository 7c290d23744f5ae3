"""The sizes of the networks and of the noise. Field names are those of the published models.

SD 1.5 (the defaults), SD 2, SDXL and the pocket checkpoint differ in these numbers and in nothing else.
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class UNetConfig:
    """The denoiser. `attention_head_dim` is the NUMBER of heads: all SD files repeat this old mistake in the name.

    The number of heads and of transformer layers is the same for all levels, or there is one number for each level.
    """

    sample_size: int = 64  # side of the latents in training
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    attention_head_dim: int | tuple[int, ...] = 8
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False  # around the transformers; SD 1.x has 1x1 convolutions
    transformer_layers_per_block: int | tuple[int, ...] = 1  # TransformerBlocks in a row
    addition_embed_type: Literal["text_time"] | None = None  # SDXL: the U-Net also reads a vector; see text.py
    addition_time_embed_dim: int | None = None  # the width in which each size in this vector is embedded
    projection_class_embeddings_input_dim: int | None = None  # the width of this vector


@dataclass(frozen=True)
class ControlNetConfig(UNetConfig):
    """A ControlNet: the way down of a U-Net, with a picture as its condition. It has no way up, whose settings mean nothing."""

    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)  # widths at the sides H, H/2, H/4, H/8
    controlnet_conditioning_channel_order: Literal["rgb", "bgr"] = "rgb"
    global_pool_conditions: bool = False  # add only means over all places: then the layout is free


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder. For the denoiser, latents are multiplied by `scaling_factor`: 1 / their standard deviation."""

    sample_size: int = 512
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True  # not for the network: it tells programs for SDXL that half precision is too coarse

    @property
    def downscale(self) -> int:
        """Pixels per latent cell, along one side: 8 for four levels."""
        return int(2 ** (len(self.block_out_channels) - 1))


@dataclass(frozen=True)
class NoiseConfig:
    """The noise schedule of training (schedule.py), and the timesteps that samplers take by default (grids.py)."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    steps_offset: int = 1  # is added to the timesteps of "leading"
    set_alpha_to_one: bool = False  # DDIM and PNDM end without noise; else with the noise of the first timestep
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None  # None: the sampler's own default
    use_karras_sigmas: bool = False
    rescale_betas_zero_snr: bool = False  # the last timestep of training is pure noise


SD15_UNET, SD15_VAE = UNetConfig(), VAEConfig()
SDXL_VAE = replace(SD15_VAE, sample_size=1024, scaling_factor=0.13025)
SD2_UNET = replace(SD15_UNET, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
SDXL_UNET = replace(
    SD2_UNET, sample_size=128, cross_attention_dim=2048, attention_head_dim=(5, 10, 20), block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2, transformer_layers_per_block=(1, 2, 10),
    up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",), addition_embed_type="text_time",
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip
