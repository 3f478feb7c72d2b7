"""Data modules: values, splits, the endless stream, requests."""

import gzip
import hashlib
import pathlib
from itertools import islice

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from sklearn.datasets import load_digits
from torchvision.datasets import FashionMNIST

from sclightning.data import DigitsDataModule, FashionMNISTDataModule
from sclightning.data.arrays import ArrayDataset, EndlessSampler, ImageDataModule, from_uint8, to_uint8
from sclightning.data.requests import SampleRequest, SampleRequests, StridedSampler, strided_loader
from sclightning.modules import TrigFlowDiffusion

pytestmark = pytest.mark.filterwarnings("ignore")


# --- Digits -----------------------------------------------------------------------------------------------------------


def rows(dataset):
    """Each image with its label, as hashable bytes."""
    return [image.tobytes() + bytes([label]) for image, label in zip(dataset.images, dataset.labels, strict=True)]


def test_digits_are_scikit_learns_digits_in_two_disjoint_halves():
    """Every image of the data set is in exactly one split, scaled from 0 … 16 to 0 … 255, with its own label."""
    data, digits = DigitsDataModule(), load_digits()
    train, held_out = data.split("train"), data.split("held_out")
    assert (len(train), len(held_out)) == (899, 898)
    assert train.images.dtype == np.uint8 and train.images.shape[1:] == data.image_shape == (1, 8, 8)
    assert train.labels.dtype == np.int64 and set(train.labels) == set(range(data.num_classes)) == set(held_out.labels)
    images = np.round(digits.images * 255 / 16).astype(np.uint8)
    original = rows(ArrayDataset(images, digits.target))
    assert sorted(rows(train) + rows(held_out)) == sorted(original)
    assert train.images.min() == 0 and train.images.max() == 255


def test_digits_split_is_fixed():
    """The reference set of every published number: it must not move, with the seed or otherwise."""
    for seed in (0, 1):
        data = DigitsDataModule(seed=seed)
        assert data.split("train").digest().startswith("d80fefdcdb7cb7a9")
        assert data.split("held_out").digest().startswith("9169c49f4ee67567")


def test_digest_covers_images_and_labels():
    """SHA-256 of the bytes of both, in order."""
    images, labels = np.arange(8, dtype=np.uint8).reshape(2, 1, 2, 2), np.array([3, 4])
    expected = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    assert ArrayDataset(images, labels).digest() == expected
    assert ArrayDataset(images, labels[::-1]).digest() != expected
    assert ArrayDataset(images[::-1], labels).digest() != expected


def test_sigma_data_is_the_standard_deviation_in_the_range_of_the_data():
    """Of the training half, as float32 images in [-1, 1] have it."""
    data = DigitsDataModule()
    expected = from_uint8(torch.from_numpy(data.split("train").images)).double().std(correction=0).item()
    assert data.sigma_data == pytest.approx(expected, rel=1e-6) == pytest.approx(0.7514, abs=5e-4)


def test_uint8_round_trip():
    """All 256 values survive; samples round to the nearest and are clipped."""
    values = torch.arange(256, dtype=torch.uint8)
    x = from_uint8(values)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1 and x[51] == pytest.approx(51 / 127.5 - 1)
    assert torch.equal(to_uint8(x), values)
    assert torch.equal(to_uint8(x + 0.49 / 127.5), values) and torch.equal(to_uint8(x - 0.49 / 127.5), values)
    assert to_uint8(torch.tensor([-7.0, 7.0, 1.004, -1.004])).tolist() == [0, 255, 255, 0]


def test_batches_become_floats_on_the_device_and_requests_stay():
    """uint8 images are converted, as a tuple or as a list; floats and requests are left alone."""
    data = DigitsDataModule()
    images, labels = torch.tensor([[0, 255]], dtype=torch.uint8), torch.tensor([7])
    x, label = data.on_after_batch_transfer((images, labels), 0)
    assert x.tolist() == [[-1, 1]] and x.dtype == torch.float32 and torch.equal(label, labels)
    floats = (torch.zeros(1), labels)
    assert data.on_after_batch_transfer(floats, 0) is floats
    request = SampleRequest(labels, labels, (1, 8, 8))
    assert data.on_after_batch_transfer(request, 0) is request


# --- The endless stream -----------------------------------------------------------------------------------------------


def stream(n=10, world=1, rank=0, seed=0, start=0, length=35):
    return list(islice(EndlessSampler(range(n), world, rank, seed, lambda: start), length))


def test_each_epoch_is_its_own_permutation():
    """Every image once per epoch, in an order that changes from epoch to epoch and with the seed."""
    epochs = [tuple(stream(length=30)[i : i + 10]) for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(epochs)) == 3
    assert epochs[0] != tuple(stream(seed=1, length=10))
    assert stream() == stream()


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("start", [0, 7, 23])
def test_ranks_interleave_to_the_order_of_one_process(world, start):
    """Sharing a stream changes who sees an image, not which comes when; epochs need not divide evenly."""
    shares = [stream(world=world, rank=rank, start=start, length=12) for rank in range(world)]
    interleaved = [index for position in zip(*shares, strict=True) for index in position]
    assert interleaved == stream(length=start + 12 * world)[start:]


@pytest.mark.parametrize("start", [1, 9, 10, 11, 25])
def test_stream_starts_anywhere(start):
    """Starting at a position gives what follows it in the stream from the beginning."""
    assert stream(start=start, length=10) == stream(length=start + 10)[start:]


def test_endless_stream_has_no_length():
    """Lightning must not take the epoch for finite."""
    with pytest.raises(TypeError, match="no length"):
        len(EndlessSampler(range(10), 1, 0, 0, lambda: 0))


class Spy(TrigFlowDiffusion):
    """Remembers the images that it is trained on."""

    seen: list

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].clone())
        return super().training_step(batch, batch_idx)


def train(plain_net, quiet, tmp_path, batch_size, max_steps, ckpt_path=None, save=None, **options):
    module, data = Spy(plain_net, sigma_data=0.752), DigitsDataModule(batch_size=batch_size)
    # The network takes no labels: hand over images alone.
    data.on_after_batch_transfer = lambda batch, i: (from_uint8(batch[0]), None)
    module.seen = []
    trainer = L.Trainer(**quiet, max_steps=max_steps, default_root_dir=tmp_path, **options)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    if save:
        trainer.save_checkpoint(save)
    return torch.cat(module.seen)


def test_stream_continues_across_a_change_of_batch_size(make_plain_net, quiet, tmp_path):
    """A run resumed twice, with larger and smaller batches, sees the images of one unbroken stream in order."""
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    seen = [train(make_plain_net(), quiet, tmp_path, 7, 3, save=first)]
    seen.append(train(make_plain_net(), quiet, tmp_path, 10, 6, ckpt_path=first, save=second))
    state = torch.load(second, weights_only=True)["DigitsDataModule"]
    assert state == {"position": 21 + 30, "batches": 6}
    seen.append(train(make_plain_net(), quiet, tmp_path, 4, 9, ckpt_path=second))
    order = stream(n=899, length=63)
    expected = from_uint8(torch.from_numpy(DigitsDataModule().split("train").images[order]))
    assert torch.equal(torch.cat(seen), expected)


def test_position_counts_batches_not_steps(make_plain_net, quiet, tmp_path):
    """With gradient accumulation a step takes several batches from the stream."""
    path = tmp_path / "accumulated.ckpt"
    train(make_plain_net(), quiet, tmp_path, 5, 2, save=path, accumulate_grad_batches=3)
    assert torch.load(path, weights_only=True)["DigitsDataModule"]["position"] == 30


def test_stream_goes_on_where_an_epoch_is_cut_short(make_plain_net, quiet, tmp_path):
    """``limit_train_batches`` makes epochs of a stream that goes on, and a resumed run agrees with it."""
    path = tmp_path / "cut.ckpt"
    seen = [train(make_plain_net(), quiet, tmp_path, 5, 5, save=path, limit_train_batches=2)]
    seen.append(train(make_plain_net(), quiet, tmp_path, 5, 9, ckpt_path=path, limit_train_batches=2))
    expected = DigitsDataModule().split("train").images[stream(n=899, length=45)]
    assert torch.equal(torch.cat(seen), from_uint8(torch.from_numpy(expected)))


def test_run_without_an_end_is_refused(make_plain_net, quiet, tmp_path):
    """Neither ``max_steps`` nor ``max_time``: one sentence, before anything is computed; either is enough."""
    module = TrigFlowDiffusion(make_plain_net(), sigma_data=0.752)
    trainer = L.Trainer(**quiet, max_epochs=3, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=r"no end.*max_steps") as error:
        trainer.fit(module, datamodule=DigitsDataModule())
    assert "\n" not in str(error.value)
    data = DigitsDataModule()
    for end in ({"max_time": "00:00:00:01"}, {"max_epochs": 1, "limit_train_batches": 3}):
        data.trainer = L.Trainer(**quiet, **end, default_root_dir=tmp_path)
        data.setup("fit")
    data.trainer = trainer
    data.setup("test")


def test_model_and_data_seeds_may_differ(make_net, quiet, tmp_path):
    """Lightning merges the hyperparameters of both into one table and refuses two values of one name."""
    from lightning.pytorch.loggers import TensorBoardLogger

    options = {**quiet, "logger": TensorBoardLogger(tmp_path), "max_steps": 1}
    module = TrigFlowDiffusion(make_net(), sigma_data=0.752, seed=3)
    L.Trainer(**options, default_root_dir=tmp_path).fit(module, datamodule=DigitsDataModule(seed=4, batch_size=4))


def test_reference_is_every_image_of_a_split_in_stored_order():
    """For statistics of the real images: nothing left out, nothing twice, still uint8."""
    data = DigitsDataModule(sample_batch_size=100)
    for split in ("train", "held_out"):
        images, labels = zip(*data.reference_dataloader(split), strict=True)
        assert len(images) == 9 and torch.cat(images).dtype == torch.uint8
        assert np.array_equal(torch.cat(images), data.split(split).images)
        assert np.array_equal(torch.cat(labels), data.split(split).labels)


def test_unknown_split_is_refused():
    """A typing error must not silently choose the other half."""
    with pytest.raises((ValueError, KeyError)):
        DigitsDataModule().split("heldout")


def test_subclass_must_read():
    """The base class says what is missing."""
    assert is_overridden("read", DigitsDataModule(), ImageDataModule)
    with pytest.raises(NotImplementedError, match="read"):
        ImageDataModule(1, 1, 1, 1, 0).split("train")


# --- Requests ---------------------------------------------------------------------------------------------------------


def test_requests_count_up_and_cycle_through_the_classes():
    """Index, label = index mod classes, shape; without classes no label."""
    request = SampleRequests(100, (3, 4, 4), 10).__getitems__([0, 9, 10, 37])
    assert request.index.tolist() == [0, 9, 10, 37] and request.label.tolist() == [0, 9, 0, 7]
    assert request.shape == (3, 4, 4) and request.index.dtype == request.label.dtype == torch.int64
    assert SampleRequests(100, (3, 4, 4), 0).__getitems__([1]).label is None


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("n", [1, 5, 12, 101])
def test_every_batch_once_for_any_number_of_processes(n, world):
    """Batch k * world + r is rank r's k-th; padding, whole batches to be dropped, comes in the last round alone."""
    samplers = [StridedSampler(range(n), world, rank, 4) for rank in range(world)]
    batches = [list(range(n))[start : start + 4] for start in range(0, n, 4)]
    rounds = -(-len(batches) // world)
    for rank, sampler in enumerate(samplers):
        loader = strided_loader(SampleRequests(n, (1, 2, 2), 0), 4, world, rank)
        got = [batch.index.tolist() for batch in loader]
        assert len(sampler) == len(list(sampler)) == sum(map(len, got)) and len(got) == len(loader) == rounds
        own = batches[rank::world]
        assert got[: len(own)] == own
        assert got[len(own) :] in ([], [(own or batches)[0]])


def test_loader_of_requests():
    """Batches of requests with the last one smaller."""
    loader = strided_loader(SampleRequests(11, (1, 2, 2), 4), 3, num_replicas=2, rank=1)
    assert [batch.index.tolist() for batch in loader] == [[3, 4, 5], [9, 10]]
    assert all(isinstance(batch, SampleRequest) for batch in loader)


def test_loaders_request_as_many_samples_as_asked():
    """Validation and test have numbers of their own; prediction follows test."""
    data = DigitsDataModule(num_val_samples=5, num_test_samples=12, sample_batch_size=5)
    data.trainer = L.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    for loader, n in ((data.val_dataloader(), 5), (data.test_dataloader(), 12), (data.predict_dataloader(), 12)):
        batches = list(loader)
        assert torch.cat([b.index for b in batches]).tolist() == list(range(n)) and len(batches[0].index) == 5
    data.test_passes = 3
    assert [len(loader.dataset) for loader in data.test_dataloader()] == [12] * 3
    assert len(data.predict_dataloader().dataset) == 12


# --- Fashion-MNIST ----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_debian_package(monkeypatch):
    """As if Debian's package were not installed on this machine."""
    is_file = pathlib.Path.is_file
    monkeypatch.setattr(
        pathlib.Path, "is_file", lambda path: not str(path).startswith("/usr/share/datasets") and is_file(path)
    )


def write_idx(path, array, compress):
    """An IDX file: two zeros, 8 for uint8, the rank, big-endian lengths, values."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    if compress:
        with gzip.open(f"{path}.gz", "wb") as file:
            file.write(header + array.tobytes())
    else:
        path.write_bytes(header + array.tobytes())


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("folder", ["", "FashionMNIST/raw"])
def test_fashion_mnist_from_idx_files(tmp_path, no_debian_package, compress, folder):
    """Images padded from 28 to 32 by zeros on each side, labels, and each split from its own files."""
    rng = np.random.default_rng(0)
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    written = {}
    for split, prefix, n in (("train", "train", 5), ("held_out", "t10k", 3)):
        images, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n, np.uint8)
        write_idx(tmp_path / folder / f"{prefix}-images-idx3-ubyte", images, compress)
        write_idx(tmp_path / folder / f"{prefix}-labels-idx1-ubyte", labels, compress)
        written[split] = images, labels
    data = FashionMNISTDataModule(root=str(tmp_path), download=False)
    for split, (images, labels) in written.items():
        read = data.split(split)
        assert read.images.shape == (len(images), *data.image_shape) and read.images.dtype == np.uint8
        assert np.array_equal(read.images[:, 0, 2:-2, 2:-2], images)
        assert read.images.sum(dtype=np.int64) == images.sum(dtype=np.int64)
        assert np.array_equal(read.labels, labels) and read.labels.dtype == np.int64


@pytest.mark.parametrize("download", [False, True])
def test_fashion_mnist_that_is_nowhere_is_refused(tmp_path, no_debian_package, monkeypatch, download):
    """One sentence with three remedies, also where nobody answers a download."""
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(FileNotFoundError, match=r"dataset-fashion-mnist.*root.*download") as error:
        FashionMNISTDataModule(root=str(tmp_path), download=download).split("train")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_fashion_mnist_is_downloaded_before_it_is_read(tmp_path, no_debian_package, monkeypatch):
    """Once, in ``prepare_data``, which Lightning calls on one process; and not if it is there."""
    calls = []

    def download(root, download):
        calls.append(root)
        for prefix in ("train", "t10k"):
            write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", np.zeros((2, 28, 28), np.uint8), False)
            write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", np.zeros(2, np.uint8), False)

    monkeypatch.setattr("sclightning.data.fashion_mnist.FashionMNIST", download)
    data = FashionMNISTDataModule(root=str(tmp_path))
    data.prepare_data()
    assert calls == [str(tmp_path)] and len(data.split("train")) == len(data.split("held_out")) == 2
    data.prepare_data()
    assert len(calls) == 1


def test_black_below_the_greys(tmp_path, no_debian_package):
    """Only level 0 moves, all levels survive, the batches and sigma_data are of the moved data."""
    images = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
    write_idx(tmp_path / "train-images-idx3-ubyte", images, False)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(3, np.uint8), False)
    data = FashionMNISTDataModule(root=str(tmp_path), download=False, black=-1.0625)
    levels = torch.arange(256, dtype=torch.uint8)
    x = data.from_uint8(levels)
    assert x[0] == -1.0625 and torch.equal(x[1:], from_uint8(levels)[1:]) and torch.equal(data.to_uint8(x), levels)
    assert data.to_uint8(x[:1] + 8 / 127.5).item() == 0 and data.to_uint8(x[:1] + 9 / 127.5).item() == 1
    padded = torch.from_numpy(data.split("train").images)
    batch, label = data.on_after_batch_transfer((padded, torch.zeros(3)), 0)
    assert batch.shape == (3, 1, 32, 32) and (batch[:, :, :2] == -1.0625).all() and torch.equal(label, torch.zeros(3))
    assert data.sigma_data == pytest.approx(batch.double().std(correction=0).item(), rel=1e-6)
    for black in (-0.9, float("nan")):
        with pytest.raises(ValueError, match="among the greys"):
            FashionMNISTDataModule(black=black)


@pytest.mark.skipif(not pathlib.Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="Debian's package is absent")
def test_fashion_mnist_from_debians_package(tmp_path):
    """The real files: counts, classes in equal numbers, the known mean of 0.2860."""
    data = FashionMNISTDataModule(root=str(tmp_path), download=False)
    held_out, train = data.split("held_out"), data.split("train")
    assert held_out.images.shape == (10_000, 1, 32, 32) and train.images.shape == (60_000, 1, 32, 32)
    assert np.bincount(train.labels).tolist() == [6000] * 10 and np.bincount(held_out.labels).tolist() == [1000] * 10
    assert train.images[:, :, 2:-2, 2:-2].mean() / 255 == pytest.approx(0.2860, abs=1e-4)
