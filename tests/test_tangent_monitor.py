"""The tangent by time and term: the numbers in TensorBoard's file are those of the step, which is none the wiser."""

import csv
import math
import re

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from sclightning.callbacks import GradientNorm, TangentMonitor, TangentWarmup
from sclightning.callbacks import tangent_monitor as monitor
from sclightning.callbacks.tangent_monitor import TERMS, tangent_norms
from sclightning.data import DigitsDataModule
from sclightning.modules import ConsistencyDistillation, ConsistencyTraining, TrigFlowDiffusion

SD = 0.752
pytestmark = pytest.mark.filterwarnings("ignore")


def expand(t):
    return t[:, None, None, None]


class ByHand(L.Callback):
    """What the monitor should find: inputs and weights caught in the step, and the equations spelt out."""

    def __init__(self):
        self.tables = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batch, self.batch_idx = batch, batch_idx

    def on_before_optimizer_step(self, trainer, module, optimizer):
        x_0, label = self.batch
        with torch.no_grad(), module._draw(x_0, self.batch_idx) as (z, t):
            s = module.draw_guidance(x_0)
            cos, sin = expand(t.cos()), expand(t.sin())
            x_t, dx_t = cos * x_0 + sin * z, cos * z - sin * x_0
            if isinstance(module, ConsistencyDistillation):
                F_c, F_0 = (module.teacher(x_t / SD, t, y) for y in (label, None))
                dx_t = SD * (F_0 + expand(s) * (F_c - F_0))
            state = torch.get_rng_state()

            def f(x_t, t):
                torch.set_rng_state(state)  # one dropout mask
                F = module.backbone(x_t / SD, t, label, s)
                return expand(t.cos()) * x_t - SD * expand(t.sin()) * F, F

            _, (along_x, dF_x) = torch.func.jvp(lambda x: f(x, t), (x_t,), (dx_t,))
            (_, F), (along_t, dF_t) = torch.func.jvp(lambda t: f(x_t, t), (t,), (torch.ones_like(t),))
        velocity = -cos * (SD * F - dx_t)
        derivative = -sin * (x_t + SD * (dF_x + dF_t))
        norm = velocity + module.tangent_warmup * derivative
        rms = {
            name: (cos * v).square().mean((1, 2, 3)).sqrt()
            for name, v in zip(TERMS, (norm, velocity, derivative, along_x, along_t), strict=True)
        }
        self.tables.append((t, rms))


def make(model, make_net, **options):
    options = {"sigma_data": SD, "optimizer": lambda p: torch.optim.SGD(p, lr=0.01)} | options
    if model is ConsistencyDistillation:
        options |= {"teacher": make_net(seed=1), "guidance_range": (1.0, 2.0)}
        return model(make_net(guidance=True, dropout=0.2), **options)
    return model(make_net(dropout=0.2), **options)


def without_labels(net):
    net.register_forward_pre_hook(lambda _, args, kwargs: (args, {}), with_kwargs=True)
    return net


def fit(module, quiet, tmp_path, callbacks, **options):
    data = options.pop("data", DigitsDataModule(batch_size=16))
    options = {**quiet, "max_steps": 4, "log_every_n_steps": 1, "default_root_dir": tmp_path, **options}
    trainer = L.Trainer(**options, callbacks=callbacks)
    trainer.fit(module, datamodule=data)
    return trainer


def read(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


@pytest.mark.parametrize("model", [ConsistencyTraining, ConsistencyDistillation])
def test_the_event_file_holds_the_tangent_of_the_step(make_net, quiet, tmp_path, model):
    """Every scalar of every bin by hand, at the steps asked for; weighted by samples they add up to the step's own."""
    by_hand, monitor = ByHand(), TangentMonitor(every_n_steps=2, bins=4)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    # The warm-up is listed behind the monitor, which must see the value of the step all the same.
    callbacks = [monitor, TangentWarmup(8), by_hand]
    fit(make(model, make_net), quiet, tmp_path, callbacks, logger=logger)
    events = read(tmp_path)
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("tangent/")]
    seen = set()
    for step in (1, 3):
        t, rms = by_hand.tables[step]
        own = {event.step: event.value for event in events.Scalars("tangent_norm")}[step]
        assert own == pytest.approx(rms["norm"].mean().item(), rel=1e-4)
        for i, label in enumerate(monitor.labels()):
            inside = (t >= i * math.pi / 8) & (t < (i + 1) * math.pi / 8)
            assert label == f"t{i * math.pi / 8:.2f}-{(i + 1) * math.pi / 8:.2f}"
            for term in TERMS:
                tag = f"tangent/{term}/{label}"
                found = [e.value for e in events.Scalars(tag) if e.step == step] if tag in tags else []
                if inside.any():
                    assert found == pytest.approx([rms[term][inside].mean().item()], rel=1e-4)
                    seen.add(tag)
                else:
                    assert found == []
    assert {*tags} == seen and len(seen) > 10
    assert {event.step for tag in tags for event in events.Scalars(tag)} == {1, 3}


def test_the_page_shows_every_scalar(make_net, quiet, tmp_path):
    """The charts' expressions match what is logged, each bin and each term once, and no chart stays empty."""
    logger, monitor = TensorBoardLogger(tmp_path, name="", version=""), TangentMonitor(every_n_steps=1, bins=3)
    callbacks = [monitor, GradientNorm()]
    fit(make(ConsistencyTraining, make_net), quiet, tmp_path, callbacks, logger=logger, max_steps=2)
    events = read(tmp_path)
    (config,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(config.tensor_proto.string_val[0])
    assert [len(category.chart) for category in layout.category] == [2, 5, 3]
    tags = events.Tags()["scalars"]
    for category in layout.category:
        lines = [
            [tag for tag in tags if any(re.match(e, tag) for e in chart.multiline.tag)] for chart in category.chart
        ]
        assert all(lines)
        drawn = [tag for chart in lines for tag in chart]
        wanted = {"tangent_norm", "gradient_norm"} if category.title == "Steps" else {*tags} & {*monitor_tags(monitor)}
        assert len(drawn) == len({*drawn}) and {*drawn} == wanted
    assert [chart.title for chart in layout.category[2].chart] == ["t = 0.00-0.52", "t = 0.52-1.05", "t = 1.05-1.57"]


def monitor_tags(monitor):
    return [f"tangent/{term}/{label}" for term in TERMS for label in monitor.labels()]


class Rows(L.Callback):
    """Loss, gradients and random state after every batch."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        gradient = torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.grad is not None])
        self.rows.append(torch.cat([outputs["loss"][None], gradient, torch.get_rng_state()[:64].float()]))


@pytest.mark.parametrize(
    "options",
    [{}, {"compile": {"backend": "eager"}}, {"shared_primal": False}, {"precision": "bf16-mixed"}],
    ids=["eager", "compiled", "two passes", "bf16"],
)
def test_the_run_is_none_the_wiser(make_net, make_plain_net, quiet, tmp_path, options):
    """Losses, gradients and the random state are bit for bit those of the run without it, dropout and all."""
    trainer_options = {"max_steps": 3, "precision": options.pop("precision", "32-true")}
    runs = []
    for callbacks in ([], [TangentMonitor(every_n_steps=1)]):
        torch.manual_seed(0)
        rows = Rows()
        logger = CSVLogger(tmp_path, name=str(len(runs)))
        if "compile" in options:
            # A test's time is Dynamo's: the smallest network.
            module = ConsistencyTraining(without_labels(make_plain_net()), sigma_data=SD, **options)
        else:
            module = make(ConsistencyDistillation, make_net, **options)
        fit(module, quiet, tmp_path, [*callbacks, rows], logger=logger, **trainer_options)
        runs.append(torch.stack(rows.rows))
    assert torch.equal(*runs)
    header = (tmp_path / "1" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert "tangent/along_t/t0.59-0.79" in header  # it did measure


def test_one_measurement_a_step_of_several_batches(make_plain_net, quiet, tmp_path):
    """Accumulated gradients: the first batch of each step."""
    logger, monitor = TensorBoardLogger(tmp_path, name="", version=""), TangentMonitor(every_n_steps=2, bins=1)
    module = ConsistencyTraining(without_labels(make_plain_net()), sigma_data=SD)
    fit(module, quiet, tmp_path, [monitor], logger=logger, accumulate_grad_batches=2)
    assert [event.step for event in read(tmp_path).Scalars("tangent/norm/t0.00-1.57")] == [1, 3]


class Overflowing(torch.nn.Module):
    """A network whose derivative overflows at early times."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, t):
        return self.weight * x + expand(torch.where(t < 0.4, t * 1e38 * 1e38, t))


def test_samples_that_are_not_finite_are_left_out(make_net, quiet, tmp_path, batch):
    """The norm of the other samples stays a number."""
    module = ConsistencyTraining(Overflowing(), sigma_data=SD)
    module._seen.add(module.backbone)
    module.eval()
    t, norms = tangent_norms(module, batch[0], 0)
    assert torch.equal(norms.isfinite().all(1), t >= 0.4) and 0 < (t < 0.4).sum() < 8


def test_a_bin_is_the_mean_of_its_finite_samples(make_net, quiet, tmp_path, monkeypatch):
    """A sample of which one norm is not finite counts for none of them."""
    norms = torch.arange(8.0)[:, None] + torch.arange(float(len(TERMS)))
    norms[2, 1] = torch.nan
    monkeypatch.setattr(monitor, "tangent_norms", lambda *_: (torch.full((8,), 0.5), norms))
    module = ConsistencyTraining(make_net(), sigma_data=SD)
    options = {**quiet, "logger": CSVLogger(tmp_path, "", ""), "max_steps": 1, "default_root_dir": tmp_path}
    L.Trainer(**options, callbacks=[TangentMonitor(1, bins=1)]).fit(module, datamodule=DigitsDataModule(batch_size=8))
    with (tmp_path / "metrics.csv").open() as file:
        (row,) = [row for row in csv.DictReader(file) if row["tangent/norm/t0.00-1.57"]]
    kept = torch.cat([norms[:2], norms[3:]]).mean(0)
    for term, mean in zip(TERMS, kept.tolist(), strict=True):
        assert float(row[f"tangent/{term}/t0.00-1.57"]) == pytest.approx(mean)


def test_bad_arguments_and_modules_are_refused(make_plain_net, quiet, tmp_path):
    """A diffusion model has no tangent."""
    for arguments in ({"every_n_steps": 0}, {"bins": 0}):
        with pytest.raises(ValueError, match="1 or more"):
            TangentMonitor(**arguments)
    with pytest.raises(ValueError, match="TrigFlowDiffusion has not"):
        fit(TrigFlowDiffusion(make_plain_net(), sigma_data=SD), quiet, tmp_path, [TangentMonitor()])
