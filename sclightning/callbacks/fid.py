"""Distances between samples and real images, during ``fit`` and in ``test``."""

import json
import platform
import time
from collections.abc import Generator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sclightning
from sclightning.callbacks.samples import SampleSet
from sclightning.data.requests import SampleRequest
from sclightning.distances import Extra, Measure, gather
from sclightning.metrics import InceptionFeatures
from sclightning.protocol import Setting, golden_evaluations, golden_section, grid, least_of_seeds


class FIDEvaluation(L.Callback):
    """Distances to the data module's real images of the samples that validation and test make.

    The Fréchet distance is ``fid`` in the features of the 2015 Inception graph, ``fd_<extractor>`` in any others.
    ``test`` goes through all settings asked for, prints one table and writes a JSON beside the checkpoint that says
    what was compared with what. Everything that can be wrong is looked for before the first sample is made.

    The metrics are not submodules of the model: half-precision runs would round their float64 sums, and every
    checkpoint would carry Inception.

    Args:
        extractor: Module with ``name`` and ``num_features`` that maps uint8 images (B, C, H, W) to features (B, d);
            Inception if not given, with torch-fidelity's download of its weights.
        reference: Split of the data module that holds the real images, ``train`` or ``held_out``, or the path of an
            ``.npz`` with ``mu`` and ``sigma`` of their features.
        extras: What to give besides the Fréchet distance: ``kid``, ``inception_score``, ``precision_recall``.
        others: Measures of the same samples in other features.
        seeds: Seeds of the noise to test with, the least distance being the result; the module's if not given.
        guidance_scales: Guidance scales to test a guided model with; the module's if not given.
        steps: Numbers of steps to test a consistency model with, each the first so many of its ``times``; all of them
            if not given.
        search: Interval in radians in which ``test`` looks for the second of two times with the least distance, by
            golden section and with the first of the seeds and scales, instead of testing ``steps``.
        search_tolerance: Length of the interval at which the search ends.
        save: Keep the samples that ``test`` makes beside the JSON: a folder of ``png``, or an ``npz`` with ``arr_0``,
            uint8 (N, H, W, C).
    """

    def __init__(
        self,
        extractor: nn.Module | None = None,
        reference: str = "train",
        extras: Sequence[Extra] = (),
        others: Sequence[Measure] = (),
        seeds: Sequence[int] | None = None,
        guidance_scales: Sequence[float] | None = None,
        steps: Sequence[int] | None = None,
        search: tuple[float, float] | None = None,
        search_tolerance: float = 0.02,
        save: Literal["png", "npz"] | None = None,
    ):
        self.measures = [Measure(InceptionFeatures() if extractor is None else extractor, reference, extras), *others]
        keys = [measure.key for measure in self.measures]
        if len({*keys}) < len(keys):
            raise ValueError(f"Two measures are called {', '.join(keys)}; give each extractor once.")
        self.seeds, self.guidance_scales, self.steps = seeds, guidance_scales, steps
        self.search, self.search_tolerance, self.save = search, search_tolerance, save
        self._ready = False

    @property
    def key(self) -> str:
        """Name of the first distance, by which settings are compared."""
        return self.measures[0].key

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what could only fail after the samples were made; get the statistics of the real images.

        Raises:
            ValueError: If there are no real images to compare with, or too few samples, or settings that the module
                does not have.
        """
        data = trainer.datamodule
        if stage == "predict" or (stage == "fit" and not trainer.limit_val_batches):
            return
        if data is None or not hasattr(data, "reference_dataloader"):
            raise ValueError(
                "FIDEvaluation compares with real images, but the trainer has no data module with a "
                "reference_dataloader; pass one of sclightning.data or give yours that method."
            )
        loader = data.predict_dataloader() if stage == "test" else data.val_dataloader()
        self._num_samples = len(loader.dataset)
        self._num_batches = -(-self._num_samples // loader.batch_size)
        if stage == "test":
            if sum(isinstance(callback, FIDEvaluation) for callback in trainer.callbacks) > 1:
                raise ValueError(
                    "A test with two FIDEvaluations would set the model's times and seeds twice; give the Trainer one, "
                    "and what the second measures as its 'others'."
                )
            self._plan, data.test_passes = self._settings(pl_module)
            rank_zero_info(f"{data.test_passes} x {self._num_samples:,} samples will be made")
        device = trainer.strategy.root_device
        data.to_uint8(torch.zeros(1, *data.image_shape, device=device))  # which latents without a decoder refuse
        for measure in self.measures:
            measure.prepare(data, device, self._num_samples)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the samples of the last time."""
        self._ready = not trainer.sanity_checking
        for measure in self.measures if self._ready else ():
            measure.reset()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor,
        batch: SampleRequest,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take in a batch of samples.

        Raises:
            ValueError: If samples are not finite.
        """
        if self._ready:
            self._take(trainer.datamodule, outputs, batch_idx)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the distances."""
        if self._ready:
            pl_module.log_dict(self._distances(trainer), prog_bar=True)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember how the module samples by itself."""
        self._runs: list[dict[str, Any]] = []
        self._own = {name: getattr(pl_module, name) for name in Setting._fields if hasattr(pl_module, name)}

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Give the module the next setting, if this is its first batch."""
        if batch_idx == 0:
            setting = self._plan.send(self._runs[-1][self.key] if self._runs else None)
            for name in self._own:
                setattr(pl_module, name, getattr(setting, name))
            for measure in self.measures:
                measure.reset()
            self._kept: SampleSet | None = None
            self._paces: list[tuple[int, float]] = []
            self._began = time.perf_counter()
        self._batch_began = _now(pl_module.device)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor,
        batch: SampleRequest,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take in a batch of samples; after the last of a setting, its distances."""
        self._paces.append((len(outputs), _now(pl_module.device) - self._batch_began))
        images = self._take(trainer.datamodule, outputs, batch_idx)
        if self.save is not None:
            if self._kept is None:
                path = self._path(trainer, [_setting(pl_module)])
                self._kept = SampleSet(path, self.save, (self._num_samples, *images.shape[1:]), trainer.strategy)
            self._kept.add(batch.index, images)
        if batch_idx + 1 == trainer.num_test_batches[dataloader_idx]:
            self._finish(trainer, pl_module)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the best of the runs, print all of them and write what they mean beside the checkpoint."""
        for name, value in self._own.items():
            setattr(pl_module, name, value)
        trainer.datamodule.test_passes = 1
        best = min(self._runs, key=lambda run: run[self.key])
        pl_module.log_dict({name: best[name] for name in self._names})
        if trainer.is_global_zero:
            path = Path(f"{self._path(trainer, self._runs)}.json")
            path.write_text(json.dumps(best | self._result(trainer), indent=2) + "\n")
            Console(width=200).print(self._table())  # as wide as it is, also in a file
            rank_zero_info(f"Wrote {path}")

    def _settings(self, pl_module: L.LightningModule) -> tuple[Generator[Setting, float, None], int]:
        """Settings one after the other, each for the distance of the one before, and their number."""
        own, seeds = getattr(pl_module, "times", None), self.seeds or [pl_module.seed]
        guided = pl_module.guidance_scale is not None and self.guidance_scales
        scales = self.guidance_scales if guided else [pl_module.guidance_scale]
        if self.search is not None:
            if own is None:
                raise ValueError(
                    f"{type(pl_module).__name__} has no intermediate time to search for; take 'search' out."
                )
            low, high = self.search
            if not (0 < low < high < own[0] and self.search_tolerance > 0 and self.save is None):
                raise ValueError(
                    f"The search is from {low} to {high} with tolerance {self.search_tolerance} and save={self.save}"
                    f"; give an interval within 0 and {own[0]:.4f}, a tolerance above 0, and no save."
                )
            n = golden_evaluations(low, high, self.search_tolerance)
            return _search((low, high), n, own[0], scales[0], seeds[0]), n
        if own is not None and not all(1 <= n <= len(own) for n in self.steps or ()):
            raise ValueError(
                f"Tests in {', '.join(map(str, self.steps))} steps are asked for, but the model has {len(own)} times; "
                "set model.init_args.times to as many as the most of them."
            )
        times = [own] if own is None or not self.steps else [own[:n] for n in self.steps]
        settings = grid(times, scales, seeds)
        return (setting for setting in settings), len(settings)

    def _take(self, data: L.LightningDataModule, samples: Tensor, batch_idx: int) -> Tensor:
        """Samples as images, after all measures have seen them."""
        if not all(gather(samples.isfinite().all())):
            raise ValueError(
                "Samples are not finite, so no distance can be given; the network has diverged: lower the learning "
                "rate or go back to an earlier checkpoint."
            )
        images = data.to_uint8(samples)
        for measure in self.measures:
            measure.update(images, batch_idx, self._num_batches)
        return images

    def _distances(self, trainer: L.Trainer) -> dict[str, float]:
        found = {name: value for measure in self.measures for name, value in measure.compute().items()}
        found = trainer.strategy.broadcast(found)
        self._names = list(found)
        return found

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the run of a setting that has all its samples."""
        if self._kept is not None:
            self._kept.close()
        # The first batch pays for what is done once: kernels chosen, compiled, memory taken.
        images, seconds = (sum(column) for column in zip(*(self._paces[1:] or self._paces), strict=True))
        pace = sum(gather(torch.tensor(images / seconds, device=pl_module.device))).item()
        run = self._distances(trainer) | _setting(pl_module) | {"samples": self.measures[0].num_samples}
        run |= {"images_per_second": pace, "seconds": time.perf_counter() - self._began}
        self._runs.append(trainer.strategy.broadcast(run))

    def _result(self, trainer: L.Trainer) -> dict[str, Any]:
        device = trainer.strategy.root_device
        result = {
            **self.measures[0].record,
            "others": {measure.key: measure.record for measure in self.measures[1:]},
            "least_of_seeds": least_of_seeds(self._runs, self.key),
            "runs": self._runs,
            "checkpoint": str(trainer.ckpt_path) if trainer.ckpt_path else None,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "devices": trainer.world_size,
            "trainer_precision": trainer.precision,
            "versions": {"sclightning": sclightning.__version__, "torch": torch.__version__}
            | {name: version(name) for name in ("lightning", "torchmetrics", "torch-fidelity")},
        }
        if self.search is not None:
            result["search"] = {"interval": list(self.search), "tolerance": self.search_tolerance}
        return result

    def _table(self) -> Table:
        """One row for each setting, the least of its seeds."""
        shown = [name for name in self._names if not name.endswith("_std")]
        table = Table(title=f"{self._runs[0]['samples']:,} samples against {self.measures[0].reference}")
        for column in ("evaluations", "times", "guidance", *shown, "images/s", "seed", "each seed"):
            table.add_column(column, justify="right")
        for best in least_of_seeds(self._runs, self.key):
            same = [run for run in self._runs if all(run[k] == best[k] for k in ("nfe", "times", "guidance_scale"))]
            table.add_row(
                str(best["nfe"]),
                " ".join(f"{t:.4g}" for t in best["times"] or ()) or "-",
                "-" if best["guidance_scale"] is None else f"{best['guidance_scale']:g}",
                *(f"{best[name]:.4g}" for name in shown),
                f"{best['images_per_second']:.1f}",
                str(best["seed"]),
                " ".join(f"{run[self.key]:.4g}" for run in same),
            )
        return table

    def _path(self, trainer: L.Trainer, runs: Sequence[dict[str, Any]]) -> Path:
        """Where a result goes: checkpoint, distance, reference, samples, range of the settings; without suffix."""
        checkpoint = Path(trainer.ckpt_path or Path(trainer.default_root_dir) / "model.ckpt")
        name = f"{checkpoint.stem}_{self.key}_{Path(self.measures[0].reference).stem}_n{self._num_samples}"
        settings = {
            "nfe": {run["nfe"] for run in runs},
            "t": {time for run in runs for time in (run["times"] or ())[1:]},
            "guidance": {run["guidance_scale"] for run in runs} - {None},
            "seed": {run["seed"] for run in runs},
        }
        for label, values in settings.items():
            ends = [min(values), max(values)] if len(values) > 1 else [*values]
            if ends:
                name += f"_{label}" + "-".join(f"{end:.4g}" if isinstance(end, float) else str(end) for end in ends)
        return checkpoint.parent / (name + "_search" * (self.search is not None))


def _setting(pl_module: L.LightningModule) -> dict[str, Any]:
    """How a module samples at present."""
    times = getattr(pl_module, "times", None)
    return {
        "nfe": pl_module.nfe,
        "times": None if times is None else list(times),
        "guidance_scale": pl_module.guidance_scale,
        "seed": pl_module.seed,
    }


def _search(
    interval: tuple[float, float], evaluations: int, t_max: float, guidance_scale: float | None, seed: int
) -> Generator[Setting, float, None]:
    """Two steps, the second time by golden section; wants the distance of each setting sent back."""
    times = golden_section(*interval, evaluations)
    time = next(times)
    while True:
        time = times.send((yield Setting([t_max, time], guidance_scale, seed)))


def _now(device: torch.device) -> float:
    """Seconds on a clock that has waited for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
