"""The sizes of the networks and of the noise. Field names are the keys of the `config.json` files in a model's folder.

SD 1.5 (the defaults), SD 2, SDXL, the pocket checkpoint and the tiny test model differ in these numbers and in nothing else.
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class UNetConfig:
    """The denoiser. `attention_head_dim` is the NUMBER of heads: an old mistake in the name that all SD files repeat.

    Heads and transformer layers are one number for all levels, or a number for each.
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
    addition_embed_type: Literal["text_time"] | None = None  # SDXL: the U-Net also reads a vector
    addition_time_embed_dim: int | None = None  # sinusoids for each number in that vector
    projection_class_embeddings_input_dim: int | None = None  # the width of that vector


@dataclass(frozen=True)
class ControlNetConfig(UNetConfig):
    """A ControlNet: the way down of that U-Net, and a picture as its condition. Settings of the way up mean nothing."""

    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)  # widths: at first, then at 1/2, 1/4, 1/8
    controlnet_conditioning_channel_order: Literal["rgb", "bgr"] = "rgb"
    global_pool_conditions: bool = False  # add the mean over all places, so that the layout is not held


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder. Latents are multiplied by `scaling_factor`, 1 / their standard deviation, for the denoiser."""

    sample_size: int = 512
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True  # only SDXL's programs read it

    @property
    def downscale(self) -> int:
        """Pixels per latent cell, along one side: 8 for four levels."""
        return int(2 ** (len(self.block_out_channels) - 1))


@dataclass(frozen=True)
class NoiseConfig:
    """The noise schedule of training."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None  # None: the sampler's own default
    use_karras_sigmas: bool = False
    rescale_betas_zero_snr: bool = False


SD15_UNET, SD15_VAE = UNetConfig(), VAEConfig()
SDXL_VAE = replace(SD15_VAE, sample_size=1024, scaling_factor=0.13025)
SD2_UNET = replace(SD15_UNET, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
SDXL_UNET = replace(
    SD2_UNET, sample_size=128, cross_attention_dim=2048, attention_head_dim=(5, 10, 20), block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2, transformer_layers_per_block=(1, 2, 10),
    up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",), addition_embed_type="text_time",
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip
