"""The Triton kernels of attention: arXiv 2307.08691, algorithms 1 and 2. The picture is in flash.py.

    B batch   N heads   L query tokens   S key tokens   D width of one head

Every kernel runs as many programs as there are tiles of rows, each on its own. Names in capitals are known when a kernel is
compiled: an `if` about them costs nothing. With MASK the last tile reaches beyond the last row. Strides are in elements,
(B, N, tokens, D).

The backward is cut in two. One kernel walks along the rows of the weights and sums dq; the other walks down the columns and
sums dk and dv. Every number is then summed by one program, in one order, and the same inputs give the same bits; in a single
kernel, many programs would add to the same dq at once. The price: the weights are computed twice. With O the output, dO its
gradient, P = softmax(q kᵀ / √D) and Δ the sum of dO ∘ O over a row:

    dv = Pᵀ dO      dP = dO vᵀ      dS = P ∘ (dP - Δ)      dq = dS k / √D      dk = dSᵀ q / √D
"""

import triton
import triton.language as tl


@triton.jit
def head_start(tensor, strides, head, N, ALIGN: tl.constexpr):
    """Where one head of one sample begins. `head` counts through both; in 64 bits, as batches can be large.

    The compiler must know that rows begin at multiples of ALIGN, or it reads them number by number, not 16 bytes at once; of a
    stride it sees by itself only whether 16 divides it, which is not so for heads 40 wide.
    """
    offset = (head // N).to(tl.int64) * strides[0] + (head % N).to(tl.int64) * strides[1]
    return tensor + tl.multiple_of(offset, ALIGN)


@triton.jit
def load_part(start, strides, rows, length, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr):
    """Columns FIRST to FIRST + WIDTH of some rows of a (tokens, D) matrix; 0 beyond the last column and, with MASK, row."""
    columns = FIRST + tl.arange(0, WIDTH)
    where = start + rows[:, None] * strides[2] + columns[None, :] * strides[3]
    if MASK:
        return tl.load(where, mask=(rows[:, None] < length) & (columns[None, :] < D), other=0.0)
    elif FIRST + WIDTH > D:
        return tl.load(where, mask=columns[None, :] < D, other=0.0)
    else:
        return tl.load(where)


@triton.jit
def load_rows(start, strides, rows, length, MAIN: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr):
    """Whole rows in two parts, MAIN and TAIL columns wide. Without a tail the second is never used."""
    main = load_part(start, strides, rows, length, 0, MAIN, D, MASK)
    tail = main
    if TAIL > 0:
        tail = load_part(start, strides, rows, length, MAIN, TAIL, D, MASK)
    return main, tail


@triton.jit
def store_rows(start, strides, rows, length, main, tail, MAIN: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr):
    """Both parts of some rows into a (tokens, D) matrix, in its dtype; nothing beyond the last row and column."""
    columns = tl.arange(0, MAIN)
    where = start + rows[:, None] * strides[2] + columns[None, :] * strides[3]
    tl.store(where, main.to(start.dtype.element_ty), mask=(rows[:, None] < length) & (columns[None, :] < D))
    if TAIL > 0:
        columns = MAIN + tl.arange(0, TAIL)
        where = start + rows[:, None] * strides[2] + columns[None, :] * strides[3]
        tl.store(where, tail.to(start.dtype.element_ty), mask=(rows[:, None] < length) & (columns[None, :] < D))


@triton.jit
def product_over_d(a_main, a_tail, b_main, b_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """a bᵀ: the sum over D is the sum over the main part and that over the tail."""
    result = tl.dot(a_main, tl.trans(b_main), input_precision=PRECISION)
    if TAIL > 0:
        result = tl.dot(a_tail, tl.trans(b_tail), result, input_precision=PRECISION)
    return result


@triton.jit
def add_product(sum_main, sum_tail, a, b_main, b_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """sum + a b, where D is the width of the result: the two parts have nothing to do with each other."""
    a = a.to(b_main.dtype)  # weights are computed in fp32 and multiplied in the dtype of the inputs
    sum_main = tl.dot(a, b_main, sum_main, input_precision=PRECISION)
    if TAIL > 0:
        sum_tail = tl.dot(a, b_tail, sum_tail, input_precision=PRECISION)
    return sum_main, sum_tail


@triton.jit
def forward_kernel(
    q, k, v, out, lse, q_strides, k_strides, v_strides, out_strides, N, L, S, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, OUT_TAIL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, MASK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_L rows of the output of one head, past all keys. Writes `out`, and `lse` (B, N, L) for the backward.

    `scale` is log2(e) / √D: exp(x) is 2^(x · log2 e), and 2^x is what the hardware has. `lse` is in base 2 likewise.
    """
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    q_main, q_tail = load_rows(head_start(q, q_strides, head, N, ALIGN), q_strides, rows, L, MAIN, TAIL, D, True)
    k, v = head_start(k, k_strides, head, N, ALIGN), head_start(v, v_strides, head, N, ALIGN)

    m = tl.full([BLOCK_L], -float("inf"), tl.float32)  # the largest score of each row so far
    total = tl.zeros([BLOCK_L], tl.float32)  # the sum of 2^(score - m) so far
    o_main = tl.zeros([BLOCK_L, MAIN], tl.float32)  # the sum of 2^(score - m) · v so far
    o_tail = tl.zeros([BLOCK_L, OUT_TAIL if OUT_TAIL > 0 else 1], tl.float32)
    for first in range(0, S, BLOCK_S):  # algorithm 1, lines 8 to 10
        columns = first + tl.arange(0, BLOCK_S)
        k_main, k_tail = load_rows(k, k_strides, columns, S, MAIN, TAIL, D, MASK)
        scores = product_over_d(q_main, q_tail, k_main, k_tail, TAIL, PRECISION) * scale
        if MASK:
            scores = tl.where(columns[None, :] < S, scores, -float("inf"))  # a key beyond the last gets weight 2^-inf = 0
        m_new = tl.maximum(m, tl.max(scores, 1))
        p = tl.exp2(scores - m_new[:, None])  # not yet divided by the sum of their row
        shrink = tl.exp2(m - m_new)  # 0 in the first tile, where m is -inf
        total = total * shrink + tl.sum(p, 1)
        o_main = o_main * shrink[:, None]
        if OUT_TAIL > 0:
            o_tail = o_tail * shrink[:, None]
        v_main, v_tail = load_rows(v, v_strides, columns, S, MAIN, OUT_TAIL, D, MASK)
        o_main, o_tail = add_product(o_main, o_tail, p, v_main, v_tail, OUT_TAIL, PRECISION)
        m = m_new

    o_main, o_tail = o_main / total[:, None], o_tail / total[:, None]
    store_rows(head_start(out, out_strides, head, N, ALIGN), out_strides, rows, L, o_main, o_tail, MAIN, OUT_TAIL, D)
    tl.store(lse + head.to(tl.int64) * L + rows, m + tl.log2(total), mask=rows < L)


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
def d_q_kernel(
    q, k, v, out, d_out, lse, delta, d_q, q_strides, k_strides, v_strides, out_strides, d_out_strides, N, L, S, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, OUT_TAIL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, MASK: tl.constexpr, ALIGN: tl.constexpr,
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
    for first in range(0, S, BLOCK_S):
        columns = first + tl.arange(0, BLOCK_S)
        k_main, k_tail = load_rows(k, k_strides, columns, S, MAIN, TAIL, D, MASK)
        scores = product_over_d(q_main, q_tail, k_main, k_tail, TAIL, PRECISION) * scale
        if MASK:  # a key beyond the last is 0, but its weight, 2^(0 - lse), could be too large for a number
            scores = tl.where(columns[None, :] < S, scores, -float("inf"))
        p = tl.exp2(scores - lse_rows[:, None])  # the weights again, now with their sum divided out
        v_main, v_tail = load_rows(v, v_strides, columns, S, MAIN, TAIL, D, MASK)
        d_s = p * (product_over_d(d_o_main, d_o_tail, v_main, v_tail, TAIL, PRECISION) - delta_rows[:, None])
        k_tail = tail_for_output(k, k_strides, columns, S, k_tail, MAIN, TAIL, OUT_TAIL, D, MASK)
        d_q_main, d_q_tail = add_product(d_q_main, d_q_tail, d_s, k_main, k_tail, OUT_TAIL, PRECISION)
    unscale = scale * 0.6931471805599453  # times ln 2: the 1 / √D of the formula, without the log2(e)
    store_rows(d_q, out_strides, rows, L, d_q_main * unscale, d_q_tail * unscale, MAIN, OUT_TAIL, D)


@triton.jit
def d_k_d_v_kernel(
    q, k, v, d_out, lse, delta, d_k, d_v, q_strides, k_strides, v_strides, d_out_strides, d_k_strides,
    N, L, S, queries_a_part, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, OUT_TAIL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr, MASK: tl.constexpr, ALIGN: tl.constexpr,
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
    whole = end if MASK else end - (end - begin) % BLOCK_L  # the same number; said so, the compiler needs fewer registers
    for first in range(begin, whole, BLOCK_L):  # all is transposed: (S, L)
        rows = first + tl.arange(0, BLOCK_L)
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
    unscale = scale * 0.6931471805599453  # as in d_q_kernel
    head += tl.program_id(2) * tl.num_programs(1)
    d_k, d_v = head_start(d_k, d_k_strides, head, N, ALIGN), head_start(d_v, d_k_strides, head, N, ALIGN)
    store_rows(d_k, d_k_strides, columns, S, d_k_main * unscale, d_k_tail * unscale, MAIN, OUT_TAIL, D)
    store_rows(d_v, d_k_strides, columns, S, d_v_main, d_v_tail, MAIN, OUT_TAIL, D)
