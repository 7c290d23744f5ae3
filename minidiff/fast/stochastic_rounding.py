"""bf16 weights that still learn: rounded up or down by chance, so that the mean is right.

A bf16 number has 8 bits of precision, so a step smaller than 2^-9 of a weight is lost when the result is rounded to the
nearest: at fine-tuning's learning rates most weights would never move. Stochastic rounding (Gupta et al. 2015, arXiv
1502.02551; for training in bf16 Zamirai et al., arXiv 2010.06192) takes the neighbour below or above, each as often
as x lies near to it. Then E[round(x)] = x, and small steps arrive, one time in many.

bf16 is the upper half of an fp32 number. Adding 16 random bits to the lower half carries into the upper one with
probability (lower half) / 2^16, which is how far x is on its way to the next bf16 number; then the lower half is cut off.
"""

import torch
from torch import Tensor

from minidiff.core.rng import hashed_seed


def rounding_noise(count: int, device: torch.device, seed: int, *where: int | str) -> Tensor:
    """16 random bits for each of `count` numbers, int16: a function of (seed, where), with no state.

    So a resumed run rounds as one that never stopped. They are drawn where the numbers are: sending bits for every weight
    from the CPU would take longer than the step. So CPU and GPU round differently, as their sums differ anyway.
    """
    generator = torch.Generator(device).manual_seed(hashed_seed(seed, "rounding", *where))
    drawn = torch.empty(-(-count // 4), dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    return drawn.view(torch.int16)[:count]  # four of 16 bits from each drawn number


def round_to_bf16(x: Tensor, seed: int, *where: int | str) -> Tensor:
    """`x` (fp32, any shape) as bf16, with E[round(x)] = x, by the noise of (seed, where). NaN and infinity stay as they are."""
    noise = rounding_noise(x.numel(), x.device, seed, *where).view(x.shape).int() & 0xFFFF
    cut = (x.view(torch.int32) + noise).bitwise_and_(-0x10000).view(torch.float32)
    return torch.where(x.isfinite(), cut, x).to(torch.bfloat16)  # a NaN could be carried over into a zero
