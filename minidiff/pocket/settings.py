"""The settings of `minidiff pretrain`. Nothing here imports torch, so that `--help` is quick."""

from dataclasses import dataclass
from typing import Literal, get_args

from minidiff.core.errors import SettingsError

Stage = Literal["world", "vae", "latents", "decoder", "clip", "unet", "assemble", "judge"]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(frozen=True)
class PretrainSettings:
    """Train the pocket checkpoint from nothing: a world is drawn, then VAE, CLIP and U-Net learn it."""

    output_dir: str = "pocket-pretrain"
    """Folder for all stages; run the same command again to go on."""
    stages: tuple[Stage, ...] = STAGES
    """Which stages to run, in this order; a finished one is passed over."""
    init_from: str | None = None
    """Start the networks from this checkpoint instead of from random numbers: to train the committed one further."""
    device: str | None = None
    """cpu or cuda; default: cuda if there is one."""
    pictures: int = 30_000
    """Drawn pictures to train on (49 kB each on disk)."""
    vae_steps: int = 12_000
    """Updates of the autoencoder."""
    decoder_steps: int = 4000
    """Updates of the decoder alone."""
    vae_batch: int = 4
    """Pictures in each of both; more on a GPU."""
    clip_steps: int = 800
    """Updates of the two CLIP towers, 96 pairs each."""
    unet_steps: int = 12_000
    """Updates of the U-Net."""
    unet_batch: int = 32
    """Latents in each; more on a GPU."""
    seed: int = 0
    """Everything random follows from it."""

    def check(self) -> None:
        """Raise SettingsError, naming the flag, for a value that cannot work."""
        if unknown := [stage for stage in self.stages if stage not in STAGES]:
            raise SettingsError(f"--stages: {', '.join(unknown)} unknown; there are {', '.join(STAGES)}.")
        if not self.stages:
            raise SettingsError(f"--stages names none; there are {', '.join(STAGES)}.")
        for flag in ("pictures", "vae_steps", "decoder_steps", "vae_batch", "clip_steps", "unet_steps", "unet_batch"):
            if not 1 <= getattr(self, flag) <= 10_000_000:
                raise SettingsError(f"--{flag} is {getattr(self, flag)}; it must be at least 1, and at most 10000000.")
