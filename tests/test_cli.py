"""The command, in one process but for the run that is killed: its files, its overrides, its errors, resuming."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import yaml
from torchvision.io import read_image

from sclightning.cli import main
from sclightning.data.arrays import to_uint8
from sclightning.metrics import ClassifierFeatures
from sclightning.modules import ConsistencyDistillation, TrigFlowDiffusion
from sclightning.modules.base import TrigFlowModule

pytestmark = pytest.mark.filterwarnings("ignore")

ADAM = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}
EMA = {"class_path": "sclightning.callbacks.EMA", "init_args": {"decay": 0.5}}


def fid(classifier_file):
    extractor = {"weights": str(classifier_file), "num_features": 16}
    return {
        "class_path": "sclightning.callbacks.FIDEvaluation",
        "init_args": {"extractor": {"class_path": "sclightning.metrics.ClassifierFeatures", "init_args": extractor}},
    }


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, write_config):
    """A teacher trained through the command."""
    folder = tmp_path_factory.mktemp("teacher")
    config = write_config(folder, optimizer=ADAM, callbacks=[EMA])
    main(["fit", "--config", str(config)])
    return SimpleNamespace(folder=folder, config=config, ckpt=folder / "last.ckpt")


@pytest.fixture(scope="module")
def student(tmp_path_factory, write_config, teacher, classifier_file):
    """A student distilled from it through the command."""
    folder = tmp_path_factory.mktemp("student")
    callbacks = [EMA, {"class_path": "sclightning.callbacks.SampleGrid", "init_args": {"rows": 1, "columns": 2}}]
    config = write_config(
        folder,
        "ConsistencyDistillation",
        teacher_checkpoint=str(teacher.ckpt),
        times=[1.5, 0.9],
        callbacks=[*callbacks, fid(classifier_file)],
        data={"num_val_samples": 20},
        trainer={"val_check_interval": 3, "check_val_every_n_epoch": None, "limit_val_batches": 1.0},
    )
    main(["fit", "--config", str(config)])
    return SimpleNamespace(folder=folder, config=config, ckpt=folder / "last.ckpt")


load = L.LightningModule.load_from_checkpoint


def refuse(capsys, *args):
    """Run a command that must be refused; give its one sentence."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main([str(arg) for arg in args])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if "error" in line.lower()]
    assert line.startswith("sclightning: error: ") and err.rstrip().endswith(line)
    return line


# --- What a run leaves ------------------------------------------------------------------------------------------------


def test_fit_leaves_a_config_and_a_checkpoint(teacher):
    """The complete config, and a checkpoint that loads with weights_only and holds averages."""
    config = yaml.safe_load((teacher.folder / "config.yaml").read_text())
    assert config["model"]["init_args"]["P_mean"] == -1.2 and config["data"]["init_args"]["batch_size"] == 8
    checkpoint = torch.load(teacher.ckpt, weights_only=True)
    assert checkpoint["global_step"] == 3 and set(checkpoint["ema"]) == {"weights", "images", "pending"}
    assert checkpoint["DigitsDataModule"]["position"] == 24


def test_checkpoint_reloads_with_nothing_but_its_path(teacher, student):
    """Class, network and numbers are in the file; Lightning's own class will do; overrides are honoured."""
    state = torch.load(student.ckpt, weights_only=True)["state_dict"]
    for cls in (L.LightningModule, ConsistencyDistillation):
        module = cls.load_from_checkpoint(student.ckpt)
        assert type(module) is ConsistencyDistillation and module.times == [1.5, 0.9] and module.sigma_data == 0.752
        for name, weight in module.backbone.named_parameters():
            assert torch.equal(weight, state[f"backbone.{name}"])
    assert load(student.ckpt, times=[1.4]).times == [1.4]
    assert ConsistencyDistillation.load_from_checkpoint(student.ckpt, times=[1.4]).nfe == 1
    assert type(load(teacher.ckpt)) is TrigFlowDiffusion


def test_reloaded_module_samples_what_validation_saw(student):
    """The grid of the last validation is made of the averaged weights, which are the checkpoint's."""
    module = load(student.ckpt)
    expected = to_uint8(module.sample([0, 1], (1, 8, 8), torch.tensor([0, 1])))
    picture = read_image(str(student.folder / "samples" / "step_0000003.png"))[:1]
    for k in range(2):
        assert (picture[:, 1:9, 1 + 9 * k : 9 + 9 * k].int() - expected[k].int()).abs().max() <= 1


# --- Other commands ---------------------------------------------------------------------------------------------------


def test_test_writes_a_result_and_leaves_the_config_alone(student):
    """The command line wins over the checkpoint's hyperparameters; how the run was trained stays on record."""
    before = (student.folder / "config.yaml").read_text()
    args = ["--config", str(student.folder / "config.yaml"), "--ckpt_path", str(student.ckpt)]
    main(["test", *args])
    main(["test", *args, "--model.times=[1.2]", "--model.seed=5", "--data.num_test_samples=18"])
    assert (student.folder / "config.yaml").read_text() == before
    first, second = (
        json.loads(next(student.folder.glob(f"last_fd_classifier*nfe{nfe}*seed{seed}*.json")).read_text())
        for nfe, seed in ((2, 0), (1, 5))
    )
    assert (first["samples"], first["nfe"], first["seed"]) == (20, 2, 0)
    assert (second["samples"], second["nfe"], second["seed"]) == (18, 1, 5)
    assert first["checkpoint"] == str(student.ckpt) and first["fd_classifier"] != second["fd_classifier"]


def test_test_uses_the_weights_of_the_checkpoint(student, capsys):
    """Without a checkpoint the network is a fresh one, and so is the distance."""
    main(["test", "--config", str(student.config), "--ckpt_path", str(student.ckpt), "--model.seed=6"])
    main(["test", "--config", str(student.config), "--model.seed=6"])
    trained, fresh = (
        json.loads(next(student.folder.glob(f"{stem}_fd_classifier*seed6*.json")).read_text())
        for stem in ("last", "model")
    )
    assert trained["fd_classifier"] != fresh["fd_classifier"] and fresh["checkpoint"] is None


class OtherFeatures(ClassifierFeatures):
    """The same network under another name."""

    name = "other"


def evaluation(classifier_file, **options):
    callback = fid(classifier_file)
    return {"evaluation": callback | {"init_args": callback["init_args"] | options}}


def test_test_measures_what_the_config_says(teacher, classifier_file, tmp_path, capsys):
    """``evaluation`` is read by ``test`` alone, in its own file or not, and each option can be given on the command."""
    config = tmp_path / "run.yaml"
    other = {"weights": str(classifier_file), "num_features": 16}
    other = {"extractor": {"class_path": "test_cli.OtherFeatures", "init_args": other}, "reference": "held_out"}
    part = evaluation("missing.pt", seeds=[0, 1], save="png", others=[other])["evaluation"]
    (tmp_path / "part.yaml").write_text(yaml.safe_dump(part))
    config.write_text(teacher.config.read_text() + "evaluation: part.yaml\n")
    folder = tmp_path / "run"
    root = [f"--trainer.default_root_dir={folder}", f"--trainer.logger.init_args.save_dir={folder}"]
    main(["fit", "--config", str(config), *root, "--trainer.callbacks=[]", "--trainer.max_steps=1"])
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["evaluation"]["init_args"]["seeds"] == [0, 1]
    capsys.readouterr()
    args = [f"--evaluation.extractor.weights={classifier_file}", "--evaluation.seeds=[4]", "--model.steps=1"]
    main(["test", "--config", str(folder / "config.yaml"), *root, *args])
    (path,) = folder.glob("*.json")
    result = json.loads(path.read_text())
    assert [run["seed"] for run in result["runs"]] == [4] and result["nfe"] == 1
    assert result["others"]["fd_other"]["reference"]["split"] == "held_out" and result["fd_other"] > 0
    assert len(list(path.with_suffix("").iterdir())) == 20
    printed = capsys.readouterr().out
    assert printed.count("fd_classifier") == 1 and f"{result['fd_classifier']:.4g}" in printed


def test_evaluation_takes_the_place_of_the_one_during_fit(student, classifier_file, tmp_path):
    """A run that measures while it trains is tested in all settings of its ``evaluation``, and in them alone."""
    assert "FIDEvaluation" in student.config.read_text()
    config = tmp_path / "run.yaml"
    part = evaluation(classifier_file, seeds=[0, 1], steps=[1, 2])
    config.write_text(student.config.read_text() + yaml.safe_dump(part))
    main(["test", "--config", str(config), f"--trainer.default_root_dir={tmp_path}"])
    (path,) = tmp_path.glob("*.json")
    runs = json.loads(path.read_text())["runs"]
    assert [(run["nfe"], run["seed"]) for run in runs] == [(1, 0), (1, 1), (2, 0), (2, 1)]


def test_test_refuses_before_it_samples(teacher, classifier_file, tmp_path, capsys, monkeypatch):
    """Missing weights, too few samples, a reference that is not there: a sentence, and no sample was made."""
    monkeypatch.setattr(TrigFlowModule, "sample", lambda *args: pytest.fail("A sample was made."))
    config = tmp_path / "run.yaml"
    config.write_text(teacher.config.read_text() + yaml.safe_dump(evaluation(classifier_file)))
    line = refuse(capsys, "test", "--config", config, "--evaluation.extractor.weights=gone.pt")
    assert "gone.pt" in line and "classifier.py" in line
    line = refuse(capsys, "test", "--config", config, "--data.num_test_samples=16")
    assert "16 samples are too few" in line
    line = refuse(capsys, "test", "--config", config, "--evaluation.reference=gone.npz")
    assert "no reference at gone.npz" in line
    line = refuse(capsys, "test", "--config", config, "--evaluation.extras=[fvd]")
    assert "fvd" in line


def test_validate_prints_the_distance(student, capsys):
    """``validate`` measures and writes no result."""
    n = len(list(student.folder.glob("*.json")))
    main(["validate", "--config", str(student.config), "--ckpt_path", str(student.ckpt)])
    assert "fd_classifier" in capsys.readouterr().out and len(list(student.folder.glob("*.json"))) == n


def test_predict_writes_images(student, tmp_path):
    """One PNG per sample, the checkpoint's."""
    folder = tmp_path / "images"
    main(
        ["predict", "--config", str(student.config), "--ckpt_path", str(student.ckpt), "--samples.folder", str(folder)]
    )
    assert sorted(path.name for path in folder.iterdir()) == [f"{i:06d}.png" for i in range(20)]
    module = load(student.ckpt)
    expected = to_uint8(module.sample(range(20), (1, 8, 8), torch.arange(20) % 10))
    written = torch.stack([read_image(str(folder / f"{i:06d}.png")) for i in range(20)])
    assert (written.int() - expected.int()).abs().max() <= 1 and expected.float().std() > 1


def test_print_config_is_complete_and_can_be_run(teacher, tmp_path, capsys):
    """What ``--print_config`` prints is a config."""
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--config", str(teacher.config), "--model.steps=7", "--print_config"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    config = yaml.safe_load(printed)
    assert config["model"]["init_args"]["steps"] == 7 and config["model"]["init_args"]["label_dropout"] == 0.0
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    main(["fit", "--config", str(path), "--trainer.fast_dev_run=true"])


def test_configs_are_layered(teacher, tmp_path, capsys):
    """A later file changes one number of an earlier one; a file may stand in a file; the command line is last."""
    (tmp_path / "net.yaml").write_text(
        yaml.safe_dump(yaml.safe_load(teacher.config.read_text())["model"]["init_args"]["backbone"])
    )
    config = yaml.safe_load(teacher.config.read_text())
    config["model"]["init_args"]["backbone"] = "net.yaml"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    layer = {"model": {"init_args": {"backbone": {"init_args": {"channels": 12}}, "P_std": 1.3}}}
    (tmp_path / "layer.yaml").write_text(yaml.safe_dump(layer))
    folder = tmp_path / "out"
    layers = ["--config", str(tmp_path / "run.yaml"), "--config", str(tmp_path / "layer.yaml"), "--model.P_mean=-1"]
    trainer = ["--trainer.callbacks=[]", f"--trainer.callbacks+={json.dumps(checkpoints(folder))}"]
    trainer += [f"--trainer.logger.init_args.save_dir={folder}", "--trainer.max_steps=1"]
    main(["fit", *layers, *trainer])
    for name in ("run", "layer", "net"):
        (tmp_path / f"{name}.yaml").unlink()
    module = load(folder / "last.ckpt")
    assert (module.P_std, module.P_mean, module.sigma_data) == (1.3, -1.0, 0.752)
    assert module.backbone.map_layer0.in_features == 12 and module.backbone.num_classes == 10


def checkpoints(folder):
    arguments = {"dirpath": str(folder), "save_last": True, "save_top_k": 0, "every_n_train_steps": 1}
    return {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": arguments}


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_unknown_key(teacher, capsys):
    """On the command line and in a file: the key is named."""
    assert "sigma_date" in refuse(capsys, "fit", "--config", teacher.config, "--model.init_args.sigma_date=0.5")
    config = teacher.folder / "typo.yaml"
    config.write_text(teacher.config.read_text().replace("batch_size", "batchsize"))
    assert "batchsize" in refuse(capsys, "fit", "--config", config)
    config.write_text(teacher.config.read_text().replace("max_steps", "maxsteps"))
    assert "maxsteps" in refuse(capsys, "fit", "--config", config)


def test_wrong_type_and_unknown_class(teacher, capsys):
    """The key and the value are named, without a list of everything that it is not."""
    line = refuse(capsys, "fit", "--config", teacher.config, "--data.batch_size=many")
    assert "batch_size" in line and len(line) < 400
    config = teacher.folder / "class.yaml"
    config.write_text(teacher.config.read_text().replace("TrigFlowDiffusion", "TrigFlowDifusion"))
    line = refuse(capsys, "fit", "--config", config)
    assert "TrigFlowDifusion" in line and len(line) < 600


@pytest.mark.parametrize("mistake", [("channels", "chanels"), ("DDPMpp", "DDPMpq"), ("channels: 8", "channels: abc")])
def test_mistake_in_the_file_of_a_part(teacher, tmp_path, capsys, mistake):
    """A network's own file, beside the folder of the run's: the mistake is named, not the file that has it."""
    config, part = yaml.safe_load(teacher.config.read_text()), tmp_path / "backbone/tiny.yaml"
    text = yaml.safe_dump(config["model"]["init_args"]["backbone"])
    config["model"]["init_args"]["backbone"] = "../backbone/tiny.yaml"
    for folder in ("backbone", "runs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "runs/run.yaml").write_text(yaml.safe_dump(config))
    part.write_text(text)
    command = ["fit", "--config", tmp_path / "runs/run.yaml", "--trainer.logger=false"]
    main([str(arg) for arg in command])
    part.write_text(text.replace(*mistake))
    line = refuse(capsys, *command)
    assert mistake[0] in text and mistake[1].split()[-1] in line and "loop" not in line


def test_file_that_is_not_yaml_and_file_that_is_not_there(teacher, tmp_path, capsys):
    """The place in the one is named, and the path of the other."""
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: {class_path: [\ndata: 3\n")
    assert "line 3" in refuse(capsys, "fit", "--config", broken)
    assert "nowhere.yaml" in refuse(capsys, "fit", "--config", tmp_path / "nowhere.yaml")


def test_missing_teacher(student, tmp_path, capsys):
    """No teacher at all, and one that is not on disk."""
    line = refuse(capsys, "fit", "--config", student.config, "--model.teacher_checkpoint=null")
    assert "no teacher" in line and "teacher_checkpoint" in line
    line = refuse(capsys, "fit", "--config", student.config, f"--model.teacher_checkpoint={tmp_path}/gone.ckpt")
    assert "gone.ckpt" in line and "train the teacher first" in line


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_missing_checkpoint(teacher, capsys, command):
    """Every command names the path."""
    line = refuse(capsys, command, "--config", teacher.config, "--ckpt_path=gone.ckpt")
    assert "gone.ckpt" in line and "--ckpt_path" in line


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_checkpoint_of_another_model(teacher, student, capsys, command):
    """A teacher is no state to resume a student from, nor the other way round: what starts from it is named."""
    line = refuse(capsys, command, "--config", student.config, "--ckpt_path", teacher.ckpt)
    assert "diffusion" in line and "teacher_checkpoint" in line
    assert "consistency" in refuse(capsys, command, "--config", teacher.config, "--ckpt_path", student.ckpt)
    line = refuse(
        capsys, command, "--config", teacher.config, "--ckpt_path", teacher.ckpt, "--model.backbone.channels=12"
    )
    assert "another network" in line and "config.yaml" in line


def test_file_that_is_no_checkpoint(student, tmp_path, capsys):
    """Text, and a checkpoint whose copying broke off, where a checkpoint or a teacher is wanted."""
    for path, content in ((tmp_path / "text.ckpt", b"text"), (tmp_path / "cut.ckpt", student.ckpt.read_bytes()[:9000])):
        path.write_bytes(content)
        for option in ("--ckpt_path", "--model.teacher_checkpoint"):
            line = refuse(capsys, "fit", "--config", student.config, f"{option}={path}")
            assert path.name in line and "damaged" in line
        assert path.name in refuse(capsys, "export", "--ckpt_path", path, "--folder", tmp_path)


def test_network_without_an_argument_for_labels(teacher, capsys):
    """The data has labels and the network's forward takes none: what it is called with is shown."""
    line = refuse(capsys, "fit", "--config", teacher.config, "--model.backbone=conftest.PlainNet")
    assert "PlainNet is called as net(x, t, label=label)" in line and "docs/extending.md" in line


def test_help_names_every_command(capsys):
    """Also those that need no Trainer; without a command there is the help."""
    for args in (["--help"], []):
        with pytest.raises(SystemExit) as exit:
            main(args)
        printed = capsys.readouterr().out
        assert exit.value.code == 0 and all(name in printed for name in ("fit", "predict", "prepare", "ema", "export"))


def test_test_without_measure_says_so(teacher):
    """Samples that nothing looks at are made without a number: the option that gives one is named."""
    with pytest.warns(UserWarning, match="--evaluation="):
        main(["test", "--config", str(teacher.config), "--ckpt_path", str(teacher.ckpt), "--model.steps=1"])


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_samples_of_an_untrained_network_are_told(student, command, tmp_path, recwarn):
    """Without a checkpoint the weights are random, which a table or a picture does not say."""
    arguments = [command, "--config", str(student.config), f"--samples.folder={tmp_path}", "--model.times=[1.5]"]
    for extra in ([], [f"--ckpt_path={student.ckpt}"]):
        recwarn.clear()
        main([*arguments, *extra])
        assert any("no --ckpt_path" in str(w.message) for w in recwarn) == (not extra)


def test_schedule_that_ends_before_the_run(teacher, capsys):
    """Torch would raise in the middle of it."""
    schedule = "{class_path: torch.optim.lr_scheduler.OneCycleLR, init_args: {max_lr: 0.01, total_steps: 5}}"
    command = ["fit", "--config", teacher.config, f"--model.lr_scheduler={schedule}", "--trainer.max_steps=6"]
    line = refuse(capsys, *command)
    assert "max_steps is 6" in line and "ends at 5" in line and "total_steps" in line


def test_teacher_for_other_data(student, capsys):
    """Its velocity would be that of another standard deviation."""
    line = refuse(capsys, "fit", "--config", student.config, "--model.sigma_data=0.76")
    assert "sigma_data=0.752" in line and "0.76" in line


def test_a_run_shorter_than_an_interval_is_saved_when_it_ends(tmp_path, write_config, recwarn):
    config = write_config(tmp_path, trainer={"max_steps": 2})
    main(["fit", "--config", str(config)])
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2
    assert not any("last checkpoint" in str(w.message) for w in recwarn)


def test_fit_says_which_steps_the_last_checkpoint_will_lack(tmp_path, write_config):
    """Four steps, saved every third."""
    config = write_config(tmp_path, trainer={"max_steps": 4})
    with pytest.warns(UserWarning, match="of step 3 of 4; set every_n_train_steps"):
        main(["fit", "--config", str(config)])
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


def test_predict_refuses_images_that_would_stay(student, tmp_path, capsys):
    """The same prediction again is fine; one of fewer images would leave some of the last among its own."""
    folder = tmp_path / "images"
    args = ["predict", "--config", student.config, "--ckpt_path", student.ckpt, "--samples.folder", folder]
    for _ in range(2):
        main([str(arg) for arg in args])
    line = refuse(capsys, *args, "--data.num_test_samples=18")
    assert "2 images" in line and "000018.png" in line and "--samples.folder" in line


def test_wrong_resolution(teacher, capsys):
    """Network and images do not match: both sizes are named."""
    line = refuse(capsys, "fit", "--config", teacher.config, "--model.backbone.resolution=16")
    assert "(1, 16, 16)" in line and "(1, 8, 8)" in line


def test_wrong_sigma_data(teacher, capsys):
    """The measured value is named."""
    line = refuse(capsys, "fit", "--config", teacher.config, "--model.sigma_data=0.5")
    assert "0.5" in line and "0.751" in line


def test_guided_distillation_without_a_network_for_the_teacher(student, capsys):
    """Both keys that it needs are named."""
    line = refuse(capsys, "fit", "--config", student.config, "--model.guidance_range=[1,2]")
    assert "backbone guidance: true" in line and "model.init_args.teacher" in line


def test_other_architecture_than_the_teacher(student, capsys):
    """A student that cannot hold the teacher's weights."""
    line = refuse(capsys, "fit", "--config", student.config, "--model.backbone.channels=12")
    assert "another network" in line


def test_run_without_end(teacher, capsys):
    """An endless stream wants max_steps."""
    assert "max_steps" in refuse(capsys, "fit", "--config", teacher.config, "--trainer.max_steps=-1")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a machine that may have them")
def test_devices_that_are_not_there(capsys):
    """The paper's configs ask for eight GPUs; without one they would be eight processes on the CPU."""
    config = Path(__file__).parent.parent / "configs/scd_m.yaml"
    line = refuse(capsys, "fit", "--config", config)
    assert "trainer.devices is 8" in line and "--trainer.accelerator=cpu" in line
    assert "trainer.devices is 4" in refuse(capsys, "fit", "--config", config, "--trainer.devices=4")


def test_reference_of_another_name(student, capsys):
    """A typing error in the split's name must not choose the other half."""
    config = student.folder / "reference.yaml"
    config.write_text(student.config.read_text().replace("    extractor:", "    reference: heldout\n      extractor:"))
    line = refuse(capsys, "test", "--config", config)
    assert "heldout" in line and "held_out" in line


def test_traceback_on_demand(teacher, monkeypatch):
    """SCLIGHTNING_TRACEBACK=1 lets the exception through."""
    monkeypatch.setenv("SCLIGHTNING_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match=r"gone\.ckpt"):
        main(["fit", "--config", str(teacher.config), "--ckpt_path=gone.ckpt"])


def test_bug_keeps_its_traceback(teacher, monkeypatch):
    """Only what was written for the user is shortened; a TypeError in our own code is not."""
    monkeypatch.setattr(TrigFlowDiffusion, "training_step", lambda self, batch, i: len(i))
    with pytest.raises(TypeError):
        main(["fit", "--config", str(teacher.config)])
    monkeypatch.setattr(TrigFlowModule, "_split", staticmethod(lambda batch: (None, None)))
    monkeypatch.undo()
    monkeypatch.setattr(TrigFlowModule, "_split", staticmethod(lambda batch: (None, None)))
    with pytest.raises(AttributeError):  # raised by Python in a frame of ours
        main(["fit", "--config", str(teacher.config)])


# --- Killed and resumed -----------------------------------------------------------------------------------------------


def differences(a, b, path=""):
    """Names of what differs between two nested structures, bit for bit."""
    if isinstance(a, torch.Tensor):
        equal = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [name for key in a for name in differences(a[key], b[key], f"{path}/{key}")]
    elif isinstance(a, list | tuple) and len(a) == len(b):
        return [name for i in range(len(a)) for name in differences(a[i], b[i], f"{path}/{i}")]
    else:
        equal = a == b
    return [] if equal else [path]


def test_killed_run_continues_bit_for_bit(teacher, tmp_path, write_config):
    """SIGKILL after a checkpoint; the resumed run ends where the unbroken one does, to the last bit.

    Distillation with dropout, gradient accumulation, averages, warm-up, schedule, validation: all that has a state.
    """

    def config(name):
        folder = tmp_path / name
        return write_config(
            folder,
            "ConsistencyDistillation",
            net={"dropout": 0.2},
            teacher_checkpoint=str(teacher.ckpt),
            optimizer={"class_path": "torch.optim.RAdam", "init_args": {"lr": 0.003}},
            lr_scheduler={
                "class_path": "torch.optim.lr_scheduler.LinearLR",
                "init_args": {"start_factor": 1.0, "end_factor": 0.1, "total_iters": 500},
            },
            callbacks=[
                {"class_path": "sclightning.callbacks.EMA", "init_args": {"half_life": 300}},
                {"class_path": "sclightning.callbacks.TangentWarmup", "init_args": {"steps": 400}},
            ],
            trainer={
                "accumulate_grad_batches": 2,
                "val_check_interval": 5,
                "check_val_every_n_epoch": None,
                "limit_val_batches": 1.0,
            },
        ), folder

    killed, folder = config("killed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "sclightning", "fit", "--config", str(killed), "--trainer.max_steps=100000"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    last, deadline = folder / "last.ckpt", time.monotonic() + 90
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, process.stderr.read().decode()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    step = torch.load(last, weights_only=True)["global_step"]
    assert step >= 3 and step % 3 == 0

    end = (step // 3 + 4) * 3
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        main(["fit", "--config", str(killed), f"--trainer.max_steps={end}", "--ckpt_path", str(last)])
        unbroken, other = config("unbroken")
        main(["fit", "--config", str(unbroken), f"--trainer.max_steps={end}"])
    finally:
        torch.set_num_threads(threads)
    resumed, expected = (torch.load(f / "last.ckpt", weights_only=True) for f in (folder, other))
    assert resumed["global_step"] == expected["global_step"] == end
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "ema", "DigitsDataModule"):
        assert resumed[key] and differences(resumed[key], expected[key], key) == []
    assert resumed["DigitsDataModule"]["position"] == end * 2 * 8
    start = torch.load(teacher.ckpt, weights_only=True)["state_dict"]["backbone.out_conv.weight"]
    assert not torch.equal(start, expected["state_dict"]["backbone.out_conv.weight"])


def test_last_finds_the_checkpoint_of_a_run(student, capsys):
    """``--ckpt_path last`` needs no path: the run of three steps goes on to six."""
    main(["fit", "--config", str(student.config), "--trainer.max_steps=6", "--ckpt_path=last"])
    assert torch.load(student.ckpt, weights_only=True)["global_step"] == 6
    assert torch.load(student.ckpt, weights_only=True)["DigitsDataModule"]["position"] == 6 * 8
