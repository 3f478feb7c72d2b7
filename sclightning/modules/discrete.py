"""Discrete-time consistency models: training and distillation on a grid (App. E, Alg. 2), and ECT."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from sclightning.discrete import (
    discrete_consistency_loss,
    ect_loss,
    ect_previous_time,
    grid,
    previous_time,
    step_probabilities,
)
from sclightning.modules.consistency import ConsistencyDistillation, ConsistencyModel, ConsistencyTraining
from sclightning.objective import ConsistencyLoss
from sclightning.sampling import T_MAX
from sclightning.trigflow import interpolate


class DiscreteTime(ConsistencyModel):
    """Algorithm 2: Algorithm 1 with a finite step of a grid for its JVP; nothing is differentiated forwards.

    Args:
        backbone: Network ``F = net(x, t, label=None, guidance=None)``.
        N: Steps of the grid; the paper tries 256 to 4096.
        sigma_min: Smallest noise level of the grid, whose time is then set to 0.
        sigma_max: Largest noise level of the grid.
        rho: Exponent of the grid's spacing.
        options: Those of the class in continuous time; ``shared_primal`` has no effect.
    """

    def __init__(
        self,
        backbone: nn.Module,
        N: int = 1024,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        **options: Any,
    ):
        super().__init__(backbone, **options)
        times, sigmas = grid(N, self.sigma_data, sigma_min, sigma_max, rho)
        # Not buffers: a run in bf16-true would round them.
        self._grid, self._cumulative = times, step_probabilities(sigmas, self.P_mean, self.P_std).cumsum(0)

    def on_train_batch_start(self, batch: Tensor | tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Nothing to look at: any network will do."""

    def draw_time(self, x_0: Tensor) -> Tensor:
        """Times (B,) of the grid, each as often as the log-normal proposal ends in the step before it."""
        self._grid, self._cumulative = self._grid.to(x_0.device), self._cumulative.to(x_0.device)
        u = torch.rand(len(x_0), dtype=torch.float64, device=x_0.device)
        step = torch.searchsorted(self._cumulative, u, right=True).clamp(max=len(self._cumulative) - 1)
        return self._grid[step + 1].float()

    def loss(
        self, x_0: Tensor, z: Tensor, t: Tensor, label: Tensor | None = None, guidance: Tensor | None = None
    ) -> ConsistencyLoss:
        """Discrete consistency loss and tangent norm per sample (Alg. 2), each of shape (B,)."""
        x_t = interpolate(x_0, z, t)
        dx_t = self.velocity(x_t, x_0, z, t, label, guidance)
        return discrete_consistency_loss(
            lambda x, t: self(x, t, label, guidance),
            self.adaptive_weight(t),
            x_t,
            dx_t,
            t,
            previous_time(self._grid, t),
            self.sigma_data,
            r=self.tangent_warmup,
            c=self.c,
            normalization=self.normalization,
        )

    _one_pass = False


class DiscreteConsistencyDistillation(DiscreteTime, ConsistencyDistillation):
    """dsCD: the step is one of DDIM with the teacher, guided or not."""


class DiscreteConsistencyTraining(DiscreteTime, ConsistencyTraining):
    r"""dsCT: the step ends at :math:`\cos s\,x_0 + \sin s\,z`. The paper gives dsCD; this follows as sCT from sCD."""


class EasyConsistencyTuning(ConsistencyModel):
    r"""ECT (Geng et al. 2024) in TrigFlow: a pseudo-Huber distance over the step, and steps that shrink by stages.

    It starts as a diffusion model, all of whose steps end at the data, and tends to continuous time. No adaptive
    weight, no normalised tangent. Its numbers are not in the paper, which compares with it in App. E.3.

    Args:
        backbone: Network ``F = net(x, t, label=None)``.
        teacher_checkpoint: Checkpoint of a diffusion model of the same network to start from, averaged weights; from
            scratch if not given.
        sigma_data: Standard deviation of the data.
        P_mean: Mean of the log-normal noise levels in training.
        P_std: Standard deviation of the log-normal noise levels in training.
        q: Factor by which a stage's relative steps are shorter than those of the stage before.
        stage_steps: Optimizer steps of a stage; ECT has eight in a run.
        k: Strength of the adjustment that makes relative steps longer at small noise.
        b: Its decay with the noise level.
        c: Constant of the pseudo-Huber distance.
        times: Sampling times in radians, decreasing; one entry is one step.
        optimizer: Optimizer of the network.
        lr_scheduler: Learning-rate schedule, stepped with the optimizer.
        seed: Seed of training noise and of samples.
        compile: Compile the loss; arguments of :func:`torch.compile` (``mode``, …) or true for its defaults.
        channels_last: Memory format of the images in a convolutional network.
        activation_checkpointing: Keep only the inputs of the network's blocks, and compute the rest again in the
            backward pass.
    """

    def __init__(
        self,
        backbone: nn.Module,
        teacher_checkpoint: str | None = None,
        sigma_data: float = 0.5,
        P_mean: float = -1.1,
        P_std: float = 2.0,
        q: float = 2.0,
        stage_steps: int = 50_000,
        k: float = 8.0,
        b: float = 1.0,
        c: float = 0.0,
        times: Sequence[float] = (T_MAX, 1.1),
        optimizer: OptimizerCallable = torch.optim.RAdam,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        compile: bool | dict[str, Any] = False,
        channels_last: bool = False,
        activation_checkpointing: bool = False,
    ):
        super().__init__(
            backbone, teacher_checkpoint, sigma_data, P_mean, P_std, "none", c, times, None, False, optimizer,
            lr_scheduler, seed, compile, channels_last, activation_checkpointing,
        )  # fmt: skip
        self.save_hyperparameters(ignore=["backbone", "optimizer", "lr_scheduler"])
        self.q, self.stage_steps, self.k, self.b = q, stage_steps, k, b
        self.adaptive_weight = None  # DDP waits for the gradient of every parameter
        # A tensor, so that a compiled step is not compiled again for each stage.
        self.register_buffer("gap", torch.tensor(1 / q), persistent=False)

    def on_train_batch_start(self, batch: Tensor | tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Set the relative step of the stage, :math:`q^{-1-n}` in stage n = 0, 1, …."""
        self.gap.fill_(self.q ** -(1 + self.global_step // self.stage_steps))

    def loss(
        self, x_0: Tensor, z: Tensor, t: Tensor, label: Tensor | None = None, guidance: Tensor | None = None
    ) -> ConsistencyLoss:
        """ECT's loss and the tangent's norm per sample, each of shape (B,)."""
        s = ect_previous_time(t, self.sigma_data, self.gap, self.k, self.b)
        x_t = interpolate(x_0, z, t)
        dx_t = self.velocity(x_t, x_0, z, t, label, guidance)
        return ect_loss(lambda x, t: self(x, t, label), x_t, dx_t, t, s, self.sigma_data, c=self.c)

    velocity = ConsistencyTraining.velocity

    _one_pass = False
