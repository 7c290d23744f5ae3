"""minidiff: Stable Diffusion you can read, and the whole fine-tuning ladder on top of it.

    from minidiff import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained("checkpoints/pocket")
    pipe("a photo of a red dog on the beach", seed=0).images[0]

Names are imported when they are first used, so that `import minidiff` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minidiff.diffusion.schedule import NoiseSchedule
    from minidiff.errors import MinidiffError
    from minidiff.models.attention import attention
    from minidiff.models.unet import UNet2DConditionModel
    from minidiff.models.vae import AutoencoderKL
    from minidiff.pipeline import StableDiffusionPipeline

__version__ = "0.1.0"

_HOMES = {
    "StableDiffusionPipeline": "minidiff.pipeline",
    "UNet2DConditionModel": "minidiff.models.unet",
    "AutoencoderKL": "minidiff.models.vae",
    "NoiseSchedule": "minidiff.diffusion.schedule",
    "attention": "minidiff.models.attention",
    "MinidiffError": "minidiff.errors",
}
__all__ = [
    "AutoencoderKL",
    "MinidiffError",
    "NoiseSchedule",
    "StableDiffusionPipeline",
    "UNet2DConditionModel",
    "attention",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'minidiff' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
