"""Fair timing on a machine that is never quite still.

Contenders take turns, in ABBA order: a round goes through all of them, the next one in reverse. What drifts (a processor
that warms up, a neighbour that starts to compile) then falls on all alike. What counts is the median; and of the ratio of
two medians the interval that holds 95 in 100 bootstrap resamples of whole rounds (Efron 1979), in which what was measured
in the same round stays together.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

HOPELESS = 5.0  # times slower than minidiff: measured once, for the record, so that the others get the time
FEW = 4  # rounds


@dataclass(frozen=True)
class Seconds:
    """How long something took: on the clock on the wall, and of the processor. A contender may give its own."""

    wall: float
    cpu: float


def abba(names: Sequence[str], rounds: int) -> list[list[str]]:
    """In which order contenders run: A B, B A, A B, …"""
    return [list(names) if i % 2 == 0 else list(reversed(names)) for i in range(rounds)]


def timed(call: Callable[[], Any]) -> tuple[Seconds, Any]:
    """One call, to the end of its work on a GPU; and what it gave."""
    wait_for_gpu()
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    wait_for_gpu()
    seconds = Seconds(time.perf_counter() - wall, time.process_time() - cpu)
    return (result, result) if isinstance(result, Seconds) else (seconds, result)


def wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(
    contenders: Mapping[str, Callable[[], Any]],
    seconds: float,
    most: int = 100,
    hopeless: float = HOPELESS,
    first: Mapping[str, Seconds] | None = None,
) -> dict[str, list[Seconds]]:
    """Whole ABBA pairs of rounds until `seconds` have passed, two rounds at least, after one round that only warms up.

    `first`: the seconds of that round, where it has been made already. Contenders that were `hopeless` times slower in it
    than the first one, minidiff, keep that number.
    """
    first = first or {name: timed(call)[0] for name, call in contenders.items()}
    limit = hopeless * first[next(iter(contenders))].wall
    racing = [name for name in contenders if first[name].wall <= limit]
    found: dict[str, list[Seconds]] = {name: [] for name in racing}
    end = time.perf_counter() + seconds
    for i, order in enumerate(abba(racing, most)):
        if i and i % 2 == 0 and time.perf_counter() > end:
            break
        for name in order:
            found[name].append(timed(contenders[name])[0])
    return {name: found.get(name) or [first[name]] for name in contenders}


@dataclass(frozen=True)
class Summary:
    """One contender beside minidiff. `ratio` is its median over minidiff's: above 1, minidiff is the quicker."""

    median: float
    count: int
    ratio: float
    low: float | None  # the interval; none of fewer than FEW rounds, which would look narrower than it is
    high: float | None


def summaries(times: Mapping[str, Sequence[float]], ours: str) -> dict[str, Summary]:
    """Medians, and their ratios to those of `ours`."""
    return {name: summary(numbers, times[ours]) for name, numbers in times.items()}


def summary(numbers: Sequence[float], ours: Sequence[float]) -> Summary:
    median, base = float(np.median(numbers)), float(np.median(ours))
    enough = min(len(numbers), len(ours)) >= FEW
    low, high = ratio_interval(numbers, ours) if enough else (None, None)
    return Summary(median, len(numbers), median / base, low, high)


def ratio_interval(
    numbers: Sequence[float], ours: Sequence[float], level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap's interval of median(numbers) / median(ours).

    Where both were measured in the same rounds, rounds are resampled; else each side for itself.
    """
    a, b, rng = np.asarray(numbers, dtype=float), np.asarray(ours, dtype=float), np.random.default_rng(seed)
    pick_a = rng.integers(len(a), size=(draws, len(a)))
    pick_b = pick_a if len(a) == len(b) else rng.integers(len(b), size=(draws, len(b)))
    ratios = np.median(a[pick_a], axis=1) / np.median(b[pick_b], axis=1)
    edge = (1 - level) / 2
    low, high = np.quantile(ratios, [edge, 1 - edge])
    return float(low), float(high)


class Deadline:
    """The time of a whole run; None: as long as it takes."""

    def __init__(self, seconds: float | None) -> None:
        self.end = None if seconds is None else time.perf_counter() + seconds

    def left(self) -> float:
        return float("inf") if self.end is None else self.end - time.perf_counter()

    def spent(self) -> bool:
        return self.left() <= 0


def rounds_of(names: Sequence[str]) -> Iterator[str]:
    """Contenders without end, in ABBA order."""
    while True:
        for order in abba(names, 2):
            yield from order
