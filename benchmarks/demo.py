"""The demo: teacher, sCD and sCT on scikit-learn's digits, compared in a table and a picture.

Runs the commands that it prints, one after the other, in one process. Everything lands in runs/demo: checkpoints,
TensorBoard logs, demo.json with the figures of the table and demo.png.

Usage: python benchmarks/demo.py
"""

import json
import platform
import subprocess
import time
from pathlib import Path

import torch
from classifier import train as train_classifier
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from torchmetrics.image import FrechetInceptionDistance
from torchvision.utils import make_grid

from sclightning.cli import main as sclightning
from sclightning.data import DigitsDataModule
from sclightning.metrics import ClassifierFeatures
from sclightning.modules import ConsistencyDistillation, ConsistencyTraining, TrigFlowDiffusion
from sclightning.sampling import T_MAX

OUT = Path("runs/demo")  # where the configs write
ROWS = {  # name of the row: module, its run, what the test adds to the config of the run
    "teacher": (TrigFlowDiffusion, "teacher", []),
    "scd_2step": (ConsistencyDistillation, "scd", []),
    "scd_1step": (ConsistencyDistillation, "scd", [f"--model.times=[{T_MAX}]"]),
    "sct_2step": (ConsistencyTraining, "sct", []),
    "sct_1step": (ConsistencyTraining, "sct", [f"--model.times=[{T_MAX}]"]),
}


def run(command: list[str]) -> None:
    """One command of the CLI."""
    print(f"\n$ sclightning {' '.join(command)}", flush=True)
    sclightning(command)


def floor(classifier: Path) -> float:
    """Fréchet distance of the held-out half of the data to the training half."""
    data = DigitsDataModule()
    metric = FrechetInceptionDistance(ClassifierFeatures(str(classifier)).eval(), normalize=False, antialias=False)
    for split in ("train", "held_out"):
        metric.update(torch.from_numpy(data.split(split).images), real=split == "train")
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
    for name, (module, run_name, extra) in ROWS.items():
        model = module.load_from_checkpoint(OUT / run_name / "last.ckpt", map_location="cpu")
        if extra:
            model.times = [T_MAX]
        rows[f"{name} ({model.nfe})"] = data.to_uint8(model.sample(range(columns), data.image_shape, label))
    scale, margin = 4, 130
    grid = make_grid(torch.cat(list(rows.values())), nrow=columns, padding=1, pad_value=80)
    grid = grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2).permute(1, 2, 0).numpy()
    image = Image.new("RGB", (grid.shape[1] + margin, grid.shape[0]), "white")
    image.paste(Image.fromarray(grid), (margin, 0))
    height = grid.shape[0] / len(rows)
    for row, name in enumerate(rows):
        ImageDraw.Draw(image).text((6, (row + 0.5) * height), name, fill="black", anchor="lm")
    image.save(OUT / "demo.png")


def main() -> None:
    """Train, test, compare."""
    start = time.time()
    classifier = OUT / "classifier.pt"
    print(f"classifier of the Fréchet distance: held-out accuracy {train_classifier('digits', classifier):.3f}")
    for name in ("teacher", "scd", "sct"):
        run(["fit", "--config", f"configs/demo/{name}.yaml"])
    figures = {}
    for row, (_, name, extra) in ROWS.items():
        checkpoint = OUT / name / "last.ckpt"
        run(["test", "--config", f"configs/demo/{name}.yaml", "--ckpt_path", str(checkpoint), *extra])
        result = json.loads(max(checkpoint.parent.glob("last_*.json"), key=lambda p: p.stat().st_mtime).read_text())
        figures[row] = {"fd": result["fd_classifier"], "nfe": result["nfe"]}
    figures["floor"] = {"fd": floor(classifier), "nfe": 0}
    picture()
    figures["seconds"] = round(time.time() - start, 1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    figures["machine"] = {"cpu_threads": torch.get_num_threads(), "processor": platform.machine()}
    figures["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "commit": commit}
    (OUT / "demo.json").write_text(json.dumps(figures, indent=2) + "\n")
    report(figures)


def report(figures: dict) -> None:
    """Print the table."""
    table = Table(title="Fréchet distance to the training half, in a small classifier's features (not FID)")
    for column in ("", "evaluations", "distance", "× teacher"):
        table.add_column(column, justify="left" if not column else "right")
    for name in (*ROWS, "floor"):
        fd, nfe = figures[name]["fd"], figures[name]["nfe"]
        what = "held-out half (floor)" if name == "floor" else name
        table.add_row(what, str(nfe or "-"), f"{fd:.3f}", f"{fd / figures['teacher']['fd']:.2f}")
    Console().print(table)
    print(f"{figures['seconds']:.0f} seconds; samples in {OUT / 'demo.png'}, figures in {OUT / 'demo.json'}")


if __name__ == "__main__":
    main()
