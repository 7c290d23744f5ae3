"""Image to image and inpainting: from the caller's pictures and masks to the point where the sampler starts.

    text to image    starts from noise
    image to image   starts from the picture's latents, under as much noise as `strength` says
    inpainting       the same, or pure noise at strength 1. Outside the mask, each prediction is corrected to the picture.
                     A U-Net with 2C + 1 input channels was trained for inpainting: it sees the mask and the surroundings

Shapes: B pictures, C h w one latent (C is 4), H W one picture, values in [-1, 1]; masks have one channel of 0 and 1, 1 where
the picture is drawn anew.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, interpolate, max_pool2d

from minidiff.core.errors import SettingsError
from minidiff.core.guidance import UNetCall

if TYPE_CHECKING:
    from PIL import Image

Pictures = Any  # a PIL picture, a path, a tensor (B, 3, H, W) or (3, H, W), an array (…, H, W, 3), or a list of these
IMAGE_STRENGTH = 0.8  # the default, as in diffusers: the colours stay, the rest may change


@dataclass(frozen=True)
class Canvas:
    """The sampler's start, and the U-Net in the form in which it is called."""

    noise: Tensor  # (B, C, h, w) standard normal
    unet: UNetCall
    image: Tensor | None = None  # clean latents (B, C, h, w) to start from
    strength: float = 1.0
    fix_x0: Callable[[Tensor], Tensor] | None = None  # corrects the predicted x0 where the picture is known
    paste: Callable[[Tensor], Tensor] = lambda drawn: drawn  # puts known pixels back into pictures (B, 3, H, W)


def on_picture(
    pictures: Tensor, mask: Tensor | None, strength: float | None, draw: Callable[[str], Tensor],
    encode: Callable[[Tensor, Tensor], Tensor], unet: UNetCall, trained_for_it: bool,
) -> Canvas:  # fmt: skip
    """Image to image from `pictures` (B, 3, H, W); with `mask` (1, 1, H, W) inpainting.

    `encode(pictures, noise)` gives latents (B, C, h, w). `trained_for_it`: the U-Net has 2C + 1 input channels. A generator's
    numbers are used in the order of diffusers: for the picture's latents, for the noise, for the surroundings' latents.
    """
    strength = strength if strength is not None else IMAGE_STRENGTH if mask is None else 1.0
    from_noise = mask is not None and strength == 1  # nothing of the masked part is kept
    image = None if trained_for_it and from_noise else encode(pictures, draw("posterior"))
    noise, start = draw("latents"), None if from_noise else image
    if mask is None:
        return Canvas(noise, unet, start, strength)
    cells = latent_mask(mask, pictures.shape[-1] // noise.shape[-1], generous=not trained_for_it)
    if trained_for_it:
        unet = with_surroundings(unet, cells, encode(pictures * (mask < 0.5), draw("surroundings")))
    fix_x0 = keep_outside(image, cells) if image is not None and not trained_for_it else None
    return Canvas(noise, unet, start, strength, fix_x0, lambda drawn: pasted(drawn, pictures.to(drawn), mask.to(drawn)))


def keep_outside(image: Tensor, mask: Tensor) -> Callable[[Tensor], Tensor]:
    """For a sampler's `fix_x0`: outside the mask, the predicted x0 is replaced by the picture's own latent (B, C, h, w).

    So the sampler arrives at exactly that latent. RePaint (2201.09865, eq. 8) adds new noise to the known part at each step
    instead; correcting x0 also works for samplers that use earlier predictions.
    """
    mask = mask.to(image.device)
    return lambda x0: mask * x0 + (1 - mask) * image


def with_surroundings(unet: UNetCall, mask: Tensor, surroundings: Tensor) -> UNetCall:
    """The U-Net of an inpainting model, called with x (B, C, h, w): it sees x, the mask, and the picture around it."""

    def call(x: Tensor, t: Tensor, *text: Tensor) -> Tensor:
        known = torch.cat([mask.to(x).expand(len(surroundings), -1, -1, -1), surroundings.to(x)], dim=1)
        return unet(torch.cat([x, known.repeat(len(x) // len(known), 1, 1, 1)], dim=1), t, *text)  # guidance doubles B

    return call


def latent_mask(mask: Tensor, factor: int, generous: bool) -> Tensor:
    """(B, 1, H, W) of 0 and 1 -> (B, 1, h, w). Generous: a cell is drawn anew if any of its pixels is masked.

    Inpainting models were trained with one pixel of each cell deciding, the first (latent diffusion's `interpolate`).
    """
    return max_pool2d(mask, factor) if generous else interpolate(mask, scale_factor=1 / factor)


def pasted(drawn: Tensor, pictures: Tensor, mask: Tensor) -> Tensor:
    """Drawn pixels inside the mask, however thin it is; exact pixels of the picture outside."""
    return torch.where(mask > 0, drawn, pictures)


# --- the caller's pictures and masks -----------------------------------------------------------------------------------


def as_pictures(image: Pictures, count: int) -> Tensor:
    """(count, 3, H, W); one picture serves for all. SettingsError for several sizes, another count, or other types."""
    several = isinstance(image, (list, tuple)) or isinstance(image, (Tensor, np.ndarray)) and image.ndim == 4
    pictures = [as_picture(one) for one in (image if several else [image])]
    if len(pictures) not in (1, count) or len({picture.shape for picture in pictures}) > 1:
        sizes = ", ".join(f"{picture.shape[-1]} x {picture.shape[-2]}" for picture in pictures)
        raise SettingsError(f"image holds pictures of {sizes}; give one, or {count} of one size, one for each that is drawn.")
    return torch.stack(pictures).expand(count, -1, -1, -1)


def as_picture(image: Pictures, name: str = "image") -> Tensor:
    """(3, H, W); `name` is the argument's, for errors."""
    from PIL import Image  # only now: drawing from a prompt alone does not need it

    from minidiff.draw.images import load_image, opaque, to_tensor

    if isinstance(image, (str, Path)):
        image = load_image(image)
    if isinstance(image, Image.Image):
        return to_tensor(opaque(image))
    x = torch.from_numpy(image).movedim(-1, 0) if isinstance(image, np.ndarray) else image
    fits = isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 3 and len(x) == 3 and x.numel()
    if not fits or not x.abs().max() <= 1.001:  # also catches NaN
        form = "a tensor (3, H, W) of floats in [0, 1], or an array (H, W, 3)"
        raise SettingsError(f"{name} must be a PIL picture, a path, {form}.")
    return x.float().cpu() if x.min() < 0 else x.float().cpu() * 2 - 1  # below 0: it is in [-1, 1], as in diffusers


def as_mask(mask: Pictures, pictures: Tensor, height: int, width: int) -> Tensor:
    """(1, 1, height, width): 1 where the picture is drawn anew. The mask must be as large as `pictures`, (B, 3, H, W)."""
    from PIL import Image

    from minidiff.draw.images import load_mask

    if isinstance(mask, (str, Path)):
        mask = load_mask(mask)
    white = white_of(mask) if isinstance(mask, Image.Image) else as_picture(mask, "mask_image").mean(dim=0) > 0
    if white.shape != pictures.shape[-2:]:
        sizes = "{1} x {0} and the picture {3} x {2}".format(*white.shape, *pictures.shape[-2:])
        raise SettingsError(f"mask_image is {sizes}; make the mask as large, or scale both to the model's size: --resize.")
    if not white.any():
        raise SettingsError("mask_image is nowhere brighter than middle grey; paint the part white that is to be drawn anew.")
    if white.all():
        warnings.warn("mask_image is white everywhere, so the whole picture is drawn anew.", stacklevel=2)
    if not (mask := fitted(white[None, None].float(), height, width)).any():
        raise SettingsError(f"The white part of mask_image lies outside the {width} x {height} pixels that are drawn.")
    return mask


def white_of(mask: "Image.Image") -> Tensor:
    """(H, W) of bool: where a mask says "draw here".

    An opaque mask says so by white. One with transparent parts does it by white paint, if its visible part has one colour; if
    the visible part is a picture, by the hole in it. Any other is a SettingsError.
    """
    pixels = torch.from_numpy(np.array(mask.convert("RGBA"), dtype=np.int64))  # (H, W, 4)
    white, visible = pixels[..., :3].sum(-1) > 3 * 127, pixels[..., 3] > 127
    if visible.all():
        return white
    seen = pixels[visible][:, :3]  # (n, 3)
    if len(seen) and white[visible].all() and (seen.amax(0) - seen.amin(0)).max() < 64:
        return visible
    if len(seen) and ((seen > 32) & (seen < 223)).any(-1).float().mean() > 0.05:  # more than black and white: a picture
        return ~visible
    raise SettingsError(
        "mask_image has transparent parts, and its visible part is neither all white nor a picture. Paint white what is to be "
        "drawn anew, on black or on nothing; or erase it from the picture."
    )


def fitted(x: Tensor, height: int, width: int) -> Tensor:
    """Pictures or a mask (B, C, H, W) -> (B, C, height, width): scaled to cover, then cropped in the centre.

    No white pixel of a mask is lost: a pixel of the smaller one is white if any under it is.
    """
    if x.shape[-2:] == (height, width):
        return x
    scale = max(height / x.shape[-2], width / x.shape[-1])
    size = [max(round(x.shape[-2] * scale), height), max(round(x.shape[-1] * scale), width)]
    x = adaptive_max_pool2d(x, size) if x.shape[1] == 1 else interpolate(x, size, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return x[..., top : top + height, left : left + width]


def size_of(own: Sequence[int], height: int | None, width: int | None, factor: int) -> tuple[int, int]:
    """Height and width to draw at: as given, or the `own` of a picture, rounded down to multiples of `factor`.

    If only one side is given, the other keeps the picture's proportions.
    """
    asked, like = (width, own[1]) if height is None else (height, own[0])
    scale = 1.0 if asked is None else asked / like
    sides = [max(int(side * scale + 1e-6) // factor, 1) * factor for side in own]
    return sides[0] if height is None else height, sides[1] if width is None else width
