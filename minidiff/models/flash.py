"""Fused attention for NVIDIA GPUs, forward and backward, in Triton: `attention(q, k, v, impl="triton")`.

    B batch   N heads   L query tokens   S key tokens   D width of one head: 40, 80 and 160 in SD 1.5

Read `tiled.py` first: this is the same algorithm, FlashAttention-2 (arXiv 2307.08691). There, PyTorch runs one small
operation after the other, and every tile of scores goes to memory and back between them. Here, one program does all of it for
some rows of one head, and no score ever leaves the chip:

                                 kᵀ  (D, S), read tile by tile, past all queries
                            +---------+---------+---------+----+
                       main |/////////|         |         |    |    D = 40 is 32 + 8: a power of two, as tiles must be,
                            |/////////|         |         |    |    and a tail, a power of two itself. Stock kernels go up
                       tail |/////////|         |         |    |    to 64 instead, and multiply 24 columns of zeros
                            +---------+---------+---------+----+
          main      tail        |          BLOCK_S             REST_S    S = 77 is 64 + 16, where others take 128
        +----------+----+   +---v-----+ - - - - + - - - - + - -+
        |//////////|////|-->| scores  |         :         :    :    each product over D is a sum of two:
        |// q, of /|////|   | of one  |                             q_main k_mainᵀ + q_tail k_tailᵀ
    L   |one program////|   | tile    |         :         :    :
        +----------+----+   +---|-----+ - - - - + - - - - + - -+
        |          |    |       v
        |   of the next |     p = 2^(scores - m): the weights, but for the sum of their row
        |          |    |       |
        +----------+----+       v  p v_main and p v_tail, added to what is kept of each row:
                            +----------+----+   +-+-+
                            |    o     | o  |   |m|l|   all of it in registers, until the row has met its last key:
                            |   main   |tail|   | | |   then o / l is the output, and m + log2(l) is kept for the backward
                            +----------+----+   +-+-+

A product takes at least 16 numbers of each row, so where D is what is summed over, the tail of D = 40 is 16 wide, half of
it zeros; where D is the width of the result it is 8. Together: 48 + 40 columns of 64 + 64.

Strides go to the kernels, so that q, k and v are read where they lie, such as in the packed output of one linear. What is written lies
in memory as (B, L, N·D): merging the heads afterwards copies nothing. fp32 is multiplied as three products in TF32
("3xTF32", about fp32's own accuracy, on tensor cores); sums are in fp32 for every dtype. The backward is in flash_backward.py.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minidiff.errors import SettingsError
from minidiff.models.tiled import empty_by_tokens

try:
    import triton
except ImportError as error:
    raise SettingsError(
        'attention impl "triton" needs the package triton, which is not installed here. It is for Linux: '
        'pip install "minidiff[triton]"; or take impl "sdpa".'
    ) from error

from minidiff.models.flash_backward import d_k_d_v_kernel, d_q_kernel
from minidiff.models.flash_forward import forward_kernel, short_kernel

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_D = 160
SHORT = 128  # keys that the single-pass kernel takes


@dataclass(frozen=True)
class Tile:
    """The sides of a tile, and the warps (32 threads each) that share a program."""

    queries: int
    keys: int
    warps: int


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v. q (B, N, L, D), k and v (B, N, S, D), of any strides, in fp16, bf16 or fp32 -> (B, N, L, D).

    The result lies in memory as (B, L, N, D). Keeps q, k, v, the result and one fp32 number a row for the backward, which gives the
    same bits every time. SettingsError for what the kernels cannot take.
    """
    check(q, k, v)
    return FlashAttention.apply(q, k, v)


class FlashAttention(torch.autograd.Function):
    """The kernels, for autograd. The second kernel of the backward does not run where neither k nor v needs a gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = launch_forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        d_q, delta = launch_d_q(q, k, v, out, lse, d_out)
        if not any(ctx.needs_input_grad[1:]):  # the words of a frozen text encoder
            return d_q, None, None
        return d_q, *launch_d_k_d_v(q, k, v, lse, delta, d_out)


def launch_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """-> the output (B, N, L, D), and (B, N, L) the base-2 logarithm of the sum that each row was divided by."""
    (b, n, l, d), s = q.shape, k.shape[-2]  # noqa: E741
    out, lse = empty_by_tokens(q), torch.empty(b, n, l, dtype=torch.float32, device=q.device)
    tile = forward_tile_of(d, q.dtype)
    kernel, (block_s, rest_s) = (short_kernel, split(s)) if s <= SHORT else (forward_kernel, (tile.keys, rest(s, tile.keys)))
    with torch.cuda.device_of(q):
        kernel[triton.cdiv(l, tile.queries), b * n](
            q, k, v, out, lse, q.stride(), k.stride(), v.stride(), out.stride(), n, l, s, scale_of(d),
            **columns_of(d), BLOCK_L=tile.queries, BLOCK_S=block_s, REST_S=rest_s, num_warps=tile.warps, num_stages=STAGES,
        )  # fmt: skip
    return out, lse


def launch_d_q(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    """-> dq (B, N, L, D), and (B, N, L) the sum of dO ∘ O over each row."""
    (b, n, l, d), s = q.shape, k.shape[-2]  # noqa: E741
    d_q, delta = empty_by_tokens(q), torch.empty_like(lse)
    tile = d_q_tile_of(d, q.dtype)
    with torch.cuda.device_of(q):
        d_q_kernel[triton.cdiv(l, tile.queries), b * n](
            q, k, v, out, d_out, lse, delta, d_q, q.stride(), k.stride(), v.stride(), out.stride(), d_out.stride(),
            n, l, s, scale_of(d), **columns_of(d), BLOCK_L=tile.queries, BLOCK_S=tile.keys, REST_S=rest(s, tile.keys),
            num_warps=tile.warps, num_stages=STAGES,
        )  # fmt: skip
    return d_q, delta


def launch_d_k_d_v(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    """-> dk and dv (B, N, S, D)."""
    (b, n, l, d), s = q.shape, k.shape[-2]  # noqa: E741
    d_k, d_v = empty_by_tokens(k), empty_by_tokens(v)
    tile = d_k_d_v_tile_of(d, q.dtype, s)
    with torch.cuda.device_of(q):
        d_k_d_v_kernel[triton.cdiv(s, tile.keys), b * n](
            q, k, v, d_out, lse, delta, d_k, d_v, q.stride(), k.stride(), v.stride(), d_out.stride(), d_k.stride(),
            n, l, s, scale_of(d), **columns_of(d), BLOCK_S=tile.keys, BLOCK_L=tile.queries, REST_L=rest(l, tile.queries),
            num_warps=tile.warps, num_stages=STAGES,
        )  # fmt: skip
    return d_k, d_v


STAGES = 2  # tiles on their way from memory at once


def forward_tile_of(d: int, dtype: torch.dtype) -> Tile:
    return Tile(64, 64, 4)


def d_q_tile_of(d: int, dtype: torch.dtype) -> Tile:
    return Tile(64, 64, 4)


def d_k_d_v_tile_of(d: int, dtype: torch.dtype, s: int) -> Tile:
    return Tile(64, 16 if s <= SHORT else 64, 4)


def scale_of(d: int) -> float:
    """1 / √D for scores that are exponents of 2 instead of e."""
    return math.log2(math.e) / math.sqrt(d)


def columns_of(d: int) -> dict[str, int | str]:
    """How the D columns of a row are cut; see the picture."""
    main, tail = split(d)
    return {"D": d, "MAIN": main, "TAIL": tail, "OUT_TAIL": min(tail, power_of_two(d - main, 8)), "PRECISION": "tf32x3"}


def split(length: int) -> tuple[int, int]:
    """A power of two, and another for what is left: 40 -> 32 + 16, 64 -> 64 + 0. 100 is 128 + 0: 64 + 64 would be no less."""
    whole = power_of_two(length, 16)
    main, tail = whole // 2, power_of_two(length - whole // 2, 16)
    return (main, tail) if main + tail < whole else (whole, 0)


def rest(length: int, block: int) -> int:
    """The width of the last, narrower tile: the power of two, at least 16, that holds what whole blocks leave; 0 for nothing."""
    return power_of_two(length % block, 16) if length % block else 0


def power_of_two(x: int, least: int) -> int:
    """The smallest that is at least x, and at least `least`."""
    return max(least, 1 << max(x - 1, 0).bit_length())


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """SettingsError for what the kernels cannot take, and for a device that cannot run them."""
    if not q.is_cuda and not triton.knobs.runtime.interpret:
        wrong = f"runs on an NVIDIA GPU, and the tensors are on {q.device}"
    elif q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        wrong = f"takes q, k and v in one of fp16, bf16 and fp32, and these are {q.dtype}, {k.dtype} and {v.dtype}"
    elif q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or not k.shape[2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        wrong = f"takes q (B, N, L, D) and k and v (B, N, S, D), and these are {shapes}"
    elif not 0 < q.shape[3] <= LARGEST_D:
        wrong = f"takes heads up to {LARGEST_D} wide, and these are {q.shape[3]} wide"
    else:
        return
    raise SettingsError(f'attention impl "triton" {wrong}. Take impl "sdpa", which can.')
