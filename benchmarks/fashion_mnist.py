"""Fashion-MNIST: teacher, sCD and sCT trained for so many seconds on one GPU, measured, compared.

Every model is a plain ``sclightning fit`` and ``sclightning test`` of a config that this script writes beside the run:
the one in configs/fashion_mnist with the seed and the number of steps. A first run of a few hundred steps tells how
many fit the seconds. What counts as training is all that a step costs, from reading the images to the average of the
weights, and the checkpoints; what does not is the start, in which the step is compiled: it is reported beside it.
Both come out of the wall times in the TensorBoard log.

Repeat the command after an interruption: runs go on from their last checkpoint, finished ones are only tested. Figures
are merged into the JSON by budget, model and seed, so that seeds may be run at different times.

Usage: python benchmarks/fashion_mnist.py --budget sprint --seeds 0 1 2 [--devices 2]
Settings are compared on another seed, which no result has: … --search --only scd --teacher CKPT -- --model.P_mean=-1.0
In miniature, on the CPU: python benchmarks/fashion_mnist.py --budget tiny
"""

import argparse
import functools
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from classifier import DISTANCE
from demo import draw
from matplotlib.figure import Figure
from provenance import commit
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sclightning.data import FashionMNISTDataModule
from sclightning.distances import Measure
from sclightning.metrics import ClassifierFeatures, weights_digest

CONFIGS = Path(__file__).parent.parent / "configs/fashion_mnist"
CLASSIFIER = Path(__file__).parent / "classifier_fashion_mnist.pt"
KINDS = ("teacher", "scd", "sct")
ROWS = ("teacher", "scd_2step", "scd_1step", "sct_2step", "sct_1step")
SECONDS = {  # of training: teacher, student
    "sprint": (240, 200),
    "full": (540, 540),
    "tiny": (5, 5),
}
REPORTED = ("sprint", "full")
MARGIN = 0.98  # of the steps that the first few hundred promise: a GPU slows down as it gets warm
SEARCH_SEED = 1000
TINY: dict[str, dict[str, Any]] = {  # what differs from the configs, to try all this without a GPU
    "backbone": {"channels": 16, "channel_mult": [1, 2, 2], "num_blocks": 1, "head_channels": 16},
    "model": {"compile": False, "channels_last": False},
    "teacher": {"steps": 5},
    "data": {"batch_size": 32, "num_test_samples": 500, "sample_batch_size": 100},
    "trainer": {"accelerator": "cpu", "precision": "32-true", "log_every_n_steps": 2, "benchmark": False},
}


def sclightning(*command: Any, device: str | None = None) -> None:
    """One command in a process of its own, which leaves neither memory nor compiled code behind.

    Args:
        command: What follows ``sclightning``, the config third.
        device: Name of the only GPU that it sees; what it says then goes to a file beside the config.
    """
    told = "" if device is None else f" on GPU {device}"
    print(f"\n$ sclightning {' '.join(map(str, command))}{told}", flush=True)
    process = [sys.executable, "-m", "sclightning", *map(str, command)]
    if device is None:
        subprocess.run(process, check=True)
        return
    # One thread each: those of a copy spin for milliseconds after it, on the cores of the other models.
    env = os.environ | {"CUDA_VISIBLE_DEVICES": device, "OMP_NUM_THREADS": "1"}
    with Path(command[2]).with_suffix(".log").open("a") as log:
        subprocess.run(process, check=True, env=env, stdout=log, stderr=subprocess.STDOUT)


# --- Configs ----------------------------------------------------------------------------------------------------------


def complete(config: Any, folder: Path) -> Any:
    """A config with its parts in place of their files, whose paths are relative to ``folder``."""
    if isinstance(config, dict):
        return {key: complete(value, folder) for key, value in config.items()}
    if isinstance(config, list):
        return [complete(value, folder) for value in config]
    if isinstance(config, str) and config.endswith(".yaml"):
        path = folder / config
        return complete(yaml.safe_load(path.read_text()), path.parent)
    return config


def config_of(
    kind: str, folder: Path, seed: int, steps: int, tiny: bool = False, teacher: str | None = None
) -> dict[str, Any]:
    """The config of ``configs/fashion_mnist`` for a folder, a seed and a number of steps, a multiple of 4.

    Args:
        kind: ``teacher``, ``scd`` or ``sct``.
        folder: Of the runs of this seed.
        seed: Of weights, noise and order of images.
        steps: Optimizer steps; a checkpoint is written at each quarter.
        tiny: Whether to shrink the network.
        teacher: Checkpoint of the teacher, if it is not that of ``folder``.
    """
    text = (CONFIGS / f"{kind}.yaml").read_text().replace("runs/fashion_mnist", str(folder))
    config = complete(yaml.safe_load(text), CONFIGS)
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    if tiny:
        model["backbone"]["init_args"] |= TINY["backbone"]
        model |= TINY["model"] | (TINY["teacher"] if kind == "teacher" else {})
        data |= TINY["data"]
        trainer |= TINY["trainer"]
    config["seed_everything"] = model["seed"] = data["seed"] = seed
    trainer["max_steps"] = model["lr_scheduler"]["init_args"]["total_steps"] = steps
    trainer["callbacks"][-1]["init_args"]["every_n_train_steps"] = steps // 4
    if kind != "teacher" and teacher is not None:
        model["teacher_checkpoint"] = teacher
    return config


def write(config: dict[str, Any], path: Path) -> None:
    """Write a config, or find that it is there.

    Raises:
        FileExistsError: If there is another.
    """
    if path.exists() and yaml.safe_load(path.read_text()) != config:
        raise FileExistsError(
            f"{path} is of a run with other settings, which would be mixed with these; give another --folder, or "
            "delete it and the run beside it."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False))


# --- Runs -------------------------------------------------------------------------------------------------------------


def saved(folder: Path) -> dict[str, Any]:
    """The config that ``fit`` saved, options of the command line included."""
    return yaml.safe_load((folder / "config.yaml").read_text())


def pace(folder: Path) -> dict[str, float]:
    """Steps per second of a run, and the seconds of its start, from the wall times in its TensorBoard log.

    The first loss of a process is logged when everything has been compiled: what comes before does not count. A run
    that was interrupted has a file for each of its processes.

    Raises:
        ValueError: If no process logged two losses.
    """
    seconds, steps, startup = 0.0, 0, None
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda p: p.stat().st_mtime):
        log = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        if "loss" not in log.Tags()["scalars"]:
            continue  # a test's
        losses = log.Scalars("loss")
        first, last = losses[0], losses[-1]
        seconds, steps = seconds + last.wall_time - first.wall_time, steps + last.step - first.step
        if startup is None:
            startup = first.wall_time - log.FirstEventTimestamp(), first.step + 1
    if not steps:
        raise ValueError(f"The log in {folder} has less than two losses, so it has no pace; train for more steps.")
    rate = steps / seconds
    return {"steps_per_second": rate, "startup_seconds": startup[0] - startup[1] / rate}


TRIALS = {kind: threading.Lock() for kind in KINDS}


def steps_of(kind: str, folder: Path, args: argparse.Namespace, run: Callable) -> int:
    """Optimizer steps that fit the seconds of a budget, by a trial of the first few hundred: one for all seeds.

    Students are tried with the teacher of the teacher's trial, since that of the seed may be in training meanwhile.
    """
    trial = args.folder / "pace"
    tried = trial if (trial / "teacher.json").exists() else folder
    teacher = args.teacher or str(tried / "teacher/last.ckpt")
    found, tiny = trial / f"{kind}.json", args.budget == "tiny"
    with TRIALS[kind]:
        if not found.exists():
            shutil.rmtree(trial / kind, ignore_errors=True)  # it was interrupted
            config = config_of(kind, trial, SEARCH_SEED, 12 if tiny else 600, tiny, teacher)
            config["trainer"]["callbacks"][-1]["init_args"]["every_n_train_steps"] *= 4  # after the time is taken
            write(config, trial / f"{kind}.yaml")
            run("fit", "--config", trial / f"{kind}.yaml", *args.options)
            found.write_text(json.dumps(pace(trial / kind)) + "\n")
    rate = json.loads(found.read_text())["steps_per_second"]
    seconds = args.seconds or SECONDS[args.budget][kind != "teacher"]
    least = saved(trial / kind)["trainer"]["log_every_n_steps"]  # there have to be losses to take the time from
    return 4 * max(least, int(MARGIN * seconds * rate / 4))


def train(kind: str, folder: Path, seed: int, args: argparse.Namespace, run: Callable) -> dict[str, Any]:
    """Train a model with ``run``, unless that is done; give the record of its run.

    Raises:
        FileExistsError: If what is there was trained with other options.
    """
    record = folder / kind / "record.json"
    if record.exists():
        made = json.loads(record.read_text())
        if made["options"] != args.options:
            raise FileExistsError(
                f"{record} is of a run with other options, {made['options']}; give another --folder, or delete it and "
                "the run beside it."
            )
        return made
    path = folder / f"{kind}.yaml"
    if path.exists():
        steps = yaml.safe_load(path.read_text())["trainer"]["max_steps"]
    else:
        steps = steps_of(kind, folder, args, run)
    config = config_of(kind, folder, seed, steps, args.budget == "tiny", args.teacher)
    write(config, path)
    run("fit", "--config", path, "--ckpt_path", "last", *args.options)
    measured, batch = pace(folder / kind), saved(folder / kind)["data"]["init_args"]["batch_size"]
    result = {
        "kind": kind,
        "seed": seed,
        "steps": steps,
        "images": steps * batch,
        "train_seconds": round(steps / measured["steps_per_second"], 1),
        "startup_seconds": round(measured["startup_seconds"], 1),
        "images_per_second": round(batch * measured["steps_per_second"], 1),
        "teacher": None if kind == "teacher" else config["model"]["init_args"]["teacher_checkpoint"],
        "precision": config["trainer"]["precision"],
        "commit": commit(),
        "options": args.options,
    }
    record.write_text(json.dumps(result, indent=2) + "\n")
    return result


def test(kind: str, folder: Path, args: argparse.Namespace, run: Callable) -> dict[str, Any]:
    """Make the samples of a trained model with ``run``; give their distances by row and where they were made.

    The samples are kept in ``samples.npz``, one array a row, uint8 (N, H, W), and their labels.
    """
    checkpoint = folder / kind / "last.ckpt"
    command = ("test", "--config", folder / f"{kind}.yaml", "--ckpt_path", checkpoint, "--evaluation.save=npz")
    run(*command, *args.options)
    made = max(checkpoint.parent.glob("last_*.json"), key=lambda p: p.stat().st_mtime)
    found = json.loads(made.read_text())
    rows, samples = {}, {}
    for tested in found["runs"]:
        row = kind if kind == "teacher" else f"{kind}_{tested['nfe']}step"
        rows[row] = {
            "fd": tested["fd_classifier"],
            "nfe": tested["nfe"],
            "samples": tested["samples"],
            "samples_per_second": round(tested["images_per_second"], 1),
        }
        raw = max(checkpoint.parent.glob(f"last_*_nfe{tested['nfe']}_*.npz"), key=lambda p: p.stat().st_mtime)
        samples[row] = np.load(raw)["arr_0"][..., 0]
        raw.unlink()
    label = np.arange(found["samples"]) % FashionMNISTDataModule.num_classes  # as requests for samples have them
    np.savez_compressed(folder / kind / "samples.npz", label=label.astype(np.uint8), **samples)
    about = ("device", "versions", "extractor", "reference")
    return {"rows": rows, **{name: found[name] for name in about}}


def sampled(folder: Path) -> dict[str, np.ndarray]:
    """Samples (N, H, W) that :func:`test` kept of the models of a seed's folder, by row."""
    paths = (folder / kind / "samples.npz" for kind in KINDS)
    found = {name: array for path in paths if path.exists() for name, array in np.load(path).items()}
    return {row: found[row] for row in ROWS if row in found}


# --- Figures ----------------------------------------------------------------------------------------------------------


def floor() -> dict[str, Any]:
    """The distance of the 10,000 test images to the training images, and what it was taken with."""
    data, extractor = FashionMNISTDataModule(), ClassifierFeatures(str(CLASSIFIER))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = (torch.from_numpy(a) for a in (data.split("held_out").images, data.split("held_out").labels))
    found = distance(Measure(extractor, "train"), images, data, device)
    with torch.no_grad():
        guess = torch.cat([extractor.logits(chunk.to(device)).argmax(1).cpu() for chunk in images.split(1000)])
    right = guess == labels
    return {
        "floor": found,
        "classifier": {
            "weights": CLASSIFIER.name,
            "sha256": weights_digest(extractor),
            "held_out_accuracy": right.double().mean().item(),
            "held_out_images": len(images),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "versions": {"torch": torch.__version__},
            "commit": commit(),
        },
    }


def distance(measure: Measure, images: torch.Tensor, data: FashionMNISTDataModule, device: torch.device) -> float:
    """Distance of uint8 images (N, 1, H, W) to those that ``measure`` compares with."""
    chunks = images.split(1000)
    measure.prepare(data, device, len(images))
    for i, chunk in enumerate(chunks):
        measure.update(chunk.to(device), i, len(chunks))
    return measure.compute()[measure.key]


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows of a budget from the records of its runs, seeds in order, and the records.

    ``fd`` is the list over seeds; ``train_seconds``, ``images`` and ``images_per_second`` are means over them.
    """
    result: dict[str, Any] = {}
    records = sorted(records, key=lambda record: (KINDS.index(record["kind"]), record["seed"]))
    for row in ROWS:
        runs = [record for record in records if row in record["rows"]]
        if not runs:
            continue
        mean = {
            name: sum(run[name] for run in runs) / len(runs)
            for name in ("train_seconds", "startup_seconds", "images", "images_per_second")
        }
        result[row] = {
            "fd": [run["rows"][row]["fd"] for run in runs],
            "seeds": [run["seed"] for run in runs],
            "nfe": runs[0]["rows"][row]["nfe"],
            **{name: round(value, 1) for name, value in mean.items()},
        }
    for name in ("device", "versions", "commit"):
        different = {json.dumps(record[name], sort_keys=True): record[name] for record in records}
        result[name] = next(iter(different.values())) if len(different) == 1 else [*different.values()]
    return result | {"runs": records}


def merge(record: dict[str, Any], budget: str, out: Path) -> None:
    """Put the record of a run among those of its budget, in place of an earlier one of its model and seed."""
    results = json.loads(out.read_text()) if out.exists() else {}
    others = results.get(budget, {}).get("runs", [])
    kept = [other for other in others if (other["kind"], other["seed"]) != (record["kind"], record["seed"])]
    results[budget] = summarise([*kept, record])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")


def table(rows: dict[str, Any], floor: float | None) -> Table:
    """The figures of a budget, ratios of means over seeds."""
    found = Table(title="Fréchet distance in a small classifier's features (not FID), mean over seeds")
    for column in ("", "evaluations", "distance", "each seed", "× teacher", "× floor", "seconds", "start", "images/s"):
        found.add_column(column, justify="left" if not column else "right")
    means = {row: sum(rows[row]["fd"]) / len(rows[row]["fd"]) for row in ROWS if row in rows}
    for row, fd in means.items():
        found.add_row(
            row,
            str(rows[row]["nfe"]),
            f"{fd:.4g}",
            " ".join(f"{value:.4g}" for value in rows[row]["fd"]),
            f"{fd / means['teacher']:.2f}" if "teacher" in means else "-",
            f"{fd / floor:.2f}" if floor else "-",
            *(f"{rows[row][name]:,.0f}" for name in ("train_seconds", "startup_seconds", "images_per_second")),
        )
    return found


def picture(folder: Path, columns: int = 20) -> None:
    """Real images over each row's samples: same noise, same label down a column."""
    made = sampled(folder)
    config = saved(folder / next(iter(made)).split("_")[0])["data"]["init_args"]
    data = FashionMNISTDataModule(config["root"]).split("train")
    label = np.arange(columns) % FashionMNISTDataModule.num_classes
    rows = {"real": np.stack([data.images[data.labels == c][i // 10, 0] for i, c in enumerate(label)])}
    rows |= {row: array[:columns] for row, array in made.items()}
    draw({row: torch.from_numpy(array)[:, None] for row, array in rows.items()}, scale=2).save(folder / "samples.png")
    print(f"Drew {folder / 'samples.png'}")


def plot(rows: dict[str, Any], floor: float, path: Path) -> None:
    """The distances of a budget over the number of evaluations; a dot is a seed."""
    figure = Figure((6, 3.2), layout="constrained", dpi=110)
    axes = figure.subplots()
    for name, kind in (("teacher", "teacher, Heun"), ("scd", "sCD"), ("sct", "sCT")):
        found = sorted((rows[row] for row in ROWS if row in rows and row.startswith(name)), key=lambda row: row["nfe"])
        if found:
            (line,) = axes.plot([r["nfe"] for r in found], [np.mean(r["fd"]) for r in found], "-", label=kind)
            for row in found:
                axes.plot([row["nfe"]] * len(row["fd"]), row["fd"], "o", color=line.get_color())
    axes.axhline(floor, color="grey", linestyle="--", label="test images")
    axes.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel=DISTANCE, xticks=[1, 2, 5, 10, 35])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)
    print(f"Drew {path}")


def main(argv: Sequence[str] | None = None) -> None:
    """Train, test, merge, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=SECONDS, default="sprint")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--devices", type=int, default=1, help="GPUs to run models on side by side")
    parser.add_argument("--only", nargs="+", choices=[*KINDS, "floor"], help="models to train and test, or the floor")
    parser.add_argument(
        "--teacher", help="checkpoint of a teacher for the students of all seeds, in place of their own"
    )
    parser.add_argument("--seconds", type=float, help="of training, in place of the budget's")
    parser.add_argument("--search", action="store_true", help=f"compare settings, on seed {SEARCH_SEED}")
    parser.add_argument("--folder", type=Path, help="of the runs; runs/fashion_mnist/BUDGET if not given")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fashion_mnist.json"))
    parser.add_argument("options", nargs="*", help="after --, of sclightning: where nothing is reported")
    args = parser.parse_args(argv)
    reported = args.budget in REPORTED and not args.search and args.seconds is None
    if reported and args.options:
        parser.error("a reported run is that of its config; give --search with other options")
    if args.search:
        args.seeds = [SEARCH_SEED]
    elif SEARCH_SEED in args.seeds:
        parser.error(f"seed {SEARCH_SEED} is the one that settings are compared on; report another")
    name = args.budget + "_search" * args.search + (f"_{args.seconds:g}s" if args.seconds else "")
    args.folder = args.folder or Path("runs/fashion_mnist") / name

    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.only == ["floor"] or (reported and known.get("classifier", {}).get("sha256") != digest()):
        known |= floor()
        args.out.write_text(json.dumps(known, indent=2) + "\n")
        print(f"Held-out accuracy {known['classifier']['held_out_accuracy']:.4f}, floor {known['floor']:.4f}")
    with ThreadPoolExecutor(args.devices + (args.devices > 1)) as pool:  # one more, to wait for its teacher
        for seed, futures in submit(pool, args).items():
            records, folder = [], args.folder / f"seed{seed}"
            for future in futures:
                try:
                    records.append(future.result())
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
                if reported:
                    merge(records[-1], args.budget, args.out)
            if records:
                found = json.loads(args.out.read_text())[args.budget] if reported else summarise(records)
                Console(width=140).print(table(found, known.get("floor")))
                picture(folder)
                if reported:
                    plot(found, known["floor"], folder.parent / "distances.png")


def submit(pool: ThreadPoolExecutor, args: argparse.Namespace) -> dict[int, list[Future]]:
    """The runs of each seed, teacher first, as tasks that take one of the devices each."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(args.devices)]
    devices: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    turn = threading.Lock()
    for name in names[: args.devices] if args.devices > 1 else [None]:
        devices.put(name)

    def on_device(task: Callable[[Callable], Any]) -> Any:
        with turn:  # or a student may take the device for which a teacher waits
            device = devices.get()
        try:
            return task(sclightning if device is None else functools.partial(sclightning, device=device))
        finally:
            devices.put(device)

    def work(kind: str, seed: int, teacher: Future | None) -> dict[str, Any]:
        folder = args.folder / f"seed{seed}"
        if teacher is not None:
            if args.devices > 1 and not (folder / f"{kind}.yaml").exists():  # on a device with nothing else to do
                for tried in ("teacher", kind):
                    on_device(functools.partial(steps_of, tried, folder, args))
            teacher.result()
        return on_device(lambda run: train(kind, folder, seed, args, run) | test(kind, folder, args, run))

    kinds = [kind for kind in args.only or KINDS if kind != "floor" and not (kind == "teacher" and args.teacher)]
    jobs = [(kind, seed) for seed in args.seeds for kind in sorted(kinds, key=KINDS.index)]
    if args.devices > 1:  # so that no device waits for a teacher while another could be trained
        jobs.sort(key=lambda job: job[0] != "teacher")
    found: dict[int, list[Future]] = {seed: [] for seed in args.seeds}
    for kind, seed in jobs:
        teacher = found[seed][0] if kind != "teacher" and "teacher" in kinds else None
        found[seed].append(pool.submit(work, kind, seed, teacher))
    return found


def digest() -> str:
    """Of the classifier's weights."""
    return weights_digest(ClassifierFeatures(str(CLASSIFIER)))


if __name__ == "__main__":
    main()
