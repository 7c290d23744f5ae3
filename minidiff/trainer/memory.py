"""Where the memory of a run goes, by arithmetic: before it starts, without computing a number.

    together  =  what is there all the time  +  the largest of what is there in turn

In turn: the forward and backward pass, the update, the pictures that the VAE encodes, the sample sheets that it draws.
A pass that --cuda_graph records keeps its memory, so it is there all the time.
metering.py counts all but the update.
"""

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from torch import Tensor, nn

from minidiff.core.vae import AutoencoderKL
from minidiff.fast.adam8bit import BLOCK, LEAST, PIECE
from minidiff.fast.memory import peak_memory, returns_memory
from minidiff.trainer import distributed
from minidiff.trainer.metering import Step, dtype_in, ready_bytes, step_bytes, vae_bytes
from minidiff.trainer.settings import FineTuneSettings, TrainSettings

if TYPE_CHECKING:
    from minidiff.core.train import Task

MIB = 2**20
# For what the arithmetic does not see: (a constant, a share of the fullest moment, whose constant it is). On the CPU they bound
# what was measured on Linux with the pocket checkpoint, full and LoRA, from 4 to 32 samples; for CUDA they are a guess.
ALLOWANCES = {
    "cpu": (570 * MIB, 0.60, "Python's and PyTorch's own"),
    "cpu, returned": (570 * MIB, 0.30, "Python's and PyTorch's own"),  # fewer gaps, under device.return_memory
    "cuda": (600 * MIB, 0.15, "CUDA's own, not measured"),
}
PIECE_BYTES = 48  # a number of what LeanAdamW unpacks at once: moments, codes, weight, gradient, noise

Row = tuple[str, int, str]  # name, bytes, remark


@dataclass(frozen=True)
class Budget:
    """The memory of a run: `held` all the time, `moments` one after the other."""

    held: list[Row]
    moments: list[Row]
    allowance: Row  # for what cannot be counted

    @property
    def together(self) -> int:
        return sum(size for _, size, _ in self.held) + max(size for _, size, _ in self.moments) + self.allowance[1]

    def __str__(self) -> str:
        rows = [line(*row) for row in self.held]
        rows += ["  and in turn", *(line(*row) for row in self.moments)]
        rows += [line(*self.allowance), line("together", self.together, "at the fullest moment")]
        return "\n".join(["Memory of the run, by arithmetic:", *rows])


def budget(task: "Task", settings: TrainSettings, step: Step | None = None) -> Budget:
    """The memory of the run; `step` if it has been counted already."""
    step = step or step_bytes(task, settings)
    first = next(iter(task.trainable.values()))
    trained, each = [p.numel() for p in task.trainable.values()], 2 if settings.bf16_weights else first.element_size()
    there = [name for name, module in task.modules.items() if module_bytes(module, first.device.type)]
    networks = " and ".join(name.replace("_", " ").replace("unet", "U-Net") for name in there)
    beside = [(name, module_bytes(module, first.device.type), "") for name, module in task.beside.items()]
    on_cpu = first.device.type == "cpu"
    tensors = [t for module in task.modules.values() for t in tensors_on(module, first.device.type)]
    weights = sum(t.numel() * dtype_in(settings, t).itemsize for t in tensors)
    later = [  # than the pictures are encoded
        ("in order", on_cpu * ready_bytes(step.convolutions, drawing=False), "copies of frozen convolutions, for the CPU"),
        ("optimizer", optimizer_bytes(trained, settings), "two running means a weight"),
        ("averaged weights", 4 * sum(trained) if settings.use_ema else 0, "--use_ema"),
    ]
    held = [row for row in [("weights", weights, networks), *beside, *later] if row[1]]
    gradients = [each * n for n in trained]
    moments = moments_of(settings, step, gradients, trained)
    waiting = 0 if settings.optimizer_in_backward else sum(gradients)
    moments += drawing(task, settings, step, waiting, later=sum(size for _, size, _ in later))
    where = ("cpu, returned" if returns_memory() else "cpu") if on_cpu else "cuda"
    uncounted = allowance(where, max(size for _, size, _ in moments))
    if isinstance(settings, FineTuneSettings) and settings.cuda_graph:
        (_, size, remark), *moments = moments  # of the gradients, the update has copies
        held.append(("recorded pass", size, remark))
    return Budget(held, moments, uncounted)


def moments_of(settings: TrainSettings, step: Step, gradients: list[int], numbers: list[int]) -> list[Row]:
    """What a step has in turn. `gradients`: the bytes of each tensor's; `numbers`: how many it has."""
    early = settings.optimizer_in_backward
    waiting = max(gradients) if early else sum(gradients)
    remark = f"gradients {waiting / MIB:,.1f}{', one at a time' if early else ''}; kept for backward {step.kept / MIB:,.1f}"
    update = update_bytes(numbers, settings)
    rows = [("forward, backward", step.fullest + (update if early else 0), remark)]
    if not early:
        rows.append(("update", sum(gradients) + update, f"gradients{', and what the update makes' if update else ''}"))
    return rows


def drawing(task: "Task", settings: TrainSettings, step: Step, gradients: int, later: int) -> list[Row]:
    """The moments of the VAE, with all that is away in training.

    Pictures are encoded before `later` bytes of the rest are there; the last update's `gradients` lie beside a sample sheet.
    """
    vae, device = task.beside.get("VAE"), next(iter(task.trainable.values())).device.type
    if not isinstance(vae, AutoencoderKL):
        return []
    given = vae.config, next(vae.parameters()).dtype, task.batch(0, 0)["latents"].shape[1:]
    away = sum(t.nbytes for m in (vae, *task.modules.values()) for t in m.parameters() if t.device.type != device)
    rows = []
    if task.used_vae:
        size = max(0, away + vae_bytes(*given, "encode") - later)
        rows.append(("pictures", size, "the VAE encodes one at a time; what comes later is not there yet"))
    if settings.validation_steps:
        copies = ready_bytes(step.convolutions, drawing=True) if device == "cpu" else 0
        size = gradients + away + copies + vae_bytes(*given, "decode")
        rows.append(("sample sheets", size, "the VAE draws one at a time"))
    return rows


def allowance(where: str, fullest: int) -> Row:
    """For what the arithmetic does not see, beside a `fullest` moment of so many bytes; `where` is one of ALLOWANCES."""
    constant, share, whose = ALLOWANCES[where]
    return "not counted", constant + int(share * fullest), f"an allowance: {whose}; {share:.0%} for kernels and gaps"


def module_bytes(module: nn.Module, device: str) -> int:
    """Of its tensors that are on the device."""
    return sum(t.nbytes for t in tensors_on(module, device))


def tensors_on(module: nn.Module, device: str) -> list[Tensor]:
    """Parameters and buffers."""
    return [t for t in chain(module.parameters(), module.buffers()) if t.device.type == device]


def optimizer_bytes(trained: list[int], settings: TrainSettings) -> int:
    """AdamW's state for tensors of so many numbers: two of fp32 a weight, or two of 8 bits and an fp32 scale for each block."""
    packed = [n for n in trained if settings.use_8bit_adam and n >= LEAST]
    return 8 * (sum(trained) - sum(packed)) + sum(2 * (n + 4 * -(-n // BLOCK)) for n in packed)


def update_bytes(trained: list[int], settings: TrainSettings) -> int:
    """What an update makes for a moment: torch's AdamW nothing, ours what it unpacks; or what processes exchange."""
    lean = settings.use_8bit_adam or settings.bf16_weights or settings.optimizer_in_backward
    travels = 4 * min(distributed.BUCKET, sum(trained)) if distributed.world().size > 1 else 0
    return max(travels, PIECE_BYTES * min(PIECE, max(trained)) if lean else 0)


def measured(device: str) -> str:
    """What was taken at most until now, in the form of a table's row."""
    gpu = device.startswith("cuda")
    whose = "of tensors on the GPU, the samples drawn included" if gpu else "the whole process, Python included"
    peak = peak_memory(device)
    return "  measured peak      not known on this system" if peak is None else line("measured peak", peak, whose)


def line(name: str, size: int, note: str) -> str:
    return f"  {name:18}{size / MIB:9,.1f} MiB   {note}".rstrip()
