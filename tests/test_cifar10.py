"""CIFAR-10 through torchvision's reader."""

from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from conftest import randomize

from sclightning.backbones import DDPMpp
from sclightning.data import cifar10
from sclightning.data.arrays import from_uint8
from sclightning.data.augmentation import condition, draw_parameters, transform
from sclightning.data.cifar10 import CIFAR10DataModule
from sclightning.modules import ConsistencyTraining, TrigFlowDiffusion

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def images(monkeypatch):
    images = SimpleNamespace(data=np.arange(2 * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(2, 32, 32, 3))
    images.targets = [7, 2]
    monkeypatch.setattr(cifar10, "CIFAR10", lambda root, **options: images)
    return images


def test_no_connection(tmp_path, monkeypatch):
    """A download from where nobody answers ends in what to do."""
    monkeypatch.setattr(cifar10.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(ConnectionError, match=r"root.*cifar-10-batches-py"):
        CIFAR10DataModule(root=str(tmp_path)).prepare_data()


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


def trained_on(data, items, position=0):
    """A batch as the model sees it, at a position of the stream."""
    data.load_state_dict({"position": position, "batches": 0})
    loop = SimpleNamespace(
        epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace(processed=0)))
    )
    data.trainer = SimpleNamespace(fit_loop=loop, global_rank=0, world_size=1)
    return data.on_after_batch_transfer(data.split("train").__getitems__(items), 0)


@pytest.mark.parametrize("conditional", [False, True])
def test_flip_mirrors_every_second_image_at_random(images, conditional):
    """Each image as it is or mirrored, about equally often, as its position in the stream has it."""
    data = CIFAR10DataModule(conditional=conditional, flip=True)
    batch = trained_on(data, [0, 1] * 100)
    x_0 = batch[0] if conditional else batch
    plain = from_uint8(torch.from_numpy(data.split("train").images[[0, 1] * 100]))
    flipped = torch.tensor([torch.equal(a, b.flip(2)) for a, b in zip(x_0, plain, strict=True)])
    assert all(torch.equal(a, b) for a, b in zip(x_0[~flipped], plain[~flipped], strict=True))
    assert 70 < flipped.sum() < 130
    again = trained_on(data, [0, 1] * 10, position=40)
    assert torch.equal(again[0] if conditional else again, x_0[40:60])


def test_augmented_batches_carry_their_condition(images):
    """What the augmentation's functions make of the stream's positions, with labels only if conditional."""
    data = CIFAR10DataModule(augment=0.5)
    x_0, label, told = trained_on(data, [0, 1, 1], position=7)
    parameters = draw_parameters(0, range(7, 10), 0.5)
    plain = from_uint8(torch.from_numpy(data.split("train").images[[0, 1, 1]]))
    assert torch.equal(x_0, transform(plain, parameters)) and torch.equal(told, condition(parameters)) and label is None
    assert told.shape == (3, data.augment_dim) and CIFAR10DataModule().augment_dim == 0
    assert trained_on(CIFAR10DataModule(augment=0.5, conditional=True), [0, 1])[1].tolist() == [7, 2]
    with pytest.raises(ValueError, match="flips images already"):
        CIFAR10DataModule(flip=True, augment=0.5)


SMALL = {"channels": 8, "channel_mult": [1, 1], "num_blocks": 1, "attention_resolutions": []}


def test_the_teachers_network_is_told_of_the_augmentation(images, quiet, tmp_path):
    """Its embedding of the condition gets a gradient, which it would not get of zeros."""
    module = TrigFlowDiffusion(randomize(DDPMpp(**SMALL, augment_dim=9)), sigma_data=0.58)
    data = CIFAR10DataModule(augment=1.0, batch_size=8, download=False)
    before = module.backbone.augment_embedding.weight.clone()
    L.Trainer(**quiet, max_steps=1, default_root_dir=tmp_path).fit(module, datamodule=data)
    moved = (module.backbone.augment_embedding.weight != before).float().mean()
    assert moved > 0.9


def test_augmentation_that_a_network_is_not_told_of_is_refused(images, quiet, tmp_path):
    """A network without the input, and consistency models, which the paper trains without."""
    data = CIFAR10DataModule(augment=0.12, download=False)
    for module in (
        TrigFlowDiffusion(DDPMpp(**SMALL), sigma_data=0.58),
        ConsistencyTraining(DDPMpp(**SMALL, augment_dim=9), sigma_data=0.58),
    ):
        with pytest.raises(
            ValueError, match=r"is augmented, of which \w+ does not tell its network; set data"
        ) as error:
            L.Trainer(**quiet, max_steps=1, default_root_dir=tmp_path).fit(module, datamodule=data)
        assert "\n" not in str(error.value)


def test_missing_files_get_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is not in .*; set data.init_args.root"):
        CIFAR10DataModule(root=str(tmp_path), download=False).read("train")
