"""A progress bar on stderr."""

import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], unit: str, what: str = "", total: int | None = None, show: bool | None = None) -> Iterable[T]:
    """`items`, with a bar while they are used up. `show` None: only if stderr is a terminal."""
    from tqdm import tqdm

    hidden = None if show is None else not show
    bar: Iterable[T] = tqdm(items, what or None, total, leave=False, file=sys.stderr, disable=hidden, unit=unit)
    return bar
