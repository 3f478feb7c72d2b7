"""The norm of the gradients, as the optimizer would see them without clipping."""

import contextlib

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from sclightning.parallelize import is_sharded


def gradients(trainer: L.Trainer, optimizer: Optimizer) -> list[Tensor]:
    """Gradients that an optimizer is about to use, without the loss scale of ``precision: 16-mixed``.

    Where the optimizer takes the scale out itself (``fused: true``), it is still in them when callbacks look. It is
    taken out here, and the scaler has then seen what is not finite.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        with contextlib.suppress(RuntimeError):  # a callback before this one has done it
            scaler.unscale_(optimizer)
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


class GradientNorm(L.Callback):
    """Logs ``gradient_norm``, the L2 norm of all gradients, after averaging over devices and before clipping.

    A loss scale (``precision: 16-mixed``) is taken out.

    To be listed before :class:`~sclightning.callbacks.finite_gradients.FiniteGradients`: a gradient that is not finite
    then shows as such. Nothing waits for the device: the logger reads the number when it writes.
    """

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Log the norm, on the device."""
        norm = torch.nn.utils.get_total_norm(gradients(trainer, optimizer))
        pl_module.log("gradient_norm", norm.full_tensor() if is_sharded(norm) else norm)
