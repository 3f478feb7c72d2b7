"""Noising processes: the signal-to-noise ratio and the time shown, against the definitions of their papers."""

import math

import numpy as np
import pytest
import torch

from sclightning.adapters import EDM, FlowMatching, VariancePreserving
from sclightning.adapters.process import time_span

T = torch.tensor([1e-3, 0.02, 0.4, 0.9, 1.3, 1.55, math.atan(160)], dtype=torch.float64)
ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
PROCESSES = [EDM(), VariancePreserving(ALPHAS_CUMPROD), FlowMatching()]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("sigma_data", [1.0, 0.5, 0.3])
def test_signal_to_noise_ratio_is_that_of_the_arc(process, sigma_data):
    """The ratio sigma / alpha = sigma_data tan t, for data of any standard deviation."""
    levels = process(T, sigma_data)
    torch.testing.assert_close(levels.sigma / levels.alpha, sigma_data * T.tan(), rtol=1e-13, atol=0)


def test_levels_are_on_their_process():
    """EDM's input has unit variance, the second preserves variance, flow matching is a line; known times."""
    edm = EDM()(T, 0.5)
    torch.testing.assert_close((0.5 * edm.alpha) ** 2 + edm.sigma**2, torch.ones_like(T), rtol=1e-14, atol=0)
    torch.testing.assert_close(edm.time, (0.5 * T.tan()).log() / 4, rtol=1e-13, atol=1e-15)
    vp = VariancePreserving(ALPHAS_CUMPROD)(T, 0.5)
    torch.testing.assert_close(vp.alpha**2 + vp.sigma**2, torch.ones_like(T), rtol=1e-14, atol=0)
    flow = FlowMatching(time_scale=1000)(T, 0.5)
    torch.testing.assert_close(flow.alpha + flow.sigma, torch.ones_like(T), rtol=1e-14, atol=0)
    torch.testing.assert_close(flow.time, 1000 * flow.sigma, rtol=1e-14, atol=0)
    # The paper trail of SANA-Sprint: sigma_data absorbed into the data.
    absorbed = FlowMatching()(T, 1.0)
    torch.testing.assert_close(absorbed.time, T.sin() / (T.sin() + T.cos()), rtol=1e-14, atol=0)


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_discrete_steps_are_interpolated_in_log_snr(sigma_data):
    """Step k at step k's noise level; between, linear in log SNR as numpy interpolates; at the ends, the ends."""
    process = VariancePreserving(ALPHAS_CUMPROD)
    ratio = np.sqrt((1 - ALPHAS_CUMPROD) / ALPHAS_CUMPROD)
    levels = process(torch.from_numpy(np.arctan(ratio / sigma_data)), sigma_data)
    torch.testing.assert_close(levels.time, torch.arange(1000.0, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(levels.alpha, torch.from_numpy(ALPHAS_CUMPROD).sqrt(), rtol=1e-12, atol=0)
    between = np.exp(np.random.default_rng(0).uniform(np.log(ratio[0]), np.log(ratio[-1]), 50))
    expected = torch.from_numpy(np.interp(np.log(between), np.log(ratio), np.arange(1000.0)))
    time = process(torch.from_numpy(np.arctan(between / sigma_data)), sigma_data).time
    torch.testing.assert_close(time, expected, rtol=0, atol=1e-8)
    ends = process(torch.tensor([1e-5, 1.5707], dtype=torch.float64), sigma_data).time
    assert ends.tolist() == [0, 999]


def test_zero_terminal_snr():
    """A schedule that ends in pure noise has a finite table, and its last step is shown there."""
    process = VariancePreserving([0.99, 0.5, 0.1, 0.0])
    assert process(torch.tensor([math.pi / 2]), 1.0).time.tolist() == [3]
    end = process.table.view(torch.float64)[-1].item()
    assert end == pytest.approx(0.5 * math.log((1 - 2**-24) / 2**-24), rel=1e-12)


@pytest.mark.parametrize("wrong", [[0.5], [1.0, 0.5], [0.9, 0.9], [0.1, 0.9]])
def test_steps_that_do_not_decrease_are_refused(wrong):
    with pytest.raises(ValueError, match="decrease strictly"):
        VariancePreserving(wrong)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_ends_of_the_arc_are_finite(process):
    """At t = 0 and at float32's π/2, which is beyond π/2."""
    for value in process(torch.tensor([0.0, math.pi / 2]), 0.5):
        assert value.isfinite().all() and value.dtype == torch.float64


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_forward_mode_derivatives(process):
    """Forward-mode AD through the maps is the central difference (inside a segment of the interpolation)."""
    t, h = T[1:-1], 1e-7
    _, J = torch.func.jvp(lambda t: torch.stack(process(t, 0.5)), (t,), (torch.ones_like(t),))
    expected = (torch.stack(process(t + h, 0.5)) - torch.stack(process(t - h, 0.5))) / (2 * h)
    torch.testing.assert_close(J, expected, rtol=1e-5, atol=1e-6)
    assert (J != 0).all()


def test_half_precision_leaves_the_table_alone():
    """A module cast to bfloat16 shows the same times."""
    process, t = VariancePreserving(ALPHAS_CUMPROD), torch.tensor([0.7])
    assert torch.equal(VariancePreserving(ALPHAS_CUMPROD).bfloat16()(t, 0.5).time, process(t, 0.5).time)


def test_time_span():
    """How far the time moves, times its scale."""
    span = time_span(VariancePreserving(ALPHAS_CUMPROD), 0.5)
    ratio = np.log(np.sqrt((1 - ALPHAS_CUMPROD) / ALPHAS_CUMPROD))
    assert span == pytest.approx(np.diff(np.interp(np.log(0.5 * np.tan([0.02, 1.55])), ratio, np.arange(1000)))[0])
    assert time_span(VariancePreserving(ALPHAS_CUMPROD, time_scale=0.001), 0.5) == pytest.approx(span / 1000)
    low, high = (math.sin(t) / (math.sin(t) + math.cos(t)) for t in (0.02, 1.55))
    assert time_span(FlowMatching(1000), 1.0) == pytest.approx(1000 * (high - low))
    assert time_span(EDM(), 0.5) == pytest.approx(math.log(math.tan(1.55) / math.tan(0.02)) / 4)
