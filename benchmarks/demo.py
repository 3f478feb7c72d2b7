"""The demo: teacher, sCD and sCT on scikit-learn's digits, compared in a table and a picture.

Runs the commands that it prints, one after the other, in one process. Everything lands in runs/demo: checkpoints,
TensorBoard logs, demo.json with the figures of the table and demo.png.

The distances are to the held-out half of the data, which no network has seen: to copy the training images brings a
model to the floor, the training half's own distance, and no lower. Those to the training half stand beside them.

Usage: python benchmarks/demo.py
"""

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from classifier import train as train_classifier
from PIL import Image, ImageDraw
from provenance import commit
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics.image import FrechetInceptionDistance
from torchvision.utils import make_grid

from sclightning.cli import main as sclightning
from sclightning.data import DigitsDataModule
from sclightning.metrics import ClassifierFeatures
from sclightning.modules import ConsistencyDistillation, ConsistencyTraining, TrigFlowDiffusion

OUT = Path("runs/demo")  # where the configs write
RUNS = {"teacher": TrigFlowDiffusion, "scd": ConsistencyDistillation, "sct": ConsistencyTraining}
ROWS = {  # name of the row: its run, network evaluations
    "teacher": ("teacher", 35),
    "scd_2step": ("scd", 2),
    "scd_1step": ("scd", 1),
    "sct_2step": ("sct", 2),
    "sct_1step": ("sct", 1),
}


def run(command: list[str]) -> None:
    """One command of the CLI."""
    print(f"\n$ sclightning {' '.join(command)}", flush=True)
    sclightning(command)


def to_training_half(images: Tensor, classifier: Path) -> float:
    """Fréchet distance of uint8 images (N, 1, 8, 8) to the half of the data that the networks saw."""
    metric = FrechetInceptionDistance(ClassifierFeatures(str(classifier)).eval(), normalize=False, antialias=False)
    metric.update(torch.from_numpy(DigitsDataModule().split("train").images), real=True)
    metric.update(images, real=False)
    return float(metric.compute())


def picture(columns: int = 20) -> None:
    """Real digits over each row's samples: same noise, same label down a column."""
    data = DigitsDataModule()
    label = torch.arange(columns) % data.num_classes
    train = data.split("train")
    real = torch.stack(
        [torch.from_numpy(train.images[train.labels == int(c)][i // data.num_classes]) for i, c in enumerate(label)]
    )
    rows = {"real": real}
    for name, (run_name, nfe) in ROWS.items():
        model = RUNS[run_name].load_from_checkpoint(OUT / run_name / "last.ckpt", map_location="cpu")
        if run_name != "teacher":
            model.times = model.times[:nfe]
        rows[f"{name} ({model.nfe})"] = data.to_uint8(model.sample(range(columns), data.image_shape, label))
    draw(rows, scale=4).save(OUT / "demo.png")


def draw(rows: dict[str, Tensor], scale: int, margin: int = 130) -> Image.Image:
    """Rows of uint8 images (N, 1, H, W) under one another, enlarged, their names at the left."""
    columns = len(next(iter(rows.values())))
    grid = make_grid(torch.cat(list(rows.values())), nrow=columns, padding=1, pad_value=80)
    grid = grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2).permute(1, 2, 0).numpy()
    image = Image.new("RGB", (grid.shape[1] + margin, grid.shape[0]), "white")
    image.paste(Image.fromarray(grid), (margin, 0))
    height = grid.shape[0] / len(rows)
    for row, name in enumerate(rows):
        ImageDraw.Draw(image).text((6, (row + 0.5) * height), name, fill="black", anchor="lm")
    return image


def main() -> None:
    """Train, test, compare."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    start = time.time()
    classifier = OUT / "classifier.pt"
    print(f"classifier of the Fréchet distance: held-out accuracy {train_classifier('digits', classifier):.3f}")
    for name in RUNS:
        run(["fit", "--config", f"configs/demo/{name}.yaml"])
    measured, training_half = {}, {}
    for name in RUNS:
        checkpoint = OUT / name / "last.ckpt"
        run(["test", "--config", f"configs/demo/{name}.yaml", "--ckpt_path", str(checkpoint)])
        record = max(checkpoint.parent.glob("last_*.json"), key=lambda p: p.stat().st_mtime)
        for made in json.loads(record.read_text())["runs"]:
            measured[name, made["nfe"]] = made["fd_classifier"]
            samples = max(checkpoint.parent.glob(f"last_*_nfe{made['nfe']}_*.npz"), key=lambda p: p.stat().st_mtime)
            images = torch.from_numpy(np.load(samples)["arr_0"]).permute(0, 3, 1, 2)
            training_half[name, made["nfe"]] = to_training_half(images, classifier)
    figures = {
        row: {"fd": measured[key], "fd_training_half": training_half[key], "nfe": key[1]} for row, key in ROWS.items()
    }
    held_out = torch.from_numpy(DigitsDataModule().split("held_out").images)
    # The distance is symmetric: that of the training half to the held-out half is the same number.
    figures["floor"] = {"fd": to_training_half(held_out, classifier), "fd_training_half": 0.0, "nfe": 0}
    picture()
    figures["seconds"] = round(time.time() - start, 1)
    figures["machine"] = {"cpu_threads": torch.get_num_threads(), "processor": platform.machine()}
    figures["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "commit": commit()}
    (OUT / "demo.json").write_text(json.dumps(figures, indent=2) + "\n")
    report(figures)


def report(figures: dict) -> None:
    """Print the table."""
    table = Table(title="Fréchet distance in a small classifier's features (not FID)")
    for column in ("", "evaluations", "to unseen images", "× teacher", "to seen images"):
        table.add_column(column, justify="left" if not column else "right")
    for name in (*ROWS, "floor"):
        fd, nfe = figures[name]["fd"], figures[name]["nfe"]
        what = "training half (floor)" if name == "floor" else name
        ratio, seen = f"{fd / figures['teacher']['fd']:.2f}", figures[name]["fd_training_half"]
        table.add_row(what, str(nfe or "-"), f"{fd:.2f}", ratio, f"{seen:.2f}")
    Console().print(table)
    print(f"{figures['seconds']:.0f} seconds; samples in {OUT / 'demo.png'}, figures in {OUT / 'demo.json'}")


if __name__ == "__main__":
    main()
