r"""Linear and convolution layers whose forward-mode rule costs two products instead of three.

:math:`\dot y = \dot x W^\top + x\dot W^\top + \dot b`: under ``torch.func.jvp`` PyTorch computes the second product
also when :math:`\dot W` is zero, by multiplying with a tensor of zeros (pytorch#69687). The rules here leave it out, so
a Jacobian-vector product costs twice the forward. Values are bit-identical in float64; gradients flow through the
primal only.
"""

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch.nn import functional as F

from .forward_mode import (
    below_forward_mode,
    forward_mode_depth,
    in_vmap,
    plain_rule_needed,
    refuse_tangent_gradient,
    unpack,
)


class _Refuse(torch.autograd.Function):
    """Identity on a tangent; its gradient, which would have reached ``anchors`` too, is an error."""

    @staticmethod
    def forward(ctx, tangent, *anchors):
        ctx.inputs = 1 + len(anchors)
        ctx.set_materialize_grads(False)  # None arrives where a tangent merely shares a node with a primal
        return tangent.view_as(tangent)

    @staticmethod
    def backward(ctx, grad):
        refuse_tangent_gradient(grad, "linear or conv2d in sclightning.ops", "their namesakes in torch.nn.functional")
        return (None,) * ctx.inputs


def _bilinear_rule(op, x, weight, bias, expand_bias):
    """``op(x, weight, bias)`` of dual numbers; ``op`` is linear in x, in weight and in bias."""
    if plain_rule_needed() or forward_mode_depth() > 1:
        return op(x, weight, bias)  # PyTorch's own rule, right at every level
    (px, tx), (pw, tw), (pb, tb) = unpack(x), unpack(weight), unpack(bias)
    if tx is None and tw is None and tb is None:
        return op(x, weight, bias)
    y = op(px, pw, pb)
    # Detached, the tangent saves no activations, which would triple the memory of a whole-network jvp with gradients.
    # A compiler drops what nobody differentiates by itself; there, and under vmap, the tangent keeps its honest graph.
    detach = torch.is_grad_enabled() and not torch.compiler.is_compiling() and not in_vmap()
    anchors = [a for a in (y, tx, tw, tb) if a is not None]
    if detach:
        px, tx, pw, tw, tb = (None if a is None else a.detach() for a in (px, tx, pw, tw, tb))
    ty = None
    if tx is not None:
        ty = op(tx, pw, None)
    if tw is not None:
        from_weight = op(px, tw, None)
        ty = from_weight if ty is None else ty + from_weight
    if tb is not None:
        from_bias = expand_bias(tb).to(y.dtype)
        ty = from_bias.expand_as(y) if ty is None else ty + from_bias
    if detach:
        ty = below_forward_mode(_Refuse.apply, ty, *anchors)
    return fwAD.make_dual(y, ty)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Linear map :math:`y = xW^\top + b` and, in forward mode, :math:`\dot y = \dot xW^\top + x\dot W^\top + \dot b`.

    A drop-in for :func:`torch.nn.functional.linear`. A weight or bias that carries a tangent is honoured. Under nested
    ``torch.func.jvp`` it is PyTorch's own rule.

    Args:
        x: Input, (..., C_in), plain or dual.
        weight: (C_out, C_in).
        bias: (C_out,) or None.

    Returns:
        (..., C_out), dual if any argument is.

    Raises:
        RuntimeError: In the backward pass, if a gradient is asked for through the tangent (eager mode).
    """
    return _bilinear_rule(F.linear, x, weight, bias, lambda tb: tb)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride=1, padding=0, dilation=1, groups: int = 1
) -> Tensor:
    r"""Convolution :math:`y = W * x + b` and, in forward mode, :math:`\dot y = W * \dot x + \dot W * x + \dot b`.

    A drop-in for :func:`torch.nn.functional.conv2d`, with the rules of :func:`linear`.

    Args:
        x: Input, (B, C_in, H, W) or (C_in, H, W), plain or dual.
        weight: (C_out, C_in / groups, kH, kW).
        bias: (C_out,) or None.
        stride: As in PyTorch; likewise ``padding``, ``dilation`` and ``groups``.
        padding: Zeros added on each side in pixels, or "same" or "valid".
        dilation: Spacing of the kernel in pixels.
        groups: Number of groups of channels.

    Returns:
        (B, C_out, H', W'), dual if any argument is.

    Raises:
        RuntimeError: In the backward pass, if a gradient is asked for through the tangent (eager mode).
    """
    pointwise = weight.shape[2:] == (1, 1) and groups == 1 and stride in (1, (1, 1)) and padding in (0, (0, 0), "valid")

    def op(x, weight, bias):
        if pointwise and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            # A product of matrices. As a convolution it would copy a gradient of another layout before each use.
            return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    return _bilinear_rule(op, x, weight, bias, lambda tb: tb[:, None, None])


class Linear(nn.Linear):
    """:class:`torch.nn.Linear` (same arguments, same state dict) whose JVP costs two products: see :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` (same arguments, same state dict) whose JVP costs two products: see :func:`conv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)
