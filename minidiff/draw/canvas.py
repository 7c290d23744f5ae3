"""What the sampler begins with: pure noise, a picture under noise, or a picture with a hole in it.

    text to image    noise
    image to image   the picture's latents under as much noise as `strength` says
    inpainting       the same, or pure noise at strength 1; outside the mask every prediction is corrected to the picture.
                     A U-Net with 2C + 1 input channels was trained for it: it is shown the mask and the surroundings

Shapes: B pictures, C h w one latent (C is 4), H W one picture.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from minidiff.core.errors import SettingsError
from minidiff.core.guidance import UNetCall
from minidiff.draw.call import Draw, check_latents
from minidiff.draw.inpainting import keep_outside, latent_mask, with_surroundings
from minidiff.draw.picture_input import pasted

if TYPE_CHECKING:
    from minidiff.draw.pipeline import StableDiffusionPipeline

IMAGE_STRENGTH = 0.8  # if nothing is said, as in diffusers: the colours stay, the rest may change


@dataclass(frozen=True)
class Canvas:
    """The sampler's beginning, and the U-Net in the form in which it is to be called."""

    noise: Tensor  # (B, C, h, w) standard normal
    unet_call: UNetCall
    image: Tensor | None = None  # clean latents (B, C, h, w) to start from
    strength: float = 1.0
    fix_x0: Callable[[Tensor], Tensor] | None = None  # what is known of the answer
    paste: Callable[[Tensor], Tensor] = lambda drawn: drawn  # pictures (B, 3, H, W), with what is known put back


def blank(pipe: "StableDiffusionPipeline", shape: tuple[int, ...], draw: Draw, latents: Tensor | None) -> Canvas:
    """For text to image; `latents` stand in for the drawn noise."""
    if pipe.for_inpainting:
        raise SettingsError(
            f"{pipe.name_or_path}: an inpainting model ({pipe.unet.config.in_channels} input channels) draws into a picture; "
            "give it an image and a mask_image, or take a plain model."
        )
    return Canvas(draw("latents") if latents is None else check_latents(latents, shape), pipe.unet_call)


def on_picture(
    pipe: "StableDiffusionPipeline",
    pictures: Tensor,
    mask: Tensor | None,
    strength: float | None,
    draw: Draw,
    latents: Tensor | None,
) -> Canvas:
    """For image to image, and with a mask (1, 1, H, W) for inpainting; `pictures` (B, 3, H, W) have the size to draw at.

    A generator's numbers are used in diffusers' order: for the picture's latents, for the noise, for the surroundings'.
    """
    if mask is None and pipe.for_inpainting:
        raise SettingsError(f"{pipe.name_or_path}: an inpainting model needs a mask_image; white is what it draws anew.")
    strength = strength if strength is not None else 1.0 if mask is not None else IMAGE_STRENGTH
    whole_hole = mask is not None and strength == 1  # nothing of what is in the hole is kept: pure noise
    image = None if pipe.for_inpainting and whole_hole else pipe.encode_pictures(pictures, draw("posterior"))
    noise = draw("latents")
    if latents is not None:
        noise = check_latents(latents, tuple(noise.shape))
    canvas = Canvas(noise, pipe.unet_call, image=None if whole_hole else image, strength=strength)
    if mask is None:
        return canvas
    canvas = replace(canvas, paste=lambda drawn: pasted(drawn, pictures.to(drawn), mask.to(drawn)))
    cells = latent_mask(mask, pipe.vae.config.downscale, generous=not pipe.for_inpainting).to(pipe.device)
    if pipe.for_inpainting:
        around = pipe.encode_pictures(pictures * (mask < 0.5), draw("surroundings"))
        return replace(canvas, unet_call=with_surroundings(canvas.unet_call, cells, around))
    assert image is not None  # only an inpainting model does without
    return replace(canvas, fix_x0=keep_outside(image, cells))
