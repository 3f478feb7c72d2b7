"""The TrigFlow diffusion model, teacher of the consistency models (Sec. 3)."""

from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from sclightning.modules.base import TrigFlowModule
from sclightning.objective import weighted_loss
from sclightning.sampling import SOLVERS, karras_times
from sclightning.trigflow import interpolate, velocity


class TrigFlowDiffusion(TrigFlowModule):
    r"""Diffusion model :math:`\sigma_d F_\theta \approx \cos t\,z - \sin t\,x_0` (Eq. 4) with the adaptive weight.

    Args:
        backbone: Network ``F = net(x, t, label=None, guidance=None)``.
        sigma_data: Standard deviation of the data.
        P_mean: Mean of the log-normal noise levels in training.
        P_std: Standard deviation of the log-normal noise levels in training.
        label_dropout: Probability of training without the label, for classifier-free guidance.
        solver: Sampler: ``heun`` (DPM-Solver-2S), ``ddim`` or ``dpm_solver++`` (2M).
        steps: Sampler's steps; Heun evaluates the network ``2 * steps - 1`` times.
        guidance_scale: Guidance in sampling, classifier-free unless the backbone is a
            :class:`~sclightning.adapters.Guided` network; none if not given.
        optimizer: Optimizer of the network and the adaptive weight.
        lr_scheduler: Learning-rate schedule, stepped with the optimizer.
        seed: Seed of training noise and of samples.
        compile: Compile the loss as one function; arguments of :func:`torch.compile` (``mode``, ``fullgraph``, …) or
            true for its defaults.
        channels_last: Memory format of the images in a convolutional network.
        activation_checkpointing: Keep only the inputs of the network's blocks, and compute the rest again in the
            backward pass.
    """

    def __init__(
        self,
        backbone: nn.Module,
        sigma_data: float = 0.5,
        P_mean: float = -1.2,
        P_std: float = 1.2,
        label_dropout: float = 0.0,
        solver: Literal["heun", "ddim", "dpm_solver++"] = "heun",
        steps: int = 18,
        guidance_scale: float | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        compile: bool | dict[str, Any] = False,
        channels_last: bool = False,
        activation_checkpointing: bool = False,
    ):
        super().__init__(
            backbone, sigma_data, P_mean, P_std, optimizer, lr_scheduler, guidance_scale, seed, compile, channels_last,
            activation_checkpointing,
        )  # fmt: skip
        self.save_hyperparameters(ignore=["backbone", "optimizer", "lr_scheduler"])
        self.label_dropout, self.solver, self.steps = label_dropout, solver, steps

    takes_augment = True

    def training_step(self, batch: Tensor | tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Denoising loss of one batch, averaged; of ``(x_0, label, augment)`` the network is told ``augment``."""
        x_0, label = self._split(batch)
        augment = batch[2] if isinstance(batch, tuple | list) and len(batch) > 2 else None
        with self._draw(x_0, batch_idx) as (z, t):
            if label is not None and self.label_dropout > 0:
                if not isinstance(label, Tensor):
                    raise TypeError(
                        f"label_dropout needs labels in one tensor of class numbers, but the batch has a "
                        f"{type(label).__name__}; drop yours in the data module and set label_dropout to 0."
                    )
                label = label.masked_fill(torch.rand(len(label), device=label.device) < self.label_dropout, -1)
            loss = self._average(self._evaluate(x_0, z, t, label, None, augment))
        self._report(loss=loss)
        return loss

    def loss(
        self,
        x_0: Tensor,
        z: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        guidance: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Denoising loss per sample (Eq. 4), shape (B,)."""
        x_t, v_t = interpolate(x_0, z, t), velocity(x_0, z, t)
        F = self(x_t / self.sigma_data, t, label, guidance, augment)
        return weighted_loss(self.sigma_data * F - v_t, self.adaptive_weight(t))

    @property
    def nfe(self) -> int:
        """Network evaluations per sample, a guided one counted once as the paper does."""
        return 2 * self.steps - 1 if self.solver == "heun" else self.steps

    def sampler(self, noise: Tensor, label: Tensor | None) -> Tensor:
        """Solve the PF-ODE from unit noise (1, B, C, H, W)."""

        def F(x: Tensor, t: Tensor) -> Tensor:
            scale = None if self.guidance_scale is None else torch.full_like(t, self.guidance_scale)
            return self._call_guided(self.backbone, x, t, label, scale)

        times = karras_times(self.steps, self.sigma_data)
        return SOLVERS[self.solver](F, noise[0], times, self.sigma_data)
