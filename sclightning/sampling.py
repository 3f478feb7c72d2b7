r"""Samplers: one, two or n steps for a consistency model; DDIM, Heun and DPM-Solver++(2M) for its teacher.

A sampler is a function of a velocity ``F(x, t)`` (x and F of unit variance, labels and guidance bound), the noise of
every sample, and times in radians. It knows nothing about networks, labels or devices.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sclightning.trigflow import denoise, expand_time, interpolate, predict_noise, rotate

Velocity = Callable[[Tensor, Tensor], Tensor]

T_MAX = math.atan(80 / 0.5)
"""Start time of the paper's samplers in radians, 1.56455 (σ = 80 at σ_d = 0.5)."""


def sample_noise(indices: Sequence[int], shape: Sequence[int], draws: int, seed: int = 0) -> Tensor:
    """Unit Gaussian noise that depends on (seed, sample index) alone.

    The same sample comes out for any batch size and number of devices: counter-based Philox keyed by seed and index.

    Args:
        indices: Sample indices, length B, non-negative.
        shape: Shape of one sample, (C, H, W).
        draws: How many independent noises each sample needs.
        seed: Seed of the whole set, non-negative.

    Returns:
        float32 on the CPU, shape (draws, B, C, H, W).
    """
    noise = np.empty((len(indices), draws, *shape), dtype=np.float32)
    for row, index in zip(noise, indices, strict=True):
        row[:] = np.random.Generator(np.random.Philox(key=[seed, int(index)])).standard_normal(row.shape, np.float32)
    return torch.from_numpy(noise).transpose(0, 1)


def karras_times(
    steps: int, sigma_data: float, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> list[float]:
    r"""Times :math:`t_i = \arctan(\sigma_i/\sigma_d)` of EDM's :math:`\rho`-spaced noise levels, then 0.

    Returns:
        Decreasing radians, length steps + 1.
    """
    sigmas = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps) ** rho
    return [*np.arctan(sigmas / sigma_data).tolist(), 0.0]


@torch.no_grad()
def consistency(F: Velocity, noise: Tensor, times: Sequence[float], sigma_data: float) -> Tensor:
    """Multi-step consistency sampling (Sec. 2): jump to the data, add fresh noise, jump again.

    Args:
        F: Consistency model's velocity.
        noise: Unit Gaussian noise, shape (len(times), B, ...), a fresh one per step.
        times: Decreasing times in radians, first ``t_max``; ``[T_MAX]`` is one step, ``[T_MAX, 1.1]`` the paper's two.
        sigma_data: Standard deviation of the data.

    Returns:
        Samples, shape (B, ...), after ``len(times)`` evaluations.
    """
    x = torch.zeros_like(noise[0])
    for step, (time, z) in enumerate(zip(times, noise, strict=True)):
        t = torch.full(x.shape[:1], time, dtype=torch.float32, device=x.device)
        # The start is pure noise: x is still zero, and cos(t_max) is too small for the data that is not there.
        x_t = interpolate(x, sigma_data * z, t) if step else sigma_data * z
        x = denoise(F(x_t / sigma_data, t), x_t, t, sigma_data)
    return x


@torch.no_grad()
def ddim(F: Velocity, noise: Tensor, times: Sequence[float], sigma_data: float) -> Tensor:
    """DDIM, first order in TrigFlow (App. B.1): ``len(times) - 1`` evaluations.

    Args:
        F: Diffusion model's velocity, called with x and t in the dtype of ``noise``.
        noise: Unit Gaussian noise, shape (B, ...).
        times: Decreasing times in radians, last one 0, as from :func:`karras_times`.
        sigma_data: Standard deviation of the data.

    Returns:
        Samples in float64, in which the state is kept since times near π/2 need the precision, shape (B, ...).
    """
    x = sigma_data * noise.double()
    for t, s in _steps(times, x):
        F_t = _velocity(F, x, t, sigma_data, noise.dtype)
        x = rotate(x, F_t, t, s, sigma_data)
    return x


@torch.no_grad()
def heun(F: Velocity, noise: Tensor, times: Sequence[float], sigma_data: float) -> Tensor:
    r"""DPM-Solver-2S in TrigFlow with the intermediate time at the step's end, which is exactly EDM's Heun (App. B.1).

    Takes ``2 (len(times) - 1) - 1`` evaluations: the last step is Euler's. Arguments as in :func:`ddim`.
    """
    x = sigma_data * noise.double()
    for step, (t, s) in enumerate(_steps(times, x), start=2):
        F_t = _velocity(F, x, t, sigma_data, noise.dtype)
        x_s = rotate(x, F_t, t, s, sigma_data)
        if step < len(times):
            z_t = predict_noise(F_t, x, t, sigma_data)
            z_s = predict_noise(_velocity(F, x_s, s, sigma_data, noise.dtype), x_s, s, sigma_data)
            x_s = x_s - expand_time((t - s).sin() / (2 * t.cos()), x) * (z_s - z_t)
        x = x_s
    return x


@torch.no_grad()
def dpm_solver_pp_2m(F: Velocity, noise: Tensor, times: Sequence[float], sigma_data: float) -> Tensor:
    r"""DPM-Solver++(2M) in TrigFlow: second order from the denoiser's history, one evaluation a step (App. B.1).

    Arguments as in :func:`ddim`. The first and the last step are first order.
    """
    x = sigma_data * noise.double()
    D_before, h_before = None, None
    for step, (t, s) in enumerate(_steps(times, x), start=2):
        D = denoise(_velocity(F, x, t, sigma_data, noise.dtype), x, t, sigma_data)
        h = expand_time(t.tan().log() - s.tan().log(), x)
        second_order = D_before is not None and step < len(times)
        D_mid = D + h / (2 * h_before) * (D - D_before) if second_order else D
        x = expand_time(s.sin() / t.sin(), x) * x + expand_time((t - s).sin() / t.sin(), x) * D_mid
        D_before, h_before = D, h
    return x


SOLVERS: dict[str, Callable[[Velocity, Tensor, Sequence[float], float], Tensor]] = {
    "ddim": ddim,
    "heun": heun,
    "dpm_solver++": dpm_solver_pp_2m,
}


def _steps(times: Sequence[float], x: Tensor):
    """Pairs of consecutive times, each as a vector (B,) in the dtype of ``x``."""
    for t, s in pairwise(times):
        yield x.new_full(x.shape[:1], t), x.new_full(x.shape[:1], s)


def _velocity(F: Velocity, x: Tensor, t: Tensor, sigma_data: float, dtype: torch.dtype) -> Tensor:
    return F((x / sigma_data).to(dtype), t.to(dtype)).to(x.dtype)
