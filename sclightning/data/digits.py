"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 in its wheel, nothing to download."""

import numpy as np

from sclightning.data.arrays import ArrayDataset, ImageDataModule, Split


class DigitsDataModule(ImageDataModule):
    """Handwritten digits (UCI ML, test set), split into two random halves: one to train on, one held out.

    Args:
        batch_size: Images per step and process.
        num_val_samples: Samples to make in each validation.
        num_test_samples: Samples to make in test and prediction.
        sample_batch_size: Samples to make at once.
        seed: Seed of the order of training images.
    """

    name = "digits"
    image_shape = (1, 8, 8)
    num_classes = 10

    def __init__(
        self,
        batch_size: int = 128,
        num_val_samples: int = 100,
        num_test_samples: int = 2_000,
        sample_batch_size: int = 500,
        seed: int = 0,
    ):
        super().__init__(batch_size, num_val_samples, num_test_samples, sample_batch_size, seed)

    def read(self, split: Split) -> ArrayDataset:
        """One half of the images, always the same."""
        from sklearn.datasets import load_digits  # a second of import time that other data need not pay

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        half = np.sort(order[::2] if split == "train" else order[1::2])
        images = np.rint(digits.images[half, None] * (255 / 16)).astype(np.uint8)
        return ArrayDataset(images, digits.target[half].astype(np.int64))
