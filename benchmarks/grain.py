"""How much of a Fashion-MNIST distance is faint grain in the black background: the same samples with dark pixels black.

Usage: python benchmarks/grain.py runs/fashion_mnist/sprint/seed0 [--below 8]
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from fashion_mnist import CLASSIFIER, distance, sampled
from provenance import commit

from sclightning.data import FashionMNISTDataModule
from sclightning.distances import Measure
from sclightning.metrics import ClassifierFeatures


def main() -> None:
    """Measure each row of a seed's folder as it is and with black in place of what is nearly black."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a seed, with teacher and students in it")
    parser.add_argument("--below", type=int, default=8, help="pixels below this, of 255, are set to black")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fashion_mnist_grain.json"))
    args = parser.parse_args()
    data, measure, rows = FashionMNISTDataModule(), Measure(ClassifierFeatures(str(CLASSIFIER)), "train"), {}
    for row, array in sampled(args.folder).items():
        images = torch.from_numpy(array)[:, None]
        black = images.masked_fill(images < args.below, 0)
        found, without = (distance(measure, x, data, torch.device("cpu")) for x in (images, black))
        rows[row] = {"fd": found, "fd_black": without, "dark": _dark(array)}
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
