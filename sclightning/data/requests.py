"""Requests for samples: what validation, test and prediction iterate over instead of images."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class SampleRequest(NamedTuple):
    """A batch of samples to make."""

    index: Tensor
    """Index of each sample, int64 (B,), the key of its noise."""
    label: Tensor | None
    """Class labels, int64 (B,)."""
    shape: tuple[int, int, int]
    """Shape of one sample, (C, H, W)."""


class SampleRequests(Dataset):
    """The first ``num_samples`` indices, their labels cycling through the classes.

    Args:
        num_samples: How many samples there are to make, over all devices.
        shape: Shape of one sample, (C, H, W).
        num_classes: Number of classes; 0 for requests without label.
    """

    def __init__(self, num_samples: int, shape: tuple[int, int, int], num_classes: int):
        self.num_samples, self.shape, self.num_classes = num_samples, shape, num_classes

    def __len__(self) -> int:
        return self.num_samples

    def __getitems__(self, indices: list[int]) -> SampleRequest:
        index = torch.tensor(indices)
        return SampleRequest(index, index % self.num_classes if self.num_classes else None, self.shape)


class StridedSampler(DistributedSampler):
    """Every ``num_replicas``-th batch: the batches, and with them all rounding, are the same on any number of devices.

    All ranks get as many batches, for a sharded network needs every rank in every forward. Of round k, rank r has batch
    ``k * num_replicas + r``; if there are no more than that many, it makes its first once more, to be dropped.
    (``DistributedSampler`` pads sample by sample, unseen, and a sample counted twice moves a Fréchet distance. Being a
    subclass keeps Lightning from putting one in our place.)

    Args:
        dataset: What to go through in order.
        num_replicas: Number of processes that share it.
        rank: This process.
        batch_size: Batch size of the loader.
    """

    def __init__(self, dataset: Dataset, num_replicas: int, rank: int, batch_size: int):
        super().__init__(dataset, num_replicas, rank, shuffle=False)
        self.batch_size = batch_size

    def __iter__(self):
        return iter(
            index
            for batch in self._batches()
            for index in range(batch * self.batch_size, min((batch + 1) * self.batch_size, len(self.dataset)))
        )

    def __len__(self) -> int:
        return sum(min(self.batch_size, len(self.dataset) - b * self.batch_size) for b in self._batches())

    def _batches(self) -> list[int]:
        total = math.ceil(len(self.dataset) / self.batch_size)
        own = list(range(self.rank, total, self.num_replicas))
        return own if len(own) == math.ceil(total / self.num_replicas) else [*own, own[0] if own else 0]


def strided_loader(dataset: Dataset, batch_size: int, num_replicas: int, rank: int) -> DataLoader:
    """Loader of this rank's share of the batches."""
    sampler = StridedSampler(dataset, num_replicas, rank, batch_size)
    # By keyword: Lightning builds the loader anew for prediction and counts positional arguments twice.
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=whole)


def whole(batch):
    """Collate function of data that comes in batches already."""
    return batch
