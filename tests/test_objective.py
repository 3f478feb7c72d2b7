r"""The objective against closed forms, and every usual way to get it wrong.

For Gaussian data N(mu, diag(s²)) all is known: x_t has mean cos t mu and variance
S(t)² = cos² t s² + sin² t sigma_data², and (x_t - cos t mu) / S(t) is constant along the PF-ODE, so that the exact
consistency function is f = mu + s (x_t - cos t mu) / S(t). The three dimensions have three variances, none sigma_data².
"""

import math

import pytest
import torch
from torch import Tensor

from sclightning.objective import (
    clip,
    consistency_loss,
    finite_mean,
    forward_jvp,
    normalize,
    partial_jvps,
    partial_terms,
    tangent,
    tangent_terms,
    weighted_loss,
)
from sclightning.trigflow import denoise, interpolate, velocity

SIGMA_DATA = 0.5
MEAN = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64)
STD = torch.tensor([0.2, 0.6, 1.1], dtype=torch.float64)
D = 3


def column(t: Tensor) -> Tensor:
    return t[:, None]


def marginal_std(t: Tensor) -> Tensor:
    return ((column(t.cos()) * STD) ** 2 + (column(t.sin()) * SIGMA_DATA) ** 2).sqrt()


def pf_ode(x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Exact solution of the PF-ODE from t to s."""
    return column(s.cos()) * MEAN + marginal_std(s) / marginal_std(t) * (x_t - column(t.cos()) * MEAN)


def pf_velocity(x_t: Tensor, t: Tensor) -> Tensor:
    """Exact velocity, the time derivative of :func:`pf_ode`."""
    cos, sin = column(t.cos()), column(t.sin())
    scale = cos * sin * (SIGMA_DATA**2 - STD**2) / marginal_std(t) ** 2
    return scale * (x_t - cos * MEAN) - sin * MEAN


def diffusion_network(x: Tensor, t: Tensor) -> Tensor:
    """The F whose PF-ODE is exact."""
    return pf_velocity(SIGMA_DATA * x, t) / SIGMA_DATA


def consistency_network(x: Tensor, t: Tensor) -> Tensor:
    """The F whose consistency function is exact: (cos t x - f) / (sin t sigma_data)."""
    x_t = SIGMA_DATA * x
    return (column(t.cos()) * x_t - pf_ode(x_t, t, torch.zeros_like(t))) / (column(t.sin()) * SIGMA_DATA)


def any_network(seed: int = 0, dropout: float = 0.0):
    """A smooth random network (x, t) -> F and its parameters."""
    generator = torch.Generator().manual_seed(seed)
    W_1, W_2 = (
        torch.randn(n, m, generator=generator, dtype=torch.float64).div(n**0.5).requires_grad_()
        for n, m in [(D + 2, 16), (16, D)]
    )

    def network(x, t):
        hidden = torch.tanh(torch.cat([x, column(t.sin()), column(2 * t)], dim=1) @ W_1)
        return torch.nn.functional.dropout(hidden, dropout, training=True) @ W_2

    return network, [W_1, W_2]


def batch(n: int = 16):
    """Points x_t of the marginal, their exact velocity and their times."""
    t = torch.linspace(0.03, 1.5, n, dtype=torch.float64)
    noise = torch.randn(n, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x_t = column(t.cos()) * MEAN + marginal_std(t) * noise
    return x_t, pf_velocity(x_t, t), t


def zeros(t: Tensor) -> Tensor:
    return torch.zeros_like(t)


def consistency_function(network, x_t: Tensor, t: Tensor) -> Tensor:
    return denoise(network(x_t / SIGMA_DATA, t), x_t, t, SIGMA_DATA)


def derivative_of_f(network, x_t: Tensor, dx_t: Tensor, t: Tensor) -> Tensor:
    """Total time derivative df/dt along the PF-ODE by forward-mode differentiation of f itself."""
    return torch.func.jvp(lambda x, t: consistency_function(network, x, t), (x_t, t), (dx_t, torch.ones_like(t)))[
        1
    ].detach()


def tangent_of(network, x_t: Tensor, dx_t: Tensor, t: Tensor, r: float | Tensor = 1.0) -> Tensor:
    F, J = forward_jvp(network, x_t, dx_t, t, SIGMA_DATA)
    return tangent(F.detach(), J, x_t, dx_t, t, SIGMA_DATA, r)


def relative(ours, exact) -> float:
    """Relative error of a list of tensors."""
    ours, exact = (torch.cat([x.flatten() for x in tensors]) for tensors in (ours, exact))
    return ((ours - exact).norm() / exact.norm()).item()


WRONG = [
    "sigma_d twice on J",
    "sigma_d missing on J",
    "sigma_d twice on F",
    "sigma_d missing on F",
    "no cos*sin on the JVP",
    "sign flipped",
    "r on x_t only",
    "r on J only",
    "prior weight twice",
    "1/D twice",
    "EMA target",
]


def assembled_loss(network, w_phi, x_t, dx_t, t, r=1.0, wrong=None, average=None) -> Tensor:
    """Algorithm 1 by hand without normalisation, right or wrong in one way; ``average`` is an EMA of the network."""
    cos, sin = column(t.cos()), column(t.sin())
    scale = torch.ones_like(cos) if wrong == "no cos*sin on the JVP" else cos * sin
    target = average if wrong == "EMA target" else network
    inputs, tangents = (x_t / SIGMA_DATA, t), (scale * dx_t, scale[:, 0] * SIGMA_DATA)
    F, (F_minus, J) = network(*inputs), torch.func.jvp(target, inputs, tangents)
    F_minus, J = F_minus.detach(), J.detach()
    sigma_F = {"sigma_d twice on F": SIGMA_DATA**2, "sigma_d missing on F": 1.0}.get(wrong, SIGMA_DATA)
    sigma_J = {"sigma_d twice on J": SIGMA_DATA, "sigma_d missing on J": 1 / SIGMA_DATA}.get(wrong, 1.0)
    r_x, r_J = {"r on x_t only": (r, 1.0), "r on J only": (1.0, r)}.get(wrong, (r, r))
    g = -(cos**2) * (sigma_F * F_minus - dx_t) - r_x * cos * sin * x_t - r_J * sigma_J * J
    if wrong == "sign flipped":
        g = -g
    if wrong == "prior weight twice":
        g = g / (SIGMA_DATA * column(t.tan()))
    size = D**2 if wrong == "1/D twice" else D
    return w_phi.exp() / size * (F - F_minus - g).square().sum(1) - w_phi


# The closed forms of this file


def test_gaussian_velocity_is_exact():
    """Its PF-ODE solution has this derivative, and its denoiser is the posterior mean of the Gaussian."""
    x_t, v_t, t = batch()
    h = 1e-5
    derivative = (pf_ode(x_t, t, t + h) - pf_ode(x_t, t, t - h)) / (2 * h)
    torch.testing.assert_close(v_t, derivative, rtol=0, atol=1e-9)
    cos = column(t.cos())
    posterior = MEAN + cos * STD**2 / marginal_std(t) ** 2 * (x_t - cos * MEAN)
    torch.testing.assert_close(consistency_function(diffusion_network, x_t, t), posterior, rtol=0, atol=1e-14)
    end = pf_ode(x_t, t, zeros(t))
    torch.testing.assert_close(consistency_function(consistency_network, x_t, t), end, rtol=0, atol=1e-14)


# The tangent (Eq. 6)


@pytest.mark.parametrize("shared_primal", [True, False])
def test_jvp_is_the_rearranged_derivative(shared_primal):
    """J = cos t sin t sigma_data dF/dt, by central differences on the trajectory, and F is the network's output."""
    network, _ = any_network()
    x_t, dx_t, t = batch()
    F, J = forward_jvp(network, x_t, dx_t, t, SIGMA_DATA, shared_primal=shared_primal)
    h = 1e-5
    ahead, behind = (network(pf_ode(x_t, t, s) / SIGMA_DATA, s) for s in (t + h, t - h))
    expected = column(t.cos() * t.sin()) * SIGMA_DATA * (ahead - behind) / (2 * h)
    torch.testing.assert_close(J, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(F, network(x_t / SIGMA_DATA, t), rtol=0, atol=1e-15)
    assert F.requires_grad and not J.requires_grad


def test_tangent_is_cosine_times_the_derivative_of_the_consistency_function():
    """For any network g = cos t df/dt along the PF-ODE, df/dt taken of f itself by autodiff and central differences."""
    network, _ = any_network()
    x_t, dx_t, t = batch()
    g = tangent_of(network, x_t, dx_t, t)
    torch.testing.assert_close(g, column(t.cos()) * derivative_of_f(network, x_t, dx_t, t), rtol=0, atol=1e-14)
    h = 1e-5
    ahead, behind = (consistency_function(network, pf_ode(x_t, t, s), s) for s in (t + h, t - h))
    torch.testing.assert_close(g, column(t.cos()) * (ahead - behind) / (2 * h), rtol=0, atol=1e-9)


def test_tangent_vanishes_at_the_exact_consistency_function():
    """The exact solution is a fixed point: g = 0 there, but not at the diffusion model that training starts from."""
    x_t, dx_t, t = batch()
    assert tangent_of(consistency_network, x_t, dx_t, t).abs().max() < 1e-12
    assert tangent_of(diffusion_network, x_t, dx_t, t).abs().max() > 0.1


def test_tangent_is_bit_for_bit_what_it_was_before_its_terms_had_a_function():
    """In float32, with the warm-up as a number and as a tensor."""
    F, J, x_t, dx_t = torch.randn(4, 32, 3, generator=torch.Generator().manual_seed(2))
    t = torch.linspace(0.01, 1.56, 32)
    cos, sin = column(t.cos()), column(t.sin())
    for r in (0.0, 0.3, torch.tensor(0.7), 1.0):
        expected = -(cos**2) * (0.7 * F - dx_t) - r * (cos * sin * x_t + J)
        assert torch.equal(tangent(F, J, x_t, dx_t, t, 0.7, r), expected)


def test_terms_of_the_tangent():
    """The halves are the tangent at r = 0 and what r = 1 adds; at a diffusion model the first is zero."""
    network, _ = any_network()
    x_t, dx_t, t = batch()
    first, second = tangent_terms(*forward_jvp(network, x_t, dx_t, t, SIGMA_DATA), x_t, dx_t, t, SIGMA_DATA)
    flow, whole = (tangent_of(network, x_t, dx_t, t, r) for r in (0.0, 1.0))
    torch.testing.assert_close(first, flow, rtol=0, atol=0)
    torch.testing.assert_close(second, whole - flow, rtol=0, atol=1e-14)
    F, J = forward_jvp(diffusion_network, x_t, dx_t, t, SIGMA_DATA)
    assert tangent_terms(F, J, x_t, dx_t, t, SIGMA_DATA)[0].abs().max() < 1e-15


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_parts_of_the_tangent_along_x_and_t(dropout):
    """Cosine times the two derivatives of f itself (Fig. 4); they add up to g; one F, one dropout mask."""
    network, _ = any_network(dropout=dropout)
    x_t, dx_t, t = batch()
    torch.manual_seed(3)
    F, J_x, J_t = partial_jvps(network, x_t, dx_t, t, SIGMA_DATA)
    parts = partial_terms(F, J_x, J_t, x_t, dx_t, t, SIGMA_DATA)
    expected = []
    for tangents in ((dx_t, zeros(t)), (torch.zeros_like(x_t), torch.ones_like(t))):
        torch.manual_seed(3)
        f = torch.func.jvp(lambda x, t: consistency_function(network, x, t), (x_t, t), tangents)[1]
        expected.append(column(t.cos()) * f.detach())
    torch.testing.assert_close(parts, tuple(expected), rtol=0, atol=1e-14)
    torch.manual_seed(3)
    g = tangent_of(network, x_t, dx_t, t)
    torch.testing.assert_close(sum(parts), g, rtol=0, atol=1e-14)
    torch.manual_seed(3)
    torch.testing.assert_close(F, network(x_t / SIGMA_DATA, t).detach(), rtol=0, atol=1e-15)
    assert not any(part.requires_grad for part in parts) and all(part.norm() > 0.1 for part in parts)


def test_equation_6():
    """The paper's df/dt = -cos t (sigma_data F - dx/dt) - sin t (x_t + sigma_data dF/dt) is what g encodes."""
    network, _ = any_network()
    x_t, dx_t, t = batch()
    F, dF = torch.func.jvp(network, (x_t / SIGMA_DATA, t), (dx_t / SIGMA_DATA, torch.ones_like(t)))
    cos, sin = column(t.cos()), column(t.sin())
    df = -cos * (SIGMA_DATA * F - dx_t) - sin * (x_t + SIGMA_DATA * dF)
    torch.testing.assert_close(df, derivative_of_f(network, x_t, dx_t, t), rtol=0, atol=1e-14)
    torch.testing.assert_close(cos * df, tangent_of(network, x_t, dx_t, t), rtol=0, atol=1e-14)


@pytest.mark.parametrize("r", [0.0, 0.3, 1.0, torch.tensor(0.3)])
def test_warmup_fades_in_sample_and_derivative_together(r):
    """Tangent warm-up r multiplies x_t and J alike and leaves the first half of Eq. 6 alone; r = 0 is flow matching."""
    network, _ = any_network()
    x_t, dx_t, t = batch()
    F, J = forward_jvp(network, x_t, dx_t, t, SIGMA_DATA)
    cos, sin = column(t.cos()), column(t.sin())
    first, second = -(cos**2) * (SIGMA_DATA * F - dx_t), -(cos * sin * x_t + J)
    torch.testing.assert_close(tangent_of(network, x_t, dx_t, t, r), (first + r * second).detach(), rtol=0, atol=1e-14)
    result = consistency_loss(network, zeros(t), x_t, dx_t, t, SIGMA_DATA, r=r, normalization="none")
    torch.testing.assert_close(result.loss, (first + r * second).square().mean(1), rtol=1e-12, atol=0)


def test_tangent_is_linear_in_the_velocity():
    """Means over velocities pass through g: on average the velocities of sCT give the gradient of sCD."""
    network, _ = any_network()
    x_t, dx_t, t = batch()
    difference = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ahead, behind = (tangent_of(network, x_t, dx_t + sign * difference, t) for sign in (1, -1))
    torch.testing.assert_close((ahead + behind) / 2, tangent_of(network, x_t, dx_t, t), rtol=0, atol=1e-14)
    assert (ahead - behind).abs().max() > 0.1


# The gradient (Eq. 8)


def gradient_error(loss_of, r: float) -> float:
    """Relative distance of a loss's gradient from the one that the paper derives.

    At r = 1 that is (2/D) grad E[w f_theta^T df-/dt] with the prior weight w = 1/(sigma_data tan t), at r = 0 that of
    flow matching weighted by cos² t: (2/D) grad E[cos² t F_theta^T (sigma_data F- - dx/dt)].
    """
    network, parameters = any_network()
    average, _ = any_network(seed=5)
    x_t, dx_t, t = batch()
    f, F = consistency_function(network, x_t, t), network(x_t / SIGMA_DATA, t)
    if r == 1.0:
        inner = (f * derivative_of_f(network, x_t, dx_t, t)).sum(1) / (SIGMA_DATA * t.tan())
    else:
        inner = t.cos() ** 2 * (F * (SIGMA_DATA * F.detach() - dx_t)).sum(1)
    exact = torch.autograd.grad(2 / D * inner.mean(), parameters)
    loss = loss_of(network, zeros(t), x_t, dx_t, t, r, average)
    return relative(torch.autograd.grad(loss.mean(), parameters), exact)


@pytest.mark.parametrize("shared_primal", [True, False])
@pytest.mark.parametrize("r", [0.0, 1.0])
def test_gradient_of_the_loss(r, shared_primal):
    """The gradient of Eq. 8 at w_phi = 0 is (2/D) grad E[w f_theta^T df-/dt]: prior weight, 1/D and sign included."""

    def loss(network, w_phi, x_t, dx_t, t, r, average):
        options = {"r": r, "normalization": "none", "shared_primal": shared_primal}
        return consistency_loss(network, w_phi, x_t, dx_t, t, SIGMA_DATA, **options).loss

    assert gradient_error(loss, r) < 1e-13


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_variant_has_another_gradient(wrong):
    """Each usual mistake fails the check of :func:`test_gradient_of_the_loss`.

    It is the only check for "prior weight twice", "1/D twice" and "EMA target", which keep the fixed point g = 0 and
    change weights, scale and the way there. Mistakes in r show at r = 0.
    """
    r = 0.0 if wrong.startswith("r on") else 1.0

    def loss(*args):
        return assembled_loss(*args[:6], wrong=wrong, average=args[6])

    assert gradient_error(loss, r) > 0.1


@pytest.mark.parametrize("shared_primal", [True, False])
def test_loss_and_gradients_equal_the_hand_assembled_expression(shared_primal):
    """Nothing in g or F- carries gradient: all gradients are those of Algorithm 1 with both written as constants."""
    network, parameters = any_network()
    x_t, dx_t, t = batch()
    w_phi = torch.linspace(-1, 2, len(t), dtype=torch.float64, requires_grad=True)
    options = {"r": 0.7, "normalization": "none", "shared_primal": shared_primal}
    ours = consistency_loss(network, w_phi, x_t, dx_t, t, SIGMA_DATA, **options).loss
    by_hand = assembled_loss(network, w_phi, x_t, dx_t, t, r=0.7)
    torch.testing.assert_close(ours, by_hand, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss.mean(), [*parameters, w_phi]) for loss in (ours, by_hand)]
    for our, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(our, exact, rtol=1e-11, atol=1e-14)


# Training


def quadrature():
    """Points and weights for means over the proposal N(-1, 1.4²) with the exact first two moments of each marginal."""
    tau = torch.linspace(-4, 4, 33, dtype=torch.float64)
    weight, t = torch.exp(-(tau**2) / 2).repeat(2), torch.atan((1.4 * tau - 1).exp() / SIGMA_DATA).repeat(2)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(len(tau))
    return column(t.cos()) * MEAN + column(sign) * marginal_std(t), t, weight / weight.sum()


def trained_error(loss_of, exact, rate: float = 0.75, steps: int = 100) -> float:
    """Train by plain gradient descent from F = 0, return the final error of F relative to ``exact``.

    The model is affine in x, with coefficients that are linear in per-dimension functions of t: the exact solution's
    two and sin t, orthonormalised together so that gradient descent is fast.
    """
    x_t, t, weight = quadrature()
    dx_t, x = pf_velocity(x_t, t), x_t / SIGMA_DATA

    def features(x, t):
        offset = exact(torch.zeros_like(x), t)
        slope = exact(torch.ones_like(x), t) - offset
        basis = torch.stack([offset, slope, column(t.sin()).expand_as(x)], dim=-1)
        return torch.cat([basis, basis * x[..., None]], dim=-1)

    triangular = torch.linalg.qr((weight.sqrt()[:, None, None] * features(x, t)).transpose(0, 1)).R
    orthonormal = torch.linalg.inv(triangular)
    theta = torch.zeros(D, 6, dtype=torch.float64, requires_grad=True)

    def network(x, t):
        return torch.einsum("bdk,dkl,dl->bd", features(x, t), orthonormal, theta)

    for step in range(steps):
        loss = loss_of(network, zeros(t), x_t, dx_t, t, step / steps)
        (gradient,) = torch.autograd.grad((weight * loss).sum(), theta)
        with torch.no_grad():
            theta -= rate * gradient
    with torch.no_grad():
        difference, size = ((weight.sqrt() * t.cos())[:, None] * a for a in (network(x, t) - exact(x, t), exact(x, t)))
    return (difference.norm() / size.norm()).item()


def test_training_reaches_the_exact_consistency_function():
    """Gradient descent on the objective converges to the one function that it is made for."""

    def loss(network, w_phi, x_t, dx_t, t, progress):
        return consistency_loss(network, w_phi, x_t, dx_t, t, SIGMA_DATA, normalization="none").loss

    assert trained_error(loss, consistency_network) < 1e-3


def test_training_at_zero_warmup_reaches_the_diffusion_model():
    """At r = 0 the same training converges to the exact velocity instead."""

    def loss(network, w_phi, x_t, dx_t, t, progress):
        return consistency_loss(network, w_phi, x_t, dx_t, t, SIGMA_DATA, r=0.0, normalization="none").loss

    assert trained_error(loss, diffusion_network, rate=3.0, steps=200) < 1e-3


@pytest.mark.parametrize(("normalization", "rate"), [("l2", 0.1), ("rms", 0.1), ("clip", 0.75)])
def test_training_with_a_treated_tangent_reaches_the_same_function(normalization, rate):
    """Normalisation and clipping change the way, not the goal; the warm-up of the first half neither."""

    def loss(network, w_phi, x_t, dx_t, t, progress):
        options = {"r": min(1.0, 2 * progress), "normalization": normalization}
        return consistency_loss(network, w_phi, x_t, dx_t, t, SIGMA_DATA, **options).loss

    assert trained_error(loss, consistency_network, rate=rate, steps=150) < 1e-2


@pytest.mark.parametrize("wrong", WRONG[:8])
def test_wrong_variant_does_not_reach_the_exact_solution(wrong):
    """The same training with a mistake in the loss ends far away or diverges; mistakes in r show at r = 0."""
    warmup = wrong.startswith("r on")

    def loss(network, w_phi, x_t, dx_t, t, progress):
        return assembled_loss(network, w_phi, x_t, dx_t, t, r=0.0 if warmup else 1.0, wrong=wrong)

    error = trained_error(loss, diffusion_network, rate=3.0) if warmup else trained_error(loss, consistency_network)
    assert math.isnan(error) or error > 0.2


# Normalisation, clipping, weight


def images(dtype=torch.float64):
    """Tangents (B, C, H, W) of very different sizes, and times."""
    g = torch.randn(4, 2, 3, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    scale = torch.tensor([1e-3, 0.1, 1.0, 100.0], dtype=torch.float64).view(-1, 1, 1, 1)
    return (scale * g).to(dtype), torch.tensor([0.1, 0.7, 1.2, 1.5], dtype=dtype)


@pytest.mark.parametrize("c", [0.1, 0.5])
@pytest.mark.parametrize(("norm", "size"), [("l2", 1.0), ("rms", 30.0)])
def test_normalisation_closed_form(norm, size, c):
    """The result is g / (|g| + c) with the L2 norm of a sample, or that over the root of its number of elements."""
    g, _ = images()
    for ours, sample in zip(normalize(g, c, norm), g, strict=True):
        length = math.sqrt(sample.square().sum().item() / size)
        torch.testing.assert_close(ours, sample / (length + c), rtol=1e-13, atol=0)


def test_normalisation_defaults():
    """The paper's c = 0.1, and the L2 norm."""
    g, _ = images()
    torch.testing.assert_close(normalize(g), normalize(g, 0.1, "l2"), rtol=0, atol=0)
    torch.testing.assert_close(normalize(torch.zeros_like(g)), torch.zeros_like(g), rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["l2", "rms"])
def test_normalisation_is_per_sample(norm):
    """A sample's result does not depend on its batch."""
    g, _ = images()
    alone = torch.cat([normalize(sample[None], 0.1, norm) for sample in g])
    torch.testing.assert_close(normalize(g, 0.1, norm), alone, rtol=1e-14, atol=0)


@pytest.mark.parametrize("limit", [1.0, 0.3])
def test_clipping_bounds_the_derivative(limit):
    """df/dt = g / cos t ends in [-limit, limit] elementwise with its sign, and what was inside is not touched."""
    g, t = images()
    cos = t.cos().view(-1, 1, 1, 1)
    clipped = clip(g, t) if limit == 1.0 else clip(g, t, limit)
    inside = (g / cos).abs() <= limit
    assert inside.any() and not inside.all()
    torch.testing.assert_close(clipped[inside], g[inside], rtol=0, atol=0)
    torch.testing.assert_close((clipped / cos)[~inside], limit * g[~inside].sign(), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("normalization", "treat"),
    [
        ("none", lambda g, t: g),
        ("l2", lambda g, t: g / (g.norm(dim=1, keepdim=True) + 0.2)),
        ("rms", lambda g, t: g / (g.norm(dim=1, keepdim=True) / D**0.5 + 0.2)),
        ("clip", lambda g, t: torch.minimum(torch.maximum(g, -column(t.cos())), column(t.cos()))),
    ],
)
def test_loss_with_each_normalisation(normalization, treat):
    """The loss is e^w |g|²/D - w of the treated g per sample, tangent_norm the root mean square of the raw one."""
    network, parameters = any_network()
    x_t, dx_t, t = batch()
    w_phi = torch.linspace(-1, 2, len(t), dtype=torch.float64)
    result = consistency_loss(network, w_phi, x_t, dx_t, t, SIGMA_DATA, c=0.2, normalization=normalization)
    raw = tangent_of(network, x_t, dx_t, t)
    g = treat(raw, t)
    assert normalization == "none" or relative([g], [raw]) > 0.1
    assert result.loss.shape == t.shape
    torch.testing.assert_close(result.loss, w_phi.exp() * g.square().sum(1) / D - w_phi, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(result.tangent_norm, raw.square().sum(1).div(D).sqrt(), rtol=1e-12, atol=0)
    assert not result.tangent_norm.requires_grad
    F = network(x_t / SIGMA_DATA, t)
    expected = torch.autograd.grad(((F - F.detach() - g).square().sum(1) / D * w_phi.exp()).mean(), parameters)
    assert relative(torch.autograd.grad(result.loss.mean(), parameters), expected) < 1e-12


def test_defaults_of_the_loss():
    """Without options: full tangent, L2 norm, c = 0.1."""
    network, _ = any_network()
    x_t, dx_t, t = batch()
    explicit = {"r": 1.0, "c": 0.1, "normalization": "l2", "shared_primal": True}
    default = consistency_loss(network, zeros(t), x_t, dx_t, t, SIGMA_DATA)
    torch.testing.assert_close(default, consistency_loss(network, zeros(t), x_t, dx_t, t, SIGMA_DATA, **explicit))


@pytest.mark.parametrize("normalization", ["L2", "RMS", "layer"])
def test_unknown_normalisation_is_refused(normalization):
    """A misspelt normalisation raises instead of training with another one."""
    network, _ = any_network()
    x_t, dx_t, t = batch()
    with pytest.raises(ValueError, match=normalization):
        consistency_loss(network, zeros(t), x_t, dx_t, t, SIGMA_DATA, normalization=normalization)


def test_weighted_loss_closed_form():
    """e^w / D |residual|² - w of every sample on its own."""
    residual, _ = images()
    w_phi = torch.tensor([0.0, -1.0, 3.4, 0.5], dtype=torch.float64)
    loss = weighted_loss(residual, w_phi)
    assert loss.shape == (4,)
    for i in range(4):
        expected = math.exp(w_phi[i]) / 30 * residual[i].square().sum().item() - w_phi[i].item()
        assert loss[i].item() == pytest.approx(expected, rel=1e-13)


def test_optimal_weight():
    """The mean loss is stationary and smallest where e^w / D E|residual|² = 1: w = -log of the mean square."""
    residual, _ = images()
    optimum = -residual.square().mean().log()
    w = optimum.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(weighted_loss(residual, w.expand(4)).mean(), w)
    assert abs(gradient.item()) < 1e-12
    for shift in (-0.1, 0.1):
        worse = weighted_loss(residual, (optimum + shift).expand(4)).mean()
        assert worse > weighted_loss(residual, optimum.expand(4)).mean()


# Dropout and precision


def test_dropout_masks_are_shared():
    """One mask for F, F- and J in both modes: J is its derivative, the residual exactly -g, the loss the same."""
    network, parameters = any_network(dropout=0.5)
    x_t, dx_t, t = batch()

    def seeded(x, t):
        torch.manual_seed(3)
        return network(x, t)

    h, results = 1e-5, []
    ahead, behind = (seeded(pf_ode(x_t, t, s) / SIGMA_DATA, s) for s in (t + h, t - h))
    expected = column(t.cos() * t.sin()) * SIGMA_DATA * (ahead - behind) / (2 * h)
    for shared_primal in (True, False):
        torch.manual_seed(3)
        F, J = forward_jvp(network, x_t, dx_t, t, SIGMA_DATA, shared_primal=shared_primal)
        torch.testing.assert_close(F, seeded(x_t / SIGMA_DATA, t), rtol=0, atol=1e-15)
        torch.testing.assert_close(J, expected, rtol=0, atol=1e-9)
        options = {"normalization": "none", "shared_primal": shared_primal}
        torch.manual_seed(3)
        loss, norm = consistency_loss(network, zeros(t), x_t, dx_t, t, SIGMA_DATA, **options)
        state = torch.get_rng_state()
        torch.testing.assert_close(loss, norm**2, rtol=1e-14, atol=0)
        results.append((loss, *torch.autograd.grad(loss.mean(), parameters), state))
    for one_pass, two_passes in zip(*results, strict=True):
        torch.testing.assert_close(one_pass, two_passes, rtol=1e-12, atol=1e-15)
    torch.manual_seed(4)
    other = consistency_loss(network, zeros(t), x_t, dx_t, t, SIGMA_DATA, normalization="none").loss
    assert relative([other], [loss]) > 0.1


@pytest.mark.parametrize("shared_primal", [True, False])
def test_half_precision_data_and_network(shared_primal):
    """From bf16 data through a bf16 network, times stay float32 and g and the loss are computed in float32."""
    t = torch.tensor([0.1, 0.7, 1.4])
    x_0, z = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight, seen = torch.ones((), dtype=torch.bfloat16, requires_grad=True), []

    def network(x, t):
        seen.append((x.dtype, t.dtype))
        return torch.tanh(x.bfloat16() * t.view(-1, 1, 1, 1).bfloat16()) * weight

    x_t, dx_t = interpolate(x_0, z, t), velocity(x_0, z, t)
    F, J = forward_jvp(network, x_t, dx_t, t, SIGMA_DATA, shared_primal=shared_primal)
    result = consistency_loss(network, torch.zeros(3), x_t, dx_t, t, SIGMA_DATA, shared_primal=shared_primal)
    assert set(seen) == {(torch.float32, torch.float32)}
    assert {a.dtype for a in (F, J, *result)} == {torch.float32}
    result.loss.mean().backward()
    assert weight.grad.isfinite()


@pytest.mark.parametrize("shared_primal", [True, False])
def test_half_precision_sample(shared_primal):
    """Even if x_t itself is bf16, F and J come back in float32, not rounded to it."""
    t = torch.tensor([0.1, 0.7, 1.4])
    x_t, dx_t = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    F, J = forward_jvp(
        lambda x, t: torch.sin(x.float() * column(t)), x_t, dx_t, t, SIGMA_DATA, shared_primal=shared_primal
    )
    assert (F.dtype, J.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_times_are_refused(dtype):
    """The objective refuses half-precision times in one sentence, whatever the precision of x."""
    network, _ = any_network()
    x_t, dx_t, t = batch()
    with pytest.raises(ValueError, match="half precision destroys the tangent"):
        consistency_loss(network, zeros(t), x_t, dx_t, t.to(dtype), SIGMA_DATA)


# Samples that are not finite


def test_loss_of_finite_samples_is_bit_for_bit_the_plain_formula():
    """Values and gradients, for a number of samples that is no power of two."""
    residual, w_phi = torch.randn(13, 5, 3, generator=torch.Generator().manual_seed(4)), torch.linspace(-1, 2, 13)
    leaves = [v.clone().requires_grad_() for v in (residual, w_phi) for _ in range(2)]
    loss = weighted_loss(leaves[0], leaves[2])
    expected = leaves[3].exp() * leaves[1].square().flatten(1).mean(1) - leaves[3]
    assert torch.equal(loss, expected) and torch.equal(finite_mean(loss), expected.mean())
    finite_mean(loss).backward()
    expected.mean().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad) and torch.equal(leaves[2].grad, leaves[3].grad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
@pytest.mark.parametrize("place", ["tangent", "output", "weight"])
def test_a_sample_that_is_not_finite_has_no_gradient(bad, place):
    """Zero to the last bit, though the square's own derivative is not; the others as if it were not in the batch."""
    g, F = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    w_phi, keep = torch.linspace(-1, 1, 5, dtype=torch.float64), torch.tensor([0, 1, 3, 4])
    if place == "weight":
        w_phi[2] = {-math.inf: math.nan}.get(bad, bad)  # e^-inf is a weight, of a loss of +inf
    else:
        (g if place == "tangent" else F)[2, 1] = bad
    F, w_phi = F.requires_grad_(), w_phi.requires_grad_()
    loss = weighted_loss(F - F.detach() - g, w_phi) if place == "tangent" else weighted_loss(F - g, w_phi)
    assert loss[keep].isfinite().all() and loss[2].isnan()
    mean = finite_mean(loss)
    found = torch.autograd.grad(mean, (F, w_phi))
    assert (found[0][2] == 0).all() and found[1][2] == 0
    F_, w_ = F[keep].detach().requires_grad_(), w_phi[keep].detach().requires_grad_()
    expected = weighted_loss(F_ - F_.detach() - g[keep] if place == "tangent" else F_ - g[keep], w_).mean()
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close([f[keep] for f in found], [*torch.autograd.grad(expected, (F_, w_))])


def test_mean_of_nothing_is_not_a_number():
    """Zero would look like a run that is well."""
    assert finite_mean(torch.tensor([math.nan, math.inf])).isnan()
    assert finite_mean(torch.tensor([math.nan, 3.0, 5.0])) == 4
