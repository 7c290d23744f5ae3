"""The sizes of the three networks and of the noise, as frozen dataclasses.

Field names are the keys of the `config.json` files in an SD 1.5 folder. SD 1.5, the pocket checkpoint and the tiny test model
differ in these numbers and in nothing else.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class UNetConfig:
    """The denoiser. `attention_head_dim` is the NUMBER of heads: an old mistake in the name that all SD files repeat."""

    sample_size: int = 64  # side of the latents in training
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    attention_head_dim: int = 8
    norm_num_groups: int = 32
    norm_eps: float = 1e-5


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
    """The noise schedule of training. The defaults are SD 1.5's."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # or "linear"
    prediction_type: str = "epsilon"  # or "v_prediction"
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    timestep_spacing: str | None = None  # "leading", "linspace", "trailing"; None: the sampler's own default
    use_karras_sigmas: bool = False
    rescale_betas_zero_snr: bool = False

    def problem(self) -> str | None:
        """Why no schedule can be made of these settings; None if one can."""
        if self.beta_schedule not in ("scaled_linear", "linear"):
            return f"beta_schedule {self.beta_schedule!r} is unknown; it is scaled_linear or linear"
        if self.prediction_type not in ("epsilon", "v_prediction"):
            return f"prediction_type {self.prediction_type!r} is unknown; it is epsilon or v_prediction"
        if self.timestep_spacing not in (None, "leading", "linspace", "trailing"):
            return f"timestep_spacing {self.timestep_spacing!r} is unknown; it is leading, linspace or trailing"
        if self.rescale_betas_zero_snr and self.prediction_type != "v_prediction":  # pure noise: eps does not say what x0 is
            return "rescale_betas_zero_snr is true and prediction_type is epsilon; it needs v_prediction"
        if not self.beta_start <= self.beta_end < 1:
            return f"beta_start {self.beta_start} and beta_end {self.beta_end} must rise and stay below 1"
        return None


SD15_UNET, SD15_VAE = UNetConfig(), VAEConfig()

# The pocket checkpoint: SD 1.5's parts, three levels, one layer a block. The finest level has no attention, which would cost
# as much there as everything else together: a picture of 16 x 16 cells is composed at 8 x 8 and 4 x 4.
POCKET_UNET = UNetConfig(
    sample_size=16,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(64, 128, 192),
    layers_per_block=1,
    cross_attention_dim=128,
    attention_head_dim=4,
    norm_num_groups=32,
)
POCKET_VAE = VAEConfig(
    sample_size=128, block_out_channels=(16, 32, 96, 128), layers_per_block=1, norm_num_groups=16, scaling_factor=1.0
)

# For tests: milliseconds instead of seconds.
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
