"""How fast latents of ImageNet 512 come out of a warm page cache: memory-mapped arrays, a ZIP of npy files, webdataset.

The same random posteriors, float16 (8, 64, 64) and a label, are written in the three formats, read once, and then read
in batches by one process through torch's DataLoader, in turns. Arrays and ZIP are read in random order; webdataset is
spared the shuffling. Needs ``pip install webdataset``.

Usage: python benchmarks/data_loading.py [--out benchmarks/results/data_loading.json]
"""

import argparse
import io
import json
import os
import platform
import re
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import webdataset
from provenance import commit
from torch.utils.data import DataLoader, Dataset

from sclightning.data.arrays import EndlessSampler
from sclightning.data.latents import ImageNetLatentDataModule
from sclightning.data.requests import whole
from sclightning.data.storage import write_metadata

SHAPE, BATCH = (8, 64, 64), 256


def write(folder: Path, n: int) -> None:
    """The same posteriors as arrays, as a ZIP in EDM2's layout and as a tar file for webdataset."""
    moments = np.lib.format.open_memmap(folder / "train_moments.npy", "w+", np.float16, (n, *SHAPE))
    labels = np.random.default_rng(0).integers(0, 1000, n)
    with (
        zipfile.ZipFile(folder / "latents.zip", "w") as file,
        webdataset.TarWriter(str(folder / "latents.tar")) as tar,
    ):
        for i, label in enumerate(labels.tolist()):
            moments[i] = np.random.default_rng((1, i)).random(SHAPE, np.float32)
            npy = io.BytesIO()
            np.save(npy, moments[i])
            file.writestr(f"{i // 1000:05d}/img-mean-std-{i:08d}.npy", npy.getvalue())
            tar.write({"__key__": f"{i:08d}", "npy": moments[i], "cls": label})
    moments.flush()
    np.save(folder / "train_labels.npy", labels)
    write_metadata(folder, "train", "moments", 1000, "paper")


class Zip(Dataset):
    """A ZIP of npy files, read item by item."""

    def __init__(self, path: Path, labels: np.ndarray):
        self.file, self.labels = zipfile.ZipFile(path), labels
        self.names = sorted(self.file.namelist())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return np.load(io.BytesIO(self.file.read(self.names[i]))), self.labels[i]


def loaders(folder: Path) -> dict[str, Callable[[], Iterable]]:
    """Makers of endless or finite streams of batches by format."""
    data = ImageNetLatentDataModule(str(folder)).split("train")
    archive = Zip(folder / "latents.zip", np.load(folder / "train_labels.npy"))

    def tar() -> DataLoader:
        samples = webdataset.WebDataset(str(folder / "latents.tar"), shardshuffle=False).decode()
        return webdataset.WebLoader(samples.to_tuple("npy", "cls"), batch_size=BATCH, num_workers=0)

    return {
        "arrays": lambda: DataLoader(data, BATCH, sampler=EndlessSampler(data, 1, 0, 0, lambda: 0), collate_fn=whole),
        "zip": lambda: DataLoader(archive, BATCH, sampler=EndlessSampler(archive, 1, 0, 0, lambda: 0)),
        "webdataset": tar,
    }


def check(makers: dict[str, Callable[[], Iterable]], folder: Path) -> None:
    """All formats give the values that were written."""
    moments, labels = np.load(folder / "train_moments.npy", mmap_mode="r"), np.load(folder / "train_labels.npy")
    order = np.random.default_rng((0, 0)).permutation(len(labels))[:BATCH]
    for name, make in makers.items():
        x, label = next(iter(make()))
        items = np.arange(BATCH) if name == "webdataset" else order
        assert x.dtype == torch.float16 and np.array_equal(x, moments[items]), name
        assert np.array_equal(label, labels[items]), name


def measure(make: Callable[[], Iterable], batches: int) -> tuple[float, float]:
    """Latents over so many batches, per second and per second of CPU time, which others on the machine touch less."""
    start = time.perf_counter(), time.process_time()
    count = sum(len(x) for x, _ in islice(make(), batches))
    return count / (time.perf_counter() - start[0]), count / (time.process_time() - start[1])


def summary(values: list[float]) -> dict[str, int]:
    """Median and range."""
    return {"median": round(float(np.median(values))), "min": round(min(values)), "max": round(max(values))}


def main() -> None:
    """Write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/data_loading.json"))
    parser.add_argument("--items", type=int, default=16384, help="latents of 64 KiB to write and read")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    rates = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, args.items)
        makers = loaders(folder)
        check(makers, folder)
        for repeat in range(args.repeats + 1):  # the first fills the cache
            for format_, make in makers.items():
                rate = measure(make, args.items // BATCH * (16 if format_ == "arrays" else 1))
                if repeat:
                    rates.setdefault(format_, []).append(rate)
    ratio = {
        format_: np.median(np.divide(rates["arrays"], rates[format_]), axis=0) for format_ in ("zip", "webdataset")
    }
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    result = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_average_15_minutes": os.getloadavg()[2],
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("torch", "numpy", "webdataset")},
        "commit": commit(),
        "items": args.items,
        "bytes_per_item": int(np.prod(SHAPE)) * 2,
        "batch": BATCH,
        "processes": 1,
        "latents_per_second": {format_: summary([wall for wall, _ in v]) for format_, v in rates.items()},
        "latents_per_cpu_second": {format_: summary([cpu for _, cpu in v]) for format_, v in rates.items()},
        "arrays_over": {name: dict(zip(("wall", "cpu"), ratio[name].round(1).tolist(), strict=True)) for name in ratio},
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
