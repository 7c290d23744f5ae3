"""A filmstrip of one picture: the latents that the network sees at some of the steps, and the picture that it expects.

    with Film(pipe) as film:
        pipe(prompt, seed=0, callback=film)
    strip = filmstrip(film, pipe.decode, pipe.schedule)

Shapes: B pictures, C H W one latent.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from minidiff.core.errors import SettingsError
from minidiff.core.grids import Step
from minidiff.core.schedule import NoiseSchedule
from minidiff.draw.images import contact_sheet, to_pil
from minidiff.draw.pipeline import StableDiffusionPipeline


class Frame(NamedTuple):
    """One call of the network: t, the noisy latents that went in, and the clean ones as the network sees them (1, C, H, W)."""

    t: float
    seen: Tensor
    x0: Tensor


class Film:
    """Watches the U-Net, and is the pipeline's callback: one `Frame` a step. Use it in a `with`, which removes its hook."""

    def __init__(self, pipe: StableDiffusionPipeline) -> None:
        self.pipe, self.frames = pipe, list[Frame]()

    def __enter__(self) -> Self:
        check_visible(self.pipe)
        self._hook = self.pipe.unet.register_forward_pre_hook(self._look)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _look(self, unet: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._input = inputs[0][:1]  # of the first picture; with guidance both halves hold the same latents

    def __call__(self, step: Step) -> None:
        x0 = step.x0[:1].float().cpu()
        seen = self._input[:, : x0.shape[1]]  # a U-Net for inpainting is given the mask as well, behind the latents
        self.frames.append(Frame(step.t, seen.float().cpu(), x0))


def check_visible(pipe: StableDiffusionPipeline) -> None:
    """Refuse a U-Net whose hooks would not see the whole picture."""
    if pipe.tile_size:
        raise SettingsError("tile_size shows the U-Net only parts of the picture; leave it out to look inside.")
    if pipe.unet._compiled_call_impl is not None:
        raise SettingsError("a compiled U-Net hides its layers; leave --compile out to look inside.")


def filmstrip(
    film: Film, decode: Callable[[Tensor], Tensor], schedule: NoiseSchedule, title: str = "", count: int = 8, tile: int = 192
) -> Image.Image:
    """`count` of the frames as a strip, the first and the last among them: t and the noise above, two pictures below.

    The noise is √(1 - ā_t), its share in x_t = √ā_t x_0 + √(1 - ā_t) ε (DDPM, arXiv 2006.11239, eq. 4): 1 is noise alone.
    """
    chosen = torch.linspace(0, len(film.frames) - 1, min(count, len(film.frames))).round().int().tolist()
    frames = [film.frames[i] for i in chosen]
    rows = [to_pil(decode(torch.cat(latents))) for latents in ([f.seen for f in frames], [f.x0 for f in frames])]
    labels = [f"t {frame.t:.0f}, noise {noise_share(schedule, frame.t):.2f}" for frame in frames]
    return contact_sheet(rows, ["what the network sees", "what it believes"], labels, title, tile)


def noise_share(schedule: NoiseSchedule, t: float) -> float:
    """√(1 - ā_t); between two timesteps, on the line between their ā."""
    a_bar = schedule.alphas_cumprod.double().numpy()
    return math.sqrt(1 - np.interp(t, range(len(a_bar)), a_bar))  # DDPM eq. 4
