"""Variational score distillation on Gaussians in closed form, and its module by hand."""

import contextlib

import lightning as L
import numpy as np
import pytest
import torch
from conftest import TINY, randomize
from lightning.pytorch.callbacks import ModelCheckpoint
from test_adapters_forward_ad import Apply, Host, fused
from test_objective import MEAN, SIGMA_DATA, STD, D, column

from sclightning.backbones import DDPMpp
from sclightning.callbacks import EMA, TangentWarmup
from sclightning.data import DigitsDataModule
from sclightning.modules import (
    ConsistencyDistillation,
    MultistepConsistencyDistillation,
    VariationalScoreDistillation,
)
from sclightning.objective import weighted_loss
from sclightning.parallelize import blocks
from sclightning.sampling import T_MAX, consistency
from sclightning.trigflow import interpolate, velocity
from sclightning.vsd import generate, score_difference, vsd_loss

SD = 0.75
pytestmark = pytest.mark.filterwarnings("ignore")


# --- Gaussians --------------------------------------------------------------------------------------------------------


def diffusion_model(mean, std):
    """Exact F of N(mean, diag(std²)): sigma_d F = E[cos t z - sin t x_0 | x_t], affine in x_t."""

    def F(x, t):
        cos, sin = column(t.cos()), column(t.sin())
        spread = (cos * std) ** 2 + (sin * SIGMA_DATA) ** 2
        residual = SIGMA_DATA * x - cos * mean
        x_0, z = mean + cos * std**2 / spread * residual, sin * SIGMA_DATA**2 / spread * residual
        return (cos * z - sin * x_0) / SIGMA_DATA

    return F


OTHER_MEAN = torch.tensor([-0.2, 0.4, 0.6], dtype=torch.float64)
OTHER_STD = torch.tensor([0.5, 0.3, 0.9], dtype=torch.float64)


def draws(n):
    generator = torch.Generator().manual_seed(0)
    x_0, z = torch.randn(2, n, D, generator=generator, dtype=torch.float64)
    return OTHER_MEAN + OTHER_STD * x_0, SIGMA_DATA * z


def test_difference_is_that_of_the_scores():
    """sigma_d tan t times the gradient of log q/p, of the two densities by autograd."""
    x_0, z = draws(12)
    t = torch.linspace(0.05, 1.5, 12, dtype=torch.float64)
    found = score_difference(diffusion_model(MEAN, STD), diffusion_model(OTHER_MEAN, OTHER_STD), x_0, z, t, SIGMA_DATA)
    x_t = interpolate(x_0, z, t).requires_grad_()

    def log_density(mean, std):
        spread = ((column(t.cos()) * std) ** 2 + (column(t.sin()) * SIGMA_DATA) ** 2).sqrt()
        return torch.distributions.Normal(column(t.cos()) * mean, spread).log_prob(x_t).sum()

    (gradient,) = torch.autograd.grad(log_density(OTHER_MEAN, OTHER_STD) - log_density(MEAN, STD), x_t)
    torch.testing.assert_close(found, SIGMA_DATA * column(t.tan()) * gradient, rtol=1e-9, atol=1e-9)
    assert not found.requires_grad


def test_gradient_on_gaussians_in_closed_form():
    """Of two Gaussians of one variance: 2 e^w/D (mu_q - mu_p) sigma_d sin t / (cos² t s² + sin² t sigma_d²)."""
    _, z = draws(10)
    x_0 = (OTHER_MEAN + z).requires_grad_()
    t, w = torch.linspace(0.05, 1.5, 10, dtype=torch.float64), torch.linspace(-1, 1, 10, dtype=torch.float64)
    teacher, fake = diffusion_model(MEAN, STD), diffusion_model(OTHER_MEAN, STD)
    loss = vsd_loss(x_0, score_difference(teacher, fake, x_0.detach(), z, t, SIGMA_DATA), w)
    (gradient,) = torch.autograd.grad(loss.sum(), x_0)
    cos, sin = column(t.cos()), column(t.sin())
    spread = (cos * STD) ** 2 + (sin * SIGMA_DATA) ** 2
    wanted = column(w.exp()) * 2 / D * (OTHER_MEAN - MEAN) * SIGMA_DATA * sin / spread
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)
    # Descent takes the samples to the data.
    assert ((gradient * (OTHER_MEAN - MEAN)) > 0).all()


def test_no_gradient_where_the_generator_is_right():
    """Two equal distributions: the samples stay where they are."""
    x_0, z = draws(10)
    model, t = diffusion_model(OTHER_MEAN, OTHER_STD), torch.linspace(0.05, 1.5, 10, dtype=torch.float64)
    x_0.requires_grad_()
    loss = vsd_loss(x_0, score_difference(model, model, x_0.detach(), z, t, SIGMA_DATA), torch.zeros_like(t))
    assert torch.autograd.grad(loss.sum(), x_0)[0].abs().max() == 0


def test_descent_on_an_affine_generator_finds_the_data():
    """A generator m + s z with the exact model of its samples becomes N(MEAN, STD²)."""
    m, s = OTHER_MEAN.clone().requires_grad_(), OTHER_STD.clone().requires_grad_()
    optimizer = torch.optim.Adam([m, s], lr=0.02)
    generator = torch.Generator().manual_seed(1)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 600)
        unit, z = torch.randn(2, 64, D, generator=generator, dtype=torch.float64)
        t = torch.rand(64, generator=generator, dtype=torch.float64) * 1.3 + 0.1
        x_0 = m + s * unit
        models = diffusion_model(MEAN, STD), diffusion_model(m.detach(), s.detach())
        difference = score_difference(*models, x_0.detach(), SIGMA_DATA * z, t, SIGMA_DATA)
        optimizer.zero_grad()
        vsd_loss(x_0, difference, torch.zeros(64)).mean().backward()
        optimizer.step()
    torch.testing.assert_close(m.detach(), MEAN, rtol=0, atol=0.03)
    torch.testing.assert_close(s.detach().abs(), STD, rtol=0, atol=0.06)


def test_adaptive_weight_evens_out_the_times():
    """The optimal w makes e^w/D E|difference|² = 1 at every time, and there the loss has no gradient in w."""
    x_0, z = draws(4000)
    t = torch.full((4000,), 0.7, dtype=torch.float64)
    difference = score_difference(
        diffusion_model(MEAN, STD), diffusion_model(OTHER_MEAN, OTHER_STD), x_0, z, t, SIGMA_DATA
    )
    best = -difference.square().mean().log()
    for offset, sign in ((-0.1, -1), (0.0, 0), (0.1, 1)):
        w = (best + offset).requires_grad_()
        (gradient,) = torch.autograd.grad(vsd_loss(x_0, difference, w.expand(4000)).mean(), w)
        assert gradient.sign() == sign if sign else abs(gradient) < 1e-9


def test_generator_is_the_sampler_of_one_step(make_net):
    """The same samples, with a gradient."""
    net, label, unit = make_net(), torch.tensor([1, 2]), torch.randn(1, 2, 1, 8, 8)
    F = lambda x, t: net(x, t, label)  # noqa: E731
    samples = generate(F, SD * unit[0], T_MAX, SD)
    torch.testing.assert_close(samples, consistency(F, unit, [T_MAX], SD), rtol=1e-5, atol=1e-6)
    assert samples.requires_grad


def test_half_precision_is_not_subtracted_in_half_precision():
    """Two outputs that agree to three digits have a difference of more than one."""
    x_0, z = (v.float() for v in draws(6))
    t = torch.linspace(0.1, 1.4, 6)
    pretrained, fake = (lambda x, t, k=k: (k * x.sin()).bfloat16() for k in (1.0, 1.01))
    x = interpolate(x_0, z, t) / SIGMA_DATA
    found = score_difference(pretrained, fake, x_0, z, t, SIGMA_DATA)
    assert torch.equal(found, pretrained(x, t).float() - fake(x, t).float()) and found.dtype == torch.float32


# --- The module -------------------------------------------------------------------------------------------------------


@pytest.fixture
def images():
    """Eight images of standard deviation 0.75 with labels."""
    rng = np.random.default_rng(1)
    return torch.from_numpy(0.75 * rng.standard_normal((8, 1, 8, 8))).float(), torch.arange(8)


def make(net, scd=False, sigma_data=SD, **options):
    """A module whose second network is unlike the student, as after some steps."""
    teacher = randomize(DDPMpp(**TINY), 5)
    module = VariationalScoreDistillation(net, scd=scd, teacher=teacher, sigma_data=sigma_data, **options)
    randomize(module.fake, 7)
    with torch.no_grad():
        for n, weight in enumerate((module.fake_weight, module.vsd_weight, module.adaptive_weight)):
            if weight is not None:
                weight.linear.bias.fill_(0.3 * (n + 1))
    return module


def draw(module, images):
    """What a step draws, in its order."""
    with module.draw(images, 0) as (x_0, _z, _t, label, scale):
        z_max, z_vsd, z_fake = SD * torch.randn(3, *x_0.shape)
        tau_vsd, tau_fake = torch.randn(8) * 2.0 + 0.4, torch.randn(8) * 1.6 - 0.8
    return x_0, label, scale, z_max, z_vsd, z_fake, torch.atan(tau_vsd.exp() / SD), torch.atan(tau_fake.exp() / SD)


def expand(t):
    return t[:, None, None, None]


def losses_by_hand(module, images):
    """The student's and the second network's loss of a step and the size of the difference, spelt out, per sample."""
    _, label, scale, z_max, z_vsd, z_fake, t_vsd, t_fake = draw(module, images)
    told = [label] if scale is None else [label, scale]
    T = torch.full((8,), module.times[0])
    samples = expand(T.cos()) * z_max - expand(T.sin()) * SD * module.backbone(z_max / SD, T, *told)
    fixed = samples.detach()
    x_t = (expand(t_vsd.cos()) * fixed + expand(t_vsd.sin()) * z_vsd) / SD
    with torch.no_grad():
        F_teacher, F_fake = module.teacher(x_t, t_vsd, label), module.fake(x_t, t_vsd, *told)
        if scale is not None:
            F_0 = module.teacher(x_t, t_vsd)
            F_teacher = F_0 + expand(scale) * (F_teacher - F_0)
    w = torch.zeros(8) if module.vsd_weight is None else module.vsd_weight(t_vsd)
    student = w.exp() / 64 * (samples - fixed + F_teacher - F_fake).square().sum((1, 2, 3)) - w
    x_t, v_t = interpolate(fixed, z_fake, t_fake), velocity(fixed, z_fake, t_fake)
    fake = weighted_loss(SD * module.fake(x_t / SD, t_fake, *told) - v_t, module.fake_weight(t_fake))
    return student, fake, (F_teacher - F_fake).square().mean((1, 2, 3)).sqrt()


def gradients(module, loss):
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("guided", [True, False])
def test_step_by_hand(make_net, images, adaptive, guided):
    """Algorithm 3 for one batch, what it logs and every gradient, plain and adaptive, guided or not, from two times."""
    options = {"guidance_range": (1.0, 2.0)} if guided else {"times": (1.3, 0.8)}
    module, logged = make(make_net(guidance=guided), adaptive=adaptive, **options), {}
    module._report = lambda **values: logged.update(values)
    assert (module.vsd_weight is not None) == adaptive
    student, fake, size = (v.mean() for v in losses_by_hand(module, images))
    wanted = student + fake
    found = module.training_step(images, 0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    by_hand = {"loss": student, "fake_loss": fake, "score_difference": size}
    torch.testing.assert_close(logged, by_hand, rtol=1e-5, atol=1e-5)
    for (n, ours), (m, theirs) in zip(gradients(module, found).items(), gradients(module, wanted).items(), strict=True):
        assert n == m
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_each_loss_moves_its_own_parameters(make_net, images):
    """None is in both, which is why one optimizer is as good as two; and none is in neither, as DDP needs."""
    module = make(make_net(), scd=True)
    own = {n for n, p in module.named_parameters() if p.requires_grad}
    with module.draw(images, 0) as inputs:
        z, t = torch.randn(3, 8, 1, 8, 8), torch.rand(2, 8)
        student = module.loss(*inputs, z[0], z[1], t[0])
        fake = module.fake_loss(student.samples, z[2], t[1], images[1])
    of_student, of_fake = (set(gradients(module, loss.mean())) for loss in (student.loss, fake))
    assert not of_student & of_fake and of_student | of_fake == own
    assert {n.partition(".")[0] for n in of_student} == {"backbone", "adaptive_weight", "vsd_weight"}
    assert {n.partition(".")[0] for n in of_fake} == {"fake", "fake_weight"}


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_scd_and_vsd_are_added(make_net, images, weight):
    """The loss and its gradients are those of sCD's module and of VSD's, weighted, for the same batch."""
    both, vsd = make(make_net(), scd=True, lambda_vsd=weight), make(make_net())
    scd = ConsistencyDistillation(make_net(), teacher=both.teacher, sigma_data=SD)
    scd.adaptive_weight.load_state_dict(both.adaptive_weight.state_dict())
    of_vsd, *_ = losses_by_hand(vsd, images)
    wanted = gradients(scd, (loss_scd := scd.training_step(images, 0)))
    for name, gradient in gradients(vsd, weight * of_vsd.mean()).items():
        wanted[name] = wanted.get(name, 0) + gradient
    found = {}
    both._report = lambda **values: found.update(values)
    moved = gradients(both, both.training_step(images, 0))
    torch.testing.assert_close(found["loss"], loss_scd + weight * of_vsd.mean(), rtol=1e-4, atol=1e-5)
    assert set(wanted) == {n for n in moved if not n.startswith("fake")}
    for name, gradient in wanted.items():
        torch.testing.assert_close(moved[name], gradient, rtol=1e-3, atol=1e-5)


def test_one_optimizer_is_as_good_as_two(make_net, images):
    """Three steps of RAdam over both networks give the weights of two optimizers, one for each, bit for bit."""
    finals = []
    for separate in (False, True):
        module = make(make_net())
        groups = [[p for n, p in module.named_parameters() if p.requires_grad]]
        if separate:
            fake = {id(p) for m in (module.fake, module.fake_weight) for p in m.parameters()}
            groups = [[p for p in groups[0] if (id(p) in fake) == chosen] for chosen in (False, True)]
        optimizers = [torch.optim.RAdam(group, lr=0.01) for group in groups]
        for step in range(3):
            loss = module.training_step(images, step)
            gradient = torch.autograd.grad(loss, [p for group in groups for p in group])
            for p, g in zip([p for group in groups for p in group], gradient, strict=True):
                p.grad = g
            for optimizer in optimizers:
                optimizer.step()
        finals.append(torch.nn.utils.parameters_to_vector(module.parameters()).detach())
    assert torch.equal(*finals)


def test_second_network_learns_with_dropout_and_judges_without(make_net, images):
    """As it was made, and as the teacher."""
    module, modes = make(make_net(dropout=0.3)), []
    module.fake.register_forward_hook(lambda net, *_: modes.append(net.training))
    module.training_step(images, 0)
    assert modes == [False, True] and module.fake.training


def test_samples_that_are_not_finite_cost_no_other(make_net, images):
    """One the teacher overflows at is none of the student's, one the second network overflows at is none of either."""
    module, label, logged = make(make_net()), images[1], {}
    module._report = lambda **values: logged.update(values)
    student, fake, size = losses_by_hand(module, images)
    module._seen.update((module.teacher, module.fake))  # which are not asked whether their first output is finite
    for network, bad in ((module.teacher, 2), (module.fake, 5)):
        network.register_forward_hook(lambda net, args, F, bad=label == bad: F.masked_fill(expand(bad), torch.inf))
    well = (label != 2) & (label != 5)
    wanted = student[well].mean() + fake[label != 5].mean()
    found = module.training_step(images, 0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logged["score_difference"], size[well].mean())
    assert (module._nonfinite, module._samples) == (2, 8)
    for ours, theirs in zip(gradients(module, found).values(), gradients(module, wanted).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_recomputed_blocks_of_both_networks(make_net, images):
    """Each block that trains is evaluated once more in the backward pass, sCD's tangent with it; the gradients stay."""
    found, counts = [], []
    for recompute in (False, True):
        module = make(make_net(dropout=0.3), scd=True, activation_checkpointing=recompute, shared_primal=False)
        module.configure_model()
        calls = {"backbone": 0, "fake": 0}
        for name in calls:

            def count(*_, name=name, calls=calls):
                calls[name] += 1

            blocks(getattr(module, name))[1].conv0.register_forward_hook(count)
        found.append(gradients(module, module.training_step(images, 0)))
        counts.append(calls)
    # Generator, tangent and output; judge and denoiser. Those with a gradient once more.
    assert counts == [{"backbone": 3, "fake": 2}, {"backbone": 5, "fake": 3}]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_only_a_tangent_asks_for_forward_mode(images, quiet, tmp_path):
    """Fused attention is good enough for a generator, and refused by name where sCD is added."""
    for scd in (False, True):
        module = VariationalScoreDistillation(Host(Apply(fused)), scd=scd, teacher=Host(), sigma_data=SD)
        loader = torch.utils.data.DataLoader(images[0], batch_size=8)
        trainer = L.Trainer(**quiet, max_steps=1, default_root_dir=tmp_path)
        with pytest.raises(RuntimeError, match=r"inner.1 \(Apply\)") if scd else contextlib.nullcontext():
            trainer.fit(module, loader)
        assert trainer.global_step == (not scd)


def run(module, quiet, tmp_path, steps, **options):
    trainer = L.Trainer(**quiet | {"max_steps": steps, "default_root_dir": tmp_path} | options)
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=8), ckpt_path=options.pop("ckpt_path", None))
    return trainer


class Record(L.Callback):
    """Logged numbers of every step; stops the process, in effect, where told."""

    def __init__(self, die=None):
        self.rows, self.die = [], die

    def on_train_batch_end(self, trainer, *_):
        self.rows.append({k: v.item() for k, v in trainer.callback_metrics.items()})
        if trainer.global_step == self.die:
            raise KeyboardInterrupt


@pytest.mark.parametrize("scd", [False, True])
def test_killed_run_resumes_as_if_it_had_not_been(make_net, quiet, tmp_path, scd):
    """Losses and weights of both networks, averages and optimizer: from the last checkpoint on, bit for bit."""

    def fit(folder, die=None, ckpt_path=None):
        module = make(
            make_net(dropout=0.1), scd=scd, sigma_data=0.752, optimizer=lambda p: torch.optim.Adam(p, lr=0.003)
        )
        record = Record(die)
        save = ModelCheckpoint(folder, save_last=True, every_n_train_steps=2, save_top_k=0)
        callbacks = [EMA(decay=0.8), TangentWarmup(10), save, record]
        trainer = L.Trainer(
            **quiet | {"enable_checkpointing": True}, max_steps=5, callbacks=callbacks, default_root_dir=tmp_path
        )
        try:
            trainer.fit(module, datamodule=DigitsDataModule(batch_size=8), ckpt_path=ckpt_path)
        except (KeyboardInterrupt, SystemExit):
            assert die is not None
        return record.rows, module

    whole, unbroken = fit(tmp_path / "whole")
    fit(tmp_path / "killed", die=3)
    rows, resumed = fit(tmp_path / "killed", ckpt_path=tmp_path / "killed" / "last.ckpt")
    assert len(rows) == 3 and rows == whole[2:]
    assert set(rows[0]) == {"loss", "fake_loss", "score_difference"} | ({"tangent_norm"} if scd else set())
    for (name, a), b in zip(unbroken.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_only_the_student_is_averaged_and_both_are_saved(make_net, quiet, tmp_path):
    """A checkpoint has the student's average, the second network as it trains, and no teacher; it reloads by itself."""
    module, live = make(make_net(), scd=True, sigma_data=0.752), {}
    path = tmp_path / "student.ckpt"

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 3:
                live.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})
                trainer.save_checkpoint(path)

    module.optimizer = lambda p: torch.optim.Adam(p, lr=0.01)
    run(module, quiet, tmp_path, 3, callbacks=[EMA(decay=0.5), Save()])
    saved = torch.load(path, weights_only=True)
    state = saved["state_dict"]
    assert {n.partition(".")[0] for n in state} == {
        "backbone", "fake", "fake_weight", "vsd_weight", "adaptive_weight"
    }  # fmt: skip
    for name, weight in state.items():
        assert torch.equal(weight, live[name]) != (name.startswith("backbone.") and weight.std() != 0), name
    assert {n: w for n, w in saved["ema"]["weights"].items()}.keys() == dict(module.backbone.named_parameters()).keys()
    reloaded = VariationalScoreDistillation.load_from_checkpoint(path, backbone=make_net(seed=9))
    assert reloaded.scd and reloaded.times == [T_MAX] and reloaded.teacher is None
    ask = {"index": [0, 1], "shape": (1, 8, 8), "label": torch.tensor([1, 2])}
    assert torch.equal(reloaded.sample(**ask), module.sample(**ask)) and module.nfe == 1


def test_both_networks_start_from_the_teacher(make_net, quiet, tmp_path):
    """From the averaged weights of its checkpoint."""
    path = tmp_path / "teacher.ckpt"
    weights = make_net(seed=4).state_dict()
    torch.save({"state_dict": {f"backbone.{n}": w for n, w in weights.items()}}, path)
    module = VariationalScoreDistillation(make_net(), teacher_checkpoint=str(path), sigma_data=0.752)
    module.optimizer = lambda p: torch.optim.SGD(p, lr=0.0)
    run(module, quiet, tmp_path, 1)
    for network in (module.backbone, module.fake, module.teacher):
        assert all(torch.equal(w, weights[n]) for n, w in network.state_dict().items())
    assert module.fake.training and not {*map(id, module.fake.parameters())} & {*map(id, module.backbone.parameters())}


@pytest.mark.parametrize("reload", [False, True])
@pytest.mark.parametrize("segments", [None, 2])
def test_second_fit_goes_on(make_net, quiet, tmp_path, reload, segments):
    """With what the first has learnt or a checkpoint holds, not from the teacher once more; the teacher stays."""
    path, starts = tmp_path / "teacher.ckpt", []
    torch.save({"state_dict": {f"backbone.{n}": w for n, w in make_net(seed=4).state_dict().items()}}, path)
    model, options = VariationalScoreDistillation, {}
    if segments:
        model, options = MultistepConsistencyDistillation, {"segments": segments}
    optimizer = lambda p: torch.optim.Adam(p, lr=0.01)  # noqa: E731
    module = model(make_net(**options), teacher_checkpoint=str(path), sigma_data=0.752, optimizer=optimizer, **options)

    class Start(L.Callback):
        def on_train_start(self, trainer, pl_module):
            starts.append({n: w.clone() for n, w in pl_module.named_parameters()})

    for _ in range(2):
        # In the first step VSD's teacher and second network are one, and move nothing.
        trainer = run(module, quiet, tmp_path, 2, callbacks=[Start()])
        starts.append({n: w.clone() for n, w in module.named_parameters()})
        if reload:
            trainer.save_checkpoint(tmp_path / "student.ckpt")
            module = model.load_from_checkpoint(tmp_path / "student.ckpt", backbone=make_net(seed=9, **options))
    first, learnt, second, _ = starts
    assert first.keys() == second.keys() and any(n.startswith("teacher") for n in second)
    for name, weight in second.items():
        assert torch.equal(weight, learnt[name])
        assert torch.equal(weight, first[name]) == name.startswith("teacher"), name


def test_half_precision_moves_both_networks(make_net, quiet, tmp_path):
    """Weights that autocast rounded in the pass without gradient are not taken for those of the pass with it."""
    module, missing = make(make_net(), scd=True, sigma_data=0.752), []

    class Look(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            named = [(n, p) for n, p in pl_module.named_parameters() if p.requires_grad]
            missing.extend(n for n, p in named if p.grad is None or not p.grad.abs().sum() > 0)

    run(module, quiet, tmp_path, 1, precision="bf16-mixed", callbacks=[Look()])
    assert not missing


def test_weight_normalisation_is_forced_on_both(make_plain_net, images, quiet, tmp_path):
    """EDM2's, after each step."""
    net, calls = make_plain_net(), []
    net.normalize_weights = lambda: calls.append("student")
    module = VariationalScoreDistillation(net, teacher=make_plain_net(seed=1), sigma_data=SD)
    module.fake.normalize_weights = lambda: calls.append("fake")
    calls.clear()
    loader = torch.utils.data.DataLoader(images[0], batch_size=4)
    L.Trainer(**quiet, max_steps=2, default_root_dir=tmp_path).fit(module, loader)
    assert calls == ["student", "fake"] * 2


@pytest.mark.parametrize("scd", [False, True])
def test_compiled_step_is_the_eager_one(make_plain_net, images, scd):
    """Two graphs, one for each network's loss."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"scd": scd, "teacher": make_plain_net(seed=1), "sigma_data": SD}
    eager, compiled = (
        VariationalScoreDistillation(make_plain_net(), **options, compile=c) for c in (False, {"backend": "aot_eager"})
    )
    for step in range(2):
        torch.testing.assert_close(compiled.training_step(images[0], step), eager.training_step(images[0], step))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
