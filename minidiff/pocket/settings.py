"""The settings of `minidiff pretrain` and `minidiff ladder`. Nothing here imports torch, so that `--help` is quick."""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from minidiff.files.values import A_FOLDER, Rule, at_least, at_most, check_values

Stage = Literal["world", "vae", "latents", "decoder", "clip", "unet", "assemble", "judge"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Count = Annotated[int, at_least(1), at_most(10_000_000)]


@dataclass(frozen=True)
class PretrainSettings:
    """Train the pocket checkpoint from random numbers: draw a world, then train VAE, CLIP and U-Net on it."""

    output_dir: str = "pocket-pretrain"
    """Folder for all stages. Run the same command again to continue."""
    stages: Annotated[tuple[Stage, ...], Rule(f"names none; there are {', '.join(STAGES)}", bool)] = STAGES
    """Which stages to run, in this order. A finished stage is skipped."""
    init_from: str | None = None
    """Start from this checkpoint instead of from random numbers, to train it further."""
    device: str | None = None
    """Where to train: cpu or cuda. Default: cuda if there is a GPU."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Number format of the forward passes. bf16 takes about two thirds of the time on a CPU that has it (AVX512_BF16)."""
    pictures: Count = 30_000
    """Number of drawn training pictures (49 kB each on disk)."""
    vae_steps: Count = 12_000
    """Updates of the autoencoder."""
    decoder_steps: Count = 4000
    """Updates of the decoder alone."""
    vae_batch: Count = 4
    """Pictures in each update of autoencoder or decoder. Use more on a GPU."""
    clip_steps: Count = 800
    """Updates of the two CLIP towers, with 96 pairs in each."""
    unet_steps: Count = 12_000
    """Updates of the U-Net."""
    unet_batch: Count = 32
    """Latents in each update of the U-Net. Use more on a GPU."""
    seed: int = 0
    """Seed of all random values."""

    def check(self) -> None:
        """Raise SettingsError, naming the flag, for a value that cannot work."""
        check_values(self)


@dataclass(frozen=True)
class LadderSettings:
    """Train a subject with every method, and compare their cost and their results."""

    pretrained_model_name_or_path: str = "checkpoints/pocket"
    """The base model. Its folder needs an image_encoder, which compares the pictures."""
    instance_data_dir: str = "lessons/data/dog"
    """Folder of the subject's pictures."""
    output_dir: Annotated[str, A_FOLDER] = "outputs/ladder"
    """Folder for ladder.md, ladder.png and a folder for each method."""
    rungs: tuple[str, ...] = ()
    """Which methods. Default: all."""

    def check(self) -> None:
        """Raise SettingsError for a value that cannot work."""
        check_values(self)
