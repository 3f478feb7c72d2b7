"""The norm of the gradients, as the optimizer would see them without clipping."""

import lightning as L
import torch
from torch.optim import Optimizer

from sclightning.parallelize import is_sharded


class GradientNorm(L.Callback):
    """Logs ``gradient_norm``, the L2 norm of all gradients, after averaging over devices and before clipping.

    A loss scale (``precision: 16-mixed``) is taken out.

    To be listed before :class:`~sclightning.callbacks.finite_gradients.FiniteGradients`: a gradient that is not finite
    then shows as such. Nothing waits for the device: the logger reads the number when it writes.
    """

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Log the norm, on the device."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        pl_module.log("gradient_norm", norm.full_tensor() if is_sharded(norm) else norm)
