"""Tiny networks, files and configs that the tests of the Lightning side share."""

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from sclightning.backbones import DDPMpp
from sclightning.metrics import ClassifierFeatures

TINY = {"resolution": 8, "in_channels": 1, "channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
TINY |= {"attention_resolutions": [4], "num_classes": 10}


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def randomize(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that depend on the seed only, not on torch's version, and none at its (often zero) initial value."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for p in network.parameters():
            noise = torch.from_numpy(rng.standard_normal(p.shape)).float()
            p.copy_(1 + 0.3 * noise if p.ndim < 2 else noise * p[0].numel() ** -0.5)
    return network


class Unpickled:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("code has run",)


class PlainNet(nn.Module):
    """A network that is not ours: ``F = net(x, t)``, no labels, two small layers."""

    def __init__(self, channels: int = 1):
        super().__init__()
        self.conv0, self.conv1 = nn.Conv2d(channels, 4, 3, padding=1), nn.Conv2d(4, channels, 3, padding=1)

    def forward(self, x, t):
        return self.conv1(torch.tanh(self.conv0(x) + t.cos()[:, None, None, None]))


@pytest.fixture(scope="session", autouse=True)
def torch_home(tmp_path_factory):
    """References of one session of tests do not outlive it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch_home")))
        yield


@pytest.fixture
def make_net():
    """Factory of a tiny DDPM++ for 8x8 images with 10 classes."""
    return lambda seed=0, **options: randomize(DDPMpp(**TINY | options), seed)


@pytest.fixture
def make_plain_net():
    """Factory of the network that is not ours."""
    return lambda seed=0, **options: randomize(PlainNet(**options), seed)


@pytest.fixture(scope="session")
def classifier_file(tmp_path_factory):
    """Weights of an untrained classifier."""
    path = tmp_path_factory.mktemp("classifier") / "classifier.pt"
    torch.save(randomize(ClassifierFeatures(num_features=16)).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory):
    """Folder of an untrained autoencoder in diffusers' layout: 3 channels to 4, half the resolution."""
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = diffusers.AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4, **blocks)
    rng = np.random.default_rng(5)
    with torch.no_grad():
        for p in vae.parameters():
            if p.ndim > 1:
                p.copy_(torch.from_numpy(rng.standard_normal(p.shape)).float() * p[0].numel() ** -0.5)
    path = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(path)
    return str(path)


@pytest.fixture
def batch():
    """Eight images of standard deviation 0.75 with labels."""
    rng = np.random.default_rng(1)
    return torch.from_numpy(0.75 * rng.standard_normal((8, 1, 8, 8))).float(), torch.arange(8)


@pytest.fixture
def quiet():
    """Trainer arguments of a short run on the CPU that writes nothing of its own accord."""
    return {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }


@pytest.fixture(scope="session")
def write_config(tmp_path_factory):
    """Writer of complete run configs: ``write_config(folder, model, init_args, callbacks)`` gives the file's path."""

    def write(folder, model="TrigFlowDiffusion", net=None, callbacks=(), trainer=None, data=None, **init_args):
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "model": {
                "class_path": f"sclightning.modules.{model}",
                "init_args": {
                    "backbone": {"class_path": "sclightning.backbones.DDPMpp", "init_args": TINY | (net or {})},
                    "sigma_data": 0.752,
                    **init_args,
                },
            },
            "data": {
                "class_path": "sclightning.data.DigitsDataModule",
                "init_args": {"batch_size": 8, "num_val_samples": 4, "num_test_samples": 20, **(data or {})},
            },
            "trainer": {
                "accelerator": "cpu",
                "max_steps": 3,
                "limit_val_batches": 0,
                "num_sanity_val_steps": 0,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": str(folder), "name": "", "version": ""},
                },
                "default_root_dir": str(folder),
                "callbacks": [
                    *callbacks,
                    {
                        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                        "init_args": {"dirpath": str(folder), "save_last": True, "save_top_k": 0}
                        | {"every_n_train_steps": 3, "enable_version_counter": False},
                    },
                ],
                **(trainer or {}),
            },
        }
        path = folder / "run.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write
