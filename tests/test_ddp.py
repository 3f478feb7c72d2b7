"""Two processes: each draws its own noise, both keep the same weights, and together they sample what one does."""

import json
import math
import os
import runpy
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from torchvision.io import read_image

from sclightning.callbacks.tangent_monitor import TERMS
from sclightning.data import DigitsDataModule
from sclightning.data.arrays import EndlessSampler, from_uint8

pytestmark = pytest.mark.filterwarnings("ignore")

SCRIPT = """
import os
import signal
import sys
import warnings

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

sys.path.append(sys.argv[1])
from conftest import TINY, randomize
from sclightning.backbones import DDPMpp
from sclightning.callbacks import EMA, FIDEvaluation, GradientNorm, SampleGrid, SampleWriter, TangentMonitor
from sclightning.callbacks.tangent_monitor import tangent_norms
from sclightning.data import DigitsDataModule
from sclightning.metrics import ClassifierFeatures
from sclightning.modules import ConsistencyTraining

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
folder, classifier, devices = sys.argv[2], sys.argv[3], int(sys.argv[4])


class Module(ConsistencyTraining):
    def training_step(self, batch, batch_idx):
        with self._draw(batch[0], batch_idx) as (z, t):
            record["noise"].append(z), record["times"].append(t), record["images"].append(batch[0])
        record["tangents"].append(tangent_norms(self, batch, batch_idx)[1])
        return super().training_step(batch, batch_idx)


class Weights(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        vector = torch.nn.utils.parameters_to_vector
        record["gradients"].append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]))
        record["weights"].append(vector(pl_module.parameters()).detach().clone())
        if trainer.global_step == 3:  # as if the second process had left out one of its four samples
            pl_module._nonfinite = pl_module._nonfinite + trainer.global_rank


record = {"noise": [], "times": [], "images": [], "tangents": [], "gradients": [], "weights": []}
module = Module(
    randomize(DDPMpp(**TINY, dropout=0.1)), sigma_data=0.752, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3)
)
extras = ["inception_score", "precision_recall"]
fid = FIDEvaluation(ClassifierFeatures(classifier, num_features=16), extras=extras, seeds=[0, 1], save="npz")
options = {"accelerator": "cpu", "devices": devices, "strategy": "ddp" if devices > 1 else "auto", "logger": False}
options |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
data = DigitsDataModule(batch_size=4, num_val_samples=5, num_test_samples=18, sample_batch_size=4)

instruments = [TangentMonitor(every_n_steps=3, bins=2), GradientNorm()]
trainer = L.Trainer(
    **options | {"logger": CSVLogger(folder, "", "")}, log_every_n_steps=1,
    max_steps=3, val_check_interval=3, check_val_every_n_epoch=None, num_sanity_val_steps=0,
    callbacks=[EMA(half_life=20), SampleGrid(1, 3), Weights(), *instruments],
)
trainer.fit(module, datamodule=data)
trainer.save_checkpoint(f"{folder}/run.ckpt")


class Signal(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3 and trainer.global_rank == devices - 1:
            os.kill(os.getpid(), signal.SIGTERM)


signalled = L.Trainer(**options, max_steps=9, callbacks=[Signal()], enable_checkpointing=False)
try:
    signalled.fit(ConsistencyTraining(randomize(DDPMpp(**TINY)), sigma_data=0.752), datamodule=data)
except SIGTERMException:
    record["stopped"] = signalled.global_step
torch.save(record, f"{folder}/rank{trainer.global_rank}.pt")

module.backbone = randomize(DDPMpp(**TINY), 3)  # the same network whatever was trained before, in shades of grey
with torch.no_grad():
    for p in module.backbone.out_conv.parameters():
        p.mul_(0.1)
tester = L.Trainer(**options, enable_checkpointing=False, callbacks=[fid, SampleWriter(f"{folder}/made")])
tester.test(module, datamodule=data, verbose=False)
tester.predict(module, datamodule=data, return_predictions=False)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, classifier_file):
    """The script in one process and in two; what each process recorded."""
    found, tests = {}, os.path.dirname(__file__)
    for devices in (2, 1):
        folder = tmp_path_factory.mktemp(f"devices{devices}")
        script = folder / "script.py"
        script.write_text(SCRIPT)
        command = [str(script), tests, str(folder), str(classifier_file), str(devices)]
        # Each makes its own reference: the second must not find that of the first.
        environment = {"TORCH_HOME": str(folder), "OMP_NUM_THREADS": "1"}
        if devices == 1:
            threads = torch.get_num_threads()
            with pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.setattr(sys, "argv", command)
                monkeypatch.setenv("TORCH_HOME", str(folder))
                runpy.run_path(str(script))
            torch.set_num_threads(threads)
        else:
            subprocess.run([sys.executable, *command], check=True, env=os.environ | environment, timeout=120)
        ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(devices)]
        found[devices] = folder, ranks
    return found


def test_ranks_draw_different_noise_and_times(runs):
    """No value in common; rank 0 of two draws what one process draws."""
    (first, second), (alone,) = runs[2][1], runs[1][1]
    for key in ("noise", "times"):
        for a, b, c in zip(first[key], second[key], alone[key], strict=True):
            assert not (a == b).any() and torch.equal(a, c)


def test_ranks_share_one_stream_of_images(runs):
    """Rank r sees every second image, and together they see the stream in order."""
    first, second = (torch.cat(rank["images"]) for rank in runs[2][1])
    data = DigitsDataModule().split("train")
    order = list(islice(EndlessSampler(data, 1, 0, 0, lambda: 0), 24))
    expected = from_uint8(torch.from_numpy(data.images[order]))
    assert torch.equal(first, expected[0::2]) and torch.equal(second, expected[1::2])


def test_ranks_keep_the_same_weights(runs):
    """Gradients and weights agree bit for bit after every step, and are not those of one process."""
    (first, second), (alone,) = runs[2][1], runs[1][1]
    assert len(first["weights"]) == 3
    for key in ("gradients", "weights"):
        for a, b, c in zip(first[key], second[key], alone[key], strict=True):
            assert torch.equal(a, b) and not torch.equal(a, c)
    assert not torch.equal(first["weights"][0], first["weights"][1])


def test_a_signal_to_one_process_stops_both_before_the_same_batch(runs):
    """The second process gets it after its third step; a process alone ends at once, as Lightning has it."""
    assert [rank["stopped"] for rank in runs[2][1]] == [4, 4]
    assert runs[1][1][0]["stopped"] == 3


def test_instruments_measure_over_both_processes(runs):
    """The bins of the tangent take the samples of both, not the mean of two means; the gradient is the averaged one."""
    for folder, ranks in runs.values():
        header, *lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
        rows = [{name: float(value) for name, value in zip(header, line, strict=True) if value} for line in lines]
        found = {name: value for row in rows if row["step"] == 2 for name, value in row.items()}
        t, norms = (torch.cat([rank[key][2] for rank in ranks]) for key in ("times", "tangents"))
        for label, inside in (("t0.00-0.79", t < math.pi / 4), ("t0.79-1.57", t >= math.pi / 4)):
            for i, term in enumerate(TERMS):
                mean = [norms[inside, i].mean().item()] if inside.any() else []
                tag = f"tangent/{term}/{label}"
                assert ([found[tag]] if tag in found else []) == pytest.approx(mean, rel=1e-5)
        assert sum(name.startswith("tangent/norm/") for name in found) == (2 if len(ranks) == 2 else 1)
        assert found["nonfinite_samples"] == (len(ranks) - 1) / 8
        assert found["gradient_norm"] == pytest.approx(ranks[0]["gradients"][2].norm().item(), rel=1e-5)


def test_images_are_counted_over_both_processes(runs):
    """The stream's position after three steps of four images on each process."""
    for devices in (1, 2):
        checkpoint = torch.load(runs[devices][0] / "run.ckpt", weights_only=True)
        assert checkpoint["DigitsDataModule"] == {"position": 12 * devices, "batches": 3}


def test_two_processes_measure_what_one_does(runs):
    """Samples, reference and distances to the last bit, from five batches, which do not divide by two."""
    results, samples, references = [], [], []
    for folder, _ in runs.values():
        (path,) = folder.glob("*fd_classifier*.json")
        results.append(json.loads(path.read_text())["runs"])
        samples.append([np.load(path)["arr_0"] for path in sorted(folder.glob("*seed[01].npz"))])
        (path,) = (folder / "sclightning").iterdir()
        references.append(dict(np.load(path)))
    for one, two in zip(*results, strict=True):
        assert one["samples"] == two["samples"] == 18
        same = [name for name in one if name not in ("images_per_second", "seconds")]
        assert len(same) == 10 and {name: one[name] for name in same} == {name: two[name] for name in same}
        assert one["fd_classifier"] > 0.01
    assert [run["seed"] for run in results[0]] == [0, 1]
    for one, two in zip(*samples, strict=True):
        assert one.shape == (18, 8, 8, 1) and np.array_equal(one, two) and one.std() > 5
    assert not np.array_equal(*samples[0])
    for name, value in references[0].items():
        assert np.array_equal(value, references[1][name])


def test_two_processes_write_the_pictures_of_one(runs):
    """Every sample once, the same picture."""
    folders = [folder / "made" for folder, _ in runs.values()]
    for i in range(18):
        one, two = (read_image(str(folder / f"{i:06d}.png")) for folder in folders)
        assert torch.equal(one, two)
    assert all(len(list(folder.iterdir())) == 18 for folder in folders)


def test_grid_is_written_once_by_two_processes(runs):
    """The picture during training does not make the other process wait for ever."""
    for folder, _ in runs.values():
        assert [path.name for path in folder.rglob("step_*.png")] == ["step_0000003.png"]
