"""The shapes of the networks, as frozen dataclasses.

Field names are the keys of the `config.json` files in an SD 1.5 folder, so a config is read from the folder and never
guessed: SD 1.5, the pocket checkpoint and the tiny test model differ in these numbers and in nothing else.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from minidiff.core.errors import WeightsError

Config = TypeVar("Config", bound="_FromFolder")
LARGEST = 65_536  # of any number in a config: beyond every SD 1.x model, and refused before a network of that size is built
MAX_LEVELS, MAX_LAYERS = 8, 16
OTHER_FAMILIES = {"1024": " This is an SD 2.x model.", "2048": " This is an SDXL model."}  # by the width of the text


@dataclass(frozen=True)
class _FromFolder:
    """Reads and writes the JSON form. Keys minidiff does not know are fine only where they hold their usual value."""

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any], where: str) -> Config:
        """Build from parsed JSON; `where` names the file in errors."""
        known = {f.name for f in fields(cls)}
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        for key, only in cls.must_be().items():
            if values.get(key, only) not in (only, None):
                family = OTHER_FAMILIES.get(str(values.get("cross_attention_dim")), "")
                usual = f"minidiff builds SD 1.x models, where it is {only!r}.{family}"
                raise WeightsError(f"{where}: {key} is {values[key]!r}; {usual}")
        for key, hint in get_type_hints(cls).items():
            if key in values and not (fits(values[key], hint) and _in_range(values[key], 0 if key == "steps_offset" else 1e-9)):
                raise WeightsError(f"{where}: {key} is {values[key]!r:.60}; no SD 1.x model has that. Copy the file again.")
        try:
            config = cls(**given)
            config.check()
        except ValueError as error:
            raise WeightsError(f"{where}: not a usable configuration: {error}.") from error
        return config

    def to_dict(self, class_name: str) -> dict[str, Any]:
        """The JSON form that other programs read, `_class_name` included. What is None is left out: their default."""
        values = {key: value for key, value in {**asdict(self), **self.must_be()}.items() if value is not None}
        return {"_class_name": class_name, "_diffusers_version": "0.30.0", **values}

    @classmethod
    def must_be(cls) -> dict[str, Any]:
        """Keys of the JSON with a single value that this project implements."""
        return {}

    def check(self) -> None:
        """Raise ValueError for sizes that cannot be built."""


def fits(value: Any, hint: Any) -> bool:
    """Is a value read from JSON or TOML one that a field of this type may hold?"""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, list) and all(fits(v, get_args(hint)[0]) for v in value)
    if get_args(hint):  # X | None
        return any(fits(value, one) for one in get_args(hint))
    return type(value) is hint or (hint is float and type(value) is int) or (value is None and hint is type(None))


def _in_range(value: Any, least: float) -> bool:
    """Do all the numbers in it lie between `least` and LARGEST? NaN does not."""
    numbers = [one for one in (value if isinstance(value, list) else [value]) if type(one) in (int, float)]
    return all(least <= one <= LARGEST for one in numbers)


def _check_depth(levels: int, layers: int) -> None:
    if not 1 <= levels <= MAX_LEVELS or layers > MAX_LAYERS:
        raise ValueError(f"{levels} levels of {layers} layers; it can be 1 to {MAX_LEVELS} levels of 1 to {MAX_LAYERS} layers")


@dataclass(frozen=True)
class UNetConfig(_FromFolder):
    """The denoiser. `attention_head_dim` is, by an old mistake that every file repeats, the NUMBER of heads."""

    sample_size: int = 64  # latent side at training
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

    @classmethod
    def must_be(cls) -> dict[str, Any]:
        return {
            "act_fn": "silu",
            "center_input_sample": False,
            "downsample_padding": 1,
            "dual_cross_attention": False,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "mid_block_scale_factor": 1,
            "only_cross_attention": False,
            "resnet_time_scale_shift": "default",
            "time_embedding_type": "positional",
            "use_linear_projection": False,
            "class_embed_type": None,
            "addition_embed_type": None,
            "num_class_embeds": None,
        }

    def check(self) -> None:
        levels = len(self.block_out_channels)
        if not levels == len(self.down_block_types) == len(self.up_block_types):
            raise ValueError("block_out_channels, down_block_types and up_block_types differ in length")
        _check_depth(levels, self.layers_per_block)
        for kind in self.down_block_types + self.up_block_types:
            if kind not in ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"):
                raise ValueError(f"block type {kind!r} is not one of SD 1.x")
        for width in self.block_out_channels:
            if width % self.norm_num_groups or width % self.attention_head_dim:
                raise ValueError(
                    f"width {width} does not divide into {self.norm_num_groups} groups and {self.attention_head_dim} heads"
                )


@dataclass(frozen=True)
class VAEConfig(_FromFolder):
    """The autoencoder. Latents are multiplied by `scaling_factor`, 1 / their standard deviation, for the denoiser."""

    sample_size: int = 512
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True  # read by SDXL pipelines only; kept so that a folder is written as it was read

    @classmethod
    def must_be(cls) -> dict[str, Any]:
        return {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True} | {
            "shift_factor": None
        }

    def to_dict(self, class_name: str) -> dict[str, Any]:
        levels = len(self.block_out_channels)
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
        return super().to_dict(class_name) | blocks

    @property
    def downscale(self) -> int:
        """Pixels to a latent cell: 8 for four levels."""
        return int(2 ** (len(self.block_out_channels) - 1))

    def check(self) -> None:
        _check_depth(len(self.block_out_channels), self.layers_per_block)
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(f"width {width} does not divide into {self.norm_num_groups} groups")


@dataclass(frozen=True)
class NoiseConfig(_FromFolder):
    """The forward process. SD 1.5's values are the defaults, also where its `scheduler_config.json` is silent."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    timestep_spacing: str | None = None  # None: the sampler's own default
    use_karras_sigmas: bool = False
    rescale_betas_zero_snr: bool = False

    @classmethod
    def must_be(cls) -> dict[str, Any]:
        return {"trained_betas": None, "clip_sample": False, "skip_prk_steps": True}

    def to_dict(self, class_name: str) -> dict[str, Any]:
        """Two settings that not every class knows are written only where they are on."""
        values = super().to_dict(class_name)
        return {k: v for k, v in values.items() if v or k not in ("use_karras_sigmas", "rescale_betas_zero_snr")}

    def check(self) -> None:
        if self.beta_schedule not in ("scaled_linear", "linear"):
            raise ValueError(f"beta_schedule {self.beta_schedule!r} is unknown; it is scaled_linear or linear")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type {self.prediction_type!r} is unknown; it is epsilon or v_prediction")
        if self.timestep_spacing not in (None, "leading", "linspace", "trailing"):
            raise ValueError(f"timestep_spacing {self.timestep_spacing!r} is unknown; it is leading, linspace or trailing")
        if self.rescale_betas_zero_snr and self.prediction_type != "v_prediction":
            raise ValueError(
                "rescale_betas_zero_snr is true and prediction_type is epsilon; it needs v_prediction, because in pure noise "
                "eps says nothing about the picture"
            )
        if not self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_start {self.beta_start} and beta_end {self.beta_end} must rise and stay below 1")


SD15_UNET, SD15_VAE = UNetConfig(), VAEConfig()

# The pocket checkpoint: SD 1.5's parts, three levels, one layer a block. The finest level, where attention would cost as
# much as everything else together, has none: a picture of 16 x 16 cells is composed at 8 x 8 and 4 x 4.
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

# For tests: seconds become milliseconds.
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
