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

A graph that dies takes things along that others of the same stream still use (cuBLAS's workspaces: PyTorch's issue 193402). So
each module's recordings have a stream of their own (`Recorder`), and all of them are given up together.

It has not run on a GPU yet, so nothing is known of what it saves. The tests run it on a stand-in that records as CUDA does.
"""

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, cuda, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from minidiff.core.errors import SettingsError
from minidiff.core.lora import LoRALayer
from minidiff.core.transformer import CrossAttention
from minidiff.fast.precision import full_precision

WARM_UP = 3  # calls before the one that is recorded, in which libraries choose their kernels and take their workspace


class Graphs:
    """The recordings of one module that draws. All share one pool of memory: each has answered before the next begins."""

    def __init__(self) -> None:
        self.read: list[Any] | None = None  # by the recorded calls, see `read_by`
        self.recordings: dict[Hashable, Any] = {}
        self.recorder: Recorder | None = None

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
        if self.recorder is None or self.read != read:
            self.forget()
            self.read, self.recorder = read, Recorder()
        autocast = autocast_of(inputs[0].device.type)
        call = autocast, *((x.shape, x.dtype, x.device, x.requires_grad) for x in inputs)
        if call not in self.recordings:
            try:
                with torch.random.fork_rng([x.device for x in inputs[:1] if x.is_cuda]):  # a warm-up draws, too
                    self.recordings[call] = kind(module, inputs, self.recorder)
            except BaseException:
                self.forget()
                raise
        return self.recordings[call]

    def forget(self) -> None:
        """Give the memory of all recordings back, once none of them is running any more."""
        if self.recordings:
            cuda.synchronize()
        for recording in self.recordings.values():
            recording.graphs = ()  # now, whoever still holds the recording
        self.recordings.clear()
        self.recorder = None


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


class Recorder:
    """Where the recordings of one module are made: on a stream aside, in a pool of memory for all of them."""

    def __init__(self) -> None:
        self.stream, self.pool = cuda.Stream(), cuda.graph_pool_handle()  # type: ignore[no-untyped-call]

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """On that stream, after all that came before and before all that comes after."""
        self.stream.wait_stream(cuda.current_stream())
        with cuda.stream(self.stream):
            yield
        cuda.current_stream().wait_stream(self.stream)

    @contextmanager
    def recording(self) -> Iterator[Any]:
        """The graph of what is called inside the `with`. Nothing may wait for the GPU there; other threads may."""
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            yield graph


class Recording:
    """One call with inputs of one kind, as a CUDA graph."""

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...], recorder: Recorder) -> None:
        self.inputs = [x.clone() for x in inputs]
        with recorder.warming_up():
            for _ in range(WARM_UP):
                module(*self.inputs)
        with recorder.recording() as graph:
            self.output = module(*self.inputs)
        self.graphs = (graph,)

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The same call with these inputs; the answer is the caller's own."""
        copy_into(self.inputs, inputs)
        self.graphs[0].replay()
        return self.output.clone()


class StepRecording:
    """One call and its way back, as two CUDA graphs."""

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...], recorder: Recorder) -> None:
        self.inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.trained = list(named.values())
        # The same memory, but leaves of their own: the caller's may hang in a graph of autograd's, and on another stream.
        aliases = {name: p.detach().requires_grad_() for name, p in named.items()}
        leaves = [*self.inputs, *aliases.values()]
        wanted = [x for x in leaves if x.requires_grad]

        def there() -> Tensor:
            answer: Tensor = functional_call(module, aliases, tuple(self.inputs))
            return answer

        def back(output: Tensor, d_output: Tensor) -> tuple[Tensor | None, ...]:
            with full_precision(output):  # as where a loop calls backward(): outside of autocast
                return torch.autograd.grad(output, wanted, d_output, allow_unused=True)

        with without_cache(inputs[0].device.type):
            with recorder.warming_up():
                for _ in range(WARM_UP):
                    output = there()
                    back(output, torch.zeros_like(output))
                del output
            with recorder.recording() as forward:
                output = there()
            self.output, self.d_output = output.detach(), torch.zeros_like(output)
            with recorder.recording() as backward:
                found = iter(back(output, self.d_output))
        self.gradients = [next(found) if x.requires_grad else None for x in leaves]
        self.graphs = forward, backward

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The same call with these inputs; the answer is the caller's own."""
        copy_into(self.inputs, inputs)
        self.graphs[0].replay()
        return self.output.clone()

    def backward(self, d_output: Tensor) -> list[Tensor | None]:
        """The gradients of all inputs and of what is trained, or None.

        What becomes someone's `grad` is a copy, as that must not change at the next replay; what is added to one need not be.
        """
        self.d_output.copy_(d_output)
        self.graphs[1].replay()
        added = [*(False for _ in self.inputs), *(p.grad is not None for p in self.trained)]
        return [g.clone() if g is not None and not add else g for g, add in zip(self.gradients, added, strict=True)]


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
    modes, kinds = [part.training for part in parts], [(x.shape, x.dtype, x.requires_grad) for x in tensors]
    return [[*map(id, parts)], [*map(id, tensors)], [x.data_ptr() for x in tensors], modes, kinds, numbers]
