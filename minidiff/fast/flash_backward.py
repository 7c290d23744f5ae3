"""The Triton kernels of attention, backward: arXiv 2307.08691, algorithm 2, cut in two.

    B batch   N heads   L query tokens   S key tokens   D width of one head

One kernel walks along the rows of the weights and sums dq; the other walks down the columns and sums dk and dv. Every number
is then summed by one program, in one order, and the same inputs give the same bits; with a single kernel, many programs would
add to the same dq (atomically, first come, first served). The price: the weights are made twice.

With O the output, dO its gradient, P = softmax(q kᵀ / √D) and Δ the sum of dO ∘ O over a row:

    dv = Pᵀ dO      dP = dO vᵀ      dS = P ∘ (dP - Δ)      dq = dS k / √D      dk = dSᵀ q / √D
"""

import triton
import triton.language as tl

from minidiff.fast.flash_forward import add_product, head_start, load_part, load_rows, product_over_d, store_rows


@triton.jit
def tail_for_output(
    start, strides, rows, length, tail,
    MAIN: tl.constexpr, TAIL: tl.constexpr, OUT_TAIL: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """The tail of rows at the width it needs as a result's columns: where that is narrower, it is read again (from cache)."""
    result = tail
    if OUT_TAIL < TAIL:
        result = load_part(start, strides, rows, length, MAIN, OUT_TAIL, D, MASK)
    return result


@triton.jit
def d_q_tile(
    d_q_main, d_q_tail, q_main, q_tail, d_o_main, d_o_tail, lse, delta, k, k_strides, v, v_strides, first, S, scale,
    WIDTH: tl.constexpr, MASK: tl.constexpr,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, OUT_TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The part of dq, for all rows of the program, that comes from WIDTH keys from `first` on."""
    columns = first + tl.arange(0, WIDTH)
    k_main, k_tail = load_rows(k, k_strides, columns, S, MAIN, TAIL, D, MASK)
    scores = product_over_d(q_main, q_tail, k_main, k_tail, TAIL, PRECISION) * scale
    if MASK:  # a key beyond the last is 0, but its weight, 2^(0 - lse), could be too large for a number
        scores = tl.where(columns[None, :] < S, scores, -float("inf"))
    p = tl.exp2(scores - lse[:, None])  # the weights again, now with their sum divided out
    v_main, v_tail = load_rows(v, v_strides, columns, S, MAIN, TAIL, D, MASK)
    d_s = p * (product_over_d(d_o_main, d_o_tail, v_main, v_tail, TAIL, PRECISION) - delta[:, None])
    k_tail = tail_for_output(k, k_strides, columns, S, k_tail, MAIN, TAIL, OUT_TAIL, D, MASK)
    return add_product(d_q_main, d_q_tail, d_s, k_main, k_tail, OUT_TAIL, PRECISION)


@triton.jit
def d_q_kernel(
    q, k, v, out, d_out, lse, delta, d_q, q_strides, k_strides, v_strides, out_strides, d_out_strides, N, L, S, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, OUT_TAIL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, REST_S: tl.constexpr, MASK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A program: dq of BLOCK_L rows of one head, past all keys. Writes `delta` (B, N, L) too, which d_k_d_v_kernel reads.

    `d_q` lies in memory as `out` does. `scale` is log2(e) / √D, as in the forward.
    """
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    out, d_q = head_start(out, out_strides, head, N, ALIGN), head_start(d_q, out_strides, head, N, ALIGN)
    d_out = head_start(d_out, d_out_strides, head, N, ALIGN)
    d_o_main, d_o_tail = load_rows(d_out, d_out_strides, rows, L, MAIN, TAIL, D, True)
    o_main, o_tail = load_rows(out, out_strides, rows, L, MAIN, TAIL, D, True)
    delta_rows = tl.sum(o_main.to(tl.float32) * d_o_main.to(tl.float32), 1)
    if TAIL > 0:
        delta_rows += tl.sum(o_tail.to(tl.float32) * d_o_tail.to(tl.float32), 1)
    row_numbers = head.to(tl.int64) * L + rows
    tl.store(delta + row_numbers, delta_rows, mask=rows < L)
    lse_rows = tl.load(lse + row_numbers, mask=rows < L, other=0.0)

    q_main, q_tail = load_rows(head_start(q, q_strides, head, N, ALIGN), q_strides, rows, L, MAIN, TAIL, D, True)
    k, v = head_start(k, k_strides, head, N, ALIGN), head_start(v, v_strides, head, N, ALIGN)
    d_q_main = tl.zeros([BLOCK_L, MAIN], tl.float32)
    d_q_tail = tl.zeros([BLOCK_L, OUT_TAIL if OUT_TAIL > 0 else 1], tl.float32)
    whole = S if MASK else S - S % BLOCK_S
    for first in range(0, whole, BLOCK_S):
        d_q_main, d_q_tail = d_q_tile(
            d_q_main, d_q_tail, q_main, q_tail, d_o_main, d_o_tail, lse_rows, delta_rows, k, k_strides, v, v_strides,
            first, S, scale, BLOCK_S, MASK, D, MAIN, TAIL, OUT_TAIL, PRECISION,
        )  # fmt: skip
    if REST_S > 0:
        d_q_main, d_q_tail = d_q_tile(
            d_q_main, d_q_tail, q_main, q_tail, d_o_main, d_o_tail, lse_rows, delta_rows, k, k_strides, v, v_strides,
            whole, S, scale, REST_S, True, D, MAIN, TAIL, OUT_TAIL, PRECISION,
        )  # fmt: skip
    unscale = scale * 0.6931471805599453  # times ln 2: the 1 / √D of the formula, without the log2(e)
    store_rows(d_q, out_strides, rows, L, d_q_main * unscale, d_q_tail * unscale, MAIN, OUT_TAIL, D)


@triton.jit
def d_k_d_v_tile(
    d_k_main, d_k_tail, d_v_main, d_v_tail, k_main, k_tail, v_main, v_tail,
    q, q_strides, d_out, d_out_strides, lse, delta, first, end, scale,
    WIDTH: tl.constexpr, MASK: tl.constexpr,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, OUT_TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The part of dk and dv, for all keys, that comes from WIDTH queries from `first` on. All is transposed: (S, L)."""
    rows = first + tl.arange(0, WIDTH)
    lse_rows = tl.load(lse + rows, mask=rows < end, other=0.0)  # beyond the end all is 0: q, dO, and what they add
    delta_rows = tl.load(delta + rows, mask=rows < end, other=0.0)
    q_main, q_tail = load_rows(q, q_strides, rows, end, MAIN, TAIL, D, MASK)
    scores = product_over_d(k_main, k_tail, q_main, q_tail, TAIL, PRECISION) * scale
    p = tl.exp2(scores - lse_rows[None, :])
    d_o_main, d_o_tail = load_rows(d_out, d_out_strides, rows, end, MAIN, TAIL, D, MASK)
    d_s = p * (product_over_d(v_main, v_tail, d_o_main, d_o_tail, TAIL, PRECISION) - delta_rows[None, :])
    d_o_tail = tail_for_output(d_out, d_out_strides, rows, end, d_o_tail, MAIN, TAIL, OUT_TAIL, D, MASK)
    q_tail = tail_for_output(q, q_strides, rows, end, q_tail, MAIN, TAIL, OUT_TAIL, D, MASK)
    d_v_main, d_v_tail = add_product(d_v_main, d_v_tail, p, d_o_main, d_o_tail, OUT_TAIL, PRECISION)
    d_k_main, d_k_tail = add_product(d_k_main, d_k_tail, d_s, q_main, q_tail, OUT_TAIL, PRECISION)
    return d_k_main, d_k_tail, d_v_main, d_v_tail


@triton.jit
def d_k_d_v_kernel(
    q, k, v, d_out, lse, delta, d_k, d_v, q_strides, k_strides, v_strides, d_out_strides, d_k_strides,
    N, L, S, queries_a_part, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, OUT_TAIL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr, REST_L: tl.constexpr, MASK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A program: dk and dv of BLOCK_S keys of one head, past one part of the queries. `d_v` lies in memory as `d_k` does.

    A prompt's few keys would keep few programs busy, past thousands of queries. So the queries come in parts, with a dk and
    a dv of each part (parts · B, N, S, D), to be summed afterwards.
    """
    head = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    k_main, k_tail = load_rows(head_start(k, k_strides, head, N, ALIGN), k_strides, columns, S, MAIN, TAIL, D, True)
    v_main, v_tail = load_rows(head_start(v, v_strides, head, N, ALIGN), v_strides, columns, S, MAIN, TAIL, D, True)
    q, d_out = head_start(q, q_strides, head, N, ALIGN), head_start(d_out, d_out_strides, head, N, ALIGN)
    lse, delta = lse + head.to(tl.int64) * L, delta + head.to(tl.int64) * L

    d_k_main = tl.zeros([BLOCK_S, MAIN], tl.float32)
    d_k_tail = tl.zeros([BLOCK_S, OUT_TAIL if OUT_TAIL > 0 else 1], tl.float32)
    d_v_main, d_v_tail = d_k_main, d_k_tail
    begin = tl.program_id(2) * queries_a_part
    end = tl.minimum(begin + queries_a_part, L)
    whole = end if MASK else end - (end - begin) % BLOCK_L
    for first in range(begin, whole, BLOCK_L):
        d_k_main, d_k_tail, d_v_main, d_v_tail = d_k_d_v_tile(
            d_k_main, d_k_tail, d_v_main, d_v_tail, k_main, k_tail, v_main, v_tail, q, q_strides, d_out, d_out_strides,
            lse, delta, first, end, scale, BLOCK_L, MASK, D, MAIN, TAIL, OUT_TAIL, PRECISION,
        )  # fmt: skip
    if REST_L > 0:
        d_k_main, d_k_tail, d_v_main, d_v_tail = d_k_d_v_tile(
            d_k_main, d_k_tail, d_v_main, d_v_tail, k_main, k_tail, v_main, v_tail, q, q_strides, d_out, d_out_strides,
            lse, delta, whole, end, scale, REST_L, True, D, MAIN, TAIL, OUT_TAIL, PRECISION,
        )  # fmt: skip
    unscale = scale * 0.6931471805599453  # as in d_q_kernel
    head += tl.program_id(2) * tl.num_programs(1)
    d_k, d_v = head_start(d_k, d_k_strides, head, N, ALIGN), head_start(d_v, d_k_strides, head, N, ALIGN)
    store_rows(d_k, d_k_strides, columns, S, d_k_main * unscale, d_k_tail * unscale, MAIN, OUT_TAIL, D)
    store_rows(d_v, d_k_strides, columns, S, d_v_main, d_v_tail, MAIN, OUT_TAIL, D)
