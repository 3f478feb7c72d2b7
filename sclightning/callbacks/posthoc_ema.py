r"""Post-hoc EMA (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", Sec. 3).

Snapshots of two power-function averages during training are enough to have an average of any length afterwards: the
combination whose averaging profile is nearest, in the least-squares sense, to the profile that is wanted.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from sclightning.callbacks.ema import EMA, power_exponent
from sclightning.checkpoint import read_checkpoint
from sclightning.parallelize import full, shard_like


class PostHocEMA(L.Callback):
    """Writes snapshots of power-function averages, from which ``sclightning ema`` makes one of any length.

    It changes neither training nor what validation sees, and goes beside an :class:`~sclightning.callbacks.ema.EMA`. A
    run that was killed and resumed writes the snapshots of an unbroken one. Sharded weights are averaged in their
    shards and written whole.

    Args:
        sigma_rels: Relative widths of the averages, two or more (EDM2: 0.05 and 0.10).
        every_n_steps: Optimizer steps between snapshots (EDM2: every 8 million images).
        folder: Where to; ``posthoc_ema`` beside the run's checkpoints if not given.
        dtype: Precision of the files (EDM2: float16); the averages themselves have that of the weights.
    """

    def __init__(
        self,
        sigma_rels: Sequence[float] = (0.05, 0.10),
        every_n_steps: int = 1000,
        folder: str | None = None,
        dtype: Literal["float16", "float32"] = "float16",
    ):
        _safetensors()
        if len(set(sigma_rels)) < 2:
            raise ValueError(f"PostHocEMA was given the widths {list(sigma_rels)}; give two different ones, or more.")
        self.averages = {sigma_rel: EMA(sigma_rel=sigma_rel) for sigma_rel in sigma_rels}
        self.every_n_steps, self.folder, self.dtype = every_n_steps, folder, getattr(torch, dtype)
        self._resumed = False
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the averages at the weights, or shard the restored ones as the weights are.

        Raises:
            FileExistsError: If the folder has the snapshots of another run.
        """
        if self.folder is None:
            beside = (
                getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.log_dir or trainer.default_root_dir
            )
            self.folder = str(Path(beside) / "posthoc_ema")
        if not self._resumed and any(Path(self.folder).glob("*.safetensors")):
            raise FileExistsError(
                f"{self.folder} has snapshots of an earlier run; move them away, give PostHocEMA another folder, or "
                "resume that run with --ckpt_path."
            )
        for ema in self.averages.values():
            for name, weight in pl_module.backbone.named_parameters():
                if name in ema._average:
                    ema._average[name] = shard_like(ema._average[name].to(weight.device), weight)
            ema.on_train_start(trainer, pl_module)
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update; write a snapshot when it is time."""
        for ema in self.averages.values():
            ema.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step % self.every_n_steps == 0:
            tensors = dict(self._whole(trainer))
            if trainer.is_global_zero:
                self._write({name: tensor.to(self.dtype).contiguous() for name, tensor in tensors.items()})

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict) -> None:
        """The averages, whole, so that a run may go on with another number of devices."""
        ema = next(iter(self.averages.values()))
        if ema._average:
            averages = dict(self._whole(trainer))
            checkpoint["posthoc_ema"] = {"averages": averages, "images": ema.images, "pending": ema._pending}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict) -> None:
        """Continue the averages."""
        saved = checkpoint.get("posthoc_ema")
        if trainer.state.fn != TrainerFn.FITTING or saved is None:
            return
        for sigma_rel, ema in self.averages.items():
            prefix = f"{sigma_rel}/"
            ema._average = {k.removeprefix(prefix): v for k, v in saved["averages"].items() if k.startswith(prefix)}
            if not ema._average:
                raise ValueError(
                    f"The checkpoint has no average of sigma_rel {sigma_rel}; resume with the sigma_rels of its run."
                )
            ema.images, ema._pending = saved["images"], saved["pending"]
        self._resumed = True

    def _whole(self, trainer: L.Trainer) -> Iterator[tuple[str, Tensor]]:
        """The averages in full on the CPU of the first process; the others take part in putting them together."""
        for sigma_rel, ema in self.averages.items():
            for name, average in ema._average.items():
                whole = full(average)
                if trainer.is_global_zero:
                    yield f"{sigma_rel}/{name}", whole.to("cpu", copy=True)

    def _write(self, tensors: dict[str, Tensor]) -> None:
        path = Path(self.folder) / f"step_{self._step:09d}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        images = next(iter(self.averages.values())).images
        about = {"step": self._step, "images": images, "sigma_rels": list(self.averages)}
        _safetensors().torch.save_file(tensors, path.with_suffix(".tmp"), {"about": json.dumps(about)})
        path.with_suffix(".tmp").replace(path)  # a run that is killed here leaves no half of a snapshot


def profile_product(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    r"""Inner product :math:`\int p_a p_b\,d\tau` of averaging profiles.

    A profile is :math:`p(\tau) = (\gamma+1)\,\tau^\gamma/t^{\gamma+1}` on [0, t], t the end of its average.

    Args:
        t_a: Ends of the averages, any unit, broadcast with the others.
        gamma_a: Their exponents.
        t_b: Ends of the others.
        gamma_b: Exponents of the others.
    """
    first, last = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    exponent = np.where(t_a < t_b, gamma_b, gamma_a)  # of the one that ends last
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (first / last) ** exponent / last


def solve_profile(
    times: Sequence[float], exponents: Sequence[float], time: float, exponent: float
) -> tuple[np.ndarray, float]:
    """Coefficients of stored averages whose sum is nearest to the average that is wanted (App. C), in float64.

    Args:
        times: Ends of the stored averages, any unit.
        exponents: Their exponents.
        time: End of the average that is wanted.
        exponent: Its exponent.

    Returns:
        Coefficients, and the profile's distance from the wanted one relative to its norm.
    """
    t, gamma = np.asarray(times, np.float64), np.asarray(exponents, np.float64)
    A = profile_product(t[:, None], gamma[:, None], t, gamma)
    b = profile_product(t, gamma, np.float64(time), np.float64(exponent))
    x = np.linalg.solve(A, b)
    norm = profile_product(np.float64(time), np.float64(exponent), np.float64(time), np.float64(exponent))
    return x, math.sqrt(max(0.0, float(x @ A @ x - 2 * x @ b + norm) / float(norm)))


def reconstruct(
    *,
    ckpt_path: str,
    sigma_rel: float,
    output: str | None = None,
    snapshots: str | None = None,
    step: int | None = None,
) -> None:
    """Make a checkpoint whose weights are the power-function average of any length, from the run's snapshots.

    It loads wherever a checkpoint does: ``test``, ``export``, a student's ``teacher_checkpoint``. No run resumes from
    it: it has no state of the optimizer.

    Args:
        ckpt_path: Checkpoint of the run; later snapshots are not looked at.
        sigma_rel: Relative width of the average, between 0 and 0.2887.
        output: File to write; ``sigma_rel…_`` and the checkpoint's name, beside it, if not given.
        snapshots: Folder of the snapshots; ``posthoc_ema`` beside the checkpoint if not given.
        step: Optimizer step where the average ends, one that has a snapshot; the last if not given.

    Raises:
        FileNotFoundError: If there are no snapshots.
        ValueError: If the snapshots are of another network, of another step, or not finite.
    """
    safetensors, checkpoint, source = _safetensors(), read_checkpoint(ckpt_path), Path(ckpt_path)
    folder = Path(snapshots) if snapshots else source.parent / "posthoc_ema"
    stored = []
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
        if about["step"] <= checkpoint["global_step"]:
            stored += [(about["step"], about["images"], width, path) for width in about["sigma_rels"]]
    if not stored:
        raise FileNotFoundError(
            f"{folder} has no snapshot up to the checkpoint's step {checkpoint['global_step']}; train with PostHocEMA, "
            "or give --snapshots its folder."
        )
    ends = {end: images for end, images, _, _ in stored}
    step = max(ends) if step is None else step
    if step not in ends:
        raise ValueError(f"There is no snapshot of step {step}; give --step one of {', '.join(map(str, ends))}.")
    coefficients, error = solve_profile(
        [images for _, images, _, _ in stored],
        [power_exponent(width) for _, _, width, _ in stored],
        ends[step],
        power_exponent(sigma_rel),
    )

    total: dict[str, Tensor] = {}
    for coefficient, (_, _, width, path) in zip(coefficients.tolist(), stored, strict=True):
        with safetensors.safe_open(path, "pt") as file:
            for key in (key for key in file.keys() if key.startswith(f"{width}/")):  # noqa: SIM118 - no dictionary
                name, tensor = f"backbone.{key.partition('/')[2]}", file.get_tensor(key).double()
                total[name] = total.get(name, 0) + coefficient * tensor
    state = checkpoint["state_dict"]
    place = lambda tensor: (tensor.data_ptr(), tensor.shape)  # noqa: E731 - of a parameter that layers share, the same
    shared = {place(state[name]): name for name in total if name in state}
    total |= {k: total[shared[place(v)]] for k, v in state.items() if k not in total and place(v) in shared}
    wrong = [k for k, v in total.items() if k not in state or state[k].shape != v.shape]
    if wrong:
        raise ValueError(f"The snapshots in {folder} are of another network than {ckpt_path} (first {wrong[0]}).")
    if not all(tensor.isfinite().all() for tensor in total.values()):
        raise ValueError(
            f"A snapshot in {folder} is not finite; the run diverged, or its weights need PostHocEMA's dtype float32."
        )
    state.update({name: tensor.to(state[name].dtype) for name, tensor in total.items()})

    for key in [key for key in checkpoint if re.match("optimizer_|lr_schedulers|ema$|posthoc_ema$", key)]:
        del checkpoint[key]
    checkpoint["average"] = {"sigma_rel": sigma_rel, "step": step, "snapshots": len(ends), "profile_error": error}
    # Not last…, to which --ckpt_path=last might go.
    target = Path(output) if output else source.with_name(f"sigma_rel{sigma_rel}_{source.stem}.ckpt")
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, target.with_suffix(".tmp"))
    target.with_suffix(".tmp").replace(target)  # it may be the file whose memory map the checkpoint is
    print(
        f"Wrote {target}: the average of sigma_rel {sigma_rel} that ends at step {step}, from {len(ends)} snapshots; "
        f"its profile is met to {error:.1%}."
    )


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("Snapshots of averages need safetensors; pip install 'sclightning[diffusers]'.") from error
    return safetensors
