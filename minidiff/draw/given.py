"""Tensors that a caller gives: encoded prompts in place of prompts, latents in place of drawn noise. Checks of both."""

from torch import Tensor

from minidiff.core.errors import SettingsError
from minidiff.core.text import LENGTH
from minidiff.draw.prompting import Prompt

Side = list[Prompt] | Tensor  # all prompts, or all negative prompts; or the vectors that the caller gives for them


def with_vectors(
    prompts: list[Prompt], negatives: list[Prompt], x: Tensor | None, no_x: Tensor | None, width: int, chunks: int
) -> tuple[tuple[Side, Side], int]:
    """Prompts and negative prompts, replaced by `prompt_embeds` x and `negative_prompt_embeds` no_x; and k of both.

    `chunks`: how many chunks of 75 tokens the prompts have. SettingsError if the tensors (B, 77 k, D) do not fit.
    """
    side = prompts if x is None else one_for_each("prompt_embeds", x, len(prompts), width)
    no_side = negatives if no_x is None else one_for_each("negative_prompt_embeds", no_x, len(prompts), width)
    chunks = max(chunks, *(one.shape[1] // LENGTH for one in (side, no_side) if isinstance(one, Tensor)))
    lengths = [one.shape[1] if isinstance(one, Tensor) else LENGTH * chunks for one in (side, no_side)]
    if lengths[0] != lengths[1]:
        raise SettingsError(f"prompt_embeds are {lengths[0]} tokens long and the negative ones {lengths[1]}.")
    return (side, no_side), chunks


def one_for_each(name: str, given: Tensor, count: int, width: int) -> Tensor:
    """Vectors (B, 77 k, D) -> (count, 77 k, D)."""
    check_floats(name, given)
    if given.ndim != 3 or not len(given) or count % len(given) or given.shape[1] % LENGTH or given.shape[2] != width:
        fits = f"for {count} pictures it must be (1 or {count}, {LENGTH} k, {width})"
        raise SettingsError(f"{name} has the shape {tuple(given.shape)}; {fits}, as encode_prompt gives it.")
    return given.repeat_interleave(count // len(given), dim=0)


def checked_latents(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Noise of `shape` in fp32."""
    if tuple(check_floats("latents", latents).shape) != shape:
        raise SettingsError(f"latents have the shape {tuple(latents.shape)}; for this call it must be {shape}.")
    return latents.float()


def check_floats(name: str, given: Tensor) -> Tensor:
    """The tensor itself; SettingsError if it is not a tensor of finite floats."""
    if not isinstance(given, Tensor) or not given.is_floating_point() or not given.ndim:
        kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise SettingsError(f"{name}: this is a {kind}; give a tensor of floats.")
    if not given.isfinite().all():
        raise SettingsError(f"{name}: there is NaN or infinity in the tensor; look where it was made.")
    return given
