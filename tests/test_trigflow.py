"""TrigFlow's identities in float64, its proposal, and what it refuses."""

import math

import pytest
import torch

from sclightning.trigflow import (
    denoise,
    interpolate,
    predict_noise,
    rotate,
    sample_time,
    sigma_to_time,
    time_to_sigma,
    velocity,
)

B, SHAPE = 6, (2, 3, 4)
SIGMA_DATA = 0.3


def batch(dtype=torch.float64):
    """Data, noise and times of a batch; every sample has another time."""
    generator = torch.Generator().manual_seed(0)
    x_0, z = SIGMA_DATA * torch.randn(2, B, *SHAPE, generator=generator, dtype=torch.float64)
    return x_0.to(dtype), z.to(dtype), torch.linspace(0.02, 1.55, B, dtype=torch.float64)


def column(t):
    return t.view(-1, 1, 1, 1)


def test_sample_and_velocity_are_a_rotation_of_data_and_noise():
    """x_t² + v_t² = x_0² + z² elementwise, so that the variance stays sigma_data² at all times; the ends are exact."""
    x_0, z, t = batch()
    x_t, v_t = interpolate(x_0, z, t), velocity(x_0, z, t)
    torch.testing.assert_close(x_t**2 + v_t**2, x_0**2 + z**2, rtol=1e-13, atol=0)
    torch.testing.assert_close(interpolate(x_0, z, torch.zeros_like(t)), x_0, rtol=0, atol=0)
    torch.testing.assert_close(velocity(x_0, z, torch.zeros_like(t)), z, rtol=0, atol=0)
    torch.testing.assert_close(interpolate(x_0, z, torch.full_like(t, math.pi / 2)), z, rtol=0, atol=1e-15)


def test_variance_is_preserved():
    """Independent data and noise of standard deviation sigma_data mix to a sample of the same standard deviation."""
    x_0, z = SIGMA_DATA * torch.randn(2, B, 200_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    std = interpolate(x_0, z, batch()[2]).std(dim=1)
    torch.testing.assert_close(std, torch.full_like(std, SIGMA_DATA), rtol=0.01, atol=0)


def test_each_sample_has_its_own_time():
    """Times go with the first dimension, not with the last."""
    x_0, z, t = batch()
    for i in range(B):
        expected = math.cos(t[i]) * x_0[i] + math.sin(t[i]) * z[i]
        torch.testing.assert_close(interpolate(x_0, z, t)[i], expected, rtol=1e-14, atol=1e-15)


def test_exact_velocity_gives_back_data_and_noise():
    """Eq. 5 and the noise prediction at F = v_t / sigma_data return x_0 and z."""
    x_0, z, t = batch()
    x_t, F = interpolate(x_0, z, t), velocity(x_0, z, t) / SIGMA_DATA
    torch.testing.assert_close(denoise(F, x_t, t, SIGMA_DATA), x_0, rtol=0, atol=1e-15)
    torch.testing.assert_close(predict_noise(F, x_t, t, SIGMA_DATA), z, rtol=0, atol=1e-15)


def test_velocity_is_the_time_derivative_of_the_sample():
    """Central differences of x_t in t give sigma_data F: the PF-ODE, in radians."""
    x_0, z, t = batch()
    h = 1e-5
    derivative = (interpolate(x_0, z, t + h) - interpolate(x_0, z, t - h)) / (2 * h)
    torch.testing.assert_close(velocity(x_0, z, t), derivative, rtol=0, atol=1e-10)


def test_rotation_stays_on_the_arc():
    """From x_t and its velocity, rotate arrives at the interpolation of the same data and noise at the other time."""
    x_0, z, t = batch()
    x_t, F, s = interpolate(x_0, z, t), velocity(x_0, z, t) / SIGMA_DATA, t.flip(0)
    torch.testing.assert_close(rotate(x_t, F, t, s, SIGMA_DATA), interpolate(x_0, z, s), rtol=0, atol=1e-15)
    torch.testing.assert_close(rotate(x_t, F, t, t, SIGMA_DATA), x_t, rtol=0, atol=0)
    end = rotate(x_t, F, t, torch.zeros_like(t), SIGMA_DATA)
    torch.testing.assert_close(end, denoise(F, x_t, t, SIGMA_DATA), rtol=0, atol=1e-16)


def test_rotations_compose():
    """Rotating t to s to u is rotating t to u when F moves along the arc, and back again is the identity."""
    x_0, z, t = batch()
    s, u = t.flip(0), t.roll(1)
    x_t, F = interpolate(x_0, z, t), velocity(x_0, z, t) / SIGMA_DATA
    x_s, F_s = rotate(x_t, F, t, s, SIGMA_DATA), velocity(x_0, z, s) / SIGMA_DATA
    direct = rotate(x_t, F, t, u, SIGMA_DATA)
    torch.testing.assert_close(rotate(x_s, F_s, s, u, SIGMA_DATA), direct, rtol=0, atol=1e-15)
    torch.testing.assert_close(rotate(x_s, F_s, s, t, SIGMA_DATA), x_t, rtol=0, atol=1e-15)


def test_rotation_solves_the_ode_of_a_constant_denoiser():
    """Many Runge-Kutta steps of dx/dt = (cos t x - D) / sin t with D fixed end where one rotation does."""
    x_t, D, t = batch()
    t, s = t.clamp(min=0.5), t.flip(0).clamp(min=0.5)

    def F(x, t):
        return (column(t.cos()) * x - D) / (column(t.sin()) * SIGMA_DATA)

    x, steps = x_t, 400
    h = (s - t) / steps
    for i in range(steps):
        k_1 = SIGMA_DATA * F(x, t + i * h)
        k_2 = SIGMA_DATA * F(x + column(h / 2) * k_1, t + (i + 0.5) * h)
        k_3 = SIGMA_DATA * F(x + column(h / 2) * k_2, t + (i + 0.5) * h)
        k_4 = SIGMA_DATA * F(x + column(h) * k_3, t + (i + 1) * h)
        x = x + column(h / 6) * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    torch.testing.assert_close(rotate(x_t, F(x_t, t), t, s, SIGMA_DATA), x, rtol=0, atol=1e-10)


def test_denoiser_is_edms():
    """Eq. 5 with F_trig = -F_edm equals the denoiser of EDM's preconditioning (its Table 1: c_skip, c_out, c_in)."""
    x_0, z, t = batch()
    sigma = time_to_sigma(t, SIGMA_DATA)
    x_sigma = x_0 + column(sigma) * z / SIGMA_DATA
    sum_of_squares = column(sigma**2 + SIGMA_DATA**2)
    F = torch.tanh(3 * x_sigma / sum_of_squares.sqrt() + column(t))
    edm = SIGMA_DATA**2 / sum_of_squares * x_sigma + column(sigma) * SIGMA_DATA / sum_of_squares.sqrt() * F
    x_t = column(t.cos()) * x_sigma
    torch.testing.assert_close(x_t / SIGMA_DATA, x_sigma / sum_of_squares.sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(denoise(-F, x_t, t, SIGMA_DATA), edm, rtol=0, atol=1e-14)


def test_noise_levels_and_times_are_inverse():
    """The map sigma = sigma_data tan t, both ways, with the values of sigma = 80 and sigma = sigma_data."""
    sigma = torch.tensor([0.002, 0.3, 1.0, 80.0], dtype=torch.float64)
    t = sigma_to_time(sigma, SIGMA_DATA)
    torch.testing.assert_close(time_to_sigma(t, SIGMA_DATA), sigma, rtol=1e-12, atol=0)
    assert t[1].item() == pytest.approx(math.pi / 4)
    assert sigma_to_time(torch.tensor(80.0), 0.5).item() == pytest.approx(1.56455, abs=1e-5)


@pytest.mark.parametrize(("P_mean", "P_std", "sigma_data"), [(-1.0, 1.4, 0.5), (-0.4, 0.8, 0.25)])
def test_proposal_is_log_normal_in_the_noise_level(P_mean, P_std, sigma_data):
    """log(sigma_data tan t) passes a Kolmogorov-Smirnov test against N(P_mean, P_std²), and t lies inside (0, π/2)."""
    n = 100_000
    t = sample_time(n, P_mean, P_std, sigma_data, generator=torch.Generator().manual_seed(3))
    assert t.shape == (n,) and t.dtype == torch.float32
    assert t.min() > 0 and t.max() < math.pi / 2
    tau = (sigma_data * t.double().tan()).log().sort().values
    cdf = torch.distributions.Normal(P_mean, P_std).cdf(tau)
    distance = (cdf - (torch.arange(n) + 0.5) / n).abs().max().item()
    assert distance < 1.63 / n**0.5  # significance 1 %
    assert tau.mean().item() == pytest.approx(P_mean, abs=4 * P_std / n**0.5)
    assert tau.std().item() == pytest.approx(P_std, abs=4 * P_std / (2 * n) ** 0.5)


def test_proposal_follows_its_generator():
    """The same generator state gives the same times whatever the global state, which is not consumed."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = sample_time(5, -1.0, 1.4, 0.5, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(7)
    torch.testing.assert_close(sample_time(5, -1.0, 1.4, 0.5, generator=generator), first, rtol=0, atol=0)
    assert not torch.equal(sample_time(5, -1.0, 1.4, 0.5, generator=generator), first)
    torch.manual_seed(1)
    assert not torch.equal(sample_time(5, -1.0, 1.4, 0.5), sample_time(5, -1.0, 1.4, 0.5))


CALLS = {
    "interpolate": lambda x, t: interpolate(x, x + 1, t),
    "velocity": lambda x, t: velocity(x, x + 1, t),
    "denoise": lambda x, t: denoise(x + 1, x, t, SIGMA_DATA),
    "predict_noise": lambda x, t: predict_noise(x + 1, x, t, SIGMA_DATA),
    "rotate": lambda x, t: rotate(x, x + 1, t, t / 2, SIGMA_DATA),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_times_are_refused(name, dtype):
    """Half-precision times raise one sentence that says what to pass, also when x has the same precision."""
    x, _, t = batch()
    for samples in (x, x.to(dtype)):
        with pytest.raises(ValueError, match=r"half precision destroys the tangent, pass float32 or float64\.$"):
            CALLS[name](samples, t.to(dtype))


@pytest.mark.parametrize("name", CALLS)
def test_times_of_another_shape_are_refused(name):
    """A number, a column or a wrong batch size of times would broadcast into nonsense and raises instead."""
    x, _, t = batch()
    for wrong in (t[0], t[:, None], t[:1], t[:-1]):
        with pytest.raises(ValueError, match=r"expected \(6,\): one time in radians per sample"):
            CALLS[name](x, wrong)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_results_are_at_least_float32(name, half):
    """Half-precision tensors give exactly the float32 result of their values, float64 stays float64."""
    x, _, t = batch()
    result = CALLS[name](x.to(half), t.float())
    assert result.dtype == torch.float32
    assert CALLS[name](x.float(), t.float()).dtype == torch.float32
    assert CALLS[name](x, t).dtype == torch.float64


def test_half_precision_network_output_is_computed_in_float32():
    """A bf16 F or sample loses nothing beyond its own rounding."""
    x_0, z, t = batch(torch.bfloat16)
    t = t.float()
    for function in (denoise, predict_noise):
        expected = function(z.float(), x_0.float(), t, SIGMA_DATA)
        torch.testing.assert_close(function(z, x_0, t, SIGMA_DATA), expected, rtol=0, atol=0)
    for function in (interpolate, velocity):
        torch.testing.assert_close(function(x_0, z, t), function(x_0.float(), z.float(), t), rtol=0, atol=0)
