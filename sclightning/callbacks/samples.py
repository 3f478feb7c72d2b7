"""Samples to look at: a grid during training, a folder of images from ``predict``."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torchvision.io import write_png
from torchvision.utils import make_grid

from sclightning.data.requests import SampleRequest, SampleRequests


class SampleGrid(L.Callback):
    """A grid of the same samples after every validation, to TensorBoard and as ``samples/step_….png`` of the run.

    Args:
        rows: Rows of the grid.
        columns: Columns of the grid, one class each where there are as many.
    """

    def __init__(self, rows: int = 8, columns: int = 10):
        self.rows, self.columns = rows, columns

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the samples on every process (a sharded network needs all of them), write on the first."""
        data = trainer.datamodule
        if trainer.sanity_checking or data is None:
            return
        request = SampleRequests(self.rows * self.columns, data.image_shape, data.num_classes).__getitems__(
            list(range(self.rows * self.columns))
        )
        images = data.to_uint8(pl_module.sample(request.index, request.shape, request.label)).cpu()
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "samples"  # log_dir is a collective call
        self._write(trainer, make_grid(images, nrow=self.columns, padding=1), folder)

    @rank_zero_only
    def _write(self, trainer: L.Trainer, grid: Tensor, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_png(grid, str(folder / f"step_{trainer.global_step:07d}.png"))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", grid, trainer.global_step)


class SampleWriter(BasePredictionWriter):
    """Writes what ``predict`` makes as ``000000.png`` …, named by sample index.

    Args:
        folder: Where to; made if it is not there.
    """

    def __init__(self, folder: str = "samples"):
        super().__init__(write_interval="batch")
        self.folder = Path(folder)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a folder in which images of an earlier prediction would stay among those of this one.

        Raises:
            FileExistsError: If there are such images.
        """
        written = {f"{index:06d}.png" for index in range(len(trainer.datamodule.predict_dataloader().dataset))}
        if stale := {path.name for path in self.folder.glob("*.png")} - written:
            raise FileExistsError(
                f"{self.folder} has {len(stale)} images that this prediction would not replace (first {min(stale)}); "
                "give --samples.folder another folder, or delete them."
            )

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Tensor,
        batch_indices: Sequence[int] | None,
        batch: SampleRequest,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch of this process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for index, image in zip(batch.index.tolist(), trainer.datamodule.to_uint8(prediction).cpu(), strict=True):
            write_png(image, str(self.folder / f"{index:06d}.png"))


class SampleSet:
    """The samples of one setting of a test on disk, written by all processes, each its own.

    Args:
        path: Where to, without suffix.
        kind: ``png`` for a folder of ``000000.png`` …, ``npz`` for one file with ``arr_0``, uint8 (N, H, W, C), which
            ADM's evaluation reads.
        shape: (N, C, H, W).
        strategy: What the processes wait for each other with; they share the file system.
    """

    def __init__(self, path: Path, kind: Literal["png", "npz"], shape: tuple[int, int, int, int], strategy: Strategy):
        self.path, self.kind, self.strategy = path, kind, strategy
        if kind == "png":
            path.mkdir(parents=True, exist_ok=True)
            return
        self._file = Path(f"{path}.npy")
        n, c, h, w = shape
        if strategy.is_global_zero:
            np.lib.format.open_memmap(self._file, "w+", np.uint8, (n, h, w, c)).flush()
        strategy.barrier()
        self._array = np.lib.format.open_memmap(self._file, "r+")

    def add(self, index: Tensor, images: Tensor) -> None:
        """Write images, uint8 (B, C, H, W), under their indices (B,)."""
        if self.kind == "npz":
            self._array[index.cpu().numpy()] = images.permute(0, 2, 3, 1).cpu().numpy()
            return
        for i, image in zip(index.tolist(), images.cpu(), strict=True):
            write_png(image, str(self.path / f"{i:06d}.png"))

    def close(self) -> None:
        """Wait for all processes, then make the file what its name says."""
        if self.kind == "npz":
            self._array.flush()
            self.strategy.barrier()
            if self.strategy.is_global_zero:
                with zipfile.ZipFile(f"{self.path}.npz", "w") as archive:
                    archive.write(self._file, "arr_0.npy")
                self._file.unlink()
