"""How much of a Fashion-MNIST distance is faint grain in the black background: the same samples with dark pixels black.

Usage: python benchmarks/grain.py runs/fashion_mnist/sprint/seed0 [--below 8]
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from fashion_mnist import CLASSIFIER, KINDS, ROWS
from provenance import commit

from sclightning.data import FashionMNISTDataModule
from sclightning.distances import Measure
from sclightning.metrics import ClassifierFeatures


def distances(samples: dict[str, np.ndarray], data: FashionMNISTDataModule) -> dict[str, float]:
    """Fréchet distances of uint8 images (N, H, W) to the training images, by name."""
    measure, found = Measure(ClassifierFeatures(str(CLASSIFIER)), "train"), {}
    for name, images in samples.items():
        chunks = torch.from_numpy(images)[:, None].split(1000)
        measure.prepare(data, torch.device("cpu"), len(images))
        for i, chunk in enumerate(chunks):
            measure.update(chunk, i, len(chunks))
        found[name] = measure.compute()[measure.key]
    return found


def main() -> None:
    """Measure each row of a seed's folder as it is and with black in place of what is nearly black."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a seed, with teacher, scd and sct in it")
    parser.add_argument("--below", type=int, default=8, help="pixels below this, of 255, are set to black")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fashion_mnist_grain.json"))
    args = parser.parse_args()
    samples, data = {}, FashionMNISTDataModule()
    for path in (args.folder / kind / "samples.npz" for kind in KINDS):
        samples |= {row: array for row, array in np.load(path).items() if row in ROWS}
    black = {row: np.where(images < args.below, 0, images).astype(np.uint8) for row, images in samples.items()}
    found, without = distances(samples, data), distances(black, data)
    rows = {row: {"fd": found[row], "fd_black": without[row], "dark": _dark(samples[row])} for row in ROWS}
    made = {"below": args.below, "versions": {"torch": torch.__version__}, "commit": commit(), "rows": rows}
    args.out.write_text(json.dumps(made, indent=2) + "\n")
    for row, values in rows.items():
        ratios = (values[key] / rows["teacher"][key] for key in ("fd", "fd_black"))
        print(row, *(f"{value:.3f}" for value in values.values()), *(f"{ratio:.2f}x" for ratio in ratios))


def _dark(images: np.ndarray) -> float:
    """Mean level of the frame of two pixels around the images, which is 0 in all real ones."""
    return float(np.concatenate([images[:, :2].ravel(), images[:, -2:].ravel()]).mean())


if __name__ == "__main__":
    main()
