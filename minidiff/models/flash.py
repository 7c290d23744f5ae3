"""Launch."""

import math

import torch
from torch import Tensor

import triton
from minidiff.models.flash_kernels import forward_kernel, short_kernel
from minidiff.models.tiled import empty_by_tokens


def power_up(x: int) -> int:
    return 1 << max(x - 1, 15).bit_length()


def split(width: int) -> tuple[int, int]:
    if width < 16 or (width & (width - 1)) == 0:
        return power_up(width), 0
    main = 1 << (width.bit_length() - 1)
    tail = power_up(width - main)
    return (main, tail) if tail < main else (2 * main, 0)


def fwd(q: Tensor, k: Tensor, v: Tensor, short: bool) -> tuple[Tensor, Tensor]:
    B, N, L, D = q.shape
    S = k.shape[-2]
    out = empty_by_tokens(q).fill_(float("nan"))
    lse = torch.full((B, N, L), float("nan"))
    MAIN, TAIL = split(D)
    OT = min(TAIL, max(8, D - MAIN))
    if short:
        BS, RS = split(S)
        kern = short_kernel
    else:
        BS = 64
        RS = power_up(S % BS) if S % BS else 0
        kern = forward_kernel
    grid = (triton.cdiv(L, 64), B * N)
    kern[grid](q, k, v, out, lse, q.stride(), k.stride(), v.stride(), out.stride(), N, L, S, math.log2(math.e) / math.sqrt(D),
               D, MAIN, TAIL, OT, "tf32x3", 64, BS, RS)
    return out, lse
