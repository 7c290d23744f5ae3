"""CUDA graphs: a GPU that is told once what to do, and then only "again".

A step of SD 1.5 at one picture is some thousand kernels, and starting each of them from Python can take longer than the kernel
itself. A CUDA graph records the launches of one call; replaying them is a single launch. What is recorded are addresses and
numbers, not Python: nothing that Python decides can be different at a replay. So:

- inputs are copied into the tensors that were recorded, and the answer is copied out of the one that was written to, before
  the next replay writes there again;
- another shape or dtype of an input is another recording;
- whatever else the recorded call has read, Python numbers (a LoRA's strength) and addresses (weights that were moved, cast,
  merged, or put on and taken off), is compared before each replay; where anything is different, all is recorded anew;
- what only Python sees (hooks that look on, gradients, autocast's cache, a prompt that attention remembers) cannot be recorded:
  then the call is simply made.

It has not run on a GPU yet, so nothing is known of what it saves. The tests run it on a stand-in that records as CUDA does.
"""

from collections.abc import Callable, Hashable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, cuda, nn

from minidiff.adapters.lora import LoRALayer
from minidiff.models.attention import CrossAttention

WARM_UP = 3  # calls before the one that is recorded, in which libraries choose their kernels and take their workspace


class Recording:
    """One call with inputs of one kind, as a CUDA graph, in the memory of `pool`. Nothing may wait for the GPU in it."""

    def __init__(self, call: Callable[..., Tensor], inputs: tuple[Tensor, ...], pool: Any) -> None:
        self.inputs = [x.clone() for x in inputs]
        aside = cuda.Stream()  # type: ignore[no-untyped-call]  # a recording may not begin on the default stream
        aside.wait_stream(cuda.current_stream())
        with cuda.stream(aside):
            for _ in range(WARM_UP):
                call(*self.inputs)
        cuda.current_stream().wait_stream(aside)
        self.graph = cuda.CUDAGraph()
        with cuda.graph(self.graph, pool=pool):
            self.output = call(*self.inputs)

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The same call with these inputs; the answer is the caller's own."""
        for recorded, x in zip(self.inputs, inputs, strict=True):
            recorded.copy_(x)
        self.graph.replay()
        return self.output.clone()


class Graphs:
    """The recordings of one module. All share one pool of memory: each has answered before the next begins."""

    def __init__(self) -> None:
        self.read: list[Any] | None = None  # by the recorded calls, see `read_by`
        self.recordings: dict[Hashable, Recording] = {}

    def call(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        """`module(*inputs)`, replayed where it can be; on a CPU it is simply called."""
        read = read_by(module) if on_gpu(inputs) and not torch.is_grad_enabled() else None
        if read is None or torch.is_autocast_enabled("cuda"):  # the casts of weights that it keeps would be gone at the replay
            return module(*inputs)
        with cuda.device_of(inputs[0]):
            if self.read != read:
                self.forget()
                self.read, self.pool = read, cuda.graph_pool_handle()
            kind = tuple((x.shape, x.dtype, x.device) for x in inputs)
            if kind not in self.recordings:
                self.recordings[kind] = Recording(module, inputs, self.pool)
            return self.recordings[kind].replay(inputs)

    def forget(self) -> None:
        """Give the memory of all recordings back, once none of them is running any more."""
        if self.recordings:
            cuda.synchronize()
        self.recordings.clear()


def on_gpu(inputs: tuple[Tensor, ...]) -> bool:
    """Are all inputs on an NVIDIA GPU?"""
    return all(x.is_cuda for x in inputs)


def read_by(module: nn.Module) -> list[Any] | None:
    """What a call of `module` reads beside its inputs: every address, and every number that may change.

    None where it cannot be recorded: with hooks, or attention inside `reading_once`, whose k and v are of one prompt and go
    with it. One walk through all parts, as it is made before each replay: for SD 1.5 2.4 ms, with a LoRA beside attention
    5.3 ms, on the CPU that the tests were written on.
    """
    read: list[Any] = []
    for part in module.modules():
        remembers = isinstance(part, CrossAttention) and part.remembered is not None
        if part._forward_hooks or part._forward_pre_hooks or remembers:
            return None
        tensors = (x for x in chain(part._parameters.values(), part._buffers.values()) if x is not None)
        read += [id(part), part.training, *((x.data_ptr(), x.dtype) for x in tensors)]
        if isinstance(part, LoRALayer):
            read += [*part.strength.items(), *part.scale.items()]
    return read
