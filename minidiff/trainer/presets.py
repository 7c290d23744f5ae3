"""--preset: numbers for a LoRA that are known to work, for what is taught and for the size of the base.

For the pocket checkpoint they are those of the README and the ladder, measured there; for SD 1.5, which learns ten times
slower, those of the field: diffusers' and kohya's guides for a batch of one to four.
"""

from typing import Any

from minidiff.files.folder import config_of, local_folder
from minidiff.trainer.settings import LoRASettings

SHAPES = ("attention", "resnets", "samplers")  # convolutions learn a new shape best
LOOKS = ("attention", "feed_forward")
POCKET: dict[str, dict[str, Any]] = {
    "object": dict(rank=8, lora_targets=SHAPES, learning_rate=1e-3, max_train_steps=300),
    "style": dict(rank=16, lora_targets=LOOKS, learning_rate=1e-3, max_train_steps=300, noise_offset=0.1),
    "face": dict(rank=8, lora_targets=SHAPES, learning_rate=1e-3, max_train_steps=300),  # a thing like others: it has no people
}
SD15: dict[str, dict[str, Any]] = {
    "object": dict(rank=8, lora_targets=("attention",), learning_rate=1e-4, max_train_steps=500),
    "style": dict(rank=16, lora_targets=LOOKS, learning_rate=1e-4, max_train_steps=1500, noise_offset=0.1),
    "face": dict(rank=16, lora_targets=LOOKS, learning_rate=1e-4, max_train_steps=1000, snr_gamma=5.0),
}


def preset_values(name: str, base: str) -> dict[str, Any]:
    """The settings of a preset, for a base model: a folder, or a hub id in the local cache."""
    widths = config_of(local_folder(base) / "unet")[0].get("block_out_channels") or [320]
    return (POCKET if widths[0] < 320 else SD15)[name]


def told(settings: LoRASettings) -> str:
    """The values of the preset, as flags; without those that were given another value."""
    chosen = preset_values(settings.preset or "", settings.pretrained_model_name_or_path)
    kept = {flag: value for flag, value in chosen.items() if getattr(settings, flag) == value}
    words = (f"--{flag} {' '.join(value) if isinstance(value, tuple) else value}" for flag, value in kept.items())
    return f"--preset {settings.preset}: {' '.join(words)}"
