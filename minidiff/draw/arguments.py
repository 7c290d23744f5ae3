"""The arguments of a call: prompts, sampler and noise, checked. SettingsError for those with which nothing can be drawn.

B pictures   C h w one latent   D text width   P width of SDXL's pooled vector
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any

import torch
from torch import Tensor

from minidiff.core.errors import SettingsError
from minidiff.core.grids import LCM_STEPS, SAMPLERS, Sampler
from minidiff.core.guidance import Text
from minidiff.core.rng import normal
from minidiff.core.schedule import NoiseSchedule
from minidiff.draw.prompting import Prompt, parse_prompt
from minidiff.files.folder import check_sampler

Generators = torch.Generator | Sequence[torch.Generator]
Draw = Callable[[int | str], Tensor]  # what the noise is for -> the noise
Encoded = Sequence[Tensor | None]  # prompt_embeds (B, 77 k, D) and pooled_prompt_embeds (B, P), from the caller
Pair = tuple[int, int]  # height and width, or top and left
SPACINGS = ("leading", "linspace", "trailing")
EMBEDS = ("prompt_embeds", "pooled_prompt_embeds")


@dataclass(frozen=True)
class Side:
    """The prompts of a call, or its negative prompts."""

    prompts: list[Prompt]
    encoded: Text = ()  # in place of the prompts
    zeros: bool = False  # in place of the prompts
    sizes: tuple[int, ...] = ()  # SDXL: original height and width, top and left of the crop, target height and width

    def __len__(self) -> int:
        return len(self.encoded[0] if self.encoded else self.prompts)

    def repeated(self, times: int) -> "Side":
        """Each prompt so many times, one after the other."""
        encoded = tuple(part.repeat_interleave(times, dim=0) for part in self.encoded)
        return replace(self, prompts=[one for one in self.prompts for _ in range(times)], encoded=encoded)


def both_sides(given: tuple[Any, Encoded], negative: tuple[Any, Encoded], per_prompt: int) -> tuple[Side, Side]:
    """Prompts and negative prompts from (text or texts, or encoded prompts instead): each prompt `per_prompt` times, and a
    negative prompt for each."""
    if per_prompt < 1:
        raise SettingsError(f"num_images_per_prompt is {per_prompt}; it must be at least 1.")
    if (given[0] is None) == (given[1][0] is None):
        raise SettingsError("give either a prompt or prompt_embeds.")
    sides: list[Side] = []
    for texts, embeds in (given, negative):
        encoded = tuple(finite_floats(name, one) for name, one in zip(EMBEDS, embeds) if one is not None)
        row = [texts] if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
        if not encoded and not all(isinstance(text, str) for text in row):
            raise SettingsError("prompt and negative_prompt must be a text, or a list of texts.")
        sides.append(Side([] if encoded else [parse_prompt(text) for text in row], encoded))
    prompts, negatives = map(len, sides)
    if not prompts or negatives not in (1, prompts):
        raise SettingsError(f"{negatives} negative prompts for {prompts} prompts; give one, or one for each.")
    return sides[0].repeated(per_prompt), sides[1].repeated(prompts * per_prompt // negatives)


def sizes_of(usual: tuple[int, ...], original: Pair | None, crop: Pair | None, target: Pair | None) -> tuple[int, ...]:
    """A `Side`'s sizes; where a pair is not given, the usual one."""
    names, usuals = ("original_size", "crops_coords_top_left", "target_size"), (usual[:2], usual[2:4], usual[4:])
    pairs = [own if given is None else tuple(given) for given, own in zip((original, crop, target), usuals)]
    if wrong := next((name for name, pair in zip(names, pairs) if len(pair) != 2), None):
        raise SettingsError(f"{wrong} has two numbers: height and width, or top and left.")
    return tuple(as_int(names[i], number) for i, pair in enumerate(pairs) for number in pair)


def sampler_for(name: str, spacing: str | None = None, karras: bool | None = None, eta: float = 0.0) -> Sampler:
    """The sampler of this name. SettingsError if there is none, or if it does not take these settings."""
    check_sampler(name)
    sampler = SAMPLERS[name]
    if spacing and sampler.spacing is None:
        raise SettingsError(f"timestep_spacing is {spacing}; {name} has its own timesteps. Leave it out.")
    if spacing not in (None, *SPACINGS):
        raise SettingsError(f'timestep_spacing "{spacing}" is unknown; it is one of {", ".join(SPACINGS)}.')
    if karras and not sampler.karras:
        able = ", ".join(name for name, other in SAMPLERS.items() if other.karras)
        raise SettingsError(f"use_karras_sigmas is on; only these samplers take Karras sigmas: {able}.")
    if not 0 <= eta <= 1 or (eta and not sampler.eta):
        raise SettingsError(f"eta is {eta}; only ddim and tcd have one, from 0 (deterministic) to 1 (all new noise).")
    return sampler


def check_steps(name: str, steps: int, strength: float, spacing: str | None, schedule: NoiseSchedule) -> None:
    """SettingsError if the sampler of this name cannot take so many steps, or start where they say."""
    most = LCM_STEPS if SAMPLERS[name].spacing is None else len(schedule.sigmas)
    if not 1 <= steps <= most:
        raise SettingsError(f"num_inference_steps is {steps}; it can be 1 to {most} with {name}.")
    if not 0 < strength <= 1:
        raise SettingsError(f"strength is {strength}; it can be above 0 (the image as it is) to 1.")
    if not int(steps * strength):
        raise SettingsError(f"0 denoising steps: {steps} steps at strength {strength} are too few; use more of either.")
    if name == "heun" and spacing != "leading" and schedule.sigmas[-1] > 1000:  # a mean of two directions there is noise
        raise SettingsError("heun cannot begin at zero terminal SNR; use euler, or leading timestep_spacing.")


def noise_source(
    shape: Sequence[int], seed: int | Sequence[int] | None = None, generator: Generators | None = None,
    latents: Tensor | None = None,
) -> Draw:  # fmt: skip
    """draw(purpose) -> standard normal noise of `shape` (B, C, h, w); for the purpose "latents", the caller's if given.

    The purpose is "latents", "posterior" (a picture's own latents), "surroundings" (inpainting models), or i for step i. Noise
    for picture b is a function of seed + b (or seed[b]) and the purpose, fp32 on the CPU for any device. A torch.Generator, or
    one for each picture, gives its next numbers for any purpose, on its own device: the order of calls counts, as in diffusers.
    """
    if latents is not None and finite_floats("latents", latents).shape != tuple(shape):
        raise SettingsError(f"latents have the shape {tuple(latents.shape)}; for this call it must be {tuple(shape)}.")
    of_each = generators_of(generator, shape[0])
    if seed is None:
        seed = 0 if generator else int(torch.randint(2**31, ()))
    if isinstance(seed, Iterable) and not isinstance(seed, str):
        seeds = [as_int("seed", one) for one in seed]
    else:  # plain ints: the hash of numpy's would draw other pictures
        seeds = [as_int("seed", seed) + i for i in range(shape[0])]
    if len(seeds) != shape[0]:
        raise SettingsError(f"{len(seeds)} seeds were given for {shape[0]} pictures; give one number, or one for each.")

    def draw(purpose: int | str) -> Tensor:
        if latents is not None and purpose == "latents":
            return latents.float()
        if of_each:
            return torch.cat([torch.randn((n, *shape[1:]), generator=g, device=g.device) for g, n in of_each])
        where = ("step", purpose) if isinstance(purpose, int) else (purpose,)
        return torch.stack([normal(shape[1:], one, *where) for one in seeds])

    return draw


def generators_of(given: Generators | None, count: int) -> list[tuple[torch.Generator, int]]:
    """Generators, and for how many of the `count` pictures each draws: one for all, or one for each."""
    several: list[Any] = [(one, 1) for one in given] if isinstance(given, Sequence) else [(given, count)] * (given is not None)
    if not all(isinstance(one, torch.Generator) for one, _ in several) or sum(n for _, n in several) not in (0, count):
        raise SettingsError(f"generator must be one torch.Generator, or a list with one for each of the {count} pictures.")
    return several


def finite_floats(name: str, given: Tensor) -> Tensor:
    """The tensor itself; SettingsError if it is not a tensor of finite floats."""
    if not isinstance(given, Tensor) or not given.is_floating_point() or not given.ndim or not given.isfinite().all():
        raise SettingsError(f"{name} must be a tensor of floats, without NaN and infinity.")
    return given


def as_int(name: str, value: int) -> int:
    """A plain int from any integer type; SettingsError for 64.0 and other types."""
    try:
        return index(value)
    except TypeError:
        raise SettingsError(f"{name} is {value!r}; it must be a whole number.") from None
