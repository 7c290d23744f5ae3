"""Ctrl-C and SIGTERM. Nothing here imports torch: the command line needs it first of all."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def signals_call(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Inside the `with`, Ctrl-C and SIGTERM call `handler`; but only in the main thread, where alone Python takes signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
