"""Where in time the tangent is large, and which of its terms it is (Sec. 4.1, Fig. 4)."""

import itertools
import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from sclightning.callbacks.gradient_norm import GradientNorm
from sclightning.callbacks.tangent import TangentCallback
from sclightning.modules.consistency import ConsistencyModel
from sclightning.objective import partial_jvps, partial_terms, tangent_terms
from sclightning.trigflow import interpolate

TERMS = {
    "norm": "g, the tangent before normalisation",
    "velocity": "cos²t (σ_d F − dx_t/dt): the velocity's error",
    "derivative": "cos t sin t x_t + J: the half that warm-up fades in",
    "along_x": "cos t ∇f·dx_t/dt: g along x",
    "along_t": "cos t ∂f/∂t: g along t, by the time embedding",
}
"""Names of the logged norms and titles of their charts."""


class TangentMonitor(TangentCallback):
    r"""Logs the norm of the tangent and of its terms before normalisation, by time: ``tangent/<term>/t<from>-<to>``.

    Each is the root mean square over a sample's elements, averaged over the samples whose time is in the bin:
    of :math:`g = g_1 + r\,g_2`, of its halves :func:`~sclightning.objective.tangent_terms`, and of its parts along x
    and t, :func:`~sclightning.objective.partial_terms`. In TensorBoard the tab "Custom Scalars" has a chart for each
    term with a line per bin, and one for each bin with a line per term.

    Images, noise, times, labels, guidance, dropout masks and weights are those of the training step, and the step is
    none the wiser. (Of a model in discrete time it is the tangent in the limit of short steps, of sCD + VSD that under
    another dropout mask.) A measurement takes two forward-mode passes without gradient and one of the teacher, never
    compiled, about the time of one step. Bins without a finite sample are left out of it.

    Args:
        every_n_steps: Optimizer steps from one measurement to the next.
        bins: Number of bins of equal width in [0, π/2].
    """

    def __init__(self, every_n_steps: int = 100, bins: int = 8):
        if every_n_steps < 1 or bins < 1:
            raise ValueError(f"TangentMonitor has every_n_steps={every_n_steps}, bins={bins}; give 1 or more of each.")
        self.every_n_steps, self.bins = every_n_steps, bins
        self._batch: tuple[Any, int] | None = None
        self._last = -1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module without tangent, and one of several segments."""
        super().setup(trainer, pl_module, stage)
        if getattr(pl_module, "segments", 1) > 1:
            raise ValueError("TangentMonitor knows the tangent of one segment only; leave the callback out.")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Arrange the charts."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(self.layout(trainer))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the first batch of a step that is to be measured."""
        step = trainer.global_step
        if (step + 1) % self.every_n_steps == 0 and step != self._last and trainer.loggers:
            self._batch, self._last = (batch, batch_idx), step

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure: the warm-up is set, the step's activations are gone, the weights have not moved yet."""
        if self._batch is None:
            return
        (batch, batch_idx), self._batch = self._batch, None
        with trainer.precision_plugin.train_step_context():
            t, norms = tangent_norms(pl_module, batch, batch_idx)
        finite = norms.isfinite().all(1)
        index = (t * (2 / math.pi) * self.bins).long().clamp(0, self.bins - 1)
        rows = torch.cat([norms, torch.ones_like(norms[:, :1])], dim=1)[finite]
        sums = rows.new_zeros(self.bins, rows.shape[1]).index_add_(0, index[finite], rows)
        sums = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        values = {
            f"tangent/{term}/{label}": value / count
            for label, (*row, count) in zip(self.labels(), sums, strict=True)
            for term, value in zip(TERMS, row, strict=True)
            if count
        }
        for logger in trainer.loggers:
            # The number that Lightning logs the step's loss under; its callback of learning rates takes it too.
            logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def labels(self) -> list[str]:
        """Names of the bins, edges in radians."""
        edges = [math.pi / 2 * i / self.bins for i in range(self.bins + 1)]
        return [f"t{low:.2f}-{high:.2f}" for low, high in itertools.pairwise(edges)]

    def layout(self, trainer: L.Trainer) -> dict[str, dict[str, list]]:
        """Pages and charts of TensorBoard's tab "Custom Scalars", each chart a kind and expressions of tags."""
        step = {"tangent before normalisation, mean over times": ["Multiline", ["tangent_norm$"]]}
        if any(isinstance(callback, GradientNorm) for callback in trainer.callbacks):
            step["gradient before clipping"] = ["Multiline", ["gradient_norm$"]]
        return {
            "Steps": step,
            "Tangent by term, lines are times": {
                title: ["Multiline", [f"tangent/{term}/.*"]] for term, title in TERMS.items()
            },
            "Tangent by time, lines are terms": {
                label.replace("t", "t = "): ["Multiline", [f"tangent/.*/{label}$"]] for label in self.labels()
            },
        }


def tangent_norms(module: ConsistencyModel, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor]:
    """Times (B,) and norms (B, 5), in the order of :data:`TERMS`, of the tangent of the module's step for a batch."""
    with torch.no_grad(), module.draw(batch, batch_idx) as (x_0, z, t, label, guidance):
        x_t = interpolate(x_0, z, t)
        dx_t = module.velocity(x_t, x_0, z, t, label, guidance)
        F, J_x, J_t = partial_jvps(lambda x, t: module(x, t, label, guidance), x_t, dx_t, t, module.sigma_data)
        first, second = tangent_terms(F, J_x + J_t, x_t, dx_t, t, module.sigma_data)
        along_x, along_t = partial_terms(F, J_x, J_t, x_t, dx_t, t, module.sigma_data)
        terms = (first + module.tangent_warmup * second, first, second, along_x, along_t)
        return t, torch.stack([term.square().flatten(1).mean(1).sqrt() for term in terms], dim=1)
