"""Attention in tiles, in plain PyTorch: FlashAttention, to be read. `fast/flash.py` does the same in Triton.

    B batch   N heads   L query tokens   S key tokens   D width of one head

The weights of attention are an L x S matrix for each head, 4096 x 4096 at the finest level of SD 1.5, and `naive` saves them
all. Here they are computed tile by tile and freed; the backward pass computes them again:

              S keys ->
            +-----+-----+-----+-----+     one row of tiles at a time, from left to right. In memory for each query:
    L     0 |  *  |  *  |  *  |  *  |       m       the largest score so far
    queries +-----+-----+-----+-----+       total   the sum of exp(score - m) so far (the papers' l)
     |    1 |  *  | now |     |     |       o       the sum of exp(score - m) · v so far
     v      +-----+-----+-----+-----+     A tile with a larger score makes m grow: total and o are then multiplied by
                                          exp(old m - new m).

Papers: FlashAttention (arXiv 2205.14135), and FlashAttention-2 (arXiv 2307.08691), whose order of loops this is.
Memory: O(L) beside one tile, on any device.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minidiff.core.lora import without_autocast

BLOCK = 512  # queries and keys of a tile


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, block: int = BLOCK) -> Tensor:
    """softmax(q kᵀ / √D) v without the L x S weights. q (B, N, L, D), k and v (B, N, S, D) -> (B, N, L, D).

    Sums in fp32 where the inputs are fp16 or bf16. The result lies in memory as (B, L, N, D). `block` is the side of a tile.
    """
    return TiledAttention.apply(q, k, v, block)


class TiledAttention(torch.autograd.Function):
    """Saves q, k, v, the output, and one number a row: the logarithm of the sum by which its softmax divides."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
        with without_autocast(q):  # it would round the tiles, which are wide on purpose
            out, lse = forward_tiles(q, k, v, block)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.block = block
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        with without_autocast(q):  # it would round the tiles, which are wide on purpose
            return *backward_tiles(q, k, v, out, lse, d_out, ctx.block, ctx.needs_input_grad[:3]), None


def forward_tiles(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """2307.08691, algorithm 1 -> the output (B, N, L, D) and the log-sum-exp of every row's scores (B, N, L, 1)."""
    scale, wide = 1 / math.sqrt(q.shape[-1]), torch.promote_types(q.dtype, torch.float32)
    out = empty_by_tokens(q)
    lse = torch.empty_like(q[..., :1], dtype=wide)
    for rows in tiles(q.shape[-2], block):
        q_tile = q[..., rows, :].to(wide) * scale
        m = torch.full_like(q_tile[..., :1], -math.inf)
        total, o = torch.zeros_like(m), torch.zeros_like(q_tile)
        for columns in tiles(k.shape[-2], block):
            scores = q_tile @ k[..., columns, :].to(wide).mT
            m_new = torch.maximum(m, scores.amax(dim=-1, keepdim=True))
            p = (scores - m_new).exp()  # not yet divided by the sum of their row
            shrink = (m - m_new).exp()  # 0 in the first tile, where m is -inf
            total = total * shrink + p.sum(dim=-1, keepdim=True)
            o = o * shrink + p @ v[..., columns, :].to(wide)
            m = m_new
        out[..., rows, :] = o / total
        lse[..., rows, :] = m + total.log()
    return out, lse


def backward_tiles(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, block: int, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """2307.08691, algorithm 2 -> the gradients of q, k and v, None where not `needed`.

    P are the weights, O = P v, dP = dO vᵀ. The gradient of the scores is dS = P ∘ (dP - Δ), where Δ is the sum of dP ∘ P over a
    row. It equals the sum of dO ∘ O over this row, which is short to compute, because O was saved.
    """
    scale, wide = 1 / math.sqrt(q.shape[-1]), torch.promote_types(q.dtype, torch.float32)
    d_q, d_k, d_v = (empty_by_tokens(x, wide).zero_() if need else None for x, need in zip((q, k, v), needed))
    for rows in tiles(q.shape[-2], block):
        q_tile, d_o = q[..., rows, :].to(wide), d_out[..., rows, :].to(wide)
        delta = (d_o * out[..., rows, :]).sum(dim=-1, keepdim=True)
        for columns in tiles(k.shape[-2], block):
            k_tile, v_tile = k[..., columns, :].to(wide), v[..., columns, :].to(wide)
            p = (q_tile @ k_tile.mT * scale - lse[..., rows, :]).exp()  # the weights again, now with their sum divided out
            d_s = p * (d_o @ v_tile.mT - delta) * scale
            if d_v is not None:
                d_v[..., columns, :] += p.mT @ d_o
            if d_k is not None:
                d_k[..., columns, :] += d_s.mT @ q_tile
            if d_q is not None:
                d_q[..., rows, :] += d_s @ k_tile
    return [None if d is None else d.to(x.dtype) for d, x in zip((d_q, d_k, d_v), (q, k, v))]


def tiles(length: int, block: int) -> Iterator[slice]:
    """0 to `block`, `block` to 2 · `block`, …; the last one may be shorter."""
    return (slice(start, min(start + block, length)) for start in range(0, length, block))


def empty_by_tokens(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised, of the shape of x (B, N, L, D), in memory as (B, L, N, D): token by token, like a linear's output."""
    b, n, tokens, d = x.shape
    return torch.empty(b, tokens, n, d, dtype=dtype or x.dtype, device=x.device).transpose(1, 2)
