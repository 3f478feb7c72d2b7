"""The runs that the paper compares with, as configs: they parse, have its numbers, and a shrunken copy trains."""

import math
from pathlib import Path

import pytest
import torch
from test_configs import CONFIGS, CPU, data_sets, load  # noqa: F401 - a fixture

from sclightning.callbacks import TangentWarmup
from sclightning.modules import DiscreteConsistencyDistillation, EasyConsistencyTuning, VariationalScoreDistillation

NAMES = sorted(path.stem for path in CONFIGS.glob("methods/*.yaml"))
KINDS = {
    "dscd_m": DiscreteConsistencyDistillation,
    "ect_cifar10": EasyConsistencyTuning,
    "scd_vsd_m": VariationalScoreDistillation,
    "vsd_m": VariationalScoreDistillation,
}
SOURCES = {"dscd_m": "Fig. 5c", "ect_cifar10": "App. E.3", "scd_vsd_m": "Table 5", "vsd_m": "Table 5"}
STEPS = {"dscd_m": 200_000, "ect_cifar10": 400_000, "scd_vsd_m": 20_000, "vsd_m": 20_000}
pytestmark = pytest.mark.filterwarnings("ignore")


def test_all_methods_are_there():
    """One file for each of which the paper gives settings."""
    assert set(NAMES) == set(KINDS)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_the_paper(name):
    """What distinguishes the run, and all else as the run of sCD or sCT that it is compared with."""
    with torch.device("meta"):
        run, other = load(f"methods/{name}"), load("sct_cifar10" if name == "ect_cifar10" else "scd_m")
    assert type(run.model) is KINDS[name] and run.trainer.max_steps == STEPS[name]
    steps = run.config.evaluation.init_args.steps  # as many of the model's times are used in a test
    assert (steps or [1]) == list(range(1, 1 + len(run.model.times)))
    config, twin = run.config, other.config
    init, same = config.model.init_args, twin.model.init_args
    assert config.data.init_args == twin.data.init_args and config.trainer.precision == twin.trainer.precision
    assert init.optimizer == same.optimizer and init.lr_scheduler == same.lr_scheduler
    assert config.trainer.accumulate_grad_batches == (1 if name == "ect_cifar10" else 8)
    if name == "ect_cifar10":
        assert init.backbone.init_args.as_dict() == same.backbone.init_args.as_dict() | {"double_norm": False}
        assert (init.P_mean, init.P_std, init.q, init.k, init.b, init.c) == (-1.1, 2.0, 2.0, 8.0, 1.0, 0.0)
        assert 8 * init.stage_steps == run.trainer.max_steps
        parameters = sum(p.numel() for p in run.model.backbone.parameters())
        assert parameters / 1e6 == pytest.approx(55.73, abs=0.05)
        return
    assert init.backbone == same.backbone and init.teacher.init_args == same.teacher.init_args
    options = ["teacher_checkpoint", "guidance_range", "sigma_data"]
    if name != "vsd_m":  # the times at which there is a tangent
        options += ["P_mean", "P_std", "normalization", "c"]
    for option in options:
        assert getattr(init, option) == getattr(same, option)
    if name == "dscd_m":
        assert (init.N, init.sigma_min, init.sigma_max, init.rho) == (1024, 0.002, 80, 7)
        assert init.guidance_scale == 1.3 and run.model.times == [math.atan(160), 1.1]
    else:
        assert (init.vsd_P_mean, init.vsd_P_std, init.fake_P_mean, init.fake_P_std) == (0.4, 2.0, -0.8, 1.6)
        assert init.adaptive and init.lambda_vsd == 1 and init.scd == (name == "scd_vsd_m")
        assert run.model.times == pytest.approx([math.atan(160), 1.1][: 1 + init.scd])
        assert init.guidance_scale == (1.0 if init.scd else 1.1)
        assert any(isinstance(c, TangentWarmup) for c in run.trainer.callbacks) == init.scd


@pytest.mark.parametrize("name", NAMES)
def test_file_is_short_and_says_where_its_numbers_come_from(name):
    """As the paper's own runs."""
    lines = (CONFIGS / "methods" / f"{name}.yaml").read_text().splitlines()
    assert 20 <= len(lines) <= 42 and max(map(len, lines)) <= 120
    assert lines[0].startswith("#") and SOURCES[name] in lines[0] and "ot printed" in lines[1]
    text = "\n".join(lines)
    assert f"runs/{name}\n" in text and f"dirpath: runs/{name}," in text
    part = "cifar10" if name == "ect_cifar10" else "imagenet512"
    assert f"\ndata: ../data/{part}.yaml\n" in text and f"\nevaluation: ../evaluation/{part}" in text
    assert f"devices: {1 if name == 'ect_cifar10' else 8}\n" in text  # which load() overrides


def shrunken(name):
    small = {"channels": "8", "channel_mult": "[1,1,2]", "num_blocks": "1", "head_channels": "8"}
    args = ["--data.batch_size=2", "--trainer.max_steps=1", "--trainer.accumulate_grad_batches=1"]
    args += ["--trainer.limit_val_batches=0", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    args += ["--trainer.enable_model_summary=false", "--trainer.val_check_interval=null"]
    networks = ["backbone"] if name == "ect_cifar10" else ["backbone", "teacher"]
    if name != "ect_cifar10":
        args.append("--model.lr_scheduler.ramp_steps=0")  # it would begin at rate 0
    args += [f"--model.{n}.{key}={value}" for n in networks for key, value in small.items()]
    return load(f"methods/{name}", *args)


@pytest.mark.parametrize("name", NAMES)
def test_a_shrunken_copy_takes_a_training_step(name, data_sets):  # noqa: F811
    """From a teacher's checkpoint, with finite numbers; the student moves, and not far."""
    cli = shrunken(name)
    model = cli.model
    trained = getattr(model, "teacher", None) or model.backbone
    torch.manual_seed(0)
    before = {n: p + torch.randn_like(p) / 8 for n, p in trained.named_parameters()}
    path = Path(model.teacher_checkpoint)
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": {f"backbone.{n}": w for n, w in before.items()}}, path)
    # Step 0 of the warm-up is plain distillation, of which a student that is still its teacher has no gradient.
    cli.trainer.callbacks = [c for c in cli.trainer.callbacks if not isinstance(c, TangentWarmup)]

    cli.trainer.fit(model, cli.datamodule)

    after = dict(model.backbone.named_parameters())
    moved = [n for n in before if not torch.allclose(after[n], before[n], rtol=0, atol=1e-8)]
    assert cli.trainer.global_step == 1 and len(moved) > 0.3 * len(before)
    assert all(p.isfinite().all() for p in after.values())
    name = "out_gain" if "out_gain" in before else "out_norm.weight"
    assert (after[name] - before[name]).abs().max() < 0.01  # one step of lr 1e-4 from the teacher
    assert math.isfinite(cli.trainer.callback_metrics["loss"])
