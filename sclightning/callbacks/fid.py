"""Fréchet distance between samples and real images, during ``fit`` and in ``test``."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics.image import FrechetInceptionDistance

from sclightning.data.arrays import Split
from sclightning.data.requests import SampleRequest
from sclightning.metrics import InceptionFeatures, weights_digest


class FIDEvaluation(L.Callback):
    """Fréchet distance of the samples that validation and test make to the data module's real images.

    It is logged as ``fid`` in the features of the 2015 Inception graph, as ``fd_<extractor>`` in any others. After
    ``test`` a JSON beside the checkpoint says what was compared with what.

    The metric is not a submodule of the model: half-precision runs would round its float64 sums, and every checkpoint
    would carry Inception.

    Args:
        extractor: Module with ``name`` and ``num_features`` that maps uint8 images (B, C, H, W) to features (B, d);
            Inception if not given, with torch-fidelity's download of its weights.
        reference: Split of the data module that holds the real images, ``train`` or ``held_out``.
    """

    def __init__(self, extractor: nn.Module | None = None, reference: Split = "train"):
        self.extractor = (InceptionFeatures() if extractor is None else extractor).eval().requires_grad_(False)
        self.reference = reference
        self.metric: FrechetInceptionDistance | None = None

    @property
    def key(self) -> str:
        """Name of the number."""
        return "fid" if isinstance(self.extractor, InceptionFeatures) else f"fd_{self.extractor.name}"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what could only fail after the samples were made.

        Raises:
            ValueError: If there is no data module to take real images from.
        """
        data = trainer.datamodule
        if data is None or not hasattr(data, "reference_dataloader"):
            raise ValueError(
                "FIDEvaluation compares with real images, but the trainer has no data module with a "
                "reference_dataloader; pass one of sclightning.data or give yours that method."
            )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the samples of the last time; see the real images once."""
        if self.metric is None and not trainer.sanity_checking:
            self.metric = FrechetInceptionDistance(
                feature=self.extractor, reset_real_features=False, normalize=False, antialias=False
            ).to(pl_module.device)
            # The states are summed over processes: one of them counts the real images.
            if trainer.is_global_zero:
                for images, _ in trainer.datamodule.reference_dataloader(self.reference):
                    self.metric.update(images.to(pl_module.device), real=True)
        if self.metric is not None:
            self.metric.reset()

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
        if self.metric is None:
            return
        if not outputs.isfinite().all():
            raise ValueError(
                "Samples are not finite, so no distance can be given; the network has diverged: lower the learning "
                "rate or go back to an earlier checkpoint."
            )
        self.metric.update(trainer.datamodule.to_uint8(outputs), real=False)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the distance."""
        if self.metric is not None:
            pl_module.log(self.key, self.metric.compute().float(), prog_bar=True, rank_zero_only=False)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the distance and write what it means beside the checkpoint."""
        distance = float(self.metric.compute())
        pl_module.log(self.key, distance)
        samples = int(trainer.strategy.reduce(self.metric.fake_features_num_samples, reduce_op="sum"))
        if trainer.is_global_zero:
            self._write(trainer, pl_module, distance, samples)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, distance: float, samples: int) -> None:
        data, real = trainer.datamodule, trainer.datamodule.split(self.reference)
        result: dict[str, Any] = {
            self.key: distance,
            "extractor": {"name": self.extractor.name, "sha256": weights_digest(self.extractor)},
            "reference": {
                "data": data.name,
                "split": self.reference,
                "images": len(real),
                "sha256": real.digest(),
            },
            "samples": samples,
            "nfe": pl_module.nfe,
            "seed": pl_module.seed,
            "guidance_scale": pl_module.guidance_scale,
            "checkpoint": str(trainer.ckpt_path) if trainer.ckpt_path else None,
            "torch": torch.__version__,
        }
        checkpoint = Path(trainer.ckpt_path or Path(trainer.default_root_dir) / "model.ckpt")
        guidance = "" if pl_module.guidance_scale is None else f"_guidance{pl_module.guidance_scale}"
        name = f"{checkpoint.stem}_{self.key}_{self.reference}_nfe{pl_module.nfe}{guidance}_seed{pl_module.seed}.json"
        path = checkpoint.with_name(name)
        path.write_text(json.dumps(result, indent=2) + "\n")
        rank_zero_info(f"Wrote {path}")
