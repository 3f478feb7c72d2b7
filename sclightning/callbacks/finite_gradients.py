"""EDM2's gradient sanitising, an option: the paper does not mention it."""

import lightning as L
import torch
from torch.optim import Optimizer

from sclightning.callbacks.gradient_norm import gradients
from sclightning.parallelize import is_sharded


class FiniteGradients(L.Callback):
    """Sets gradients that are not finite to zero before the optimizer sees them, and logs how many there were.

    A single NaN would otherwise enter the optimizer's moments and every average. With ``precision: 16-mixed`` the loss
    scaler skips such steps all the same. A number that stays above zero means that a run is broken, not that it was
    mended.
    """

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Count and replace, on the device."""
        grads = gradients(trainer, optimizer)
        bad = torch.stack([(~grad.isfinite()).sum() for grad in grads]).sum()
        for grad in grads:
            grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        pl_module.log("nonfinite_gradients", (bad.full_tensor() if is_sharded(bad) else bad).float())
