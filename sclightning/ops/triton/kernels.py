# ruff: noqa: E741 - O is the output and l the running sum of the mathematics
"""Triton kernels of attention and its tangent: one pass over the keys, two accumulators (docs/jvp_attention.md).

Letters: s scores in units of log 2, p weights relative to the running maximum m, h = p * ts; running sums l = sum p,
r = sum h, o = sum p v, t = sum (h v + p tv). At the end O = o / l and dO = t / l - (r / l) O.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Strides are passed in units of 8 elements, which keeps loads of 16 bytes without specialising on the strides.
UNIT = tl.constexpr(8)


@triton.jit
def _load_rows(
    X, b, h, row, N, col, stride_b, stride_h, stride_n,
    ROWS: tl.constexpr, COLS: tl.constexpr, RAGGED: tl.constexpr, END: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows [row, row + ROWS) and columns [col, col + COLS) of one head.

    Rows from N on are zero if RAGGED (or loaded by TMA), and columns from END on, where END > 0 says there are any.
    """
    if TMA:
        x = X.load([b, h, row, col]).reshape(ROWS, COLS)
    else:
        offset = tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h + tl.cast(row, tl.int64) * stride_n
        base = X + offset * UNIT
        n = tl.arange(0, ROWS)
        d = col + tl.arange(0, COLS)
        pointers = base + n[:, None] * (stride_n * UNIT) + d[None, :]
        if RAGGED and END > 0:
            x = tl.load(pointers, mask=((row + n)[:, None] < N) & (d[None, :] < END), other=0.0)
        elif RAGGED:
            x = tl.load(pointers, mask=(row + n)[:, None] < N, other=0.0)
        elif END > 0:
            x = tl.load(pointers, mask=d[None, :] < END, other=0.0)
        else:
            x = tl.load(pointers)
    return x


@triton.jit
def _store_rows(X, x, b, h, row, N, col, stride_b, stride_h, stride_n, END: tl.constexpr):
    offset = tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h + tl.cast(row, tl.int64) * stride_n
    base = X + offset * UNIT
    n = tl.arange(0, x.shape[0])
    d = col + tl.arange(0, x.shape[1])
    mask = (row + n)[:, None] < N
    if END > 0:
        mask = mask & (d[None, :] < END)
    tl.store(base + n[:, None] * (stride_n * UNIT) + d[None, :], x.to(X.dtype.element_ty), mask=mask)


_SIZES = ["H", "NQ", "NK"] + [f"{x}_{i}" for x in ("q", "k", "v", "tq", "tk", "tv", "o") for i in "bhn"]


@triton.jit(do_not_specialize=_SIZES)  # no recompilation when batch, heads, lengths or strides change
def attention_jvp_kernel(
    Q, TQ, K, V, TK, TV, K1, V1, TK1, TV1, O, TO, LSE, scale,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, tq_b, tq_h, tq_n, tk_b, tk_h, tk_n, tv_b, tv_h, tv_n, o_b, o_h, o_n,
    H, NQ, NK,
    D0: tl.constexpr, D1: tl.constexpr, D_END0: tl.constexpr, D_END1: tl.constexpr,
    E0: tl.constexpr, E1: tl.constexpr, E_END0: tl.constexpr, E_END1: tl.constexpr,
    SPLIT: tl.constexpr, HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, HAS_TV: tl.constexpr, SHIFT: tl.constexpr,
    RAGGED: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One block of BM queries of one head, over all keys; with SPLIT > 1, only columns [e, e + E0) of the values.

    D0 + D1 are powers of two that cover the head dimension (72 by 64 + 16), D_END0 and D_END1 where it ends in them, or
    0; likewise E for the values. With TMA keys and values are loaded through 4D tensor descriptors, X for the first D0
    columns and X1 for the rest (otherwise both are the same pointer), and their strides are unused.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(NQ, BM)
    part = pid % SPLIT
    row = (pid // SPLIT % blocks) * BM
    bh = pid // (SPLIT * blocks)
    b = bh // H
    h = bh % H
    e = part * E0

    q0 = _load_rows(Q, b, h, row, NQ, 0, q_b, q_h, q_n, BM, D0, True, D_END0, False)
    if HAS_TQ:
        tq0 = _load_rows(TQ, b, h, row, NQ, 0, tq_b, tq_h, tq_n, BM, D0, True, D_END0, False)
    if D1 > 0:
        q1 = _load_rows(Q, b, h, row, NQ, D0, q_b, q_h, q_n, BM, D1, True, D_END1, False)
        if HAS_TQ:
            tq1 = _load_rows(TQ, b, h, row, NQ, D0, tq_b, tq_h, tq_n, BM, D1, True, D_END1, False)

    m = tl.full([BM], -float("inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    r = tl.zeros([BM], tl.float32)
    o0 = tl.zeros([BM, E0], tl.float32)
    t0 = tl.zeros([BM, E0], tl.float32)
    if E1 > 0:
        o1 = tl.zeros([BM, E1], tl.float32)
        t1 = tl.zeros([BM, E1], tl.float32)
    c = scale * LOG2E
    # To bf16 by cutting off bits, which costs one instruction where rounding and reading back cost two (7 % at D = 64);
    # the mean loss, 2^-8 / (2 ln 2) for mantissas of equal probability per octave, is made good beforehand.
    h_scale = scale * (1.0 + 0.00281782 if O.dtype.element_ty == tl.bfloat16 else 1.0)

    for n in tl.range(0, NK, BN):
        k = _load_rows(K, b, h, n, NK, 0, k_b, k_h, k_n, BN, D0, RAGGED, D_END0, TMA).T
        s = tl.dot(q0, k)
        ts = tl.zeros([BM, BN], tl.float32)
        if HAS_TQ:
            ts = tl.dot(tq0, k, ts)
        if HAS_TK:
            tk = _load_rows(TK, b, h, n, NK, 0, tk_b, tk_h, tk_n, BN, D0, RAGGED, D_END0, TMA).T
            ts = tl.dot(q0, tk, ts)
        if D1 > 0:
            k1 = _load_rows(K1, b, h, n, NK, D0, k_b, k_h, k_n, BN, D1, RAGGED, D_END1, TMA).T
            s = tl.dot(q1, k1, s)
            if HAS_TQ:
                ts = tl.dot(tq1, k1, ts)
            if HAS_TK:
                tk1 = _load_rows(TK1, b, h, n, NK, D0, tk_b, tk_h, tk_n, BN, D1, RAGGED, D_END1, TMA).T
                ts = tl.dot(q1, tk1, ts)
        if RAGGED:
            s = tl.where((n + tl.arange(0, BN))[None, :] < NK, s, -float("inf"))

        m_new = tl.maximum(m, tl.max(s, 1) * c - SHIFT)
        p = tl.math.exp2(s * c - m_new[:, None])
        alpha = tl.math.exp2(m - m_new)
        m = m_new
        l = l * alpha + tl.sum(p, 1)
        p_low = p.to(O.dtype.element_ty)
        v = _load_rows(V, b, h, n, NK, e, v_b, v_h, v_n, BN, E0, RAGGED, E_END0, TMA)
        o0 = tl.dot(p_low, v, o0 * alpha[:, None])
        t0 = t0 * alpha[:, None]
        if E1 > 0:
            v1 = _load_rows(V1, b, h, n, NK, E0, v_b, v_h, v_n, BN, E1, RAGGED, E_END1, TMA)
            o1 = tl.dot(p_low, v1, o1 * alpha[:, None])
            t1 = t1 * alpha[:, None]
        if HAS_TV:
            tv = _load_rows(TV, b, h, n, NK, e, tv_b, tv_h, tv_n, BN, E0, RAGGED, E_END0, TMA)
            t0 = tl.dot(p_low, tv, t0)
            if E1 > 0:
                tv1 = _load_rows(TV1, b, h, n, NK, E0, tv_b, tv_h, tv_n, BN, E1, RAGGED, E_END1, TMA)
                t1 = tl.dot(p_low, tv1, t1)
        if HAS_TQ or HAS_TK:
            # The sum r adds what the product multiplies, rounded: a row with one large weight then cancels exactly.
            hh = p * (ts * h_scale)
            if O.dtype.element_ty == tl.bfloat16:
                hh = (hh.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
                h_low = hh.to(tl.bfloat16)
            else:
                h_low = hh.to(O.dtype.element_ty)
                hh = h_low.to(tl.float32)
            r = r * alpha + tl.sum(hh, 1)
            t0 = tl.dot(h_low, v, t0)
            if E1 > 0:
                t1 = tl.dot(h_low, v1, t1)

    inverse = 1.0 / l
    mu = r * inverse
    y = o0 * inverse[:, None]
    _store_rows(O, y, b, h, row, NQ, e, o_b, o_h, o_n, E_END0)
    _store_rows(TO, t0 * inverse[:, None] - mu[:, None] * y, b, h, row, NQ, e, o_b, o_h, o_n, E_END0)
    if E1 > 0:
        y = o1 * inverse[:, None]
        _store_rows(O, y, b, h, row, NQ, E0, o_b, o_h, o_n, E_END1)
        _store_rows(TO, t1 * inverse[:, None] - mu[:, None] * y, b, h, row, NQ, E0, o_b, o_h, o_n, E_END1)
    if part == 0:
        rows = row + tl.arange(0, BM)
        tl.store(LSE + tl.cast(bh, tl.int64) * NQ + rows, (m + tl.math.log2(l)) * LN2, mask=rows < NQ)


@triton.jit
def attend_once(s, ts, v, tv, NK, SHIFT: tl.constexpr, BN: tl.constexpr):
    """Output, tangent and log-sum-exp where all keys are one tile, from s in units of log 2, ts, and v, tv (BN, D).

    The mean of ts is known before anything is rounded, so h is centred: p (ts - mu).
    """
    s = tl.where(tl.arange(0, BN)[None, :] < NK, s, -float("inf"))
    m = tl.max(s, 1) - SHIFT
    p = tl.math.exp2(s - m[:, None])
    p_low = p.to(v.dtype)
    o = tl.dot(p_low, v)
    t = tl.dot(p_low, tv)
    l = tl.sum(p, 1)
    inverse = 1.0 / l
    mu = tl.sum(p * ts, 1) * inverse
    h_low = (p * (ts - mu[:, None])).to(v.dtype)
    r = tl.sum(h_low.to(tl.float32), 1)
    t = tl.dot(h_low, v, t)
    y = o * inverse[:, None]
    z = t * inverse[:, None] - (r * inverse)[:, None] * y
    return y, z, (m + tl.math.log2(l)) * LN2


@triton.jit(do_not_specialize=["o_b", "o_h", "o_n", "H", "NQ", "NK", "BH"])
def attention_jvp_small_kernel(
    Q, K, V, TQ, TK, TV, O, TO, LSE, scale, o_b, o_h, o_n, H, NQ, NK, BH,
    D: tl.constexpr, SHIFT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Whole heads of at most BM queries and BN keys, inputs by 4D tensor descriptors.

    A program runs over many heads, the next one's loads in flight.
    """
    for bh in tl.range(tl.program_id(0), BH, tl.num_programs(0), num_stages=STAGES):
        b = bh // H
        h = bh % H
        q = Q.load([b, h, 0, 0]).reshape(BM, D)
        k = K.load([b, h, 0, 0]).reshape(BN, D)
        tq = TQ.load([b, h, 0, 0]).reshape(BM, D)
        tk = TK.load([b, h, 0, 0]).reshape(BN, D)
        v = V.load([b, h, 0, 0]).reshape(BN, D)
        tv = TV.load([b, h, 0, 0]).reshape(BN, D)
        s = tl.dot(q, k.T)
        ts = tl.dot(tq, k.T)
        ts = tl.dot(q, tk.T, ts)
        y, z, lse = attend_once(s * (scale * LOG2E), ts * scale, v, tv, NK, SHIFT, BN)
        _store_rows(O, y, b, h, 0, NQ, 0, o_b, o_h, o_n, 0)
        _store_rows(TO, z, b, h, 0, NQ, 0, o_b, o_h, o_n, 0)
        rows = tl.arange(0, BM)
        tl.store(LSE + tl.cast(bh, tl.int64) * NQ + rows, lse, mask=rows < NQ)
