"""Where images come from: folders of classes, ZIP files of EDM and EDM2, CIFAR-10; and how they get their size."""

import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from sclightning.data.arrays import Split


@dataclass
class Source:
    """Images, or moments of latents, that can be read one by one."""

    path: str
    """Where they are."""
    names: list[str]
    """Name of each below ``path``."""
    labels: np.ndarray
    """Label of each, int64 (N,)."""
    num_classes: int
    """Number of classes; 0 if there are no labels."""
    read: Callable[[str], Image.Image | np.ndarray]
    """Reads the item of a name, an image, or moments of shape (2C, h, w)."""

    def where(self, item: int) -> str:
        """Path of an item."""
        return f"{self.path}/{self.names[item]}"


def open_source(path: str, split: Split) -> Source:
    """List what there is, without reading images.

    Args:
        path: Folder of class folders (ImageNet's layout), ZIP file of EDM or EDM2, or folder that holds torchvision's
            ``cifar-10-batches-py``.
        split: Which part of CIFAR-10; the others have one only.

    Raises:
        FileNotFoundError: If there is nothing of the kind.
        ValueError: If the labels of a ZIP file are not one class number for each of its images, or CIFAR-10 is damaged.
    """
    if zipfile.is_zipfile(path):
        return _open_zip(path)
    if (Path(path) / "cifar-10-batches-py").is_dir():
        try:
            cifar10 = CIFAR10(path, train=split == "train")
        except RuntimeError as error:
            raise ValueError(
                f"CIFAR-10 in {path} is damaged or not complete; unpack cifar-10-python.tar.gz there again."
            ) from error
        names = [f"{split}-{i:05d}" for i in range(len(cifar10.data))]
        return Source(path, names, np.array(cifar10.targets, np.int64), 10, _ReadArray(cifar10.data))
    try:
        folder = ImageFolder(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"{path} is neither a ZIP file nor CIFAR-10 nor a folder with a subfolder of images for each class "
            f"({str(error).rstrip('.')}); give the path of one of these."
        ) from error
    names = [str(Path(name).relative_to(path)) for name, _ in folder.samples]
    return Source(path, names, np.array(folder.targets, np.int64), len(folder.classes), _ReadFile(path))


def _open_zip(path: str) -> Source:
    with zipfile.ZipFile(path) as file:
        names = sorted(n for n in file.namelist() if n.lower().endswith((*IMG_EXTENSIONS, ".npy")))
        labels = json.loads(file.read("dataset.json"))["labels"] if "dataset.json" in file.namelist() else None
    if not names:
        raise FileNotFoundError(f"There are neither images nor .npy files in {path}; give the path of another file.")
    if labels is None:
        return Source(path, names, np.zeros(len(names), np.int64), 0, _ReadZip(path))
    label_of = dict(labels)
    labels = [label_of.get(name) for name in names]
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        raise ValueError(
            f"dataset.json in {path} does not have one class number for each of the {len(names)} images; make the file "
            "again with EDM's dataset_tool.py, or take the file out for data without labels."
        )
    return Source(path, names, np.array(labels, np.int64), max(labels) + 1, _ReadZip(path))


@dataclass
class _ReadFile:
    folder: str

    def __call__(self, name: str) -> Image.Image:
        with Image.open(Path(self.folder) / name) as image:
            return image.convert("RGB")


@dataclass
class _ReadArray:
    images: np.ndarray

    def __call__(self, name: str) -> Image.Image:
        return Image.fromarray(self.images[int(name.rsplit("-", 1)[1])])


class _ReadZip:
    """Opens the file once in each process that reads: forked processes would share a position in it."""

    def __init__(self, path: str):
        self.path, self.file, self.process = path, None, None

    def __getstate__(self) -> dict:
        return {"path": self.path, "file": None, "process": None}

    def __call__(self, name: str) -> Image.Image | np.ndarray:
        if self.process != os.getpid():
            self.file, self.process = zipfile.ZipFile(self.path), os.getpid()
        data = io.BytesIO(self.file.read(name))
        if name.endswith(".npy"):
            return np.load(data)
        with Image.open(data) as image:
            return image.convert("RGB")


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """Centre square of an image at ``size`` pixels, uint8 (3, size, size), resized as in ADM (Dhariwal & Nichol 2021).

    Halved by averaging for as long as the short side is at least twice ``size``, then resized bicubically to a short
    side of ``size``, then cropped. EDM2 and the sCM paper do the same.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.array(image.crop((left, top, left + size, top + size)).convert("RGB"))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
