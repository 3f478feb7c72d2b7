"""benchmarks/fashion_mnist.py and its configs: the numbers of the recipe, the bookkeeping, all of it in miniature."""

import itertools
import json
import math
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import fashion_mnist as recipe  # noqa: E402
import high_noise  # noqa: E402
import search  # noqa: E402

from sclightning.backbones import DDPMpp  # noqa: E402
from sclightning.callbacks import EMA, TangentWarmup  # noqa: E402
from sclightning.cli import SCLightningCLI, main  # noqa: E402
from sclightning.data import FashionMNISTDataModule  # noqa: E402
from sclightning.metrics import ClassifierFeatures  # noqa: E402
from sclightning.modules import ConsistencyDistillation, ConsistencyTraining, TrigFlowDiffusion  # noqa: E402

MODULES = {"teacher": TrigFlowDiffusion, "scd": ConsistencyDistillation, "sct": ConsistencyTraining}


@pytest.mark.parametrize("kind", recipe.KINDS)
def test_config(kind):
    """One network of the peers' size for all three; schedule, run and checkpoints end together."""
    path = ROOT / f"configs/fashion_mnist/{kind}.yaml"
    cpu = ["--trainer.accelerator=cpu", "--trainer.precision=32-true"]
    with torch.device("meta"):
        cli = SCLightningCLI(["--config", str(path), *cpu], run=False)
    model, trainer, init = cli.model, cli.trainer, cli.config.model.init_args
    assert type(model) is MODULES[kind]
    assert sum(p.numel() for p in model.backbone.parameters()) == pytest.approx(8.8e6, rel=0.05)
    assert (model.backbone.in_channels, model.backbone.resolution, model.backbone.resolution) == (1, 32, 32)
    assert model.backbone.num_classes == cli.datamodule.num_classes == 10
    assert cli.datamodule.hparams.batch_size == 512 and model.channels_last
    assert (cli.datamodule.black, model.sigma_data) == (-1.125, 0.715) and model.backbone.input_gain is None
    assert model.compile_options == {"mode": "reduce-overhead"}
    # Other optimizers make the host wait for the loss scaler's look at the gradients.
    text = yaml.safe_load(path.read_text())
    assert init.optimizer.init_args.fused and text["trainer"]["precision"] == "16-mixed"
    assert init.optimizer.init_args.lr == init.lr_scheduler.init_args.max_lr
    callbacks = {type(callback).__name__: callback for callback in trainer.callbacks}
    assert trainer.max_steps == init.lr_scheduler.init_args.total_steps
    assert trainer.max_steps == 4 * callbacks["ModelCheckpoint"]._every_n_train_steps
    assert trainer.limit_val_batches == 0 and trainer.log_every_n_steps == 100
    assert callbacks["EMA"].exponent == EMA(sigma_rel=0.05).exponent
    evaluation = cli.config.evaluation.init_args
    assert evaluation.reference == "train" and evaluation.steps == [1, 2]
    assert (ROOT / evaluation.extractor.init_args.weights).samefile(recipe.CLASSIFIER)
    cli.datamodule.trainer = trainer
    assert len(cli.datamodule.test_dataloader().dataset) == 10_000
    if kind == "teacher":
        assert (model.P_mean, model.P_std, model.nfe) == (-0.4, 1.6, 35)
    else:
        assert (model.P_mean, model.P_std, model.normalization, model.c) == (-1.0, 1.6, "rms", 0.1)
        assert init.optimizer.init_args.lr == 2e-4
        assert model.times == pytest.approx([math.atan(160), 1.5], abs=1e-4)
        assert callbacks[TangentWarmup.__name__].steps == 300
        assert model.teacher_checkpoint == "runs/fashion_mnist/teacher/last.ckpt"


def test_size_is_what_the_docs_say():
    """Parameters and FLOPs of our network, and of the one it is as large as."""
    ours = yaml.safe_load((ROOT / "configs/backbone/fashion_mnist.yaml").read_text())["init_args"]
    peers = ours | {"channel_mult": [2, 2, 2], "num_blocks": 2, "attention_resolutions": [16], "double_norm": False}
    page = " ".join((ROOT / "docs/fashion_mnist.md").read_text().split())
    for network, text in ((ours, "{:.2f} M parameters and {:.1f} GFLOP an image"), (peers, "has {:.2f} M parameters")):
        net = DDPMpp(**network)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            net(torch.zeros(1, 1, 32, 32), torch.ones(1))
        gflop = counter.get_total_flops() / 1e9
        assert text.format(sum(p.numel() for p in net.parameters()) / 1e6, gflop) in page
    assert f"EDM's: {gflop:.1f} GFLOP" in page


def test_the_script_changes_seed_length_and_folders_only():
    """What it writes is the config with its parts in place, and nothing else."""
    path = ROOT / "configs/fashion_mnist/scd.yaml"
    theirs = recipe.complete(yaml.safe_load(path.read_text()), path.parent)
    steps = theirs["trainer"]["max_steps"]
    ours = recipe.config_of("scd", Path("elsewhere"), 3, 2 * steps)
    assert (
        ours["seed_everything"] == ours["model"]["init_args"].pop("seed") == ours["data"]["init_args"].pop("seed") == 3
    )
    assert ours["trainer"]["max_steps"] == ours["model"]["init_args"]["lr_scheduler"]["init_args"]["total_steps"]
    ours["seed_everything"] = 0
    text = yaml.safe_dump(ours).replace("elsewhere", "runs/fashion_mnist")
    for after, before in ((2 * steps, steps), (2 * steps // 4, steps // 4)):
        text = text.replace(f": {after}\n", f": {before}\n")
    assert yaml.safe_load(text) == theirs
    assert theirs["model"]["init_args"]["backbone"]["init_args"]["channels"] == 64
    given = recipe.config_of("sct", Path("elsewhere"), 0, 4, teacher="good.ckpt")
    assert given["model"]["init_args"]["teacher_checkpoint"] == "good.ckpt"


def test_pace_is_that_of_the_log(tmp_path):
    """10 steps a second in both processes of an interrupted run, the first after a start of 90 seconds."""
    begun = time.time()  # a file's first event has the time at which it was made
    for name, start, steps in (("a", begun + 90, range(99, 1000, 100)), ("b", begun + 5000, range(799, 2000, 100))):
        with SummaryWriter(str(tmp_path), filename_suffix=f".{name}") as writer:
            for step in steps:
                writer.add_scalar("loss", 0.5, step, walltime=start + (step + 1) / 10)
    with SummaryWriter(str(tmp_path), filename_suffix=".test") as writer:
        writer.add_scalar("fd_classifier", 1.0, 2000, walltime=begun + 9000)
    assert recipe.pace(tmp_path) == pytest.approx({"steps_per_second": 10, "startup_seconds": 90}, rel=0.02)
    (tmp_path / "short").mkdir()
    with SummaryWriter(str(tmp_path / "short")) as writer:
        writer.add_scalar("loss", 0.5, 99)
    with pytest.raises(ValueError, match="train for more steps"):
        recipe.pace(tmp_path / "short")


def record(kind, seed, fds, **changes):
    rows = {kind: fds} if kind == "teacher" else {f"{kind}_{n + 1}step": fd for n, fd in enumerate(fds)}
    rows = {row: {"fd": fd, "nfe": 35 if row == "teacher" else int(row[4])} for row, fd in rows.items()}
    measured = {"images": 512_000, "train_seconds": 200.0 + seed, "startup_seconds": 100.0, "images_per_second": 2500.0}
    about = {"device": "a GPU", "versions": {"torch": "2"}, "commit": "abc"}
    return {"kind": kind, "seed": seed, **measured, **about, "rows": rows} | changes


def test_results_are_merged_by_budget_model_and_seed(tmp_path):
    """The documented JSON: a list over seeds for each row, a repeated run in place of its predecessor."""
    out = tmp_path / "results" / "fashion_mnist.json"
    for made in (
        record("scd", 1, [3.0, 2.0]),
        record("teacher", 0, 9.0),
        record("scd", 0, [5.0, 4.0], images=256_000),
        record("teacher", 0, 1.0),
    ):
        recipe.merge(made, "sprint", out)
    recipe.merge(record("sct", 2, [7.0, 6.0], device="another"), "full", out)
    results = json.loads(out.read_text())
    sprint = results["sprint"]
    assert sprint["teacher"]["fd"] == [1.0] and sprint["teacher"]["nfe"] == 35
    assert sprint["scd_1step"]["fd"] == [5.0, 3.0] and sprint["scd_1step"]["seeds"] == [0, 1]
    assert sprint["scd_2step"] == {
        "fd": [4.0, 2.0],
        "seeds": [0, 1],
        "nfe": 2,
        "train_seconds": 200.5,
        "startup_seconds": 100.0,
        "images": 384_000,
        "images_per_second": 2500.0,
    }
    assert len(sprint["runs"]) == 3 and (sprint["device"], sprint["commit"]) == ("a GPU", "abc")
    assert results["full"]["sct_2step"]["fd"] == [6.0] and "sct_1step" not in sprint
    both = recipe.summarise([record("teacher", 0, 1.0), record("teacher", 1, 2.0, device="another")])
    assert both["device"] == ["a GPU", "another"]


def test_a_reported_run_is_that_of_its_config(tmp_path, capsys):
    for arguments, message in (
        (["--", "--model.P_mean=0"], "give --search"),
        (["--seeds", "1000"], "report another"),
    ):
        with pytest.raises(SystemExit):
            recipe.main(["--folder", str(tmp_path / "runs"), "--out", str(tmp_path / "out.json"), *arguments])
        assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_two_devices_share_the_runs(tmp_path, monkeypatch):
    """Each command sees one GPU, no GPU has two at once, teachers come before students, records go to their seeds."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho $CUDA_VISIBLE_DEVICES $3; sleep 0.1\n")
    python.chmod(0o755)
    monkeypatch.setattr(recipe.sys, "executable", str(python))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    times, tried = {}, threading.Event()

    def train(kind, folder, seed, args, run):
        begin = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        run("fit", "--config", folder / f"{kind}.yaml")
        assert seed or tried.wait(30)  # students are tried while the first teacher is trained, on the device beside it
        times[kind, seed] = begin, time.monotonic()
        return record(kind, seed, 1.0 if kind == "teacher" else [3.0, 2.0])

    monkeypatch.setattr(recipe, "train", train)
    monkeypatch.setattr(recipe, "steps_of", lambda kind, *_: tried.set() if kind == "scd" else None)
    monkeypatch.setattr(recipe, "test", lambda *arguments: {})
    monkeypatch.setattr(recipe, "picture", lambda folder: None)
    out = tmp_path / "out.json"
    out.write_text((ROOT / "benchmarks/results/fashion_mnist.json").read_text())
    arguments = ["--budget", "full", "--folder", str(tmp_path), "--out", str(out), "--devices", "2"]
    recipe.main([*arguments, "--seeds", "0", "1", "2"])
    assert json.loads(out.read_text())["full"]["scd_1step"]["seeds"] == [0, 1, 2]
    device = {}
    for kind, seed in times:
        name, option = (tmp_path / f"seed{seed}/{kind}.log").read_text().split()
        device[kind, seed] = name
        assert option == "fit"
    assert len(times) == 9 and set(device.values()) == {"5", "7"}
    for a, b in itertools.combinations(times, 2):
        if device[a] == device[b]:
            assert times[a][1] <= times[b][0] or times[b][1] <= times[a][0]
    assert all(times["teacher", s][1] <= times[kind, s][0] for s in range(3) for kind in ("scd", "sct"))
    assert max(times["teacher", s][0] for s in range(3)) <= min(times["sct", s][0] for s in range(3))


def test_a_trial_that_was_cut_off_is_repeated(tmp_path):
    """With the same teacher, that of the teacher's trial, though the seed's has written a checkpoint since."""
    args = SimpleNamespace(folder=tmp_path, budget="sprint", teacher=None, options=[], seconds=None)
    (tmp_path / "pace").mkdir()
    (tmp_path / "pace/teacher.json").write_text('{"steps_per_second": 10}')
    given = []

    def run(command, _, path):
        given.append(yaml.safe_load(path.read_text())["model"]["init_args"]["teacher_checkpoint"])
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            recipe.steps_of("scd", tmp_path / "seed0", args, run)
        (tmp_path / "seed0/teacher").mkdir(parents=True, exist_ok=True)
        (tmp_path / "seed0/teacher/last.ckpt").touch()
    assert given == [str(tmp_path / "pace/teacher/last.ckpt")] * 2


def test_runs_of_other_settings_are_not_mixed(tmp_path):
    recipe.write({"a": 1}, tmp_path / "run.yaml")
    recipe.write({"a": 1}, tmp_path / "run.yaml")
    with pytest.raises(FileExistsError, match="other settings"):
        recipe.write({"a": 2}, tmp_path / "run.yaml")


def test_classifier_is_the_one_of_the_floor():
    """Other weights need another floor, and their accuracy on real images."""
    results = json.loads((ROOT / "benchmarks/results/fashion_mnist.json").read_text())
    about = results["classifier"]
    page = " ".join((ROOT / "docs/fashion_mnist.md").read_text().split())
    assert f": {results['floor']:.4f}; the classifier is right about {100 * about['held_out_accuracy']:.2f} %" in page
    assert about["sha256"] == recipe.digest() and recipe.CLASSIFIER.name == about["weights"]
    assert recipe.CLASSIFIER.stat().st_size < 2e6
    assert about["held_out_accuracy"] > 0.85 and 0 < results["floor"] < 1
    data = FashionMNISTDataModule(download=False)
    try:
        split = data.split("held_out")
    except FileNotFoundError:
        pytest.skip("Fashion-MNIST is not on this machine")
    n = 1000
    with torch.no_grad():
        guess = ClassifierFeatures(str(recipe.CLASSIFIER)).logits(torch.from_numpy(split.images[:n])).argmax(1)
    right = (guess.numpy() == split.labels[:n]).mean()
    p = about["held_out_accuracy"]
    assert abs(right - p) < 4 * math.sqrt(p * (1 - p) / n)


@pytest.fixture
def images(tmp_path):
    """IDX files of random images whose standard deviation is that of the real ones, ten classes."""
    rng, folder = np.random.default_rng(0), tmp_path / "idx"
    folder.mkdir()
    for name, n in (("train", 200), ("t10k", 100)):
        # The border of two pixels on each side is black, so these are a little brighter than the whole.
        pixels = np.where(rng.random((n, 28, 28)) < 0.18, 255, 0).astype(np.uint8)
        header = bytes([0, 0, 8, 3]) + b"".join(k.to_bytes(4, "big") for k in pixels.shape)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = bytes([0, 0, 8, 1]) + n.to_bytes(4, "big") + bytes(i % 10 for i in range(n))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(labels)
    return folder


def test_recipe_in_miniature(tmp_path, images, monkeypatch, capsys):
    """Pace, teacher (interrupted and resumed), sCD, samples and picture; a second call trains nothing."""
    monkeypatch.chdir(ROOT)  # the classifier's path is relative
    smaller = {
        "backbone": {"channels": 4, "channel_mult": [1, 1, 1], "num_blocks": 1, "head_channels": 4},
        "teacher": {"steps": 1},
        "data": {"batch_size": 2, "num_test_samples": 70, "sample_batch_size": 35},
    }
    for part, values in smaller.items():
        monkeypatch.setitem(recipe.TINY, part, values)
    monkeypatch.setitem(recipe.SECONDS, "tiny", (1e-9, 1e-9))  # as few steps as there may be, 8
    commands = []

    def run(*command):
        """In this process, where torch is there already; the teacher's training is cut off at half its steps."""
        commands.append(list(map(str, command)))
        if len(commands) == 2:
            main([*commands[-1], "--trainer.max_steps=4"])
            raise KeyboardInterrupt
        main(commands[-1])

    monkeypatch.setattr(recipe, "sclightning", run)
    runs, out = tmp_path / "runs", tmp_path / "out.json"
    arguments = ["--budget", "tiny", "--folder", str(runs), "--out", str(out), "--only", "teacher", "scd"]
    arguments += ["--", f"--data.root={images}", "--trainer.enable_model_summary=false"]
    with pytest.raises(KeyboardInterrupt):
        recipe.main(arguments)
    recipe.main(arguments)

    folder = runs / "seed0"
    assert [(command[0], Path(command[2]).relative_to(runs).as_posix()) for command in commands] == [
        ("fit", "pace/teacher.yaml"),
        ("fit", "seed0/teacher.yaml"),
        ("fit", "seed0/teacher.yaml"),
        ("test", "seed0/teacher.yaml"),
        ("fit", "pace/scd.yaml"),
        ("fit", "seed0/scd.yaml"),
        ("test", "seed0/scd.yaml"),
    ]
    for kind in ("teacher", "scd"):
        found = json.loads((folder / kind / "record.json").read_text())
        assert (found["seed"], found["steps"], found["images"]) == (0, 8, 16)
        assert found["train_seconds"] == pytest.approx(16 / found["images_per_second"], rel=0.1, abs=0.1)
        assert torch.load(folder / kind / "last.ckpt", weights_only=True)["global_step"] == 8
        samples = dict(np.load(folder / kind / "samples.npz"))
        assert samples.pop("label").tolist() == [i % 10 for i in range(70)]
        assert all(s.shape == (70, 32, 32) and s.dtype == np.uint8 and s.std() > 1 for s in samples.values())
        assert set(samples) == {row for row in recipe.ROWS if row.startswith(kind)}
    assert not np.array_equal(samples["scd_1step"], samples["scd_2step"])
    logs = [recipe.EventAccumulator(str(path)).Reload() for path in (folder / "teacher").glob("events*")]
    logged = [[event.step for event in log.Scalars("loss")] for log in logs if "loss" in log.Tags()["scalars"]]
    assert sorted(logged) == [[1, 3], [5, 7]]  # each process went on where the other had stopped
    assert (folder / "samples.png").stat().st_size > 1000
    assert not out.exists()  # nothing here is to be reported
    printed = capsys.readouterr().out
    assert all(row in printed for row in ("teacher", "scd_2step", "scd_1step"))

    again = [*arguments[:6], "--only", "scd", *arguments[9:]]
    with pytest.raises(FileExistsError, match="other options"):
        recipe.main([*again, "--model.P_mean=0"])
    recipe.main(again)
    assert [command[0] for command in commands[7:]] == ["test"]
    again = dict(np.load(folder / "scd/samples.npz"))
    assert all(np.array_equal(again[row], samples[row]) for row in samples)


def test_search_trains_what_it_is_told(tmp_path):
    """A setting's rate, length and options are those of its run, whose seed no result has."""
    arguments = search.command("scd", tmp_path, 1e-4, 0.99, 256 * 40, input_skip=True, black=-1.125)
    cli = SCLightningCLI([*arguments, "--model.c=5.0", "--model.teacher_checkpoint=t.ckpt"], run=False)
    init = cli.config.model.init_args
    assert init.optimizer.init_args.lr == init.lr_scheduler.init_args.max_lr == 1e-4
    assert init.optimizer.init_args.betas == (0.9, 0.99)
    assert cli.trainer.max_steps == init.lr_scheduler.init_args.total_steps == 40
    assert (cli.model.c, cli.model.P_mean, cli.model.teacher_checkpoint) == (5.0, -1.0, "t.ckpt")
    assert cli.model.backbone.input_gain is not None and cli.datamodule.black == -1.125
    assert cli.model.sigma_data == 0.614
    assert cli.model.seed == cli.datamodule.hparams.seed == recipe.SEARCH_SEED
    assert cli.datamodule.hparams.batch_size == 256 and cli.datamodule.image_shape == (1, 8, 8)
    assert sum(p.numel() for p in cli.model.backbone.parameters()) == pytest.approx(0.2e6, rel=0.1)
    callbacks = {type(callback).__name__: callback for callback in cli.trainer.callbacks}
    assert callbacks["EMA"].exponent == EMA(sigma_rel=0.05).exponent and callbacks["TangentWarmup"].steps == 10


def test_teachers_are_compared_with_the_exact_denoiser():
    """Of images a and -a the mean given x_t is a tanh(cos t <a, x_t> / (sigma_d sin t)^2); twice that has slope 2."""
    a, x_t, t = torch.tensor([1.0, -0.5, 2.0]).double(), torch.randn(4, 3).double(), 1.3
    ideal = high_noise.posterior(x_t, t, torch.stack([a, -a]), 0.7) @ torch.stack([a, -a])
    weight = (math.cos(t) * x_t @ a / (0.7 * math.sin(t)) ** 2).tanh()
    torch.testing.assert_close(ideal, weight[:, None] * a)
    mean = torch.ones(3).double()
    spread, error, product, square = high_noise.compare(mean + 2 * ideal, mean + ideal, mean, a / a.norm()).tolist()
    assert spread == pytest.approx(error) == pytest.approx((weight.square().sum() * a @ a).item())
    assert product / square == pytest.approx(2) and square == pytest.approx(spread)
