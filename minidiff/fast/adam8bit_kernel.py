"""The 8-bit AdamW as one Triton kernel: every number is read once and written once.

    n numbers of a tensor in row-major order   K = ceil(n / 256) blocks, each with one scale

adam8bit.py does the same in PyTorch, with some twenty passes over memory for one update. Here, a program has two blocks in
its registers from start to end:

    read     w   g   2 codes a number   2 scales a block         16 bytes a number with fp32 weights and gradients
                       |
             m, v = value of the code · scale                     2110.02861, section 2: both moments become fp32
             m, v, w after this gradient                          1412.6980, algorithm 1; Loshchilov & Hutter 2019, algorithm 2
             scales = the largest of each block                   2110.02861, section 2.1
             codes  = the nearest values                          2110.02861, section 1.2
                       |
    write    w       2 codes a number   2 scales a block

The tables are the twin's, and the moments are rounded as PyTorch rounds them (where it has a fused multiply-add, there is
`fma` here, and nothing else may be fused), so that the codes are the twin's. In between there is one exception: bf16 weights
read 2 bytes of noise a number, which PyTorch has drawn, so that they are rounded as the twin rounds them.

It has run in Triton's interpreter and through its compiler, not yet on a GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS, WARPS = 2, 4  # for each program: 512 numbers, 4 for each of its 128 threads; of 8, some would not fit into registers


@triton.jit
def lerp(start, end, weight):
    """start + weight (end - start), from the nearer side, as torch.lerp has it: weight 1 gives `end` itself."""
    near_start = weight < 0.5
    return tl.fma(tl.where(near_start, weight, weight - 1.0), end - start, tl.where(near_start, start, end))


@triton.jit
def unpack(codes, absmax, values, at, block, inside, K):
    """A moment as fp32: the value that a code means, times the scale of its block."""
    scale = tl.load(absmax + block, mask=block < K, other=0.0)  # (BLOCKS,)
    code = tl.load(codes + at, mask=inside, other=0).to(tl.int32)  # (BLOCKS, BLOCK)
    return tl.load(values + code) * scale[:, None]


@triton.jit
def pack(codes, absmax, above, guess, at, block, inside, K, moment):
    """2110.02861, section 2.1: each number, divided by its block's largest, takes the nearest code."""
    magnitude = moment.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # without the sign, bits are ordered as numbers are …
    largest = tl.max(tl.where(inside, magnitude, 0), 1).to(tl.float32, bitcast=True)  # … and NaN comes after infinity
    tl.store(absmax + block, largest, mask=block < K)
    least = 1.1754943508222875e-38  # the smallest normal number: a block of zeros is not divided by zero
    scaled = tl.div_rn(moment, tl.where(largest < least, least, largest)[:, None])
    code = tl.load(guess + ((scaled.to(tl.int32, bitcast=True) >> 16) & 0xFFFF))  # right, or one too low: see `tables`
    code += (scaled >= tl.load(above + code)).to(tl.int32)
    tl.store(codes + at, code.to(tl.uint8), mask=inside)


@triton.jit
def round_by_chance(x, noise):
    """fp32 -> bf16 as in stochastic_rounding.py: 16 random bits are added to the half that is then cut off."""
    bits = x.to(tl.int32, bitcast=True)
    cut = (bits + (noise.to(tl.int32) & 0xFFFF)) & -0x10000
    finite = (bits & 0x7FFFFFFF) < 0x7F800000
    return tl.where(finite, cut.to(tl.float32, bitcast=True), x).to(tl.bfloat16)


@triton.jit
def adamw_kernel(
    w, g, noise, m_codes, m_absmax, m_values, m_above, m_guess, v_codes, v_absmax, v_values, v_above, v_guess,
    n, K, m_share, v_share, decay, step_size, v_correction, eps,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """A program: one update of BLOCKS blocks of BLOCK numbers, in place. Without ROUND, `noise` is never read.

    `m_share` and `v_share` are 1 - β1 and 1 - β2, `decay` is 1 - lr · weight decay, `step_size` is -lr / (1 - β1^t), and
    `v_correction` is 1 - β2^t, for update number t.
    """
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # (BLOCKS, BLOCK)
    inside = at < n  # the last block may be short
    gradient = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(w + at, mask=inside, other=0.0).to(tl.float32)

    m = lerp(unpack(m_codes, m_absmax, m_values, at, block, inside, K), gradient, m_share)  # 1412.6980: β1 m + (1 - β1) g
    pack(m_codes, m_absmax, m_above, m_guess, at, block, inside, K, m)
    v = lerp(unpack(v_codes, v_absmax, v_values, at, block, inside, K), gradient * gradient, v_share)  # β2 v + (1 - β2) g²
    pack(v_codes, v_absmax, v_above, v_guess, at, block, inside, K, v)

    denominator = tl.sqrt_rn(tl.div_rn(v, v_correction)) + eps  # 1412.6980: √v̂ + ε; the moments before they were rounded
    weight = tl.fma(tl.div_rn(m, denominator), step_size, weight * decay)  # Loshchilov & Hutter, algorithm 2, line 12
    if ROUND:
        weight = round_by_chance(weight, tl.load(noise + at, mask=inside, other=0))
    tl.store(w + at, weight, mask=inside)


def launch(
    w: Tensor,
    g: Tensor,
    noise: Tensor | None,
    moments: Sequence[tuple[Tensor, ...]],
    done: int,
    group: dict[str, Any],
    block: int,
) -> None:
    """Update number `done` of w (n,), fp32, or bf16 with `noise` (n,) int16, from its gradient g (n,), in place.

    `moments`: of the first and the second, its codes (n,) and absmax (K,), which change too, and the three of `tables`.
    `group` holds lr, betas, eps and weight_decay; `block` numbers share a scale.
    """
    (beta1, beta2), lr, blocks = group["betas"], group["lr"], len(moments[0][1])
    with torch.cuda.device_of(w):
        adamw_kernel[triton.cdiv(blocks, BLOCKS),](
            w, g, w if noise is None else noise, *moments[0], *moments[1], len(w), blocks,
            1 - beta1, 1 - beta2, 1 - lr * group["weight_decay"], -lr / (1 - beta1**done), 1 - beta2**done, group["eps"],
            BLOCK=block, BLOCKS=BLOCKS, ROUND=noise is not None, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
