"""Judging float32 by float64: how far two programs are from the result without rounding.

Two programs that are both right differ by their rounding, on some processors by more than on others. So a result of minidiff
is not compared with the reference's float32, but both are compared with the reference in float64.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

ROUNDING = 1e-6  # eight roundings of float32: below, nothing is asked of anybody


def distance(results: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """Root mean square of (result - exact) / (1 + |exact|) over all elements: small elements count as much as large ones."""
    pairs = [(a.double().flatten(), b.flatten()) for a, b in zip(results, exact, strict=True)]
    assert all(b.dtype == torch.float64 and a.shape == b.shape for a, b in pairs)
    return float(torch.cat([(a - b) / (1 + b.abs()) for a, b in pairs]).square().mean().sqrt())


def assert_as_near(ours: Iterable[Tensor], theirs: Iterable[Tensor], exact: Iterable[Tensor]) -> None:
    """minidiff may be at most twice as far from the exact result as the reference's own float32 is."""
    exact = list(exact)
    own, other = distance(ours, exact), distance(theirs, exact)
    assert own <= max(2 * other, ROUNDING), f"minidiff is {own:.1e} from float64, the reference {other:.1e}"
