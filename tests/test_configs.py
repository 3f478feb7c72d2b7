"""Every run of the paper as a config: it parses, has the paper's numbers and size, and a shrunken copy trains."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from sclightning.callbacks import EMA, TangentWarmup
from sclightning.cli import SCLightningCLI
from sclightning.data import cifar10
from sclightning.data.storage import write_metadata
from sclightning.modules import ConsistencyDistillation, ConsistencyTraining, TrigFlowDiffusion

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
KINDS = {"teacher": TrigFlowDiffusion, "sct": ConsistencyTraining, "scd": ConsistencyDistillation}

# Tables 4 (ImageNet 64) and 5 (ImageNet 512) and App. G, by size.
MILLIONS = {"s": 280.2, "m": 497.8, "l": 777.5, "xl": 1119.3, "xxl": 1523.2, "cifar10": 60.07}
TEACHER_LR = {"s": 1e-2, "m": 9e-3, "l": 8e-3, "xl": 7e-3, "xxl": 6.5e-3, "cifar10": 1e-3}
TEACHER_STEPS = {
    "512": {"s": 1048, "m": 1048, "l": 696, "xl": 598, "xxl": 376},
    "64": {"s": 1048, "m": 1486, "l": 761, "xl": 540},
    "cifar10": {"cifar10": 400},
}
TEACHER_EMA = {
    "512": {"s": 0.025, "m": 0.030, "l": 0.015, "xl": 0.020, "xxl": 0.015},
    "64": {"s": 0.075, "m": 0.06, "l": 0.04, "xl": 0.04},
}
STUDENT_STEPS = {"512": {"sct": 100, "scd": 200}, "64": {"sct": 400, "scd": 400}, "cifar10": {"sct": 400, "scd": 400}}
P = {
    "teacher": {"512": (-0.4, 1.0), "64": (-0.8, 1.6), "cifar10": (-1.2, 1.2)},
    "student": {"512": (-0.8, 1.6), "64": (-1.0, 1.6), "cifar10": (-1.0, 1.4)},
}


def dropout(kind, data, size):
    """Probability and the largest resolution that has it."""
    if data == "cifar10":
        return {"teacher": (0.13, None), "sct": (0.20, None), "scd": (0.0, None)}[kind]
    if kind == "teacher":
        return (0.0 if size == "s" else 0.1), None
    if data == "64":
        return {"sct": (0.45, 16), "scd": (0.0, None)}[kind]
    return {"sct": (0.25 if size == "s" else 0.35, 16), "scd": (0.0, None) if size == "s" else (0.1, 16)}[kind]


def read(name):
    """Kind of run, data set and size."""
    kind, size, *in64 = name.split("_")
    return kind, "cifar10" if size == "cifar10" else "64" if in64 else "512", size


CPU = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32-true"]
CPU += ["--model.compile=false"]  # whole networks take Dynamo minutes here


def load(name, *args):
    return SCLightningCLI(args=["--config", str(CONFIGS / f"{name}.yaml"), *args, *CPU], run=False)


def test_all_runs_of_the_paper_are_there():
    expected = {f"{kind}_cifar10" for kind in KINDS}
    expected |= {f"{kind}_{size}" for kind in KINDS for size in ("s", "m", "l", "xl", "xxl")}
    expected |= {f"{kind}_{size}_in64" for kind in KINDS for size in ("s", "m", "l", "xl")}
    assert set(NAMES) == expected


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_the_paper(name):
    kind, data, size = read(name)
    with torch.device("meta"):
        cli = load(name)
    config, model, backbone = cli.config, cli.model, cli.model.backbone
    student = kind != "teacher"
    assert type(model) is KINDS[kind]

    guided = kind == "scd" and data == "512"
    parameters = sum(p.numel() for n, p in backbone.named_parameters() if "guidance" not in n)
    assert parameters / 1e6 == pytest.approx(MILLIONS[size], abs=0.05)
    assert backbone.guidance == guided
    assert (backbone.in_channels, backbone.num_classes) == {"512": (4, 1000), "64": (3, 1000), "cifar10": (3, 0)}[data]
    assert (backbone.in_channels, backbone.resolution, backbone.resolution) == cli.datamodule.image_shape
    assert backbone.num_classes == cli.datamodule.num_classes

    init = config.model.init_args
    block = next(b for n, b in backbone.encoder.items() if n.startswith("16x16_block"))
    probability, largest = dropout(kind, data, size)
    assert block.dropout == probability
    assert backbone.encoder["32x32_block0"].dropout == (probability if largest is None else 0.0)
    assert (model.P_mean, model.P_std) == P["student" if student else "teacher"][data]
    assert model.sigma_data == 0.5
    if student:
        assert (model.c, model.normalization, model.times) == (0.1, "l2", [math.atan(160), 1.1])
        assert model.teacher_checkpoint == f"runs/{name.replace(kind, 'teacher')}/last.ckpt"
    else:
        assert model.nfe == {"cifar10": 35}.get(data, 63)
        assert model.label_dropout == (0.1 if data == "512" else 0.0)
    if guided:
        assert model.guidance_range == (1.0, 2.0) and 1 <= model.guidance_scale <= 2
        assert sum(p.numel() for p in model.teacher.parameters()) == parameters

    optimizer = init.optimizer
    assert optimizer.class_path.endswith("RAdam" if student and data == "cifar10" else "Adam")
    assert optimizer.init_args.eps == (1e-8 if data == "cifar10" else 1e-11)
    assert list(optimizer.init_args.betas) == [0.9, 0.999 if name == "teacher_cifar10" else 0.99]
    assert optimizer.init_args.weight_decay == 0
    lr = TEACHER_LR[size] / (1 if not student else 10 if data == "cifar10" else 100)
    assert optimizer.init_args.lr == pytest.approx(lr)
    assert config.trainer.gradient_clip_val is None

    batch = cli.datamodule.hparams.batch_size * config.trainer.accumulate_grad_batches
    batch *= 1 if data == "cifar10" else 8  # devices, which load() overrides
    assert batch == (512 if data == "cifar10" else 2048)
    if init.lr_scheduler is None:
        assert student and data == "cifar10"
    else:
        assert init.lr_scheduler.init_args.t_ref == {"512": 70_000, "64": 35_000, "cifar10": None}[data]
        assert init.lr_scheduler.init_args.ramp_steps == math.ceil(1e7 / batch)

    steps = STUDENT_STEPS[data][kind] if student else TEACHER_STEPS[data][size]
    assert cli.trainer.max_steps == 1000 * steps
    callbacks = {type(c): c for c in cli.trainer.callbacks}
    assert cli.trainer.max_steps % callbacks[ModelCheckpoint]._every_n_train_steps == 0  # the last step is saved
    assert (TangentWarmup in callbacks) == student
    if student:
        assert callbacks[TangentWarmup].steps == 10_000
    if data == "cifar10":
        assert (callbacks[EMA].half_life, callbacks[EMA].ramp_up) == (500_000, 0.05)
    else:
        ema = next(c for c in config.trainer.callbacks if c.class_path.endswith("EMA")).init_args
        assert ema.sigma_rel == (0.05 if student else TEACHER_EMA[data][size])


@pytest.mark.parametrize("name", [name for name in NAMES if read(name)[2] in ("m", "cifar10")])
def test_protocol_of_the_paper(name):
    """50,000 samples, uniform over classes, three seeds, 1 and 2 steps with t = 1.1 or the teacher's evaluations."""
    kind, data, _ = read(name)
    with torch.device("meta"):
        cli = load(name)
    options, cli.datamodule.trainer = cli.config.evaluation.init_args, cli.trainer
    assert cli.config.evaluation.class_path == "sclightning.callbacks.FIDEvaluation"
    assert options.extractor is None and (options.seeds, options.steps) == ([0, 1, 2], [1, 2])
    requests = cli.datamodule.test_dataloader().dataset
    labels = requests.__getitems__(range(len(requests))).label
    assert len(requests) == 50_000
    assert labels is None if data == "cifar10" else torch.equal(labels.bincount(), torch.full((1000,), 50))
    if kind == "teacher":
        assert cli.model.nfe == {"cifar10": 35}.get(data, 63)
    else:
        assert cli.model.times == [math.atan(160), 1.1]
    if data == "512":
        (other,) = options.others
        assert other.extractor.class_path == "sclightning.metrics.DINOv2Features"
        assert other.extractor.init_args.model == "dinov2_vitl14"
        assert "inception" in options.reference and "dinov2" in other.reference
    else:
        assert options.reference == "train" and len(options.extras) == 3


def test_guidance_is_swept_on_demand():
    """The same protocol with the scales of Fig. 7."""
    sweep = CONFIGS / "evaluation" / "imagenet512_guidance.yaml"
    with torch.device("meta"):
        plain, swept = (load("scd_m", *extra).config.evaluation.init_args for extra in ((), (f"--evaluation={sweep}",)))
    assert swept.guidance_scales == pytest.approx([1 + i / 10 for i in range(11)])
    assert {**swept.as_dict(), "guidance_scales": None} == plain.as_dict()


@pytest.mark.parametrize("name", NAMES)
def test_file_is_short_and_says_where_its_numbers_come_from(name):
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    assert 20 <= len(lines) <= 35
    assert max(map(len, lines)) <= 120
    data = read(name)[1]
    assert lines[0].startswith("#") and {"512": "Table 5", "64": "Table 4", "cifar10": "App. G"}[data] in lines[0]
    assert any("ot printed" in line for line in lines[:3])
    text = "\n".join(lines)
    assert "benchmark: true" in text
    devices = 1 if data == "cifar10" else 8
    assert f"devices: {devices}\n" in text  # which load() overrides
    part = {"512": "imagenet512", "64": "imagenet64"}.get(data, data)
    augmented = "_augmented" if name == "teacher_cifar10" else ""
    assert f"\ndata: data/{part}{augmented}.yaml\nevaluation: evaluation/{part}.yaml\n" in text
    assert f"runs/{name}\n" in text and f"dirpath: runs/{name}," in text


def test_samples_of_imagenet512_can_be_decoded():
    """``sclightning test --config configs/scd_m.yaml`` needs pictures, and so a decoder, of the config's convention."""
    data = load("scd_m").datamodule
    assert (data.vae, data.convention) == ("stabilityai/sd-vae-ft-mse", "paper")


@pytest.mark.parametrize("name", ["CIFAR10DataModule", "ImageNet64DataModule", "ImageNetLatentDataModule"])
def test_data_modules_are_where_the_others_are(name):
    """``sclightning.data`` is what the command imports: there, ``--data=CIFAR10DataModule`` is found."""
    assert type(load("sct_cifar10", f"--data=sclightning.data.{name}").datamodule).__name__ == name


@pytest.fixture
def data_sets(tmp_path, monkeypatch):
    """Random data where the configs look for it."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for folder, file, array in [
        ("imagenet64", "images", rng.integers(0, 256, (4, 3, 64, 64), np.uint8)),
        ("imagenet512", "moments", rng.random((4, 8, 64, 64)).astype(np.float16)),
    ]:
        path = Path("data") / folder
        path.mkdir(parents=True)
        np.save(path / f"train_{file}.npy", array)
        np.save(path / "train_labels.npy", rng.integers(0, 1000, 4))
        write_metadata(path, "train", file, 1000, "paper" if file == "moments" else None)
    pixels = rng.normal(127.5, 64, (4, 32, 32, 3)).clip(0, 255).astype(np.uint8)  # of CIFAR-10's standard deviation
    images = SimpleNamespace(data=pixels, targets=[0, 9, 3, 5])
    monkeypatch.setattr(cifar10, "CIFAR10", lambda root, **options: images)


def shrunken(name):
    networks = ["backbone", "teacher"] if name.startswith("scd") and read(name)[1] == "512" else ["backbone"]
    small = {"channels": "8", "channel_mult": "[1,1,2]", "num_blocks": "1", "head_channels": "8"}
    args = ["--data.batch_size=2", "--trainer.max_steps=1", "--trainer.accumulate_grad_batches=1"]
    args += ["--trainer.limit_val_batches=0", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    args += ["--trainer.enable_model_summary=false", "--trainer.val_check_interval=null"]
    if not name.startswith(("sct_cifar10", "scd_cifar10")):
        args.append("--model.lr_scheduler.ramp_steps=0")  # it would begin at rate 0
    return load(name, *args, *(f"--model.{n}.{key}={value}" for n in networks for key, value in small.items()))


@pytest.mark.parametrize("name", NAMES)
def test_a_shrunken_copy_takes_a_training_step(name, data_sets):
    cli = shrunken(name)
    model = cli.model
    if name.startswith("teacher"):
        before = {n: p.clone() for n, p in model.backbone.named_parameters()}
    else:
        trained = getattr(model, "teacher", None) or model.backbone
        # Weights unlike anything at initialisation, as the teacher's would be.
        before = {n: p + torch.randn_like(p) / 8 for n, p in trained.named_parameters() if "guidance" not in n}
        path = Path(model.teacher_checkpoint)
        path.parent.mkdir(parents=True)
        torch.save({"state_dict": {f"backbone.{n}": w for n, w in before.items()}}, path)
        # Step 0 of the warm-up is plain distillation, of which a student that is still its teacher has no gradient.
        cli.trainer.callbacks = [c for c in cli.trainer.callbacks if not isinstance(c, TangentWarmup)]

    cli.trainer.fit(model, cli.datamodule)

    assert cli.trainer.global_step == 1
    after = dict(model.backbone.named_parameters())
    # Forced weight normalisation rounds; RAdam's first steps, unrectified, are as small as the gradients.
    atol = 0 if "cifar10" in name else 1e-7
    moved = [n for n in before if not torch.allclose(after[n], before[n], rtol=0, atol=atol)]
    assert all(p.isfinite().all() for p in after.values())
    # The output gain of an EDM2 teacher is zero at first: nothing before it gets a gradient yet.
    assert "out_gain" in moved or len(moved) > 0.3 * len(before)
    if not name.startswith("teacher"):
        # One step of lr 1e-4 away from the teacher, not from a random start.
        name = "out_gain" if "out_gain" in before else "out_norm.weight"
        assert (after[name] - before[name]).abs().max() < 0.01
    assert math.isfinite(cli.trainer.callback_metrics["loss"])
