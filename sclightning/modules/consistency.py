"""Continuous-time consistency models: training (sCT) and distillation (sCD), Alg. 1."""

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from sclightning.adapters import Guided, check_forward_ad
from sclightning.backbones.layers import SegmentEmbedding
from sclightning.checkpoint import backbone_weights, mismatched, read_checkpoint
from sclightning.modules.base import TrigFlowModule
from sclightning.objective import ConsistencyLoss, Normalization, consistency_loss, finite_mean
from sclightning.provenance import merge, of_checkpoint, recorded
from sclightning.sampling import T_MAX, consistency
from sclightning.trigflow import interpolate, velocity


class ConsistencyModel(TrigFlowModule):
    r"""Algorithm 1 without its line that chooses :math:`dx_t/dt`: that is the whole difference of sCT and sCD.

    Raises:
        ValueError: If the sampling times do not decrease within 0 and π/2.
    """

    def __init__(
        self,
        backbone: nn.Module,
        teacher_checkpoint: str | None,
        sigma_data: float,
        P_mean: float,
        P_std: float,
        normalization: Normalization,
        c: float,
        times: Sequence[float],
        guidance_scale: float | None,
        shared_primal: bool,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        seed: int,
        compile: bool | dict[str, Any] = False,
        channels_last: bool = False,
        activation_checkpointing: bool = False,
    ):
        super().__init__(
            backbone, sigma_data, P_mean, P_std, optimizer, lr_scheduler, guidance_scale, seed, compile, channels_last,
            activation_checkpointing,
        )  # fmt: skip
        self.teacher_checkpoint = teacher_checkpoint
        self.normalization, self.c, self.shared_primal = normalization, c, shared_primal
        self.times = list(times)
        if not (self.times and all(a > b for a, b in itertools.pairwise([math.pi / 2 + 1e-6, *self.times, 0.0]))):
            raise ValueError(
                f"The sampling times are {self.times}; give radians that decrease, within 0 and π/2 (a noise level σ "
                "is at arctan(σ / sigma_data))."
            )
        self._forward_ad_checked = self._started = False
        # A tensor, so that a compiled step is not compiled again for each value.
        self.register_buffer("tangent_warmup", torch.tensor(1.0), persistent=False)

    def setup(self, stage: str) -> None:
        """Start from the teacher's averaged weights, unless this module was trained or loaded before.

        Raises:
            FileNotFoundError: If there is no teacher checkpoint.
            ValueError: If its network is not this one, a guidance embedding apart, or its ``sigma_data`` another.
        """
        super().setup(stage)
        if stage == "fit" and self.teacher_checkpoint is not None and not self._started:
            load_backbone(self.backbone, self.teacher_checkpoint, self.sigma_data)
            self._started = True

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """As in the base class; a fit goes on from these weights."""
        super().on_load_checkpoint(checkpoint)
        self._started = True

    def on_train_batch_start(self, batch: Tensor | tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Look at the first batch whether forward-mode AD passes the network and is right about it."""
        if self._forward_ad_checked:
            return
        self._forward_ad_checked = True
        with self.draw(batch, batch_idx) as (x_0, z, t, label, guidance):
            x = (interpolate(x_0, z, t) / self.sigma_data).to(self.dtype)
            compiled = self.compile_options is not None
            check_forward_ad(self.backbone, x, t, label, guidance, every_module=False, compiled=compiled)

    @contextmanager
    def draw(self, batch: Tensor | tuple[Tensor, Tensor], batch_idx: int) -> Iterator[tuple[Tensor | None, ...]]:
        """What the step of this batch evaluates, ``(x_0, z, t, label, guidance)``, and inside, its random state.

        The same however often it is asked for during the step, so that instruments see what the loss sees.
        """
        x_0, label = self._split(batch)
        with self._draw(x_0, batch_idx) as (z, t):
            yield x_0, z, t, label, self.draw_guidance(x_0)

    def training_step(self, batch: Tensor | tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Consistency loss of one batch, averaged (Alg. 1)."""
        with self.draw(batch, batch_idx) as inputs:
            loss, tangent_norm = self._evaluate(*inputs)
        loss = self._average(loss)
        self._report(loss=loss, tangent_norm=finite_mean(tangent_norm))
        return loss

    def loss(
        self, x_0: Tensor, z: Tensor, t: Tensor, label: Tensor | None = None, guidance: Tensor | None = None
    ) -> ConsistencyLoss:
        """Consistency loss and tangent norm per sample (Eq. 8), each of shape (B,)."""
        x_t = interpolate(x_0, z, t)
        dx_t = self.velocity(x_t, x_0, z, t, label, guidance)
        return consistency_loss(
            lambda x, t: self(x, t, label, guidance),
            self.adaptive_weight(t),
            x_t,
            dx_t,
            t,
            self.sigma_data,
            r=self.tangent_warmup,
            c=self.c,
            normalization=self.normalization,
            shared_primal=self._one_pass,
            start=self.start_time(t),
        )

    def start_time(self, t: Tensor) -> Tensor | None:
        """Times (B,) at which the trajectories from ``t`` end; not given if it is the data."""

    @functools.cached_property
    def _one_pass(self) -> bool:
        """Whether one pass gives output and tangent: as ``shared_primal`` says, unless that is not possible here."""
        reason = None
        if not self.shared_primal:
            reason = "as configured"
        elif self.activation_checkpointing:
            reason = "activation checkpointing cannot recompute a block under forward-mode AD"
        elif self.device_mesh is not None and torch.__version__ < (2, 13):
            reason = f"FSDP2 of torch {torch.__version__} has no forward-mode AD with gradients, that of 2.13 has"
        if reason is not None:
            eager = "" if self.compile_options is None else ", and the tangent's is not compiled"
            rank_zero_info(f"Output and tangent take two passes each step{eager}: {reason}.")
        return reason is None

    def draw_guidance(self, x_0: Tensor) -> Tensor | None:
        """Guidance scale per sample (B,) of a step; none here."""

    def velocity(
        self, x_t: Tensor, x_0: Tensor, z: Tensor, t: Tensor, label: Tensor | None, guidance: Tensor | None
    ) -> Tensor:
        r"""Velocity :math:`dx_t/dt` of the PF-ODE at ``x_t``, without gradient, shape of ``x_t``."""
        raise NotImplementedError(f"{type(self).__name__} does not define a velocity.")

    @property
    def nfe(self) -> int:
        """Network evaluations per sample, one a step."""
        return len(self.times)

    @property
    def _noise_draws(self) -> int:
        return len(self.times)

    def sampler(self, noise: Tensor, label: Tensor | None) -> Tensor:
        """Consistency sampling at ``times`` from unit noise (len(times), B, C, H, W)."""
        return consistency(self._conditioned(noise, label), noise, self.times, self.sigma_data)

    def _conditioned(self, noise: Tensor, label: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """The network ``F(x, t)`` at labels and the guidance scale of sampling, for noise (n, B, C, H, W)."""
        guidance = None
        if self.guidance_scale is not None:
            guidance = noise.new_full((noise.shape[1],), self.guidance_scale)
        return lambda x, t: self(x, t, label, guidance)


class ConsistencyTraining(ConsistencyModel):
    r"""sCT: the velocity is the sample's own, :math:`dx_t/dt = \cos t\,z - \sin t\,x_0`.

    Args:
        backbone: Network ``F = net(x, t, label=None, guidance=None)``.
        teacher_checkpoint: Checkpoint of a diffusion model of the same network to start from, averaged weights; from
            scratch if not given (the paper always starts from a teacher).
        sigma_data: Standard deviation of the data.
        P_mean: Mean of the log-normal noise levels in training.
        P_std: Standard deviation of the log-normal noise levels in training.
        normalization: Treatment of the tangent: ``l2`` or ``rms`` norm, elementwise ``clip``, or ``none``.
        c: Constant of the tangent normalisation.
        times: Sampling times in radians, decreasing; one entry is one step.
        shared_primal: Network output and tangent from one evaluation, see
            :func:`~sclightning.objective.forward_jvp`.
        optimizer: Optimizer of the network and the adaptive weight; if not given, RAdam with PyTorch's
            numbers, where the paper has a rate of 1e-4 and betas of 0.9 and 0.99 for CIFAR-10.
        lr_scheduler: Learning-rate schedule, stepped with the optimizer.
        seed: Seed of training noise and of samples.
        compile: Compile the loss as one function; arguments of :func:`torch.compile` (``mode``, ``fullgraph``, …) or
            true for its defaults.
        channels_last: Memory format of the images in a convolutional network.
        activation_checkpointing: Keep only the inputs of the network's blocks, and compute the rest again in the
            backward pass; turns ``shared_primal`` off.
    """

    def __init__(
        self,
        backbone: nn.Module,
        teacher_checkpoint: str | None = None,
        sigma_data: float = 0.5,
        P_mean: float = -1.0,
        P_std: float = 1.4,
        normalization: Normalization = "l2",
        c: float = 0.1,
        times: Sequence[float] = (T_MAX, 1.1),
        shared_primal: bool = True,
        optimizer: OptimizerCallable = torch.optim.RAdam,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        compile: bool | dict[str, Any] = False,
        channels_last: bool = False,
        activation_checkpointing: bool = False,
    ):
        super().__init__(
            backbone, teacher_checkpoint, sigma_data, P_mean, P_std, normalization, c, times, None, shared_primal,
            optimizer, lr_scheduler, seed, compile, channels_last, activation_checkpointing,
        )  # fmt: skip
        self.save_hyperparameters(ignore=["backbone", "optimizer", "lr_scheduler"])

    def velocity(
        self, x_t: Tensor, x_0: Tensor, z: Tensor, t: Tensor, label: Tensor | None, guidance: Tensor | None
    ) -> Tensor:
        """Conditional velocity of the interpolation between ``x_0`` and ``z``."""
        return velocity(x_0, z, t)


class ConsistencyDistillation(ConsistencyModel):
    r"""sCD: the velocity is the teacher's, :math:`dx_t/dt = \sigma_d F_{pretrain}(x_t/\sigma_d, t)`, guided or not.

    The teacher is loaded when training starts, frozen, and left out of this module's checkpoints.

    Args:
        backbone: Network ``F = net(x, t, label=None, guidance=None)``.
        teacher_checkpoint: Checkpoint of the diffusion model: its averaged weights are the teacher's and the student's
            first. May be left out if ``teacher`` brings its own weights; the student then starts as it is.
        teacher: The teacher's network if it is not the student's: made without a guidance input, say, or somebody
            else's behind an adapter (:mod:`sclightning.adapters`), guided or not. Any ``F = net(x, t, label)`` will do.
        guidance_range: Range from which the guidance scale of each training sample is drawn uniformly (the paper:
            [1, 2]); needs a backbone with a guidance input and a teacher trained with dropped labels.
        sigma_data: Standard deviation of the data.
        P_mean: Mean of the log-normal noise levels in training.
        P_std: Standard deviation of the log-normal noise levels in training.
        normalization: Treatment of the tangent: ``l2`` or ``rms`` norm, elementwise ``clip``, or ``none``.
        c: Constant of the tangent normalisation.
        times: Sampling times in radians, decreasing; one entry is one step.
        guidance_scale: Guidance scale in sampling, for a network with a guidance input.
        shared_primal: Network output and tangent from one evaluation, see
            :func:`~sclightning.objective.forward_jvp`.
        optimizer: Optimizer of the network and the adaptive weight; if not given, RAdam with PyTorch's
            numbers, where the paper has a rate of 1e-4 and betas of 0.9 and 0.99 for CIFAR-10.
        lr_scheduler: Learning-rate schedule, stepped with the optimizer.
        seed: Seed of training noise and of samples.
        compile: Compile the loss as one function; arguments of :func:`torch.compile` (``mode``, ``fullgraph``, …) or
            true for its defaults.
        channels_last: Memory format of the images in a convolutional network.
        activation_checkpointing: Keep only the inputs of the network's blocks, and compute the rest again in the
            backward pass; turns ``shared_primal`` off.

    Raises:
        ValueError: If there are two teachers, or if the teacher is the student.
    """

    def __init__(
        self,
        backbone: nn.Module,
        teacher_checkpoint: str | None = None,
        teacher: nn.Module | None = None,
        guidance_range: tuple[float, float] | None = None,
        sigma_data: float = 0.5,
        P_mean: float = -1.0,
        P_std: float = 1.4,
        normalization: Normalization = "l2",
        c: float = 0.1,
        times: Sequence[float] = (T_MAX, 1.1),
        guidance_scale: float | None = None,
        shared_primal: bool = True,
        optimizer: OptimizerCallable = torch.optim.RAdam,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        compile: bool | dict[str, Any] = False,
        channels_last: bool = False,
        activation_checkpointing: bool = False,
    ):
        super().__init__(
            backbone, teacher_checkpoint, sigma_data, P_mean, P_std, normalization, c, times, guidance_scale,
            shared_primal, optimizer, lr_scheduler, seed, compile, channels_last, activation_checkpointing,
        )  # fmt: skip
        self.save_hyperparameters(ignore=["backbone", "teacher", "optimizer", "lr_scheduler"])
        self.teacher, self.guidance_range = teacher, guidance_range
        if teacher is not None:
            network = teacher.network if isinstance(teacher, Guided) else teacher
            found = recorded(network)
            if found and teacher_checkpoint is not None:
                raise ValueError(
                    f"There are two teachers, the weights from {found[0].get('source')} in model.init_args.teacher "
                    f"and model.init_args.teacher_checkpoint={teacher_checkpoint}; leave one of them out."
                )
            if {*map(id, teacher.parameters())} & {*map(id, backbone.parameters())}:
                raise ValueError(
                    "The teacher is frozen but shares parameters with the student's backbone; give one of them a copy "
                    "(copy.deepcopy)."
                )
            teacher.eval().requires_grad_(False)
        # The frozen teacher stays out of checkpoints, it is on disk already; loading stays strict for the rest.
        self.register_state_dict_post_hook(_drop_teacher)
        self.register_load_state_dict_post_hook(_miss_no_teacher)

    def setup(self, stage: str) -> None:
        """Load the teacher, for training only.

        Raises:
            ValueError: If there is neither a teacher nor a checkpoint to make one from.
        """
        given, started = self.teacher is not None, self._started
        super().setup(stage)
        if stage != "fit":
            return
        if not given:
            if self.guidance_range is not None:
                raise ValueError(
                    "Guided distillation needs two networks, a student that is told the scale and a teacher that is "
                    "not; give model.init_args.backbone guidance: true and set model.init_args.teacher to the same "
                    "without (configs/scd_m.yaml)."
                )
            if self.teacher_checkpoint is None:
                raise ValueError(
                    "Distillation has no teacher; set model.init_args.teacher_checkpoint to a checkpoint of "
                    "TrigFlowDiffusion, or model.init_args.teacher to a network with its own weights."
                )
            self.teacher = copy.deepcopy(self.backbone)
            for module in self.teacher.modules():
                if isinstance(module, SegmentEmbedding):
                    nn.init.zeros_(module.weight)  # no segments to a teacher, whatever the student has learnt
        if self.teacher_checkpoint is not None and (given or started):  # else the copy has its weights already
            network = self.teacher.network if isinstance(self.teacher, Guided) else self.teacher
            load_backbone(network, self.teacher_checkpoint, self.sigma_data)
        self.teacher.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "ConsistencyDistillation":
        """Switch the student; the teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def configure_model(self) -> None:
        """As in the base class; the teacher is sharded like the student."""
        super().configure_model()
        if self.device_mesh is not None:
            self.strict_loading = False  # to load a file, ModelParallelStrategy asks for the frozen weights too

    def draw_guidance(self, x_0: Tensor) -> Tensor | None:
        """Guidance scale per sample, uniform over ``guidance_range``."""
        if self.guidance_range is None:
            return None
        low, high = self.guidance_range
        return low + (high - low) * torch.rand(len(x_0), device=x_0.device)

    @torch.no_grad()
    def velocity(
        self, x_t: Tensor, x_0: Tensor, z: Tensor, t: Tensor, label: Tensor | None, guidance: Tensor | None
    ) -> Tensor:
        """The teacher's velocity, guided where a scale is given."""
        return self.sigma_data * self._call_guided(self.teacher, x_t / self.sigma_data, t, label, guidance)


def _drop_teacher(module: nn.Module, state_dict: dict, prefix: str, metadata: dict) -> None:
    for name in [name for name in state_dict if name.startswith(f"{prefix}teacher.")]:
        del state_dict[name]


def _miss_no_teacher(module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not name.startswith("teacher.")]


def load_backbone(backbone: nn.Module, checkpoint: str | None, sigma_data: float | None = None) -> nn.Module:
    """Load the backbone's weights out of a checkpoint of a module: the averaged ones where it was trained with EMA.

    Args:
        backbone: Network to fill. Those of a guidance or segment embedding, which the checkpoint may lack, stay.
        checkpoint: Path of a Lightning checkpoint, a file or a folder of shards; with None the network stays as it is.
        sigma_data: What the checkpoint's module must have had, if it says and this is given.

    Returns:
        ``backbone``, so that this function can be a ``class_path`` of a config, with the attribute ``provenance``: the
        checkpoint's record and those in it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the checkpoint holds another network, or one for data of another standard deviation.
    """
    if checkpoint is None:
        return backbone
    if not Path(checkpoint).exists():
        raise FileNotFoundError(
            f"There is no teacher checkpoint at {checkpoint}; train the teacher first, or set "
            "model.init_args.teacher_checkpoint to where it is."
        )
    read = read_checkpoint(checkpoint)
    trained = read.get("hyper_parameters", {}).get("sigma_data")
    if None not in (sigma_data, trained) and trained != sigma_data:
        raise ValueError(
            f"The teacher checkpoint {checkpoint} was trained with sigma_data={trained} and this model has "
            f"{sigma_data}, with which its velocity would be wrong; set model.init_args.sigma_data to the first."
        )
    state = backbone_weights(read)
    wrong = [
        name
        for name in mismatched(backbone.state_dict(), state)
        if name in state or not any(word in name for word in ("guidance", "segment"))
    ]
    if wrong:
        raise ValueError(
            f"The teacher checkpoint {checkpoint} holds another network than the config describes ({len(wrong)} "
            f"tensors differ, first {wrong[0]}); give the student's backbone the teacher's arguments."
        )
    backbone.load_state_dict(state, strict=False)
    backbone.provenance = merge(of_checkpoint(checkpoint), recorded(backbone))
    return backbone
