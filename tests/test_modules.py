"""LightningModules: their losses by hand, their randomness, the teacher, sampling, checkpoints."""

import math

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from sclightning.callbacks import EMA
from sclightning.data import DigitsDataModule
from sclightning.modules import ConsistencyDistillation, ConsistencyTraining, TrigFlowDiffusion
from sclightning.modules.base import TrigFlowModule, guided_velocity
from sclightning.sampling import T_MAX, heun, karras_times, sample_noise

SD = 0.75
pytestmark = pytest.mark.filterwarnings("ignore")


def set_adaptive_weight(module):
    """Give w_phi(t) a value that is neither zero nor flat."""
    with torch.no_grad():
        module.adaptive_weight.linear.weight.copy_(torch.linspace(-0.2, 0.3, 128)[None])
        module.adaptive_weight.linear.bias.fill_(0.7)
    return module


def expand(t):
    return t[:, None, None, None]


def gradients(module, loss):
    """Gradients of a loss in the backbone and the adaptive weight, in one vector."""
    parameters = [*module.backbone.parameters(), *module.adaptive_weight.parameters()]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
    )


def consistency_loss_by_hand(module, network, x_t, dx_t, t, r, c=0.1):
    """Algorithm 1 for l2-normalised tangents, spelt out."""
    cos, sin = expand(t.cos()), expand(t.sin())
    F, dF_dt = torch.func.jvp(network, (x_t / SD, t), (dx_t / SD, torch.ones_like(t)))
    F_minus, dF_dt = F.detach(), dF_dt.detach()
    g = -(cos**2) * (SD * F_minus - dx_t) - r * cos * sin * (x_t + SD * dF_dt)
    g = g / (g.square().sum((1, 2, 3), keepdim=True).sqrt() + c)
    w = module.adaptive_weight(t)
    return (w.exp() / g[0].numel() * (F - F_minus - g).square().sum((1, 2, 3)) - w).mean()


def assert_same_loss(module, loss, expected):
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(module, loss), gradients(module, expected), rtol=1e-3, atol=1e-5)


def fit(module, quiet, tmp_path, data=None, **options):
    """Train a module for two steps unless told otherwise."""
    trainer = L.Trainer(**{**quiet, "max_steps": 2, "default_root_dir": tmp_path, **options})
    if isinstance(data, DataLoader):
        trainer.fit(module, data)
    else:
        trainer.fit(module, datamodule=data or DigitsDataModule(batch_size=8))
    return trainer


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory):
    """Checkpoint of a diffusion model trained with EMA, as a dictionary and as a path."""
    from conftest import TINY, randomize

    from sclightning.backbones import DDPMpp

    path = tmp_path_factory.mktemp("teacher") / "teacher.ckpt"
    module = TrigFlowDiffusion(
        randomize(DDPMpp(**TINY)), sigma_data=0.752, optimizer=lambda p: torch.optim.Adam(p, lr=0.01)
    )

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                trainer.save_checkpoint(path)

    L.Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[EMA(decay=0.5), Save()],
    ).fit(module, datamodule=DigitsDataModule(batch_size=8))
    return torch.load(path, weights_only=True), str(path)


# --- The losses -------------------------------------------------------------------------------------------------------


def test_diffusion_loss_by_hand(make_net, batch):
    """Eq. 4 with the adaptive weight: e^w/D |sigma_d F(x_t/sigma_d, t) - (cos t z - sin t x_0)|^2 - w."""
    module = set_adaptive_weight(TrigFlowDiffusion(make_net(), sigma_data=SD))
    x_0, label = batch
    with module._draw(x_0, 3) as (z, t):
        pass
    x_t, v_t = expand(t.cos()) * x_0 + expand(t.sin()) * z, expand(t.cos()) * z - expand(t.sin()) * x_0
    F, w = module.backbone(x_t / SD, t, label), module.adaptive_weight(t)
    expected = (w.exp() / 64 * (SD * F - v_t).square().sum((1, 2, 3)) - w).mean()
    assert_same_loss(module, module.training_step(batch, 3), expected)


@pytest.mark.parametrize("r", [0.0, 0.3, 1.0])
def test_consistency_training_loss_by_hand(make_net, batch, r):
    """Algorithm 1 with the sample's own velocity, at every tangent warm-up."""
    module = set_adaptive_weight(ConsistencyTraining(make_net(), sigma_data=SD))
    module.tangent_warmup.fill_(r)
    x_0, label = batch
    with module._draw(x_0, 0) as (z, t):
        pass
    x_t, dx_t = expand(t.cos()) * x_0 + expand(t.sin()) * z, expand(t.cos()) * z - expand(t.sin()) * x_0
    expected = consistency_loss_by_hand(module, lambda x, t: module.backbone(x, t, label), x_t, dx_t, t, r)
    assert_same_loss(module, module.training_step(batch, 0), expected)


def test_distillation_loss_by_hand(make_net, batch):
    """Algorithm 1 with the velocity of the teacher, which is another network than the student."""
    teacher = make_net(seed=5)
    module = set_adaptive_weight(ConsistencyDistillation(make_net(), teacher=teacher, sigma_data=SD))
    x_0, label = batch
    with module._draw(x_0, 0) as (z, t):
        pass
    x_t = expand(t.cos()) * x_0 + expand(t.sin()) * z
    dx_t = SD * teacher(x_t / SD, t, label).detach()
    expected = consistency_loss_by_hand(module, lambda x, t: module.backbone(x, t, label), x_t, dx_t, t, 1.0)
    assert_same_loss(module, module.training_step(batch, 0), expected)


def test_guided_distillation_loss_by_hand(make_net, batch):
    """The teacher is guided by the scale that the student is told, drawn for each sample."""
    teacher = make_net(seed=5)
    module = set_adaptive_weight(
        ConsistencyDistillation(make_net(guidance=True), teacher=teacher, guidance_range=(1.0, 2.0), sigma_data=SD)
    )
    x_0, label = batch
    with module._draw(x_0, 0) as (z, t):
        s = module.draw_guidance(x_0)
    assert len(s.unique()) == 8 and s.min() >= 1 and s.max() <= 2
    x_t = expand(t.cos()) * x_0 + expand(t.sin()) * z
    F_c, F_0 = teacher(x_t / SD, t, label).detach(), teacher(x_t / SD, t, None).detach()
    dx_t = SD * (F_0 + expand(s) * (F_c - F_0))
    expected = consistency_loss_by_hand(module, lambda x, t: module.backbone(x, t, label, s), x_t, dx_t, t, 1.0)
    assert_same_loss(module, module.training_step(batch, 0), expected)


def test_guidance_scales_fill_their_range(make_net):
    """Uniform over the range: its ends and its moments."""
    module = ConsistencyDistillation(make_net(guidance=True), teacher=make_net(), guidance_range=(1.5, 4.0))
    torch.manual_seed(0)
    s = module.draw_guidance(torch.zeros(20_000, 1))
    assert 1.5 <= s.min() < 1.51 and 3.99 < s.max() <= 4.0
    assert abs(s.mean() - 2.75) < 0.02 and abs(s.std() - 2.5 / 12**0.5) < 0.02


def test_guided_velocity_by_hand(make_net, batch):
    """F_0 + s (F_c - F_0), for a number and for one scale per sample."""
    net, (x, label), t = make_net(), batch, torch.linspace(0.1, 1.5, 8)
    F_c, F_0 = net(x, t, label), net(x, t)
    torch.testing.assert_close(guided_velocity(net, x, t, label, 1.0), F_c)
    torch.testing.assert_close(guided_velocity(net, x, t, label, 0.0), F_0)
    s = torch.linspace(0, 3, 8)
    torch.testing.assert_close(guided_velocity(net, x, t, label, s), F_0 + expand(s) * (F_c - F_0))


@pytest.mark.parametrize("normalization", ["l2", "rms", "clip", "none"])
def test_loss_is_the_same_in_one_pass_and_in_two(make_net, batch, normalization):
    """``shared_primal`` changes the cost, not the loss or its gradient, dropout included."""
    found = []
    for shared_primal in (True, False):
        net = make_net(dropout=0.3)
        module = ConsistencyTraining(net, sigma_data=SD, shared_primal=shared_primal, normalization=normalization)
        loss = module.training_step(batch, 0)
        found.append(torch.cat([loss.detach()[None], gradients(module, loss)]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_label_dropout_rate(make_net):
    """Labels are dropped one by one with the given probability, and not at all at zero."""
    for rate in (0.0, 0.3, 1.0):
        net, seen = make_net(), []
        spy = lambda _, args, kwargs, seen=seen: seen.append(kwargs["label"])  # noqa: E731
        net.register_forward_pre_hook(spy, with_kwargs=True)
        module = TrigFlowDiffusion(net, sigma_data=SD, label_dropout=rate)
        module.training_step((torch.zeros(1000, 1, 8, 8), torch.arange(1000) % 10), 0)
        assert abs((seen[0] == -1).float().mean() - rate) < 0.05 * (0 < rate < 1) + 1e-9
        kept = seen[0] >= 0
        assert torch.equal(seen[0][kept], (torch.arange(1000) % 10)[kept])


def test_batches_that_are_none(make_plain_net, make_net):
    """Images alone may come in a list; images to validate on, and labels that cannot be dropped, are refused."""
    module = TrigFlowDiffusion(make_plain_net(), sigma_data=SD)
    x_0 = SD * torch.randn(4, 1, 8, 8)
    assert torch.equal(module.training_step([x_0], 0), module.training_step(x_0, 0))
    with pytest.raises(TypeError, match=r"SampleRequest, but got list"):
        module.validation_step([x_0], 0)
    module = TrigFlowDiffusion(make_net(), sigma_data=SD, label_dropout=0.1)
    with pytest.raises(TypeError, match=r"label_dropout.*dict"):
        module.training_step((x_0, {"text": torch.zeros(4, 3)}), 0)


# --- Randomness -------------------------------------------------------------------------------------------------------


def draw(module, monkeypatch, step=0, rank=0, batch_idx=0):
    monkeypatch.setattr(type(module), "global_step", step)
    monkeypatch.setattr(type(module), "global_rank", rank)
    with module._draw(torch.zeros(4, 1, 8, 8), batch_idx) as (z, t):
        return z, t


def test_draw_is_keyed_by_seed_step_batch_and_rank(make_net, monkeypatch):
    """The same key draws the same; another seed, step, batch or rank draws another noise and time."""
    make = lambda seed: TrigFlowDiffusion(make_net(), sigma_data=SD, seed=seed)  # noqa: E731
    z, t = draw(make(1), monkeypatch, 2, 3, 4)
    again = draw(make(1), monkeypatch, 2, 3, 4)
    assert torch.equal(z, again[0]) and torch.equal(t, again[1])
    others = [(2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 2, 4), (1, 2, 3, 5), (1, 3, 2, 4), (1, 4, 3, 2)]
    for seed, *key in others:
        z_other, t_other = draw(make(seed), monkeypatch, *key)
        assert not (z == z_other).any() and not (t == t_other).any()


def test_draw_has_the_paper_distribution(make_net):
    """The noise is N(0, sigma_d^2 I), log(sigma_d tan t) is N(P_mean, P_std^2), t is float32."""
    module = TrigFlowDiffusion(make_net(), sigma_data=SD, P_mean=-0.8, P_std=1.6)
    with module._draw(torch.zeros(20_000, 1, 2, 2), 0) as (z, t):
        pass
    tau = (SD * t.double().tan()).log()
    assert t.dtype == torch.float32 and abs(z.mean()) < 0.01 and abs(z.std() - SD) < 0.01
    assert abs(tau.mean() + 0.8) < 0.05 and abs(tau.std() - 1.6) < 0.05


@pytest.mark.parametrize("model", [TrigFlowDiffusion, ConsistencyTraining])
def test_step_neither_reads_nor_moves_the_global_random_state(make_net, batch, model):
    """A step's loss, dropout and all, is its own: whatever was drawn before, and nothing is drawn after."""
    module = model(make_net(dropout=0.5), sigma_data=SD)
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        losses.append(module.training_step(batch, 0).item())
        assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1] != module.training_step(batch, 1).item()


class Record(L.Callback):
    """Logged numbers of every step."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *_):
        self.rows.append([v.item() for v in trainer.callback_metrics.values()])


GOLDEN = {
    # loss
    "TrigFlowDiffusion": """
        1.892995 1.0573661 0.90488121 0.77748761 0.67744696 0.63538751 0.62512788 0.56630147 0.74076402 0.52485007
    """,
    # loss, tangent_norm
    "ConsistencyDistillation": """
        0.0147272 0.503304 -0.29571973 0.66498226 -0.60429531 0.56587768 -0.90691185 0.45312652 -1.2023529 0.49465495
        -1.4894458 0.57055688 -1.7651719 0.5692873 -2.0223179 0.4891597 -2.2617936 0.40572423 -2.4789336 0.59781617
    """,
}


@pytest.mark.parametrize("model", GOLDEN)
def test_ten_steps_keep_their_loss(make_net, quiet, tmp_path, model):
    """Ten steps repeat bit for bit in one process, and give the numbers that torch 2.11 and 2.15 gave."""
    runs = []
    for _ in range(2):
        record, optimizer = Record(), lambda p: torch.optim.SGD(p, lr=0.005)
        net = make_net(dropout=0.1)
        if model == "TrigFlowDiffusion":
            module = TrigFlowDiffusion(net, sigma_data=0.752, optimizer=optimizer)
        else:
            module = ConsistencyDistillation(net, teacher=make_net(seed=1), sigma_data=0.752, optimizer=optimizer)
        fit(module, quiet, tmp_path, max_steps=10, callbacks=[record])
        runs.append(record.rows)
    assert runs[0] == runs[1]
    golden = torch.tensor([float(number) for number in GOLDEN[model].split()])
    torch.testing.assert_close(torch.tensor(runs[0]).flatten(), golden, rtol=2e-5, atol=2e-5)


# --- Samples that are not finite --------------------------------------------------------------------------------------


class Overflow(torch.nn.Module):
    """A network that overflows at early times, in its output or in what it keeps for the backward pass."""

    def __init__(self, net, where="output"):
        super().__init__()
        self.net, self.where, self.times = net, where, []

    def forward(self, x, t):
        self.times.append(t.detach())
        overflow = expand(torch.where(t < 0.3, torch.inf, 0.0))
        return self.net(x, t) + overflow if self.where == "output" else self.net(x + overflow, t)


def overflowing(make_plain_net, model, where="output", **options):
    """A module of which a network overflows, one that has been looked at."""
    net = Overflow(make_plain_net(), where)
    if model is ConsistencyDistillation:  # the teacher's velocity, and with it the tangent
        module = model(make_plain_net(seed=1), teacher=net, sigma_data=SD, **options)
    else:
        module = model(net, sigma_data=SD, **options)
    module._seen |= {net, module.backbone}
    return module, net


@pytest.mark.parametrize("options", [{}, {"compile": {"backend": "eager"}}], ids=["eager", "compiled"])
@pytest.mark.parametrize("model", [TrigFlowDiffusion, ConsistencyTraining, ConsistencyDistillation])
def test_a_sample_that_overflows_is_left_out(make_plain_net, batch, model, options):
    """Loss and gradients are those of the other samples; the count is right."""
    module, _ = overflowing(make_plain_net, model, **options)
    with module._draw(batch[0], 0) as (z, t):
        keep = t >= 0.3
    assert 0 < keep.sum() < 8
    expected, _ = overflowing(make_plain_net, model)
    result = expected.loss(batch[0][keep], z[keep], t[keep])
    result = (result if model is TrigFlowDiffusion else result.loss).mean()
    loss = module.training_step(batch[0], 0)
    assert loss.isfinite()
    torch.testing.assert_close(loss, result)
    torch.testing.assert_close(gradients(module, loss), gradients(expected, result), rtol=1e-4, atol=1e-6)
    assert module._nonfinite == (~keep).sum() and module._samples == 8
    torch._dynamo.reset()


def test_what_overflows_inside_the_network_cannot_be_left_out(make_plain_net, batch):
    """Zero times infinity: the limit that weighted_loss states, and that FiniteGradients is for."""
    module, _ = overflowing(make_plain_net, TrigFlowDiffusion, "inside")
    loss = module.training_step(batch[0], 0)
    assert loss.isfinite() and not gradients(module, loss).isfinite().all()


def test_the_share_of_left_out_samples_is_logged(make_plain_net, batch, quiet, tmp_path):
    """Over the steps since it was logged before, and none is forgotten where gradients are accumulated."""
    for accumulate in (1, 2):
        module, net = overflowing(make_plain_net, ConsistencyTraining, seed=2)
        module.on_train_batch_start = lambda *_: None  # the look at forward-mode AD calls the network too
        logger = CSVLogger(tmp_path, str(accumulate), "")
        options = {"max_steps": 4, "log_every_n_steps": 2, "accumulate_grad_batches": accumulate, "logger": logger}
        fit(module, quiet, tmp_path, DataLoader(batch[0].repeat(2, 1, 1, 1), batch_size=4), **options)
        header, *lines = (tmp_path / str(accumulate) / "metrics.csv").read_text().splitlines()
        column = header.split(",").index("nonfinite_samples")
        found = [float(line.split(",")[column]) for line in lines]
        early = torch.stack(net.times) < 0.3
        assert early.shape == (4 * accumulate, 4) and early.sum() > 0
        assert found == early.view(2, -1).float().mean(1).tolist() and found[0] != found[1]


def test_a_batch_without_a_finite_sample_shows(make_plain_net, batch):
    """Its loss is not a number, in place of a zero that looks well."""
    module, _ = overflowing(make_plain_net, ConsistencyTraining)
    module.P_mean = -20.0
    assert module.training_step(batch[0], 0).isnan()


# --- The teacher ------------------------------------------------------------------------------------------------------


def test_student_and_teacher_start_from_the_averaged_weights(make_net, quiet, tmp_path, teacher_run):
    """Both hold the checkpoint's averages, not its weights in training, when the first step begins."""
    checkpoint, path = teacher_run
    module = ConsistencyDistillation(make_net(seed=7), teacher_checkpoint=path, sigma_data=0.752)
    module.optimizer = lambda p: torch.optim.SGD(p, lr=0.0)
    fit(module, quiet, tmp_path, max_steps=1)
    for name, weight in module.backbone.named_parameters():
        assert torch.equal(weight, checkpoint["state_dict"][f"backbone.{name}"])
        assert torch.equal(module.teacher.get_parameter(name), weight)
        assert not torch.equal(weight, checkpoint["ema"]["weights"][name])
    student = ConsistencyTraining(make_net(seed=7), teacher_checkpoint=path, sigma_data=0.752)
    student.optimizer = lambda p: torch.optim.SGD(p, lr=0.0)
    fit(student, quiet, tmp_path, max_steps=1)
    for name, weight in student.backbone.named_parameters():
        assert torch.equal(weight, checkpoint["state_dict"][f"backbone.{name}"])


def test_student_with_guidance_input_starts_from_a_teacher_without(make_net, quiet, tmp_path, teacher_run):
    """Only the guidance embedding keeps its own initialisation."""
    checkpoint, path = teacher_run
    net = make_net(seed=7, guidance=True)
    guidance = net.guidance_embedding.weight.detach().clone()
    module = ConsistencyDistillation(
        net, path, teacher=make_net(seed=8), guidance_range=(1.0, 2.0), sigma_data=0.752, guidance_scale=1.5
    )
    module.optimizer = lambda p: torch.optim.SGD(p, lr=0.0)
    fit(module, quiet, tmp_path, max_steps=1)
    assert torch.equal(net.guidance_embedding.weight, guidance)
    for name, weight in module.teacher.named_parameters():
        assert torch.equal(weight, checkpoint["state_dict"][f"backbone.{name}"])
        assert torch.equal(net.get_parameter(name), weight)


def test_teacher_stays_frozen_and_out_of_checkpoints(make_net, quiet, tmp_path, teacher_run):
    """Training moves the student only; the teacher is in eval mode, has no gradient and is not saved."""
    checkpoint, path = teacher_run
    module = ConsistencyDistillation(make_net(dropout=0.5), teacher_checkpoint=path, sigma_data=0.752)
    modes = []

    class Spy(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            modes.append((pl_module.backbone.training, *[m.training for m in pl_module.teacher.modules()]))

    trainer = fit(module, quiet, tmp_path, callbacks=[Spy()])
    assert len(modes) == 2 and all(mode[0] and not any(mode[1:]) for mode in modes)
    assert not any(p.requires_grad for p in module.teacher.parameters())
    for name, weight in module.teacher.named_parameters():
        assert torch.equal(weight, checkpoint["state_dict"][f"backbone.{name}"])
    assert not torch.equal(module.teacher.out_conv.weight, module.backbone.out_conv.weight)
    module.train()
    assert module.backbone.training and not module.teacher.training

    saved = tmp_path / "student.ckpt"
    trainer.save_checkpoint(saved)
    state = torch.load(saved, weights_only=True)["state_dict"]
    assert state and not any(name.startswith("teacher") for name in state)


def test_resuming_with_a_teacher_loads_strictly(make_net, quiet, tmp_path, teacher_run):
    """A student's checkpoint resumes although the teacher is not in it, and a missing weight is still noticed."""
    _, path = teacher_run
    make = lambda: ConsistencyDistillation(make_net(), teacher_checkpoint=path, sigma_data=0.752)  # noqa: E731
    saved = tmp_path / "student.ckpt"
    fit(make(), quiet, tmp_path).save_checkpoint(saved)
    trained = torch.load(saved, weights_only=True)
    module = make()
    L.Trainer(**quiet, max_steps=2, default_root_dir=tmp_path).fit(
        module, datamodule=DigitsDataModule(batch_size=8), ckpt_path=saved
    )
    for name, weight in module.backbone.named_parameters():
        assert torch.equal(weight, trained["state_dict"][f"backbone.{name}"])
    del trained["state_dict"]["backbone.out_conv.weight"]
    torch.save(trained, saved)
    with pytest.raises(ValueError, match=r"another network.*1 tensors differ, first out_conv\.weight"):
        L.Trainer(**quiet, max_steps=2, default_root_dir=tmp_path).fit(
            make(), datamodule=DigitsDataModule(batch_size=8), ckpt_path=saved
        )


def test_optimizer_has_student_and_adaptive_weight_only(make_net, quiet, tmp_path, teacher_run):
    """Everything that trains and nothing else; a schedule is stepped with the optimizer."""
    module = ConsistencyDistillation(
        make_net(),
        teacher_checkpoint=teacher_run[1],
        sigma_data=0.752,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.1),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
    )
    trainer = fit(module, quiet, tmp_path)
    (group,) = trainer.optimizers[0].param_groups
    expected = [*module.backbone.parameters(), *module.adaptive_weight.parameters()]
    assert {id(p) for p in group["params"]} == {id(p) for p in expected}
    assert group["lr"] == 0.1 * 0.5**2


def test_adaptive_weight_learns(make_net, quiet, tmp_path):
    """It moves with the rest, from zero."""
    module = ConsistencyTraining(make_net(), sigma_data=0.752)
    assert module.adaptive_weight(torch.ones(2)).tolist() == [0, 0]
    fit(module, quiet, tmp_path)
    assert (module.adaptive_weight(torch.ones(2)) != 0).all()


# --- Errors -----------------------------------------------------------------------------------------------------------


def sentence(error):
    """The message, if it is one line."""
    assert "\n" not in str(error.value)
    return str(error.value)


def test_distillation_without_a_teacher_is_refused(make_net, quiet, tmp_path):
    """The message names the two ways to give one."""
    with pytest.raises(ValueError, match=r"no teacher.*teacher_checkpoint.*teacher") as error:
        fit(ConsistencyDistillation(make_net(), sigma_data=0.752), quiet, tmp_path)
    assert sentence(error)


def test_two_teachers_are_refused(make_net, quiet, tmp_path, teacher_run):
    """Pretrained weights and a checkpoint; a network that brings none takes the checkpoint's."""
    teacher = make_net(seed=3)
    fit(ConsistencyDistillation(make_net(), teacher_run[1], teacher=teacher, sigma_data=0.752), quiet, tmp_path)
    teacher.provenance = {"source": "edm.pt"}
    with pytest.raises(
        ValueError, match=r"two teachers, the weights from edm\.pt .*teacher_checkpoint=.*leave one"
    ) as error:
        ConsistencyDistillation(make_net(), teacher_run[1], teacher=teacher, sigma_data=0.752)
    assert sentence(error)
    # A student that is an adapter itself is made a teacher of by its own checkpoint, fit after fit.
    student = make_net()
    student.provenance = {"source": "edm.pt"}
    module = ConsistencyDistillation(student, teacher_run[1], sigma_data=0.752)
    for _ in range(2):
        fit(module, quiet, tmp_path)


def test_teacher_that_is_the_student_is_refused(make_net):
    """Freezing it would freeze the student."""
    net = make_net()
    with pytest.raises(ValueError, match="shares parameters with the student's backbone"):
        ConsistencyDistillation(net, teacher=net)
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("model", [ConsistencyTraining, ConsistencyDistillation])
def test_missing_teacher_checkpoint_is_refused(make_net, quiet, tmp_path, model):
    """The message names the path."""
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt.*teacher") as error:
        fit(model(make_net(), teacher_checkpoint="nowhere.ckpt", sigma_data=0.752), quiet, tmp_path)
    assert sentence(error)


@pytest.mark.parametrize(
    "options", [{"channels": 16}, {"num_blocks": 2}, {"num_classes": 0}, {"attention_resolutions": [4, 8]}]
)
def test_teacher_of_another_architecture_is_refused(make_net, quiet, tmp_path, teacher_run, options):
    """Other shapes, tensors too many and tensors too few are all noticed."""
    with pytest.raises(ValueError, match="another network") as error:
        fit(ConsistencyDistillation(make_net(**options), teacher_run[1], sigma_data=0.752), quiet, tmp_path)
    assert sentence(error)


def test_wrong_sigma_data_is_refused(make_net, quiet, tmp_path):
    """The data's own value is in the message."""
    with pytest.raises(ValueError, match=r"sigma_data=0\.5.* to 0\.751") as error:
        fit(ConsistencyTraining(make_net()), quiet, tmp_path)
    assert sentence(error)
    with pytest.raises(ValueError, match="standard deviation of 0"):
        fit(ConsistencyTraining(make_net(), sigma_data=0.69), quiet, tmp_path)  # by 9 %
    fit(ConsistencyTraining(make_net(), sigma_data=0.73), quiet, tmp_path)  # by 3 %


def test_sampling_needs_no_images(make_net, quiet, tmp_path):
    """Training images are read for training."""

    class Gone(DigitsDataModule):
        def read(self, split):
            raise FileNotFoundError(split)

    trainer = L.Trainer(**quiet, default_root_dir=tmp_path)
    data = Gone(num_test_samples=3)
    (samples,) = trainer.predict(ConsistencyTraining(make_net(), sigma_data=0.752), datamodule=data)
    assert samples.shape == (3, 1, 8, 8) and samples.isfinite().all()


class WrongShape(torch.nn.Module):
    def forward(self, x, t):
        return x[:, :, :4]


class NotANumber(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, t):
        return (x * self.weight - x) / (self.weight - 1)


@pytest.mark.parametrize("model", [TrigFlowDiffusion, ConsistencyTraining])
@pytest.mark.parametrize(
    ("net", "words"), [(WrongShape, r"\(8, 1, 4, 8\).*\(8, 1, 8, 8\)"), (NotANumber, "not finite")]
)
def test_bad_network_output_is_refused(batch, model, net, words):
    """A wrong shape and a NaN are errors in the first step."""
    with pytest.raises(ValueError, match=words) as error:
        model(net(), sigma_data=SD).training_step(batch[0], 0)
    assert sentence(error)


@pytest.mark.parametrize("bad", ["student", "teacher"])
@pytest.mark.parametrize(("net", "words"), [(WrongShape, r"\(8, 1, 4, 8\)"), (NotANumber, "not finite")])
def test_bad_output_in_distillation_is_refused(make_plain_net, batch, bad, net, words):
    """Student and teacher are looked at separately."""
    student, teacher = (net(), make_plain_net()) if bad == "student" else (make_plain_net(), net())
    module = ConsistencyDistillation(student, teacher=teacher, sigma_data=SD)
    with pytest.raises(ValueError, match=words):
        module.training_step(batch[0], 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_time_is_refused(make_net, batch, dtype):
    """Times in half precision would destroy the tangent."""
    module = TrigFlowDiffusion(make_net(), sigma_data=SD)
    with pytest.raises(TypeError, match="float32") as error:
        module(batch[0], torch.full((8,), 0.5, dtype=dtype), batch[1])
    assert sentence(error)


# --- Other people's networks, precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [TrigFlowDiffusion, ConsistencyTraining, ConsistencyDistillation])
def test_network_of_two_arguments_in_a_plain_trainer(make_plain_net, batch, quiet, tmp_path, model):
    """``net(x, t)`` is enough of a network, images without labels of a batch, and no data module is needed."""
    teacher = {"teacher": make_plain_net(seed=1)} if model is ConsistencyDistillation else {}
    module = model(make_plain_net(), sigma_data=SD, **teacher)
    before = [p.detach().clone() for p in module.backbone.parameters()]
    loader = DataLoader(batch[0], batch_size=4)
    fit(module, quiet, tmp_path, data=loader)
    assert all(not torch.equal(b, p) for b, p in zip(before, module.backbone.parameters(), strict=True))
    samples = module.sample([0, 1, 2], (1, 8, 8))
    assert samples.shape == (3, 1, 8, 8) and samples.isfinite().all() and samples.dtype == torch.float32


@pytest.mark.parametrize("model", [TrigFlowDiffusion, ConsistencyTraining])
def test_images_of_another_range_are_noticed(make_plain_net, quiet, tmp_path, model, recwarn):
    """With data of one's own: bytes are refused, images in [0, 1] at sigma_data 0.5 get a warning, right ones none."""
    pixels = torch.randint(256, (8, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"torch.uint8.*127.5 - 1"):
        fit(model(make_plain_net(), sigma_data=0.5), quiet, tmp_path, DataLoader(pixels, batch_size=8))
    unit = DataLoader(pixels / 255, batch_size=8)
    with pytest.warns(UserWarning, match=r"deviation of 0\.2\d+ .*sigma_data=0.5"):
        fit(model(make_plain_net(), sigma_data=0.5), quiet, tmp_path, unit)
    recwarn.clear()
    fit(model(make_plain_net(), sigma_data=0.3), quiet, tmp_path, unit)
    assert not [w for w in recwarn if "standard deviation" in str(w.message)]


@pytest.mark.parametrize("times", [[], [0.9, 1.5], [1.5, 1.5], [1.5, 0.0], [80.0, 0.8]])
def test_times_that_are_no_times_are_refused(make_plain_net, times):
    """None, increasing, twice the same, none of noise, noise levels in place of radians."""
    with pytest.raises(ValueError, match="radians that decrease"):
        ConsistencyTraining(make_plain_net(), times=times)


@pytest.mark.parametrize("model", [TrigFlowDiffusion, ConsistencyTraining, ConsistencyDistillation])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_keeps_times_and_weight_in_float32(make_net, quiet, tmp_path, model, precision):
    """Times reach the network in float32, w_phi leaves its layer in float32, the loss is float32 and finite."""
    teacher = {"teacher": make_net(seed=1)} if model is ConsistencyDistillation else {}
    module, seen = model(make_net(), sigma_data=0.752, **teacher), []
    spy = lambda _, args, kwargs, out: seen.append((args[1].dtype, kwargs["label"].dtype))  # noqa: E731
    module.backbone.register_forward_hook(spy, with_kwargs=True)
    module.adaptive_weight.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    record = Record()
    trainer = fit(module, quiet, tmp_path, precision=precision, callbacks=[record])
    assert set(seen) == {(torch.float32, torch.int64), (torch.float32, torch.float32)}
    assert trainer.callback_metrics["loss"].dtype == torch.float32 and math.isfinite(record.rows[-1][0])
    t = torch.linspace(0, 1.57, 100)  # rounded frequencies would move the embedding by as much as 0.004
    expected = torch.cat([f(t[:, None] * 10_000 ** (-torch.arange(64) / 63)) for f in (torch.cos, torch.sin)], 1)
    torch.testing.assert_close(module.adaptive_weight.embedding(t), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", [TrigFlowDiffusion, ConsistencyTraining])
def test_bf16_loss_is_close_to_float32(make_net, batch, model):
    """Autocast rounds the network, not the rest: the first loss agrees to a percent."""
    module = set_adaptive_weight(model(make_net(), sigma_data=SD))
    expected = module.training_step(batch, 0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.training_step(batch, 0)
    torch.testing.assert_close(loss.float(), expected, rtol=0.01, atol=0.01)


# --- Sampling ---------------------------------------------------------------------------------------------------------


def test_consistency_samples_by_hand(make_net):
    """One step: cos T x - sin T sigma_d F at pure noise; the second adds fresh noise at t = 1.1."""
    net, label = make_net(), torch.tensor([3, 1, 4])
    noise = sample_noise([5, 6, 7], (1, 8, 8), 2, seed=9)
    x, T = SD * noise[0], torch.full((3,), T_MAX)
    one = math.cos(T_MAX) * x - math.sin(T_MAX) * SD * net(x / SD, T, label)
    x = math.cos(1.1) * one + math.sin(1.1) * SD * noise[1]
    two = math.cos(1.1) * x - math.sin(1.1) * SD * net(x / SD, torch.full((3,), 1.1), label)
    module = ConsistencyTraining(net, sigma_data=SD, seed=9)
    assert module.nfe == 2 and module.times == [T_MAX, 1.1]
    torch.testing.assert_close(module.sample([5, 6, 7], (1, 8, 8), label), two.detach(), rtol=1e-4, atol=1e-5)
    module.times = [T_MAX]
    assert module.nfe == 1
    one_step_noise = sample_noise([5, 6, 7], (1, 8, 8), 1, seed=9)[0]
    expected = math.cos(T_MAX) * SD * one_step_noise - math.sin(T_MAX) * SD * net(one_step_noise, T, label)
    torch.testing.assert_close(module.sample([5, 6, 7], (1, 8, 8), label), expected.detach(), rtol=1e-4, atol=1e-5)


def test_diffusion_samples_are_the_solver_of_the_guided_velocity(make_net):
    """The teacher's sampler integrates F_0 + s (F_c - F_0) where a scale is given, F_c otherwise."""
    net, label = make_net(), torch.tensor([3, 1, 4])
    noise = sample_noise([0, 1, 2], (1, 8, 8), 1)[0]
    for scale in (None, 2.0):
        module = TrigFlowDiffusion(net, sigma_data=SD, steps=4, guidance_scale=scale)

        def F(x, t, s=scale or 1.0):
            return net(x, t) + s * (net(x, t, label) - net(x, t))

        expected = heun(F, noise, karras_times(4, SD), SD).float()
        torch.testing.assert_close(module.sample([0, 1, 2], (1, 8, 8), label), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="uidance"):
        module.sample([0], (1, 8, 8))  # no label to leave out


@pytest.mark.parametrize(("solver", "nfe"), [("heun", 9), ("ddim", 5), ("dpm_solver++", 5)])
def test_number_of_evaluations_is_what_the_module_says(make_net, solver, nfe):
    """``nfe`` counts the calls of the network, and the solvers are different ones."""
    net, calls = make_net(), []
    net.register_forward_hook(lambda *_: calls.append(1))
    module = TrigFlowDiffusion(net, sigma_data=SD, solver=solver, steps=5)
    module.sample([0], (1, 8, 8), torch.tensor([1]))
    assert module.nfe == len(calls) == nfe


def test_sampling_uses_the_guidance_scale(make_net):
    """A consistency model with a guidance input is told the scale."""
    net = make_net(guidance=True)
    module = ConsistencyDistillation(net, teacher=make_net(), sigma_data=SD, guidance_scale=1.7, times=[T_MAX])
    noise, label = sample_noise([0, 1], (1, 8, 8), 1)[0], torch.tensor([1, 2])
    F = net(noise, torch.full((2,), T_MAX), label, torch.full((2,), 1.7))
    expected = math.cos(T_MAX) * SD * noise - math.sin(T_MAX) * SD * F
    torch.testing.assert_close(module.sample([0, 1], (1, 8, 8), label), expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [TrigFlowDiffusion, ConsistencyTraining])
def test_sample_is_independent_of_its_batch(make_net, model):
    """A sample depends on (seed, index, label), not on its neighbours, its place or the global random state."""
    module = model(make_net(), sigma_data=SD)
    torch.manual_seed(0)
    together = module.sample(torch.arange(5), (1, 8, 8), torch.arange(5))
    torch.manual_seed(1)
    swapped = module.sample([3, 1], (1, 8, 8), torch.tensor([3, 1]))
    torch.testing.assert_close(swapped, together[[3, 1]], rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_sample_seed_overrides_the_module_seed(make_net):
    """``sample(seed=4)`` of any module is what a module of seed 4 samples; another seed, other samples."""
    module, other = (ConsistencyTraining(make_net(), sigma_data=SD, seed=s) for s in (0, 4))
    ask = {"index": [0, 1], "shape": (1, 8, 8), "label": torch.tensor([1, 2])}
    assert torch.equal(module.sample(**ask, seed=4), other.sample(**ask))
    assert torch.equal(module.sample(**ask, seed=0), module.sample(**ask))
    assert not torch.equal(module.sample(**ask), other.sample(**ask))


@pytest.mark.parametrize("training", [True, False])
def test_sampling_is_in_eval_mode_and_restores_the_mode(make_net, training):
    """No dropout in samples, no gradient on them; training goes on as before."""
    module = ConsistencyTraining(make_net(dropout=0.5), sigma_data=SD).train(training)
    ask = {"index": [0, 1], "shape": (1, 8, 8), "label": torch.tensor([1, 2])}
    samples = module.sample(**ask)
    assert torch.equal(samples, module.sample(**ask)) and not samples.requires_grad
    assert {m.training for m in module.modules()} == {training}


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def test_python_module_reloads_from_its_checkpoint(make_net, quiet, tmp_path):
    """Numbers come from the checkpoint, the network from the caller, and nothing in the file is pickled code."""
    path = tmp_path / "sct.ckpt"
    module = ConsistencyTraining(make_net(), sigma_data=0.76, times=[1.5, 0.9, 0.4], normalization="rms", c=0.2, seed=3)
    fit(module, quiet, tmp_path).save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert saved["hyper_parameters"]["sigma_data"] == 0.76
    reloaded = ConsistencyTraining.load_from_checkpoint(path, backbone=make_net(seed=1))
    for name in ("sigma_data", "times", "normalization", "c", "seed", "P_mean", "P_std"):
        assert getattr(reloaded, name) == getattr(module, name)
    ask = {"index": [0, 1], "shape": (1, 8, 8), "label": torch.tensor([1, 2])}
    assert torch.equal(reloaded.sample(**ask), module.sample(**ask))
    t = torch.tensor([0.3, 1.0])
    assert (
        torch.equal(reloaded.adaptive_weight(t), module.adaptive_weight(t)) and (module.adaptive_weight(t) != 0).all()
    )
    assert ConsistencyTraining.load_from_checkpoint(path, backbone=make_net(), times=[T_MAX]).nfe == 1


def test_distilled_python_module_reloads_without_its_teacher(make_net, quiet, tmp_path):
    """The teacher is needed for training only."""
    path = tmp_path / "scd.ckpt"
    module = ConsistencyDistillation(make_net(), teacher=make_net(seed=1), sigma_data=0.76)
    fit(module, quiet, tmp_path).save_checkpoint(path)
    reloaded = ConsistencyDistillation.load_from_checkpoint(path, backbone=make_net(seed=2))
    ask = {"index": [0, 1], "shape": (1, 8, 8), "label": torch.tensor([1, 2])}
    assert reloaded.teacher is None and torch.equal(reloaded.sample(**ask), module.sample(**ask))


def test_weight_normalisation_is_forced_after_each_step(make_plain_net, batch, quiet, tmp_path):
    """A network with ``normalize_weights`` is normalised when the module is made and after every optimizer step."""
    net, calls = make_plain_net(), []
    net.normalize_weights = lambda: calls.append(torch.is_grad_enabled())
    module = TrigFlowDiffusion(net, sigma_data=SD)
    assert calls == [False]
    fit(module, quiet, tmp_path, data=DataLoader(batch[0], batch_size=4))
    assert calls == [False] * 3


def test_base_class_is_abstract(make_net):
    """A subclass without a sampler says so."""
    base = TrigFlowModule(make_net(), SD, -1.0, 1.4, torch.optim.Adam, None, None, 0)
    with pytest.raises(NotImplementedError, match="sampler"):
        base.sample([0], (1, 8, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_fit_and_sample_on_a_gpu(make_net, quiet, tmp_path, precision):
    """Losses are finite, the global CUDA random state stays, and samples are those of the CPU."""
    module = ConsistencyDistillation(make_net(dropout=0.1), teacher=make_net(seed=1), sigma_data=0.752)
    # Freed memory full of NaN, so that whatever is read without having been written shows.
    poison = [torch.full((n,), torch.nan, device="cuda") for n in (2**k for k in range(7, 19)) for _ in range(40)]
    del poison
    torch.cuda.manual_seed_all(0)
    before = torch.cuda.get_rng_state()
    record = Record()
    fit(module, quiet, tmp_path, accelerator="gpu", devices=1, precision=precision, callbacks=[record])
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert all(math.isfinite(number) for row in record.rows for number in row)
    ask = {"index": [0, 1], "shape": (1, 8, 8), "label": torch.tensor([1, 2])}
    on_gpu, on_cpu = module.float().cuda().sample(**ask).cpu(), module.cpu().sample(**ask)
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("model", [TrigFlowDiffusion, ConsistencyTraining])
def test_bf16_loss_on_a_gpu_is_close_to_float32(make_net, batch, model):
    """Fused kernels or not, the first loss and its tangent agree with float32's to a few percent."""
    options = {"normalization": "none"} if model is ConsistencyTraining else {}  # normalised, hardly anything shows
    module = set_adaptive_weight(model(make_net(), sigma_data=SD, **options)).cuda()
    batch = tuple(tensor.cuda() for tensor in batch)
    expected = module.training_step(batch, 0)
    with torch.autocast("cuda", torch.bfloat16):
        loss = module.training_step(batch, 0)
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.05)
