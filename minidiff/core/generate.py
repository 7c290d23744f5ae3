r"""From a prompt to a picture, in three stations.

    prompt --text encoder--> (B, 77, D) --\
    noise  (B, 4, h, w) ----------------- U-Net, once per step, through guidance and a sampler --> latents --VAE--> picture

    B pictures   D text width   H W picture height and width   h w = H/8, W/8 latent height and width
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minidiff.core.grids import Step
from minidiff.core.guidance import Text, UNetCall, guided
from minidiff.core.samplers import StepNoise
from minidiff.core.schedule import NoiseSchedule


@dataclass(frozen=True)
class Stations:
    """The three networks as functions (text.py, unet.py, vae.py), and the noise schedule."""

    encode: Callable[[Any], Text]  # prompts -> (B, 77, D), perhaps with a vector
    unet: UNetCall
    decode: Callable[[Tensor], Tensor]  # scaled latents (B, 4, h, w) -> pictures (B, 3, H, W) in [-1, 1]
    schedule: NoiseSchedule


@torch.no_grad()
def generate(
    stations: Stations, prompts: Any, negative_prompts: Any, noise: Tensor, step_noise: StepNoise, steps: int,
    guidance_scale: float, sampler: Callable[..., Iterator[Step]], guidance_rescale: float = 0.0,
) -> Iterator[Step | Tensor]:  # fmt: skip
    """Yields the sampler's steps, and at last the pictures (B, 3, H, W) in [-1, 1].

    `noise` (B, 4, h, w) is standard normal, on the device of the networks; `step_noise(i)` gives more of it for step i.
    `sampler` is a row of `SAMPLERS`, perhaps with some of its settings already given (functools.partial).
    """
    # station 1: the prompts become vectors
    text = stations.encode(prompts)
    no_text = stations.encode(negative_prompts) if guidance_scale > 1 else None

    # station 2: noise becomes latents, step by step
    model = guided(stations.unet, text, no_text, guidance_scale, guidance_rescale)
    for step in sampler(model, noise, stations.schedule, steps, step_noise):
        yield step

    # station 3: latents become pictures
    yield stations.decode(step.x)
