r"""Consistency models in discrete time (App. E): finite steps of a grid, and ECT's objective in the same terms.

A step goes from a time t to the grid's time s before it, along the PF-ODE or its estimate by one sample:

.. math:: x_s = \cos(t-s)\,x_t - \sin(t-s)\,\dot x_t

With :math:`\dot x_t = \sigma_d F_{pretrain}` this is one step of DDIM. With :math:`\dot x_t = \cos t\,z - \sin t\,x_0`
it is :math:`\cos s\,x_0 + \sin s\,z` without an error: distillation and training differ in :math:`\dot x_t` alone, here
too. As :math:`s \to t` everything becomes :mod:`sclightning.objective`'s.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sclightning.objective import ConsistencyLoss, Normalization, finite_or_nan, tangent_loss
from sclightning.trigflow import denoise, expand_time, rotate, sigma_to_time, time_to_sigma


def grid(
    N: int, sigma_data: float, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> tuple[Tensor, Tensor]:
    r"""Times and noise levels of the grid of N steps (App. E.2), increasing, float64, each of shape (N + 1,).

    .. math:: \sigma_i = \bigl(\sigma_{min}^{1/\rho}
       + \tfrac{i}{N}(\sigma_{max}^{1/\rho} - \sigma_{min}^{1/\rho})\bigr)^\rho,
       \qquad t_i = \arctan(\sigma_i/\sigma_d), \quad t_0 = 0

    The first time is 0 in place of :math:`\arctan(\sigma_{min}/\sigma_d)`, so that trajectories end at the data.

    Raises:
        ValueError: If there is no step, or the noise levels do not increase.
    """
    if N < 1 or not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"A grid has N={N}, sigma_min={sigma_min}, sigma_max={sigma_max}; N must be 1 or more and "
            "0 < sigma_min < sigma_max."
        )
    sigmas = torch.linspace(sigma_min ** (1 / rho), sigma_max ** (1 / rho), N + 1, dtype=torch.float64) ** rho
    times = sigma_to_time(sigmas, sigma_data)
    times[0] = 0
    return times, sigmas


def step_probabilities(sigmas: Tensor, P_mean: float, P_std: float) -> Tensor:
    r"""Probability of each step of the grid: the log-normal proposal in bins between noise levels (App. E.2).

    .. math:: p_i \propto \operatorname{erf}\frac{\ln\sigma_i - P_{mean}}{\sqrt2 P_{std}}
       - \operatorname{erf}\frac{\ln\sigma_{i-1} - P_{mean}}{\sqrt2 P_{std}}, \qquad i = 1, \dots, N

    Args:
        sigmas: Noise levels of :func:`grid`, shape (N + 1,).
        P_mean: Mean of :math:`\ln\sigma`.
        P_std: Standard deviation of :math:`\ln\sigma`.

    Returns:
        Shape (N,), sum 1.
    """
    mass = torch.erf((sigmas.log() - P_mean) / (math.sqrt(2) * P_std)).diff()
    return mass / mass.sum()


def previous_time(times: Tensor, t: Tensor) -> Tensor:
    """The greatest of the increasing ``times`` below each ``t``, shape and dtype of ``t``; the first for t at it."""
    times = times.to(t.dtype)
    return times[(torch.searchsorted(times, t) - 1).clamp(min=0)]


def discrete_consistency_loss(
    network: Callable[[Tensor, Tensor], Tensor],
    w_phi: Tensor,
    x_t: Tensor,
    dx_t: Tensor,
    t: Tensor,
    s: Tensor,
    sigma_data: float,
    *,
    r: float | Tensor = 1.0,
    c: float = 0.1,
    normalization: Normalization = "l2",
) -> ConsistencyLoss:
    r"""Objective of discrete-time consistency models (Alg. 2), per sample: Alg. 1 with :math:`\Delta` for its JVP.

    Arguments as in :func:`~sclightning.objective.consistency_loss`, and:

    Args:
        network: ``F(x, t)`` with labels and guidance bound, called twice.
        w_phi: Adaptive weight :math:`w_\phi(t)`, shape (B,).
        x_t: Noisy sample, shape (B, ...).
        dx_t: Velocity of the PF-ODE at ``x_t``, shape (B, ...).
        t: Times in radians, shape (B,).
        s: Earlier times, shape (B,).
        sigma_data: Standard deviation of the data.
        r: Tangent warm-up.
        c: Constant of the tangent normalisation.
        normalization: As for the continuous tangent.
    """
    x_s = rotate(x_t, dx_t / sigma_data, t, s, sigma_data)
    F, F_s = two_passes(network, x_t / sigma_data, t, x_s / sigma_data, s)
    g = discrete_tangent(F.detach(), F_s, x_t, dx_t, t, s, sigma_data, r)
    return tangent_loss(F, g, t, w_phi, c, normalization)


def discrete_tangent(
    F: Tensor, F_s: Tensor, x_t: Tensor, dx_t: Tensor, t: Tensor, s: Tensor, sigma_data: float, r: float | Tensor = 1.0
) -> Tensor:
    r"""Finite difference :math:`g = \cos t\,\Delta` in place of :math:`\cos t\,df/dt` (Eq. 37), with the warm-up ``r``.

    .. math:: \Delta = \frac{f(x_t, t) - f(x_s, s)}{\sin(t-s)} = -\cos s\,(\sigma_d F - \dot x_t)
       - r\,\sin s\,\Bigl(x_t + \sigma_d \frac{\cos(t-s)\,F - F_s}{\sin(t-s)}\Bigr)

    The second form subtracts two outputs of the network, not two images: what is left of their rounding, divided by
    the step, is what a fine grid loses.

    Args:
        F: Network output at ``(x_t / sigma_data, t)``, detached, shape (B, ...).
        F_s: Network output at ``(x_s / sigma_data, s)``, detached, shape (B, ...).
        x_t: Noisy sample, shape (B, ...).
        dx_t: Velocity of the PF-ODE at ``x_t``, from which ``x_s`` was made, shape (B, ...).
        t: Times in radians, shape (B,).
        s: Earlier times, shape (B,).
        sigma_data: Standard deviation of the data.
        r: Tangent warm-up in [0, 1].
    """
    step = expand_time(t - s, x_t)
    t, s = expand_time(t, x_t), expand_time(s, x_t)
    dF = (step.cos() * F - F_s) / step.sin()
    return t.cos() * (-s.cos() * (sigma_data * F - dx_t) - r * s.sin() * (x_t + sigma_data * dF))


def two_passes(
    network: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, t: Tensor, x_s: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """Network output at (x_t, t) with its gradient and at (x_s, s) without, under one dropout mask.

    Returns:
        Both float32 or wider.
    """
    # The pass with gradients is first: autocast keeps the rounded weights of a pass under no_grad, without gradient.
    with torch.random.fork_rng([x_t.device] if x_t.is_cuda else []):
        F = network(x_t, t)
    with torch.no_grad():
        F_s = network(x_s, s)
    dtype = torch.promote_types(x_t.dtype, torch.float32)
    return F.to(dtype), F_s.to(dtype)


def ect_previous_time(t: Tensor, sigma_data: float, gap: float | Tensor, k: float = 8.0, b: float = 1.0) -> Tensor:
    r"""ECT's earlier time (Geng et al. 2024): its noise level :math:`\sigma_s = \sigma\,(1 - gap\cdot n(\sigma))_+`.

    .. math:: n(\sigma) = 1 + \frac{k}{1 + e^{b\sigma}}

    Relative steps are longer at small noise, and where they would pass the data they end there.

    Args:
        t: Times in radians, shape (B,).
        sigma_data: Standard deviation of the data.
        gap: Relative step at large noise, :math:`q^{-a}` in stage a.
        k: Strength of the adjustment.
        b: Its decay with the noise level.
    """
    sigma = time_to_sigma(t, sigma_data)
    ratio = 1 - gap * (1 + k * torch.sigmoid(-b * sigma))
    return sigma_to_time(sigma * ratio.clamp(min=0), sigma_data)


def ect_loss(
    network: Callable[[Tensor, Tensor], Tensor],
    x_t: Tensor,
    dx_t: Tensor,
    t: Tensor,
    s: Tensor,
    sigma_data: float,
    *,
    c: float = 0.0,
) -> ConsistencyLoss:
    r"""Objective of ECT (Geng et al. 2024), per sample, with the noise levels :math:`\sigma = \sigma_d \tan t`.

    .. math:: \frac{\sqrt{\lVert f_\theta(x_t, t) - f_{\theta^-}(x_s, s)\rVert^2 + c^2} - c}{\sigma_t - \sigma_s}

    For c = 0 its gradient, times the step, becomes that of a normalised tangent.

    Args:
        network: ``F(x, t)`` with labels bound, called twice.
        x_t: Noisy sample, shape (B, ...).
        dx_t: Velocity at ``x_t``, shape (B, ...).
        t: Times in radians, shape (B,).
        s: Earlier times, shape (B,).
        sigma_data: Standard deviation of the data.
        c: Constant of the pseudo-Huber distance.

    Returns:
        The loss, and the root mean square of :math:`\cos t\,\Delta` for comparison with the other objectives.
    """
    x_s = rotate(x_t, dx_t / sigma_data, t, s, sigma_data)
    F, F_s = two_passes(network, x_t / sigma_data, t, x_s / sigma_data, s)
    difference = denoise(F, x_t, t, sigma_data) - denoise(F_s, x_s, s, sigma_data)
    step = time_to_sigma(t, sigma_data) - time_to_sigma(s, sigma_data)
    loss = finite_or_nan(lambda d, step: ((d.square().flatten(1).sum(1) + c**2).sqrt() - c) / step, difference, step)
    size = difference.detach().square().flatten(1).mean(1).sqrt()
    return ConsistencyLoss(loss, size * t.cos() / (t - s).sin())
