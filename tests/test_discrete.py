"""Discrete time against closed forms, against the continuous limit, and its modules by hand."""

import math
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from conftest import TINY
from scipy import stats
from test_objective import SIGMA_DATA, D, any_network, batch, column, consistency_function, relative, tangent_of

from sclightning.backbones import DDPMpp
from sclightning.callbacks import EMA, TangentWarmup
from sclightning.data import DigitsDataModule
from sclightning.discrete import (
    discrete_consistency_loss,
    discrete_tangent,
    ect_loss,
    ect_previous_time,
    grid,
    previous_time,
    step_probabilities,
    two_passes,
)
from sclightning.modules import (
    ConsistencyDistillation,
    ConsistencyTraining,
    DiscreteConsistencyDistillation,
    DiscreteConsistencyTraining,
    EasyConsistencyTuning,
)
from sclightning.objective import consistency_loss, finite_mean
from sclightning.sampling import karras_times
from sclightning.trigflow import interpolate, rotate, velocity

SD = 0.75
pytestmark = pytest.mark.filterwarnings("ignore")


# --- The grid ---------------------------------------------------------------------------------------------------------


def test_grid_by_hand():
    """Four steps with rho = 2 between the levels 1 and 9: square roots 1, 1.5, 2, 2.5, 3; the first time is 0."""
    times, sigmas = grid(4, 0.5, 1.0, 9.0, 2.0)
    np.testing.assert_allclose(sigmas, [1, 2.25, 4, 6.25, 9], rtol=1e-14)
    np.testing.assert_allclose(times, [0, *(math.atan(s / 0.5) for s in (2.25, 4, 6.25, 9))], rtol=1e-14)
    assert times.dtype == sigmas.dtype == torch.float64


@pytest.mark.parametrize("N", [256, 1024, 4096])
def test_grid_is_that_of_the_sampler(N):
    """EDM's rho-grid in the other direction, and increasing in float32 too, in which training has it."""
    times, _ = grid(N, SIGMA_DATA)
    np.testing.assert_allclose(times.flip(0)[:-1], karras_times(N + 1, SIGMA_DATA)[:-2], rtol=1e-12)
    assert len(times) == N + 1 and times[0] == 0 and (times.float().diff() > 0).all()


@pytest.mark.parametrize("bad", [{"N": 0}, {"sigma_min": 0.0}, {"sigma_min": 90.0}])
def test_bad_grid_is_refused(bad):
    """The sentence says what was expected."""
    with pytest.raises(ValueError, match=r"N must be 1 or more and 0 < sigma_min < sigma_max"):
        grid(**{"N": 4, "sigma_data": 0.5} | bad)


def test_probabilities_are_the_log_normal_in_bins():
    """They sum to one, are the differences of scipy's distribution, and over their bins become its density."""
    _, sigmas = grid(2000, SIGMA_DATA)
    p = step_probabilities(sigmas, -1.0, 1.4).numpy()
    normal = stats.norm(-1.0, 1.4)
    tau = sigmas.log().numpy()
    inside = normal.cdf(tau[-1]) - normal.cdf(tau[0])
    assert len(p) == 2000 and p.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(p * inside, np.diff(normal.cdf(tau)), rtol=1e-6, atol=1e-14)
    middle = (tau[1:] + tau[:-1]) / 2
    np.testing.assert_allclose(p * inside / np.diff(tau), normal.pdf(middle), rtol=1e-4)


def test_previous_time():
    """Of a time of the grid the one before, of another the last below; in float32 too."""
    times, _ = grid(5, SIGMA_DATA)
    for dtype in (torch.float64, torch.float32):
        own = times.to(dtype)
        assert torch.equal(previous_time(times, own[1:]), own[:-1])
        between = (own[1:] + own[:-1]) / 2
        assert torch.equal(previous_time(times, between), own[:-1])
        assert previous_time(times, own[:1]) == 0


# --- The objective ----------------------------------------------------------------------------------------------------


def discrete(network, step, r=1.0):
    """Points, times and the discrete tangent of steps of a given length."""
    x_t, dx_t, t = batch()
    s = t - step
    x_s = rotate(x_t, dx_t / SIGMA_DATA, t, s, SIGMA_DATA)
    F, F_s = (network(x / SIGMA_DATA, time).detach() for x, time in ((x_t, t), (x_s, s)))
    return x_t, x_s, dx_t, t, s, discrete_tangent(F, F_s, x_t, dx_t, t, s, SIGMA_DATA, r)


@pytest.mark.parametrize("step", [0.02, 1e-3])
def test_discrete_tangent_is_the_finite_difference(step):
    """It is cos t (f(x_t, t) - f(x_s, s)) / sin(t - s), exactly: only rearranged."""
    network, _ = any_network()
    x_t, x_s, _, t, s, g = discrete(network, step)
    f_t, f_s = consistency_function(network, x_t, t), consistency_function(network, x_s, s)
    torch.testing.assert_close(g, column(t.cos() / (t - s).sin()) * (f_t - f_s).detach(), rtol=1e-11, atol=1e-11)


def test_step_to_the_data():
    """At s = 0 the end is the data whatever the network says there."""
    x_t, dx_t, t = batch()
    network, _ = any_network()
    s, F = torch.zeros_like(t), network(x_t / SIGMA_DATA, t).detach()
    x_0 = column(t.cos()) * x_t - column(t.sin()) * dx_t
    wanted = column(t.cos() / t.sin()) * (consistency_function(network, x_t, t) - x_0)
    found = discrete_tangent(F, torch.full_like(F, 1e9), x_t, dx_t, t, s, SIGMA_DATA)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("r", [0.0, 0.4, 1.0])
def test_discrete_tangent_becomes_the_continuous_one(r):
    """At every warm-up, with an error proportional to the step: it halves with it."""
    network, _ = any_network()
    errors = []
    for step in (1e-2, 5e-3, 2.5e-3, 1e-5):
        x_t, _, dx_t, t, _, g = discrete(network, step, r)
        errors.append(relative([g], [tangent_of(network, x_t, dx_t, t, r)]))
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1) and errors[1] / errors[2] == pytest.approx(2, abs=0.1)
    assert errors[0] > 1e-4 and errors[-1] < 2e-5


@pytest.mark.parametrize("normalization", ["l2", "rms", "clip", "none"])
def test_discrete_loss_becomes_the_continuous_one(normalization):
    """Its values, the tangent norm and the gradient in the network and in w_phi, linearly in the step."""
    network, weights = any_network()
    x_t, dx_t, t = batch()
    w_phi = torch.linspace(-0.5, 1, len(t), dtype=torch.float64, requires_grad=True)

    def evaluate(function, *times):
        loss, norm = function(network, w_phi, x_t, dx_t, *times, SIGMA_DATA, r=0.7, normalization=normalization)
        return [loss.detach(), norm, *torch.autograd.grad(loss.mean(), [*weights, w_phi])]

    exact = evaluate(consistency_loss, t)
    errors = [relative(evaluate(discrete_consistency_loss, t, t - step), exact) for step in (4e-3, 2e-3, 1e-3)]
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.2) and errors[1] / errors[2] == pytest.approx(2, abs=0.2)
    assert errors[2] < 3e-3


def test_training_and_distillation_differ_in_the_velocity_alone():
    """With the sample's own velocity the step ends at cos s x_0 + sin s z."""
    generator = torch.Generator().manual_seed(2)
    x_0, z = torch.randn(2, 9, D, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.1, 1.5, 9, dtype=torch.float64)
    s = 0.7 * t
    x_s = rotate(interpolate(x_0, z, t), velocity(x_0, z, t) / SIGMA_DATA, t, s, SIGMA_DATA)
    torch.testing.assert_close(x_s, interpolate(x_0, z, s), rtol=1e-13, atol=1e-13)


def test_both_passes_have_one_dropout_mask():
    """The same point twice gives the same output twice, with gradient and without, under autocast too."""
    network = torch.nn.Sequential(torch.nn.Linear(D, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, D))
    x, t = torch.randn(8, D), torch.rand(8)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            F, F_s = two_passes(lambda x, t: network(x), x, t, x, t)
        assert torch.equal(F, F_s) and F.dtype == torch.float32
        assert F.requires_grad and not F_s.requires_grad
        assert all(g.abs().sum() > 0 for g in torch.autograd.grad(F.square().sum(), network.parameters()))
    assert not torch.equal(F, network(x))


# --- ECT --------------------------------------------------------------------------------------------------------------


def test_ect_steps_by_hand():
    """sigma_s = sigma (1 - gap (1 + 8/(1 + e^sigma))), cut off at 0; the steps shrink with the gap."""
    sigma = torch.tensor([0.02, 0.5, 3.0, 60.0], dtype=torch.float64)
    t = torch.atan(sigma / SIGMA_DATA)
    for gap in (1 / 2, 1 / 16):
        wanted = [max(0.0, s * (1 - gap * (1 + 8 / (1 + math.exp(s))))) for s in sigma.tolist()]
        found = SIGMA_DATA * ect_previous_time(t, SIGMA_DATA, gap).tan()
        np.testing.assert_allclose(found, wanted, rtol=1e-10)
    assert wanted[0] > 0 and ect_previous_time(t, SIGMA_DATA, 1 / 2)[0] == 0


@pytest.mark.parametrize("c", [0.0, 0.3])
def test_ect_loss_by_hand(c):
    """Pseudo-Huber distance of the consistency functions over the difference of noise levels."""
    network, _ = any_network()
    x_t, dx_t, t = batch()
    s = 0.6 * t
    x_s = rotate(x_t, dx_t / SIGMA_DATA, t, s, SIGMA_DATA)
    difference = (consistency_function(network, x_t, t) - consistency_function(network, x_s, s)).detach()
    wanted = ((difference.square().sum(1) + c**2).sqrt() - c) / (SIGMA_DATA * (t.tan() - s.tan()))
    loss, norm = ect_loss(network, x_t, dx_t, t, s, SIGMA_DATA, c=c)
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(norm, difference.norm(dim=1) / D**0.5 * t.cos() / (t - s).sin())


def test_ect_gradient_becomes_that_of_a_normalised_tangent():
    """As the step shrinks, (sigma_t - sigma_s) dL/dF becomes -sigma_d sin t g/|g|."""
    network, _ = any_network()
    x_t, dx_t, t = batch()
    g = tangent_of(network, x_t, dx_t, t)
    wanted = -SIGMA_DATA * column(t.sin()) * g / g.norm(dim=1, keepdim=True)
    errors = []
    for step in (4e-3, 2e-3):
        s = t - step
        shift = torch.zeros_like(x_t, requires_grad=True)
        loss = ect_loss(lambda x, time, shift=shift: network(x, time) + shift, x_t, dx_t, t, s, SIGMA_DATA).loss
        (gradient,) = torch.autograd.grad(loss.sum(), shift)
        errors.append(relative([gradient * SIGMA_DATA * column(t.tan() - s.tan())], [wanted]))
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.2) and errors[1] < 5e-3


@pytest.mark.parametrize("bad", [math.inf, math.nan, 1e200])
def test_sample_that_is_not_finite_costs_no_other(bad):
    """Its loss is NaN and its gradient zero; the others' are what they were. So it is in discrete time."""
    network, weights = any_network()
    x_t, dx_t, t = batch()
    w_phi = torch.zeros_like(t)
    broken = dx_t.clone()
    broken[3] = bad
    keep = torch.arange(len(t)) != 3
    for evaluate in (
        lambda dx_t: ect_loss(network, x_t, dx_t, t, 0.6 * t, SIGMA_DATA),
        lambda dx_t: discrete_consistency_loss(network, w_phi, x_t, dx_t, t, 0.6 * t, SIGMA_DATA, normalization="none"),
    ):
        good, loss = evaluate(dx_t).loss, evaluate(broken).loss
        assert loss.isnan().tolist() == (~keep).tolist() and torch.equal(loss[keep], good[keep])
        wanted = torch.autograd.grad(good[keep].mean() * keep.sum(), weights)
        found = torch.autograd.grad(finite_mean(loss) * keep.sum(), weights)
        assert relative(found, wanted) < 1e-6  # finite_mean has its factor in float32


# --- The modules ------------------------------------------------------------------------------------------------------


@pytest.fixture
def images():
    """Eight images of standard deviation 0.75 with labels."""
    rng = np.random.default_rng(1)
    return torch.from_numpy(0.75 * rng.standard_normal((8, 1, 8, 8))).float(), torch.arange(8)


def gradients(module, loss):
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


@pytest.mark.parametrize("guided", [False, True])
def test_distillation_step_by_hand(make_net, images, guided):
    """Algorithm 2, spelt out, with a teacher that is another network, guided or not."""
    teacher, x_0, label = make_net(seed=5), *images
    options = {"guidance_range": (1.0, 2.0)} if guided else {}
    net = make_net(guidance=guided)
    module = DiscreteConsistencyDistillation(net, N=7, teacher=teacher, sigma_data=SD, **options)
    module.tangent_warmup.fill_(0.6)
    with torch.no_grad():
        module.adaptive_weight.linear.bias.fill_(0.7)
    with module._draw(x_0, 0) as (z, t):
        scale = module.draw_guidance(x_0)
    times, _ = grid(7, SD)
    step = (times.float()[None] == t[:, None]).nonzero()[:, 1]
    assert len(step) == 8 and step.min() > 0
    s = times.float()[step - 1]
    with torch.no_grad():
        F_c, x_t = teacher(interpolate(x_0, z, t) / SD, t, label), interpolate(x_0, z, t)
        F_0 = teacher(x_t / SD, t)
        F_teacher = F_0 + scale[:, None, None, None] * (F_c - F_0) if guided else F_c
    told = [label, scale] if guided else [label]
    expand = lambda v: v[:, None, None, None]  # noqa: E731
    x_s = expand((t - s).cos()) * x_t - expand((t - s).sin()) * SD * F_teacher
    F = net(x_t / SD, t, *told)
    F_minus, F_s = F.detach(), net(x_s / SD, s, *told).detach()
    brace = x_t + (SD * expand((t - s).cos()) * F_minus - SD * F_s) / expand((t - s).sin())
    g = expand(t.cos()) * (-expand(s.cos()) * SD * (F_minus - F_teacher) - 0.6 * expand(s.sin()) * brace)
    g = g / (g.square().sum((1, 2, 3), keepdim=True).sqrt() + 0.1)
    w = module.adaptive_weight(t)
    wanted = (w.exp() / 64 * (F - F_minus - g).square().sum((1, 2, 3)) - w).mean()
    found = module.training_step(images, 0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(module, found), gradients(module, wanted), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("discrete", "continuous"),
    [(DiscreteConsistencyDistillation, ConsistencyDistillation), (DiscreteConsistencyTraining, ConsistencyTraining)],
)
def test_fine_grid_is_continuous_time(make_net, images, discrete, continuous):
    """In float64 the loss of a module at given times becomes that of its continuous namesake as N grows."""
    teacher = {"teacher": make_net(seed=5)} if continuous is ConsistencyDistillation else {}
    x_0, label = images[0].double(), images[1]
    generator = torch.Generator().manual_seed(0)
    z, t = SD * torch.randn(x_0.shape, generator=generator, dtype=torch.float64), torch.linspace(0.3, 1.4, 8).double()
    errors, options = [], {"sigma_data": SD, "normalization": "none", **teacher}
    for N in (500, 5000):
        module = discrete(make_net(), N=N, **options).double()
        t = module._grid[torch.searchsorted(module._grid, t)]  # of the coarse grid, and near one of the fine
        loss, norm = module.loss(x_0, z, t, label)
        exact = continuous(make_net(), **options).double().loss(x_0, z, t, label)
        wanted, found = [exact.loss.detach(), exact.tangent_norm], [loss.detach(), norm]
        errors.append(relative(found, wanted))
    assert 5 < errors[0] / errors[1] < 15 and errors[1] < 5e-3


def test_times_are_drawn_as_the_grid_says(make_plain_net):
    """Each time as often as its probability, of the grid and none other, and none is 0."""
    module = DiscreteConsistencyTraining(make_plain_net(), N=6, sigma_data=SD, P_mean=-0.8, P_std=1.6)
    torch.manual_seed(0)
    t = module.draw_time(torch.zeros(40_000, 1))
    times, sigmas = grid(6, SD)
    counts = (t[:, None] == times.float()).sum(0)
    assert t.dtype == torch.float32 and counts[0] == 0 and counts.sum() == 40_000
    np.testing.assert_allclose(counts[1:] / 40_000, step_probabilities(sigmas, -0.8, 1.6), atol=0.01)


def fit(module, quiet, tmp_path, steps=2, **options):
    trainer = L.Trainer(**quiet, max_steps=steps, default_root_dir=tmp_path, **options)
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=8))
    return trainer


def make(model, net, **options):
    if model is DiscreteConsistencyDistillation:
        options |= {"teacher": make_teacher()}
    return model(net, sigma_data=0.76, **options)


def make_teacher():
    torch.manual_seed(3)
    return DDPMpp(**TINY)


MODELS = [DiscreteConsistencyDistillation, DiscreteConsistencyTraining, EasyConsistencyTuning]


@pytest.mark.parametrize("model", MODELS)
def test_module_trains_reloads_and_samples(make_net, quiet, tmp_path, model):
    """Every parameter has a gradient, as DDP needs; numbers come back from the checkpoint, one of Python code."""
    number = {"q": 3.0} if model is EasyConsistencyTuning else {"N": 12}
    module, missing = make(model, make_net(), seed=3, **number), []

    class Look(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            missing.extend(n for n, p in pl_module.named_parameters() if p.requires_grad and p.grad is None)

    path = tmp_path / "student.ckpt"
    fit(module, quiet, tmp_path, callbacks=[EMA(decay=0.5), TangentWarmup(4), Look()]).save_checkpoint(path)
    assert not missing
    reloaded = model.load_from_checkpoint(path, backbone=make_net(seed=1))
    assert {k: reloaded.hparams[k] for k in number} == number and reloaded.seed == 3
    ask = {"index": [0, 1], "shape": (1, 8, 8), "label": torch.tensor([1, 2])}
    samples = module.sample(**ask)
    assert module.nfe == 2 and samples.isfinite().all() and torch.equal(reloaded.sample(**ask), samples)


def test_bf16_leaves_the_grid_alone(make_net, quiet, tmp_path):
    """A run in bf16-true rounds buffers; times would no longer be those of the grid."""
    module = DiscreteConsistencyTraining(make_net(), N=4096, sigma_data=0.76)
    fit(module, quiet, tmp_path, precision="bf16-true")
    assert torch.equal(module._grid, grid(4096, 0.76)[0])


def test_network_without_a_forward_derivative_trains(make_plain_net, images, quiet, tmp_path):
    """Nothing is differentiated forwards, so a network that cannot be is as good as any."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, grad):
            return 3 * ctx.saved_tensors[0] ** 2 * grad

    net = make_plain_net()
    network = SimpleNamespace(forward=net.forward)
    net.forward = lambda x, t, label=None: Cube.apply(network.forward(x, t))
    for model in (DiscreteConsistencyTraining, EasyConsistencyTuning):
        fit(model(net, sigma_data=0.76), quiet, tmp_path, steps=1)


def test_ect_stages(make_plain_net, images, monkeypatch):
    """The relative step is q^-1 in the first stage, and shorter by q in each after it."""
    module = EasyConsistencyTuning(make_plain_net(), sigma_data=SD, q=4.0, stage_steps=10)
    gaps = []
    for step in (0, 9, 10, 25):
        monkeypatch.setattr(type(module), "global_step", step)
        module.on_train_batch_start(images[0], 0)
        gaps.append(module.gap.item())
    assert gaps == [1 / 4, 1 / 4, 1 / 16, 1 / 64]


def test_ect_step_by_hand(make_net, images):
    """The mean of its loss over the batch, with the sample's own velocity and no adaptive weight."""
    module, (x_0, label) = EasyConsistencyTuning(make_net(), sigma_data=SD, c=0.06), images
    with module._draw(x_0, 0) as (z, t):
        pass
    s = ect_previous_time(t, SD, 0.5)
    f = lambda t: consistency_function_of(module.backbone, interpolate(x_0, z, t), t, label)  # noqa: E731
    square = (f(t) - f(s).detach()).square().sum((1, 2, 3))
    wanted = (((square + 0.06**2).sqrt() - 0.06) / (SD * (t.tan() - s.tan()))).mean()
    found = module.training_step(images, 0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(module, found), gradients(module, wanted), rtol=1e-3, atol=1e-4)
    assert module.adaptive_weight is None


def consistency_function_of(net, x_t, t, label):
    return t.cos()[:, None, None, None] * x_t - t.sin()[:, None, None, None] * SD * net(x_t / SD, t, label)


@pytest.mark.parametrize("model", [DiscreteConsistencyTraining, EasyConsistencyTuning])
def test_compiled_step_is_the_eager_one(make_plain_net, images, model):
    """Two graphs with the random state between them, and the eager loss."""
    torch._dynamo.reset()
    net = make_plain_net()
    eager, compiled = (model(net, sigma_data=SD, compile=c) for c in (False, {"backend": "aot_eager"}))
    for step in range(2):
        torch.testing.assert_close(compiled.training_step(images[0], step), eager.training_step(images[0], step))
