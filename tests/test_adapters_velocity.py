"""The adapter against the closed forms of each kind of network and against its own denoiser, in float64."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from sclightning.adapters import EDM, FlowMatching, VariancePreserving, VelocityAdapter
from sclightning.trigflow import denoise, predict_noise

ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
RATIO = np.sqrt((1 - ALPHAS_CUMPROD) / ALPHAS_CUMPROD)
T = torch.linspace(0.004, math.atan(160), 40, dtype=torch.float64)
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


class Net(nn.Module):
    """A network of (x', time, label) that is nonlinear in all of them."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(12, 12, generator=generator, dtype=torch.float64) / 3)

    def forward(self, x, time, label=None):
        h = x.flatten(1) @ self.weight + torch.sin(time)[:, None]
        if label is not None:
            h = h + label[:, None]
        return torch.tanh(h).view_as(x)


def column(t):
    return t[:, None, None, None]


@pytest.fixture
def batch():
    """Images x_t / sigma_data, one per time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(T), 3, 2, 2, generator=generator, dtype=torch.float64)


def source(prediction, sigma_data):
    """Adapter, and a function of x that gives the network's input x', output, alpha and sigma by the source's maps."""
    net, t = Net(), column(T)
    sigma = sigma_data * t.tan()  # of x_0 + sigma eps
    if prediction == "edm":
        process, level = EDM(), (1 / (1 + 0 * sigma), sigma)
        time, c_in = sigma.log() / 4, 1 / (sigma**2 + sigma_data**2).sqrt()
    elif prediction == "flow":
        s = sigma / (1 + sigma)
        process, level, time, c_in = FlowMatching(), (1 - s, s), s, 1.0
    else:
        alpha = 1 / (1 + sigma**2).sqrt()
        process, level, c_in = VariancePreserving(ALPHAS_CUMPROD), (alpha, sigma * alpha), 1.0
        time = torch.from_numpy(np.interp(sigma.log().numpy(), np.log(RATIO), np.arange(1000.0)))
    adapter = VelocityAdapter(net, process, prediction, sigma_data)

    def run(x):
        # x_t = cos t x_0 + sin t sigma_data eps and x' = alpha x_0 + sigma eps: hence x' = alpha x_t / cos t
        x_source = level[0] * sigma_data * x / t.cos()
        return x_source, net(c_in * x_source, time.flatten()), *level

    return adapter, run


def closed_form(prediction, x, output, sigma_data):
    """F of docs/adapters.md."""
    t = column(T)
    cos, sin = t.cos(), t.sin()
    if prediction == "edm":
        return -output
    if prediction == "noise":
        return (output - sin * x) / cos
    if prediction == "data":
        return (cos * x - output / sigma_data) / sin
    if prediction == "v":
        norm = (cos**2 + sigma_data**2 * sin**2).sqrt()
        alpha, sigma = cos / norm, sigma_data * sin / norm
        return output / norm - alpha * sigma * (1 / sigma_data - sigma_data) * x
    assert prediction == "flow"
    s = sigma_data * sin / (cos + sigma_data * sin)
    x_flow = x * ((1 - s) ** 2 * sigma_data**2 + s**2).sqrt()
    return cos * (x_flow + (1 - s) * output) - sin / sigma_data * (x_flow - s * output)


def own_denoiser(prediction, x, output, alpha, sigma, sigma_data):
    """The estimate of x_0 as the source's paper defines it."""
    if prediction == "edm":
        c_skip, c_out = (
            sigma_data**2 / (sigma**2 + sigma_data**2),
            sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt(),
        )
        return c_skip * x + c_out * output
    return {
        "noise": (x - sigma * output) / alpha,
        "data": output,
        "v": alpha * x - sigma * output,
        "flow": x - sigma * output,
    }[prediction]


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
@pytest.mark.parametrize("prediction", ["edm", "noise", "data", "v", "flow"])
def test_adapter_is_the_closed_form_and_the_source_denoiser(batch, prediction, sigma_data):
    """At forty noise levels from sigma = 0.002 to 80 (at sigma_data 0.5)."""
    adapter, run = source(prediction, sigma_data)
    x_source, output, alpha, sigma = run(batch)
    F = adapter(batch, T)
    torch.testing.assert_close(F, closed_form(prediction, batch, output, sigma_data), **TOLERANCE)
    x_t = sigma_data * batch
    D = own_denoiser(prediction, x_source, output, alpha, sigma, sigma_data)
    torch.testing.assert_close(denoise(F, x_t, T, sigma_data), D, **TOLERANCE)
    # And with the data goes the noise: alpha x_0 + sigma eps = x'.
    noise = predict_noise(F, x_t, T, sigma_data) / sigma_data
    torch.testing.assert_close(alpha * D + sigma * noise, x_source, **TOLERANCE)


def test_published_special_cases(batch):
    """SANA-Sprint's Prop. 3.1 and rCM's wrapper for flow matching, and F = v, at sigma_data = 1."""
    t = column(T)
    adapter, run = source("flow", 1.0)
    x_flow, u, _, s = run(batch)
    sana = ((1 - 2 * s) * x_flow + (1 - 2 * s + 2 * s**2) * u) / (s**2 + (1 - s) ** 2).sqrt()
    torch.testing.assert_close(adapter(batch, T), sana, **TOLERANCE)
    x_0 = batch / (t.cos() + t.sin()) - t.sin() / (t.cos() + t.sin()) * u
    torch.testing.assert_close(adapter(batch, T), (t.cos() * batch - x_0) / t.sin(), **TOLERANCE)
    adapter, run = source("v", 1.0)
    torch.testing.assert_close(adapter(batch, T), run(batch)[1], **TOLERANCE)


def test_edm_in_float32_is_minus_its_output_to_the_bit():
    """No rounding of the formula reaches the images where the answer is the output itself."""
    torch.manual_seed(0)
    x, t = torch.randn(40, 3, 2, 2), T.float()
    net = Net().float()
    adapter = VelocityAdapter(net, EDM(), "edm", 0.5)
    levels = EDM()(t, 0.5)
    c_in_x = (levels.alpha.square() * 0.25 + levels.sigma.square()).sqrt().float()[:, None, None, None] * x
    assert torch.equal(adapter(x, t), -net(c_in_x, levels.time.float()))
    torch.testing.assert_close(c_in_x, x, rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_network(batch, dtype):
    """The network is shown half precision, its time and the formula stay float32."""
    seen = []

    class Spy(Net):
        def forward(self, x, time):
            seen.append((x.dtype, time.dtype))
            return super().forward(x, time.to(x.dtype)).to(dtype)

    adapter = VelocityAdapter(Spy(), FlowMatching(), "flow", 0.5)
    exact = VelocityAdapter(Net(), FlowMatching(), "flow", 0.5)(batch, T)
    F = adapter.to(dtype)(batch.float(), T.float())
    assert seen == [(dtype, torch.float32)] and F.dtype == torch.float32
    assert (F - exact).norm() / exact.norm() < 0.02


def test_conditions_are_passed_on(batch):
    """Labels where given, nothing where not."""
    adapter = VelocityAdapter(Net(), EDM(), "edm", 0.5)
    label = torch.arange(len(T)) % 3
    assert not torch.equal(adapter(batch, T, label), adapter(batch, T))
    torch.testing.assert_close(adapter(batch, T, 0 * label), adapter(batch, T))


@pytest.mark.parametrize("prediction", ["edm", "noise", "data", "v", "flow"])
def test_forward_mode_passes_the_adapter(batch, prediction):
    """The tangent of a student behind an adapter is right, in x and in t."""
    adapter, _ = source(prediction, 0.5)
    x, t = batch[:2], torch.tensor([0.71, 1.2], dtype=torch.float64)
    d_x, h = torch.randn_like(x), 1e-6
    _, J = torch.func.jvp(adapter, (x, t), (d_x, torch.ones_like(t)))
    expected = (adapter(x + h * d_x, t + h) - adapter(x - h * d_x, t - h)) / (2 * h)
    torch.testing.assert_close(J, expected, rtol=1e-4, atol=1e-4)


def test_compiled_forward_mode(batch):
    """Inside torch.compile too, the search in the table of steps included."""
    adapter, _ = source("noise", 0.5)
    x, t = batch[:2], torch.tensor([0.71, 1.2], dtype=torch.float64)
    tangents = torch.randn_like(x), torch.ones_like(t)

    def run(x, t, d_x, d_t):
        return torch.func.jvp(adapter, (x, t), (d_x, d_t))[1]

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, *tangents), run(x, t, *tangents))


def test_wrong_inputs_are_refused(batch):
    with pytest.raises(ValueError, match="no prediction 'score'; choose one of noise"):
        VelocityAdapter(Net(), EDM(), "score", 0.5)
    adapter = VelocityAdapter(Net(), EDM(), "edm", 0.5)
    with pytest.raises(ValueError, match="half precision"):
        adapter(batch, T.bfloat16())
    with pytest.raises(ValueError, match="one time in radians per sample"):
        adapter(batch, T[:1])
    with pytest.raises(ValueError, match=r"Net is called as net\(x, t, guidance=guidance\), which"):
        adapter(batch, T, guidance=T)


def test_weight_normalisation_reaches_the_network():
    """A wrapped network that forces its weights' norm does so; one that does not is left alone."""
    net, calls = Net(), []
    VelocityAdapter(net, EDM(), "edm", 0.5).normalize_weights()
    net.normalize_weights = lambda: calls.append(1)
    VelocityAdapter(net, EDM(), "edm", 0.5).normalize_weights()
    assert calls == [1]
