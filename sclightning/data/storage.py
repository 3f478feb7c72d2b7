"""Prepared data on disk: one array a file, mapped into memory, and a small JSON that says what the arrays are.

A split is ``{split}_images.npy`` (or ``{split}_moments.npy``), ``{split}_labels.npy`` and ``{split}.json``, which is
written last: where it is, the arrays are complete.
"""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sclightning.data.arrays import ArrayDataset, Split

Kind = Literal["images", "moments"]
"""Pixels, or mean and standard deviation of a VAE's posterior."""

_FORMAT = 1
_TODO, _DONE, _CORRUPT = 0, 1, 2


def open_split(
    root: str | Path,
    split: Split,
    kind: Kind,
    dtype: np.typing.DTypeLike,
    shape: tuple[int, ...],
    num_classes: int,
    convention: str | None = None,
) -> ArrayDataset:
    """Memory maps of a prepared split, compared with what the data module expects.

    Args:
        root: Folder of the prepared data.
        split: ``train`` or ``held_out``.
        kind: Which array is wanted beside the labels.
        dtype: Expected type of its entries.
        shape: Expected shape of one of them.
        num_classes: Expected number of classes.
        convention: Expected convention of latents.

    Raises:
        FileNotFoundError: If the split or one of its arrays is not there.
        ValueError: If the arrays are not what is expected, or not those that the JSON describes.
    """
    metadata = read_metadata(root, split)
    if metadata is None:
        raise FileNotFoundError(
            f"There is no prepared data at {Path(root) / split}.json; make it with 'sclightning prepare', or set "
            "data.init_args.root to the folder where it is."
        )
    if metadata["convention"] != convention:
        raise ValueError(
            f"The latents in {root} were encoded in the convention '{metadata['convention']}', the data module was "
            f"given '{convention}'; set data.init_args.convention to the first or prepare the data in the second."
        )
    if num_classes not in (0, metadata["num_classes"]):  # 0: without the labels that there are
        raise ValueError(
            f"The data in {root} has {metadata['num_classes']} classes, the data module was given {num_classes}; set "
            "data.init_args.num_classes, and the network's, to the first, or to 0 to leave the labels out."
        )
    array = _map(root, metadata, kind, dtype, shape)
    labels = _map(root, metadata, "labels", np.int64, ())
    digests = "".join(metadata["arrays"][name]["sha256"] for name in (kind, "labels"))
    return ArrayDataset(array, labels, hashlib.sha256(digests.encode()).hexdigest())


def read_metadata(root: str | Path, split: Split) -> dict[str, Any] | None:
    """What the JSON of a split says; None if there is none."""
    path = Path(root) / f"{split}.json"
    if not path.is_file():
        return None
    metadata = json.loads(path.read_text())
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} is not of format {_FORMAT}; prepare the data again with this version.")
    return metadata


def write_metadata(
    root: str | Path, split: Split, kind: Kind, num_classes: int, convention: str | None = None, **provenance: Any
) -> None:
    """Describe the arrays of a split that lie in ``root``: shapes, types, SHA-256 of the files, provenance.

    Args:
        root: Folder of the arrays.
        split: ``train`` or ``held_out``.
        kind: The array beside the labels.
        num_classes: Number of classes; 0 for data without labels.
        convention: Convention of latents.
        provenance: Anything else that says where the data comes from.
    """
    arrays = {}
    for name in (kind, "labels"):
        path = Path(root) / f"{split}_{name}.npy"
        array = np.load(path, mmap_mode="r")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        arrays[name] = {"file": path.name, "dtype": str(array.dtype), "shape": array.shape, "sha256": digest}
    metadata = {"format": _FORMAT, "arrays": arrays, "num_classes": num_classes, "convention": convention}
    _write_json(Path(root) / f"{split}.json", metadata | provenance)


class PartialSplit:
    """A split that is being written, by any number of processes, and can be gone on with after a kill.

    A flag for each item says whether it is written; flags follow the data to the disk, never the other way round.

    Args:
        root: Folder of the prepared data, where :meth:`begin` has been.
        split: ``train`` or ``held_out``.
        kind: The array beside the labels.
    """

    def __init__(self, root: str | Path, split: Split, kind: Kind):
        self.root, self.split, self.kind = Path(root), split, kind
        unfinished, final = self._path(kind), self._final(kind)
        self.array = np.load(unfinished if unfinished.exists() else final, mmap_mode="r+")
        self.flags = np.load(self._path("flags"), mmap_mode="r+")

    @classmethod
    def begin(
        cls,
        root: str | Path,
        split: Split,
        kind: Kind,
        dtype: np.typing.DTypeLike,
        shape: tuple[int, ...],
        recipe: dict[str, Any],
    ) -> "PartialSplit":
        """Make the files of a split, or find those of a run that did not finish.

        Args:
            root: Folder of the prepared data; made if it is not there.
            split: ``train`` or ``held_out``.
            kind: The array beside the labels.
            dtype: Type of its entries.
            shape: Its shape, (N, …).
            recipe: What decides the values of the arrays; plain data.

        Raises:
            OSError: If there is no room for the array.
            ValueError: If an unfinished run had another recipe.
        """
        root = Path(root)
        begun = root / f"{split}.partial.json"
        if begun.is_file():
            other = differences(json.loads(begun.read_text()), recipe)
            if other:
                raise ValueError(
                    f"{root} holds an unfinished '{split}' made with another {' and '.join(other)}; repeat the command "
                    f"that began it, choose another folder, or delete {root / split}*."
                )
            partial = cls(root, split, kind)
            partial.flags[partial.flags == _CORRUPT] = _TODO  # repaired, perhaps
            return partial
        root.mkdir(parents=True, exist_ok=True)
        need, free = math.prod(shape) * np.dtype(dtype).itemsize / 1e9, shutil.disk_usage(root).free / 1e9
        if need > free:  # a memory map that runs out of disk dies of a signal
            raise OSError(f"{root} has {free:.0f} GB free and the arrays take {need:.0f} GB; choose another folder.")
        for name, dtype_, shape_ in ((kind, dtype, shape), ("flags", np.uint8, shape[:1])):
            np.lib.format.open_memmap(root / f"{split}_{name}.partial.npy", "w+", dtype_, shape_).flush()
        _write_json(begun, recipe)
        return cls(root, split, kind)

    @property
    def done(self) -> int:
        """Number of items that are written or given up."""
        return int(np.count_nonzero(self.flags))

    @property
    def corrupt(self) -> list[int]:
        """Items that could not be read."""
        return np.flatnonzero(self.flags == _CORRUPT).tolist()

    def todo(self, size: int, rank: int, world: int) -> list[list[int]]:
        """What is left for process ``rank`` of ``world``, in groups of at most ``size`` items.

        Which group an item is in depends on ``size`` only, so that a resumed run computes what the unbroken one would.
        """
        groups = (range(i, min(i + size, len(self.flags))) for i in range(rank * size, len(self.flags), world * size))
        left = ([i for i in group if self.flags[i] == _TODO] for group in groups)
        return [group for group in left if group]

    def write(self, items: list[int], values: np.typing.ArrayLike, corrupt: list[int]) -> None:
        """Write items, and remember those that could not be read."""
        if items:
            self.array[items] = values
            self.array.flush()
        self.flags[items], self.flags[corrupt] = _DONE, _CORRUPT
        self.flags.flush()

    def finish(self, labels: np.ndarray) -> np.ndarray:
        """Put the arrays in their place, without the items that could not be read; returns the one beside the labels.

        Args:
            labels: Label of every item, int64 (N,).
        """
        good = np.flatnonzero(self.flags == _DONE)
        final = self._final(self.kind)
        np.save(self._final("labels"), labels[good])
        if len(good) < len(self.flags):
            compact = np.lib.format.open_memmap(final, "w+", self.array.dtype, (len(good), *self.array.shape[1:]))
            for i in range(0, len(good), 1024):
                compact[i : i + 1024] = self.array[good[i : i + 1024]]
            compact.flush()
        elif self._path(self.kind).exists():  # or a run that was killed after this line has come here before
            self._path(self.kind).replace(final)
        return np.load(final, mmap_mode="r")

    def _path(self, name: str) -> Path:
        return self.root / f"{self.split}_{name}.partial.npy"

    def _final(self, name: str) -> Path:
        return self.root / f"{self.split}_{name}.npy"


def remove_partial(root: str | Path, split: Split) -> None:
    """Delete what only an unfinished split needs."""
    for path in Path(root).glob(f"{split}*.partial.*"):
        path.unlink()


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Keys of ``other`` whose values ``one`` does not share."""
    other = json.loads(json.dumps(other))  # tuples to lists, as they come back from a file
    return [key for key in other if one.get(key) != other[key]]


def _map(
    root: str | Path, metadata: dict[str, Any], name: str, dtype: np.typing.DTypeLike, shape: tuple[int, ...]
) -> np.ndarray:
    described = metadata["arrays"].get(name)
    if described is None:
        raise ValueError(
            f"{root} holds {' and '.join(metadata['arrays'])}, the data module reads {name}; use the data module for "
            "what was prepared."
        )
    path = Path(root) / described["file"]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing though the data was prepared; prepare it again or copy the file.")
    array = np.load(path, mmap_mode="r")
    if array.dtype != described["dtype"] or list(array.shape) != described["shape"]:
        raise ValueError(
            f"{path} holds {array.dtype} of shape {array.shape}, its JSON says {described['dtype']} of shape "
            f"{tuple(described['shape'])}; prepare the data again."
        )
    if array.dtype != dtype or array.shape[1:] != tuple(shape):
        raise ValueError(
            f"{path} holds {array.dtype} of shape {array.shape}; expected {np.dtype(dtype)} of shape "
            f"(N, {', '.join(map(str, shape))}): set data.init_args.image_shape or prepare the data again."
        )
    return array


def _write_json(path: Path, content: dict[str, Any]) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(unfinished, path)
