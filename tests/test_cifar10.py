"""CIFAR-10 through torchvision's reader."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sclightning.data import cifar10
from sclightning.data.cifar10 import CIFAR10DataModule


@pytest.fixture
def images(monkeypatch):
    images = SimpleNamespace(data=np.arange(2 * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(2, 32, 32, 3))
    images.targets = [7, 2]
    monkeypatch.setattr(cifar10, "CIFAR10", lambda root, **options: images)
    return images


def test_channels_first_and_labels_in_order(images):
    split = CIFAR10DataModule().read("train")
    assert split.images.shape == (2, 3, 32, 32) and split.images.dtype == np.uint8
    assert (split.images[1, :, 5, 9] == images.data[1, 5, 9]).all()
    assert split.labels.tolist() == [7, 2]


@pytest.mark.parametrize("conditional", [False, True])
def test_labels_only_if_conditional(images, conditional):
    data = CIFAR10DataModule(conditional=conditional)
    assert data.num_classes == (10 if conditional else 0)
    batch = data.on_after_batch_transfer(data.split("train").__getitems__([0, 1]), 0)
    x_0 = batch[0] if conditional else batch
    assert x_0.dtype == torch.float32 and x_0.shape == (2, 3, 32, 32)
    assert x_0.min() == -1 and x_0.max() == 1
    if conditional:
        assert batch[1].tolist() == [7, 2]


def test_missing_files_get_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is not in .*; set data.init_args.root"):
        CIFAR10DataModule(root=str(tmp_path), download=False).read("train")
