r"""Cosine attention of EDM2: pixel-normalised q, k and v, with the norm's tangents fused into the attention pass."""

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .forward_mode import forward_mode_depth, plain_rule_needed, unpack
from .jvp_attention import NESTED, attention_backward_op, attention_op, fold_vmap, implementation


def cosine_attention(qkv: Tensor, *, scale: float | None = None, eps: float = 1e-4) -> Tensor:
    r"""Attention over pixel-normalised queries, keys and values (EDM2, Karras et al. 2024, Sec. 3 and Fig. 16).

    Every pixel's q, k and v vector (of D channels) is divided by :math:`\epsilon + \lVert x\rVert/\sqrt D`, then
    :math:`O = \mathrm{softmax}(\mathrm{scale}\,QK^\top)V`. Dual numbers in, dual numbers out, as in
    :func:`sclightning.ops.jvp_attention`.

    Args:
        qkv: (B, H, D, 3, N): the output (B, H*D*3, h, w) of a 1x1 convolution, reshaped with N = h*w. So channel
            ``(head * D + d) * 3 + i`` of the convolution is component d of that head's q (i = 0), k (1) or v (2).
        scale: Factor on the scores; ``D ** -0.5`` if None.
        eps: Added to the root mean square of each vector.

    Returns:
        (B, H, D, N), contiguous, in the dtype of ``qkv``: ``.reshape(B, H*D, h, w)`` is a view.

    Raises:
        ValueError: If ``qkv`` is not (B, H, D, 3, N).
        RuntimeError: Under nested forward mode, and in backward if a gradient is asked for through the tangent.
    """
    if qkv.dim() != 5 or qkv.shape[3] != 3:
        raise ValueError(
            f"cosine_attention expected qkv of shape (B, H, D, 3, N), but got {tuple(qkv.shape)}: "
            "reshape the convolution's output (B, H*D*3, h, w) to it."
        )
    scale = qkv.shape[2] ** -0.5 if scale is None else float(scale)
    plain = plain_rule_needed()
    primal, tangent = (qkv, None) if plain else unpack(qkv)
    if tangent is None:
        # Contiguous here, where a compiler fuses the copy into the norm: flash attention takes nothing else.
        q, k, v = (y.contiguous() for y in reference.pixel_norm(qkv, 2, eps).transpose(2, 4).unbind(3))
        attend = reference.attention if plain else F.scaled_dot_product_attention
        return attend(q, k, v, scale=scale).transpose(2, 3).contiguous()
    if forward_mode_depth() > 1:
        raise RuntimeError(NESTED.format(op="cosine_attention"))
    o, to, _ = cosine_op(primal.contiguous(), tangent.contiguous(), scale, eps)
    return fwAD.make_dual(o, to)


@torch.library.custom_op("sclightning::cosine_attention", mutates_args=())
def cosine_op(qkv: Tensor, tqkv: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output and tangent (B, H, D, N) and log-sum-exp (B, H, N) of cosine attention."""
    kernels = implementation(qkv, qkv.shape[2])
    if kernels is not reference and (fused := kernels.cosine_jvp(qkv, tqkv, scale, eps)) is not None:
        return fused
    x, tx = reference.pixel_norm_jvp(qkv, tqkv, 2, eps)
    # Half precision on a GPU rounds the normalised vectors for its matrix units; the CPU's formula stays in float32.
    dtype = qkv.dtype if qkv.is_cuda else x.dtype
    (q, k, v), (tq, tk, tv) = (y.to(dtype).transpose(2, 4).unbind(3) for y in (x, tx))
    o, to, lse = attention_op(q, k, v, tq, tk, tv, scale)
    return *(y.transpose(2, 3).to(qkv.dtype, memory_format=torch.contiguous_format) for y in (o, to)), lse


@cosine_op.register_fake
def _(qkv, tqkv, scale, eps):
    B, H, D, _, N = qkv.shape
    lse = qkv.new_empty((B, H, N), dtype=torch.float64 if qkv.dtype == torch.float64 else torch.float32)
    return qkv.new_empty((B, H, D, N)), qkv.new_empty((B, H, D, N)), lse


@register_flop_formula(torch.ops.sclightning.cosine_attention)
def _(qkv, tqkv, scale, eps, **kwargs):
    return 12 * qkv[:3].numel() * qkv[4] ** 2


def _setup_context(ctx, inputs, output):
    qkv, _, scale, eps = inputs
    o, _, lse = output
    ctx.scale, ctx.eps = scale, eps
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, o, lse)


def _backward(ctx, do, dto, dlse):
    qkv, o, lse = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    x = reference.pixel_norm(qkv, 2, ctx.eps)
    q, k, v = (y.contiguous() for y in x.transpose(2, 4).unbind(3))
    do, dto, o = (y if y is None else y.transpose(2, 3).contiguous() for y in (do, dto, o))
    grads = attention_backward_op(do, dto, q, k, v, o, lse, ctx.scale)
    dx = torch.stack(grads, 3).transpose(2, 4)
    return reference.pixel_norm_vjp(dx, qkv, 2, ctx.eps), None, None, None


cosine_op.register_autograd(_backward, setup_context=_setup_context)


@cosine_op.register_vmap
def _(info, in_dims, *args):
    return fold_vmap(cosine_op, info, in_dims, args)
