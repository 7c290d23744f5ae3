"""Image to image and inpainting: from the caller's pictures and masks to the point where the sampler starts.

    text to image    starts from noise
    image to image   starts from the picture's latents, under as much noise as `strength` says
    inpainting       the same, or pure noise at strength 1. Outside the mask, each prediction is corrected to the picture.
                     A U-Net with 2C + 1 input channels was trained for inpainting: it sees the mask and the surroundings

Shapes: B pictures, C h w one latent (C is 4), H W one picture, values in [-1, 1]; masks have one channel of 0 and 1, 1 where
the picture is drawn anew.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d

from minidiff.core.errors import SettingsError
from minidiff.core.guidance import UNetCall

Pictures = Any  # a PIL picture, a path, a tensor (B, 3, H, W) or (3, H, W) in [-1, 1], or a list of these
IMAGE_STRENGTH = 0.8  # the default, as in diffusers: the colours stay, the rest may change
EDGE = 4  # pixels inside a mask's edge over which new and old are mixed


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
    pictures: Tensor,
    mask: Tensor | None,
    strength: float | None,
    draw: Callable[[str], Tensor],
    encode: Callable[[Tensor, Tensor], Tensor],
    unet: UNetCall,
    trained_for_it: bool,
) -> Canvas:
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

    def call(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        known = torch.cat([mask.to(x).expand(len(surroundings), -1, -1, -1), surroundings.to(x)], dim=1)
        return unet(torch.cat([x, known.repeat(len(x) // len(known), 1, 1, 1)], dim=1), t, text)  # guidance doubles B

    return call


def latent_mask(mask: Tensor, factor: int, generous: bool) -> Tensor:
    """(B, 1, H, W) of 0 and 1 -> (B, 1, h, w). Generous: a cell is drawn anew if any of its pixels is masked.

    Inpainting models were trained with one pixel of each cell deciding, the first (latent diffusion's `interpolate`).
    """
    return max_pool2d(mask, factor) if generous else interpolate(mask, scale_factor=1 / factor)


def pasted(drawn: Tensor, pictures: Tensor, mask: Tensor) -> Tensor:
    """Drawn pixels inside the mask, exact pixels of the picture outside; the two mix just inside the mask's edge."""
    inside = (2 * avg_pool2d(mask, 2 * EDGE + 1, 1, EDGE, count_include_pad=False) - 1).clamp(min=0) * mask
    return pictures + inside * (drawn - pictures)  # inside = 0: the picture, exactly


# --- the caller's pictures and masks -----------------------------------------------------------------------------------


def as_pictures(image: Pictures, count: int) -> Tensor:
    """(count, 3, H, W); one picture serves for all. SettingsError for several sizes, another count, or other types."""
    several = isinstance(image, (list, tuple)) or isinstance(image, Tensor) and image.ndim == 4
    pictures = [_as_picture(one) for one in (image if several else [image])]
    if len(pictures) not in (1, count) or len({picture.shape for picture in pictures}) > 1:
        sizes = ", ".join(f"{picture.shape[-1]} x {picture.shape[-2]}" for picture in pictures)
        raise SettingsError(f"image holds pictures of {sizes}; give one, or {count} of one size, one for each that is drawn.")
    return torch.stack(pictures).expand(count, -1, -1, -1)


def _as_picture(image: Pictures, name: str = "image", under: str = "white") -> Tensor:
    """(3, H, W); `name` is the argument's, for errors; the colour `under` shows through transparent parts."""
    from PIL import Image  # only now: drawing from a prompt alone does not need it

    from minidiff.draw.images import load_image, opaque, to_tensor

    if isinstance(image, (str, Path)):
        image = load_image(image, under)
    if isinstance(image, Image.Image):
        return to_tensor(opaque(image, under))
    fits = isinstance(image, Tensor) and image.is_floating_point() and image.ndim == 3 and len(image) == 3 and image.numel()
    if not fits or not image.abs().max() <= 1.001:  # also catches NaN
        raise SettingsError(f"{name} must be a PIL picture, a path, or a tensor (3, H, W) of floats in [-1, 1].")
    return image.float().cpu()  # type: ignore[no-any-return]


def as_mask(mask: Pictures, pictures: Tensor) -> Tensor:
    """(1, 1, H, W): 1 where the mask is brighter than middle grey. It must be as large as `pictures` and not all black."""
    bright = (_as_picture(mask, "mask_image", under="black").mean(dim=0)[None, None] > 0).float()
    if bright.shape[-2:] != pictures.shape[-2:]:
        (h, w), (height, width) = bright.shape[-2:], pictures.shape[-2:]
        raise SettingsError(f"mask_image is {w} x {h} and the picture {width} x {height}; make the mask as large.")
    if not bright.any():
        raise SettingsError("mask_image is nowhere brighter than middle grey; paint the part white that is to be drawn anew.")
    return bright


def fitted(x: Tensor, height: int, width: int) -> Tensor:
    """Pictures or a mask (B, C, H, W) -> (B, C, height, width): scaled to cover, then cropped in the centre."""
    if x.shape[-2:] == (height, width):
        return x
    scale = max(height / x.shape[-2], width / x.shape[-1])
    size = [max(round(x.shape[-2] * scale), height), max(round(x.shape[-1] * scale), width)]
    x = interpolate(x, size) if x.shape[1] == 1 else interpolate(x, size, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return x[..., top : top + height, left : left + width]


def size_of(pictures: Tensor, height: int | None, width: int | None, factor: int) -> tuple[int, int]:
    """Height and width to draw at: as given, or the picture's own, rounded down to multiples of `factor`.

    If only one side is given, the other keeps the picture's proportions.
    """
    own_height, own_width = pictures.shape[-2:]
    asked, own = (width, own_width) if height is None else (height, own_height)
    scale = 1.0 if asked is None else asked / own
    sides = [max(int(side * scale + 1e-6) // factor, 1) * factor for side in (own_height, own_width)]
    return sides[0] if height is None else height, sides[1] if width is None else width
