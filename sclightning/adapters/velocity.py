r"""A pretrained network as a TrigFlow velocity, with no training (App. B).

Whatever a network predicts at :math:`x' = \alpha x_0 + \sigma\epsilon`, it implies an estimate of the data and one of
the unit noise, each linear in :math:`x'` and in the prediction. One formula makes the velocity of both, and divides by
neither :math:`\sin t` nor :math:`\cos t`:

.. math:: F = \cos t\,\hat\epsilon - \sin t\,\hat x_0/\sigma_d.

The closed forms per prediction (:math:`F = -F_{EDM}`, :math:`F = v` at :math:`\sigma_d = 1`, …) are in
``docs/adapters.md``.
"""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from sclightning.adapters.process import Levels
from sclightning.backbones.layers import check_conditions
from sclightning.trigflow import expand_time

Prediction = Literal["noise", "data", "v", "flow", "edm", "trigflow"]


def velocity_from_estimates(x_0: Tensor, noise: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    r"""Velocity :math:`F = \cos t\,\hat\epsilon - \sin t\,\hat x_0/\sigma_d` of unit variance.

    Args:
        x_0: Estimate of the data, shape (B, ...).
        noise: Estimate of the unit noise, shape (B, ...).
        t: Times in radians, shape (B,).
        sigma_data: Standard deviation of the data.
    """
    t = expand_time(t, x_0)
    return t.cos() * noise - t.sin() * x_0 / sigma_data


def estimates(
    prediction: Prediction, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, sigma_data: float
) -> tuple[Tensor, Tensor]:
    r"""Data :math:`\hat x_0` and unit noise :math:`\hat\epsilon` that a network's output implies.

    Args:
        prediction: What the network predicts: ``noise`` ε; ``data`` x_0; ``v`` = αε − σx_0; ``flow`` = ε − x_0; and at
            an input of unit variance ``edm``, the raw network of EDM and EDM2, or ``trigflow``, the velocity F.
        output: Its output, shape (B, ...).
        x: Its input :math:`\alpha x_0 + \sigma\epsilon`, shape (B, ...).
        alpha: Factor of the data, broadcasting against ``x``.
        sigma: Factor of the noise, broadcasting against ``x``.
        sigma_data: Standard deviation of the data.
    """
    match prediction:
        case "noise":
            return (x - sigma * output) / alpha, output
        case "data":
            return output, (x - alpha * output) / sigma
        case "v":
            norm = alpha**2 + sigma**2
            return (alpha * x - sigma * output) / norm, (sigma * x + alpha * output) / norm
        case "flow":
            return (x - sigma * output) / (alpha + sigma), (x + alpha * output) / (alpha + sigma)
        case "edm" | "trigflow":
            F = output if prediction == "trigflow" else -output
            cos = alpha * sigma_data
            return sigma_data * (cos * x - sigma * F), sigma * x + cos * F
    known = ", ".join(get_args(Prediction))
    raise ValueError(f"There is no prediction '{prediction}'; choose one of {known}.")


class VelocityAdapter(nn.Module):
    r"""A pretrained network behind the contract of a backbone, :math:`F = net(x, t, label, guidance)`.

    ``sigma_data`` is that of the data as the network knew them. A module around the adapter may be told another one:
    its data are then ``module.sigma_data / adapter.sigma_data`` times those.

    Args:
        network: ``output = network(x', time)``, called with ``label`` and ``guidance`` too where they are given.
        process: Its noising process: :class:`~sclightning.adapters.EDM`,
            :class:`~sclightning.adapters.VariancePreserving`, :class:`~sclightning.adapters.FlowMatching` or yours.
        prediction: What it predicts, see :func:`~sclightning.adapters.velocity.estimates`.
        sigma_data: Standard deviation of the data that it was trained on.
        provenance: Name, licence, SHA-256 and source of the weights where known; the network's own if not given.
    """

    def __init__(
        self,
        network: nn.Module,
        process: nn.Module,
        prediction: Prediction,
        sigma_data: float,
        provenance: dict | None = None,
    ):
        super().__init__()
        if prediction not in get_args(Prediction):
            estimates(prediction, *[torch.ones(1)] * 4, sigma_data)  # raises
        self.network, self.process, self.prediction, self.sigma_data = network, process, prediction, sigma_data
        self.provenance = dict(provenance or getattr(network, "provenance", {}))
        for name in ("in_channels", "resolution", "num_classes", "guidance"):  # what an export asks a backbone
            if hasattr(network, name):
                setattr(self, name, getattr(network, name))

    def forward(
        self, x: Tensor, t: Tensor, label: Tensor | Mapping[str, Tensor] | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        """Velocity of unit variance.

        Args:
            x: Noisy images of unit variance, shape (B, ...).
            t: Times in radians, shape (B,), float32 or float64.
            label: Class labels, int64 (B,), or what else the network is conditioned on, such as a dictionary of text
                embeddings.
            guidance: Guidance scale per sample, shape (B,), for a network that has an input for it.

        Returns:
            F in float32 or wider whatever the network's precision, shape of ``x``.

        Raises:
            ValueError: If the network has no argument for a condition that is given.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        expand_time(t, x)  # refuses times of another shape or of half precision
        levels = self.process(t, self.sigma_data)
        scale, from_x, from_output = (expand_time(c.to(wide), x) for c in self.coefficients(t, levels))
        dtype = next((p.dtype for p in self.network.parameters() if p.is_floating_point()), wide)
        conditions = {"label": label, "guidance": guidance}
        conditions = {name: value for name, value in conditions.items() if value is not None}
        if not torch.compiler.is_compiling():
            check_conditions(self.network, x, t, conditions)
        output = self.network((scale * x).to(dtype), levels.time.to(wide), **conditions)
        return from_x * x + from_output * output

    def coefficients(self, t: Tensor, levels: Levels) -> tuple[Tensor, Tensor, Tensor]:
        r"""Scale n, a and b of :math:`F(x, t) = a\,x + b\,net(n\,x, time)`, float64 (B,).

        The formulas are linear, so that their coefficients are their values at (1, 0) and (0, 1).
        """
        t, alpha, sigma = t.double(), levels.alpha, levels.sigma
        scale = (alpha.square() * self.sigma_data**2 + sigma.square()).sqrt()
        one, zero = torch.ones_like(scale), torch.zeros_like(scale)

        def F(output: Tensor, x: Tensor) -> Tensor:
            x_0, noise = estimates(self.prediction, output, x, alpha, sigma, self.sigma_data)
            return velocity_from_estimates(x_0, noise, t, self.sigma_data)

        return scale, F(zero, scale), F(one, zero)

    def normalize_weights(self) -> None:
        """Forced weight normalisation, where the network has one."""
        if hasattr(self.network, "normalize_weights"):
            self.network.normalize_weights()
