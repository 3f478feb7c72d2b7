r"""Attention, its tangent and its gradient as formulas in plain PyTorch, chunked over the queries.

With :math:`S = \mathrm{scale}\,QK^\top`, :math:`P = \mathrm{softmax}(S)` and dots for tangents,

.. math::
    O = PV, \qquad \dot S = \mathrm{scale}\,(\dot QK^\top + Q\dot K^\top), \qquad
    \dot O = (P \odot (\dot S - \mu))V + P\dot V, \qquad \mu = \sum_j P_j \dot S_j .

This is the implementation on the CPU and for whatever the Triton kernels do not take (float64), and the oracle of
their tests. Half precision is computed in float32. Memory is linear in the number of keys: a chunk of queries holds at
most ``CHUNK`` scores.
"""

import torch
from torch import Tensor

CHUNK = 2**22


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Softmax attention in three lines, whose derivatives of every kind are PyTorch's: quadratic in memory."""
    dtype = _compute_dtype(q)
    with torch.autocast(q.device.type, enabled=False):
        p = torch.softmax(q.to(dtype) @ k.to(dtype).transpose(-1, -2) * scale, -1)
        return (p @ v.to(dtype)).to(q.dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def _rows(q: Tensor, k: Tensor) -> int:
    """Queries in a chunk, so that a chunk of scores over the whole batch holds at most ``CHUNK`` numbers."""
    return max(1, CHUNK // max(1, q.shape[0] * q.shape[1] * k.shape[2]))


def attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, its tangent and the log-sum-exp of the scores.

    Args:
        q: Queries, (B, H, N, D).
        k: Keys, (B, H, M, D).
        v: Values, (B, H, M, E).
        tq: Tangent of ``q`` or None for zero; likewise ``tk`` and ``tv``.
        tk: Tangent of ``k``.
        tv: Tangent of ``v``.
        scale: Factor on the scores.

    Returns:
        o (B, H, N, E) and its tangent in the dtype of ``q``, and lse (B, H, N) in float32 (float64 for float64).
    """
    dtype = _compute_dtype(q)
    B, H, N, _ = q.shape
    o, to = output_like(q, v), output_like(q, v)
    lse = torch.full((B, H, N), -torch.inf, dtype=dtype, device=q.device)
    if k.shape[2] == 0 or o.numel() == 0:
        return o.zero_(), to.zero_(), lse
    # The body of a custom operator still sees autocast, which would round the products.
    with torch.autocast(q.device.type, enabled=False):
        k, v = k.to(dtype), v.to(dtype)
        kT = k.transpose(-1, -2)
        tkT = None if tk is None else tk.to(dtype).transpose(-1, -2)
        tv = None if tv is None else tv.to(dtype)
        for rows in torch.arange(N).split(_rows(q, k)):
            i = slice(int(rows[0]), int(rows[-1]) + 1)
            qi = q[:, :, i].to(dtype)
            s = qi @ kT * scale
            lse[:, :, i] = torch.logsumexp(s, -1)
            p = torch.softmax(s, -1)
            o[:, :, i] = p @ v
            h = torch.zeros_like(p) if tq is None else tq[:, :, i].to(dtype) @ kT
            if tkT is not None:
                h = h + qi @ tkT
            h = h * scale
            # The product is formed after centring: before it, rows with one large weight cancel.
            t = (p * (h - (p * h).sum(-1, keepdim=True))) @ v
            to[:, :, i] = t if tv is None else t + p @ tv
    return o, to, lse


def attention_vjp(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention with respect to q, k and v, with the scores recomputed from ``lse``.

    Args:
        do: Gradient of the output, (B, H, N, E).
        q: Queries, (B, H, N, D).
        k: Keys, (B, H, M, D).
        v: Values, (B, H, M, E).
        o: Output, (B, H, N, E).
        lse: Log-sum-exp of the scores, (B, H, N).
        scale: Factor on the scores.

    Returns:
        dq, dk and dv in the shapes and dtypes of q, k and v.
    """
    dtype = _compute_dtype(q)
    dq = torch.zeros_like(q)
    with torch.autocast(q.device.type, enabled=False):
        kd, vd = k.to(dtype), v.to(dtype)
        dk, dv = torch.zeros_like(kd), torch.zeros_like(vd)
        if 0 in (k.shape[2], do.numel()):
            return dq, dk.to(k.dtype), dv.to(v.dtype)
        for rows in torch.arange(q.shape[2]).split(_rows(q, k)):
            i = slice(int(rows[0]), int(rows[-1]) + 1)
            qi, doi = q[:, :, i].to(dtype), do[:, :, i].to(dtype)
            p = torch.exp(qi @ kd.transpose(-1, -2) * scale - lse[:, :, i, None])
            dv += p.transpose(-1, -2) @ doi
            dp = doi @ vd.transpose(-1, -2)
            ds = p * (dp - (doi * o[:, :, i].to(dtype)).sum(-1, keepdim=True)) * scale
            dq[:, :, i] = ds @ kd
            dk += ds.transpose(-1, -2) @ qi
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def output_like(q: Tensor, v: Tensor) -> Tensor:
    """Empty output (B, H, N, E) of attention, in the memory order of ``q`` (so (B, N, H, D) stays a view away)."""
    if v.shape[-1] == q.shape[-1]:
        return torch.empty_like(q)
    return q.new_empty(*q.shape[:3], v.shape[-1])


def pixel_norm(x: Tensor, dim: int, eps: float) -> Tensor:
    r"""EDM2's pixel norm :math:`x / (\epsilon + \lVert x\rVert/\sqrt D)` along ``dim``, computed in float32."""
    dtype = _compute_dtype(x)
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=dtype) * x.shape[dim] ** -0.5
    return (x.to(dtype) / (eps + norm)).to(x.dtype)


def pixel_norm_jvp(x: Tensor, tx: Tensor, dim: int, eps: float) -> tuple[Tensor, Tensor]:
    r"""Pixel norm :math:`y = x/n`, :math:`n = \epsilon+\lVert x\rVert/\sqrt D`; :math:`\dot y = (\dot x-y\dot n)/n`.

    Both come in float32 (float64 for float64), unrounded; where ``x`` vanishes, the tangent of its norm is zero.
    """
    dtype = _compute_dtype(x)
    x, tx = x.to(dtype), tx.to(dtype)
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    n = eps + length * x.shape[dim] ** -0.5
    tn = (x * tx).sum(dim, keepdim=True) / length.clamp_min(1e-30) * x.shape[dim] ** -0.5
    y = x / n
    return y, (tx - y * tn) / n


def pixel_norm_vjp(dy: Tensor, x: Tensor, dim: int, eps: float) -> Tensor:
    """Gradient of the pixel norm with respect to ``x``, in the dtype of ``x``."""
    # The Jacobian (I - x x^T c)/n is symmetric: the gradient is the tangent map applied to dy.
    return pixel_norm_jvp(x, dy, dim, eps)[1].to(x.dtype)
