"""Where the memory of a training step goes, by arithmetic: before the run, without computing a number.

B samples   C h w a latent   S text tokens   D text width
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from minidiff.train import distributed
from minidiff.train.loop import DTYPES
from minidiff.train.settings import TrainSettings

if TYPE_CHECKING:
    from minidiff.train.loop import Task

MIB = 2**20


@contextmanager
def told(task: "Task", settings: TrainSettings) -> Iterator[None]:
    """Print the table before the run inside the `with`, and what was measured behind it; the first process does."""
    first = distributed.world().rank == 0
    if first:
        print(table(task, settings))
    yield
    if first:
        print(measured(next(iter(task.trainable.values())).device.type))


def table(task: "Task", settings: TrainSettings) -> str:
    """The parts of a step's memory and their sum, in MiB. What the drawing of samples takes is not in it."""
    trained = [p.numel() for p in task.trainable.values()]
    each = 2 if settings.bf16_weights else 4
    waiting = max(trained) if settings.optimizer_in_backward else sum(trained)
    weights = list(chain.from_iterable((*m.parameters(), *m.buffers()) for m in task.modules.values()))
    networks = " and ".join(name.replace("_", " ").replace("unet", "U-Net") for name in task.modules)
    checkpointed = getattr(settings, "gradient_checkpointing", False)
    rows = [
        ("weights", sum(t.numel() * t.element_size() for t in weights), networks),
        ("gradients", each * waiting, "one tensor's at a time" if settings.optimizer_in_backward else ""),
        ("optimizer", optimizer_bytes(sum(trained), settings), "two running means a weight"),
        ("averaged weights", 4 * sum(trained) if settings.use_ema else 0, "--use_ema"),
        ("kept for backward", activations(task, settings), "and one layer's, made again" if checkpointed else ""),
    ]
    rows = [row for row in rows if row[1]]
    rows.append(("together", sum(size for _, size, _ in rows), "beside the VAE, and what lives for a moment"))
    return "\n".join(["Memory of a training step:", *(line(*row) for row in rows)])


def measured(device: str) -> str:
    """What was taken at most until now, in the form of a table's row."""
    if device == "cuda":
        return line("measured peak", torch.cuda.max_memory_allocated(), "on the GPU, the samples drawn included")
    if sys.platform == "win32":
        return "  measured peak      not known on Windows"
    import resource  # only now: Windows has no such module

    unit = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in
    return line(
        "measured peak", unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "the whole process, Python included"
    )


def line(name: str, size: int, note: str) -> str:
    return f"  {name:18}{size / MIB:9,.1f} MiB   {note}".rstrip()


def optimizer_bytes(weights: int, settings: TrainSettings) -> int:
    """AdamW's state: two fp32 numbers a weight, or two of 8 bits, with an fp32 scale for each 256."""
    return int(weights * 2 * (1 + 4 / 256)) if settings.use_8bit_adam else 8 * weights


def activations(task: "Task", settings: TrainSettings) -> int:
    """What the networks keep between forward and backward of the run's first batch."""
    unet, text_encoder, batch = task.modules["unet"], task.modules["text_encoder"], task.batch(0, 0)
    half = DTYPES[settings.mixed_precision]
    networks = {name: on_meta(network, half) for name, network in (("unet", unet), ("text_encoder", text_encoder))}
    x_t = torch.empty_like(batch["latents"], device="meta", dtype=half)

    def step() -> Any:
        if "ids" in batch:
            ids = {"input_ids": batch["ids"].to("meta")}
            text = functional_call(text_encoder, networks["text_encoder"], (), ids).last_hidden_state
        else:
            text = batch["text"].to("meta")
        return functional_call(unet, networks["unet"], (x_t, batch["t"].to("meta"), text.to(half)))

    return kept_bytes(step, chain.from_iterable(tensors.values() for tensors in networks.values()))


def on_meta(network: nn.Module, half: torch.dtype) -> dict[str, Tensor]:
    """Its tensors without their numbers, by name; those in the format of most of them in that of --mixed_precision."""
    most = next(network.parameters()).dtype
    named = chain(network.named_parameters(), network.named_buffers())
    dtypes = ((name, t, half if t.dtype == most else t.dtype) for name, t in named)
    return {name: torch.empty_like(t, device="meta", dtype=kind).requires_grad_(t.requires_grad) for name, t, kind in dtypes}


def kept_bytes(step: Callable[[], Any], own: Iterable[Tensor]) -> int:
    """How many bytes `step`, a forward pass, keeps for its backward; those of the model's `own` tensors not counted.

    Exact on the `meta` device, where tensors have shapes but no numbers. Attention is counted as fused kernels keep it:
    q, k, v, the output, and one number a row.
    """
    weights = {tensor.untyped_storage()._cdata for tensor in own}
    seen: dict[int, Tensor] = {}  # the tensors too, so that no address is given out again

    def look(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            seen.setdefault(storage, tensor)
        return tensor

    with FusedAttention(), torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        step()
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


class FusedAttention(TorchFunctionMode):
    """On `meta` PyTorch would take attention apart, and keep the weights of all heads, as no device does."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention and args[0].is_meta:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        return function(*args, **(kwargs or {}))
