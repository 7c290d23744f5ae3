"""AdamW whose memory is small: two bytes of state for each weight in place of eight.

Dettmers, Lewis, Shleifer & Zettlemoyer, "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861). Adam remembers
two numbers a weight, and they need range more than precision:

- Block-wise (section 2.1): a tensor is cut into blocks of 256 numbers, each scaled by its own largest magnitude, so that
  one outlier spoils 256 numbers and not the whole tensor. (The paper's blocks are of 2048; today's libraries take 256.)
- Dynamic tree (section 1.3; no sign bit for the second moment, section 2.2): the zeros before the first one of the 8 bits
  choose a decade, and the bits behind it divide this decade evenly. Seven decades, with fine steps at the top.

      0.001     0.01              0.1                                 1
      | · · · · | · · · · · · · · | · · · · · · · · · · · · · · · · · |      (a few of them, not to scale)

The update computes with fp32 moments and rounds them afterwards (section 2). A second moment below 1.6e-7 of the largest in its
block becomes zero, and the steps of such a weight can be too long.

The step in the backward pass (`in_backward`): usually all gradients are in memory before the update, and take as much as the
weights. Here each tensor is updated as soon as its gradient is complete, and the gradient is freed, as in LOMO (Lv et al.,
arXiv 2306.09782). The price: each gradient is clipped separately; gradients cannot be accumulated; and before a gradient that
is not finite, other tensors have been updated already.

Shapes: n numbers of a tensor in row-major order, K = ceil(n / 256) blocks. State: codes (n), uint8; absmax (K,), fp32.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.core.train import clip_gradients

BLOCK = 256  # numbers that share one scale
LEAST = 4096  # tensors with fewer numbers keep fp32 state (the reference's min_8bit_size): they cost little, and matter much
PIECE = 2**21  # numbers that are updated at once: their fp32 moments never take more than some 100 MB

# --- 8-bit numbers -----------------------------------------------------------------------------------------------------


@cache
def tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 256 numbers that a code can mean, ascending, and the boundaries (255,) between them.

    Decade i below 1 is divided into 2^(6 - i) parts (2^(7 - i) without a sign), and a code means the middle of a part. Two
    codes are left for 0 and for 1 itself, the largest of a block. -1 has none: it becomes -0.993.
    """
    parts = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (6 - i if signed else 7 - i) + 1)
        middles = 10.0**-i * ((edges[:-1] + edges[1:]) / 2)
        parts += [middles, -middles] if signed else [middles]
    values = torch.cat(parts).sort().values
    return values.to(device), ((values[:-1] + values[1:]) / 2).to(device)


def quantize(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Section 2.1: x (n,) fp32 -> codes (n,), absmax (K,). Each number, divided by its block's largest, takes the nearest."""
    blocks = F.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)  # (K, 256): the last one is filled up with zeros
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).view(-1)[: len(x)]
    return torch.bucketize(scaled, tables(signed, x.device)[1], right=True).to(torch.uint8), absmax


def dequantize(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The reverse, up to rounding: codes (n,), absmax (K,) -> (n,) fp32."""
    x = tables(signed, codes.device)[0].index_select(0, codes.int())
    return x.mul_(absmax.repeat_interleave(BLOCK)[: len(x)])


# --- the optimizer -----------------------------------------------------------------------------------------------------


class LeanAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) with `eight_bit` moments, or fp32 ones (then torch's, up to rounding)."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        eight_bit: bool = True,
    ) -> None:
        self.eight_bit = eight_bit
        self.norms: dict[nn.Parameter, float] = {}  # of the gradients that the last backward pass used up
        super().__init__(list(parameters), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; and remembers each parameter's group."""
        super().add_param_group(param_group)
        self.groups = {p: number for number, group in enumerate(self.param_groups) for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for p in self.groups:
            if p.grad is not None:
                self.update(p, p.grad)

    @torch.no_grad()
    def update(self, p: nn.Parameter, grad: Tensor) -> None:
        """One update of one parameter, piece by piece, so that few moments are in fp32 at once."""
        group, state = self.param_groups[self.groups[p]], self.state[p]
        if not state:
            for name, (shape, dtype) in self.kinds(p).items():
                state[name] = torch.zeros(shape, dtype=dtype, device="cpu" if name == "step" else p.device)
        state["step"] += 1
        w, g = p.reshape(-1), grad.reshape(-1)  # views where the memory is in row-major order
        done, flat = int(state["step"]), {name: t.view(-1) for name, t in state.items() if name != "step"}
        for start in range(0, len(w), PIECE):
            piece = slice(start, start + PIECE)
            m, v = self.moments(flat, piece, g[piece], group["betas"])
            w[piece] = adamw_step(w[piece], m, v, done, group)
        if not p.is_contiguous():  # then w is a copy
            p.copy_(w.view(p.shape))

    @contextmanager
    def in_backward(self, max_norm: float) -> Iterator[None]:
        """Inside the `with`, every backward pass clips each gradient, updates its parameter, and frees the gradient."""

        def take(p: nn.Parameter) -> None:  # PyTorch calls it when p.grad is complete and p is not read again
            assert p.grad is not None
            self.norms[p] = clip_gradients([p], max_norm)
            if math.isfinite(self.norms[p]):
                self.update(p, p.grad)
                p.grad = None

        handles = [p.register_post_accumulate_grad_hook(take) for p in self.groups]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def norm(self) -> float:
        """The norm of all gradients of the last backward pass together, before they were clipped."""
        norm = math.hypot(*self.norms.values())
        self.norms.clear()
        return norm

    def kinds(self, p: Tensor) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """The state of a parameter: name -> shape, dtype."""
        packed = self.eight_bit and p.numel() >= LEAST
        table = {"step": (torch.Size(), torch.float32)}
        for name in ("exp_avg", "exp_avg_sq"):
            table[name] = (p.shape, torch.uint8 if packed else torch.float32)
            if packed:
                table[f"{name}_absmax"] = (torch.Size([-(-p.numel() // BLOCK)]), torch.float32)
        return table

    def moments(self, flat: dict[str, Tensor], piece: slice, g: Tensor, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """Adam (1412.6980), algorithm 1: both moments after this gradient, as fp32; and remembered, perhaps rounded."""
        both = []
        for name, target, beta in (("exp_avg", g, betas[0]), ("exp_avg_sq", g.square(), betas[1])):
            kept, signed = flat[name][piece], name == "exp_avg"
            if kept.dtype == torch.float32:
                both.append(kept.lerp_(target, 1 - beta))
                continue
            absmax = flat[f"{name}_absmax"][piece.start // BLOCK : piece.stop // BLOCK]
            moment = dequantize(kept, absmax, signed).lerp_(target, 1 - beta)
            codes, largest = quantize(moment, signed)
            kept.copy_(codes)
            absmax.copy_(largest)
            both.append(moment)
        return both[0], both[1]


def adamw_step(w: Tensor, m: Tensor, v: Tensor, done: int, group: dict[str, Any]) -> Tensor:
    """Loshchilov & Hutter 2019, algorithm 2: the weights (n,) after update number `done`, from the new moments (n,)."""
    beta1, beta2 = group["betas"]
    denominator = (v / (1 - beta2**done)).sqrt_().add_(group["eps"])
    w = w * (1 - group["lr"] * group["weight_decay"])
    return w.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1**done))
