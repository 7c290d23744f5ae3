"""A stand-in for torch.cuda: it records every tensor operation of a call, and runs the same again.

As a real recording does, it knows tensors (there: addresses) and numbers, and no Python: what Python would do otherwise at the
second call, a replay does not. It refuses to read a number back, as CUDA does while it records.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minidiff.fast import graphs


class Tape(TorchDispatchMode):
    """torch.cuda.CUDAGraph: operations, with the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "operation not permitted when stream is capturing"
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # its casts are among the operations
    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # no view, and not in place
                    old.copy_(new)


class Stream:
    def __init__(self, events: list[str], name: str) -> None:
        self.events, self.name = events, name

    def wait_stream(self, other: "Stream") -> None:
        self.events.append(f"{self.name} waits for {other.name}")


class FakeCuda:
    """Those names of torch.cuda that graphs.py uses; `events` is what was done."""

    CUDAGraph = Tape

    def __init__(self) -> None:
        self.events: list[str] = []
        self.pools = 0

    def Stream(self) -> Stream:  # noqa: N802
        return Stream(self.events, "aside")

    def current_stream(self) -> Stream:
        return Stream(self.events, "main")

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.events.append(f"on {stream.name}")
        yield
        self.events.append("on main")

    @contextmanager
    def graph(self, tape: Tape, pool: int, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"  # threads that encode pictures may do what a recording may not
        with tape:
            yield
        self.events.append(f"recorded in pool {pool} on {stream.name}")

    @contextmanager
    def device_of(self, x: Tensor) -> Iterator[None]:
        yield

    def graph_pool_handle(self) -> int:
        self.pools += 1
        return self.pools

    def synchronize(self) -> None:
        self.events.append("all is done")


def put_in(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """From here on graphs.py takes the stand-in for a GPU, and every tensor for one on it."""
    fake = FakeCuda()
    monkeypatch.setattr(graphs, "cuda", fake)
    monkeypatch.setattr(graphs, "on_gpu", lambda inputs: True)
    return fake


def recorded(fake: FakeCuda) -> int:
    """How many graphs were recorded."""
    return sum(event.startswith("recorded") for event in fake.events)
