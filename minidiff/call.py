"""What one call of the pipeline needs: its noise, and checks of what it was asked."""

from collections.abc import Callable, Iterable, Sequence
from operator import index

import torch
from torch import Tensor

from minidiff.errors import SettingsError
from minidiff.rng import normal


def noise_source(
    shape: tuple[int, ...], seed: int | Sequence[int] | None, generator: torch.Generator | None
) -> tuple[Callable[[], Tensor], Callable[[int], Tensor]]:
    """Two functions: the noise to start from, and the noise of step i. From seeds both are fp32 on the CPU, for any device.

    A generator is asked only when its noise is wanted, in diffusers' order: first the latents, unless they are given, then
    step by step.
    """
    if generator is not None:

        def next_noise() -> Tensor:
            return torch.randn(shape, generator=generator, device=generator.device)

        return next_noise, lambda i: next_noise()
    seeds = check_seeds(int(torch.randint(2**31, ())) if seed is None else seed, shape[0])

    def draw(*where: int | str) -> Tensor:
        return torch.stack([normal(shape[1:], s, *where) for s in seeds])

    return lambda: draw("latents"), lambda i: draw("step", i)


def check_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """One seed for each picture. Plain ints: numpy's look different to the hash, and would draw other pictures."""
    try:
        seeds = [index(s) for s in seed] if isinstance(seed, Iterable) else [index(seed) + i for i in range(count)]
    except TypeError:
        raise SettingsError(f"seed is {seed!r}; it must be a whole number, or one for each picture.") from None
    if len(seeds) != count:
        raise SettingsError(f"{len(seeds)} seeds were given for {count} pictures; give one number, or one for each.")
    return seeds


def check_call(prompts: list[str], negatives: list[str], output_type: str, per_prompt: int) -> None:
    if per_prompt < 1:
        raise SettingsError(f"num_images_per_prompt is {per_prompt}; it must be at least 1.")
    if not prompts or not all(isinstance(p, str) for p in prompts + negatives):
        raise SettingsError("prompt and negative_prompt must be a text, or a list of texts.")
    if len(prompts) != len(negatives):
        raise SettingsError(f"{len(negatives)} negative prompts for {len(prompts)} pictures; give one, or one for each prompt.")
    if output_type not in ("pil", "pt", "latent"):
        raise SettingsError(f'output_type "{output_type}" is unknown; it is pil, pt or latent.')


def check_latents(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(latents.shape) != shape:
        raise SettingsError(f"latents have the shape {tuple(latents.shape)}; for this call it must be {shape}.")
    return latents.float()


def as_list(value: str | Sequence[str]) -> list[str]:
    """A text as a list of one; what is no list either is left for the checks to refuse, in a list as well."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
