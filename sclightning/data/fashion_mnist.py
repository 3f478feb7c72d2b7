"""Fashion-MNIST: 70,000 grey images of clothing, padded from 28x28 to 32x32."""

import contextlib
import gzip
from pathlib import Path

import numpy as np
from torch import Tensor
from torchvision.datasets import FashionMNIST

from sclightning.data.arrays import ArrayDataset, ImageDataModule, Split

_FILES = {"train": "train", "held_out": "t10k"}


class FashionMNISTDataModule(ImageDataModule):
    """Fashion-MNIST (Xiao et al. 2017): 60,000 images to train on, 10,000 held out.

    Looks for the four IDX files, gzipped or not, in ``root`` and where Debian's package ``dataset-fashion-mnist`` puts
    them; otherwise torchvision downloads them to ``root``.

    Args:
        root: Folder of the IDX files.
        download: Whether torchvision may download them.
        batch_size: Images per step and process.
        num_val_samples: Samples to make in each validation.
        num_test_samples: Samples to make in test and prediction.
        sample_batch_size: Samples to make at once.
        seed: Seed of the order of training images.
        black: Value of level 0 in the training data, at most -1; the other 255 keep theirs in (-1, 1]. Three pixels in
            five are exactly black. Below -1 there is a gap under the darkest grey, which :meth:`to_uint8` clips to
            black: a sample has to miss black by more than the gap before grain is seen.

    Raises:
        ValueError: If black would lie among the greys.
    """

    name = "fashion-mnist"
    image_shape = (1, 32, 32)
    num_classes = 10

    def __init__(
        self,
        root: str = "data",
        download: bool = True,
        batch_size: int = 512,
        num_val_samples: int = 100,
        num_test_samples: int = 10_000,
        sample_batch_size: int = 1_000,
        seed: int = 0,
        black: float = -1.0,
    ):
        super().__init__(batch_size, num_val_samples, num_test_samples, sample_batch_size, seed)
        if not black <= -1:
            raise ValueError(f"black={black} lies among the greys; give -1, its place, or less.")
        self.root, self.download, self.black = root, download, black

    def from_uint8(self, images: Tensor) -> Tensor:
        """Images in {0, …, 255} as training data, float32 in [-1, 1] but for black."""
        return super().from_uint8(images).masked_fill(images == 0, self.black)

    def prepare_data(self) -> None:
        """Download on one process, before the others read, what is not there."""
        if self.download and None in [path for split in _FILES for path in self._paths(split)]:
            with contextlib.suppress(OSError, RuntimeError):  # reading says what is to be done
                FashionMNIST(self.root, download=True)

    def read(self, split: Split) -> ArrayDataset:
        """Images and labels of torchvision's split.

        Raises:
            FileNotFoundError: If the files are nowhere and may or can not be downloaded.
        """
        if None in self._paths(split):
            self.prepare_data()  # without a Trainer nobody else has
        paths = self._paths(split)
        if None in paths:
            raise FileNotFoundError(
                f"Fashion-MNIST is neither in {self.root} nor in /usr/share/datasets/fashion-mnist, and was not "
                "downloaded; install Debian's dataset-fashion-mnist, set data.init_args.root, or allow "
                "data.init_args.download and a connection."
            )
        images, labels = (_read_idx(path) for path in paths)
        return ArrayDataset(np.pad(images[:, None], ((0, 0), (0, 0), (2, 2), (2, 2))), labels.astype(np.int64))

    def _paths(self, split: Split) -> list[Path | None]:
        return [self._find(f"{_FILES[split]}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]

    def _find(self, name: str) -> Path | None:
        folders = [Path(self.root), Path(self.root) / "FashionMNIST/raw", Path("/usr/share/datasets/fashion-mnist")]
        candidates = [folder / (name + suffix) for folder in folders for suffix in ("", ".gz")]
        return next((path for path in candidates if path.is_file()), None)


def _read_idx(path: Path) -> np.ndarray:
    """Array of uint8 from an IDX file: magic number with the rank in its last byte, big-endian lengths, values."""
    data = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
