"""Prepared data on disk: what its JSON says, what is refused, and splits that are written in several goes."""

import hashlib
import json

import numpy as np
import pytest
import torch

from sclightning.data.storage import (
    PartialSplit,
    differences,
    open_split,
    read_metadata,
    remove_partial,
    write_metadata,
)

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 3, 4, 4), np.uint8)
LABELS = np.arange(10) % 3
EXPECTED = {"kind": "images", "dtype": np.uint8, "shape": (3, 4, 4), "num_classes": 3}


@pytest.fixture
def root(tmp_path):
    np.save(tmp_path / "train_images.npy", IMAGES)
    np.save(tmp_path / "train_labels.npy", LABELS)
    write_metadata(tmp_path, "train", "images", 3, made_by="a test")
    return tmp_path


def test_arrays_are_mapped_and_read_in_batches(root):
    split = open_split(root, "train", **EXPECTED)
    assert isinstance(split.images, np.memmap) and len(split) == 10
    images, labels = split.__getitems__([7, 0, 7])
    assert torch.equal(images, torch.from_numpy(IMAGES[[7, 0, 7]])) and labels.tolist() == [1, 0, 1]


def test_json_has_shapes_hashes_and_provenance(root):
    """The hashes are of the files, as ``sha256sum`` prints them; the split's digest follows from them."""
    metadata = json.loads((root / "train.json").read_text())
    digests = [hashlib.sha256((root / f"train_{n}.npy").read_bytes()).hexdigest() for n in ("images", "labels")]
    assert metadata["arrays"] == {
        "images": {"file": "train_images.npy", "dtype": "uint8", "shape": [10, 3, 4, 4], "sha256": digests[0]},
        "labels": {"file": "train_labels.npy", "dtype": "int64", "shape": [10], "sha256": digests[1]},
    }
    assert metadata["made_by"] == "a test" and metadata["num_classes"] == 3 and metadata["convention"] is None
    assert open_split(root, "train", **EXPECTED).digest() == hashlib.sha256("".join(digests).encode()).hexdigest()


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"num_classes": 10}, r"has 3 classes, the data module was given 10; set data.init_args.num_classes"),
        ({"convention": "paper"}, r"in the convention 'None', the data module was given 'paper'"),
        ({"shape": (3, 8, 8)}, r"holds uint8 of shape \(10, 3, 4, 4\); expected uint8 of shape \(N, 3, 8, 8\)"),
        ({"dtype": np.float16}, r"holds uint8 of shape \(10, 3, 4, 4\); expected float16"),
        ({"kind": "moments"}, r"holds images and labels, the data module reads moments"),
    ],
)
def test_other_data_than_expected_is_refused(root, expected, message):
    with pytest.raises(ValueError, match=message) as error:
        open_split(root, "train", **EXPECTED | expected)
    assert "\n" not in str(error.value)


def test_labels_may_be_left_out(root):
    """Of labelled data, for an unconditional network."""
    assert len(open_split(root, "train", **EXPECTED | {"num_classes": 0})) == 10


def test_missing_and_changed_files_are_refused(root):
    with pytest.raises(FileNotFoundError, match=r"no prepared data at .*held_out.json; make it with 'sclightning prep"):
        open_split(root, "held_out", **EXPECTED)
    np.save(root / "train_labels.npy", LABELS[:9])
    with pytest.raises(ValueError, match=r"of shape \(9,\), its JSON says int64 of shape \(10,\)"):
        open_split(root, "train", **EXPECTED)
    (root / "train_images.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_images.npy is missing"):
        open_split(root, "train", **EXPECTED)
    (root / "train.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="not of format 1"):
        open_split(root, "train", **EXPECTED)


# --- Splits that are being written ------------------------------------------------------------------------------------


def begin(root, **recipe):
    return PartialSplit.begin(root, "train", "images", np.uint8, IMAGES.shape, {"resolution": 4, **recipe})


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_item_is_in_one_group_of_one_process(tmp_path, world):
    """Groups are the same for any number of processes."""
    shares = [begin(tmp_path).todo(4, rank, world) for rank in range(world)]
    assert sorted(group for share in shares for group in share) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_what_is_written_is_not_to_be_done_again(tmp_path):
    """Also for a process that comes later; what could not be read is tried again by the next command."""
    first = begin(tmp_path)
    first.write([0, 1, 3], IMAGES[[0, 1, 3]], [2])
    assert first.done == 4 and first.corrupt == [2] and first.todo(4, 0, 1) == [[4, 5, 6, 7], [8, 9]]
    second = begin(tmp_path)
    assert second.done == 3 and second.todo(4, 0, 1) == [[2], [4, 5, 6, 7], [8, 9]]
    assert np.array_equal(second.array[[0, 1, 3]], IMAGES[[0, 1, 3]])


def test_another_recipe_is_refused(tmp_path):
    begin(tmp_path)
    with pytest.raises(ValueError, match="holds an unfinished 'train' made with another resolution and vae;"):
        begin(tmp_path, resolution=8, vae="x")
    assert differences({"a": [1], "b": 2}, {"a": (1,), "b": 3}) == ["b"]


@pytest.mark.parametrize("corrupt", [[], [2, 9]], ids=["whole", "with holes"])
@pytest.mark.parametrize("killed", [False, True])
def test_finish_puts_the_arrays_in_place(tmp_path, corrupt, killed):
    """Without what could not be read; killed before the JSON was written, the next run finishes all the same."""
    good = [i for i in range(10) if i not in corrupt]
    partial = begin(tmp_path)
    partial.write(good, IMAGES[good], corrupt)
    partial.finish(LABELS)
    if killed:
        partial = begin(tmp_path)
        assert partial.todo(4, 0, 1) == [[i] for i in corrupt]
        partial.write([], [], corrupt)
        partial.finish(LABELS)
    write_metadata(tmp_path, "train", "images", 3)
    remove_partial(tmp_path, "train")
    split = open_split(tmp_path, "train", **EXPECTED)
    assert np.array_equal(split.images, IMAGES[good]) and np.array_equal(split.labels, LABELS[good])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.json", "train_images.npy", "train_labels.npy"]
    assert read_metadata(tmp_path, "train")["arrays"]["images"]["shape"] == [len(good), 3, 4, 4]


def test_arrays_that_the_disk_has_no_room_for_are_refused(tmp_path):
    """Before anything is computed: a memory map that runs out of disk dies of a signal."""
    with pytest.raises(OSError, match=r"GB free and the arrays take 786432000 GB; choose another folder"):
        PartialSplit.begin(tmp_path, "train", "images", np.uint8, (10**12, 3, 512, 512), {})
    assert not list(tmp_path.iterdir())
