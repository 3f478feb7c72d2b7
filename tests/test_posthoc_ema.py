"""Post-hoc EMA: profiles by quadrature, a run beside ema-pytorch's, resuming, shards, the command."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sclightning.callbacks import EMA, PostHocEMA
from sclightning.callbacks.ema import power_exponent
from sclightning.callbacks.posthoc_ema import profile_product, reconstruct, solve_profile
from sclightning.data import DigitsDataModule
from sclightning.modules import TrigFlowDiffusion

pytestmark = pytest.mark.filterwarnings("ignore")
B = 4


def profile(tau, t, gamma):
    return np.where(tau <= t, (gamma + 1) * np.minimum(tau, t) ** gamma / t ** (gamma + 1), 0)


# --- The solution -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t_a", "t_b"), [(0.4, 1.0), (1.0, 0.4), (0.7, 0.7)])
def test_profile_product_is_the_integral(t_a, t_b):
    """Against quadrature on a fine grid."""
    tau = (np.arange(400_000) + 0.5) / 400_000
    integral = (profile(tau, t_a, 16.97) * profile(tau, t_b, 6.94)).mean()
    assert profile_product(t_a, 16.97, t_b, 6.94) == pytest.approx(integral, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.075, 0.2])
@pytest.mark.parametrize("end", [12, 9])
def test_solution_is_ema_pytorchs(sigma_rel, end):
    """Their solution of the same system, and the distance of the profiles on a grid."""
    theirs = pytest.importorskip("ema_pytorch.post_hoc_ema")
    times = [float(t) for t in range(1, 13) for _ in range(2)]
    gammas = [power_exponent(s) for _ in range(12) for s in (0.05, 0.10)]
    x, error = solve_profile(times, gammas, end, power_exponent(sigma_rel))
    column = lambda values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    gamma = theirs.sigma_rel_to_gamma(sigma_rel)
    expected = theirs.solve_weights(column(times), column(gammas), column([float(end)]), column([gamma]))
    np.testing.assert_allclose(x, expected.squeeze(1).numpy(), rtol=1e-9, atol=1e-12)
    tau = 12 * (np.arange(400_000) + 0.5) / 400_000
    wanted = profile(tau, end, gamma)
    difference = sum(c * profile(tau, t, g) for c, t, g in zip(x, times, gammas, strict=True)) - wanted
    assert error == pytest.approx(math.sqrt((difference**2).sum() / (wanted**2).sum()), abs=1e-4)
    assert (error < 1e-6) == (sigma_rel == 0.05)  # one of the stored ones, and nothing else is exact


# --- A run ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def loader():
    """Images without labels, 64 batches of 4."""
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((256, 1, 8, 8))).float()
    return DataLoader(images, batch_size=B)


def make_module(make_plain_net):
    """A module whose weights move a lot in each step."""
    return TrigFlowDiffusion(make_plain_net(), sigma_data=0.75, optimizer=lambda p: torch.optim.Adam(p, lr=0.1))


def fit(module, quiet, folder, loader, *callbacks, max_steps, ckpt_path=None, **options):
    options = {**quiet, **options, "max_steps": max_steps, "default_root_dir": folder, "callbacks": [*callbacks]}
    trainer = L.Trainer(**options)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def snapshot(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["about"])  # noqa: SIM118


def load(path):
    return torch.load(path, weights_only=True)["state_dict"]


class Images(DigitsDataModule):
    """Digits without labels, in an order that resuming continues."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0].float() / 127.5 - 1


class Theirs(L.Callback):
    """ema-pytorch's PostHocEMA on the same weights, its clock set to the paper's: the first update is at t = 1."""

    def __init__(self, folder):
        self.folder = str(folder)

    def on_train_start(self, trainer, pl_module):
        from ema_pytorch import PostHocEMA

        self.ema = PostHocEMA(
            pl_module.backbone,
            sigma_rels=(0.05, 0.10),
            update_every=1,
            checkpoint_every_num_steps="manual",
            checkpoint_folder=self.folder,
            checkpoint_dtype=torch.float32,
        )
        for ema in self.ema.ema_models:
            ema.step -= 1

    def on_train_batch_end(self, trainer, *_):
        self.ema.update()
        if trainer.global_step % 5 == 0:
            self.ema.ema_models[0].step += 1  # the file's name, and with it the time of the snapshot
            self.ema.checkpoint()
            self.ema.ema_models[0].step -= 1


@pytest.mark.parametrize("sigma_rel", [0.05, 0.07, 0.15])
def test_reconstruction_is_ema_pytorchs(make_plain_net, quiet, tmp_path, loader, sigma_rel):
    """The same run, their callback beside ours: the same snapshots, the same average of a third length."""
    pytest.importorskip("ema_pytorch")
    module, theirs = make_module(make_plain_net), Theirs(tmp_path / "theirs")
    ours = PostHocEMA(every_n_steps=5, dtype="float32")
    trainer = fit(module, quiet, tmp_path, loader, ours, theirs, max_steps=30)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    tensors, about = snapshot(tmp_path / "posthoc_ema" / "step_000000020.safetensors")
    assert about == {"step": 20, "images": 20 * B, "sigma_rels": [0.05, 0.1]}
    for i, width in enumerate((0.05, 0.1)):
        expected = torch.load(tmp_path / "theirs" / f"{i}.20.pt", weights_only=True)
        for name, _ in module.backbone.named_parameters():
            torch.testing.assert_close(tensors[f"{width}/{name}"], expected[f"ema_model.{name}"], rtol=1e-5, atol=1e-6)

    reconstruct(ckpt_path=str(tmp_path / "last.ckpt"), sigma_rel=sigma_rel, output=str(tmp_path / "ema.ckpt"))
    state, expected = load(tmp_path / "ema.ckpt"), theirs.ema.synthesize_ema_model(sigma_rel=sigma_rel).ema_model
    for name, weight in expected.named_parameters():
        torch.testing.assert_close(state[f"backbone.{name}"], weight.detach(), rtol=1e-5, atol=1e-5)
        assert (state[f"backbone.{name}"] - module.backbone.get_parameter(name)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_reconstruction_is_the_average_that_was_not_kept(make_plain_net, quiet, tmp_path, loader, dtype):
    """An average of another length kept during the run, and the one made afterwards from snapshots."""
    module, direct = make_module(make_plain_net), EMA(sigma_rel=0.08)
    fit(module, quiet, tmp_path, loader, PostHocEMA(every_n_steps=4, dtype=dtype), direct, Save(48), max_steps=48)
    reconstruct(ckpt_path=str(tmp_path / "step48.ckpt"), sigma_rel=0.08, output=str(tmp_path / "ema.ckpt"))
    tensors, _ = snapshot(tmp_path / "posthoc_ema" / "step_000000048.safetensors")
    vector = lambda state, prefix: torch.cat([v.float().flatten() for k, v in state.items() if k.startswith(prefix)])  # noqa: E731
    kept, made = (vector(load(tmp_path / name), "backbone.") for name in ("step48.ckpt", "ema.ckpt"))
    stored = min((vector(tensors, f"{width}/") - kept).norm() for width in (0.05, 0.1))
    assert stored > 0.01 * kept.norm() and (made - kept).norm() < 0.03 * stored
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("callbacks", [[], [EMA(sigma_rel=0.08)]])
def test_reconstruction_has_all_names_of_a_shared_parameter(make_plain_net, quiet, tmp_path, loader, callbacks):
    net = make_plain_net()
    net.twin = net.conv0
    module = TrigFlowDiffusion(net, sigma_data=0.75, optimizer=lambda p: torch.optim.Adam(p, lr=0.1))
    fit(module, quiet, tmp_path, loader, PostHocEMA(every_n_steps=4), *callbacks, Save(16), max_steps=16)
    reconstruct(ckpt_path=str(tmp_path / "step16.ckpt"), sigma_rel=0.07, output=str(tmp_path / "ema.ckpt"))
    before, after = load(tmp_path / "step16.ckpt"), load(tmp_path / "ema.ckpt")
    assert torch.equal(after["backbone.twin.weight"], after["backbone.conv0.weight"])
    assert not torch.equal(after["backbone.twin.weight"], before["backbone.twin.weight"])


def test_an_average_may_end_earlier(make_plain_net, quiet, tmp_path, loader, capsys):
    """``step``: of a stored width it is that snapshot, and what came later does not count."""
    fit(make_module(make_plain_net), quiet, tmp_path, loader, PostHocEMA(every_n_steps=4), Save(16), max_steps=16)
    ckpt_path = str(tmp_path / "step16.ckpt")
    reconstruct(ckpt_path=ckpt_path, sigma_rel=0.1, step=8)
    assert "sigma_rel 0.1 that ends at step 8, from 4 snapshots; its profile is met to 0.0%" in capsys.readouterr().out
    tensors, _ = snapshot(tmp_path / "posthoc_ema" / "step_000000008.safetensors")
    for name, weight in load(tmp_path / "sigma_rel0.1_step16.ckpt").items():
        if name.startswith("backbone."):
            expected = tensors[f"0.1/{name.removeprefix('backbone.')}"].float()
            torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"no snapshot of step 7; give --step one of 4, 8, 12, 16\."):
        reconstruct(ckpt_path=ckpt_path, sigma_rel=0.1, step=7)


class Save(L.Callback):
    """Saves a checkpoint at a step; dies at another."""

    def __init__(self, step, die=None):
        self.step, self.die = step, die

    def on_train_batch_end(self, trainer, *_):
        path = Path(trainer.default_root_dir) / f"step{self.step}.ckpt"
        if trainer.global_step == self.step and not path.exists():  # gradients being accumulated are not saved
            trainer.save_checkpoint(path)
        if trainer.global_step == self.die:
            raise InterruptedError


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_run_writes_the_snapshots_of_an_unbroken_one(make_plain_net, quiet, tmp_path, write_config, accumulate):
    """A run that dies after a snapshot, behind its last checkpoint: bit for bit the files of one that did not."""

    def go(folder, max_steps=8, ckpt_path=None, **save):
        options = {**quiet, "accumulate_grad_batches": accumulate, "max_steps": max_steps, "default_root_dir": folder}
        callbacks = [PostHocEMA(every_n_steps=2), EMA(decay=0.9), Save(3, **save)]
        trainer = L.Trainer(**options, callbacks=callbacks)
        trainer.fit(make_module(make_plain_net), datamodule=Images(batch_size=B), ckpt_path=ckpt_path)

    go(tmp_path / "unbroken")
    with pytest.raises(InterruptedError):
        go(tmp_path / "broken", die=5)
    assert len(list((tmp_path / "broken" / "posthoc_ema").iterdir())) == 2
    torch.save({}, tmp_path / "broken" / "posthoc_ema" / "step_000000004.safetensors")  # it must be written again
    go(tmp_path / "broken", ckpt_path=tmp_path / "broken" / "step3.ckpt")
    unbroken, broken = (sorted((tmp_path / run / "posthoc_ema").iterdir()) for run in ("unbroken", "broken"))
    assert [path.name for path in unbroken] == [path.name for path in broken] and len(unbroken) == 4
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(unbroken, broken, strict=True))
    # Snapshots behind the checkpoint are not those of this checkpoint's run.
    reconstruct(ckpt_path=str(tmp_path / "broken" / "step3.ckpt"), sigma_rel=0.05)
    assert torch.load(tmp_path / "broken" / "sigma_rel0.05_step3.ckpt", weights_only=True)["average"]["snapshots"] == 1


def test_snapshots_of_another_run_are_not_overwritten(make_plain_net, quiet, tmp_path, loader):
    """A fresh start in the same folder is refused before it has written anything."""
    fit(make_module(make_plain_net), quiet, tmp_path, loader, PostHocEMA(every_n_steps=2), max_steps=2)
    (path,) = (tmp_path / "posthoc_ema").iterdir()
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"snapshots of an earlier run; move them away") as error:
        fit(make_module(make_plain_net), quiet, tmp_path, loader, PostHocEMA(every_n_steps=1), max_steps=2)
    assert "\n" not in str(error.value) and path.read_bytes() == before


def test_training_is_not_changed(make_plain_net, quiet, tmp_path, loader):
    """With and without: the same weights."""
    finals = []
    for callbacks in ([], [PostHocEMA(every_n_steps=2)]):
        module = make_module(make_plain_net)
        fit(module, quiet, tmp_path, loader, *callbacks, max_steps=5)
        finals.append(torch.nn.utils.parameters_to_vector(module.backbone.parameters()))
    assert torch.equal(*finals)


# --- What is refused --------------------------------------------------------------------------------------------------


def test_two_widths_are_needed():
    with pytest.raises(ValueError, match=r"widths \[0\.1, 0\.1\]; give two different ones"):
        PostHocEMA(sigma_rels=(0.1, 0.1))


def test_two_emas_are_refused(make_plain_net, quiet, tmp_path, loader):
    """They would overwrite each other in the checkpoint."""
    with pytest.raises(ValueError, match=r"two EMA callbacks.*PostHocEMA") as error:
        fit(make_module(make_plain_net), quiet, tmp_path, loader, EMA(decay=0.9), EMA(decay=0.8), max_steps=1)
    assert "\n" not in str(error.value)


def test_resuming_with_other_widths_is_refused(make_plain_net, quiet, tmp_path, loader):
    fit(make_module(make_plain_net), quiet, tmp_path, loader, PostHocEMA(every_n_steps=2), Save(2), max_steps=2)
    other = PostHocEMA(sigma_rels=(0.05, 0.2))
    with pytest.raises(ValueError, match=r"no average of sigma_rel 0\.2; resume with the sigma_rels"):
        fit(make_module(make_plain_net), quiet, tmp_path, loader, other, max_steps=3, ckpt_path=tmp_path / "step2.ckpt")


def test_snapshots_that_do_not_belong_or_are_not_there_are_refused(make_plain_net, quiet, tmp_path, loader):
    """No snapshots, those of another network, an overflow of half precision: a sentence each."""
    module, callback = make_module(make_plain_net), PostHocEMA(every_n_steps=1)
    with torch.no_grad():
        module.backbone.conv0.bias.fill_(1e6)
    fit(module, quiet, tmp_path, loader, callback, Save(2), max_steps=2)
    for match, options in (
        (r"posthoc_ema has no snapshot up to the checkpoint's step 2", {"snapshots": str(tmp_path / "no/posthoc_ema")}),
        (r"not finite.*dtype float32", {}),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=match) as error:
            reconstruct(ckpt_path=str(tmp_path / "step2.ckpt"), sigma_rel=0.05, **options)
        assert "\n" not in str(error.value)
    other = TrigFlowDiffusion(make_plain_net(channels=2), sigma_data=0.75)
    trainer = L.Trainer(**quiet, default_root_dir=tmp_path)
    trainer.strategy.connect(other)
    trainer.fit_loop.epoch_loop.batch_progress.increment_completed()
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    checkpoint = torch.load(tmp_path / "other.ckpt", weights_only=True) | {"global_step": 2}
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"of another network than .*first backbone\.conv0\.weight"):
        reconstruct(ckpt_path=str(tmp_path / "other.ckpt"), sigma_rel=0.05)
    assert not list(tmp_path.glob("*sigma_rel*"))


# --- The command ------------------------------------------------------------------------------------------------------


def test_command_makes_a_checkpoint_like_any_other(tmp_path, write_config, capsys):
    """``fit``, ``ema``, then ``predict`` from the result and a student that starts from it."""
    from sclightning.cli import main

    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}
    callbacks = [
        {"class_path": "sclightning.callbacks.EMA", "init_args": {"decay": 0.5}},
        {"class_path": "sclightning.callbacks.PostHocEMA", "init_args": {"every_n_steps": 1}},
    ]
    config = write_config(tmp_path / "teacher", optimizer=adam, callbacks=callbacks)
    main(["fit", "--config", str(config)])
    last = tmp_path / "teacher" / "last.ckpt"
    main(["ema", "--ckpt_path", str(last), "--sigma_rel", "0.07"])
    made = tmp_path / "teacher" / "sigma_rel0.07_last.ckpt"
    assert str(made) in capsys.readouterr().out
    state, before = load(made), load(last)
    assert state.keys() == before.keys()
    moved = [name for name in state if not torch.equal(state[name], before[name])]
    assert moved and all(name.startswith("backbone.") for name in moved)
    main(["predict", "--config", str(config), "--ckpt_path", str(made), "--samples.folder", str(tmp_path / "out")])
    assert len(list((tmp_path / "out").iterdir())) == 20
    module = L.LightningModule.load_from_checkpoint(made)
    assert torch.equal(module.backbone.out_conv.weight, state["backbone.out_conv.weight"])

    options = {"teacher_checkpoint": str(made), "optimizer": adam | {"init_args": {"lr": 0.0}}}
    main(["fit", "--config", str(write_config(tmp_path / "student", "ConsistencyDistillation", **options))])
    student = load(tmp_path / "student" / "last.ckpt")
    assert torch.equal(student["backbone.out_conv.weight"], state["backbone.out_conv.weight"])
    with pytest.raises(SystemExit):
        main(["ema", "--ckpt_path", str(last), "--sigma_rel", "0.3"])
    assert "sclightning: error: sigma_rel is 0.3" in capsys.readouterr().err


# --- Shards -----------------------------------------------------------------------------------------------------------


def worker(folder):
    """A run with FSDP2 on two processes, and the end of it again from its sharded checkpoint."""
    import torch.distributed as dist
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    class Sharded(TrigFlowDiffusion):
        def configure_model(self):
            if not any(isinstance(p, DTensor) for p in self.parameters()):
                for part in (*self.backbone, self.backbone, self.adaptive_weight):
                    fully_shard(part, mesh=self.device_mesh["data_parallel"])

    class ByHand(L.Callback):
        """The averages by their recursion, in float64 from weights that were put together."""

        def __init__(self):
            self.averages = {}

        def on_train_batch_end(self, trainer, pl_module, *_):
            for width in (0.05, 0.1):
                rate = (1 - 1 / trainer.global_step) ** (power_exponent(width) + 1)
                for name, weight in pl_module.backbone.named_parameters():
                    weight, key = weight.full_tensor().detach().double(), f"{width}/{name}"
                    self.averages[key] = self.averages.get(key, weight) * rate + weight * (1 - rate)

    class Net(torch.nn.Sequential):
        def __init__(self):
            super().__init__(torch.nn.Conv2d(1, 6, 3, padding=1), torch.nn.Conv2d(6, 1, 3, padding=1))

        def forward(self, x, t):
            return super().forward(x + t[:, None, None, None])

    def run(ckpt_path=None):
        torch.manual_seed(0)
        module = Sharded(Net(), sigma_data=0.75, optimizer=lambda p: torch.optim.Adam(p, lr=0.1))
        callback, by_hand = PostHocEMA(every_n_steps=2, dtype="float32"), ByHand()
        options = {"accelerator": "cpu", "devices": 2, "logger": False, "enable_checkpointing": False, "max_steps": 4}
        options |= {"limit_val_batches": 0, "num_sanity_val_steps": 0, "default_root_dir": folder}
        options |= {"enable_progress_bar": False, "enable_model_summary": False}
        strategy = ModelParallelStrategy(tensor_parallel_size=1, data_parallel_size=2)
        trainer = L.Trainer(**options, strategy=strategy, callbacks=[callback, by_hand, Save(3)])
        trainer.fit(module, datamodule=Images(batch_size=B), ckpt_path=ckpt_path)
        assert all(isinstance(a, DTensor) for ema in callback.averages.values() for a in ema._average.values())
        dist.barrier()  # the first process has written
        return by_hand.averages

    last = folder / "posthoc_ema" / "step_000000004.safetensors"
    by_hand = run()
    (tensors, about), unbroken = snapshot(last), last.read_bytes()
    assert about["images"] == 4 * B * 2 and tensors.keys() == by_hand.keys()
    for key, average in by_hand.items():
        torch.testing.assert_close(tensors[key].double(), average, rtol=1e-5, atol=1e-6)
    dist.barrier()
    if dist.get_rank() == 0:
        last.unlink()
    run(folder / "step3.ckpt")
    assert last.read_bytes() == unbroken
    print("worker is done", flush=True)
    dist.barrier()
    os._exit(0)  # torch's own teardown after FSDP2 aborts now and then


def test_sharded_run_writes_whole_snapshots_and_resumes(tmp_path):
    """FSDP2 on two processes with gloo: averages by their recursion, resuming, the command on a sharded checkpoint."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    path = os.pathsep.join(str(Path(__file__).parents[n]) for n in (0, 1))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    run = subprocess.run(
        [*command, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=180
    )
    assert run.returncode == 0 and run.stdout.count("worker is done") == 2, run.stdout + run.stderr

    assert (tmp_path / "step3.ckpt").is_dir()
    reconstruct(ckpt_path=str(tmp_path / "step3.ckpt"), sigma_rel=0.05, output=str(tmp_path / "ema.ckpt"))
    assert not [key for key in torch.load(tmp_path / "ema.ckpt", weights_only=True) if "optimizer" in key]
    tensors, _ = snapshot(tmp_path / "posthoc_ema" / "step_000000002.safetensors")
    for name, weight in load(tmp_path / "ema.ckpt").items():
        if name.startswith("backbone."):
            torch.testing.assert_close(weight, tensors[f"0.05/{name.removeprefix('backbone.')}"], rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
