"""What is measured in this process: attention, the U-Net's answer, whole pictures, and the bytes kept for backward.

Each piece of work is checked before it is timed: a contender whose result is further than `tolerance` from the reference
(relative, Frobenius) is not timed, and the run fails.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import models, peers
from benchmarks.report import OURS, Row, counted_rows, timed_rows
from benchmarks.saved_bytes import saved_bytes
from benchmarks.timing import Seconds, measure, summaries, timed
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.draw.speed import speed_up_network
from minidiff.fast import GPU_IMPLS, IMPLS, attention
from minidiff.fast.compiled import compile_unet
from minidiff.fast.frozen import frozen_weights

COMPILED = "minidiff --compile"  # on a GPU
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass
class Work:
    """One piece of work and who does it. The first contender is minidiff; `reference` names the one the others must equal."""

    group: str
    name: str
    contenders: dict[str, Callable[[], Tensor]]
    tolerance: float
    reference: str = OURS
    notes: list[str] = field(default_factory=list)
    around: ExitStack = field(default_factory=ExitStack)  # what holds while it is measured


def run(work: Work, seconds: float) -> tuple[list[Row], list[str]]:
    """Check, then time. Gives the rows, and what failed; who does not run at all is in the notes of `work`."""
    tried = {name: attempt(name, call, work.notes) for name, call in work.contenders.items()}
    done = {name: found for name, found in tried.items() if found is not None}
    reference = done[work.reference if work.reference in done else OURS][1]
    errors = {name: distance(answer, reference) for name, (_, answer) in done.items()}
    first = {name: time for name, (time, _) in done.items()}
    contenders = {name: work.contenders[name] for name in done}
    del tried, done, reference
    right = {name: call for name, call in contenders.items() if errors[name] <= work.tolerance}
    failed = [f"{work.group}: {work.name}: {name} differs by {errors[name]:.1e}" for name in errors if name not in right]
    if OURS not in right:
        return [], failed
    with work.around:
        times = measure(right, seconds, first=first)
    wall = summaries({name: [t.wall for t in found] for name, found in times.items()}, OURS)
    cpu = summaries({name: [max(t.cpu, 1e-9) for t in found] for name, found in times.items()}, OURS)
    return timed_rows(work.group, work.name, wall, cpu, errors), failed


def attempt(name: str, call: Callable[[], Tensor], notes: list[str]) -> tuple[Seconds, Tensor] | None:
    """The first call; None for a peer that does not run here: torch.compile needs a compiler, and does not take everything."""
    try:
        return timed(call)
    except Exception as error:
        if name == OURS:
            raise
        notes.append(f"{name} does not run here: {type(error).__name__}: {str(error)[:200]}")
        return None


def distance(a: Tensor, b: Tensor) -> float:
    """Relative, Frobenius; infinite where anything is NaN."""
    a, b = a.detach().double(), b.detach().double()
    error = float((a - b).norm() / b.norm())
    return error if error == error else float("inf")


# --- attention -------------------------------------------------------------------------------------------------------

SHAPES = [  # SD 1.5 at 512²: queries, keys, width of one of the 8 heads
    (4096, 4096, 40),
    (1024, 1024, 80),
    (256, 256, 160),
    (64, 64, 160),
    (4096, 77, 40),
    (1024, 77, 80),
    (256, 77, 160),
    (64, 77, 160),
]
BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
WEIGHTS_LIMIT = 2**28  # bytes of attention weights; formulas that keep them all are left out beyond, but on a GPU


def attention_work(device: str, dtype: torch.dtype, batch: int, every: int = 1) -> Iterator[Work]:
    """Forward and backward at the eight shapes (or each second one), by every implementation that answers on this device."""
    for L, S, D in SHAPES[::every]:
        q, k, v = (heads(batch, length, D, device, dtype, i) for i, length in enumerate((L, S, S)))
        big = device == "cpu" and batch * 8 * L * S * 4 > WEIGHTS_LIMIT
        calls = {name: call for name, call in implementations(device).items() if not (big and name.endswith(("naive", "math")))}
        calls = {name: call for name, call in calls.items() if answers(call, q, k, v)}
        shape, kind = f"{L} × {S}, d {D}", str(dtype).removeprefix("torch.")
        forward = {name: partial(call, q.detach(), k.detach(), v.detach()) for name, call in calls.items()}
        yield Work("attention", f"forward {shape}, {kind}", forward, TOLERANCE[dtype], "sdpa, as diffusers calls it")
        backward = {name: partial(gradients, call(q, k, v), (q, k, v)) for name, call in calls.items()}
        yield Work("attention", f"backward {shape}, {kind}", backward, TOLERANCE[dtype], "sdpa, as diffusers calls it")


def heads(batch: int, length: int, width: int, device: str, dtype: torch.dtype, seed: int) -> Tensor:
    """(B, 8, L, D) as the network has it: a view of (B, L, 8·D)."""
    numbers = torch.randn(batch, length, 8 * width, generator=torch.Generator().manual_seed(seed))
    return numbers.to(device, dtype).unflatten(-1, (8, -1)).transpose(1, 2).requires_grad_()


def implementations(device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """minidiff's choice, the call that diffusers makes, each of minidiff's implementations, each of PyTorch's kernels."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        OURS: attention,
        "sdpa, as diffusers calls it": F.scaled_dot_product_attention,
    }
    names = [*IMPLS, *(GPU_IMPLS if device == "cuda" else ())]
    found |= {f"minidiff {name}": partial(attention, impl=name) for name in names if name not in ("auto", "sdpa")}
    return found | {name: partial(forced, backend) for name, backend in BACKENDS.items()}


def forced(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def answers(call: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Is there such a kernel for this device, dtype and shape?"""
    try:
        call(q[:, :, :64], k[:, :, :64], v[:, :, :64])
    except Exception:  # RuntimeError of PyTorch, SettingsError of minidiff, whatever a compiler raises: it cannot
        return False
    return True


def gradients(out: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """Backward alone, of a result that is there already; the three gradients in one."""
    found = torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in found])


# --- the U-Net and pictures ------------------------------------------------------------------------------------------


def unet_work(ours: Any, size: str, batch: int, device: str, compiled: bool, with_peers: bool, best: bool = True) -> Work:
    """One call of the U-Net, as drawing makes it; with batch 2 a denoising step with guidance.

    The weights stand still then, and the prompt stays: so what our first call makes of them, the one that only warms up, is
    there in the later ones.
    """
    dtype, config = next(ours.parameters()).dtype, ours.config
    draw = torch.Generator().manual_seed(0)
    side, width = config.sample_size, config.cross_attention_dim
    x = torch.randn(batch, 4, side, side, generator=draw).to(device, dtype)
    text = torch.randn(batch, 77, width, generator=draw).to(device, dtype)
    t = torch.full((batch,), 500, device=device)

    def of(unet: Any, theirs: bool) -> Callable[[], Tensor]:
        @torch.no_grad()
        def call() -> Tensor:
            answer: Tensor = unet(x, t, text, return_dict=False)[0] if theirs else unet(x, t, text)
            return answer

        return call

    still = ExitStack()
    with torch.no_grad():
        speed_up_network(ours)
        still.enter_context(frozen_weights([ours], large=True, prompt=True))
    contenders = {OURS: of(ours, False)}
    if device != "cpu":
        compile_unet(copy := deepcopy(ours))  # the copy caches no prompt
        contenders[COMPILED] = of(copy, False)
    if with_peers:
        contenders[peers.NAMES["P0"]] = of(peers.unet_beside(ours), True)
    if with_peers and best:
        contenders[peers.NAMES["P2"]] = of(peers.at_best(peers.unet_beside(ours), compiled), True)
    kind = str(dtype).removeprefix("torch.")
    name = f"{size}, batch {batch}, {kind}"
    return Work("U-Net", name, contenders, TOLERANCE[dtype], peers.NAMES["P0"] if with_peers else OURS, around=still)


def picture_work(folder: str, size: str, steps: int, device: str, compiled: bool, with_peers: bool) -> Work:
    """A whole picture, from the prompt to the pixels, from the same noise."""
    pipes = {OURS: StableDiffusionPipeline.from_pretrained(folder).to(device)}
    if device != "cpu":
        pipes[COMPILED] = StableDiffusionPipeline.from_pretrained(folder).to(device)
        compile_unet(pipes[COMPILED].unet)
    noise = torch.randn(pipes[OURS].latent_shape(1, None, None), generator=torch.Generator().manual_seed(0)).to(device)
    asked: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 5.0, "output_type": "pt"}
    prompt = "a photo of a red dog on the beach"

    def of(pipe: Any) -> Callable[[], Tensor]:
        return lambda: pipe(prompt, latents=noise.clone(), **asked).images

    contenders: dict[str, Callable[[], Tensor]] = {}
    for name, pipe in pipes.items():
        pipe.set_progress_bar_config(disable=True)
        contenders[name] = lambda pipe=pipe: pipe(prompt, latents=noise, **asked).images  # type: ignore[misc]
    if with_peers:
        contenders[peers.NAMES["P0"]] = of(peers.load(folder, device))
        best = peers.load(folder, device)
        best.vae = best.vae.to(memory_format=torch.channels_last)
        best.unet = peers.at_best(best.unet, compiled)
        contenders[peers.NAMES["P2"]] = of(best)
    reference = peers.NAMES["P0"] if with_peers else OURS
    return Work("picture", f"{size}, {steps} steps, guidance", contenders, 1e-2, reference)


# --- what is kept for backward ---------------------------------------------------------------------------------------


def saved_rows(with_peers: bool) -> list[Row]:
    """One LoRA step (rank 8, SD 1.5, 512², batch 1), on meta: in fp16 throughout, and under autocast as steps really run."""
    half, rows = torch.float16, []
    for autocast in (None, half):
        unets: dict[str, Any] = {OURS: models.lora_unet_on_meta()}
        if with_peers:
            unets[peers.NAMES["P0"]] = peers.lora_unet_on_meta(unets[OURS])
        found = {name: lora_step_bytes(unet, autocast, name != OURS) for name, unet in unets.items()}
        rows += counted_rows("saved bytes", f"LoRA step, SD 1.5, {'fp16 under autocast' if autocast else 'fp16'}", found)
    return rows


def lora_step_bytes(unet: Any, autocast: torch.dtype | None, theirs: bool) -> float:
    half = torch.float16
    if autocast is None:
        for p in unet.parameters():
            p.data = p.data.to(half)
    x, noise = torch.empty(1, 4, 64, 64, dtype=half, device="meta"), torch.empty(1, 4, 64, 64, device="meta")
    t, text = torch.empty(1, device="meta"), torch.empty(1, 77, 768, dtype=half, device="meta")

    def step() -> Tensor:
        output = unet(x, t, text, return_dict=False)[0] if theirs else unet(x, t, text)
        return F.mse_loss(output.float(), noise)

    return float(saved_bytes(step, unet.parameters(), autocast)["bytes"])
