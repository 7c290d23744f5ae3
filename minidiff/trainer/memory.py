"""How much memory a run needs, estimated before it starts; and `--fit`, which switches on savings until that is enough.

    together  =  held during the whole run  +  the largest of the moments  +  an allowance

The moments come one after the other: pictures are encoded, steps are made, sheets are drawn. On the `meta` device tensors have
shapes and no numbers, so a forward pass takes a second, and autograd reports each tensor that it saves for the backward pass.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minidiff.core.attention import SpatialTransformer
from minidiff.core.blocks import ResBlock
from minidiff.core.errors import MinidiffError, SettingsError
from minidiff.core.train import DTYPES
from minidiff.core.vae import AutoencoderKL
from minidiff.draw.device import is_out_of_memory
from minidiff.draw.speed import checkpoint_gradients, peak_memory
from minidiff.trainer import checkpoint, distributed
from minidiff.trainer.settings import FineTuneSettings, size_in_bytes
from minidiff.trainer.task import Job

MIB, HALF = 2**20, (torch.float16, torch.bfloat16)
# What cannot be counted: Python and PyTorch (or CUDA); and, as a share of the largest moment, memory inside kernels and gaps in
# the allocator. Measured for a CPU on Linux, where --fit returns freed memory at once; for a GPU a guess.
BASE, SHARE, SHARE_WITH_FIT, SHARE_ON_GPU = 570 * MIB, 0.60, 0.30, 0.15

SAVINGS = {  # flag -> its cost; the cheapest first
    "layerwise_casting": "about a tenth more time, the same result",
    "gradient_checkpointing": "a third more time, the same result",
    "use_8bit_adam": "AdamW's running means are rounded, so the last digits differ",
    "optimizer_in_backward": "each gradient is limited separately, not all together",
}
HINTS = "--train_batch_size 1; --mixed_precision bf16; a smaller --resolution; minidiff train lora with a low --rank"

# --- a step on meta --------------------------------------------------------------------------------------------------


class Counter(TorchFunctionMode):
    """Counts the bytes that autograd saves. Tensors that share a storage count once; those in `seen` do not count.

    On meta, PyTorch's attention would save the weights of all heads. In the `with` it saves what the fused kernels save.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, torch.UntypedStorage] = {}  # by id; the storages are held, so that no id is used twice
        self.saved = self.before = 0
        self.layers: dict[type, int] = {}  # the most that one layer of a class saves

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in self.seen:
            self.seen[id(storage)] = storage
            self.saved += storage.nbytes()
        return tensor

    def begin(self, layer: nn.Module, inputs: object) -> None:
        self.before = self.saved

    def end(self, layer: nn.Module, inputs: object, output: object) -> None:
        self.layers[type(layer)] = max(self.layers.get(type(layer), 0), self.saved - self.before)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fused = function is F.scaled_dot_product_attention and args[0].is_meta
        return Fused.apply(*args[:3]) if fused else function(*args, **(kwargs or {}))


class Fused(torch.autograd.Function):
    """Shapes of q (…, L, D), k and v (…, S, D) -> (…, L, D). Saves these, and one number a row (arXiv 2307.08691, 3.1)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)  # the kernels' layout
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def dtype_in(settings: FineTuneSettings, weight: Tensor) -> torch.dtype:
    """Of a weight in training with these settings, which may differ from those that it was loaded with."""
    in_fp32 = settings.mixed_precision == "no" and not is_on(settings, "layerwise_casting")
    return torch.float32 if in_fp32 and weight.dtype in HALF else weight.dtype


def forward_pass(task: Job, settings: FineTuneSettings, checkpointing: bool) -> Counter:
    """Count a forward pass of the run's first batch on meta."""
    counter, dtype, processes = Counter(), DTYPES[settings.mixed_precision], distributed.world().size
    batch = {name: rows[: len(rows) // processes].to("meta") for name, rows in task.batch(0, 0).items()}
    memo: dict[int, Any] = {}
    for network in task.modules.values():
        most = next(network.parameters()).dtype
        for t in (*network.parameters(), *network.buffers()):
            held = dtype_in(settings, t)
            cast = dtype if t.dtype == most and dtype != torch.float32 else held
            meta = torch.empty_like(t, device="meta", dtype=cast)
            memo[id(t)] = nn.Parameter(meta, t.requires_grad) if isinstance(t, nn.Parameter) else meta
            if cast == held:  # else it is a copy that autocast makes, and autograd may save
                counter.seen[id(meta.untyped_storage())] = meta.untyped_storage()
    loss: Any = copy.deepcopy(task.loss, memo)
    for network in (loss.unet, *filter(None, [loss.controlnet])):
        checkpoint_gradients(network, checkpointing)
    for layer in loss.unet.modules():
        if isinstance(layer, ResBlock | SpatialTransformer):
            layer.register_forward_pre_hook(counter.begin)
            layer.register_forward_hook(counter.end)
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor), counter:
        loss.predict({name: rows.to(dtype) if rows.is_floating_point() else rows for name, rows in batch.items()})
    return counter


def step_bytes(task: Job, settings: FineTuneSettings) -> tuple[int, int]:
    """The bytes that a training step saves for its backward pass; and an upper bound of its peak, with the gradients.

    The bound adds what is never there all at once: everything saved, all gradients, and the largest layer's work.
    """
    plain = forward_pass(task, settings, False)
    saved = forward_pass(task, settings, True).saved if settings.gradient_checkpointing else plain.saved
    # In a layer's backward pass there are gradients of all that it saved; with checkpointing it has to be computed again, too.
    layer = sum(plain.layers.values()) * (1 + settings.gradient_checkpointing)
    return saved, saved + layer + gradient_bytes(task, settings)


def gradient_bytes(task: Job, settings: FineTuneSettings) -> int:
    """Of all gradients, which wait for the last one; with --optimizer_in_backward of the largest alone."""
    sizes = [4 * p.numel() for p in task.trainable.values()]
    return max(sizes) if settings.optimizer_in_backward else sum(sizes)


# --- the budget ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """The memory of a run in bytes."""

    held: dict[str, int]  # all the time
    moments: dict[str, int]  # one after the other
    allowance: int

    @property
    def together(self) -> int:
        return sum(self.held.values()) + max(self.moments.values()) + self.allowance

    def __str__(self) -> str:
        turns = {f"{name} *": size for name, size in self.moments.items()}
        rows = {**self.held, **turns, "allowance": self.allowance, "together": self.together}
        lines = [f"  {name:20}{size / MIB:9,.1f} MiB" for name, size in rows.items()]
        return "\n".join(["Memory of the run, estimated; * only one of these at a time:", *lines])


def budget(task: Job, settings: FineTuneSettings) -> Budget:
    """The memory of the run. The VAE is counted with three times its largest tensor."""
    trained, vae = [p.numel() for p in task.trainable.values()], task.beside.get("VAE")
    device, latent = next(iter(task.trainable.values())).device.type, task.batch(0, 0)["latents"].shape[1:]
    held, away = dict[str, int](), 0  # away: networks that come back for pictures and sheets
    for name, network in (task.modules | task.beside).items():
        tensors = [*network.parameters(), *network.buffers()]
        held[name] = sum(t.numel() * dtype_in(settings, t).itemsize for t in tensors if t.device.type == device)
        away += sum(t.nbytes for t in tensors if t.device.type != device)
    held |= {"optimizer": optimizer_bytes(trained, settings), "averaged weights": 4 * sum(trained) * settings.use_ema}
    moments = {"training step": step_bytes(task, settings)[1]}
    if isinstance(vae, AutoencoderKL):
        pixels = max(vae.config.block_out_channels[:2]) * latent[1:].numel() * vae.config.downscale**2
        moments["pictures, sheets"] = gradient_bytes(task, settings) + away + 3 * pixels * next(vae.parameters()).itemsize
    share = (SHARE_WITH_FIT if settings.fit else SHARE) if device == "cpu" else SHARE_ON_GPU
    return Budget({name: size for name, size in held.items() if size}, moments, BASE + int(share * max(moments.values())))


def optimizer_bytes(trained: list[int], settings: FineTuneSettings) -> int:
    """AdamW's two running means for tensors of so many numbers: fp32, or 8 bits with a scale for each block."""
    if not settings.use_8bit_adam:
        return 8 * sum(trained)
    from minidiff.fast.adam8bit import BLOCK, LEAST

    return sum(2 * (n + 4 * -(-n // BLOCK)) if n >= LEAST else 8 * n for n in trained)


# --- --fit -----------------------------------------------------------------------------------------------------------


@contextmanager
def budgeted(task: Job, settings: FineTuneSettings) -> Iterator[FineTuneSettings]:
    """Choose the savings of --fit and print the budget before the run, and the measured peak after it.

    Gives the settings to train with. Running out of memory becomes a MinidiffError that says what helps.
    """
    settings, need, note = chosen(task, settings)
    print(f"{note}{need}")
    try:
        yield settings
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MinidiffError(
            f"out of memory while training.\n{need}\nWhat helps: --fit with the memory that there is, which switches on "
            f"savings; {HINTS}.\n{checkpoint.last_good(Path(settings.output_dir))}"
        ) from error
    if peak := peak_memory(next(iter(task.trainable.values())).device.type):
        print(f"  {'measured peak':20}{peak / MIB:9,.1f} MiB")


def chosen(task: Job, settings: FineTuneSettings) -> tuple[FineTuneSettings, Budget, str]:
    """The settings with as many savings, the cheapest first, as the run needs to fit; its budget, and an explanation.

    A resumed run keeps the savings that it began with, and adds only those that do not change the result. SettingsError if the
    run does not fit with all savings.
    """
    if settings.fit is None:
        return settings, budget(task, settings), ""
    free, limit, trained = possible(task, settings), size_in_bytes(settings.fit) or 0, settings
    if path := checkpoint.find(settings):
        begun = checkpoint.read_manifest(path)["made_of"]  # without the flags that change no result
        trained = replace(settings, **{flag: True for flag in free if begun.get(flag)})  # type: ignore[arg-type]
        free = [flag for flag in free if flag in settings.HARMLESS]
    need = budget(task, trained)
    for flag in free:
        trial = replace(trained, **{flag: True})  # type: ignore[arg-type]
        if need.together > limit and (less := budget(task, trial)).together < need.together:
            trained, need = trial, less
    if need.together > limit:
        raise SettingsError(f"--fit {settings.fit}: it does not fit with all savings. It needs:\n{need}\nWhat helps: {HINTS}.")
    for name in task.modules.keys() - {"text_encoder"}:
        checkpoint_gradients(task.modules[name], trained.gradient_checkpointing)
    if trained.may_cast and not is_on(trained, "layerwise_casting"):
        task.modules["unet"].float()  # it was loaded in half precision, in case that it had to stay so
    new = [f"\n  --{flag}: {cost}" for flag, cost in SAVINGS.items() if is_on(trained, flag) and not is_on(settings, flag)]
    how = "with" + "".join(new) if new else "as it is."
    return trained, need, f"--fit {settings.fit}: {need.together / MIB:,.0f} MiB fit {how}\n"


def possible(task: Job, settings: FineTuneSettings) -> list[str]:
    """The savings that this run can still switch on, the cheapest first."""
    early = settings.gradient_accumulation_steps == 1 and settings.mixed_precision != "fp16" and distributed.world().size == 1
    rules = {
        "layerwise_casting": settings.may_cast and any(p.dtype in HALF for p in task.modules["unet"].parameters()),
        "optimizer_in_backward": early,
    }
    return [flag for flag in SAVINGS if rules.get(flag, True) and not is_on(settings, flag)]


def is_on(settings: FineTuneSettings, flag: str) -> bool:
    return bool(getattr(settings, flag, False))  # not every method has every flag
