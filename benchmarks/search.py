"""One setting of a Fashion-MNIST model, with a seed that no result has.

At 8x8, on one CPU core, networks have 0.2 M parameters and a student's batches are of 256 images; at 32x32, on a GPU,
all is as in configs/fashion_mnist. Distances are to the training images in a small classifier's features: of a student
in one step and in two with several second times, of a teacher with several numbers of steps. They enter
benchmarks/results/search.json under the setting's name.

Usage: python benchmarks/search.py --name NAME [--images 400000] [--lr 2e-4] [-- --model.P_mean=-1.0 --model.c=5.0]
A teacher at 32x32: python benchmarks/search.py --size 32 --kind teacher --name NAME -- --model.P_mean=0.0
and its student: python benchmarks/search.py --size 32 --teacher runs/search/NAME/last.ckpt --name OTHER
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from fashion_mnist import SEARCH_SEED
from provenance import commit

from sclightning.cli import main as sclightning

sys.path.append(str(Path(__file__).parent / "figures"))
import common

RUNS, OUT = Path("runs/search"), Path("benchmarks/results/search.json")
FOLDERS = {8: "benchmarks/figures/small", 32: "configs/fashion_mnist"}  # of configs
BATCH = {8: {"teacher": 128, "scd": 256}, 32: {"teacher": 512, "scd": 512}}
IMAGES = {8: {"teacher": 768_000, "scd": 400_000}, 32: {"teacher": 4_096_000, "scd": 2_048_000}}
LR = {8: {"teacher": 2e-3, "scd": 2e-4}, 32: {"teacher": 1e-3, "scd": 2e-4}}
BETA2 = {"teacher": 0.99, "scd": 0.999}
TIMES = {8: (1.3, 1.1, 0.9, 0.7, 0.5, 0.35), 32: (1.5, 1.4, 1.3, 1.1, 0.9)}
STEPS = (9, 18, 36, 64)  # of Heun
VALUES = {
    "seed_everything": SEARCH_SEED,
    "model.seed": SEARCH_SEED,
    "data.seed": SEARCH_SEED,
    "trainer.logger": False,
    "trainer.log_every_n_steps": 50,
}
SMALL = {
    "model.backbone.channels": 16,
    "model.optimizer": "torch.optim.Adam",
    "model.compile": True,
    "data.num_test_samples": 10_000,
}
STUDENT = {"model.P_mean": -1.0, "model.P_std": 1.6, "model.normalization": "rms"}
SIGMA_DATA = {-1.0: 0.570, -1.0625: 0.592, -1.125: 0.614, -1.25: 0.661}  # at 8x8, by black's value, measured


def command(kind: str, folder: Path, settings: dict[str, Any]) -> list[str]:
    """What follows ``sclightning fit``: the config of a size with these values in their place."""
    size, images, lr = (settings[name] for name in ("size", "images", "lr"))
    steps = images // BATCH[size][kind]
    checkpoints = {"dirpath": str(folder), "save_last": True, "save_top_k": 0, "every_n_train_steps": steps}
    callbacks = {"EMA": {"sigma_rel": 0.05}, "ModelCheckpoint": checkpoints}
    callbacks |= {} if kind == "teacher" else {"TangentWarmup": {"steps": min(300, steps // 4)}}
    values = dict(VALUES)
    if size == 8:
        values |= SMALL | ({"model.label_dropout": 0} if kind == "teacher" else STUDENT)
        values |= {"model.backbone.input_skip": settings["input_skip"]}
        values |= {"data.black": settings["black"], "model.sigma_data": SIGMA_DATA[settings["black"]]}
    values |= {
        "model.optimizer.lr": lr,
        "model.optimizer.betas": [0.9, settings["beta2"]],
        "model.lr_scheduler.max_lr": lr,
        "model.lr_scheduler.total_steps": steps,
        "data.batch_size": BATCH[size][kind],
        "trainer.max_steps": steps,
        "trainer.default_root_dir": str(folder),
        "trainer.callbacks": [{"class_path": name, "init_args": value} for name, value in callbacks.items()],
    }
    config = Path(__file__).parent.parent / FOLDERS[size] / f"{kind}.yaml"
    texts = (f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items())
    return ["--config", str(config), *texts]


def fit(folder: Path, arguments: list[str]) -> None:
    """Train, unless that is done."""
    if not (folder / "last.ckpt").exists():
        sclightning(["fit", *arguments])


def distance(size: int, folder: Path, arguments: list[str], steps: int | None = None) -> float:
    """Fréchet distance of a trained teacher, or of ``steps`` steps of a student, to the training images."""
    evaluation: dict[str, Any] = {} if steps is None else {"steps": [steps]}
    if size == 8:  # the config has none
        arguments = [*arguments, "--evaluation=FIDEvaluation"]
        weights = common.classifier_weights(common.SmallFashionMNIST.name)
        evaluation |= {"extractor.class_path": "sclightning.metrics.ClassifierFeatures", "reference": "train"}
        evaluation |= {"extractor.weights": weights}
    chosen = [f"--evaluation.{name}={value}" for name, value in evaluation.items()]
    sclightning(["test", *arguments, *chosen, "--ckpt_path", str(folder / "last.ckpt")])
    return measured(folder)


def measured(folder: Path) -> float:
    """What the last test found."""
    made = max(folder.glob("last_*.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(made.read_text())["runs"][0]["fd_classifier"]


def small_teacher(settings: dict[str, Any]) -> tuple[Path, float]:
    """Checkpoint and distance of the teacher of a setting at 8x8, made if there is none."""
    skip, black = settings["input_skip"], settings["black"]
    folder = RUNS / ("teacher" + "_input_skip" * skip + (f"_black{black}" if black != -1 else ""))
    own = {name: settings[name] for name in ("size", "input_skip", "black")}
    arguments = command("teacher", folder, own | defaults("teacher", 8))
    fit(folder, arguments)
    if not any(folder.glob("last_*.json")):  # one for all settings
        distance(8, folder, arguments)
    return folder / "last.ckpt", measured(folder)


def defaults(kind: str, size: int) -> dict[str, Any]:
    """What a setting has unless it says otherwise."""
    return {"images": IMAGES[size][kind], "lr": LR[size][kind], "beta2": BETA2[kind]}


def main() -> None:
    """Train the setting and measure it; at 8x8 also its teacher, if there is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of this setting")
    parser.add_argument("--size", type=int, default=8, choices=FOLDERS, help="of the images")
    parser.add_argument("--kind", default="scd", choices=["teacher", "scd"])
    parser.add_argument("--images", type=int, help="of its training")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--beta2", type=float)
    parser.add_argument("--teacher", type=Path, help="checkpoint, of a student at 32x32")
    parser.add_argument("--input-skip", action="store_true", help="at 8x8: networks with input_skip")
    parser.add_argument("--black", type=float, default=-1.0, choices=SIGMA_DATA, help="at 8x8: in the training data")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("options", nargs="*", help="after --, of sclightning fit")
    args = parser.parse_args()
    size, folder, found = args.size, RUNS / args.name, {}
    names = ("size", "images", "lr", "beta2", "options") + ("input_skip", "black") * (size == 8)
    given = {name: getattr(args, name) for name in names}
    settings = defaults(args.kind, size) | {name: value for name, value in given.items() if value is not None}
    arguments = [*command(args.kind, folder, settings), *args.options]
    if size == 8:
        torch.set_num_threads(1)
    if args.kind == "scd":
        if size == 8:
            args.teacher, found["fd_teacher"] = small_teacher(settings)
        elif args.teacher is None:
            parser.error("a student at 32x32 needs the --teacher that was trained before")
        arguments.append(f"--model.teacher_checkpoint={args.teacher}")
    fit(folder, arguments)
    if args.kind == "scd":
        two = {time: distance(size, folder, [*arguments, f"--model.times=[1.5645,{time}]"], 2) for time in TIMES[size]}
        found |= {"fd_1step": distance(size, folder, arguments, 1), "fd_2step": two}
        settings["teacher"] = args.teacher.parent.name
    else:
        found = {"fd_heun": {steps: distance(size, folder, [*arguments, f"--model.steps={steps}"]) for steps in STEPS}}
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    known[args.name] = settings | found | {"torch": torch.__version__, "commit": commit()}
    args.out.write_text(json.dumps(known, indent=2) + "\n")
    print(args.name, json.dumps(found))


if __name__ == "__main__":
    main()
