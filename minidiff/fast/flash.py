"""Fused attention for NVIDIA GPUs, forward and backward, in Triton: `attention(q, k, v, impl="triton")`.

    B batch   N heads   L query tokens   S key tokens   D width of one head: 40, 80 and 160 in SD 1.5

Read `tiled_attention.py` first: this is the same algorithm, FlashAttention-2 (arXiv 2307.08691). There, PyTorch runs one small
operation after the other, and every tile of scores goes to memory and back between them. Here, one program does all of it for
some rows of one head, and no score ever leaves the chip:

                             kᵀ (D, S), read tile by tile, past all queries
                            +---------+---------+---------+
                       main |/////////|         |         |    D = 40 is 32 + 8: a power of two, as a tile must be,
                            |/////////|         |         |    and a tail, another. Stock kernels go up to 64
                       tail |/////////|         |         |    instead, and multiply 24 columns of zeros
                            +----+----+---------+---------+
         main     tail           |       BLOCK_S
        +--------+----+     +----v----+ - - - - + - - - - +
        |////////|////|     | scores  |         :         :    a product over D is a sum of two:
        |/ q, of one /|---->| of one  |         :         :        q_main k_mainᵀ + q_tail k_tailᵀ
    L   |// program //|     | tile    |         :         :
        +--------+----+     +----+----+ - - - - + - - - - +
        |        |    |          v
        |  of the next|      p = 2^(scores - m): the weights, but for the sum of their row
        |        |    |          |
        +--------+----+          v   p v_main and p v_tail are added to the sums of each row:
                            +--------+----+   +---+-------+
                            |   o    | o  |   | m | total |    all of it in registers, until the row has met its last key;
                            |  main  |tail|   |   |       |    then o / total is the output, and m + log2(total)
                            +--------+----+   +---+-------+    is saved for the backward

A product takes at least 16 numbers of each row, so where D is what is summed over, the tail of D = 40 is 16 wide, half of
it zeros; where D is the width of the result it is 8. Together: 48 + 40 columns of 64 + 64.

Strides go to the kernels, so that q, k and v are read where they lie. The result lies in memory as (B, L, N·D), so that merging
the heads copies nothing. fp32 is multiplied as three products in TF32 (nearly fp32's own accuracy); sums are in fp32.

flash_kernels.py holds the kernels. This file starts them.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minidiff.core.errors import SettingsError
from minidiff.fast.tiled_attention import empty_by_tokens

try:
    import triton
except ImportError as error:
    raise SettingsError(
        'attention impl "triton" needs the package triton, which is not installed here. It is for Linux: '
        'pip install "minidiff[triton]"; or take impl "sdpa".'
    ) from error

from minidiff.fast.flash_kernels import d_k_d_v_kernel, d_q_kernel, forward_kernel

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_D = 160
SHORT = 128  # keys, at most, that are a prompt's: for them tiles are narrower, as 77 would be 64 + 64
PART = 512  # queries for which a prompt's dk and dv are summed by one program
STAGES = 2  # tiles on their way from memory at once


class Tile(NamedTuple):
    """The sides of a tile, and how many warps of 32 threads work on it."""

    queries: int
    keys: int
    warps: int
    tail: int = 0  # columns of the tail, if there is one, at least


# By MAIN (see `split`). Chosen by compiling for sm_86, 89, 90 and 120; no GPU has timed them yet.
HALF_TILES = {
    "forward": {32: Tile(128, 64, 8), 64: Tile(128, 64, 8), 128: Tile(64, 32, 4)},
    "short forward": {32: Tile(128, 32, 8), 64: Tile(128, 32, 8), 128: Tile(64, 32, 4)},
    "d_q": {32: Tile(64, 32, 4), 64: Tile(64, 32, 4), 128: Tile(64, 16, 4)},
    "d_k_d_v": {32: Tile(64, 64, 4), 64: Tile(32, 64, 4), 128: Tile(32, 16, 4)},
    "short d_k_d_v": {32: Tile(64, 16, 1), 64: Tile(32, 16, 1), 128: Tile(32, 16, 4)},
}
# fp32 takes twice the registers, and each operand of a 3xTF32 product twice that. Rows are shared out to warps 16 by 16; where
# all warps have the same 16, the columns are shared out, if a tail is wider than the rows are many: hence the tails of 32.
FP32_TILES = {
    "forward": {32: Tile(64, 16, 4), 64: Tile(16, 32, 4, tail=32), 128: Tile(16, 32, 4)},
    "d_q": {32: Tile(64, 16, 4), 64: Tile(16, 32, 4, tail=32), 128: Tile(16, 32, 4)},
    "d_k_d_v": {32: Tile(16, 64, 4), 64: Tile(32, 16, 4, tail=32), 128: Tile(16, 16, 4)},
}


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v. q (B, N, L, D), k and v (B, N, S, D), of any strides, in fp16, bf16 or fp32 -> (B, N, L, D).

    The backward pass gives the same bits every time. SettingsError for what the kernels cannot take.
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
    (b, n, length, d), s = q.shape, k.shape[-2]
    out, lse = empty_by_tokens(q), torch.empty(b, n, length, dtype=torch.float32, device=q.device)
    tile = tile_of("forward", q, s)
    with torch.cuda.device_of(q):
        forward_kernel[triton.cdiv(length, tile.queries), b * n](
            q, k, v, out, lse, q.stride(), k.stride(), v.stride(), out.stride(), n, length, s, scale_of(d),
            MASK=s % tile.keys > 0, ALIGN=alignment(q, k, v, out), **options(tile, d),
        )  # fmt: skip
    return out, lse


def launch_d_q(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    """-> dq (B, N, L, D), and (B, N, L) the sum of dO ∘ O over each row."""
    (b, n, length, d), s = q.shape, k.shape[-2]
    d_q, delta = empty_by_tokens(q), torch.empty_like(lse)
    tile = tile_of("d_q", q, s)
    with torch.cuda.device_of(q):
        d_q_kernel[triton.cdiv(length, tile.queries), b * n](
            q, k, v, out, d_out, lse, delta, d_q, q.stride(), k.stride(), v.stride(), out.stride(), d_out.stride(),
            n, length, s, scale_of(d), MASK=s % tile.keys > 0, ALIGN=alignment(q, k, v, out, d_out), **options(tile, d),
        )  # fmt: skip
    return d_q, delta


def launch_d_k_d_v(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    """-> dk and dv (B, N, S, D). Over a prompt, the queries are shared out in parts, and these are summed in fp32."""
    (b, n, length, d), s = q.shape, k.shape[-2]
    tile = tile_of("d_k_d_v", q, s)
    parts = triton.cdiv(length, PART) if s <= SHORT else 1
    like = k.new_empty(1).expand(parts * b, n, s, d)
    d_k, d_v = (empty_by_tokens(like, k.dtype if parts == 1 else torch.float32) for _ in range(2))
    with torch.cuda.device_of(q):
        d_k_d_v_kernel[triton.cdiv(s, tile.keys), b * n, parts](
            q, k, v, d_out, lse, delta, d_k, d_v, q.stride(), k.stride(), v.stride(), d_out.stride(), d_k.stride(),
            n, length, s, length if parts == 1 else PART, scale_of(d),
            MASK=length % tile.queries > 0, ALIGN=alignment(q, k, v, d_out, d_k), **options(tile, d),
        )  # fmt: skip
    if parts == 1:
        return d_k, d_v
    by_tokens = (x.transpose(1, 2).unflatten(0, (parts, b)) for x in (d_k, d_v))  # as they lie in memory
    d_k, d_v = (x.sum(dim=0).to(k.dtype).transpose(1, 2) for x in by_tokens)
    return d_k, d_v


def tile_of(kernel: str, q: Tensor, keys: int) -> Tile:
    """From the tables above."""
    tables = FP32_TILES if q.dtype == torch.float32 else HALF_TILES
    main, _ = split(q.shape[-1])
    return (tables.get(f"short {kernel}" if keys <= SHORT else "") or tables[kernel])[max(main, 32)]


def scale_of(d: int) -> float:
    """1 / √D for scores that are exponents of 2 instead of e."""
    return math.log2(math.e) / math.sqrt(d)


def options(tile: Tile, d: int) -> dict[str, int | str]:
    """The sides of a tile, and how the D columns of a row are cut; see the picture."""
    main, tail = split(d)
    tail = max(tail, tile.tail) if tail else 0
    out_tail = min(tail, max(8, tile.tail, triton.next_power_of_2(d - main)))
    columns: dict[str, int | str] = {"D": d, "MAIN": main, "TAIL": tail, "OUT_TAIL": out_tail, "PRECISION": "tf32x3"}
    return columns | {"BLOCK_L": tile.queries, "BLOCK_S": tile.keys, "num_warps": tile.warps, "num_stages": STAGES}


def alignment(*tensors: Tensor) -> int:
    """The largest of 16, 8, 4, 2 and 1 that divides every stride but the last: 8 for heads 40 wide."""
    return math.gcd(16, *(stride for x in tensors for stride in x.stride()[:3]))


def split(length: int) -> tuple[int, int]:
    """A power of two, and another for what is left: 40 -> 32 + 16, 64 -> 64 + 0. 100 is 128 + 0: 64 + 64 would be no less."""
    whole = max(16, triton.next_power_of_2(length))
    main, tail = whole // 2, max(16, triton.next_power_of_2(length - whole // 2))
    return (main, tail) if main + tail < whole else (whole, 0)


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
