"""Inpainting: a part of the picture is drawn anew, and the rest is known.

Shapes: B pictures, C h w one latent, H W one picture; masks have one channel, 1 where the picture is drawn anew.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from minidiff.core.guidance import UNetCall


def keep_outside(image: Tensor, mask: Tensor) -> Callable[[Tensor], Tensor]:
    """For a sampler's `fix_x0`: outside the mask, the predicted x0 is the picture's own latent (B, C, h, w).

    The sampler goes on from there as from any prediction, and so arrives at that latent exactly. RePaint (2201.09865, eq. 8)
    noises the known part afresh at each step instead; this way works for samplers that remember earlier predictions, too.
    """
    return lambda x0: mask * x0 + (1 - mask) * image


def with_surroundings(unet_call: UNetCall, mask: Tensor, surroundings: Tensor) -> UNetCall:
    """The U-Net of an inpainting model, which has 2C + 1 channels: noisy latent, mask, latent of the picture around it.

    The call takes x (B, C, h, w), as that of an ordinary U-Net; guidance may have doubled B.
    """

    def call(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        known = torch.cat([mask.expand(len(surroundings), -1, -1, -1), surroundings], dim=1).to(x)
        return unet_call(torch.cat([x, known.repeat(len(x) // len(known), 1, 1, 1)], dim=1), t, text)

    return call


def latent_mask(mask: Tensor, factor: int, generous: bool) -> Tensor:
    """(B, 1, H, W) of 0 and 1 -> (B, 1, h, w). Generous: a cell of which any pixel is masked is drawn anew.

    Inpainting models were trained with one pixel of each cell deciding, the first (latent diffusion's `interpolate`).
    """
    if generous:
        return max_pool2d(mask, factor)
    return interpolate(mask, scale_factor=1 / factor)
