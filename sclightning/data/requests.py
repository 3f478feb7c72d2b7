"""Requests for samples: what validation, test and prediction iterate over instead of images."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class SampleRequest(NamedTuple):
    """A batch of samples to make."""

    index: Tensor
    """Index of each sample, int64 (B,): the key of its noise."""
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
    """Every ``num_replicas``-th index and nothing twice.

    ``DistributedSampler`` pads to equal lengths, and a sample counted twice moves a Fréchet distance. Being a subclass
    keeps Lightning from putting a padding sampler in our place.
    """

    def __iter__(self):
        return iter(range(self.rank, len(self.dataset), self.num_replicas))

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))


def request_loader(requests: SampleRequests, batch_size: int, num_replicas: int, rank: int) -> DataLoader:
    """Loader of this rank's share of the requests."""
    sampler = StridedSampler(requests, num_replicas, rank, shuffle=False)
    # By keyword: Lightning builds the loader anew for prediction and counts positional arguments twice.
    return DataLoader(requests, batch_size=batch_size, sampler=sampler, collate_fn=whole)


def whole(batch):
    """Collate function of data that comes in batches already."""
    return batch
