"""The compiled training step: one graph, the eager loss and gradients, no second compilation, no host waiting."""

import logging

import lightning as L
import pytest
import torch
from conftest import TINY, randomize
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.graph import GraphLowering

from sclightning.backbones import EDM2
from sclightning.callbacks import EMA, TangentWarmup
from sclightning.callbacks.finite_gradients import FiniteGradients
from sclightning.data import DigitsDataModule
from sclightning.modules import ConsistencyDistillation, ConsistencyTraining, TrigFlowDiffusion
from sclightning.ops import Conv2d

SD = 0.75
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """No compiled function, and no count, of another test."""
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def small_net(make_net):
    """Few blocks, since a test's time is Dynamo's."""
    return lambda seed=0, **options: make_net(seed, channel_mult=[1], attention_resolutions=[8], **options)


def graphs():
    return counters["stats"]["unique_graphs"]


def make(model, make_net, **options):
    if model is ConsistencyDistillation:
        options |= {"teacher": make_net(seed=1), "guidance_range": (1.0, 2.0)}
        return model(make_net(guidance=True), sigma_data=SD, **options)
    return model(make_net(), sigma_data=SD, **options)


def step(module, batch):
    """Loss and gradients of one step."""
    loss = module.training_step(batch, 0)
    return loss.detach(), torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])


def assert_same_step(module, expected, batch, rtol=1e-5, atol=1e-6):
    for found, wanted in zip(step(module, batch), step(expected, batch), strict=True):
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("model", "dtype"),
    [(TrigFlowDiffusion, None), (ConsistencyTraining, torch.bfloat16), (ConsistencyDistillation, None)],
)
def test_compiled_step_is_the_eager_one(small_net, batch, model, dtype):
    """One graph holds teacher, jvp and loss; its loss and gradients are the eager ones, under autocast too."""
    module = make(model, small_net, compile={"backend": "aot_eager"})
    tolerance = {} if dtype is None else {"rtol": 2e-2, "atol": 1e-3}
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        assert_same_step(module, make(model, small_net), batch, **tolerance)
        assert module.training_step(batch, 0).dtype == torch.float32
    assert graphs() == 1 and not counters["graph_break"]


def test_inductor_compiles_the_consistency_step(make_plain_net, batch, monkeypatch):
    """The default backend, on the smallest network; it keeps channels last though the last layer has few of them."""
    decide, forced = GraphLowering.decide_layout_opt, []

    def look(*args, **options):
        forced.append(torch._inductor.config.force_layout_optimization)
        return decide(*args, **options)

    monkeypatch.setattr(GraphLowering, "decide_layout_opt", staticmethod(look))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)  # a cached graph is not lowered again

    def net():
        net = make_plain_net()
        for layer in (net.conv0, net.conv1):
            layer.__class__ = Conv2d  # with nn.Conv2d inductor before torch 2.13 stumbles over the zero weight tangent
        return net

    mode = {"mode": "max-autotune-no-cudagraphs"}
    compiled, eager = (ConsistencyTraining(net(), sigma_data=SD, compile=c, channels_last=True) for c in (mode, False))
    assert_same_step(compiled, eager, batch[0], rtol=1e-4)
    assert len(forced) == 2 and all(forced)  # the backward pass, compiled later, too


def test_two_passes_compile_around_the_random_state(small_net, batch, caplog):
    """``shared_primal: false`` is the same step with dropout, and says that a part of it is not compiled."""
    options = {"shared_primal": False, "compile": {"backend": "aot_eager"}}
    module = ConsistencyTraining(small_net(dropout=0.3), sigma_data=SD, **options)
    expected = ConsistencyTraining(small_net(dropout=0.3), sigma_data=SD)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        assert_same_step(module, expected, batch, rtol=1e-4)
    (message,) = [r.message for r in caplog.records if "two passes" in r.message]
    assert "not compiled" in message and "as configured" in message


def test_checkpointing_takes_two_passes_and_says_so(make_net, quiet, tmp_path, caplog):
    """One log line in a run; the losses of the run are those without it."""
    losses = []
    for activation_checkpointing in (False, True):
        module = ConsistencyTraining(
            make_net(dropout=0.3), sigma_data=0.752, activation_checkpointing=activation_checkpointing
        )
        with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
            trainer = fit(module, quiet, tmp_path)
        losses.append(trainer.callback_metrics["loss"])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
    (message,) = [r.message for r in caplog.records if "two passes" in r.message]
    assert "activation checkpointing" in message


def fit(module, quiet, tmp_path, **options):
    trainer = L.Trainer(**{**quiet, "max_steps": 3, "default_root_dir": tmp_path, **options})
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=8))
    return trainer


def test_options_of_compile(make_plain_net):
    """An empty dictionary is as good as true: no option differs from torch.compile's own."""
    make = lambda compile: ConsistencyTraining(make_plain_net(), sigma_data=SD, compile=compile)  # noqa: E731
    assert [make(option).compile_options for option in (False, True, {})] == [None, {}, {}]


def test_nothing_is_compiled_after_the_first_step(quiet, tmp_path):
    """Warm-up, weight normalisation, average and a validation with samples: one graph each of loss and weights."""
    net = randomize(EDM2(**TINY | {"channels": 8, "head_channels": 8}))
    module = ConsistencyTraining(net, sigma_data=0.752, compile={"backend": "eager"})
    found = []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            found.append((graphs(), pl_module.tangent_warmup.item()))

    callbacks = [TangentWarmup(10), EMA(half_life=20), FiniteGradients(), Count()]
    options = {"max_steps": 4, "limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    fit(module, quiet, tmp_path, callbacks=callbacks, **options)
    assert [count for count, _ in found] == [2] * 4 and len({r for _, r in found}) == 4
    for weight in (net.out_conv.weight, net.time_linear.weight):
        rows = weight.detach().flatten(1).square().mean(1)
        torch.testing.assert_close(rows, torch.ones_like(rows))


def test_compiled_run_refuses_a_loss_that_is_not_finite(make_plain_net, batch):
    """The graph has no place for the look at the first output, so the first loss is looked at."""
    net = make_plain_net()
    torch.nn.init.constant_(net.conv0.weight, torch.inf)
    module = ConsistencyTraining(net, sigma_data=SD, compile={"backend": "eager"})
    with pytest.raises(ValueError, match="without compile") as error:
        module.training_step(batch[0], 0)
    assert "\n" not in str(error.value)


class Kinked(torch.nn.Module):
    """A network whose output is finite and whose derivative is not at early times."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, t):
        return self.weight * x + torch.relu(t - 0.4).sqrt()[:, None, None, None]


def test_first_batch_may_have_samples_that_are_not_finite(batch):
    """They are left out and counted as in eager mode, as when a run resumes in half precision."""
    eager, compiled = (ConsistencyTraining(Kinked(), sigma_data=SD, compile=c) for c in (False, {"backend": "eager"}))
    found = compiled.training_step(batch[0], 0)
    assert torch.equal(found, eager.training_step(batch[0], 0)) and found.isfinite()
    assert 0 < compiled._nonfinite == eager._nonfinite < 8


@pytest.mark.parametrize("model", [TrigFlowDiffusion, ConsistencyTraining])
@pytest.mark.parametrize("net", ["ddpmpp", "edm2"])
def test_channels_last_is_a_layout_only(make_net, batch, model, net):
    """The images keep it through the network; loss and gradients agree."""
    make = make_net if net == "ddpmpp" else lambda: randomize(EDM2(**TINY | {"channels": 8, "head_channels": 8}))
    module, layouts = model(make(), sigma_data=SD, channels_last=True), []
    look = lambda _, args, out: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))  # noqa: E731
    for layer in (*module.backbone.encoder.values(), *module.backbone.decoder.values()):
        layer.register_forward_hook(look)
    assert_same_step(module, model(make(), sigma_data=SD), batch, rtol=1e-4, atol=1e-5)
    assert layouts and all(layouts)


def test_no_convolution_of_the_compiled_step_has_to_convert_images(batch):
    """Forward, tangent and backward, all but the few channels of the output; no gradient is added up pixel by pixel."""
    network, graphs = randomize(EDM2(**TINY | {"channels": 8, "head_channels": 8})), []

    def keep(graph, _):
        graphs.append(graph.graph)
        return make_boxed_func(graph)

    compile = {"backend": aot_autograd(fw_compiler=keep, bw_compiler=keep)}
    module = ConsistencyTraining(network, sigma_data=SD, channels_last=True, compile=compile)
    step(module, batch)
    forward, backward = ([node for node in g.nodes if "convolution" in str(node.target)] for g in graphs)
    images = [node.args[0].meta["val"] for node in forward] + [
        x.meta["val"] for node in backward for x in node.args[:2] if x.meta["val"].shape[1] > 1
    ]
    assert len(images) > 40 and all(x.is_contiguous(memory_format=torch.channels_last) for x in images)
    scattered = [node for g in graphs for node in g.nodes if "index_put" in str(node.target)]
    assert len(scattered) == 1  # rows of the label embedding


def test_bar_shows_the_numbers_of_logged_steps(make_net, quiet, tmp_path):
    """Lightning would read a number of the bar back at every step: ours has it when the logger has."""
    seen = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append(dict(trainer.progress_bar_metrics))

        def on_train_batch_end(self, trainer, *_):
            losses.append(trainer.callback_metrics["loss"].item())

    losses = []
    fit(ConsistencyTraining(make_net(), sigma_data=0.752), quiet, tmp_path, callbacks=[Look()], max_steps=5,
        log_every_n_steps=2)  # fmt: skip
    assert [sorted(numbers) for numbers in seen] == [[], [], *[["loss", "tangent_norm"]] * 3]
    assert [numbers["loss"] for numbers in seen[2:]] == [losses[1], losses[1], losses[3]]


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("model", [TrigFlowDiffusion, ConsistencyDistillation])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_a_step_on_a_gpu_never_waits_for_it(make_net, quiet, tmp_path, model, precision, compile):
    """From the second step to the last, data loading, averages, warm-up, logging and progress bar included."""

    class Detect(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            torch.cuda.set_sync_debug_mode("error" if trainer.global_step < 5 else "default")

    optimizer = lambda p: torch.optim.Adam(p, lr=1e-4, fused=True)  # noqa: E731 - another one makes the scaler wait
    module = make(model, make_net, optimizer=optimizer, compile=compile)
    module.sigma_data = 0.752
    callbacks = [TangentWarmup(10), EMA(half_life=20), FiniteGradients(), Detect()]
    callbacks = callbacks[model is TrigFlowDiffusion :]
    options = {"enable_progress_bar": True, "accelerator": "gpu", "devices": 1, "precision": precision}
    try:
        trainer = fit(module, quiet, tmp_path, max_steps=6, callbacks=callbacks, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.global_step == 6
