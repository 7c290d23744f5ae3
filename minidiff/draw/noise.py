"""The noise of a picture: a function of its seed and of the place where it is used."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minidiff.core.rng import normal

Draw = Callable[[int | str], Tensor]  # what the noise is for -> the noise


def noise_source(shape: Sequence[int], seeds: Sequence[int] | torch.Generator) -> Draw:
    """draw(purpose) -> standard normal noise of `shape` (B, C, h, w).

    The purpose is "latents", "posterior" (a picture's own latents), "surroundings" (inpainting models), or i for step i. Noise
    for picture b is a function of seeds[b] and the purpose, fp32 on the CPU for any device. A torch.Generator ignores the
    purpose: it gives its next numbers, on its own device, so the order of the calls counts, as in diffusers.
    """
    if isinstance(seeds, torch.Generator):
        return lambda purpose: torch.randn(tuple(shape), generator=seeds, device=seeds.device)

    def draw(purpose: int | str) -> Tensor:
        where = ("step", purpose) if isinstance(purpose, int) else (purpose,)
        return torch.stack([normal(shape[1:], seed, *where) for seed in seeds])

    return draw
