"""Samplers against exact solutions, EDM's Heun and diffusers' scheduler."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from sclightning.sampling import (
    SOLVERS,
    T_MAX,
    consistency,
    ddim,
    dpm_solver_pp_2m,
    heun,
    karras_times,
    sample_noise,
)

SIGMA_DATA = 0.4
MEAN = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64)
STD = torch.tensor([0.2, 0.6, 1.1], dtype=torch.float64)
B, D = 5, 3


def column(t: Tensor) -> Tensor:
    return t.double().view(-1, 1)


def marginal_std(t: Tensor) -> Tensor:
    return ((column(t).cos() * STD) ** 2 + (column(t).sin() * SIGMA_DATA) ** 2).sqrt()


def end_point(x_t: Tensor, t: Tensor) -> Tensor:
    """Exact PF-ODE solution at time 0 for data N(MEAN, diag(STD²))."""
    return MEAN + STD / marginal_std(t) * (x_t - column(t).cos() * MEAN)


def diffusion_network(x: Tensor, t: Tensor) -> Tensor:
    """The F whose PF-ODE is exact, with the Gaussian's closed-form velocity."""
    cos, sin = column(t).cos(), column(t).sin()
    scale = cos * sin * (SIGMA_DATA**2 - STD**2) / marginal_std(t) ** 2
    return (scale * (SIGMA_DATA * x - cos * MEAN) - sin * MEAN) / SIGMA_DATA


def consistency_network(x: Tensor, t: Tensor) -> Tensor:
    """The F whose consistency function is exact."""
    x_t = SIGMA_DATA * x
    return (column(t).cos() * x_t - end_point(x_t, t)) / (column(t).sin() * SIGMA_DATA)


def any_network(x: Tensor, t: Tensor) -> Tensor:
    """Something smooth and nonlinear, in the precision of x."""
    t = t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return torch.sin(2 * x + t) + t * torch.roll(x, 1, -1)


def counted(F):
    """The network with a record of its inputs."""
    calls = []

    def network(x, t):
        calls.append((x, t))
        return F(x, t)

    return network, calls


def unit_noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# Noise


def test_noise_does_not_depend_on_the_batch():
    """A sample's noise is the same alone, in any batch, order and number of draws, and for any global random state."""
    torch.manual_seed(0)
    np.random.seed(0)
    noise = sample_noise(range(8), (2, 3, 3), draws=2, seed=4)
    torch.manual_seed(1)
    np.random.seed(1)
    assert noise.shape == (2, 8, 2, 3, 3) and noise.dtype == torch.float32 and noise.device.type == "cpu"
    assert torch.equal(sample_noise([6, 1], (2, 3, 3), draws=2, seed=4), noise[:, [6, 1]])
    for i in range(8):
        assert torch.equal(sample_noise([i], (2, 3, 3), draws=2, seed=4)[:, 0], noise[:, i])
    philox = np.random.Generator(np.random.Philox(key=[4, 3]))  # another key would change every sample ever made
    assert np.array_equal(noise[:, 3].numpy(), philox.standard_normal((2, 2, 3, 3), np.float32))
    assert torch.equal(sample_noise(np.arange(8), (2, 3, 3), draws=1, seed=4)[0], noise[0])


def test_noise_differs_between_draws_indices_and_seeds():
    """Draws, indices and seeds all give other noise; (seed, index) is not (index, seed) nor their sum."""
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (0, 2), (0, 2**40)]
    noise = torch.cat([sample_noise([index], (1, 4, 4), draws=3, seed=seed).flatten(1) for seed, index in keys])
    distances = torch.cdist(noise, noise) + 10 * torch.eye(len(noise))
    assert distances.min() > 1


def test_noise_is_standard_normal():
    """Zero mean, unit variance and kurtosis 3 over many samples."""
    noise = sample_noise(range(100), (1, 32, 32), draws=1).double()
    n = noise.numel()
    assert abs(noise.mean().item()) < 4 / n**0.5
    assert noise.var().item() == pytest.approx(1, abs=4 * (2 / n) ** 0.5)
    assert noise.pow(4).mean().item() == pytest.approx(3, abs=4 * (96 / n) ** 0.5)


# Times


def test_karras_times():
    """EDM's noise levels (its Eq. 5) through arctan(sigma / sigma_data), from sigma_max down to sigma_min, then 0."""
    N, low, high, rho = 6, 0.002, 80.0, 7.0
    times = karras_times(N, SIGMA_DATA)
    assert len(times) == N + 1 and times[-1] == 0 and all(t > s for t, s in pairwise(times))
    for i, t in enumerate(times[:-1]):
        sigma = (high ** (1 / rho) + i / (N - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        assert t == pytest.approx(math.atan(sigma / SIGMA_DATA), rel=1e-12)
    assert times[0] == pytest.approx(math.atan(80 / SIGMA_DATA), rel=1e-15)
    assert times[-2] == pytest.approx(math.atan(0.002 / SIGMA_DATA), rel=1e-12)
    assert karras_times(1, 0.5) == pytest.approx([T_MAX, 0.0])
    custom = karras_times(3, 0.5, sigma_min=0.01, sigma_max=10.0, rho=1.0)
    assert custom == pytest.approx([math.atan(20), math.atan(10.01), math.atan(0.02), 0.0])


def test_start_time_is_the_papers():
    """The start time arctan(80 / 0.5) = 1.56455 radians of the paper's Appendix G."""
    assert pytest.approx(1.56455, abs=5e-6) == T_MAX


# Solvers of the teacher


@pytest.mark.parametrize(("solver", "order"), [(ddim, 1), (heun, 2), (dpm_solver_pp_2m, 2)])
def test_order_of_convergence(solver, order):
    """The error against the exact Gaussian PF-ODE solution falls with the solver's order, to nearly nothing."""
    noise, start = unit_noise(B, D), 1.5
    exact = end_point(SIGMA_DATA * noise, torch.full((B,), start, dtype=torch.float64))
    errors = []
    for steps in (64, 128, 256):
        times = np.linspace(start, 0, steps + 1).tolist()
        errors.append((solver(diffusion_network, noise, times, SIGMA_DATA) - exact).norm().item())
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)
    assert errors[-1] / exact.norm().item() < 0.02 / 10 ** (order - 1)


def edm_heun(denoiser, x: Tensor, sigmas: list[float]) -> Tensor:
    """Algorithm 1 of EDM (Karras et al. 2022) with sigma(t) = t and s(t) = 1."""
    for sigma, next_sigma in pairwise(sigmas):
        slope = (x - denoiser(x, sigma)) / sigma
        x_next = x + (next_sigma - sigma) * slope
        if next_sigma > 0:
            next_slope = (x_next - denoiser(x_next, next_sigma)) / next_sigma
            x_next = x + (next_sigma - sigma) * (slope + next_slope) / 2
        x = x_next
    return x


@pytest.mark.parametrize("steps", [1, 3, 18])
def test_heun_is_edms(steps):
    """DPM-Solver-2S in TrigFlow equals EDM's Heun in its own noise levels and preconditioning, for any network."""
    noise = unit_noise(B, D)
    times = karras_times(steps, SIGMA_DATA)
    sigmas = [SIGMA_DATA * math.tan(t) for t in times]

    def denoiser(x, sigma):
        size = math.hypot(sigma, SIGMA_DATA)
        F = any_network(x / size, torch.full((B,), math.atan(sigma / SIGMA_DATA), dtype=torch.float64))
        return SIGMA_DATA**2 / size**2 * x - sigma * SIGMA_DATA / size * F

    x = SIGMA_DATA * noise / math.cos(times[0])
    torch.testing.assert_close(
        heun(any_network, noise, times, SIGMA_DATA), edm_heun(denoiser, x, sigmas), rtol=0, atol=1e-12
    )


def test_dpm_solver_by_hand():
    """Three steps of DPM-Solver++(2M) in its own variables: alpha = cos, sigma = sin, lambda = -log tan."""
    noise, times = unit_noise(B, D), [1.5, 0.9, 0.4, 0.1]

    def D_at(x, t):
        return math.cos(t) * x - math.sin(t) * SIGMA_DATA * any_network(
            x / SIGMA_DATA, torch.full((B,), t, dtype=torch.float64)
        )

    t_0, t_1, t_2, t_3 = times
    h_1, h_2 = (math.log(math.tan(t)) - math.log(math.tan(s)) for t, s in [(t_0, t_1), (t_1, t_2)])
    x = SIGMA_DATA * noise
    D_0 = D_at(x, t_0)
    x = math.sin(t_1) / math.sin(t_0) * x - math.cos(t_1) * math.expm1(-h_1) * D_0
    D_1, r = D_at(x, t_1), h_1 / h_2
    x = math.sin(t_2) / math.sin(t_1) * x - math.cos(t_2) * math.expm1(-h_2) * (
        (1 + 1 / (2 * r)) * D_1 - 1 / (2 * r) * D_0
    )
    D_2, h_3 = D_at(x, t_2), math.log(math.tan(t_2)) - math.log(math.tan(t_3))
    x = math.sin(t_3) / math.sin(t_2) * x - math.cos(t_3) * math.expm1(-h_3) * D_2
    torch.testing.assert_close(dpm_solver_pp_2m(any_network, noise, times, SIGMA_DATA), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "evaluations"), [("ddim", 18), ("heun", 35), ("dpm_solver++", 18)])
def test_evaluations_of_the_network(name, evaluations):
    """18 steps cost 18 evaluations, with Heun 35, at the times asked for and never at time 0."""
    network, calls = counted(any_network)
    times = karras_times(18, SIGMA_DATA)
    SOLVERS[name](network, unit_noise(B, D), times, SIGMA_DATA)
    assert len(calls) == evaluations
    assert {t[0].item() for _, t in calls} == set(times[:-1])


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_call_the_network_in_the_precision_of_the_noise(name):
    """The network sees float32 x of unit variance and one time per sample; the state is float64 and has no graph."""
    weight = torch.ones(1, requires_grad=True)
    network, calls = counted(lambda x, t: weight * diffusion_network(x, t).float())
    noise, times = unit_noise(4096, D), karras_times(4, SIGMA_DATA)
    x = SOLVERS[name](network, noise.float(), times, SIGMA_DATA)
    assert x.dtype == torch.float64 and x.shape == noise.shape and not x.requires_grad
    for x_in, t in calls:
        assert (x_in.dtype, t.dtype, t.shape) == (torch.float32, torch.float32, (4096,))
    torch.testing.assert_close(calls[0][0], noise.float())
    torch.testing.assert_close(x, SOLVERS[name](diffusion_network, noise, times, SIGMA_DATA), rtol=0, atol=1e-5)


# Consistency sampling


def test_one_step_is_the_end_of_the_trajectory():
    """With the exact consistency function one evaluation maps the noise to where the PF-ODE ends and Heun arrives."""
    noise = unit_noise(1, B, D)
    network, calls = counted(consistency_network)
    x = consistency(network, noise, [T_MAX], SIGMA_DATA)
    exact = end_point(SIGMA_DATA * noise[0], torch.full((B,), T_MAX, dtype=torch.float64))
    torch.testing.assert_close(x, exact, rtol=0, atol=1e-6)
    assert len(calls) == 1
    torch.testing.assert_close(calls[0][0], noise[0])
    solved = heun(diffusion_network, noise[0], np.linspace(T_MAX, 0, 513).tolist(), SIGMA_DATA)
    torch.testing.assert_close(x, solved, rtol=0, atol=1e-3)


def test_two_steps_by_hand():
    """By hand: x = f(sigma_data z, t_max), then f(cos 1.1 x + sin 1.1 sigma_data z_new, 1.1) with fresh noise z_new."""
    z, z_new = noise = unit_noise(2, B, D)

    def f(x_t, t):
        F = any_network(x_t / SIGMA_DATA, torch.full((B,), t, dtype=torch.float64))
        return math.cos(t) * x_t - math.sin(t) * SIGMA_DATA * F

    expected = f(math.cos(1.1) * f(SIGMA_DATA * z, T_MAX) + math.sin(1.1) * SIGMA_DATA * z_new, 1.1)
    network, calls = counted(any_network)
    ours = consistency(network, noise, [T_MAX, 1.1], SIGMA_DATA)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert [t[0].item() for _, t in calls] == pytest.approx([T_MAX, 1.1], abs=1e-6)


def test_consistency_sampler_contract():
    """The network sees one float32 time per sample, there is no graph, and noise and times must match in number."""
    weight = torch.ones(1, requires_grad=True)
    for dtype in (torch.float32, torch.float64):
        network, calls = counted(lambda x, t: weight * any_network(x, t))
        noise = unit_noise(3, B, 2, 4, 4).to(dtype)
        x = consistency(network, noise, [T_MAX, 1.1, 0.6], SIGMA_DATA)
        assert x.shape == (B, 2, 4, 4) and x.dtype == dtype and not x.requires_grad
        assert [(t.dtype, t.shape) for _, t in calls] == 3 * [(torch.float32, (B,))]
    for times in ([T_MAX, 1.1], [T_MAX, 1.3, 1.1, 0.6]):
        with pytest.raises(ValueError):
            consistency(any_network, noise, times, SIGMA_DATA)


@pytest.mark.parametrize("times", [[T_MAX], [T_MAX, 1.1], [1.5, 1.3, 1.0, 0.6], [T_MAX, 1.2, 0.7, 0.3, 0.1]])
def test_consistency_sampler_equals_diffusers(times):
    """Same network, times and noise as diffusers' SCMScheduler: same samples, with 1, 2 and n steps."""
    from diffusers.schedulers.scheduling_scm import SCMScheduler

    shape, seed = (B, 2, 4, 4), 11
    start = unit_noise(*shape).float()
    scheduler = SCMScheduler(sigma_data=SIGMA_DATA)
    if len(times) == 1:
        scheduler.set_timesteps(1, max_timesteps=T_MAX, intermediate_timesteps=None)
    elif len(times) == 2:
        scheduler.set_timesteps(2, max_timesteps=T_MAX, intermediate_timesteps=1.1)
    else:
        scheduler.set_timesteps(len(times), timesteps=[*times, 0.0], max_timesteps=None, intermediate_timesteps=None)
    generator, latents = torch.Generator().manual_seed(seed), SIGMA_DATA * start
    for t in scheduler.timesteps[:-1]:
        F = any_network(latents / SIGMA_DATA, t.expand(B))
        latents, expected = scheduler.step(SIGMA_DATA * F, t, latents, generator=generator, return_dict=False)

    generator = torch.Generator().manual_seed(seed)
    noise = torch.stack([start, *(torch.randn(shape, generator=generator) for _ in times[1:])])
    torch.testing.assert_close(consistency(any_network, noise, times, SIGMA_DATA), expected, rtol=1e-5, atol=1e-5)
