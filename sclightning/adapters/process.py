r"""Noising processes of pretrained networks, :math:`x' = \alpha x_0 + \sigma\epsilon`, seen from TrigFlow's arc.

What identifies a point of one process with a point of another is the signal-to-noise ratio. At the time t of TrigFlow
every process here has :math:`\sigma/\alpha = \sigma_d\tan t`. A process is a module that maps (t, sigma_data) to
:class:`Levels`; one of your own needs no more than that.

Everything is float64: near t = π/2 float32 has no digits left for the logarithm of the noise level. The maps are smooth
under forward-mode AD, so that a student can sit behind them.

Source: Lu & Song, App. B (Eq. 29).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

TINY = 1e-7
"""Smallest cosine and sine: float32's π/2 lies beyond π/2, and no process has a time for no noise at all."""


class Levels(NamedTuple):
    """A process at the times of a batch, each float64 of shape (B,)."""

    alpha: Tensor
    """Factor of the data."""
    sigma: Tensor
    """Factor of the unit noise."""
    time: Tensor
    """What the network is shown as its time."""


class EDM(nn.Module):
    r"""EDM and EDM2 at the input of the network: :math:`c_{in}(x_0 + \sigma\epsilon)`, time :math:`\tfrac14\ln\sigma`.

    This input is :math:`x_t/\sigma_d` itself.

    Args:
        time_scale: Factor on the time shown; 1 is what the network was trained with.
    """

    def __init__(self, time_scale: float = 1.0):
        super().__init__()
        self.time_scale = time_scale

    def forward(self, t: Tensor, sigma_data: float) -> Levels:
        """Levels at times t, radians (B,), for data of standard deviation ``sigma_data``."""
        cos, sin = _cos_sin(t)
        return Levels(cos / sigma_data, sin, self.time_scale * 0.25 * (sigma_data * sin / cos).log())


class VariancePreserving(nn.Module):
    r"""Discrete-time diffusion (DDPM), :math:`\alpha = \sqrt{\bar\alpha_k}`, :math:`\sigma = \sqrt{1 - \bar\alpha_k}`.

    Between the steps k it was trained at, and at the exact α and σ of t, the network is shown the k that is linear in
    the log-SNR. Beyond the first and the last step k stays at the end.

    Args:
        alphas_cumprod: :math:`\bar\alpha_k` of the steps k = 0, 1, …, decreasing, as ``scheduler.alphas_cumprod`` of
            diffusers. A last entry of 0 (zero terminal SNR) counts as 2⁻²⁴.
        time_scale: Factor on the time shown; 1 is what the network was trained with.

    Raises:
        ValueError: If the entries do not decrease strictly within (0, 1).
    """

    def __init__(self, alphas_cumprod: Sequence[float], time_scale: float = 1.0):
        super().__init__()
        self.time_scale = time_scale
        with torch.device("cpu"):
            kept = torch.tensor([float(a) for a in alphas_cumprod], dtype=torch.float64).clamp_min(2.0**-24)
        if len(kept) < 2 or not (kept[0] < 1 and (kept.diff() < 0).all()):
            raise ValueError(
                f"alphas_cumprod has {len(kept)} entries that do not decrease strictly within (0, 1); give the "
                "cumulative products of 1 - beta, first step first."
            )
        # As integers, which a cast of the network to half precision leaves alone.
        self.register_buffer("table", (0.5 * ((1 - kept) / kept).log()).view(torch.int64), persistent=False)

    def forward(self, t: Tensor, sigma_data: float) -> Levels:
        """Levels at times t, radians (B,), for data of standard deviation ``sigma_data``."""
        cos, sin = _cos_sin(t)
        sin = sigma_data * sin
        norm = (cos.square() + sin.square()).sqrt()
        table, log_ratio = self.table.view(torch.float64), (sin / cos).log()
        after = torch.searchsorted(table, log_ratio.detach()).clamp(1, len(table) - 1)
        low, high = table[after - 1], table[after]
        step = (after - 1 + (log_ratio - low) / (high - low)).clamp(0, len(table) - 1)
        return Levels(cos / norm, sin / norm, self.time_scale * step)


class FlowMatching(nn.Module):
    r"""Flow matching or rectified flow, :math:`x' = (1 - s)\,x_0 + s\,\epsilon`, s from 0 (data) to 1 (noise).

    With ``sigma_data = 1`` it is the case in which the data were divided by their standard deviation, as the latents of
    Stable Diffusion 3 and SANA are.

    Args:
        time_scale: Factor on the time shown: 1 for s itself, 1000 for the transformers of diffusers.
    """

    def __init__(self, time_scale: float = 1.0):
        super().__init__()
        self.time_scale = time_scale

    def forward(self, t: Tensor, sigma_data: float) -> Levels:
        """Levels at times t, radians (B,), for data of standard deviation ``sigma_data``."""
        cos, sin = _cos_sin(t)
        sin = sigma_data * sin
        return Levels(cos / (cos + sin), sin / (cos + sin), self.time_scale * sin / (cos + sin))


def time_span(process: nn.Module, sigma_data: float) -> float:
    """How far the time that the network is shown moves from t = 0.02 to t = 1.55, in its own units."""
    with torch.no_grad():
        device = next(process.buffers(), torch.empty(0)).device
        time = process(torch.tensor([0.02, 1.55], dtype=torch.float64, device=device), sigma_data).time
    return math.fabs(time[1] - time[0])


def _cos_sin(t: Tensor) -> tuple[Tensor, Tensor]:
    t = t.double()
    return t.cos().clamp_min(TINY), t.sin().clamp_min(TINY)
