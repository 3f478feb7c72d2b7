"""What the teacher and the consistency models share: network, noise, optimizer, sampling."""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from sclightning.adapters import Guided, guided_velocity
from sclightning.backbones.layers import AdaptiveWeight, check_conditions
from sclightning.checkpoint import backbone_weights, mismatched
from sclightning.data.requests import SampleRequest
from sclightning.objective import finite_mean
from sclightning.parallelize import checkpoint_blocks, shard, stop_together
from sclightning.provenance import merge, recorded
from sclightning.sampling import sample_noise
from sclightning.trigflow import sample_time


class TrigFlowModule(L.LightningModule):
    """A network on the TrigFlow arc; subclasses give ``training_step``, ``sampler`` and ``nfe``.

    A training batch is ``(x_0, label)`` or ``x_0``: x_0 of standard deviation ``sigma_data``, shape (B, C, H, W), label
    int64 (B,). Where ``takes_augment``, also ``(x_0, label or None, augment)``. Validation, test and prediction
    batches are :class:`~sclightning.data.requests.SampleRequest`; each step returns samples in the range of the data.
    """

    nfe: int
    """Network evaluations per sample."""
    takes_augment = False
    """Whether ``training_step`` passes on what it is told of augmentation, the third entry of a batch."""

    def __init__(
        self,
        backbone: nn.Module,
        sigma_data: float,
        P_mean: float,
        P_std: float,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        guidance_scale: float | None,
        seed: int,
        compile: bool | dict[str, Any] = False,
        channels_last: bool = False,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.backbone = backbone
        self.adaptive_weight = AdaptiveWeight()
        self.sigma_data, self.P_mean, self.P_std = sigma_data, P_mean, P_std
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.guidance_scale, self.seed = guidance_scale, seed
        self.provenance: list[dict] = []
        # nn.Module has a method named compile.
        self.compile_options = {} if compile is True else None if compile is False else compile
        self.channels_last, self.activation_checkpointing = channels_last, activation_checkpointing
        self._seen: set[nn.Module] = set()
        self._range_checked = False
        self._shown: dict[str, Tensor] = {}
        self._nonfinite, self._samples, self._written = torch.zeros(()), 0, 0
        self._normalize_weights()

    def configure_optimizers(self):
        """Optimizer over everything that trains, stepped schedule if there is one."""
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"},
        }

    def optimizer_step(self, *args, **kwargs) -> None:
        """Step, then force the weight normalisation of networks that have one (EDM2): never inside their forward."""
        super().optimizer_step(*args, **kwargs)
        self._normalize_weights()

    def configure_model(self) -> None:
        """Recompute blocks in the backward pass and shard the networks over the devices, as asked for.

        Raises:
            ValueError: If ``ModelParallelStrategy`` was given a tensor-parallel size.
        """
        if self.activation_checkpointing:
            checkpoint_blocks(self.backbone)
        if self.device_mesh is None:
            return
        if self.device_mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                f"ModelParallelStrategy has tensor_parallel_size={self.device_mesh['tensor_parallel'].size()}, but the "
                "networks are sharded over the data-parallel devices only; set data_parallel_size to the number of "
                "devices and tensor_parallel_size to 1."
            )
        for network in self.children():
            shard(network, self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Compare the module with the data it meets.

        Raises:
            ValueError: If the data module's standard deviation is not this module's, or it augments images and the
                network is not told.
        """
        if stage != "fit":
            return
        measured = getattr(self.trainer.datamodule, "sigma_data", None)
        if measured is not None and abs(measured / self.sigma_data - 1) > 0.05:
            raise ValueError(
                f"The training images have a standard deviation of {measured:.3f}, the model was given "
                f"sigma_data={self.sigma_data}; set model.init_args.sigma_data to {measured:.3f}."
            )
        augment_dim = getattr(self.trainer.datamodule, "augment_dim", 0)
        told = getattr(self.backbone, "augment_dim", 0) if self.takes_augment else 0
        if augment_dim not in (0, told):
            raise ValueError(
                f"The data is augmented, of which {type(self).__name__} does not tell its network; set "
                f"data.init_args.augment to 0, or give a TrigFlowDiffusion a backbone with augment_dim: {augment_dim}."
            )

    def on_train_start(self) -> None:
        """Keep the hosts ahead of their devices, see :func:`~sclightning.parallelize.stop_together`."""
        stop_together(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Record whose weights these were made from, and under which licence."""
        checkpoint["provenance"] = recorded(self)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Compare the checkpoint with this module, and keep its record beside that of this run.

        Raises:
            ValueError: If it is of a diffusion model and this is none, or the other way round, or of another network.
        """
        told = checkpoint.get("hyper_parameters")
        if told and ("solver" in told) != hasattr(self, "solver"):
            kind = "diffusion" if "solver" in told else "consistency"
            raise ValueError(
                f"The checkpoint is of a {kind} model and cannot be gone on with as {type(self).__name__}; give "
                "--ckpt_path one of this run (a teacher to start from is model.init_args.teacher_checkpoint)."
            )
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING and "ema" in checkpoint:
            from sclightning.callbacks import EMA

            if not any(isinstance(callback, EMA) for callback in self.trainer.callbacks):
                rank_zero_warn(
                    "The checkpoint's weights are averages, and without the callback EMA, which its run had, training "
                    "goes on from those, with an optimizer that knows others; add EMA."
                )
        if self._trainer is not None and "state_dict" in checkpoint:
            wrong = mismatched(self.backbone.state_dict(), backbone_weights(checkpoint))
            if wrong:
                raise ValueError(
                    f"The checkpoint holds another network than the config describes ({len(wrong)} tensors differ, "
                    f"first {wrong[0]}); give the config.yaml that its run wrote."
                )
        self.provenance = merge(self.provenance, checkpoint.get("provenance", []))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        guidance: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Velocity F of the backbone, in the dtype of ``x``.

        Args:
            x: Noisy images of unit variance, shape (B, C, H, W).
            t: Times in radians, shape (B,), float32.
            label: Class labels, int64 (B,), -1 for none.
            guidance: Guidance scale per sample, shape (B,).
            augment: Augmentation condition, shape (B, augment_dim).
        """
        return self._call(self.backbone, x, t, label, guidance, augment)

    @torch.no_grad()
    def sample(
        self, index: Sequence[int] | Tensor, shape: Sequence[int], label: Tensor | None = None, seed: int | None = None
    ) -> Tensor:
        """Samples that depend on (seed, index, label) only, not on batch size or device count.

        Args:
            index: Sample indices, length B.
            shape: Shape of a sample, (C, H, W).
            label: Class labels, int64 (B,).
            seed: Seed of the noise; the module's if not given.

        Returns:
            Samples in the range of the data, float32, shape (B, C, H, W), on the module's device.
        """
        indices = index.tolist() if isinstance(index, Tensor) else index
        noise = sample_noise(indices, shape, self._noise_draws, self.seed if seed is None else seed).to(self.device)
        label = move_data_to_device(label, self.device)  # a tensor, or a dictionary of text embeddings
        training = self.training
        self.eval()
        x = self.sampler(noise, label)
        self.train(training)
        return x.float()

    def sampler(self, noise: Tensor, label: Tensor | None) -> Tensor:
        """Turn unit noise (draws, B, C, H, W) into samples (B, C, H, W)."""
        raise NotImplementedError(f"{type(self).__name__} does not define a sampler.")

    def validation_step(self, batch: SampleRequest, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Samples for a request; callbacks look at them.

        Raises:
            TypeError: If the loader gives something else, images for one.
        """
        if not isinstance(batch, SampleRequest):
            raise TypeError(
                f"Validation, test and prediction make samples and need loaders of sclightning.data.SampleRequest, but "
                f"got {type(batch).__name__}; see docs/extending.md, or leave the loader out."
            )
        return self.sample(batch.index, batch.shape, batch.label)

    test_step = predict_step = validation_step

    _noise_draws = 1

    @contextmanager
    def _draw(self, x_0: Tensor, batch_idx: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Noise z and times t of this step, and a random state that belongs to the step, for dropout inside.

        Keyed by (seed, step, batch, rank): ranks differ, and a resumed run goes on with the noise of the unbroken one.
        """
        self._check_range(x_0)
        key = np.random.SeedSequence((self.seed, self.global_step, batch_idx, self.global_rank))
        with torch.random.fork_rng([x_0.device] if x_0.is_cuda else []):
            torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))
            z = self.sigma_data * torch.randn_like(x_0)
            yield z, self.draw_time(x_0)

    def _check_range(self, x_0: Tensor) -> None:
        """Look at the first batch: a data module of yours may not say its standard deviation."""
        if self._range_checked:
            return
        self._range_checked = True
        if not x_0.is_floating_point():
            raise TypeError(
                f"The training images are {x_0.dtype}; give floats of standard deviation sigma_data, of uint8 images "
                "x / 127.5 - 1."
            )
        measured = float(x_0.float().std())
        if not 0.6 < measured / self.sigma_data < 1.7:
            warnings.warn(
                f"The first batch has a standard deviation of {measured:.3g} and the model "
                f"sigma_data={self.sigma_data}; give the model the data's, or scale the data.",
                stacklevel=2,
            )

    def draw_time(self, x_0: Tensor) -> Tensor:
        """Training times (B,) from the log-normal proposal."""
        return sample_time(len(x_0), self.P_mean, self.P_std, self.sigma_data, device=x_0.device)

    def loss(
        self, x_0: Tensor, z: Tensor, t: Tensor, label: Tensor | None = None, guidance: Tensor | None = None
    ) -> Any:
        """Loss per sample of data ``x_0`` and noise ``z`` at times ``t``: what ``compile`` compiles as one function."""
        raise NotImplementedError(f"{type(self).__name__} does not define a loss.")

    def _evaluate(self, *inputs: Tensor | None) -> Any:
        """:meth:`loss`, compiled if asked for."""
        if self.compile_options is None:
            return self.loss(*inputs)
        result = self._compiled_loss(*inputs)
        if self.backbone not in self._seen:  # the graph has no place for the look that _call takes
            if not (result[0] if isinstance(result, tuple) else result).isfinite().any():
                raise ValueError(
                    "The first loss is not finite; train one step without compile to see which network it comes from."
                )
            self._seen.add(self.backbone)
        return result

    @functools.cached_property
    def _compiled_loss(self) -> Callable:
        if self.device_mesh is not None:
            raise ValueError(
                "compile makes one function of the loss, which the hooks of FSDP2 would cut up; leave model.init_args."
                "compile out, or train with strategy ddp."
            )
        return _compiled(self.loss, {"fullgraph": self._one_pass, **self.compile_options}, self.channels_last)

    _one_pass = True

    @functools.cached_property
    def _compiled_normalization(self) -> Callable:
        return _compiled(self.backbone.normalize_weights, {**self.compile_options, "fullgraph": True}, False)

    def _report(self, **values: Tensor) -> None:
        """Log numbers of this step, without waiting for the device to have them."""
        # With prog_bar=True Lightning would read them back at every step, bar or no bar.
        self.log_dict(values)
        self._shown = {name: value.detach() for name, value in values.items()}

    def _average(self, loss: Tensor) -> Tensor:
        """Mean of a loss (B,) over the samples where it is finite; the others are counted, without waiting for them."""
        self._nonfinite = (~loss.detach().isfinite()).sum() + self._nonfinite.to(loss.device)
        self._samples += len(loss)
        return finite_mean(loss)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """When the logger reads the numbers anyhow, show them in the progress bar, and log ``nonfinite_samples``.

        That is the share of samples without a finite loss, on all devices, since it was logged before.
        """
        every, step = self.trainer.log_every_n_steps, self.trainer.global_step
        if every and step % every == 0 and step != self._written:
            self.trainer.progress_bar_metrics.update({name: value.item() for name, value in self._shown.items()})
            if self._samples:
                share = self.trainer.strategy.reduce(self._nonfinite / self._samples, reduce_op="mean")
                self.log("nonfinite_samples", share)
            self._nonfinite, self._samples, self._written = torch.zeros_like(self._nonfinite), 0, step

    @staticmethod
    def _split(batch: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        return (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1] if len(batch) > 1 else None)

    def _call(
        self,
        network: nn.Module,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        guidance: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Evaluate a network and hold it to the contract.

        Shapes are looked at always, values at the first output only: that stalls the device.
        """
        # Only the conditions there are, so that ``net(x, t)`` is enough of a signature.
        conditions = {"label": label, "guidance": guidance, "augment": augment}
        conditions = {name: value for name, value in conditions.items() if value is not None}
        first = not torch.compiler.is_compiling() and network not in self._seen
        if first:
            check_conditions(network, x, t, conditions)
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        x_in = x.to(self.dtype, memory_format=layout)
        F = network(x_in, t, **conditions)
        if F.shape != x.shape:
            raise ValueError(
                f"{type(network).__name__} returned shape {tuple(F.shape)} for images of shape {tuple(x.shape)}; "
                "it must return a velocity of the images' shape."
            )
        if first:
            if not F.isfinite().all():
                raise ValueError(
                    f"The first output of {type(network).__name__} is not finite; look for a division by zero, an "
                    "exponential or a half-precision overflow in its forward."
                )
            self._seen.add(network)
        return F.to(x.dtype)

    def _call_guided(
        self, network: nn.Module, x: Tensor, t: Tensor, label: Tensor | None, guidance: Tensor | None
    ) -> Tensor:
        """Evaluate a diffusion model, guided in its own way if it has one, by leaving out the label otherwise."""
        if guidance is None or isinstance(network, Guided):
            return self._call(network, x, t, label, guidance)
        return guided_velocity(functools.partial(self._call, network), x, t, label, guidance)

    def _normalize_weights(self) -> None:
        if hasattr(self.backbone, "normalize_weights"):
            with torch.no_grad():
                if self.compile_options is None or not self._seen:  # not for the one call when the module is made
                    self.backbone.normalize_weights()
                else:
                    self._compiled_normalization()


def _compiled(function: Callable, options: dict[str, Any], channels_last: bool) -> Callable:
    import torch._dynamo  # two seconds, for those who compile

    if channels_last and options.get("backend", "inductor") == "inductor":
        # Left alone, Inductor goes back to channels-first as soon as one convolution has few output channels, as the
        # last one of every U-Net has, and cuDNN then converts each image twice.
        options = {**options, "options": {"force_layout_optimization": True, **options.get("options", {})}}
        if mode := options.pop("mode", None):
            options["options"] |= torch._inductor.list_mode_options(mode)
    # DDP has Dynamo cut graphs at its buckets, through the middle of the jvp.
    return torch._dynamo.config.patch(optimize_ddp=False)(torch.compile(function, **options))
