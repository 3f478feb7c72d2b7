"""What the figures share: cached runs of our modules, distances in a small classifier's features, JSON and plots.

A run is a config (``benchmarks/figures/medium/*.yaml`` or ``configs/fashion_mnist/*.yaml``) with some of its
values changed. Its folder in runs/figures is named after all of its values, so that figures share runs, a
teacher above all, and a figure that was interrupted goes on where it was.
"""

import argparse
import hashlib
import inspect
import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib
import numpy as np
import torch
import yaml
from filelock import FileLock
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from torchmetrics.image import FrechetInceptionDistance

from sclightning.callbacks import FIDEvaluation, SampleGrid, TangentWarmup
from sclightning.cli import SCLightningCLI, _quieten
from sclightning.data import FashionMNISTDataModule
from sclightning.data.arrays import ArrayDataset, Split
from sclightning.distances import Extra
from sclightning.metrics import ClassifierFeatures

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import classifier  # noqa: E402
import provenance  # noqa: E402

RUNS, RESULTS, PLOTS = Path("runs/figures"), ROOT / "benchmarks/results/figures", ROOT / "docs/figures"
CONFIGS = {"medium": ROOT / "benchmarks/figures/medium", "full": ROOT / "configs/fashion_mnist"}
DISTANCE = classifier.DISTANCE
LENGTH = 1.0
"""Steps of every run as a fraction of its config's."""
JOBS = 1
"""Runs side by side, each in a process of its own."""
PARTS = 4
"""Checkpoints kept of a run, evenly spaced."""


class SmallFashionMNIST(FashionMNISTDataModule):
    """Fashion-MNIST averaged over blocks of 4x4 pixels: 8x8 images."""

    name = "fashion-mnist-8x8"
    image_shape = (1, 8, 8)

    def read(self, split: Split) -> ArrayDataset:
        """Images and labels of torchvision's split, padded to 32x32 and averaged."""
        data = super().read(split)
        images = data.images.reshape(len(data), 1, 8, 4, 8, 4).mean((3, 5)).round().astype(np.uint8)
        return ArrayDataset(images, data.labels)


classifier.DATA[SmallFashionMNIST.name] = (SmallFashionMNIST, 4)
torch.backends.cudnn.allow_tf32 = False  # its rounding is larger than a fine grid's steps (Fig. 5c)


@dataclass
class Run:
    """A trained model and where it lies."""

    folder: Path
    cli: SCLightningCLI

    @property
    def checkpoint(self) -> str:
        """The last checkpoint, of averaged weights."""
        return str(self.folder / "last.ckpt")

    @property
    def lock(self) -> FileLock:
        """Held by who trains or measures the run, so that figures made at the same time share it."""
        return FileLock(self.folder.with_suffix(".lock"))

    @property
    def record(self) -> dict[str, Any]:
        """Steps, images, seconds and device of the training."""
        record = json.loads((self.folder / "record.json").read_text())
        return {key: record[key] for key in ("steps", "images", "seconds", "parameters", "device")}

    def logged(self, column: str) -> np.ndarray:
        """What the module logged at each step, float64."""
        table = np.genfromtxt(self.folder / "metrics.csv", delimiter=",", names=True)
        values = table[column]
        return values[~np.isnan(values)] if np.isnan(values).any() and not np.isinf(values).any() else values


def fit(
    kind: str, scale: str, seed: int = 0, edit: Callable[[SCLightningCLI], None] | None = None, **init_args: Any
) -> Run:
    """Train a model, or find that it is trained already.

    Args:
        kind: Config: ``teacher``, ``scd`` or ``sct``.
        scale: Folder of the config, a key of ``CONFIGS``.
        seed: Seed of weights, order of images, noise and dropout.
        edit: Changes what no argument of ours changes, before training and before each use.
        init_args: Arguments of the module, dots for those inside one, ``model`` for another class.
    """
    changes = {f"model.init_args.{name.replace('__', '.')}": value for name, value in init_args.items()}
    if "model.init_args.class_path" in changes:
        changes = {"model.class_path": changes.pop("model.init_args.class_path")} | changes
    changes |= {"seed_everything": seed, "model.init_args.seed": seed, "data.init_args.seed": seed}
    changes["trainer.logger"] = False  # its folder has the hash in its name
    if not torch.cuda.is_available():
        changes["model.init_args.compile"] = False  # on a CPU it takes longer than a run
    if LENGTH != 1:
        steps = round(LENGTH * read(kind, scale)["trainer"]["max_steps"])
        changes |= {"trainer.max_steps": steps, "model.init_args.lr_scheduler.init_args.total_steps": steps}
    arguments = [
        f"--{name}={json.dumps(value) if not isinstance(value, str) else value}" for name, value in changes.items()
    ]
    _quieten()
    cli = SCLightningCLI(["--config", str(CONFIGS[scale] / f"{kind}.yaml"), *arguments], run=False)
    for callback in cli.trainer.callbacks:
        if isinstance(callback, TangentWarmup):
            callback.steps = max(1, round(LENGTH * callback.steps))
    if edit is not None:
        edit(cli)
    content = cli.parser.dump(cli.config) + (inspect.getsource(edit) if edit else "")
    run = Run(RUNS / f"{kind}_{hashlib.sha256(content.encode()).hexdigest()[:12]}", cli)
    with run.lock:
        if not (run.folder / "record.json").is_file():
            _train(run)
    return run


def read(kind: str, scale: str) -> dict[str, Any]:
    """A config as it stands in its file."""
    return yaml.safe_load((CONFIGS[scale] / f"{kind}.yaml").read_text())


def student(kind: str, scale: str, seed: int = 0, edit: Callable | None = None, **init_args: Any) -> Run:
    """A consistency model of the teacher that all figures share; arguments as in :func:`fit`."""
    return fit(kind, scale, seed, edit, **{"teacher_checkpoint": fit("teacher", scale).checkpoint} | init_args)


def _train(run: Run) -> None:
    trainer, folder = run.cli.trainer, run.folder
    print(f"training {folder}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    ours = (ModelCheckpoint, FIDEvaluation, SampleGrid)
    every = max(trainer.max_steps // PARTS, 1)
    checkpoints = ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1, save_last=True)
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, ours)] + [checkpoints]
    trainer.logger = CSVLogger(folder, name="", version="")
    start = time.time()
    trainer.fit(run.cli.model, datamodule=run.cli.datamodule)
    steps = trainer.global_step
    record = {"steps": steps, "images": steps * run.cli.datamodule.hparams.batch_size}
    record |= {"seconds": round(time.time() - start, 1), "parameters": parameters(run), **machine()}
    (folder / "record.json").write_text(json.dumps(record, indent=2) + "\n")


def each(function: Callable[..., Any], cases: Sequence[tuple]) -> list[Any]:
    """Results of a function for each case, in order: by turns, or side by side in processes that share the GPUs.

    Args:
        function: Trains and measures. Another process finds it by its name in its module.
        cases: Its arguments.
    """
    if JOBS == 1:
        return [function(*case) for case in cases]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    context = multiprocessing.get_context("spawn")
    count = context.Value("l", os.getpid())  # not all scripts begin with the first GPU
    with ProcessPoolExecutor(min(JOBS, len(cases)), context, _join, (count, devices, LENGTH)) as pool:
        return list(pool.map(function, *zip(*cases, strict=True)))


def each_setting(
    function: Callable[..., Any], scale: str, seeds: Sequence[int], settings: Sequence[tuple]
) -> list[list[Any]]:
    """Results of ``function(scale, seed, *setting)``: for each setting a list over seeds.

    The first seed of all settings comes before the second of any: what was interrupted is of use.
    """
    found = each(function, [(scale, seed, *setting) for seed in seeds for setting in settings])
    return [found[i :: len(settings)] for i in range(len(settings))]


def _join(count: Any, devices: Sequence[str], length: float) -> None:
    """What a process of :func:`each` begins with: one GPU of several, one core, and what the command line said."""
    global LENGTH
    LENGTH = length
    torch.set_num_threads(1)
    with count.get_lock():
        if devices:
            os.environ["CUDA_VISIBLE_DEVICES"] = devices[count.value % len(devices)]
        count.value += 1


def parameters(run: Run) -> int:
    """Number of the network's parameters."""
    return sum(p.numel() for p in run.cli.model.backbone.parameters())


def measure(
    run: Run,
    steps: Sequence[int] | None = None,
    guidance_scales: Sequence[float] | None = None,
    extras: Sequence[Extra] = (),
    checkpoint: str = "last.ckpt",
) -> list[dict[str, Any]]:
    """Fréchet distances to the held-out images in the classifier's features, one entry per setting.

    Args:
        run: Model to sample from.
        steps: Numbers of steps of a consistency model.
        guidance_scales: Guidance scales of a guided model.
        extras: What to give besides the distance.
        checkpoint: File in the run's folder.
    """
    asked = {"steps": steps, "guidance_scales": guidance_scales, "extras": list(extras), "checkpoint": checkpoint}
    path = run.folder / f"measured_{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]}.json"
    with run.lock:
        if not path.is_file():
            written = _test(run, **asked)
            if written is None:
                return []
            path.write_text(written.read_text())
    runs = json.loads(path.read_text())["runs"]
    keep = {"fd_classifier": "fd", "precision_classifier": "precision", "recall_classifier": "recall"}
    keep |= {"nfe": "nfe", "guidance_scale": "guidance_scale"}
    return [{keep[k]: v for k, v in r.items() if k in keep and v is not None} for r in runs]


def _test(
    run: Run,
    steps: Sequence[int] | None,
    guidance_scales: Sequence[float] | None,
    extras: Sequence[Extra],
    checkpoint: str,
) -> Path | None:
    """What the test of a checkpoint wrote; none where its samples are not finite."""
    if guidance_scales is not None:
        run.cli.model.guidance_scale = guidance_scales[0]
    weights = classifier_weights(run.cli.datamodule.name)
    evaluation = FIDEvaluation(
        ClassifierFeatures(str(weights)), "held_out", extras, steps=steps, guidance_scales=guidance_scales
    )
    trainer = L.Trainer(
        accelerator=run.cli.config.trainer.accelerator, devices=1, logger=False, callbacks=[evaluation],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    try:
        trainer.test(run.cli.model, run.cli.datamodule, str(run.folder / checkpoint), verbose=False)
    except ValueError as error:
        if "not finite" not in str(error):
            raise
        return None
    return max(run.folder.glob(f"{Path(checkpoint).stem}_fd_*.json"), key=lambda p: p.stat().st_mtime)


def distances(run: Run, checkpoint: str = "last.ckpt") -> dict[str, float]:
    """Distance of one and of two steps of a consistency model; none where samples are not finite."""
    found = {f"fd_{r['nfe']}step": r["fd"] for r in measure(run, steps=[1, 2], checkpoint=checkpoint)}
    return {"fd_1step": None, "fd_2step": None} | found


def curve(run: Run) -> dict[str, list[float]]:
    """Distances of one and of two steps at every checkpoint of a run."""
    files = sorted(run.folder.glob("step=*.ckpt"), key=lambda p: int(p.stem.removeprefix("step=")))
    found = [{"steps": int(p.stem.removeprefix("step=")), **distances(run, p.name)} for p in files]
    return {key: [point[key] for point in found] for key in found[0]}


def spread(run: Run, column: str = "tangent_norm") -> dict[str, float]:
    """Median and largest of what was logged at each step, and the largest ratio of a step to its neighbours."""
    values = run.logged(column)
    values = values[len(values) // 10 :]  # after the warm-up: with r = 0 the first tangents of sCD are zero
    around = np.sqrt(values[:-2] * values[2:])
    jump = (values[1:-1] / around).max()
    return {"median": float(np.median(values)), "max": float(values.max()), "largest_jump": float(jump)}


def references(teacher: Run) -> dict[str, Any]:
    """What the students of the shared teacher are compared with, and the label of all."""
    return {"teacher": measure(teacher)[0], "floor": floor(teacher), "label": label(teacher)}


def reference_rows(result: dict) -> list[str]:
    """Rows of the teacher and of the floor."""
    return [row("teacher", "35 evaluations", result["teacher"]["fd"]), row("floor", "", result["floor"])]


def floor(run: Run) -> float:
    """Distance of as many training images as there are samples, which is what a perfect model would have."""
    data = run.cli.datamodule
    extractor = ClassifierFeatures(str(classifier_weights(data.name))).eval()
    metric = FrechetInceptionDistance(extractor, normalize=False, antialias=False)
    train = data.split("train").images[: data.hparams.num_test_samples]
    for images, real in ((data.split("held_out").images, True), (train, False)):
        for chunk in torch.from_numpy(images).split(1000):
            metric.update(chunk, real=real)
    return float(metric.compute())


def classifier_weights(data: str) -> Path:
    """Weights of the classifier in whose features distances are taken, trained where they are not there yet."""
    if data == "fashion-mnist":
        return ROOT / "benchmarks/classifier_fashion_mnist.pt"
    path = RUNS / f"classifier_{data}.pt"
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            print(f"classifier of {data}: held-out accuracy {classifier.train(data, path):.3f}", flush=True)
    return path


def machine() -> dict[str, Any]:
    """Device, versions and commit of a result."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()}, {torch.get_num_threads()} thread)"
    versions = {name: version(name) for name in ("torch", "lightning", "torchmetrics", "torch-fidelity")}
    return {"device": device, "versions": versions, "commit": provenance.commit()}


def label(run: Run) -> str:
    """Data, size and device of a run, as plots and pages say it."""
    _, _, size = run.cli.datamodule.image_shape
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{size}×{size} Fashion-MNIST, {parameters(run) / 1e6:.2f} M parameters, {device}"


def row(*cells: float | str | list[float | None] | None) -> str:
    """A row of a Markdown table; a list is the values of several seeds."""

    def text(cell: float | str | list | None) -> str:
        if isinstance(cell, list):
            return ", ".join(map(text, cell))
        return "not finite" if cell is None else cell if isinstance(cell, str) else f"{cell:.3f}"

    return f"| {' | '.join(map(text, cells))} |"


def seeds_row(name: str, seeds: Sequence[dict]) -> str:
    """A row with the last distances of one and of two steps, seed by seed."""
    columns = [[seed[f"fd_{nfe}step"] for seed in seeds] for nfe in (1, 2)]
    return row(name, *([v[-1] if isinstance(v, list) else v for v in column] for column in columns))


def main(
    name: str,
    doc: str,
    compute: Callable[[str, Sequence[int]], dict],
    plot: Callable[[dict, Figure], None],
    rows: Callable[[dict], list[str]],
) -> None:
    """Command line of a figure: train and measure what it needs, write the JSON, draw the plot, print the table.

    Args:
        name: Of the JSON and of the plot.
        doc: What the figure shows, for ``--help``.
        compute: Makes the results at a scale, from students of some seeds.
        plot: Draws them.
        rows: Table of the main numbers, in Markdown.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=CONFIGS, default="medium")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the students")
    parser.add_argument("--plot", action="store_true", help="redraw from the JSON, without training")
    parser.add_argument("--length", type=float, default=1.0, help="of every run, as a fraction of its config's steps")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, on the GPUs in turn")
    args = parser.parse_args()
    global LENGTH, JOBS
    LENGTH, JOBS = args.length, args.jobs
    path = RESULTS / f"{name}.json"
    key = args.scale if args.length == 1 else f"{args.scale}_{args.length:g}"
    if not args.plot:
        made = {**compute(args.scale, args.seeds), "length": args.length, **machine()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(RUNS / f"{name}.lock"):  # another scale may be made at the same time
            results = json.loads(path.read_text()) if path.is_file() else {}
            path.write_text(json.dumps(rounded(results | {key: made}), indent=2) + "\n")
    result = json.loads(path.read_text())[key]
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 8, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False})
    figure = Figure(layout="constrained", dpi=110)
    plot(result, figure)
    figure.supxlabel(result["label"], fontsize=6, color="grey")
    PLOTS.mkdir(parents=True, exist_ok=True)
    suffix = "" if key == "medium" else f"_{key}"
    figure.savefig(PLOTS / f"{name}{suffix}.png")
    print(f"{result['label']}, in {path}", *rows(result), sep="\n")


def rounded(value: Any) -> Any:
    """Numbers to five digits, so that a JSON can be read."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
