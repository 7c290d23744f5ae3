"""Arguments that few calls have: generators, and SDXL's sizes. SettingsError if nothing can be drawn with them."""

from collections.abc import Sequence
from typing import Any

import torch

from minidiff.core.errors import SettingsError

Generators = torch.Generator | Sequence[torch.Generator]
Pair = tuple[int, int]  # height and width, or top and left


def generators_of(given: Generators, count: int) -> list[tuple[torch.Generator, int]]:
    """Generators, and for how many of the `count` pictures each draws: one for all, or one for each."""
    several: list[Any] = [(one, 1) for one in given] if isinstance(given, Sequence) else [(given, count)]
    if not all(isinstance(one, torch.Generator) for one, _ in several) or sum(n for _, n in several) != count:
        raise SettingsError(f"generator must be one torch.Generator, or a list with one for each of the {count} pictures.")
    return several


def sizes_of(usual: tuple[int, ...], original: Pair | None, crop: Pair | None, target: Pair | None) -> tuple[int, ...]:
    """A `Side`'s sizes; where a pair is not given, the usual one."""
    names, usuals = ("original_size", "crops_coords_top_left", "target_size"), (usual[:2], usual[2:4], usual[4:])
    pairs = [own if given is None else tuple(given) for given, own in zip((original, crop, target), usuals)]
    if wrong := next((name for name, pair in zip(names, pairs) if len(pair) != 2), None):
        raise SettingsError(f"{wrong} has two numbers: height and width, or top and left.")
    return tuple(int(number) for pair in pairs for number in pair)
