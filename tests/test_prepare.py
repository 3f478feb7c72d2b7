"""``sclightning prepare`` end to end: folders, ZIP files and CIFAR-10 to arrays, kills, corrupt images, training."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from test_sources import png, write_cifar10, write_zip

from sclightning.backbones import DDPMpp
from sclightning.cli import main
from sclightning.data.autoencoder import encode, load_vae
from sclightning.data.cifar10 import CIFAR10DataModule
from sclightning.data.imagenet64 import ImageNet64DataModule
from sclightning.data.latents import ImageNetLatentDataModule
from sclightning.data.prepare import prepare
from sclightning.data.sources import centre_crop
from sclightning.data.storage import read_metadata
from sclightning.modules import TrigFlowDiffusion

pytestmark = pytest.mark.filterwarnings("ignore")
SPLIT = ["train.json", "train_images.npy", "train_labels.npy"]


def picture(i):
    """Picture i, of a size of its own."""
    return np.random.default_rng(i).integers(0, 256, (20 + i, 40 - i, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures in two classes."""
    for i in range(12):
        path = tmp_path / "pictures" / f"class{i // 8}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(path)
    return tmp_path / "pictures"


def expected(items, resolution=16):
    return np.stack([centre_crop(Image.fromarray(picture(i)), resolution) for i in items])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def images(root, num_classes=2):
    data = ImageNet64DataModule(root=str(root), image_shape=(3, 16, 16), num_classes=num_classes)
    return data.split("train")


def test_folder_to_images_and_what_is_recorded(folder, tmp_path, capsys):
    """By the command; every picture cropped and resized, labels, and where it all came from."""
    main(["prepare", str(folder), str(tmp_path / "out"), "--resolution=16", "--workers=0", "--batch_size=5"])
    split = images(tmp_path / "out")
    assert np.array_equal(split.images, expected(range(12))) and split.labels.tolist() == [0] * 8 + [1] * 4
    metadata = read_metadata(tmp_path / "out", "train")
    assert metadata["resolution"] == 16 and metadata["vae"] is None and metadata["skipped"] == []
    assert metadata["source"]["path"] == str(folder) and torch.__version__.startswith(metadata["versions"]["torch"])
    assert names(tmp_path / "out") == SPLIT
    printed = capsys.readouterr().out
    assert re.search(r"12/12 [\d,]+ images/s 0:00:00", printed) and "holds 12 images of train" in printed


def test_prepared_already_is_not_prepared_again(folder, tmp_path, capsys):
    """Nor overwritten by something else."""
    prepare(str(folder), str(tmp_path / "out"), resolution=16, workers=0)
    before = (tmp_path / "out" / "train_images.npy").stat().st_mtime_ns
    prepare(str(folder), str(tmp_path / "out"), resolution=16, workers=0)
    assert "already" in capsys.readouterr().out
    assert (tmp_path / "out" / "train_images.npy").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds a 'train' split of another resolution; choose another folder"):
        prepare(str(folder), str(tmp_path / "out"), resolution=8, workers=0)
    (folder / "class0" / "new.png").write_bytes(png(picture(0)))
    with pytest.raises(ValueError, match="of another source;"):
        prepare(str(folder), str(tmp_path / "out"), resolution=16, workers=0)


@pytest.mark.parametrize("latents", [False, True], ids=["images", "latents"])
def test_killed_command_goes_on_where_it_was(folder, tmp_path, tiny_vae, latents):
    """SIGKILL while a batch is being read. What was finished is not read again: it is not even there any more."""
    fifo = folder / "class0" / "05.png"  # whose reader waits for ever
    fifo.unlink()
    os.mkfifo(fifo)
    options = ["--resolution=16", "--workers=0", "--batch_size=2", *([f"--vae={tiny_vae}"] if latents else [])]
    command = [sys.executable, "-m", "sclightning", "prepare", str(folder), str(tmp_path / "out"), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    flags, deadline = tmp_path / "out" / "train_flags.partial.npy", time.monotonic() + 300
    while not (flags.exists() and flags.stat().st_size > 128 and np.load(flags).sum() == 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    assert not (tmp_path / "out" / "train.json").exists()

    fifo.unlink()
    Image.fromarray(picture(5)).save(fifo)
    for i in range(4):
        (folder / "class0" / f"{i:02d}.png").write_bytes(b"")
    vae = {"vae": tiny_vae} if latents else {}
    with pytest.raises(ValueError, match="unfinished 'train' made with another resolution"):
        prepare(str(folder), str(tmp_path / "out"), resolution=32, workers=0, **vae)
    prepare(str(folder), str(tmp_path / "out"), resolution=16, workers=0, batch_size=2, **vae)
    if latents:
        assert names(tmp_path / "out") == ["train.json", "train_labels.npy", "train_moments.npy"]
        batches = [torch.from_numpy(expected(range(i, i + 2))) for i in range(0, 12, 2)]
        whole = torch.cat([encode(load_vae(tiny_vae), batch, "paper") for batch in batches])
        assert np.array_equal(np.load(tmp_path / "out" / "train_moments.npy"), whole)
    else:
        assert names(tmp_path / "out") == SPLIT
        assert np.array_equal(images(tmp_path / "out").images, expected(range(12)))


def test_two_processes_and_reading_workers_make_what_one_makes(folder, tmp_path, tiny_vae, capsys):
    """Bit for bit, also where a picture cannot be read."""
    (folder / "class1" / "09.png").write_bytes(b"not a picture")
    options = {"resolution": 16, "vae": tiny_vae, "batch_size": 2, "corrupt": "skip"}
    prepare(str(folder), str(tmp_path / "one"), **options, workers=0)
    prepare(str(folder), str(tmp_path / "two"), **options, workers=1, devices=2)
    one, two = (read_metadata(tmp_path / name, "train") for name in ("one", "two"))
    assert one == two and one["arrays"]["moments"]["shape"] == [11, 8, 8, 8] and one["skipped"] == ["class1/09.png"]


def test_corrupt_image_is_refused_with_its_path_and_can_be_repaired(folder, tmp_path):
    """One sentence; the next command reads only what is left."""
    path = folder / "class0" / "03.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=rf"^{path} cannot be read \(.*\); repair it and repeat.*--corrupt=skip"
    ) as error:
        prepare(str(folder), str(tmp_path / "out"), resolution=16, workers=0, batch_size=4)
    assert "\n" not in str(error.value)
    path.write_bytes(whole)
    for i in (0, 1, 2):  # of the same batch, written already
        (folder / "class0" / f"{i:02d}.png").write_bytes(b"")
    prepare(str(folder), str(tmp_path / "out"), resolution=16, workers=0, batch_size=4)
    assert np.array_equal(images(tmp_path / "out").images, expected(range(12)))


def test_corrupt_images_are_reported_and_left_out_by_choice(folder, tmp_path, capsys):
    """Truncated, empty, and something else: each with its path, the rest with their labels."""
    for i, data in ((0, b""), (5, (folder / "class0" / "05.png").read_bytes()[:200]), (11, b"GIF89a nonsense")):
        (folder / f"class{i // 8}" / f"{i:02d}.png").write_bytes(data)
    prepare(str(folder), str(tmp_path / "out"), resolution=16, workers=0, corrupt="skip")
    printed = capsys.readouterr().out
    for i in (0, 5, 11):
        assert f"Skipped: {folder}/class{i // 8}/{i:02d}.png cannot be read" in printed
    split, good = images(tmp_path / "out"), [1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert np.array_equal(split.images, expected(good)) and split.labels.tolist() == [0] * 6 + [1] * 3
    assert read_metadata(tmp_path / "out", "train")["skipped"] == ["class0/00.png", "class0/05.png", "class1/11.png"]
    assert names(tmp_path / "out") == SPLIT


def test_zip_of_edm_to_images(tmp_path):
    square = [picture(i)[:16, :16] for i in range(3)]
    path = write_zip(
        tmp_path / "edm.zip",
        {f"{i}.png": png(x) for i, x in enumerate(square)},
        [["0.png", 1], ["1.png", 0], ["2.png", 1]],
    )
    prepare(path, str(tmp_path / "out"), resolution=16, workers=0)
    split = images(tmp_path / "out")
    assert np.array_equal(split.images, np.stack(square).transpose(0, 3, 1, 2)) and split.labels.tolist() == [1, 0, 1]


def moments_zip(path, shape=(8, 4, 4), last=(8, 4, 4)):
    arrays = [np.random.default_rng(i).random(shape if i < 3 else last, np.float32) for i in range(4)]
    files = {}
    for i, array in enumerate(arrays):
        file = io.BytesIO()
        np.save(file, array)
        files[f"00000/img-mean-std-{i:08d}.npy"] = file.getvalue()
    return write_zip(path, files, [[name, i % 2] for i, name in enumerate(files)]), arrays


def test_zip_of_edm2s_latents(tmp_path):
    """Means and standard deviations as they are, in half precision; of EDM2's convention unless said otherwise."""
    path, arrays = moments_zip(tmp_path / "a.zip")
    prepare(path, str(tmp_path / "out"), workers=0)
    data = ImageNetLatentDataModule(str(tmp_path / "out"), "edm2", image_shape=(4, 4, 4), num_classes=2)
    assert np.array_equal(data.split("train").images, np.stack(arrays).astype(np.float16))
    metadata = read_metadata(tmp_path / "out", "train")
    assert metadata["convention"] == "edm2" and metadata["num_classes"] == 2
    np.testing.assert_allclose(metadata["channels"]["mean"], np.stack(arrays)[:, :4].mean((0, 2, 3)), atol=1e-3)
    with pytest.raises(ValueError, match=r"in the convention 'edm2', the data module was given 'paper'; set data"):
        ImageNetLatentDataModule(str(tmp_path / "out"), image_shape=(4, 4, 4), num_classes=2).split("train")
    path, _ = moments_zip(tmp_path / "b.zip", last=(8, 4, 2))
    with pytest.raises(ValueError, match=r"00000003.npy cannot be read \(its shape is \(8, 4, 2\), the first one's"):
        prepare(path, str(tmp_path / "b"), workers=0)


def test_damage_inside_a_zip_is_found(tmp_path):
    """By the checksum of the entry."""
    path, arrays = moments_zip(tmp_path / "a.zip")
    data = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(data.replace(arrays[2].tobytes()[:8], b"damaged!"))
    with pytest.raises(ValueError, match=r"a.zip/00000/img-mean-std-00000002.npy cannot be read \(Bad CRC-32"):
        prepare(path, str(tmp_path / "out"), workers=0)
    assert zipfile.is_zipfile(path)


def test_cifar10_to_arrays_and_back_into_its_data_module(tmp_path, monkeypatch):
    """The data module takes prepared arrays where it finds them, into memory."""
    from torchvision.datasets import CIFAR10

    write_cifar10(tmp_path)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    original = CIFAR10DataModule(root=str(tmp_path), download=False)
    for split in ("train", "held_out"):
        prepare(str(tmp_path), str(tmp_path / "out"), split=split, resolution=32, workers=0)
        data = CIFAR10DataModule(root=str(tmp_path / "out"))
        data.prepare_data()  # downloads nothing
        stored, direct = data.split(split), original.split(split)
        assert np.array_equal(stored.images, direct.images) and np.array_equal(stored.labels, direct.labels)
        assert type(stored.images) is np.ndarray and len(stored) == {"train": 20, "held_out": 4}[split]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "The images need a size; give --resolution"),
        ({"resolution": 16, "convention": "edm2"}, "A convention is a matter of latents; give --vae"),
        ({"resolution": 15, "vae": True}, "The VAE divides the resolution by 2, and 15 is no multiple"),
    ],
)
def test_contradictions_are_refused(folder, tmp_path, tiny_vae, options, message):
    options = {**options, **({"vae": tiny_vae} if "vae" in options else {})}
    with pytest.raises(ValueError, match=message):
        prepare(str(folder), str(tmp_path / "out"), workers=0, **options)
    assert not (tmp_path / "out").exists()


def test_latents_are_not_encoded_again(tmp_path):
    path, _ = moments_zip(tmp_path / "a.zip")
    with pytest.raises(ValueError, match="holds latents already; leave out --vae and --resolution"):
        prepare(path, str(tmp_path / "out"), resolution=16)


@pytest.mark.parametrize("convention", ["paper", "edm2"])
def test_a_model_trains_on_prepared_latents_and_shows_pictures(folder, tmp_path, tiny_vae, quiet, convention):
    """From a folder of pictures to a training step, whitened by the statistics that were measured, and back."""
    prepare(str(folder), str(tmp_path / "out"), resolution=16, vae=tiny_vae, convention=convention, workers=0)
    channels = json.loads((tmp_path / "out" / "train.json").read_text())["channels"]
    data = ImageNetLatentDataModule(
        str(tmp_path / "out"), convention, **channels, vae=tiny_vae, image_shape=(4, 8, 8), num_classes=2, batch_size=12
    )
    seen = []

    class Module(TrigFlowDiffusion):
        def training_step(self, batch, batch_idx):
            seen.append(batch)
            return super().training_step(batch, batch_idx)

    network = {"resolution": 8, "channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attention_resolutions": []}
    module = Module(DDPMpp(in_channels=4, num_classes=2, **network))
    before = {name: p.clone() for name, p in module.named_parameters()}
    L.Trainer(**quiet, max_steps=1, default_root_dir=tmp_path).fit(module, datamodule=data)
    ((x_0, label),) = seen
    assert x_0.shape == (12, 4, 8, 8) and sorted(label.tolist()) == [0] * 8 + [1] * 4
    np.testing.assert_allclose(x_0.std((0, 2, 3)), 0.5, rtol=0.1)
    assert any(not torch.equal(p, before[name]) for name, p in module.named_parameters())
    pictures = data.to_uint8(module.sample(range(2), data.image_shape, torch.tensor([0, 1])))
    assert pictures.shape == (2, 3, 16, 16) and pictures.dtype == torch.uint8


@pytest.mark.parametrize("option", ["resolution", "devices", "batch_size"])
def test_numbers_below_one_are_refused(folder, tmp_path, option):
    """Not blamed on the first image, which --corrupt=skip would then leave out, and all others."""
    with pytest.raises(ValueError, match=f"--{option} is 0; give a number above 0"):
        prepare(str(folder), str(tmp_path / "out"), **{"resolution": 16, "workers": 0, option: 0})
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder_to_write_to(folder, tmp_path):
    (tmp_path / "out").write_text("text")
    with pytest.raises(NotADirectoryError, match="out is a file; give a folder"):
        prepare(str(folder), str(tmp_path / "out"), resolution=16, workers=0)


def test_nothing_but_corrupt_images_is_no_data_set(folder, tmp_path):
    """Also where they may be left out."""
    for path in folder.glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"None of the 12 images in .* can be read"):
        prepare(str(folder), str(tmp_path / "out"), resolution=16, workers=0, corrupt="skip")
    assert read_metadata(tmp_path / "out", "train") is None
