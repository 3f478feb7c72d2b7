"""Images in arrays: one place for reading in batches, for the order of samples and for the range of values."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Timer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from sclightning.data.requests import SampleRequests, strided_loader, whole

Split = Literal["train", "held_out"]


class ArrayDataset(Dataset):
    """Images and labels, read a batch at a time.

    Args:
        images: uint8, shape (N, C, H, W); any array with batched indexing, a memory map for one.
        labels: int64, shape (N,).
        sha256: Digest of the arrays if it is known already; reading 80 GB for it takes minutes.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, sha256: str | None = None):
        self.images, self.labels, self._sha256 = images, labels, sha256

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.images[indices]), torch.from_numpy(self.labels[indices])

    def digest(self) -> str:
        """SHA-256 of images and labels, the name by which a result knows its reference."""
        if self._sha256 is not None:
            return self._sha256
        sha = hashlib.sha256()
        for array in (self.images, self.labels):
            sha.update(np.ascontiguousarray(array))
        return sha.hexdigest()


class EndlessSampler(DistributedSampler):
    """An endless stream of epochs, each its own permutation: the order is a pure function of (seed, position).

    Args:
        dataset: What to draw from.
        num_replicas: Number of processes that share the stream.
        rank: This process.
        seed: Seed of the permutations.
        position: Gives the position in the stream, counted in samples over all processes, where an iterator starts.
    """

    def __init__(self, dataset: Dataset, num_replicas: int, rank: int, seed: int, position: Callable[[], int]):
        super().__init__(dataset, num_replicas, rank, seed=seed)
        self.position = position

    def __iter__(self) -> Iterator[int]:
        position, n = self.position() + self.rank, len(self.dataset)
        while True:
            epoch = position // n
            order = np.random.default_rng((self.seed, epoch)).permutation(n)
            while position // n == epoch:
                yield int(order[position % n])
                position += self.num_replicas

    def __len__(self) -> int:
        raise TypeError("An endless stream has no length.")


class ImageDataModule(L.LightningDataModule):
    """Images that fit an array; a subclass names them and reads them.

    Training batches are ``(x_0, label)``: uint8 on the loader's side, float32 in [-1, 1] on the device. The stream
    never ends, so a run is as long as ``trainer.max_steps`` (or ``max_time``) says. Validation, test and prediction
    batches are requests for samples.

    Attributes:
        name: Name of the data in results.
        image_shape: (C, H, W).
        num_classes: Number of labels.
        test_passes: How often a test makes its samples; an evaluation of several settings sets it.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    test_passes: int = 1

    def __init__(self, batch_size: int, num_val_samples: int, num_test_samples: int, sample_batch_size: int, seed: int):
        super().__init__()
        self.save_hyperparameters(logger=False)  # the module has a seed of its own
        self._position, self._batches = 0, 0  # of the stream and of the trainer, when this process began
        self._splits: dict[Split, ArrayDataset] = {}

    def read(self, split: Split) -> ArrayDataset:
        """The images of a split from where they are stored."""
        raise NotImplementedError(f"{type(self).__name__} does not read anything.")

    def split(self, split: Split) -> ArrayDataset:
        """The images of a split, read once."""
        if split not in get_args(Split):
            raise ValueError(f"There is no split '{split}'; there are {' and '.join(get_args(Split))}.")
        if split not in self._splits:
            self._splits[split] = self.read(split)
        return self._splits[split]

    @property
    def sigma_data(self) -> float:
        """Measured standard deviation of the training data."""
        images = self.split("train").images
        counts = sum(np.bincount(images[i : i + 1000].ravel(), minlength=256) for i in range(0, len(images), 1000))
        levels = self.from_uint8(torch.arange(256, dtype=torch.uint8)).double().numpy()
        mean = np.average(levels, weights=counts)
        return float(np.average((levels - mean) ** 2, weights=counts) ** 0.5)

    def setup(self, stage: str) -> None:
        """Refuse a run that would never end.

        Raises:
            ValueError: If none of ``max_steps``, ``max_time`` and ``limit_train_batches`` is set.
        """
        trainer = self.trainer
        bounded = trainer.max_steps != -1 or any(isinstance(c, Timer) for c in trainer.callbacks)
        bounded |= isinstance(trainer.limit_train_batches, int) and trainer.max_epochs != -1
        if stage == "fit" and not bounded:
            raise ValueError("The training data is an endless stream and the run has no end; set trainer.max_steps.")

    def train_dataloader(self) -> DataLoader:
        """Endless batches of this process, from where a resumed run left off."""
        data = self.split("train")
        trainer = self.trainer
        sampler = EndlessSampler(data, trainer.world_size, trainer.global_rank, self.hparams.seed, self.position)
        pin = torch.cuda.is_available()
        return DataLoader(data, batch_size=self.hparams.batch_size, sampler=sampler, collate_fn=whole, pin_memory=pin)

    def val_dataloader(self) -> DataLoader:
        """Requests for ``num_val_samples`` samples."""
        return self._requests(self.hparams.num_val_samples)

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """Requests for ``num_test_samples`` samples; as many loaders as there are ``test_passes``."""
        loaders = [self.predict_dataloader() for _ in range(self.test_passes)]
        return loaders[0] if self.test_passes == 1 else loaders

    def predict_dataloader(self) -> DataLoader:
        """Requests for ``num_test_samples`` samples."""
        return self._requests(self.hparams.num_test_samples)

    def reference_dataloader(self, split: Split = "train", num_replicas: int = 1, rank: int = 0) -> DataLoader:
        """Batches ``(uint8 images, labels)`` of a split in stored order, for statistics of real images."""
        return strided_loader(self.split(split), self.hparams.sample_batch_size, num_replicas, rank)

    def on_after_batch_transfer(self, batch, dataloader_idx: int):
        """Images from uint8 to training data, on the device; without their labels if the data is unconditional."""
        # Pinning memory makes lists of tuples.
        if isinstance(batch, tuple | list) and isinstance(batch[0], Tensor) and batch[0].dtype == torch.uint8:
            x_0 = self.from_uint8(batch[0])
            return (x_0, batch[1]) if self.num_classes else x_0
        return batch

    def from_uint8(self, images: Tensor) -> Tensor:
        """Images in {0, …, 255} as training data, float32: in [-1, 1] unless a subclass has another range."""
        return from_uint8(images)

    def to_uint8(self, x: Tensor) -> Tensor:
        """Samples in the range of the data as images."""
        return to_uint8(x)

    def position(self) -> int:
        """Position in the stream after the batches that were trained on, counted in images over all processes."""
        images_per_batch = self.hparams.batch_size * self.trainer.world_size
        return self._position + images_per_batch * (self._processed - self._batches)

    def positions(self, n: int) -> range:
        """Positions in the stream of the ``n`` images of the batch that this process is about to train on."""
        world = self.trainer.world_size
        first = self.position() + self.trainer.global_rank
        return range(first, first + n * world, world)

    @property
    def _processed(self) -> int:
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def state_dict(self) -> dict[str, int]:
        """Position in the stream and number of batches that brought it there."""
        return {"position": self.position(), "batches": self._processed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue the stream, also with another batch size or number of processes."""
        self._position, self._batches = state_dict["position"], state_dict["batches"]

    def _requests(self, num_samples: int) -> DataLoader:
        requests = SampleRequests(num_samples, self.image_shape, self.num_classes)
        trainer = self.trainer
        return strided_loader(requests, self.hparams.sample_batch_size, trainer.world_size, trainer.global_rank)


def from_uint8(images: Tensor) -> Tensor:
    """Images in {0, …, 255} as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Samples in [-1, 1] as images in {0, …, 255}, rounded and clipped (EDM's rule)."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)
