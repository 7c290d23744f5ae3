"""Pictures that a pipeline starts from, and masks: from whatever the caller has to tensors that fit.

Shapes: B pictures, H W their sides; values in [-1, 1]; masks have one channel of 0 and 1, 1 where the picture is drawn anew.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from minidiff.core.errors import SettingsError

Pictures = Any  # a PIL picture, a path, a tensor (B, 3, H, W) or (3, H, W) in [-1, 1], or a list of these
EDGE = 4  # pixels inside a mask's edge over which new and old are mixed


def as_pictures(image: Pictures, count: int) -> Tensor:
    """(count, 3, H, W); one picture serves for all. SettingsError for several sizes, another count, or other forms."""
    if isinstance(image, Tensor) and image.ndim == 4:
        image = list(image)
    pictures = [_as_picture(one) for one in (image if isinstance(image, Sequence) and not isinstance(image, str) else [image])]
    if len(pictures) not in (1, count):
        raise SettingsError(f"image holds {len(pictures)} pictures for {count} to draw; give one, or one for each.")
    if len(sizes := {f"{p.shape[-1]} x {p.shape[-2]}" for p in pictures}) > 1:
        raise SettingsError(f"image holds pictures of several sizes ({', '.join(sorted(sizes))}); a batch has one.")
    return torch.stack(pictures).expand(count, -1, -1, -1)


def _as_picture(image: Pictures, name: str = "image", under: str = "white") -> Tensor:
    """(3, H, W); `name` is the argument's, for errors; what is transparent is laid over the colour `under`."""
    from PIL import Image  # only now: drawing from a prompt alone needs none of it

    from minidiff.draw.images import load_image, opaque, to_tensor

    if isinstance(image, (str, Path)):
        image = load_image(image, under)
    if isinstance(image, Image.Image):
        return to_tensor(opaque(image, under))
    if not isinstance(image, Tensor):
        raise SettingsError(f"{name} is a {type(image).__name__}; give a PIL picture, a path, or a tensor in [-1, 1].")
    if image.ndim != 3 or len(image) != 3 or not image.numel() or not image.is_floating_point():
        raise SettingsError(f"{name} is a tensor {tuple(image.shape)} of {image.dtype}; it must be (3, H, W), of floats.")
    if not image.abs().max() <= 1.001:  # NaN neither
        raise SettingsError(f"{name} is a tensor with values outside [-1, 1]; pictures in [0, 1] become 2 * x - 1.")
    return image.float().cpu()


def as_mask(mask: Pictures, pictures: Tensor) -> Tensor:
    """(1, 1, H, W): 1 where the mask is nearer to white. It must be as large as `pictures` (B, 3, H, W), and not all black."""
    bright = (_as_picture(mask, "mask_image", under="black").mean(dim=0)[None, None] > 0).float()  # unpainted: kept
    if bright.shape[-2:] != pictures.shape[-2:]:
        (h, w), (height, width) = bright.shape[-2:], pictures.shape[-2:]
        raise SettingsError(f"mask_image is {w} x {h} and the picture {width} x {height}; make the mask as large.")
    if not bright.any():
        raise SettingsError("mask_image is nowhere brighter than middle grey; paint white what shall be drawn anew.")
    return bright


def fitted(x: Tensor, height: int, width: int) -> Tensor:
    """Pictures or a mask (B, C, H, W) -> (B, C, height, width): scaled to cover, then cut at two edges if the shape differs."""
    if x.shape[-2:] == (height, width):
        return x
    scale = max(height / x.shape[-2], width / x.shape[-1])
    size = [max(round(x.shape[-2] * scale), height), max(round(x.shape[-1] * scale), width)]
    is_mask = x.shape[1] == 1
    x = interpolate(x, size) if is_mask else interpolate(x, size, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return x[..., top : top + height, left : left + width]


def size_of(pictures: Tensor, height: int | None, width: int | None, factor: int) -> tuple[int, int]:
    """Height and width to draw at: what was asked for, or the picture's own, brought down to multiples of `factor`.

    Where one side alone was asked for, the other follows.
    """
    own_height, own_width = pictures.shape[-2:]
    asked, own = (width, own_width) if height is None else (height, own_height)
    scale = 1.0 if asked is None else asked / own
    sides = [max(int(side * scale + 1e-6) // factor, 1) * factor for side in (own_height, own_width)]
    return sides[0] if height is None else height, sides[1] if width is None else width


def pasted(drawn: Tensor, pictures: Tensor, mask: Tensor) -> Tensor:
    """What was drawn, inside the mask; outside the picture itself, to the bit. The two mix just inside the mask's edge."""
    inside = (2 * avg_pool2d(mask, 2 * EDGE + 1, 1, EDGE, count_include_pad=False) - 1).clamp(min=0) * mask
    return pictures + inside * (drawn - pictures)  # inside = 0: the picture, exactly
