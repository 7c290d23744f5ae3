"""CUDA graphs: a GPU that is told once what to do, and then only "again".

A step of SD 1.5 at one picture is some thousand kernels, and starting each of them from Python can take longer than the kernel
itself. A CUDA graph records the launches of one call; replaying them is a single launch. What is recorded are addresses and
numbers, not Python: nothing that Python decides can be different at a replay. So:

- inputs are copied into the tensors that were recorded, and the answer is copied out of the one that was written to, before
  the next replay writes there again;
- another shape or dtype of an input is another recording;
- whatever else the recorded call has read, Python numbers (a LoRA's strength) and addresses (weights that were moved, cast,
  merged, or put on and taken off), is compared before each replay; where anything is different, all is recorded anew;
- what only Python sees (hooks that look on, autocast's cache, a prompt that attention remembers) cannot be recorded: then the
  call is simply made.

In training a call has a way back, which is a second graph (`StepRecording`). What the backward needs stays in the recordings'
own memory between the two.

It has not run on a GPU yet, so nothing is known of what it saves. The tests run it on a stand-in that records as CUDA does.
"""

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, cuda, nn
from torch.autograd.function import once_differentiable

from minidiff.adapters.lora import LoRALayer
from minidiff.errors import SettingsError
from minidiff.models.attention import CrossAttention
from minidiff.models.precision import full_precision

WARM_UP = 3  # calls before the one that is recorded, in which libraries choose their kernels and take their workspace


class Graphs:
    """The recordings of one module that draws. All share one pool of memory: each has answered before the next begins."""

    def __init__(self) -> None:
        self.read: list[Any] | None = None  # by the recorded calls, see `read_by`
        self.recordings: dict[Hashable, Any] = {}

    def call(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        """`module(*inputs)`, replayed where it can be; on a CPU, and where gradients are wanted, it is simply called."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cuda") or not on_gpu(inputs):
            return module(*inputs)
        with cuda.device_of(inputs[0]):
            recording = self.recording_of(Recording, module, inputs)
            return recording.replay(inputs) if recording else module(*inputs)

    def recording_of(self, kind: type, module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        """That of such a call, which is made if there is none yet; None where there can be none."""
        if (read := read_by(module)) is None:
            return None
        if self.read != read:
            self.forget()
            self.read, self.pool = read, cuda.graph_pool_handle()
        autocast = autocast_of(inputs[0].device.type)
        call = autocast, *((x.shape, x.dtype, x.device, x.requires_grad) for x in inputs)
        if call not in self.recordings:
            with torch.random.fork_rng([x.device for x in inputs[:1] if x.is_cuda]):  # a warm-up draws, too
                self.recordings[call] = kind(module, inputs, self.pool)
        return self.recordings[call]

    def forget(self) -> None:
        """Give the memory of all recordings back, once none of them is running any more."""
        if self.recordings:
            cuda.synchronize()
        self.recordings.clear()


class TrainingGraphs(Graphs):
    """The recordings of one module that is trained, or through which gradients pass to what it reads."""

    turn = 0  # how many forward passes were replayed

    def call(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        """`module(*inputs)`, replayed where it can be, now and in the backward pass; without gradients it is simply called."""
        if not torch.is_grad_enabled() or not on_gpu(inputs):
            return module(*inputs)
        with cuda.device_of(inputs[0]):
            recording = self.recording_of(StepRecording, module, inputs)
            if recording is None:
                return module(*inputs)
            answer: Tensor = Replay.apply(self, recording, *inputs, *recording.trained)
            return answer


class Recording:
    """One call with inputs of one kind, as a CUDA graph, in the memory of `pool`. Nothing may wait for the GPU in it."""

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...], pool: Any) -> None:
        self.inputs = [x.clone() for x in inputs]
        with aside():
            for _ in range(WARM_UP):
                module(*self.inputs)
        self.graph = cuda.CUDAGraph()
        with cuda.graph(self.graph, pool=pool):
            self.output = module(*self.inputs)

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The same call with these inputs; the answer is the caller's own."""
        copy_into(self.inputs, inputs)
        self.graph.replay()
        return self.output.clone()


class StepRecording:
    """One call and its way back, as two CUDA graphs in the memory of `pool`. Nothing may wait for the GPU in them."""

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...], pool: Any) -> None:
        self.inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        self.trained = [p for p in module.parameters() if p.requires_grad]
        leaves = [*self.inputs, *self.trained]
        wanted = [x for x in leaves if x.requires_grad]

        def back(output: Tensor, d_output: Tensor) -> tuple[Tensor | None, ...]:
            with full_precision(output):  # as where a loop calls backward(): outside of autocast
                return torch.autograd.grad(output, wanted, d_output, allow_unused=True)

        with without_cache(inputs[0].device.type):
            with aside():
                for _ in range(WARM_UP):
                    output = module(*self.inputs)
                    back(output, torch.zeros_like(output))
            self.there, self.back = cuda.CUDAGraph(), cuda.CUDAGraph()
            with cuda.graph(self.there, pool=pool):
                output = module(*self.inputs)
            self.output, self.d_output = output.detach(), torch.zeros_like(output)
            with cuda.graph(self.back, pool=pool):
                found = iter(back(output, self.d_output))
        self.gradients = [next(found) if x.requires_grad else None for x in leaves]

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The same call with these inputs; the answer is the caller's own."""
        copy_into(self.inputs, inputs)
        self.there.replay()
        return self.output.clone()

    def backward(self, d_output: Tensor) -> list[Tensor | None]:
        """The gradients of all inputs and of what is trained, or None: copies, as p.grad must not change at the next replay."""
        self.d_output.copy_(d_output)
        self.back.replay()
        return [None if gradient is None else gradient.clone() for gradient in self.gradients]


class Replay(torch.autograd.Function):
    """A recorded step, as autograd sees it: of the inputs, and of what is trained."""

    @staticmethod
    def forward(ctx: Any, graphs: TrainingGraphs, recording: StepRecording, *leaves: Tensor) -> Tensor:
        graphs.turn += 1
        ctx.graphs, ctx.turn, ctx.recording = graphs, graphs.turn, recording
        return recording.forward(leaves[: len(recording.inputs)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.turn != ctx.graphs.turn:
            raise RuntimeError("a recorded step has to go back before the next one begins: they share their memory")
        return None, None, *ctx.recording.backward(d_output)


def copy_into(recorded: list[Tensor], inputs: tuple[Tensor, ...]) -> None:
    """The inputs, where the recording reads them."""
    for place, x in zip(recorded, inputs, strict=True):
        place.detach().copy_(x)


@contextmanager
def aside() -> Iterator[None]:
    """On another stream, after all that came before and before all that comes after: a recording has to begin so."""
    stream = cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(cuda.current_stream())
    with cuda.stream(stream):
        yield
    cuda.current_stream().wait_stream(stream)


def autocast_of(device: str) -> tuple[torch.dtype, bool]:
    """In which number format it computes, and whether it is on."""
    return torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)


def without_cache(device: str) -> AbstractContextManager[Any]:
    """Autocast as it is, but it keeps no cast of a weight: a replay would read it when it is gone."""
    return torch.autocast(device, *autocast_of(device), cache_enabled=False)


def check_graph(wanted: bool, device: str) -> None:
    """SettingsError for --cuda_graph on a CPU."""
    if wanted and device == "cpu":
        raise SettingsError("--cuda_graph is for a GPU, and this would run on the CPU; leave it out.")


def on_gpu(inputs: tuple[Tensor, ...]) -> bool:
    """Are all inputs on an NVIDIA GPU?"""
    return all(x.is_cuda for x in inputs)


def read_by(module: nn.Module) -> list[Any] | None:
    """What a call of `module` reads beside its inputs: every address, and every number that may change.

    None where it cannot be recorded: with hooks, or attention inside `reading_once`, whose k and v are of one prompt and go
    with it. One walk through all parts, as it is made before each replay: for SD 1.5 1.0 ms, with a LoRA beside attention
    1.9 ms, on the CPU that the tests were written on.
    """
    parts = [module]
    for part in parts:  # which grows on the way; `modules()` takes three times as long
        parts += [child for child in part._modules.values() if child is not None]
    if any(part._forward_hooks or part._forward_pre_hooks for part in parts):
        return None
    if any(isinstance(part, CrossAttention) and part.remembered is not None for part in parts):
        return None
    tensors = [x for part in parts for own in (part._parameters, part._buffers) for x in own.values() if x is not None]
    numbers = [[*part.strength.items(), *part.scale.items()] for part in parts if isinstance(part, LoRALayer)]
    modes, kinds = [part.training for part in parts], [(x.dtype, x.requires_grad) for x in tensors]
    return [[*map(id, parts)], [*map(id, tensors)], [x.data_ptr() for x in tensors], modes, kinds, numbers]
