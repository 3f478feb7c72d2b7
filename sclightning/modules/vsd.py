"""Variational score distillation, alone or with sCD (App. C, Alg. 3)."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sclightning.backbones.layers import AdaptiveWeight
from sclightning.modules.base import _compiled
from sclightning.modules.consistency import ConsistencyDistillation
from sclightning.objective import finite_mean, weighted_loss
from sclightning.parallelize import checkpoint_blocks
from sclightning.sampling import T_MAX
from sclightning.trigflow import interpolate, sample_time, velocity
from sclightning.vsd import generate, score_difference, vsd_loss


class StudentLoss(NamedTuple):
    """What one evaluation of the student's losses yields; the first three per sample, shape (B,)."""

    loss: Tensor
    """Of VSD, and of sCD where that is asked for."""
    difference_norm: Tensor
    """Root mean square of the score difference; the quantity to watch."""
    tangent_norm: Tensor | None
    """That of sCD's tangent."""
    samples: Tensor
    """What the student made, detached, shape (B, C, H, W)."""


class VariationalScoreDistillation(ConsistencyDistillation):
    r"""VSD: a one-step student whose samples a second network, :math:`F_\varphi`, learns; with ``scd``, sCD + VSD.

    Both networks take a step at a time, with one optimizer: no parameter is in both losses, so that each moves as
    it would with an optimizer of its own. (Only a clipping by the norm of all gradients would tell the two apart.)
    :math:`F_\varphi` starts as the student and is in checkpoints; averages, samples and exports are the student's.

    Args:
        backbone: Network ``F = net(x, t, label=None, guidance=None)``.
        scd: Add the loss of :class:`~sclightning.modules.consistency.ConsistencyDistillation`, whose options, P_mean
            and P_std among them, are its.
        adaptive: Learn the weight :math:`w_\psi(t)` of VSD; it is 1 otherwise.
        lambda_vsd: Weight of VSD's loss beside that of sCD.
        vsd_P_mean: Mean of the log-normal noise levels at which the student's samples are judged.
        vsd_P_std: Standard deviation of these.
        fake_P_mean: Mean of the log-normal noise levels at which :math:`F_\varphi` is trained.
        fake_P_std: Standard deviation of these.
        times: Sampling times in radians, decreasing. VSD makes a generator of the first only; sCD + VSD has more.
        options: The others of :class:`~sclightning.modules.consistency.ConsistencyDistillation`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        scd: bool = False,
        adaptive: bool = True,
        lambda_vsd: float = 1.0,
        vsd_P_mean: float = 0.4,
        vsd_P_std: float = 2.0,
        fake_P_mean: float = -0.8,
        fake_P_std: float = 1.6,
        times: Sequence[float] = (T_MAX,),
        **options: Any,
    ):
        super().__init__(backbone, times=times, **options)
        self.scd, self.lambda_vsd = scd, lambda_vsd
        self.vsd_P_mean, self.vsd_P_std = vsd_P_mean, vsd_P_std
        self.fake_P_mean, self.fake_P_std = fake_P_mean, fake_P_std
        self.fake, self.fake_weight = copy.deepcopy(backbone), AdaptiveWeight()
        self.vsd_weight = AdaptiveWeight() if adaptive else None
        if not scd:
            self.adaptive_weight = None  # DDP waits for the gradient of every parameter

    def setup(self, stage: str) -> None:
        """As in the base class; the second network starts from the teacher's weights, too."""
        started = self._started
        super().setup(stage)
        if self._started and not started:
            self.fake.load_state_dict(self.backbone.state_dict())

    def configure_model(self) -> None:
        """As in the base class; both networks that train recompute their blocks if one does."""
        if self.activation_checkpointing:
            checkpoint_blocks(self.fake)
        super().configure_model()

    def on_train_batch_start(self, batch: Tensor | tuple[Tensor, Tensor], batch_idx: int) -> None:
        """As in the base class where there is a tangent."""
        if self.scd:
            super().on_train_batch_start(batch, batch_idx)

    def training_step(self, batch: Tensor | tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Sum of the student's loss and that of the second network, each averaged over one batch (Alg. 3)."""
        with self.draw(batch, batch_idx) as inputs:
            x_0, *_, label, guidance = inputs
            z_max, z_vsd, z_fake = self.sigma_data * torch.randn(3, *x_0.shape, device=x_0.device, dtype=x_0.dtype)
            t_vsd, t_fake = (
                sample_time(len(x_0), P_mean, P_std, self.sigma_data, device=x_0.device)
                for P_mean, P_std in ((self.vsd_P_mean, self.vsd_P_std), (self.fake_P_mean, self.fake_P_std))
            )
            self.fake.eval()  # it judges without dropout, as the teacher does, and learns with
            student = self._evaluate(*inputs, z_max, z_vsd, t_vsd)
            self.fake.train(self.training)
            evaluate = self.fake_loss if self.compile_options is None else self._compiled_fake_loss
            fake = finite_mean(evaluate(student.samples, z_fake, t_fake, label, guidance))
        loss = self._average(student.loss)
        report = {"loss": loss, "fake_loss": fake, "score_difference": finite_mean(student.difference_norm)}
        if student.tangent_norm is not None:
            report["tangent_norm"] = finite_mean(student.tangent_norm)
        self._report(**report)
        return loss + fake

    def loss(
        self,
        x_0: Tensor,
        z: Tensor,
        t: Tensor,
        label: Tensor | None,
        guidance: Tensor | None,
        z_max: Tensor,
        z_vsd: Tensor,
        t_vsd: Tensor,
    ) -> StudentLoss:
        """The student's loss per sample: VSD on what it makes of ``z_max``, plus sCD on the data ``x_0``."""
        samples = generate(lambda x, t: self(x, t, label, guidance), z_max, self.times[0], self.sigma_data)
        difference = score_difference(
            lambda x, t: self._call_guided(self.teacher, x, t, label, guidance),
            lambda x, t: self._call(self.fake, x, t, label, guidance),
            samples.detach(),
            z_vsd,
            t_vsd,
            self.sigma_data,
        )
        w_psi = torch.zeros_like(t_vsd) if self.vsd_weight is None else self.vsd_weight(t_vsd)
        loss, tangent_norm = self.lambda_vsd * vsd_loss(samples, difference, w_psi), None
        if self.scd:
            scd, tangent_norm = super().loss(x_0, z, t, label, guidance)
            loss = loss + scd
        return StudentLoss(loss, difference.square().flatten(1).mean(1).sqrt(), tangent_norm, samples.detach())

    def fake_loss(
        self, samples: Tensor, z: Tensor, t: Tensor, label: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        r"""Denoising loss of :math:`F_\varphi` on the student's samples, per sample (Eq. 4), shape (B,)."""
        F = self._call(self.fake, interpolate(samples, z, t) / self.sigma_data, t, label, guidance)
        return weighted_loss(self.sigma_data * F - velocity(samples, z, t), self.fake_weight(t))

    @functools.cached_property
    def _compiled_fake_loss(self) -> Callable:
        return _compiled(self.fake_loss, {"fullgraph": True, **self.compile_options}, self.channels_last)

    @functools.cached_property
    def _one_pass(self) -> bool:
        return super()._one_pass if self.scd else True

    def _normalize_weights(self) -> None:
        super()._normalize_weights()
        fake = getattr(self, "fake", None)  # not there yet when the base class is made
        if hasattr(fake, "normalize_weights"):
            with torch.no_grad():
                fake.normalize_weights()
