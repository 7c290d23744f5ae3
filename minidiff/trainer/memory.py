"""How much memory a run needs, estimated before it starts.

    total  =  what is held during the whole run  +  the larger of a training step and drawing  +  an allowance

On the `meta` device tensors have shapes and no numbers, so a forward pass takes a second. Autograd reports each tensor that it
saves for the backward pass. The allowance is for what cannot be counted: memory inside kernels, and gaps in the allocator.
"""

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from minidiff.core.blocks import ResBlock
from minidiff.core.train import DTYPES
from minidiff.core.transformer import SpatialTransformer
from minidiff.core.unet import UNet2DConditionModel
from minidiff.core.vae import AutoencoderKL
from minidiff.draw.speed import checkpoint_gradients, peak_memory
from minidiff.trainer.settings import FineTuneSettings

if TYPE_CHECKING:
    from minidiff.trainer.job import Job

MIB, HALF = 2**20, (torch.float16, torch.bfloat16)
# The allowance: a constant (Python and PyTorch, or CUDA), and a share of the largest moment. For a CPU they were measured on
# Linux; with --fit, freed memory is returned at once, which leaves fewer gaps. For a GPU they are a guess.
BASE, SHARE, SHARE_WITH_FIT, SHARE_ON_GPU = 570 * MIB, 0.60, 0.30, 0.15

SMALL = 2**20  # weights of a convolution; larger ones are not copied in training (fast/conv.py)

Row = tuple[str, int, str]  # name, bytes, remark


@dataclass(frozen=True)
class Budget:
    """The memory of a run: rows that are `held` all the time, `moments` one after the other, and the allowance."""

    held: list[Row]
    moments: list[Row]
    allowance: Row

    @property
    def together(self) -> int:
        return sum(size for _, size, _ in [*self.held, self.allowance]) + max(size for _, size, _ in self.moments)

    def __str__(self) -> str:
        rows = [*map(line, self.held), "  one after the other", *map(line, self.moments), line(self.allowance)]
        return "\n".join(["Memory of the run, estimated:", *rows, line(("together", self.together, "at the largest moment"))])


def line(row: Row) -> str:
    name, size, note = row
    return f"  {name:20}{size / MIB:9,.1f} MiB   {note}".rstrip()


# --- counting ------------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """Bytes of a training step."""

    saved: int  # for the backward pass
    fullest: int  # the most that there is at once, gradients included
    copies: int  # of frozen weights


class Counter:
    """Counts the bytes that autograd saves. Tensors that share a storage count once; those in `seen` do not count."""

    def __init__(self) -> None:
        self.seen: dict[int, torch.UntypedStorage] = {}  # by id; the storages are held, so that no id is used twice
        self.saved = 0
        self.begun: list[int] = []  # bytes that were saved when each of the running modules began
        self.ended: list[tuple[int, int]] = []  # for each module, when it ends: bytes saved so far, numbers of its gradients
        self.inside: dict[type, int] = {}  # the most that one module of a class saves
        self.copies = 0  # of frozen weights, which fast convolutions keep on a CPU

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in self.seen:
            self.seen[id(storage)] = storage
            self.saved += storage.nbytes()
        return tensor

    def begin(self, module: nn.Module, inputs: object) -> None:
        self.begun.append(self.saved)

    def end(self, module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        self.inside[type(module)] = max(self.inside.get(type(module), 0), self.saved - self.begun.pop())
        if isinstance(module, nn.Conv2d) and type(module) is not nn.Conv2d and module.kernel_size == (3, 3):
            if not module.weight.requires_grad and module.weight.numel() <= SMALL:
                self.copies += 4 * module.weight.numel() * (9 if inputs[0].shape[-2:].numel() >= 1024 else 3)
        self.ended.append((self.saved, sum(p.numel() for p in module.parameters(recurse=False) if p.requires_grad)))


class FusedAttention(TorchFunctionMode):
    """On meta, PyTorch's attention would save the weights of all heads. With this it saves what the fused kernels save."""

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


def forward_pass(task: "Job", settings: FineTuneSettings) -> Counter:
    """Count a forward pass of the run's first batch on meta."""
    counter, dtype = Counter(), DTYPES[settings.mixed_precision]
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    batch = {name: rows[: len(rows) // processes].to("meta") for name, rows in task.batch(0, 0).items()}

    def run(network: nn.Module, *inputs: Tensor) -> Any:
        tensors, most = {}, next(network.parameters()).dtype
        for name, t in chain(network.named_parameters(), network.named_buffers()):
            t_meta = torch.empty_like(t, device="meta", dtype=dtype_in(settings, t)).requires_grad_(t.requires_grad)
            counter.seen[id(t_meta.untyped_storage())] = t_meta.untyped_storage()
            copied = t.dtype == most and dtype != torch.float32  # autocast keeps such copies until the backward pass
            tensors[name] = t_meta.to(dtype) if copied else t_meta
        return functional_call(network, tensors, inputs)

    hooks = torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor)
    begin, end = register_module_forward_pre_hook(counter.begin), register_module_forward_hook(counter.end)
    with begin, end, hooks, FusedAttention():
        text = batch["text"] if "text" in batch else run(task.modules["text_encoder"], batch["ids"]).last_hidden_state
        run(task.modules["unet"], batch["latents"].to(dtype), batch["t"], text.to(dtype))
    return counter


def dtype_in(settings: FineTuneSettings, weight: Tensor) -> torch.dtype:
    """Of a weight in training with these settings, which may differ from those that it was loaded with."""
    if weight.requires_grad:
        return torch.bfloat16 if settings.bf16_weights else weight.dtype
    in_fp32 = settings.mixed_precision == "no" and not getattr(settings, "layerwise_casting", False)
    return torch.float32 if in_fp32 and weight.dtype in HALF else weight.dtype


def step_bytes(task: "Job", settings: FineTuneSettings) -> Step:
    """The memory of one training step: a forward and a backward pass."""
    unet, accumulates = task.modules["unet"], settings.gradient_accumulation_steps > 1
    assert isinstance(unet, UNet2DConditionModel)
    checkpoint_gradients(unet, False)
    counter = forward_pass(task, settings)
    layer = sum(counter.inside.get(kind, 0) for kind in (ResBlock, SpatialTransformer))
    if settings.gradient_checkpointing:
        checkpoint_gradients(unet)
        counter = forward_pass(task, settings)
    size, fullest = gradient_size(settings), 0
    gradients = size * sum(p.numel() for p in task.trainable.values()) if accumulates else 0  # of the passes before
    for saved, numbers in reversed(counter.ended):  # the backward pass: saved tensors go, and gradients come
        fullest = max(fullest, saved + gradients + size * numbers)
        gradients += 0 if accumulates or settings.optimizer_in_backward else size * numbers
    # In a layer's backward pass there are gradients of all that it saved; with checkpointing it has to be computed again, too.
    return Step(counter.saved, fullest + layer * (1 + settings.gradient_checkpointing), counter.copies)


def gradient_size(settings: FineTuneSettings) -> int:
    return 2 if settings.bf16_weights else 4


def vae_bytes(vae: AutoencoderKL, latent: torch.Size, method: str) -> int:
    """The memory in which the VAE can "encode" or "decode" a picture of `latent` (C, h, w): three of its largest tensor."""
    sizes = []
    scale, channels = (vae.config.downscale, vae.config.in_channels) if method == "encode" else (1, latent[0])
    hook = register_module_forward_hook(lambda module, inputs, y: sizes.append(y.nbytes if isinstance(y, Tensor) else 0))
    with hook, torch.no_grad(), torch.device("meta"):
        copy, dtype = AutoencoderKL(vae.config), next(vae.parameters()).dtype
        getattr(copy.to(dtype), method)(torch.empty(1, channels, scale * latent[1], scale * latent[2], dtype=dtype))
    return 3 * max(sizes)


def optimizer_bytes(trained: list[int], settings: FineTuneSettings) -> int:
    """AdamW's two running means for tensors of so many numbers: fp32, or 8 bits with a scale for each block."""
    if not settings.use_8bit_adam:
        return 8 * sum(trained)
    from minidiff.fast.adam8bit import BLOCK, LEAST

    return sum(2 * (n + 4 * -(-n // BLOCK)) if n >= LEAST else 8 * n for n in trained)


def budget(task: "Job", settings: FineTuneSettings) -> Budget:
    """The memory of the run, in rows."""
    device, trained = next(iter(task.trainable.values())).device.type, [p.numel() for p in task.trainable.values()]
    networks = {**task.modules, **task.beside}
    tensors = {name: [*network.parameters(), *network.buffers()] for name, network in networks.items()}
    there = {name: [t for t in all_of if t.device.type == device] for name, all_of in tensors.items()}
    away = sum(p.nbytes for network in networks.values() for p in network.parameters() if p.device.type != device)
    step = step_bytes(task, settings)
    gradients = 0 if settings.optimizer_in_backward else gradient_size(settings) * sum(trained)
    weights = sum(t.numel() * dtype_in(settings, t).itemsize for all_of in there.values() for t in all_of)
    later = [  # than the pictures are encoded
        ("copies", step.copies if device == "cpu" else 0, "of frozen convolutions, in another order"),
        ("optimizer", optimizer_bytes(trained, settings), "AdamW's two running means"),
        ("averaged weights", 4 * sum(trained) if settings.use_ema else 0, "--use_ema"),
    ]
    rows = [("weights", weights, " and ".join(name for name, all_of in there.items() if all_of)), *later]
    about = f"gradients {gradients / MIB:,.1f}; saved for backward {step.saved / MIB:,.1f}"
    moments = [("training step", step.fullest, about), ("update", gradients, "gradients")]
    vae = task.beside.get("VAE")
    if isinstance(vae, AutoencoderKL):
        latent = task.batch(0, 0)["latents"].shape[1:]
        if task.used_vae:
            size = away + vae_bytes(vae, latent, "encode") - sum(size for _, size, _ in later)
            moments.append(("pictures", max(0, size), "the VAE encodes one at a time, before the rest is there"))
        if settings.validation_steps:
            size = gradients + away + vae_bytes(vae, latent, "decode")
            moments.append(("sample sheets", size, "the VAE draws one at a time"))
    share = (SHARE_WITH_FIT if settings.fit else SHARE) if device == "cpu" else SHARE_ON_GPU
    rest = BASE + int(share * max(size for _, size, _ in moments))
    return Budget([row for row in rows if row[1]], moments, ("allowance", rest, f"not counted: {BASE // MIB} + {share:.0%}"))


def measured(device: str) -> str:
    """The peak until now, as a line of the table."""
    peak = peak_memory(device)
    about = "of tensors on the GPU, drawing included" if device == "cuda" else "of the whole process, Python included"
    return "  measured peak       not known on this system" if peak is None else line(("measured peak", peak, about))
