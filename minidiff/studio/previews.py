"""Previews while sampling: latents -> small pictures, by one matrix instead of the decoder.

    preview = fit_preview(pipe.vae)
    pipe(prompt, callback=PreviewFile(preview, "preview.png"))

A latent is a small picture in other colours: red, green and blue are, nearly, weighted sums of its channels. The decoder
adds detail; what is where, and in which colour, can be seen without it, in microseconds. The weights are not constants out
of a forum (those fit one autoencoder): they are fitted to the autoencoder at hand.

Shapes: B pictures, c latent channels, h w latent height and width; one latent cell is one pixel of the preview.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minidiff.core.grids import Step
from minidiff.core.rng import generator
from minidiff.core.vae import AutoencoderKL
from minidiff.draw.images import save_png, to_pil

if TYPE_CHECKING:
    from collections.abc import Callable

PICTURES, SWATCHES, CELLS = 8, 4, 4  # pictures to fit on; swatches along a side of each; latent cells along a side of a swatch


@dataclass(frozen=True, eq=False)
class LatentPreview:
    """rgb = latent @ matrix + bias, in every cell."""

    matrix: Tensor  # (c, 3)
    bias: Tensor  # (3,)

    def rgb(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, c, h, w) -> (B, 3, h, w) in [-1, 1]."""
        matrix, bias = (x.to(latents.device) for x in (self.matrix, self.bias))
        return (torch.einsum("bchw,cd->bdhw", latents.float(), matrix) + bias[:, None, None]).clamp(-1, 1)

    def __call__(self, latents: Tensor) -> Image.Image:
        """Latents (B, c, h, w) -> one picture, B · w by h pixels, side by side."""
        return to_pil(torch.cat(list(self.rgb(latents)), dim=-1)[None])[0]


@torch.no_grad()
def fit_preview(vae: AutoencoderKL) -> LatentPreview:
    """The best linear map from latents to colours, by least squares over pictures of flat swatches in random colours.

    Encoding says which latent a colour has. Decoding constant latents, the other way, is worse: most of them are the
    latents of no picture, and the decoder's answer to those is not what it makes of real ones.
    """
    config, parameter = vae.config, next(vae.parameters())
    side = config.downscale * CELLS
    colours = 2 * torch.rand(PICTURES, 3, SWATCHES, SWATCHES, generator=generator(0, "preview")) - 1
    pictures = colours.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)
    mean, _ = vae.encode(pictures.to(parameter))  # one batch: 8 pictures of 128 by 128 pixels
    cells = (mean * config.scaling_factor).movedim(1, -1).flatten(0, 2).double().cpu()  # (N, c)
    wanted = F.interpolate(colours, scale_factor=CELLS).movedim(1, -1).flatten(0, 2).double()  # (N, 3)
    with_one = torch.cat([cells, torch.ones(len(cells), 1, dtype=cells.dtype)], dim=1)
    solution = torch.linalg.lstsq(with_one, wanted, driver="gelsd").solution.float()  # gelsd: a dead channel does no harm
    return LatentPreview(solution[:-1], solution[-1])


@dataclass
class PreviewFile:
    """A callback that rewrites one small PNG: what the network believes the picture to be, `every` so many steps."""

    preview: "Callable[[Tensor], Image.Image]"
    path: Path | str
    every: int = 1
    scale: int = 4  # screen pixels for a latent cell: half the size of the finished picture

    def __call__(self, step: Step) -> None:
        """The file is whole at any moment, so that a viewer may reload it whenever it likes; the last step is always in it."""
        if (step.index + 1) % self.every == 0 or step.index + 1 == step.total:
            small = self.preview(step.x0)
            size = (small.width * self.scale, small.height * self.scale)
            about = f"minidiff preview, step {step.index + 1} of {step.total}"
            save_png(small.resize(size, Image.Resampling.BICUBIC), self.path, {"parameters": about})
