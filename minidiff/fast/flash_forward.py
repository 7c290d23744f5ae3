"""The Triton kernels of attention, forward; and the parts that those of the backward share. The picture is in flash.py.

    B batch   N heads   L query tokens   S key tokens   D width of one head

Every kernel runs as many programs as there are tiles of rows, each on its own. Names in capitals are known when a kernel is
compiled: the loops over them are unrolled, and an `if` about them costs nothing. Strides are in elements, (B, N, tokens, D).
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
def forward_tile(
    m, total, o_main, o_tail, q_main, q_tail, k, k_strides, v, v_strides, first, S, scale,
    WIDTH: tl.constexpr, MASK: tl.constexpr,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, OUT_TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of 2307.08691, algorithm 1, lines 8 to 10: WIDTH keys from `first` on, for all rows of the program."""
    columns = first + tl.arange(0, WIDTH)
    k_main, k_tail = load_rows(k, k_strides, columns, S, MAIN, TAIL, D, MASK)
    scores = product_over_d(q_main, q_tail, k_main, k_tail, TAIL, PRECISION) * scale
    if MASK:
        scores = tl.where(columns[None, :] < S, scores, -float("inf"))  # a key beyond the last gets weight 2^-inf = 0
    m_new = tl.maximum(m, tl.max(scores, 1))
    p = tl.exp2(scores - m_new[:, None])  # not yet divided by the sum of their row
    shrink = tl.exp2(m - m_new)  # 0 in the first tile, where m is -inf
    total = total * shrink + tl.sum(p, 1)
    v_main, v_tail = load_rows(v, v_strides, columns, S, MAIN, OUT_TAIL, D, MASK)
    o_main = o_main * shrink[:, None]
    if OUT_TAIL > 0:
        o_tail = o_tail * shrink[:, None]
    o_main, o_tail = add_product(o_main, o_tail, p, v_main, v_tail, OUT_TAIL, PRECISION)
    return m_new, total, o_main, o_tail


@triton.jit
def forward_kernel(
    q, k, v, out, lse, q_strides, k_strides, v_strides, out_strides, N, L, S, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, OUT_TAIL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, REST_S: tl.constexpr, MASK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_L rows of the output of one head, past all keys. Writes `out`, and `lse` (B, N, L) for the backward.

    `scale` is log2(e) / √D: exp(x) is 2^(x · log2 e), and 2^x is what the hardware has. `lse` is in base 2 likewise. With MASK
    the last tile is as wide as the others.
    """
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    q_main, q_tail = load_rows(head_start(q, q_strides, head, N, ALIGN), q_strides, rows, L, MAIN, TAIL, D, True)
    k, v = head_start(k, k_strides, head, N, ALIGN), head_start(v, v_strides, head, N, ALIGN)

    m = tl.full([BLOCK_L], -float("inf"), tl.float32)  # the largest score of each row so far
    total = tl.zeros([BLOCK_L], tl.float32)  # the sum of 2^(score - m) so far
    o_main = tl.zeros([BLOCK_L, MAIN], tl.float32)  # the sum of 2^(score - m) · v so far
    o_tail = tl.zeros([BLOCK_L, OUT_TAIL if OUT_TAIL > 0 else 1], tl.float32)
    whole = S if MASK else S - S % BLOCK_S
    for first in range(0, whole, BLOCK_S):
        m, total, o_main, o_tail = forward_tile(
            m, total, o_main, o_tail, q_main, q_tail, k, k_strides, v, v_strides, first, S, scale,
            BLOCK_S, MASK, D, MAIN, TAIL, OUT_TAIL, PRECISION,
        )  # fmt: skip
    if REST_S > 0:  # the last tile is as narrow as it can be, and the only one that needs a mask
        m, total, o_main, o_tail = forward_tile(
            m, total, o_main, o_tail, q_main, q_tail, k, k_strides, v, v_strides, whole, S, scale,
            REST_S, True, D, MAIN, TAIL, OUT_TAIL, PRECISION,
        )  # fmt: skip

    o_main, o_tail = o_main / total[:, None], o_tail / total[:, None]
    store_rows(head_start(out, out_strides, head, N, ALIGN), out_strides, rows, L, o_main, o_tail, MAIN, OUT_TAIL, D)
    tl.store(lse + head.to(tl.int64) * L + rows, m + tl.log2(total), mask=rows < L)


@triton.jit
def short_scores(
    q_main, q_tail, k, k_strides, columns, S, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The scores of some of the keys of a short sequence, -inf beyond the last."""
    k_main, k_tail = load_rows(k, k_strides, columns, S, MAIN, TAIL, D, True)
    scores = product_over_d(q_main, q_tail, k_main, k_tail, TAIL, PRECISION) * scale
    return tl.where(columns[None, :] < S, scores, -float("inf"))


@triton.jit
def short_kernel(
    q, k, v, out, lse, q_strides, k_strides, v_strides, out_strides, N, L, S, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, OUT_TAIL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, REST_S: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The same for a prompt: BLOCK_S + REST_S hold all the keys (77 are 64 + 16), and a row is seen whole.

    The largest score is known before the first exponential, so nothing is ever rescaled.
    """
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    q_main, q_tail = load_rows(head_start(q, q_strides, head, N, ALIGN), q_strides, rows, L, MAIN, TAIL, D, True)
    k, v = head_start(k, k_strides, head, N, ALIGN), head_start(v, v_strides, head, N, ALIGN)

    columns = tl.arange(0, BLOCK_S)
    scores = short_scores(q_main, q_tail, k, k_strides, columns, S, scale, D, MAIN, TAIL, PRECISION)
    m = tl.max(scores, 1)
    if REST_S > 0:
        more = BLOCK_S + tl.arange(0, REST_S)
        more_scores = short_scores(q_main, q_tail, k, k_strides, more, S, scale, D, MAIN, TAIL, PRECISION)
        m = tl.maximum(m, tl.max(more_scores, 1))

    o_main = tl.zeros([BLOCK_L, MAIN], tl.float32)
    o_tail = tl.zeros([BLOCK_L, OUT_TAIL if OUT_TAIL > 0 else 1], tl.float32)
    p = tl.exp2(scores - m[:, None])
    total = tl.sum(p, 1)
    v_main, v_tail = load_rows(v, v_strides, columns, S, MAIN, OUT_TAIL, D, True)
    o_main, o_tail = add_product(o_main, o_tail, p, v_main, v_tail, OUT_TAIL, PRECISION)
    if REST_S > 0:
        p = tl.exp2(more_scores - m[:, None])
        total += tl.sum(p, 1)
        v_main, v_tail = load_rows(v, v_strides, more, S, MAIN, OUT_TAIL, D, True)
        o_main, o_tail = add_product(o_main, o_tail, p, v_main, v_tail, OUT_TAIL, PRECISION)

    o_main, o_tail = o_main / total[:, None], o_tail / total[:, None]
    store_rows(head_start(out, out_strides, head, N, ALIGN), out_strides, rows, L, o_main, o_tail, MAIN, OUT_TAIL, D)
    tl.store(lse + head.to(tl.int64) * L + rows, m + tl.log2(total), mask=rows < L)
