"""ImageNet at 64x64 from memory-mapped arrays."""

from pathlib import Path

import numpy as np

from sclightning.data.arrays import ArrayDataset, ImageDataModule, Split


class ImageNet64DataModule(ImageDataModule):
    """ImageNet (ILSVRC 2012) at 64x64: short side resized bicubically, centre crop, no flips (App. G).

    Args:
        root: Folder of ``{train,held_out}_images.npy``, uint8 (N, 3, 64, 64), and ``{train,held_out}_labels.npy``,
            int64 (N,). They are mapped into memory, not read.
        batch_size: Images per step and process.
        num_val_samples: Samples to make in each validation.
        num_test_samples: Samples to make in test and prediction.
        sample_batch_size: Samples to make at once.
        seed: Seed of the order of training images.
    """

    name = "imagenet-64"
    image_shape = (3, 64, 64)
    num_classes = 1000
    sigma_data = None
    """Not measured: the paper, like EDM, takes 0.5 for the model whatever the images' own value."""

    def __init__(
        self,
        root: str = "data/imagenet64",
        batch_size: int = 32,
        num_val_samples: int = 100,
        num_test_samples: int = 50_000,
        sample_batch_size: int = 250,
        seed: int = 0,
    ):
        super().__init__(batch_size, num_val_samples, num_test_samples, sample_batch_size, seed)
        self.root = root

    def read(self, split: Split) -> ArrayDataset:
        """Memory maps of a split.

        Raises:
            FileNotFoundError: If an array is missing.
            ValueError: If an array is of another shape or type.
        """
        images = map_array(Path(self.root) / f"{split}_images.npy", np.uint8, self.image_shape)
        labels = map_array(Path(self.root) / f"{split}_labels.npy", np.int64, ())
        return ArrayDataset(images, labels)


def map_array(path: Path, dtype: np.typing.DTypeLike, shape: tuple[int, ...]) -> np.ndarray:
    """Memory map of an ``.npy`` file whose entries have the given type and shape.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no array at {path}; set data.init_args.root to the folder of the prepared data set."
        )
    array = np.load(path, mmap_mode="r")
    if array.dtype != dtype or array.shape[1:] != shape:
        raise ValueError(
            f"{path} holds {array.dtype} of shape {array.shape}; expected {np.dtype(dtype)} of shape (N, "
            f"{', '.join(map(str, shape))}): prepare the data set again."
        )
    return array
