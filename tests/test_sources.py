"""Folders, ZIP files of EDM's layout and torchvision's CIFAR-10 as sources; ADM's centre crop."""

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from sclightning.data.sources import centre_crop, open_source


def pixels(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return file.getvalue()


# --- Centre crop ------------------------------------------------------------------------------------------------------


def test_an_image_of_the_right_size_is_not_touched():
    array = pixels(16, 16)
    assert np.array_equal(centre_crop(Image.fromarray(array), 16), array.transpose(2, 0, 1))


def test_the_middle_of_a_wide_and_of_a_tall_image():
    array = pixels(16, 25)
    assert np.array_equal(centre_crop(Image.fromarray(array), 16), array[:, 4:20].transpose(2, 0, 1))
    array = pixels(25, 16)
    assert np.array_equal(centre_crop(Image.fromarray(array), 16), array[4:20].transpose(2, 0, 1))


def test_large_images_are_halved_by_averaging():
    """A power of two is averaging alone, but for rounding, where bicubic would overlap the blocks."""
    mean = pixels(32, 32).reshape(8, 4, 8, 4, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(centre_crop(Image.fromarray(pixels(32, 32)), 8) - mean).max() <= 2
    bicubic = Image.fromarray(pixels(32, 32)).resize((8, 8), Image.Resampling.BICUBIC)
    assert np.abs(np.array(bicubic).transpose(2, 0, 1) - mean).max() > 10


def test_the_rest_is_bicubic():
    """One halving of 100x60 towards 20, then bicubic from 50x30 to 33x20, then the middle 20 columns."""
    image = Image.fromarray(pixels(60, 100))
    halved = image.resize((50, 30), Image.Resampling.BOX).resize((33, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(centre_crop(image, 20), np.array(halved)[:, 6:26].transpose(2, 0, 1))
    small = Image.fromarray(pixels(10, 15))
    enlarged = np.array(small.resize((24, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(centre_crop(small, 16), enlarged[:, 4:20].transpose(2, 0, 1))


# --- Sources ----------------------------------------------------------------------------------------------------------


def test_folder_of_classes(tmp_path):
    """Classes in alphabetical order, files in order within, however deep; greys and palettes become RGB."""
    (tmp_path / "n02" / "deep").mkdir(parents=True)
    (tmp_path / "n01").mkdir()
    Image.fromarray(pixels(4, 5)).save(tmp_path / "n02" / "deep" / "b.PNG")
    Image.fromarray(pixels(4, 5)[:, :, 0]).save(tmp_path / "n02" / "a.png")
    Image.fromarray(pixels(4, 5)).convert("P").save(tmp_path / "n01" / "z.png")
    (tmp_path / "n01" / "notes.txt").write_text("no image")
    source = open_source(str(tmp_path), "train")
    assert source.names == ["n01/z.png", "n02/a.png", "n02/deep/b.PNG"] and source.labels.tolist() == [0, 1, 1]
    assert source.num_classes == 2 and source.where(1) == f"{tmp_path}/n02/a.png"
    images = [np.array(source.read(name)) for name in source.names]
    assert [image.shape for image in images] == [(4, 5, 3)] * 3
    assert np.array_equal(images[2], pixels(4, 5)) and np.array_equal(images[1][..., 2], pixels(4, 5)[:, :, 0])


def write_zip(path, files, labels="absent"):
    with zipfile.ZipFile(path, "w") as file:
        for name, data in files.items():
            file.writestr(name, data)
        if labels != "absent":
            file.writestr("dataset.json", json.dumps({"labels": labels}))
    return str(path)


def test_zip_of_edm(tmp_path):
    """Images in the order of their names, labels from dataset.json wherever they stand in it."""
    files = {f"00000/img{i:08d}.png": png(pixels(6, 6, i)) for i in (2, 0, 1)}
    labels = [[f"00000/img{i:08d}.png", label] for i, label in ((1, 7), (2, 0), (0, 3))]
    source = open_source(write_zip(tmp_path / "a.zip", files, labels), "train")
    assert source.labels.tolist() == [3, 7, 0] and source.num_classes == 8
    for read in (source.read, pickle.loads(pickle.dumps(source.read))):
        assert all(np.array_equal(np.array(read(name)), pixels(6, 6, i)) for i, name in enumerate(source.names))


def test_zip_of_latents(tmp_path):
    moments = np.random.default_rng(0).random((8, 2, 2), np.float32)
    file = io.BytesIO()
    np.save(file, moments)
    path = write_zip(tmp_path / "a.zip", {"00000/img-mean-std-00000000.npy": file.getvalue()})
    source = open_source(path, "train")
    assert source.num_classes == 0 and source.labels.tolist() == [0]
    assert np.array_equal(source.read(source.names[0]), moments)


def test_forked_processes_do_not_share_the_position_in_a_zip(tmp_path):
    """Child and parent read on from the same open file without disturbing each other."""
    files = {f"{i}.png": png(pixels(32, 32, i)) for i in range(30)}
    source = open_source(write_zip(tmp_path / "a.zip", files), "train")
    source.read("0.png")
    child = os.fork()
    wrong = sum(not np.array_equal(np.array(source.read(f"{i}.png")), pixels(32, 32, i)) for i in range(30))
    if child == 0:
        os._exit(wrong)
    assert wrong == 0 and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("labels", [[["a.png", 0]], [["a.png", 0], ["b.png", [0, 1]]], [["a.png", 0], ["b.png", -1]]])
def test_labels_that_are_not_one_class_each_are_refused(tmp_path, labels):
    files = {name: png(pixels(4, 4)) for name in ("a.png", "b.png")}
    with pytest.raises(ValueError, match="does not have one class number for each of the 2 images"):
        open_source(write_zip(tmp_path / "a.zip", files, labels), "train")


def test_zip_whose_labels_are_null_has_none(tmp_path):
    assert open_source(write_zip(tmp_path / "a.zip", {"a.png": png(pixels(4, 4))}, None), "train").num_classes == 0


def write_cifar10(root):
    """CIFAR-10 in torchvision's layout, four images a file, checksums put right."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        entry = {"data": rng.integers(0, 256, (4, 3072), np.uint8), "labels": rng.integers(0, 10, 4).tolist()}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))


def test_cifar10(tmp_path, monkeypatch):
    """Both splits in torchvision's own layout, read by torchvision."""
    from torchvision.datasets import CIFAR10

    write_cifar10(tmp_path)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)  # of the real files' checksums
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    for split, n in (("train", 20), ("held_out", 4)):
        source, expected = open_source(str(tmp_path), split), CIFAR10(tmp_path, train=split == "train")
        assert len(source.names) == n and source.num_classes == 10 and source.labels.tolist() == expected.targets
        assert all(np.array_equal(np.array(source.read(source.names[i])), expected.data[i]) for i in range(n))


def test_nothing_of_the_kind_is_refused(tmp_path):
    """No such path, an empty folder, images without a class folder, a ZIP file of something else."""
    Image.fromarray(pixels(4, 4)).save(tmp_path / "a.png")
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(FileNotFoundError, match="neither a ZIP file nor CIFAR-10 nor a folder with a sub") as error:
            open_source(str(path), "train")
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="neither images nor"):
        open_source(write_zip(tmp_path / "a.zip", {"a.txt": b""}), "train")


def test_file_that_is_no_zip_and_damaged_cifar10_are_refused(tmp_path):
    """A sentence, not torchvision's error."""
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(FileNotFoundError, match=r"a\.txt is neither a ZIP file"):
        open_source(str(tmp_path / "a.txt"), "train")
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_text("half of it")
    with pytest.raises(ValueError, match="damaged or not complete; unpack cifar-10-python"):
        open_source(str(tmp_path), "train")
