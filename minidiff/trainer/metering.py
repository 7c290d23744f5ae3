"""What a training step keeps, and what it takes at its fullest moment, in bytes: counted without computing a number.

On the `meta` device tensors have shapes and no numbers, and every operation runs in microseconds. So a step can be walked
through, forward and backward, in a second or two, while somebody writes down which tensors come and go. Not seen is what a
kernel allocates within itself, and what an allocator loses between its pieces.

B samples   C h w a latent   S text tokens   D text width
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minidiff.core.config import VAEConfig
from minidiff.core.train import DTYPES
from minidiff.core.vae import AutoencoderKL
from minidiff.fast import conv as cpu
from minidiff.fast.frozen import Conv2d, roomy
from minidiff.fast.precision import HALF
from minidiff.trainer import distributed
from minidiff.trainer.methods import FrozenSettings
from minidiff.trainer.settings import TrainSettings

if TYPE_CHECKING:
    from minidiff.core.train import Task


class Step(NamedTuple):
    """Bytes of one forward and backward pass, without the weights."""

    kept: int  # between the two
    fullest: int  # most at once: what is kept, what lives for a moment, and the gradients of weights
    convolutions: list[tuple[Conv2d, torch.Size]]  # and the shape of what each reads, (B, C, H, W)


# --- a step of a task --------------------------------------------------------------------------------------------------


def step_bytes(task: "Task", settings: TrainSettings) -> Step:
    """One pass over the run's first batch, or this process's share of it.

    Where gradients outlive it, because more passes add to them, those of the passes before are in `fullest` too.
    """
    walk = Pass(task, settings)
    tensors = on_meta(walk, settings)
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]

    def run(and_back: bool) -> Any:
        return functional_call(walk, walk.as_computed(tensors), (and_back,))

    with read_by_convolutions(walk) as convolutions:
        kept = kept_bytes(lambda: run(and_back=False), tensors.values())
    gathers = settings.gradient_accumulation_steps > 1
    for leaf in leaves if gathers or settings.optimizer_in_backward else []:
        leaf.register_post_accumulate_grad_hook(forget)
    fullest = fullest_bytes(lambda: run(and_back=True), tensors.values())
    return Step(kept, fullest + (sum(leaf.nbytes for leaf in leaves) if gathers else 0), convolutions)


class Pass(nn.Module):
    """The networks of a task that a step runs through, and its first batch, as one module: forward, and perhaps backward.

    One, so that `functional_call` puts tensors on meta in their places until the end: checkpointing runs layers again.
    """

    def __init__(self, task: "Task", settings: TrainSettings) -> None:
        super().__init__()
        batch = distributed.world().share(task.batch(0, 0), settings.train_batch_size)
        self.given: dict[str, Tensor] = {name: rows.to("meta") for name, rows in batch.items()}
        self.dtype: torch.dtype = DTYPES[settings.mixed_precision]
        self.unet, self.text_encoder = task.modules["unet"], task.modules["text_encoder"] if "ids" in batch else None

    def forward(self, and_back: bool) -> Tensor:
        """The U-Net's answer (B, C, h, w); the way back starts at the mean of its squares."""
        given = self.given
        text = self.text_encoder(input_ids=given["ids"]).last_hidden_state if self.text_encoder else given["text"]
        answer: Tensor = self.unet(given["latents"].to(self.dtype), given["t"], text.to(self.dtype))
        if and_back:
            backward(answer.float().square().mean())
        return answer

    def as_computed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """In the format of --mixed_precision what has the format of most: such copies autocast keeps until the backward."""
        if self.dtype == torch.float32:  # without autocast: each layer widens its own weight, for a moment
            return tensors
        most = {part: next(network.parameters()).dtype for part, network in self.named_children()}
        return {name: t.to(self.dtype) if t.dtype == most[name.partition(".")[0]] else t for name, t in tensors.items()}


@contextmanager
def read_by_convolutions(module: nn.Module) -> Iterator[list[tuple[Conv2d, torch.Size]]]:
    """A list that fills with the convolutions that run inside the `with`, and the shapes of what they read."""
    seen: list[tuple[Conv2d, torch.Size]] = []
    found = [m for m in module.modules() if isinstance(m, Conv2d)]
    handles = [m.register_forward_pre_hook(lambda m, inputs: seen.append((m, inputs[0].shape))) for m in found]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def ready_bytes(convolutions: list[tuple[Conv2d, torch.Size]], drawing: bool) -> int:
    """What a CPU makes once of weights that stand still (fast/conv.py), in fp32.

    In training, the frozen ones that are not large, for the way back too; in `drawing`, all that there is room for, one way.
    """
    total, large = 0, drawing and roomy(m for m, _ in convolutions)
    for m, shape in convolutions:
        if (m.weight.requires_grad and not drawing) or (m.weight.numel() > cpu.MANY and not large):
            continue
        way, cells = cpu.way_of(shape, m.weight, m.stride[0], int(m.padding[0]), still=True), shape[-1] * shape[-2]
        times = {"direct": 1.0, "product": 0.0, "winograd": 36 / 9 if cells >= 1024 else 16 / 9}[way]
        turned = 1.0 if m.kernel_size[0] > 1 else 0.0
        total += int(4 * m.weight.numel() * (times if drawing else 2 * times + turned))
    return total


def on_meta(module: nn.Module, settings: TrainSettings) -> dict[str, Tensor]:
    """Its tensors as they are in training, without their numbers, by name."""
    table = {}
    for name, t in chain(module.named_parameters(), module.named_buffers()):
        table[name] = torch.empty_like(t, device="meta", dtype=dtype_in(settings, t)).requires_grad_(t.requires_grad)
    return table


def dtype_in(settings: TrainSettings, weight: Tensor) -> torch.dtype:
    """Of a weight in training under these settings, which can be other ones than it was loaded for."""
    if weight.requires_grad:
        return torch.bfloat16 if settings.bf16_weights else weight.dtype
    casts = isinstance(settings, FrozenSettings) and settings.layerwise_casting
    widens = weight.dtype in HALF and settings.mixed_precision == "no" and not casts
    return torch.float32 if widens else weight.dtype


@cache
def vae_bytes(config: VAEConfig, dtype: torch.dtype, latent: torch.Size, what: str) -> int:
    """What a VAE takes at most to "encode" or "decode" one picture, whose `latent` is (C, h, w); its weights not counted."""
    with torch.device("meta"):
        twin = AutoencoderKL(config).to(dtype)
        channels, factor = (config.in_channels, config.downscale) if what == "encode" else (latent[0], 1)
        x = torch.empty(1, channels, latent[1] * factor, latent[2] * factor, dtype=dtype)
    with torch.no_grad():
        return x.nbytes + fullest_bytes(lambda: getattr(twin, what)(x), twin.parameters())


# --- counting ------------------------------------------------------------------------------------------------------------


def kept_bytes(step: Callable[[], Any], own: Iterable[Tensor]) -> int:
    """How many bytes `step`, a forward pass, keeps for its backward; those of the model's `own` tensors not counted.

    Exact on the `meta` device. Attention is counted as fused kernels keep it: q, k, v, the output, and one number a row.
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


def fullest_bytes(work: Callable[[], Any], own: Iterable[Tensor]) -> int:
    """The most that `work` has in tensors at one time; those that were there before, the model's `own`, not counted."""
    living = Living(own)
    with living, FusedAttention():
        work()
    return living.most


class Living(TorchDispatchMode):
    """Watches tensors come and go: each operation's outputs when it returns, each storage when it is given back."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in own}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.take_in(tensor.untyped_storage())
        return out

    def take_in(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


class FusedAttention(TorchFunctionMode):
    """On `meta` PyTorch would take attention apart, and keep the weights of all heads, as no device does."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention and args[0].is_meta:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        return function(*args, **(kwargs or {}))


def backward(loss: Tensor) -> None:
    """`loss.backward()`, which would put a mode such as FusedAttention aside, though checkpointing runs layers again in it."""
    ones = torch.ones_like(loss)
    torch.autograd.graph._engine_run_backward((loss,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def forget(parameter: Tensor) -> None:
    """What optimizer_in_backward does with a gradient, once it is used."""
    parameter.grad = None
