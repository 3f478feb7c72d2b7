r"""Exponential moving averages of the weights: constant rate, half-life in images, EDM2's power function."""

from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from sclightning.parallelize import full, is_sharded, local, shard_like


class EMA(L.Callback):
    r"""Average of the backbone's weights, one update per optimizer step; give exactly one of the three lengths.

    Validation sees the averaged weights. A checkpoint's ``state_dict`` holds them too, so whoever loads a checkpoint
    gets them without this callback; the weights in training lie under ``"ema"`` beside them and come back on resuming.
    When ``fit`` ends the module keeps the average. Where FSDP2 shards the weights it shards the average. Of weights in
    half precision it is in float32.

    Args:
        decay: Constant rate per step, ``0.999`` for one.
        half_life: Half-life in images; 500,000 for the paper's CIFAR-10.
        ramp_up: Bound of the half-life by this fraction of the images seen so far; only with ``half_life``.
        sigma_rel: Relative width of EDM2's power-function average; 0.05 for the paper's ImageNet.
    """

    def __init__(
        self,
        decay: float | None = None,
        half_life: float | None = None,
        ramp_up: float | None = 0.05,
        sigma_rel: float | None = None,
    ):
        lengths = {"decay": decay, "half_life": half_life, "sigma_rel": sigma_rel}
        given = [name for name, value in lengths.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"EMA was given {' and '.join(given) or 'no length'}; give exactly one of decay, half_life, sigma_rel."
            )
        self.decay, self.half_life, self.ramp_up = decay, half_life, ramp_up
        self.exponent = None if sigma_rel is None else power_exponent(sigma_rel)
        self.images = 0
        self._step, self._pending = 0, 0
        self._average: dict[str, Tensor] = {}
        self._live: dict[str, Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a second average, a checkpoint's ``state_dict`` has room for one, and checkpoints without averages.

        Raises:
            ValueError: If the trainer has another of this class, or a checkpoint callback that saves weights only.
        """
        if stage == "fit" and any(getattr(callback, "save_weights_only", False) for callback in trainer.callbacks):
            raise ValueError(
                "A checkpoint callback has save_weights_only: true, for which Lightning asks no callback, so its "
                "weights would not be averages; leave it out (sclightning export writes averaged weights alone)."
            )
        if sum(isinstance(callback, EMA) for callback in trainer.callbacks) > 1:
            raise ValueError(
                "The trainer has two EMA callbacks, and a checkpoint has room for one average; keep one, and take "
                "PostHocEMA for averages of other lengths."
            )

    def rate(self, new_images: int) -> float:
        """Rate of an update that ends at ``self.images`` and covers the last ``new_images`` of them."""
        if self.decay is not None:
            return self.decay
        if self.exponent is not None:
            return (1 - new_images / self.images) ** (self.exponent + 1)
        half_life = self.half_life
        if self.ramp_up is not None:
            half_life = min(half_life, self.images * self.ramp_up)
        return 0.5 ** (new_images / half_life)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the average at the weights, or take the restored one to their device."""
        for name, weight in pl_module.backbone.named_parameters():
            average, dtype = self._average.get(name, weight.detach()), torch.promote_types(weight.dtype, torch.float32)
            self._average[name] = average.to(weight.device, dtype, copy=True)  # bf16-true would round its steps away
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update, if this batch completed an optimizer step."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        self._pending += len(images) * trainer.world_size
        if trainer.global_step == self._step:
            return
        self.images += self._pending
        weight = 1 - self.rate(self._pending)
        self._step, self._pending = trainer.global_step, 0
        with torch.no_grad():
            averages = [local(a) for a in self._average.values()]
            weights = [local(w).to(a.dtype) for w, a in zip(pl_module.backbone.parameters(), averages, strict=True)]
            torch._foreach_lerp_(averages, weights, weight)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the averaged weights in."""
        if trainer.state.fn == TrainerFn.FITTING and self._average:
            self._live = {n: w.detach().clone() for n, w in pl_module.backbone.named_parameters()}
            _copy(self._average, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the weights in training back."""
        if self._live:
            _copy(self._live, pl_module)
            self._live = {}

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the module, if there was a batch."""
        if self._average:
            _copy(self._average, pl_module)
        self._average = {}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict) -> None:
        """Averages into ``state_dict``, weights in training beside it."""
        if self._average:
            state, weights = checkpoint["state_dict"], {}
            names: dict[int, list[str]] = {}  # a parameter that layers share has several, and all are loaded
            for name, weight in pl_module.backbone.named_parameters(remove_duplicate=False):
                names.setdefault(id(weight), []).append(name)
            for name, weight in pl_module.backbone.named_parameters():
                keys, average = [f"backbone.{alias}" for alias in names[id(weight)]], self._average[name]
                weights[name] = full(self._live.get(name, weight.detach()))
                # A folder of shards takes the average's; a file takes the whole, on the one process that writes it.
                if not is_sharded(state.get(keys[0])):
                    average = full(average)
                state.update({key: average for key in keys if key in state})
            checkpoint["ema"] = {"weights": weights, "images": self.images, "pending": self._pending}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict) -> None:
        """Continue the average, with the weights in training back in the module."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if "ema" not in checkpoint:
            rank_zero_warn(
                "The checkpoint has no average to continue (it was saved after fit, its weights being the average, or "
                "by a run without EMA), and a new one begins; give --ckpt_path one that was saved during fit."
            )
        else:
            saved = checkpoint["ema"]
            # The module has just been given the averages: they are what state_dict holds.
            self._average = {name: weight.detach().clone() for name, weight in pl_module.backbone.named_parameters()}
            self.images, self._pending = saved["images"], saved["pending"]
            _copy(saved["weights"], pl_module)


def power_exponent(sigma_rel: float) -> float:
    r"""Exponent :math:`\gamma` of the power-function average of relative width ``sigma_rel`` (EDM2, Sec. 3.1).

    The profile :math:`\propto \tau^\gamma` over a training of length 1 has the standard deviation
    :math:`\sigma_{rel} = (\gamma+1)^{1/2} (\gamma+2)^{-1} (\gamma+3)^{-1/2}`, a cubic in :math:`\gamma`.

    Raises:
        ValueError: If the width is not below that of the plain mean, 12^(-1/2) = 0.2887.
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel is {sigma_rel}; the width of a power-function average lies between 0 and 0.2887.")
    a = sigma_rel**-2
    return float(np.roots([1, 7, 16 - a, 12 - a]).real.max())


def _copy(source: dict[str, Tensor], pl_module: L.LightningModule) -> None:
    with torch.no_grad():
        for name, weight in pl_module.backbone.named_parameters():
            local(weight).copy_(local(shard_like(source[name], weight)))
