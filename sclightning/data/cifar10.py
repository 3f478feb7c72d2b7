"""CIFAR-10: 60,000 colour images of 32x32."""

import numpy as np
from torch import Tensor
from torchvision.datasets import CIFAR10

from sclightning.data.arrays import ArrayDataset, ImageDataModule, Split


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10 (Krizhevsky 2009): 50,000 images to train on, 10,000 held out; unconditional as in the paper.

    Args:
        root: Folder with torchvision's ``cifar-10-batches-py``.
        download: Whether torchvision may download it there.
        conditional: Whether batches and requests carry class labels.
        batch_size: Images per step and process.
        num_val_samples: Samples to make in each validation.
        num_test_samples: Samples to make in test and prediction.
        sample_batch_size: Samples to make at once.
        seed: Seed of the order of training images.
    """

    name = "cifar-10"
    image_shape = (3, 32, 32)

    def __init__(
        self,
        root: str = "data",
        download: bool = True,
        conditional: bool = False,
        batch_size: int = 128,
        num_val_samples: int = 100,
        num_test_samples: int = 50_000,
        sample_batch_size: int = 500,
        seed: int = 0,
    ):
        super().__init__(batch_size, num_val_samples, num_test_samples, sample_batch_size, seed)
        self.root, self.download, self.num_classes = root, download, 10 if conditional else 0

    def prepare_data(self) -> None:
        """Download on one process, before the others read."""
        if self.download:
            CIFAR10(self.root, download=True)

    def read(self, split: Split) -> ArrayDataset:
        """Images and labels of torchvision's split.

        Raises:
            FileNotFoundError: If the files are not there and were not downloaded.
        """
        try:
            dataset = CIFAR10(self.root, train=split == "train")
        except RuntimeError as error:
            raise FileNotFoundError(
                f"CIFAR-10 is not in {self.root} (or damaged); set data.init_args.root to the folder that holds "
                "cifar-10-batches-py, or allow data.init_args.download."
            ) from error
        images = np.ascontiguousarray(dataset.data.transpose(0, 3, 1, 2))
        return ArrayDataset(images, np.array(dataset.targets, dtype=np.int64))

    def on_after_batch_transfer(self, batch, dataloader_idx: int):
        """Images from uint8 to [-1, 1]; labels only if conditional."""
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        is_training = isinstance(batch, tuple | list) and isinstance(batch[0], Tensor) and batch[0].ndim == 4
        return batch if self.num_classes or not is_training else batch[0]
