r"""NVIDIA's EDM and EDM2 networks as teachers, exactly as they were trained: :math:`F = -F_{EDM}`.

The networks of :mod:`sclightning.backbones` have the published architectures once ``double_norm`` is off, and
:math:`x_t/\sigma_d` is EDM's preconditioned input; only the time is to be shown as they know it, :math:`\tfrac14\ln
\sigma`, and EDM2's in Fourier features.
"""

import torch
from torch import Tensor, nn

from sclightning.adapters.process import EDM
from sclightning.adapters.velocity import VelocityAdapter
from sclightning.adapters.weights import provenance, read_state_dict
from sclightning.backbones import EDM2, DDPMpp

LICENCE = "CC-BY-NC-SA-4.0"


class FourierEmbedding(nn.Module):
    r"""EDM2's embedding of its time, :math:`\cos(f_k\,time + \varphi_k)` with fixed random frequencies and phases.

    Args:
        freqs: Angular frequencies, shape (channels,).
        phases: Phases in radians, shape (channels,).
    """

    def __init__(self, freqs: Tensor, phases: Tensor):
        super().__init__()
        # As integers, which a cast of the network to half precision leaves alone.
        self.register_buffer("table", torch.stack([freqs, phases]).double().view(torch.int64))

    def forward(self, time: Tensor) -> Tensor:
        """Embed times (B,) as (B, channels), of mean square 1/2."""
        freqs, phases = self.table.view(torch.float64).to(time.dtype)
        return (time[:, None] * freqs + phases).cos()


def load_edm(
    network: DDPMpp, weights: str | None, sigma_data: float = 0.5, name: str = "EDM", licence: str = LICENCE
) -> VelocityAdapter:
    """Make a teacher of a published EDM network of DDPM++ architecture (``edm-cifar10-32x32-*-vp``).

    Args:
        network: DDPM++ of its size with ``double_norm: false``; the default size is that of CIFAR-10.
        weights: Its state dict, ``.safetensors`` or ``.pt``; ``docs/adapters.md`` shows how to make one of the pickle.
            With None only the architecture.
        sigma_data: Standard deviation of the data that it was trained with.
        name: Name of the model in its provenance.
        licence: Licence of the weights.

    Raises:
        ValueError: If the weights are those of another network.
    """
    if weights is None:
        return VelocityAdapter(network, EDM(), "trigflow", sigma_data)
    _fill(network, network.load_edm(read_state_dict(weights), exact=True), set())
    return VelocityAdapter(network, EDM(), "trigflow", sigma_data, provenance([weights], name, licence))


def load_edm2(
    network: EDM2, weights: str | None, sigma_data: float = 0.5, name: str = "EDM2", licence: str = LICENCE
) -> VelocityAdapter:
    """Make a teacher of a published EDM2 network (``edm2-img512-*``, ``edm2-img64-*``).

    Args:
        network: EDM2 of its size with ``double_norm: false``; its time embedding is replaced by the published one.
        weights: Its state dict, ``.safetensors`` or ``.pt``; ``docs/adapters.md`` shows how to make one of the pickle.
            With None only the architecture.
        sigma_data: Standard deviation of the data that it was trained with.
        name: Name of the model in its provenance.
        licence: Licence of the weights.

    Raises:
        ValueError: If the weights are those of another network.
    """
    if weights is None:
        network.time_embedding = FourierEmbedding(*torch.zeros(2, network.time_linear.weight.shape[1]))
        return VelocityAdapter(network, EDM(), "trigflow", sigma_data)
    state = {key.removeprefix("unet."): value for key, value in read_state_dict(weights).items()}
    _fill(network, network.load_edm2(state, exact=True), {"time_linear.weight"})
    missing = {"emb_noise.weight", "emb_fourier.freqs", "emb_fourier.phases"} - state.keys()
    if missing or state["emb_noise.weight"].shape != network.time_linear.weight.shape:
        raise ValueError(f"{weights} has no time embedding of EDM2's; save the whole state dict, buffers included.")
    network.time_embedding = FourierEmbedding(state["emb_fourier.freqs"], state["emb_fourier.phases"])
    with torch.no_grad():
        network.time_linear.weight.copy_(state["emb_noise.weight"])
    return VelocityAdapter(network, EDM(), "trigflow", sigma_data, provenance([weights], name, licence))


def _fill(network: nn.Module, kept: list[str], expected: set[str]) -> None:
    """Refuse a network that the weights left gaps in."""
    if set(kept) - expected:
        raise ValueError(
            f"The published weights have no {sorted(set(kept) - expected)[0]}, so this would not be the published "
            "network; make it with double_norm: false and guidance: false."
        )
