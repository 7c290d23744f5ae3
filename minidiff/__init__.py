"""minidiff: Stable Diffusion you can read, and the whole fine-tuning ladder on top of it.

    from minidiff import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained("checkpoints/pocket")
    pipe("a photo of a red dog on the beach", seed=0).images[0]

Names are imported when they are first used, so that `import minidiff` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minidiff.core.errors import MinidiffError
    from minidiff.core.schedule import NoiseSchedule
    from minidiff.core.unet import UNet2DConditionModel
    from minidiff.core.vae import AutoencoderKL
    from minidiff.draw.pipeline import StableDiffusionPipeline
    from minidiff.fast import attention

__version__ = "0.1.0"

_HOMES = {
    "StableDiffusionPipeline": "minidiff.draw.pipeline",
    "UNet2DConditionModel": "minidiff.core.unet",
    "AutoencoderKL": "minidiff.core.vae",
    "NoiseSchedule": "minidiff.core.schedule",
    "attention": "minidiff.fast",
    "MinidiffError": "minidiff.core.errors",
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
    try:
        home = import_module(_HOMES[name])
    except ModuleNotFoundError as error:
        if error.name != "minidiff.fast":
            raise
        home = import_module("minidiff.core.transformer")  # fast was deleted: the plain attention
    return getattr(home, name)
