"""One setting of a student on 8x8 Fashion-MNIST, on one CPU core, with a seed that no result has.

The network has 0.2 M parameters, a student's batches are of 256 images. Distances, of one step and of two with several
second times, are to the training images in a small classifier's features. They enter benchmarks/results/search.json
under the setting's name.

Usage: python benchmarks/search.py --name NAME [--images 400000] [--lr 2e-4] [-- --model.P_mean=-1.0 --model.c=5.0]
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from fashion_mnist import SEARCH_SEED
from provenance import commit

from sclightning.cli import main as sclightning

sys.path.append(str(Path(__file__).parent / "figures"))
import common

RUNS, OUT = Path("runs/search"), Path("benchmarks/results/search.json")
TIMES = (1.3, 1.1, 0.9, 0.7, 0.5, 0.35)
BATCH = {"teacher": 128, "scd": 256}
VALUES = {
    "seed_everything": SEARCH_SEED,
    "model.seed": SEARCH_SEED,
    "data.seed": SEARCH_SEED,
    "trainer.accelerator": "cpu",
    "trainer.logger": False,
    "trainer.log_every_n_steps": 50,
}
SIGMA_DATA = {-1.0: 0.570, -1.0625: 0.592, -1.125: 0.614, -1.25: 0.661}  # by black's value, measured


def command(kind: str, folder: Path, lr: float, beta2: float, images: int, input_skip: bool, black: float) -> list[str]:
    """What follows ``sclightning fit``: the config of the figures' medium scale with these values in their place."""
    steps = images // BATCH[kind]
    checkpoints = {"dirpath": str(folder), "save_last": True, "save_top_k": 0, "every_n_train_steps": steps}
    callbacks = {"EMA": {"sigma_rel": 0.05}, "ModelCheckpoint": checkpoints}
    callbacks |= {} if kind == "teacher" else {"TangentWarmup": {"steps": min(300, steps // 4)}}
    values = VALUES | ({"model.label_dropout": 0} if kind == "teacher" else {"model.normalization": "rms"})
    values |= {
        "model.backbone.input_skip": input_skip,
        "model.sigma_data": SIGMA_DATA[black],
        "data.black": black,
        "model.optimizer.lr": lr,
        "model.optimizer.betas": [0.9, beta2],
        "model.lr_scheduler.max_lr": lr,
        "model.lr_scheduler.total_steps": steps,
        "data.batch_size": BATCH[kind],
        "trainer.max_steps": steps,
        "trainer.default_root_dir": str(folder),
        "trainer.callbacks": [{"class_path": name, "init_args": value} for name, value in callbacks.items()],
    }
    config = str(Path(__file__).parent / f"figures/medium/{kind}.yaml")
    texts = (f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items())
    return ["--config", config, *texts]


def fit(folder: Path, arguments: list[str]) -> None:
    """Train, unless that is done."""
    if not (folder / "last.ckpt").exists():
        sclightning(["fit", *arguments])


def distance(folder: Path, arguments: list[str], steps: int | None = None) -> float:
    """Fréchet distance of a trained teacher, or of ``steps`` steps of a student, to the training images."""
    weights = common.classifier_weights(common.SmallFashionMNIST.name)
    evaluation = {"extractor.class_path": "sclightning.metrics.ClassifierFeatures", "reference": "train"}
    evaluation |= {"extractor.weights": weights} | ({} if steps is None else {"steps": [steps]})
    chosen = [f"--evaluation.{name}={value}" for name, value in evaluation.items()]
    checkpoint = str(folder / "last.ckpt")
    sclightning(["test", *arguments, "--evaluation=FIDEvaluation", *chosen, "--ckpt_path", checkpoint])
    return measured(folder)


def measured(folder: Path) -> float:
    """What the last test found."""
    made = max(folder.glob("last_*.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(made.read_text())["runs"][0]["fd_classifier"]


def main() -> None:
    """Train the teacher if there is none, train the student, measure it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of this setting")
    parser.add_argument("--images", type=int, default=400_000, help="of the student's training")
    parser.add_argument("--teacher-images", type=int, default=768_000)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--beta2", type=float, default=0.999)
    parser.add_argument("--input-skip", action="store_true", help="networks with input_skip, a teacher of their own")
    parser.add_argument("--black", type=float, default=-1.0, choices=SIGMA_DATA, help="in the training data")
    parser.add_argument("options", nargs="*", help="after --, of sclightning fit")
    args = parser.parse_args()
    torch.set_num_threads(1)
    both = {"input_skip": args.input_skip, "black": args.black}
    teacher = RUNS / ("teacher" + "_input_skip" * args.input_skip + (f"_black{args.black}" if args.black != -1 else ""))
    folder = RUNS / args.name
    trained = command("teacher", teacher, 2e-3, 0.99, args.teacher_images, **both)
    fit(teacher, trained)
    arguments = command("scd", folder, args.lr, args.beta2, args.images, **both)
    arguments += [f"--model.teacher_checkpoint={teacher / 'last.ckpt'}", *args.options]
    fit(folder, arguments)
    two = {time: distance(folder, [*arguments, f"--model.times=[1.5645,{time}]"], 2) for time in TIMES}
    if not any(teacher.glob("last_*.json")):  # one for all settings
        distance(teacher, trained)
    found = {"fd_teacher": measured(teacher), "fd_1step": distance(folder, arguments, 1), "fd_2step": two}
    settings = {name: getattr(args, name) for name in ("lr", "beta2", "images", "input_skip", "black", "options")}
    known = json.loads(OUT.read_text()) if OUT.exists() else {}
    known[args.name] = settings | found | {"torch": torch.__version__, "commit": commit()}
    OUT.write_text(json.dumps(known, indent=2) + "\n")
    print(args.name, json.dumps(found))


if __name__ == "__main__":
    main()
