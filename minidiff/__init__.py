"""minidiff: Stable Diffusion you can read, and the whole fine-tuning ladder on top of it.

    from minidiff import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained("checkpoints/pocket")
    pipe("a photo of a red dog on the beach", seed=0).images[0]

Names are imported when they are first used, so that `import minidiff` takes no time. Notes go to the log "minidiff", which
says nothing until it is asked to: logging.basicConfig(level=logging.INFO).
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minidiff.core.errors import MinidiffError as MinidiffError
    from minidiff.core.schedule import NoiseSchedule as NoiseSchedule
    from minidiff.draw.habits import AutoencoderKL as AutoencoderKL
    from minidiff.draw.habits import StableDiffusionPipeline as StableDiffusionPipeline
    from minidiff.draw.habits import UNet2DConditionModel as UNet2DConditionModel
    from minidiff.fast import attention as attention

__version__ = "0.1.0"

_NAMES = {  # where they are -> names
    "minidiff.draw.habits": """
        StableDiffusionPipeline StableDiffusionImg2ImgPipeline StableDiffusionInpaintPipeline
        StableDiffusionXLPipeline StableDiffusionXLImg2ImgPipeline StableDiffusionXLInpaintPipeline
        DiffusionPipeline AutoPipelineForText2Image AutoPipelineForImage2Image AutoPipelineForInpainting
        StableDiffusionControlNetPipeline StableDiffusionControlNetImg2ImgPipeline StableDiffusionControlNetInpaintPipeline
        StableDiffusionXLControlNetPipeline UNet2DConditionModel AutoencoderKL ControlNetModel
        LoraConfig get_peft_model get_peft_model_state_dict""",
    "minidiff.draw.schedulers": """
        DDIMScheduler DDPMScheduler PNDMScheduler EulerDiscreteScheduler EulerAncestralDiscreteScheduler HeunDiscreteScheduler
        DPMSolverMultistepScheduler UniPCMultistepScheduler LCMScheduler TCDScheduler""",
    "minidiff.trainer.python": """
        train_full train_dreambooth train_lora train_textual_inversion train_pivotal train_controlnet train_ip_adapter""",
    "minidiff.core.schedule": "NoiseSchedule",
    "minidiff.core.errors": "MinidiffError",
    "minidiff.fast": "attention",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}
__all__ = [*_HOMES]  # noqa: PLE0604

NEAREST = {  # schedulers that minidiff does not have
    "LMSDiscreteScheduler": "EulerDiscreteScheduler", "KDPM2DiscreteScheduler": "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler": "EulerAncestralDiscreteScheduler", "DEISMultistepScheduler": "UniPCMultistepScheduler",
    "DPMSolverSinglestepScheduler": "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler": "DPMSolverMultistepScheduler",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        from minidiff.core.errors import did_you_mean

        near = f" {NEAREST[name]} is nearest to it." if name in NEAREST else did_you_mean(name, _HOMES)
        if near and not name.startswith("_") and not find_spec(f"minidiff.{name}"):
            raise ImportError(f"minidiff has no {name}.{near}")  # an import hides an AttributeError's text
        raise AttributeError(f"module 'minidiff' has no attribute {name!r}")
    try:
        home = import_module(_HOMES[name])
    except ModuleNotFoundError as error:
        if error.name != "minidiff.fast":
            raise
        home = import_module("minidiff.core.attention")  # fast was deleted: the plain attention
    return getattr(home, name)


def __dir__() -> list[str]:
    return ["__version__", *__all__]
