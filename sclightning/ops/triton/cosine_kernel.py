# ruff: noqa: E741 - O is the output and l the running sum of the mathematics
"""Triton kernels of EDM2's cosine attention and its tangent, which read the layout of the 1x1 convolution.

A program runs over whole heads. Up to 64 positions are one tile, normalised in registers. Longer heads are normalised
once, keys and values going to a scratch of the program's own that stays in the L2 cache, from where they are streamed
for every block of queries. Letters as in kernels.py.
"""

import triton
import triton.language as tl

from .kernels import LN2, LOG2E, attend_once


@triton.jit
def _load(X, TX, base, column, N, D: tl.constexpr, COLUMNS: tl.constexpr):
    """Positions from ``column`` on of a head's q, k or v and of its tangent, (D, COLUMNS), float32; zeros from N on."""
    n = column + tl.arange(0, COLUMNS)
    offsets = tl.arange(0, D)[:, None] * (3 * N) + n[None, :]
    mask = n[None, :] < N
    x = tl.load(X + base + offsets, mask=mask, other=0.0)
    tx = tl.load(TX + base + offsets, mask=mask, other=0.0)
    return x.to(tl.float32), tx.to(tl.float32)


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _add6(a0, a1, a2, a3, a4, a5, b0, b1, b2, b3, b4, b5):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5


@triton.jit
def _normalise(x, tx, xx, xt, root, eps, dtype: tl.constexpr):
    """Pixel norm of (D, N) and its tangent (reference.pixel_norm_jvp), from sums xx of x^2 and xt of x tx over D."""
    length = tl.sqrt(xx)
    inverse = 1.0 / (eps + root * length)
    tn = root * xt / tl.maximum(length, 1e-30)
    y = x * inverse[None, :]
    ty = (tx - y * tn[None, :]) * inverse[None, :]
    return y.to(dtype), ty.to(dtype)


@triton.jit
def _store(O, TO, LSE, y, z, lse, bh, row, N, D: tl.constexpr, BM: tl.constexpr):
    n = row + tl.arange(0, BM)
    offsets = bh * D * N + tl.arange(0, D)[:, None] * N + n[None, :]
    mask = n[None, :] < N
    tl.store(O + offsets, y.to(O.dtype.element_ty).T, mask=mask)
    tl.store(TO + offsets, z.to(O.dtype.element_ty).T, mask=mask)
    tl.store(LSE + bh * N + n, lse, mask=n < N)


@triton.jit(do_not_specialize=["BH", "NU"])
def cosine_jvp_small_kernel(
    X, TX, O, TO, LSE, scale, root, eps, BH, NU, D: tl.constexpr, SHIFT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Heads of N = 8 NU <= BN positions; X and TX (B*H, D, 3, N), O and TO (B*H, D, N), LSE (B*H, N), contiguous."""
    N = NU * 8  # tells the compiler that columns come in vectors of 16 bytes
    low: tl.constexpr = O.dtype.element_ty
    for head in tl.range(tl.program_id(0), BH, tl.num_programs(0), num_stages=1):
        bh = tl.cast(head, tl.int64)
        base = bh * (3 * D) * N
        q, tq = _load(X, TX, base, 0, N, D, BN)
        k, tk = _load(X, TX, base + N, 0, N, D, BN)
        v, tv = _load(X, TX, base + 2 * N, 0, N, D, BN)
        # One reduction of six sums: it crosses the warps, at the cost of a barrier each time.
        qq, qt, kk, kt, vv, vt = tl.reduce((q * q, q * tq, k * k, k * tk, v * v, v * tv), 0, _add6)
        q, tq = _normalise(q, tq, qq, qt, root, eps, low)
        k, tk = _normalise(k, tk, kk, kt, root, eps, low)
        v, tv = _normalise(v, tv, vv, vt, root, eps, low)
        q = q.T
        s = tl.dot(q, k)
        ts = tl.dot(tq.T, k)
        ts = tl.dot(q, tk, ts)
        y, z, lse = attend_once(s * (scale * LOG2E), ts * scale, v.T, tv.T, N, SHIFT, BN)
        _store(O, TO, LSE, y, z, lse, bh, 0, N, D, BN)


@triton.jit(do_not_specialize=["BH", "NU"])
def cosine_jvp_kernel(
    X, TX, O, TO, LSE, SCRATCH, scale, root, eps, BH, NU,
    D: tl.constexpr, SHIFT: tl.constexpr, RAGGED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Heads of any N = 8 NU positions; SCRATCH (programs, 4, D, M), M being N rounded up to a multiple of BN."""
    N = NU * 8
    M = (N + BN - 1) // BN * BN
    low: tl.constexpr = O.dtype.element_ty
    K = SCRATCH + tl.cast(tl.program_id(0), tl.int64) * (4 * D) * M
    TK = K + D * M
    V = TK + D * M
    TV = V + D * M
    tile = tl.arange(0, D)[:, None] * M + tl.arange(0, BN)[None, :]
    c = scale * LOG2E
    for head in tl.range(tl.program_id(0), BH, tl.num_programs(0), num_stages=1):
        bh = tl.cast(head, tl.int64)
        base = bh * (3 * D) * N
        for n in tl.range(0, N, BN, num_stages=2):
            k, tk = _load(X, TX, base + N, n, N, D, BN)
            v, tv = _load(X, TX, base + 2 * N, n, N, D, BN)
            kk, kt, vv, vt = tl.reduce((k * k, k * tk, v * v, v * tv), 0, _add4)
            k, tk = _normalise(k, tk, kk, kt, root, eps, low)
            v, tv = _normalise(v, tv, vv, vt, root, eps, low)
            tl.store(K + tile + n, k)
            tl.store(TK + tile + n, tk)
            tl.store(V + tile + n, v)
            tl.store(TV + tile + n, tv)
        tl.debug_barrier()  # the scratch is written by some threads and read by others
        for row in tl.range(0, N, BM, num_stages=1):
            q, tq = _load(X, TX, base, row, N, D, BM)
            qq, qt = tl.reduce((q * q, q * tq), 0, _add2)
            q, tq = _normalise(q, tq, qq, qt, root, eps, low)
            q = q.T
            tq = tq.T
            m = tl.full([BM], -float("inf"), tl.float32)
            l = tl.zeros([BM], tl.float32)
            r = tl.zeros([BM], tl.float32)
            o = tl.zeros([BM, D], tl.float32)
            t = tl.zeros([BM, D], tl.float32)
            for n in tl.range(0, N, BN, num_stages=STAGES):
                k = tl.load(K + tile + n)
                s = tl.dot(q, k)
                ts = tl.dot(tq, k)
                ts = tl.dot(q, tl.load(TK + tile + n), ts)
                if RAGGED:
                    s = tl.where((n + tl.arange(0, BN))[None, :] < N, s, -float("inf"))
                m_new = tl.maximum(m, tl.max(s, 1) * c - SHIFT)
                p = tl.math.exp2(s * c - m_new[:, None])
                alpha = tl.math.exp2(m - m_new)
                m = m_new
                l = l * alpha + tl.sum(p, 1)
                p_low = p.to(low)
                v = tl.load(V + tile + n).T
                o = tl.dot(p_low, v, o * alpha[:, None])
                t = tl.dot(p_low, tl.load(TV + tile + n).T, t * alpha[:, None])
                h_low = (p * (ts * scale)).to(low)
                r = r * alpha + tl.sum(h_low.to(tl.float32), 1)
                t = tl.dot(h_low, v, t)
            inverse = 1.0 / l
            y = o * inverse[:, None]
            z = t * inverse[:, None] - (r * inverse)[:, None] * y
            _store(O, TO, LSE, y, z, (m + tl.math.log2(l)) * LN2, bh, row, N, D, BM)
        tl.debug_barrier()  # before the next head overwrites the scratch
