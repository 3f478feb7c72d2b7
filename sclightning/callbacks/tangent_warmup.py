"""Tangent warm-up (Sec. 4.2)."""

from typing import Any

import lightning as L

from sclightning.callbacks.tangent import TangentCallback


class TangentWarmup(TangentCallback):
    r"""Fades in the unstable half of the tangent: :math:`r = \min(1, step/H)` (Alg. 1).

    Args:
        steps: Optimizer steps H until the whole tangent counts (the paper: 10,000).
    """

    def __init__(self, steps: int = 10_000):
        if steps < 1:
            raise ValueError(f"TangentWarmup has steps={steps}; give 1 or more, or leave the callback out.")
        self.steps = steps

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the module's ``tangent_warmup`` for this step."""
        pl_module.tangent_warmup.fill_(min(1.0, trainer.global_step / self.steps))
