"""A filmstrip of one picture: what the network sees at some of the steps, and what it believes the picture to be.

    with Film(pipe) as film:
        pipe(prompt, seed=0, callback=film)
    strip = filmstrip(film, pipe.decode, pipe.schedule)

Shapes: B pictures, C H W one latent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from minidiff.core.errors import SettingsError
from minidiff.core.grids import Step
from minidiff.core.schedule import NoiseSchedule
from minidiff.draw.images import contact_sheet, to_pil

if TYPE_CHECKING:
    from minidiff.draw.pipeline import StableDiffusionPipeline


@dataclass(frozen=True, eq=False)
class Frame:
    """One call of the network. Latents (1, C, H, W) of the first picture, on the CPU."""

    t: float
    seen: Tensor  # the noisy latents that went in
    x0: Tensor  # the clean latents that it stands for, as the network sees it


class Film:
    """Watches the U-Net, and is the pipeline's callback: one `Frame` a step. Use it in a `with`, which removes its hook.

    It records the input of the network, not the states of the sampler: some samplers go through states that the network
    never sees. A frame is two latents, 16 kB at 512 pixels.
    """

    def __init__(self, pipe: "StableDiffusionPipeline") -> None:
        self.pipe, self.frames = pipe, list[Frame]()
        self._input = torch.empty(0)

    def __enter__(self) -> Self:
        in_one_piece(self.pipe, "a filmstrip")
        self._hook = self.pipe.unet.register_forward_pre_hook(self._look)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _look(self, unet: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._input = inputs[0][:1]  # with guidance both halves hold the same latents

    def __call__(self, step: Step) -> None:
        if len(self._input) == 0:
            raise SettingsError("the film has seen no call of the U-Net; draw within `with Film(pipe) as film:`.")
        x0 = step.x0[:1].float().cpu()
        seen = self._input[:, : x0.shape[1]]  # a U-Net for inpainting is given the mask as well, behind the latents
        self.frames.append(Frame(step.t, seen.float().cpu(), x0))


def filmstrip(
    film: Film,
    decode: Callable[[Tensor], Tensor],
    schedule: NoiseSchedule,
    title: str = "",
    count: int = 8,
    tile: int = 192,
) -> Image.Image:
    """`count` of the frames as a strip, the first and the last among them: t and the noise above, two pictures below.

    The noise is √(1 - ā_t), its share in x_t = √ā_t x_0 + √(1 - ā_t) ε (DDPM, arXiv 2006.11239, eq. 4): 1 is noise alone.
    """
    if count < 1:
        raise SettingsError(f"a strip of {count} pictures; give 1 or more.")
    if not film.frames:
        raise SettingsError("the film is empty; draw with callback=film first.")
    frames = [film.frames[i] for i in evenly(len(film.frames), count)]
    rows = [to_pil(decode(torch.cat(latents))) for latents in ([f.seen for f in frames], [f.x0 for f in frames])]
    labels = [f"t {frame.t:.0f}, noise {noise_share(schedule, frame.t):.2f}" for frame in frames]
    return contact_sheet(rows, ["what the network sees", "what it believes"], labels, title, tile)


def in_one_piece(pipe: "StableDiffusionPipeline", what: str) -> None:
    """Refuse a pipeline whose U-Net is shown the picture tile by tile."""
    if pipe.tile_size:
        raise SettingsError(f"{what} needs the whole picture in one call of the U-Net; leave tile_size out.")


def noise_share(schedule: NoiseSchedule, t: float) -> float:
    """√(1 - ā_t); between two timesteps, on the line between their ā."""
    a_bar = schedule.alphas_cumprod.double()
    below = min(max(int(t), 0), len(a_bar) - 1)
    above = min(below + 1, len(a_bar) - 1)
    return float((1 - torch.lerp(a_bar[below], a_bar[above], t - below)).sqrt())  # DDPM eq. 4


def evenly(length: int, count: int) -> list[int]:
    """`count` of the indices 0 … length - 1, as even as can be, ends included; all of them if there are no more."""
    if count >= length:
        return list(range(length))
    if count == 1:
        return [length - 1]
    return [round(i * (length - 1) / (count - 1)) for i in range(count)]
