"""ImageNet at 64x64 from memory-mapped arrays."""

import numpy as np

from sclightning.data.arrays import ArrayDataset, ImageDataModule, Split
from sclightning.data.storage import open_split


class ImageNet64DataModule(ImageDataModule):
    """ImageNet (ILSVRC 2012) at 64x64: short side resized bicubically, centre crop, no flips (App. G).

    Any other images that ``sclightning prepare`` made will do, by their name, shape and number of classes.

    Args:
        root: Folder that ``sclightning prepare`` wrote. The arrays in it are mapped into memory, not read.
        name: Name of the data in results.
        image_shape: (C, H, W).
        num_classes: Number of labels; 0 for unconditional data.
        batch_size: Images per step and process.
        num_val_samples: Samples to make in each validation.
        num_test_samples: Samples to make in test and prediction.
        sample_batch_size: Samples to make at once.
        seed: Seed of the order of training images.
    """

    sigma_data = None
    """Not measured, since the paper, like EDM, takes 0.5 for the model whatever the images' own value."""

    def __init__(
        self,
        root: str = "data/imagenet64",
        name: str = "imagenet-64",
        image_shape: tuple[int, int, int] = (3, 64, 64),
        num_classes: int = 1000,
        batch_size: int = 32,
        num_val_samples: int = 100,
        num_test_samples: int = 50_000,
        sample_batch_size: int = 250,
        seed: int = 0,
    ):
        super().__init__(batch_size, num_val_samples, num_test_samples, sample_batch_size, seed)
        self.root, self.name, self.image_shape, self.num_classes = root, name, tuple(image_shape), num_classes

    def read(self, split: Split) -> ArrayDataset:
        """Memory maps of a split, see :func:`~sclightning.data.storage.open_split`."""
        return open_split(self.root, split, "images", np.uint8, self.image_shape, self.num_classes)
