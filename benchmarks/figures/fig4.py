"""Fig. 4: norms of both terms of the tangent over t, for three ways to tell the network the time.

df/dt = ∇_x f · dx_t/dt + ∂_t f of diffusion models whose time embedding gets EDM's c_noise = log(σ_d tan t), positional
or Fourier of scale 16, or TrigFlow's c_noise = t, positional. The trajectory is each model's own, dx_t/dt = σ_d F. L2
norm per sample, averaged.

Usage: python benchmarks/figures/fig4.py [--scale full] [--plot]
"""

import math
from collections.abc import Sequence

import common
import numpy as np
import torch
from torch import Tensor, nn

from sclightning.trigflow import denoise, interpolate

SAMPLES = 64
TIMES = [*np.linspace(0.005, 0.2, 20).tolist(), *np.linspace(0.2, 1.55, 55)[1:].tolist(), 1.5645]


class NoiseLevel(nn.Module):
    """Embedding of EDM's c_noise = log(σ_d tan t) in place of t, positional or Fourier."""

    def __init__(self, positional: nn.Module, sigma_data: float, fourier_scale: float | None = None):
        super().__init__()
        self.positional, self.sigma_data = positional, sigma_data
        frequencies = None if fourier_scale is None else fourier_scale * torch.randn(positional.half)
        self.register_buffer("frequencies", frequencies)  # in the checkpoint: they are part of the network

    def forward(self, t: Tensor) -> Tensor:
        """Embed times (B,)."""
        c_noise = (self.sigma_data * t.tan()).log()
        if self.frequencies is None:
            return self.positional(c_noise)
        angles = 2 * math.pi * c_noise[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def edm_positional(cli):
    net = cli.model.backbone
    net.time_embedding = NoiseLevel(net.time_embedding, cli.model.sigma_data)


def edm_fourier(cli):
    net = cli.model.backbone
    net.time_embedding = NoiseLevel(net.time_embedding, cli.model.sigma_data, fourier_scale=16.0)


NETWORKS = {"EDM, positional": edm_positional, "EDM, Fourier (16)": edm_fourier, "TrigFlow, positional": None}


def terms(model, x_t: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms of df/dt along the model's own PF-ODE, each of the shape of ``x_t``."""
    sigma_data = model.sigma_data

    def f(x_t, t):
        return denoise(model(x_t / sigma_data, t, label), x_t, t, sigma_data)

    dx_t = sigma_data * model(x_t / sigma_data, t, label)
    _, along_x = torch.func.jvp(f, (x_t, t), (dx_t, torch.zeros_like(t)))
    _, along_t = torch.func.jvp(f, (x_t, t), (torch.zeros_like(x_t), torch.ones_like(t)))
    return along_x, along_t


@torch.no_grad()
def norms(run: common.Run, times: Sequence[float]) -> dict[str, list[float]]:
    """Mean L2 norm of both terms at each time, over held-out images with the same noise at all times."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = run.cli.model.eval().to(device)
    model.load_state_dict(torch.load(run.checkpoint, weights_only=False)["state_dict"])
    images, label = run.cli.datamodule.split("held_out").__getitems__(list(range(SAMPLES)))
    x_0, label = run.cli.datamodule.from_uint8(images.to(device)), label.to(device)
    z = model.sigma_data * torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(device)
    found = {"grad_x": [], "d_t": []}
    for time in times:
        t = torch.full((len(x_0),), time, device=device)
        for name, term in zip(found, terms(model, interpolate(x_0, z, t), t, label), strict=True):
            found[name].append(term.flatten(1).norm(dim=1).mean().item())
    return found


def network(scale: str, name: str) -> dict:
    """Norms and distance of one of the networks, trained."""
    run = common.fit("teacher", scale, edit=NETWORKS[name])
    return {**norms(run, TIMES), "fd": common.measure(run)[0]["fd"], "run": run.record}


def compute(scale: str, seeds: Sequence[int]) -> dict:
    """Train the three diffusion models and take the norms."""
    found = common.each(network, [(scale, name) for name in NETWORKS])
    result = {"t": TIMES, "networks": dict(zip(NETWORKS, found, strict=True))}
    return result | {"label": common.label(common.fit("teacher", scale)), "samples": SAMPLES}


def plot(result: dict, figure) -> None:
    """Both norms over t, one panel a network, as in the paper."""
    figure.set_size_inches(8, 2.4)
    for axes, (name, network) in zip(figure.subplots(1, 3), result["networks"].items(), strict=True):
        axes.plot(result["t"], network["grad_x"], label=r"$\|\nabla_x f \cdot dx_t/dt\|$")
        axes.plot(result["t"], network["d_t"], label=r"$\|\partial_t f\|$")
        axes.set(title=f"{name}\ndistance {network['fd']:.2f}", xlabel="t", yscale="log")
        axes.legend()


def rows(result: dict) -> list[str]:
    """Distance, and the largest of both norms below t = 0.2, over all t and at the start of sampling."""
    table = []
    for name, network in result["networks"].items():
        early = [i for i, t in enumerate(result["t"]) if t <= 0.2]
        cells = [[max(norms[i] for i in early), max(norms), norms[-1]] for norms in (network["grad_x"], network["d_t"])]
        table.append(common.row(name, network["fd"], *cells))
    return table


if __name__ == "__main__":
    common.main("fig4", __doc__, compute, plot, rows)
