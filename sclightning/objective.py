r"""The objective of continuous-time consistency models (Sec. 4, Alg. 1): read :func:`consistency_loss` first.

Two networks never appear here, only two roles of one: :math:`F_\theta` with its gradient and :math:`F_{\theta^-}`, the
same output detached. An exponential moving average in the second role is a different and worse algorithm.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from sclightning.trigflow import expand_time

Normalization = Literal["l2", "rms", "clip", "none"]


class ConsistencyLoss(NamedTuple):
    """What one evaluation of the objective yields, each of shape (B,)."""

    loss: Tensor
    """Eq. 8 per sample. Its value is no measure of quality, since the residual is always minus the normalised tangent.

    NaN, without a gradient, where it is not finite: see :func:`finite_or_nan`."""
    tangent_norm: Tensor
    """Root mean square of the tangent before normalisation, detached; the quantity to watch."""


def consistency_loss(
    network: Callable[[Tensor, Tensor], Tensor],
    w_phi: Tensor,
    x_t: Tensor,
    dx_t: Tensor,
    t: Tensor,
    sigma_data: float,
    *,
    r: float | Tensor = 1.0,
    c: float = 0.1,
    normalization: Normalization = "l2",
    shared_primal: bool = True,
    start: Tensor | None = None,
) -> ConsistencyLoss:
    r"""Objective of sCT and sCD (Eq. 8, Alg. 1), per sample.

    Args:
        network: ``F(x, t)`` with labels and guidance bound, x and F of unit variance, shape (B, ...).
        w_phi: Adaptive weight :math:`w_\phi(t)`, shape (B,).
        x_t: Noisy sample, shape (B, ...).
        dx_t: Velocity of the PF-ODE at ``x_t``, shape (B, ...): :math:`\cos t\,z - \sin t\,x_0` for consistency
            training, :math:`\sigma_d F_{pretrain}(x_t/\sigma_d, t)` for distillation.
        t: Times in radians, shape (B,).
        sigma_data: Standard deviation of the data.
        r: Tangent warm-up, 0 (plain flow matching) to 1 (Eq. 6).
        c: Constant of the tangent normalisation.
        normalization: ``l2`` or ``rms`` norm in :func:`normalize`, ``clip`` for :func:`clip`, or ``none``.
        shared_primal: See :func:`forward_jvp`.
        start: Times (B,) at which the consistency function's trajectories end, see :mod:`sclightning.segments`; 0, the
            data, if not given.
    """
    u = t if start is None else t - start
    F, J = forward_jvp(network, x_t, dx_t, t, sigma_data, shared_primal=shared_primal, u=u)
    g = tangent(F.detach(), J, x_t, dx_t, u, sigma_data, r)
    return tangent_loss(F, g, u, w_phi, c, normalization)


def direction(dx_t: Tensor, t: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    r"""Tangents :math:`(\cos t\sin t\,\dot x_t,\ \cos t\sin t\,\sigma_d)` of a network's inputs (Sec. 5.1).

    Args:
        dx_t: Velocity of the PF-ODE, shape (B, ...).
        t: Times in radians, shape (B,).
        sigma_data: Standard deviation of the data.

    Returns:
        The tangents of :math:`x_t/\sigma_d`, shape (B, ...), and of t, shape (B,).
    """
    cos_sin = t.cos() * t.sin()
    return expand_time(cos_sin, dx_t) * dx_t, cos_sin * sigma_data


def forward_jvp(
    network: Callable[[Tensor, Tensor], Tensor],
    x_t: Tensor,
    dx_t: Tensor,
    t: Tensor,
    sigma_data: float,
    *,
    shared_primal: bool = True,
    u: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Network output and its rearranged directional derivative along the PF-ODE (Sec. 5.1).

    With the tangents of :func:`direction` on the inputs :math:`(x_t/\sigma_d, t)` the JVP is
    :math:`J = \cos t \sin t\,\sigma_d\,dF/dt`. The factor :math:`\sigma_d` is in it: do not multiply again.

    Args:
        network: ``F(x, t)`` with labels and guidance bound.
        x_t: Noisy sample, shape (B, ...).
        dx_t: Velocity of the PF-ODE at ``x_t``, shape (B, ...).
        t: Times in radians, shape (B,).
        sigma_data: Standard deviation of the data.
        shared_primal: Take F (with its gradient) and J from one evaluation, so that a dropout mask is shared by
            construction. Otherwise F comes from a second pass that replays the random state of the first: it works
            where reverse mode through a forward-mode pass does not (activation checkpointing, FSDP2 before torch 2.13).
            That is two graphs with the random state between them: ``torch.compile(fullgraph=True)`` needs one pass.
        u: Times (B,) in the factor :math:`\cos u\sin u`, of which the network is not told; ``t`` if not given.

    Returns:
        ``F`` with its gradient and ``J`` without, both float32 or wider, shape (B, ...).
    """
    primals = (x_t / sigma_data, t)
    tangents = direction(dx_t, t if u is None else u, sigma_data)
    if shared_primal:
        F, J = torch.func.jvp(network, primals, tangents)
    else:
        devices = [x_t.device] if x_t.is_cuda else []
        with torch.random.fork_rng(devices), torch.no_grad():
            _, J = torch.compiler.disable(_derivative)(network, primals, tangents)
        F = network(*primals)
    dtype = torch.promote_types(x_t.dtype, torch.float32)
    return F.to(dtype), J.detach().to(dtype)


def partial_jvps(
    network: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, dx_t: Tensor, t: Tensor, sigma_data: float
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Network output and the two parts of its derivative, along x and along t, by two passes without gradient.

    .. math:: J = J_x + J_t, \qquad J_x = \cos t \sin t\,\nabla_x F \cdot \dot x_t, \qquad
       J_t = \cos t \sin t\,\sigma_d\,\partial_t F

    where :math:`\nabla_x` is that of the network's input :math:`x_t/\sigma_d`. Arguments are those of
    :func:`forward_jvp`; a dropout mask is shared by both passes.

    Returns:
        ``F``, ``J_x`` and ``J_t``, float32 or wider, shape (B, ...).
    """
    primals = (x_t / sigma_data, t)
    d_x, d_t = direction(dx_t, t, sigma_data)
    along_x, along_t = (d_x, torch.zeros_like(t)), (torch.zeros_like(x_t), d_t)
    devices = [x_t.device] if x_t.is_cuda else []
    with torch.no_grad():
        with torch.random.fork_rng(devices):
            F, J_x = _derivative(network, primals, along_x)
        _, J_t = _derivative(network, primals, along_t)
    dtype = torch.promote_types(x_t.dtype, torch.float32)
    return F.to(dtype), J_x.to(dtype), J_t.to(dtype)


def _derivative(
    network: Callable, primals: tuple[Tensor, Tensor], tangents: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Output and Jacobian-vector product; torch.func.jvp would fail under FSDP2 before torch 2.13 (pytorch#182641)."""
    with fwAD.dual_level():
        F, J = fwAD.unpack_dual(network(*map(fwAD.make_dual, primals, tangents)))
    return F, torch.zeros_like(F) if J is None else J


def tangent(
    F: Tensor, J: Tensor, x_t: Tensor, dx_t: Tensor, t: Tensor, sigma_data: float, r: float | Tensor = 1.0
) -> Tensor:
    r"""Tangent :math:`g = \cos t\,df/dt` with its second half faded in by ``r`` (Eq. 6, Alg. 1).

    .. math:: g = -\cos^2 t\,(\sigma_d F - \dot x_t) - r\,(\cos t \sin t\,x_t + J),
       \qquad J = \cos t \sin t\,\sigma_d\,\tfrac{dF}{dt}

    The prior weight :math:`1/(\sigma_d \tan t)` of the objective is the reason for the factor :math:`\cos t`: it must
    not be applied again.

    Args:
        F: Network output at ``(x_t / sigma_data, t)``, detached, shape (B, ...).
        J: Rearranged derivative from :func:`forward_jvp`, shape (B, ...).
        x_t: Noisy sample, shape (B, ...).
        dx_t: Velocity of the PF-ODE at ``x_t``, shape (B, ...).
        t: Times in radians, shape (B,).
        sigma_data: Standard deviation of the data.
        r: Tangent warm-up in [0, 1].
    """
    first, second = tangent_terms(F, J, x_t, dx_t, t, sigma_data)
    return first + r * second


def tangent_terms(
    F: Tensor, J: Tensor, x_t: Tensor, dx_t: Tensor, t: Tensor, sigma_data: float
) -> tuple[Tensor, Tensor]:
    r"""Halves of the tangent :math:`g = g_1 + r\,g_2` (Eq. 6): the velocity's error, and the part that can be unstable.

    .. math:: g_1 = -\cos^2 t\,(\sigma_d F - \dot x_t), \qquad g_2 = -(\cos t \sin t\,x_t + J)

    Arguments are those of :func:`tangent`.
    """
    t = expand_time(t, x_t)
    cos, sin = t.cos(), t.sin()
    return -(cos**2) * (sigma_data * F - dx_t), -(cos * sin * x_t + J)


def partial_terms(
    F: Tensor, J_x: Tensor, J_t: Tensor, x_t: Tensor, dx_t: Tensor, t: Tensor, sigma_data: float
) -> tuple[Tensor, Tensor]:
    r"""The tangent as a total derivative, :math:`g = g_x + g_t` at ``r = 1``: cosine times what Fig. 4 plots.

    .. math:: g_x = \cos t\,\nabla_x f \cdot \dot x_t = \cos^2 t\,\dot x_t - J_x, \qquad
       g_t = \cos t\,\partial_t f = -\cos^2 t\,\sigma_d F - \cos t \sin t\,x_t - J_t

    A time embedding that makes training unstable shows in :math:`g_t` (Sec. 4.1).

    Args:
        F: Network output at ``(x_t / sigma_data, t)``, shape (B, ...).
        J_x: Derivative along x from :func:`partial_jvps`, shape (B, ...).
        J_t: Derivative along t.
        x_t: Noisy sample, shape (B, ...).
        dx_t: Velocity of the PF-ODE at ``x_t``, shape (B, ...).
        t: Times in radians, shape (B,).
        sigma_data: Standard deviation of the data.
    """
    t = expand_time(t, x_t)
    cos, sin = t.cos(), t.sin()
    return cos**2 * dx_t - J_x, -(cos**2) * sigma_data * F - cos * sin * x_t - J_t


def tangent_loss(
    F: Tensor, g: Tensor, t: Tensor, w_phi: Tensor, c: float = 0.1, normalization: Normalization = "l2"
) -> ConsistencyLoss:
    r"""The last lines of Alg. 1 and 2: normalise the tangent, make it the target, weigh.

    Args:
        F: Network output at ``(x_t / sigma_data, t)`` with its gradient, shape (B, ...).
        g: Tangent, shape (B, ...).
        t: Times in radians, shape (B,).
        w_phi: Adaptive weight, shape (B,).
        c: Constant of the tangent normalisation.
        normalization: ``l2`` or ``rms`` norm in :func:`normalize`, ``clip`` for :func:`clip`, or ``none``.

    Raises:
        ValueError: If there is no such normalisation.
    """
    g = g.detach()
    tangent_norm = g.square().flatten(1).mean(1).sqrt()
    if normalization == "clip":
        g = clip(g, t)
    elif normalization in ("l2", "rms"):
        g = normalize(g, c, normalization)
    elif normalization != "none":
        known = ", ".join(get_args(Normalization))
        raise ValueError(f"There is no normalization '{normalization}'; choose one of {known}.")
    return ConsistencyLoss(weighted_loss(F - F.detach() - g, w_phi), tangent_norm)


def normalize(g: Tensor, c: float = 0.1, norm: Literal["l2", "rms"] = "l2") -> Tensor:
    r"""Tangent normalisation :math:`g / (\lVert g\rVert + c)` per sample (Sec. 4.1).

    The paper does not say which norm. With ``l2`` every sample has norm close to 1 and ``c`` hardly matters, with
    ``rms`` (the L2 norm over :math:`\sqrt D`) samples of small tangent keep a smaller weight.
    """
    size = torch.linalg.vector_norm(g.flatten(1), dim=1)
    if norm == "rms":
        size = size / g[0].numel() ** 0.5
    return g / (expand_time(size, g) + c)


def clip(g: Tensor, t: Tensor, limit: float = 1.0) -> Tensor:
    r"""Tangent clipping: :math:`df/dt = g/\cos t` limited to [-limit, limit] elementwise (Sec. 4.1, Fig. 5a)."""
    bound = limit * expand_time(t, g).cos()
    return torch.clamp(g, -bound, bound)


def weighted_loss(residual: Tensor, w_phi: Tensor) -> Tensor:
    r"""Adaptively weighted squared error :math:`\frac{e^{w}}{D}\lVert \Delta\rVert_2^2 - w` per sample (Eq. 8, App. D).

    Minimal in :math:`w` where :math:`\frac{e^w}{D} E\lVert\Delta\rVert^2 = 1`, so that all times weigh the same.

    Args:
        residual: Shape (B, ...); D is the number of elements of a sample.
        w_phi: Adaptive weight, shape (B,).

    Returns:
        Shape (B,), by the rule of :func:`finite_or_nan`.
    """
    return finite_or_nan(lambda residual, w: w.exp() * residual.square().flatten(1).mean(1) - w, residual, w_phi)


def finite_or_nan(loss: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """A loss (B,) of ``inputs`` (B, ...), sample by sample: NaN, its gradient exactly zero, where it is not finite.

    :func:`finite_mean` leaves that out. So a tangent or a teacher's velocity that overflowed costs its sample and no
    other. What this cannot mask is a network whose own activations are not finite: they turn the zero into NaN on its
    way back, 0 · NaN, in the weights that all samples share.
    """
    finite = loss(*(x.detach() for x in inputs)).isfinite()
    # Before the loss, whose own derivative there may be NaN, times zero or not: the way back ends here.
    inputs = [torch.where(finite.view(-1, *[1] * (x.ndim - 1)), x, 0.0) for x in inputs]
    return torch.where(finite, loss(*inputs), torch.nan)


def finite_mean(values: Tensor) -> Tensor:
    """Mean of the finite ones among values of any shape; NaN if there is none, so that a broken run shows.

    If all are finite it is ``values.mean()`` to the last bit.
    """
    finite = values.isfinite()
    return torch.where(finite, values, 0.0).mean() * (finite.numel() / finite.sum())
