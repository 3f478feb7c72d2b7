"""CIFAR-10: 60,000 colour images of 32x32."""

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10

from sclightning.data.arrays import ArrayDataset, ImageDataModule, Split
from sclightning.data.augmentation import CONDITION_DIM, condition, draw_parameters, send, transform
from sclightning.data.requests import SampleRequest
from sclightning.data.storage import open_split, read_metadata


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10 (Krizhevsky 2009): 50,000 images to train on, 10,000 held out; unconditional as in the paper.

    Args:
        root: Folder with torchvision's ``cifar-10-batches-py``, or with what ``sclightning prepare`` made.
        download: Whether torchvision may download it there.
        conditional: Whether batches and requests carry class labels.
        flip: Whether every second image, at random, is mirrored left to right; the network is not told.
        augment: Probability of each of EDM's augmentations (0.12 in EDM), of which the network is told: it needs
            ``augment_dim: 9``. They include the flip.
        batch_size: Images per step and process.
        num_val_samples: Samples to make in each validation.
        num_test_samples: Samples to make in test and prediction.
        sample_batch_size: Samples to make at once.
        seed: Seed of the order of training images and of their augmentation.
    """

    name = "cifar-10"
    image_shape = (3, 32, 32)

    def __init__(
        self,
        root: str = "data",
        download: bool = True,
        conditional: bool = False,
        flip: bool = False,
        augment: float = 0.0,
        batch_size: int = 128,
        num_val_samples: int = 100,
        num_test_samples: int = 50_000,
        sample_batch_size: int = 500,
        seed: int = 0,
    ):
        super().__init__(batch_size, num_val_samples, num_test_samples, sample_batch_size, seed)
        if flip and augment:
            raise ValueError("EDM's augmentation flips images already, and tells the network; set flip to false.")
        self.root, self.download, self.num_classes = root, download, 10 if conditional else 0
        self.flip, self.augment = flip, augment

    @property
    def augment_dim(self) -> int:
        """Length of the condition that comes with augmented images, 0 without augmentation."""
        return CONDITION_DIM if self.augment else 0

    def prepare_data(self) -> None:
        """Download on one process, before the others read.

        Raises:
            ConnectionError: If that fails.
        """
        if self.download and read_metadata(self.root, "train") is None:
            try:
                CIFAR10(self.root, download=True)
            except (OSError, RuntimeError) as error:
                raise ConnectionError(
                    f"CIFAR-10 is not in {self.root} and cannot be downloaded ({error}); set data.init_args.root to "
                    "the folder that holds cifar-10-batches-py."
                ) from error

    def read(self, split: Split) -> ArrayDataset:
        """Images and labels of torchvision's split, or of a prepared one, in memory.

        Raises:
            FileNotFoundError: If the files are not there and were not downloaded.
        """
        if read_metadata(self.root, split) is not None:
            stored = open_split(self.root, split, "images", np.uint8, self.image_shape, 10)
            return ArrayDataset(np.array(stored.images), np.array(stored.labels), stored.digest())
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
        """Images from uint8 to [-1, 1], mirrored or augmented; labels only if conditional.

        Augmented batches are ``(x_0, label or None, augment)``, the condition of shape (B, 9). What happens to an image
        is a function of (seed, position in the stream).
        """
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        if isinstance(batch, SampleRequest) or not (self.flip or self.augment):
            return batch
        x_0, label = (batch, None) if isinstance(batch, Tensor) else batch
        # With probability 0 all that is left of the augmentation is the flip.
        parameters = draw_parameters(self.hparams.seed, self.positions(len(x_0)), self.augment)
        if self.augment:
            return transform(x_0, parameters), label, send(condition(parameters), x_0.device)
        flipped = send(parameters[:, 0].bool(), x_0.device).view(-1, 1, 1, 1)
        x_0 = torch.where(flipped, x_0.flip(3), x_0)
        return x_0 if label is None else (x_0, label)
