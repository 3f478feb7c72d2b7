"""Samples to look at: a grid during training, a folder of images from ``predict``."""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import TensorBoardLogger
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
