"""Previews while sampling: latents -> small pictures, by one matrix instead of the decoder.

    preview = fit_preview(pipe.vae)
    pipe(prompt, callback=preview_file(preview, "preview.png"))

A latent is a small picture in other colours: red, green and blue are, nearly, weighted sums of its channels. The weights are
fitted to the autoencoder at hand.

Shapes: B pictures, c latent channels, h w latent height and width; one latent cell is one pixel of the preview.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff import __version__
from minidiff.core.grids import Step
from minidiff.core.rng import generator
from minidiff.core.vae import AutoencoderKL
from minidiff.draw.images import save_png, to_pil

Preview = Callable[[Tensor], Tensor]  # scaled latents (B, c, h, w) -> pictures (B, 3, h, w) in [-1, 1]
PICTURES, SWATCHES, CELLS = 8, 4, 4  # pictures to fit on; swatches along a side of each; latent cells along a side of a swatch


@torch.no_grad()
def fit_preview(vae: AutoencoderKL) -> Preview:
    """The best linear map from latents to colours, by least squares over pictures of flat swatches in random colours.

    It encodes colours. Decoding constant latents, the other way, is worse: most of them are the latents of no picture.
    """
    config, parameter = vae.config, next(vae.parameters())
    colours = 2 * torch.rand(PICTURES, 3, SWATCHES, SWATCHES, generator=generator(0, "preview")) - 1
    pictures = F.interpolate(colours, scale_factor=config.downscale * CELLS)
    mean, _ = vae.encode(pictures.to(parameter))  # one batch: 8 pictures of 128 by 128 pixels
    cells = (mean * config.scaling_factor).movedim(1, -1).flatten(0, 2).double().cpu()  # (N, c)
    wanted = F.interpolate(colours, scale_factor=CELLS).movedim(1, -1).flatten(0, 2).double()  # (N, 3)
    with_one = torch.cat([cells, torch.ones(len(cells), 1, dtype=cells.dtype)], dim=1)
    solution = torch.linalg.lstsq(with_one, wanted, driver="gelsd").solution.float()  # gelsd: a dead channel does no harm
    matrix, bias = solution[:-1], solution[-1][:, None, None]  # (c, 3), (3, 1, 1)
    return lambda latents: (torch.einsum("bchw,cd->bdhw", latents.float().cpu(), matrix) + bias).clamp(-1, 1)


def preview_file(preview: Preview, path: Path | str, scale: int = 4) -> Callable[[Step], None]:
    """A callback that rewrites a small PNG after each step: the picture as the network expects it by then.

    A latent cell becomes `scale` pixels: with 4, the preview is half as large as the picture.
    """

    def callback(step: Step) -> None:
        (picture,) = to_pil(F.interpolate(preview(step.x0[:1]), scale_factor=scale, mode="bicubic"))
        save_png(picture, path, {"parameters": f"Preview: {step.index + 1} of {step.total}, Version: minidiff {__version__}"})

    return callback
