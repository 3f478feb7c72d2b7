r"""Variational score distillation (App. C, Alg. 3) in TrigFlow: a one-step generator and a model of what it makes.

The generator is the consistency function at the start, :math:`g_\theta(z) = f_\theta(z, t_{max})`. A second network,
:math:`F_\varphi`, is a diffusion model of its samples. Where it differs from the teacher so do the two distributions:
with :math:`p_t` that of noisy data and :math:`q_t` that of noisy samples,

.. math:: F_{pretrain}(x_t/\sigma_d, t) - F_\varphi(x_t/\sigma_d, t)
   = \sigma_d \tan t\,\nabla \log\frac{q_t(x_t)}{p_t(x_t)}

for exact networks, and a sample that moves against it lowers the divergence of :math:`q_t` from :math:`p_t`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sclightning.objective import weighted_loss
from sclightning.trigflow import denoise, interpolate

Velocity = Callable[[Tensor, Tensor], Tensor]


def generate(network: Velocity, z: Tensor, t_max: float, sigma_data: float) -> Tensor:
    r"""Samples of one step, :math:`g_\theta(z) = \cos t\,z - \sin t\,\sigma_d F_\theta(z/\sigma_d, t)` at ``t_max``.

    With their gradient, the same as :func:`sclightning.sampling.consistency` makes in one step.

    Args:
        network: ``F(x, t)`` with labels and guidance bound.
        z: Noise of standard deviation ``sigma_data``, shape (B, ...).
        t_max: Start time in radians.
        sigma_data: Standard deviation of the data.
    """
    t = torch.full(z.shape[:1], t_max, dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
    return denoise(network(z / sigma_data, t), z, t, sigma_data)


@torch.no_grad()
def score_difference(
    pretrained: Velocity, fake: Velocity, x_0: Tensor, z: Tensor, t: Tensor, sigma_data: float
) -> Tensor:
    r"""Direction in which a sample is unlike the data, :math:`F_{pretrain} - F_\varphi` at its noisy version.

    Args:
        pretrained: The teacher ``F(x, t)``, guided or not.
        fake: Diffusion model of the generator's samples, ``F(x, t)``.
        x_0: The generator's samples, shape (B, ...).
        z: Noise of standard deviation ``sigma_data`` that they are given, shape (B, ...).
        t: Times in radians, shape (B,).
        sigma_data: Standard deviation of the data.

    Returns:
        Float32 or wider, without gradient, shape (B, ...).
    """
    x = interpolate(x_0, z, t) / sigma_data
    dtype = torch.promote_types(x.dtype, torch.float32)
    return pretrained(x, t).to(dtype) - fake(x, t).to(dtype)


def vsd_loss(x_0: Tensor, difference: Tensor, w_psi: Tensor) -> Tensor:
    r"""Loss whose gradient in the samples is :math:`\frac{2e^w}{D}(F_{pretrain} - F_\varphi)`, per sample (App. C, D).

    .. math:: \frac{e^{w_\psi(t)}}{D} \lVert g_\theta - g_{\theta^-} + F_{pretrain} - F_\varphi \rVert_2^2 - w_\psi(t)

    Its value is no measure of quality, the size of the difference is.

    Args:
        x_0: The generator's samples with their gradient, shape (B, ...).
        difference: From :func:`score_difference`, shape (B, ...).
        w_psi: Adaptive weight, shape (B,); zero for plain VSD.

    Returns:
        Shape (B,).
    """
    return weighted_loss(x_0 - x_0.detach() + difference, w_psi)
