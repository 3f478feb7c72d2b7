r"""Attention with its Jacobian-vector product from one fused pass: the public function and its custom operators.

``torch.library.custom_op`` drops tangents silently under forward AD, and Dynamo ignores the ``jvp`` of an
``autograd.Function`` (pytorch#192985). So a dual number never reaches an operator here: :func:`jvp_attention` unpacks
primals and tangents, hands both to one opaque operator (q, k, v, tq, tk, tv) -> (o, to, lse), and packs its two results
into a dual number. Reverse mode is registered for the primal; the tangent's gradient is refused.
"""

import importlib.util
import os

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .forward_mode import forward_mode_depth, plain_rule_needed, refuse_tangent_gradient, unpack

HAS_TRITON = importlib.util.find_spec("triton") is not None  # it comes with torch's CUDA wheels
NESTED = (
    "{op} was called under nested forward mode, but its fused rule is of first order only: take the outer derivative "
    "in reverse mode or by finite differences, or use torch.nn.functional.scaled_dot_product_attention."
)


def jvp_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    r"""Attention :math:`O = PV` and its tangent :math:`\dot O = (P\odot(\dot S-\mu))V + P\dot V` in one pass.

    A drop-in for :func:`torch.nn.functional.scaled_dot_product_attention` without mask and dropout, which it calls when
    no argument carries a tangent. With tangents on any of q, k and v (``torch.func.jvp`` or ``forward_ad.dual_level``)
    the result is a dual number. Gradients flow through the primal, also while forward mode is active. The mathematics
    is in docs/jvp_attention.md.

    Args:
        q: Queries, (B, H, N, D), any strides, float16, bfloat16, float32 or float64.
        k: Keys, (B, H, M, D), of the dtype of ``q`` (autocast casts as it does for PyTorch's attention).
        v: Values, (B, H, M, E); E = D for the fastest path.
        scale: Factor on the scores; ``D ** -0.5`` if None.

    Returns:
        (B, H, N, E) in the dtype of ``q``, dual if any argument is.

    Raises:
        ValueError: If the shapes, dtypes or devices do not fit together.
        RuntimeError: Under nested forward mode, and in backward if a gradient is asked for through the tangent.
    """
    _check(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"jvp_attention expected q, k and v of one dtype, but got {q.dtype}, {k.dtype} and {v.dtype}: cast them."
        )
    if plain_rule_needed():
        return reference.attention(q, k, v, scale)
    (pq, tq), (pk, tk), (pv, tv) = unpack(q), unpack(k), unpack(v)
    if tq is None and tk is None and tv is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if forward_mode_depth() > 1:
        raise RuntimeError(NESTED.format(op="jvp_attention"))
    o, to, _ = attention_op(pq, pk, pv, tq, tk, tv, scale)
    return fwAD.make_dual(o, to)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"jvp_attention expected shapes (B, H, N, D), but got {shapes}: add what is missing.")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"jvp_attention expected q (B, H, N, D), k (B, H, M, D) and v (B, H, M, E), but got {shapes}: "
            "expand batch and heads to the same sizes."
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"jvp_attention expected one device, but got {q.device}, {k.device} and {v.device}: move q, k and v."
        )


def implementation(x: Tensor, D: int):
    """Where the operators of these tensors are: Triton for half precision on CUDA (sm_80 or newer), or reference.py.

    Without tf32 a GPU has no matrix unit for float32, and cuBLAS behind the formulas beats a fused kernel. On Hopper
    the CUDA C++ extension comes before Triton where it is faster (docs/cuda.md), unless ``SCLIGHTNING_CUDA=0``.
    """
    half = x.dtype in (torch.float16, torch.bfloat16)
    if not (x.is_cuda and half and D <= 256 and HAS_TRITON):
        return reference
    capability = torch.cuda.get_device_capability(x.device)
    if capability < (8, 0):
        return reference
    # Imported here: slow, and needed on a GPU only.
    if capability == (9, 0) and os.environ.get("SCLIGHTNING_CUDA") != "0":
        from .cuda import launch as kernels
    else:
        from . import triton as kernels
    return kernels


@torch.library.custom_op("sclightning::jvp_attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and tangent (B, H, N, E), and log-sum-exp (B, H, N); a tangent that is None is zero and costs nothing."""
    return implementation(q, max(q.shape[-1], v.shape[-1])).attention_jvp(q, k, v, tq, tk, tv, scale)


@attention_op.register_fake
def _(q, k, v, tq, tk, tv, scale):
    lse = q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    return reference.output_like(q, v), reference.output_like(q, v), lse


@register_flop_formula(torch.ops.sclightning.jvp_attention)
def _(q, k, v, tq, tk, tv, scale, **kwargs):
    """Six products with all tangents, against two of the plain forward; the arguments are shapes."""
    scores = 1 + (tq is not None) + (tk is not None)
    values = 1 + (tq is not None or tk is not None) + (tv is not None)
    return 2 * q.numel() * k[2] * scores + 2 * q[:3].numel() * v[2] * v[3] * values


@torch.library.custom_op("sclightning::jvp_attention_backward", mutates_args=())
def attention_backward_op(
    do: Tensor, dto: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of the primal. ``dto``, the tangent's own gradient, must be None or zero."""
    refuse_tangent_gradient(dto, "attention in sclightning.ops", "scaled_dot_product_attention's MATH backend")
    kernels = implementation(q, max(q.shape[-1], v.shape[-1]))
    return tuple(g.contiguous() for g in kernels.attention_vjp(do, q, k, v, o, lse, scale))


@attention_backward_op.register_fake
def _(do, dto, q, k, v, o, lse, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, _, _, _, scale = inputs
    o, _, lse = output
    ctx.scale = scale
    ctx.set_materialize_grads(False)  # None tells a tangent that nobody differentiated from one whose gradient is zero
    ctx.save_for_backward(q, k, v, o, lse)


def _backward(ctx, do, dto, dlse):
    q, k, v, o, lse = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    return *attention_backward_op(do, dto, q, k, v, o, lse, ctx.scale), None, None, None, None


attention_op.register_autograd(_backward, setup_context=_setup_context)


def fold_vmap(op, info, in_dims, args):
    """The vmap rule of an operator on (B, H, ...) tensors: fold the mapped dimension into B and unfold the results."""

    def fold(x, dim):
        if not isinstance(x, Tensor):
            return x
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    results = op(*map(fold, args, in_dims))
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in results), (0,) * len(results)


@attention_op.register_vmap
def _(info, in_dims, *args):
    return fold_vmap(attention_op, info, in_dims, args)


@attention_backward_op.register_vmap
def _(info, in_dims, *args):
    return fold_vmap(attention_backward_op, info, in_dims, args)
