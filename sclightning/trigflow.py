r"""TrigFlow (Sec. 3): one arc from data to noise.

For data :math:`x_0` of standard deviation :math:`\sigma_d` and noise :math:`z \sim \mathcal N(0, \sigma_d^2 I)`,

.. math:: x_t = \cos t\,x_0 + \sin t\,z, \qquad t \in [0, \pi/2],

has standard deviation :math:`\sigma_d` at every time :math:`t` (radians). A network :math:`F` of unit-variance input
and output is the velocity of the probability-flow ODE, :math:`dx_t/dt = \sigma_d F(x_t/\sigma_d, t)`. The noise level
of EDM's variance-exploding process is :math:`\sigma = \sigma_d \tan t`.

Every function takes ``t`` of shape (B,) in float32 or float64 and tensors of shape (B, ...); results are at least
float32.

Source: Lu & Song, "Simplifying, Stabilizing & Scaling Continuous-Time Consistency Models", Sec. 3 and App. B.
"""

import torch
from torch import Tensor


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """Reshape times (B,) so that they broadcast against ``x`` of shape (B, ...).

    Raises:
        ValueError: If ``t`` is not a float32 or float64 vector with one entry per sample.
    """
    if t.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"Times are {t.dtype}; half precision destroys the tangent, pass float32 or float64.")
    if t.shape != x.shape[:1]:
        raise ValueError(f"Times have shape {tuple(t.shape)}, expected ({len(x)},): one time in radians per sample.")
    return t.view(-1, *[1] * (x.ndim - 1))


def interpolate(x_0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    r"""Noisy sample :math:`x_t = \cos t\,x_0 + \sin t\,z`.

    Args:
        x_0: Data, shape (B, ...), standard deviation ``sigma_data``.
        z: Noise of the same standard deviation, shape (B, ...).
        t: Times in radians, shape (B,).
    """
    t = expand_time(t, x_0)
    return t.cos() * x_0 + t.sin() * z


def velocity(x_0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    r"""Velocity :math:`v_t = \cos t\,z - \sin t\,x_0` of the interpolation: the target of :math:`\sigma_dF` (Eq. 4)."""
    t = expand_time(t, x_0)
    return t.cos() * z - t.sin() * x_0


def denoise(F: Tensor, x_t: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    r"""Denoiser or consistency function :math:`f = \cos t\,x_t - \sin t\,\sigma_d F` (Eq. 5).

    With a diffusion model's ``F`` this is its estimate of :math:`E[x_0 | x_t]`, with a consistency model's ``F`` the
    end point of the trajectory through :math:`x_t`.

    Args:
        F: Network output at ``(x_t / sigma_data, t)``, shape (B, ...).
        x_t: Noisy sample, shape (B, ...).
        t: Times in radians, shape (B,).
        sigma_data: Standard deviation of the data.
    """
    t = expand_time(t, x_t)
    F = F.to(torch.promote_types(F.dtype, t.dtype))
    return t.cos() * x_t - t.sin() * (sigma_data * F)  # diffusers' SCMScheduler rounds in this order


def predict_noise(F: Tensor, x_t: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    r"""Noise prediction :math:`\hat z = \sin t\,x_t + \cos t\,\sigma_d F`, of standard deviation ``sigma_data``."""
    t = expand_time(t, x_t)
    return t.sin() * x_t + t.cos() * sigma_data * F


def rotate(x_t: Tensor, F: Tensor, t: Tensor, s: Tensor, sigma_data: float) -> Tensor:
    r"""PF-ODE from ``t`` to ``s`` for a constant denoiser: :math:`\cos(t-s)\,x_t - \sin(t-s)\,\sigma_d F` (App. B.1).

    One DDIM step. At ``s = 0`` it is :func:`denoise`.
    """
    delta = expand_time(t - s, x_t)
    F = F.to(torch.promote_types(F.dtype, delta.dtype))
    return delta.cos() * x_t - delta.sin() * (sigma_data * F)


def sigma_to_time(sigma: Tensor, sigma_data: float) -> Tensor:
    r"""Time of a noise level, :math:`t = \arctan(\sigma/\sigma_d)`, in radians."""
    return torch.atan(sigma / sigma_data)


def time_to_sigma(t: Tensor, sigma_data: float) -> Tensor:
    r"""Noise level of a time, :math:`\sigma = \sigma_d \tan t`."""
    return sigma_data * torch.tan(t)


def sample_time(
    n: int,
    P_mean: float,
    P_std: float,
    sigma_data: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Times from the proposal :math:`t = \arctan(e^\tau/\sigma_d)`, :math:`\tau \sim \mathcal N(P_{mean}, P_{std}^2)`.

    So :math:`\log(\sigma_d \tan t)` is normal (Alg. 1; the main text's "e^{σ_d tan t}" is a misprint).

    Returns:
        float32 radians in (0, π/2), shape (n,).
    """
    tau = torch.randn(n, generator=generator, device=device, dtype=torch.float32) * P_std + P_mean
    return sigma_to_time(tau.exp(), sigma_data)
