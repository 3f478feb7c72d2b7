"""A run that is resumed in the middle of an epoch sees the samples of the unbroken one, on one process and on two."""

import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch

from sclightning.data.autoencoder import CONVENTIONS
from sclightning.data.latents import posterior_noise, whiten
from sclightning.data.storage import write_metadata

pytestmark = pytest.mark.filterwarnings("ignore")

SCRIPT = """
import sys
import warnings

import lightning as L
import torch

sys.path.append(sys.argv[1])
from conftest import PlainNet, randomize
from sclightning.data.cifar10 import CIFAR10DataModule
from sclightning.data.latents import ImageNetLatentDataModule
from sclightning.modules import TrigFlowDiffusion

warnings.filterwarnings("ignore")
folder, devices = sys.argv[2], int(sys.argv[3])
options = {"accelerator": "cpu", "devices": devices, "strategy": "ddp" if devices > 1 else "auto", "logger": False}
options |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
options |= {"enable_checkpointing": False, "limit_val_batches": 0}


class Noise(CIFAR10DataModule):
    sigma_data = None  # the pixels are random, nothing to compare the model with


DATA = {
    "latents": lambda: ImageNetLatentDataModule(
        folder, image_shape=(4, 6, 6), num_classes=0, batch_size=6 // devices, seed=3
    ),
    "augmented": lambda: Noise(folder + "/cifar10", augment=0.5, batch_size=6 // devices, seed=3),
}


class Module(TrigFlowDiffusion):
    def training_step(self, batch, batch_idx):
        x_0 = batch if torch.is_tensor(batch) else batch[0]
        seen.append(x_0)
        return super().training_step(x_0, batch_idx)


def run(data, steps, ckpt_path=None):
    seen.clear()
    module = Module(randomize(PlainNet(4 if data == "latents" else 3)), 0.5)
    module.takes_augment, module.backbone.augment_dim = True, 9
    trainer = L.Trainer(**options, max_steps=steps)
    trainer.fit(module, datamodule=DATA[data](), ckpt_path=ckpt_path)
    trainer.save_checkpoint(f"{folder}/{data}-{steps}.ckpt")
    return {"seen": torch.stack(seen), "weights": torch.nn.utils.parameters_to_vector(module.parameters()).detach()}


seen, record = [], {}
for data in DATA:
    record[data] = {"unbroken": run(data, 7), "first": run(data, 4), "resumed": run(data, 7, f"{folder}/{data}-4.ckpt")}
rank = int(__import__("os").environ.get("LOCAL_RANK", 0))
torch.save(record, f"{folder}/rank{rank}.pt")
"""

N, PER_STEP = 10, 6


def write_data(folder):
    """Ten posteriors and ten CIFAR-10-like images."""
    rng = np.random.default_rng(0)
    (folder / "cifar10").mkdir()
    moments = np.concatenate([rng.normal(0, 5, (N, 4, 6, 6)), np.full((N, 4, 6, 6), 0.5)], 1).astype(np.float16)
    np.save(folder / "train_moments.npy", moments)
    np.save(folder / "train_labels.npy", np.zeros(N, np.int64))
    write_metadata(folder, "train", "moments", 0, "paper")
    np.save(folder / "cifar10" / "train_images.npy", rng.integers(0, 256, (N, 3, 32, 32), np.uint8))
    np.save(folder / "cifar10" / "train_labels.npy", np.zeros(N, np.int64))
    write_metadata(folder / "cifar10", "train", "images", 10)
    return moments


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def runs(request, tmp_path_factory):
    """Posteriors, and what each process recorded."""
    devices = request.param
    folder = tmp_path_factory.mktemp(f"devices{devices}")
    moments = write_data(folder)
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [str(script), os.path.dirname(__file__), str(folder), str(devices)]
    if devices == 1:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(sys, "argv", command)
            runpy.run_path(str(script))
    else:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *command], check=True, env=environment, timeout=600)
    return moments, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(devices)]


@pytest.mark.parametrize("data", ["latents", "augmented"])
def test_resumed_run_sees_and_learns_what_the_unbroken_one_does(runs, data):
    """To the last bit: images, augmentation, noise of the posterior, weights."""
    for record in runs[1]:
        record = record[data]
        whole, first, resumed = (record[name]["seen"] for name in ("unbroken", "first", "resumed"))
        assert len(whole) == 7 and torch.equal(torch.cat([first, resumed]), whole)
        assert torch.equal(record["resumed"]["weights"], record["unbroken"]["weights"])
        assert not torch.equal(record["first"]["weights"], record["unbroken"]["weights"])


def test_posterior_is_sampled_by_position_in_the_stream(runs):
    """Permutations of the epochs and noise of the positions, computed here, whatever the number of processes."""
    moments, records = runs
    ranks = [record["latents"]["unbroken"]["seen"].flatten(0, 1) for record in records]
    seen = torch.stack(ranks, dim=1).flatten(0, 1)  # ranks take turns
    epochs = [np.random.default_rng((3, epoch)).permutation(N) for epoch in range(5)]
    mean, std = torch.from_numpy(moments[np.concatenate(epochs)[: 7 * PER_STEP]]).float().chunk(2, dim=1)
    z = posterior_noise((4, 6, 6), 3, range(7 * PER_STEP), torch.device("cpu"))
    statistics = CONVENTIONS["paper"]
    assert torch.equal(seen, whiten(mean + std * z, statistics.mean, statistics.std))
    # The second visit of a posterior draws another sample of it.
    visits = [int(np.flatnonzero(epoch == 0)[0]) + N * i for i, epoch in enumerate(epochs[:2])]
    assert not (seen[visits[0]] == seen[visits[1]]).any()
