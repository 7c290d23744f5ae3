"""The habits of the field around ControlNets: see habits.py.

    net = ControlNetModel.from_pretrained("checkpoints/pocket-canny")
    pipe = StableDiffusionControlNetPipeline.from_pretrained("checkpoints/pocket", controlnet=net)
    pipe("a photo of a red dog", image=edges, controlnet_conditioning_scale=0.8).images[0]
"""

from pathlib import Path
from typing import Any, Self

import torch

from minidiff.core import controlnet
from minidiff.core.errors import SettingsError
from minidiff.draw.habits import FROM_MASK, StableDiffusionPipeline, with_habits
from minidiff.files.controlnet import read_controlnet, write_controlnet
from minidiff.files.folder import found
from minidiff.files.values import check_names


class ControlNetModel(controlnet.ControlNetModel):
    """core/controlnet.py's, which is loaded and saved in the field's way, too."""

    _get_name = with_habits

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype = torch.float32, **field: Any) -> Self:
        """A folder, a hub id in the local cache, or a single file."""
        home = found(folder, field)
        check_names("from_pretrained", field, ())
        net: Any = read_controlnet(home, torch_dtype)
        net.__class__ = cls
        return net

    from_single_file = from_pretrained

    def save_pretrained(self, folder: str | Path, safe_serialization: bool = True) -> None:
        """The folder that `from_pretrained` and diffusers read."""
        write_controlnet(self, Path(folder), self.conv_in.weight.dtype)


class StableDiffusionControlNetPipeline(StableDiffusionPipeline):
    """Text to image, in which `image` is the hint."""

    order = ("control_image", *StableDiffusionPipeline.order)

    def __call__(self, *inputs: Any, image: Any = None, control_image: Any = None, **named: Any) -> Any:
        hint = control_image if image is None else image
        if hint is None and not inputs[1:]:
            raise SettingsError("a ControlNet pipeline follows a picture; give its image.")
        return super().__call__(*inputs, control_image=hint, **named)


SIZES = ("height", "width", "strength")
OTHERS: dict[str, tuple[type, tuple[str, ...], float]] = {  # base, order of the arguments, and the usual strength of control
    "StableDiffusionControlNetImg2ImgPipeline": (StableDiffusionPipeline, ("image", "control_image", *SIZES), 0.8),
    "StableDiffusionControlNetInpaintPipeline": (StableDiffusionPipeline, (*FROM_MASK, "control_image", *SIZES), 0.5),
    "StableDiffusionXLControlNetPipeline": (StableDiffusionControlNetPipeline, StableDiffusionControlNetPipeline.order, 1.0),
}
for name, (base, order, scale) in OTHERS.items():
    globals()[name] = type(name, (base,), {"order": order, "conditioning_scale": scale})
