"""DDP and FSDP2 under Lightning's Trainer, two processes with gloo: gradients, weights, averages, checkpoints.

One launch of two processes does all checks (``python test_parallelize.py FOLDER``) and leaves its verdicts in FOLDER;
the tests read them. One process then resumes what two have saved.
"""

import os
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from conftest import TINY, PlainNet, randomize
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sclightning.backbones import EDM2, DDPMpp
from sclightning.callbacks import EMA, GradientNorm, TangentMonitor
from sclightning.callbacks.tangent_monitor import TERMS, tangent_norms
from sclightning.modules import (
    ConsistencyDistillation,
    ConsistencyTraining,
    DiscreteConsistencyDistillation,
    EasyConsistencyTuning,
    MultistepConsistencyDistillation,
    TrigFlowDiffusion,
    VariationalScoreDistillation,
)
from sclightning.modules.consistency import load_backbone
from sclightning.parallelize import blocks, checkpoint_blocks, full, is_sharded, local, shard_like

pytestmark = pytest.mark.filterwarnings("ignore")
SD = 0.5
TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def network(seed=0, **options):
    return randomize(EDM2(**TINY | {"channels": 8, "head_channels": 8, "dropout": 0.2} | options), seed)


def make(model, **options):
    optimizer = lambda p: torch.optim.Adam(p, lr=1e-2, eps=0.1)  # noqa: E731 - so large that rounding stays small
    if issubclass(model, ConsistencyDistillation):
        options["teacher"] = network(1)
    module = model(network(segments=options.get("segments", 1)), sigma_data=SD, optimizer=optimizer, **options)
    if model is VariationalScoreDistillation:
        randomize(module.fake, 2)  # unlike the student, as after some steps
        module._normalize_weights()
    return module


def part(rank, batches=6):
    """The batches of a process: two images each, with labels."""
    torch.manual_seed(7)
    x, label = SD * torch.randn(2, batches * 2, 1, 8, 8), torch.arange(batches * 4).view(2, -1) % 10
    return DataLoader(TensorDataset(x[rank], label[rank]), batch_size=2)


class Record(L.Callback):
    """Whole gradients of every step, and after step ``save_at`` two checkpoints and what they must hold."""

    def __init__(self, save_at=None, folder=None):
        self.gradients, self.save_at, self.folder = [], save_at, folder

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        parameters = [p for p in pl_module.parameters() if p.requires_grad]
        self.gradients.append([full(p.grad).clone() for p in parameters])

    def on_train_batch_end(self, trainer, pl_module, *_):
        if self.save_at == trainer.global_step:
            trainer.save_checkpoint(self.folder / f"{type(trainer.strategy).__name__}.ckpt")
            if trainer.is_global_zero or trainer.world_size > 1:
                state = state_of(trainer, pl_module)
            if trainer.is_global_zero:
                torch.save(state, self.folder / f"{type(trainer.strategy).__name__}.state")


def state_of(trainer, module):
    """Weights in training, averages and Adam's first moments, whole."""
    ema = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)
    moments = trainer.optimizers[0].state
    return {
        "weights": {n: full(p.detach()).clone() for n, p in module.backbone.named_parameters()},
        "averages": {} if ema is None else {n: full(a).clone() for n, a in ema._average.items()},
        "moments": {n: full(moments[p]["exp_avg"]).clone() for n, p in module.backbone.named_parameters()},
    }


class Keep(L.Callback):
    """State right after resuming, before any further step."""

    def on_train_start(self, trainer, pl_module):
        self.state = state_of(trainer, pl_module)


def fit(module, strategy, callbacks=(), steps=1, loader=None, ckpt=None, **options):
    rank, devices = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_steps=steps, callbacks=list(callbacks),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, **{"logger": False} | options,
    )  # fmt: skip
    trainer.fit(module, part(rank) if loader is None else loader, ckpt_path=ckpt)
    return trainer


def sharding(folder=False):
    return ModelParallelStrategy(dist.get_world_size(), 1, save_distributed_checkpoint=folder)


def joined(module, batches=(0,), step=0):
    """Gradients of one process that sees the batches of both, with the noise of each."""
    losses = []
    for rank in (0, 1):
        module.__class__ = type("Ranked", (type(module),), {"global_rank": rank, "global_step": step})
        losses += [module.training_step(batch, i) for i, batch in enumerate(part(rank)) if i in batches]
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.autograd.grad(torch.stack(losses).mean(), parameters)


def same(found, expected, rtol=1e-4, atol=1e-6):
    found, expected = (list(x.values()) if isinstance(x, dict) else x for x in (found, expected))
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# --- The checks, in two processes -------------------------------------------------------------------------------------

MODELS = [TrigFlowDiffusion, ConsistencyTraining, ConsistencyDistillation]
COMPARED = [  # what the paper compares with
    (DiscreteConsistencyDistillation, {}),
    (EasyConsistencyTuning, {}),
    (VariationalScoreDistillation, {}),
    (VariationalScoreDistillation, {"scd": True}),
    (MultistepConsistencyDistillation, {"segments": 3}),
]
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def gradients_of(model, strategy, **options):
    record = Record()
    trainer_options = {"accumulate_grad_batches": options.pop("accumulate", 1)}
    fit(make(model, **options), strategy, [record], **trainer_options)
    return record.gradients[0]


@check
def ddp_gradients(folder):
    """Those of one process on the joined batch, for teacher, sCT and sCD, dropout and all."""
    for model in MODELS:
        same(gradients_of(model, DDPStrategy()), joined(make(model)))


@check
def fsdp_gradients(folder):
    for model in MODELS:
        same(gradients_of(model, sharding()), joined(make(model)))


@check
def ddp_gradients_of_the_compared(folder):
    for model, options in COMPARED:
        same(gradients_of(model, DDPStrategy(), **options), joined(make(model, **options)))


@check
def fsdp_gradients_of_the_compared(folder):
    for model, options in COMPARED[::2]:  # sCD + VSD is below
        same(gradients_of(model, sharding(), **options), joined(make(model, **options)))


@check
def both_networks_of_vsd_stay_in_step(folder):
    """After two steps of sCD + VSD: on both processes the same, sharded or not what one process on all data has.

    And it comes back from a checkpoint, to the last bit.
    """
    alone = make(VariationalScoreDistillation, scd=True)
    start = [p.detach().clone() for p in alone.parameters()]
    optimizer = alone.configure_optimizers()
    trained = [p for p in alone.parameters() if p.requires_grad]
    for step in range(2):
        for p, gradient in zip(trained, joined(alone, [step], step), strict=True):
            p.grad = gradient
        optimizer.step()
        alone._normalize_weights()
    assert all(p.requires_grad != torch.equal(p, was) for p, was in zip(alone.parameters(), start, strict=True))
    for strategy in (DDPStrategy, sharding):
        module = make(VariationalScoreDistillation, scd=True)
        trainer = fit(module, strategy(), steps=2)
        weights = [full(p.detach()) for p in module.parameters()]
        same(weights, [p.detach() for p in alone.parameters()])
        found = [None, None]
        dist.all_gather_object(found, torch.cat([w.flatten() for w in weights]))
        assert torch.equal(*found)
        trainer.save_checkpoint(folder / "vsd.ckpt")
        again, restored = make(VariationalScoreDistillation, scd=True), []

        def look(again=again, restored=restored):
            restored.extend(full(p.detach()).clone() for p in again.parameters())

        again.on_train_start = look
        fit(again, strategy(), steps=3, ckpt=folder / "vsd.ckpt")
        assert len(restored) == len(weights) and all(map(torch.equal, restored, weights))


class Overflowing(nn.Module):
    """A teacher whose velocity is infinite for one class, which only the second process has at the first step."""

    def __init__(self):
        super().__init__()
        self.net, self.label = network(1), part(1).dataset[0][1]

    def forward(self, x, t, label):
        return self.net(x, t, label) + torch.where(label == self.label, torch.inf, 0.0)[:, None, None, None]


class Norms(L.Callback):
    """Norms of the first step's tangent, a row for each sample."""

    def on_after_backward(self, trainer, pl_module):
        self.found = tangent_norms(pl_module, next(iter(part(trainer.global_rank))), 0)[1]


@check
def ddp_instruments(folder):
    """One sample of four is not finite: the tangent's means are of the three others, the gradient as it is applied."""

    def module():
        made = ConsistencyDistillation(network(), teacher=Overflowing(), sigma_data=SD)
        made._seen.add(made.teacher)  # which is not asked whether its first output is finite
        return made

    norms, logger = Norms(), CSVLogger(folder, "", "")
    instruments = [norms, TangentMonitor(every_n_steps=1, bins=1), GradientNorm()]
    trainer = fit(module(), DDPStrategy(), instruments, logger=logger, log_every_n_steps=1)
    ranks = [None, None]
    dist.all_gather_object(ranks, norms.found)
    found = torch.cat(ranks)
    finite = found.isfinite().all(1)
    assert finite.tolist() == [True, True, False, True]
    wanted = {f"tangent/{term}/t0.00-1.57": mean for term, mean in zip(TERMS, found[finite].mean(0), strict=True)}
    wanted |= {"nonfinite_samples": 0.25, "gradient_norm": torch.cat([g.flatten() for g in joined(module())]).norm()}
    if trainer.is_global_zero:
        header, *lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
        logged = {n: float(v) for line in lines for n, v in zip(header, line, strict=True) if v}
        assert wanted.keys() == logged.keys() - {"epoch", "step", "loss", "tangent_norm"}
        for name, value in wanted.items():
            assert logged[name] == pytest.approx(float(value), rel=1e-4), name


@check
def fsdp_with_two_passes(folder):
    same(gradients_of(ConsistencyDistillation, sharding(), shared_primal=False), joined(make(ConsistencyDistillation)))


@check
def fsdp_with_checkpointing(folder):
    for model in (TrigFlowDiffusion, ConsistencyDistillation):
        same(gradients_of(model, sharding(), activation_checkpointing=True), joined(make(model)))


@check
def fsdp_accumulation(folder):
    """Two batches before a step: the mean over processes and batches."""
    found = gradients_of(ConsistencyDistillation, sharding(), accumulate=2)
    same(found, joined(make(ConsistencyDistillation), batches=(0, 1)))


@check
def ddp_compiled(folder):
    """One graph, although DDP would have Dynamo cut it at its buckets."""
    options = {"compile": {"backend": "eager"}}
    same(gradients_of(ConsistencyDistillation, DDPStrategy(bucket_cap_mb=1e-3), **options),
         joined(make(ConsistencyDistillation)))  # fmt: skip


@check
def fsdp_training(folder):
    """Three steps end at DDP's weights and averages, everything is sharded, and two kinds of checkpoint are written."""
    states = {}
    for name, strategy in {"ddp": DDPStrategy(), "file": sharding(), "folder": sharding(folder=True)}.items():
        module = make(ConsistencyDistillation)
        (folder / name).mkdir(exist_ok=True)
        record = Record(3, folder / name)
        fit(module, strategy, [EMA(half_life=20, ramp_up=None), record], steps=3)
        dist.barrier()
        states[name] = torch.load(folder / name / f"{type(strategy).__name__}.state")
        if name != "ddp":
            assert all(is_sharded(p) for p in module.parameters())
            for net in (module.backbone, module.teacher):
                held = sum(local(p).numel() for p in net.parameters())
                assert held < 0.8 * sum(p.numel() for p in net.parameters())
    for key, expected in states["ddp"].items():
        same(states["file"][key], expected)
        same(states["folder"][key], expected)
    start = dict(network().named_parameters())
    assert not torch.equal(states["file"]["weights"]["out_conv.weight"], start["out_conv.weight"])
    assert not torch.equal(states["file"]["averages"]["out_conv.weight"], states["file"]["weights"]["out_conv.weight"])
    ones = states["file"]["weights"]["out_conv.weight"].square().mean((1, 2, 3))
    torch.testing.assert_close(ones, torch.ones_like(ones))  # the forced normalisation came to all rows


@check
def fsdp_resumes_one_process(folder):
    """A file that one process without sharding wrote goes on in two with it."""
    resumed(sharding(), folder / "one.ckpt", torch.load(folder / "one.state"))


def resumed(strategy, ckpt, expected):
    keep = Keep()
    fit(make(ConsistencyDistillation), strategy, [EMA(half_life=20, ramp_up=None), keep], steps=4, ckpt=ckpt)
    for key in expected:
        same(keep.state[key], expected[key], rtol=0, atol=0)


@check
def fsdp_resumes_itself(folder):
    for name in ("file", "folder"):
        path = folder / name / "ModelParallelStrategy"
        resumed(sharding(name == "folder"), f"{path}.ckpt", torch.load(f"{path}.state"))


@check
def fsdp_refuses(folder):
    """Tensor parallelism and compile, each in one sentence."""
    for strategy, options, words in (
        (ModelParallelStrategy(1, 2), {}, "tensor_parallel_size"),
        (sharding(), {"compile": True}, "ddp"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            fit(make(ConsistencyTraining, **options), strategy)
        assert "\n" not in str(error.value)


def worker(folder, names):
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo")
    for name in names:
        try:
            CHECKS[name](folder)
            verdict = "passed"
        except BaseException:
            verdict = traceback.format_exc()
        (folder / f"{name}.{dist.get_world_size()}.{dist.get_rank()}").write_text(verdict)
        dist.barrier()
    print("done", flush=True)
    os._exit(0)  # torch's own teardown after FSDP2 aborts now and then: "terminate called without an active exception"


@check
def one_process_resumes(folder):
    """What two processes saved goes on in one, sharded over itself: the folder too."""
    for name in ("file", "folder"):
        path = folder / name / "ModelParallelStrategy"
        resumed(sharding(name == "folder"), f"{path}.ckpt", torch.load(f"{path}.state"))


# --- The tests --------------------------------------------------------------------------------------------------------

IN_TWO = [name for name in CHECKS if name != "one_process_resumes"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("parallel")
    callbacks = [EMA(half_life=20, ramp_up=None), Record(2, folder)]
    fit(make(ConsistencyDistillation), "auto", callbacks, steps=2, loader=part(0))
    for kind in ("ckpt", "state"):
        (folder / f"SingleDeviceStrategy.{kind}").rename(folder / f"one.{kind}")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    for processes, names in ((2, IN_TWO), (1, ["one_process_resumes"])):
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", __file__, str(folder), *names]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert run.stdout.count("done") == processes, run.stdout + run.stderr
    return folder


@pytest.mark.parametrize("name", IN_TWO)
def test_two_processes(folder, name):
    """Each check passes on both."""
    for rank in (0, 1):
        verdict = (folder / f"{name}.2.{rank}").read_text()
        assert verdict == "passed", verdict


def test_one_process_resumes_what_two_saved(folder):
    """Sharded over one process, and without sharding; weights, averages and moments bit for bit."""
    verdict = (folder / "one_process_resumes.1.0").read_text()
    assert verdict == "passed", verdict
    path = folder / "file" / "ModelParallelStrategy"
    resumed("auto", f"{path}.ckpt", torch.load(f"{path}.state"))


def test_averages_of_a_sharded_run_make_a_teacher(folder):
    """From a file and from a folder of shards."""
    expected = torch.load(folder / "file" / "ModelParallelStrategy.state")["averages"]
    for name in ("file", "folder"):
        net = load_backbone(network(2), str(folder / name / "ModelParallelStrategy.ckpt"))
        same(dict(net.named_parameters()), expected, rtol=1e-6, atol=0)


def test_blocks_are_what_the_lists_hold():
    """Of our networks encoder and decoder; of a network without lists there are none."""
    net = DDPMpp(**TINY)
    assert blocks(net) == [*net.encoder.values(), *net.decoder.values()]
    assert blocks(PlainNet()) == []
    nested = nn.Module()
    nested.body = nn.Module()
    nested.body.layers = nn.ModuleList([nn.Sequential(nn.Linear(1, 1)), nn.Linear(1, 1)])
    assert blocks(nested) == list(nested.body.layers)


def test_a_network_without_blocks_is_refused():
    """It would save nothing and take two passes."""
    with pytest.raises(ValueError, match=r"no blocks in PlainNet.*ModuleList"):
        checkpoint_blocks(PlainNet())


def test_checkpointed_blocks_keep_their_inputs_only():
    """The same gradients, dropout too; fewer tensors kept; twice is once."""
    kept, gradients = [], []
    for recompute in (False, True):
        net, saved = network(), []
        if recompute:
            checkpoint_blocks(net)
            checkpoint_blocks(net)
        torch.manual_seed(0)
        x, t = torch.randn(4, 1, 8, 8), torch.rand(4)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: (saved.append(x.numel()), x)[1], lambda x: x
        ):
            loss = net(x, t, torch.arange(4)).square().sum()
        kept.append(sum(saved))
        gradients.append(torch.autograd.grad(loss, list(net.parameters())))
    same(*gradients, rtol=1e-6, atol=1e-7)
    assert kept[1] < 0.5 * kept[0]


def test_tensors_that_are_not_sharded_stay_as_they_are():
    x = torch.randn(3)
    assert local(x) is x and full(x) is x and shard_like(x, torch.ones(3)) is x and not is_sharded(x)


if __name__ == "__main__":
    worker(Path(sys.argv[1]), sys.argv[2:])
