"""Multi-step consistency models: the segments, exact Gaussians, M = 1 to the last bit, the network's embedding."""

import math

import lightning as L
import pytest
import torch
from conftest import TINY, PlainNet, randomize
from test_objective import SIGMA_DATA, any_network, batch, column, marginal_std, pf_ode, relative

from sclightning.backbones import EDM2, DDPMpp
from sclightning.backbones.layers import SegmentEmbedding
from sclightning.callbacks import EMA, TangentMonitor
from sclightning.data import DigitsDataModule
from sclightning.modules import ConsistencyDistillation, MultistepConsistencyDistillation
from sclightning.modules.consistency import load_backbone
from sclightning.objective import consistency_loss, forward_jvp, tangent
from sclightning.sampling import T_MAX, ddim
from sclightning.segments import segment_index, segment_start, segment_times

SD = 0.752
pytestmark = pytest.mark.filterwarnings("ignore")


# --- Segments ---------------------------------------------------------------------------------------------------------


def test_segments_by_hand():
    """Four quarters of the arc; a boundary is the end of the segment below, in either precision; beyond is the last."""
    assert segment_times(4) == [T_MAX, T_MAX * 3 / 4, T_MAX / 2, T_MAX / 4]
    inside = torch.tensor([0.0, 0.1, 0.24, 0.26, 0.49, 0.51, 0.74, 0.76, 1.0], dtype=torch.float64) * T_MAX
    assert segment_index(inside, 4).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert segment_index(torch.tensor([math.pi / 2]), 4).tolist() == [3]
    for M in (1, 2, 3, 7, 16):
        for dtype in (torch.float32, torch.float64):
            ends = torch.tensor(segment_times(M), dtype=dtype)
            assert segment_index(ends, M).tolist() == list(range(M))[::-1]
            starts = torch.tensor([*segment_times(M)[1:], 0.0], dtype=dtype)
            torch.testing.assert_close(segment_start(ends, M), starts, rtol=1e-6, atol=1e-6)
            assert segment_start(ends, M).dtype == dtype
    with pytest.raises(ValueError, match="segments=0; give 1 or more"):
        segment_times(0)


def exact_network(M):
    """The F whose consistency function solves the PF-ODE of Gaussians from t to its segment's start."""

    def F(x, t):
        start, x_t = segment_start(t, M), SIGMA_DATA * x
        u = t - start
        return (column(u.cos()) * x_t - pf_ode(x_t, t, start)) / (column(u.sin()) * SIGMA_DATA)

    return F


@pytest.mark.parametrize("M", [2, 5])
def test_exact_function_has_no_tangent(M):
    """The right network of each segment is where training ends; that of the whole arc is not."""
    x_t, dx_t, t = batch()
    start = segment_start(t, M)
    norms = [
        consistency_loss(exact_network(m), torch.zeros_like(t), x_t, dx_t, t, SIGMA_DATA, start=start).tangent_norm
        for m in (M, 1)
    ]
    assert norms[0].max() < 1e-12 and norms[1].max() > 0.1


def test_tangent_is_the_derivative_of_the_consistency_function():
    """It is cos u df/dt, with the network told t and all around it u."""
    network, _ = any_network()
    x_t, dx_t, t = batch()
    start = segment_start(t, 3)

    def f(x, t):
        u = t - start
        return column(u.cos()) * x - column(u.sin()) * SIGMA_DATA * network(x / SIGMA_DATA, t)

    _, df = torch.func.jvp(f, (x_t, t), (dx_t, torch.ones_like(t)))
    u = t - start
    F, J = forward_jvp(network, x_t, dx_t, t, SIGMA_DATA, u=u)
    found = tangent(F, J, x_t, dx_t, u, SIGMA_DATA)
    assert relative([found], [column(u.cos()) * df]) < 1e-12
    norm = consistency_loss(network, torch.zeros_like(t), x_t, dx_t, t, SIGMA_DATA, start=start).tangent_norm
    torch.testing.assert_close(norm, found.square().mean(1).sqrt().detach())


@pytest.mark.parametrize("M", [1, 4])
def test_sampler_ends_at_the_data(M):
    """M steps of the exact network are the solution of the PF-ODE from t_max to 0."""
    start = torch.full((6,), T_MAX, dtype=torch.float64)
    noise = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = marginal_std(start) / SIGMA_DATA * noise
    samples = ddim(exact_network(M), x, [*segment_times(M), 0.0], SIGMA_DATA)
    torch.testing.assert_close(samples, pf_ode(SIGMA_DATA * x, start, torch.zeros_like(start)), rtol=1e-6, atol=1e-6)


# --- The networks -----------------------------------------------------------------------------------------------------

EDM2_TINY = TINY | {"channels": 16, "head_channels": 8}


@pytest.mark.parametrize(("cls", "options"), [(DDPMpp, TINY), (EDM2, EDM2_TINY)])
def test_network_is_told_its_segment(cls, options):
    """Not at first, when it is the teacher; then it is another function in each segment, boundaries below."""
    plain, told = randomize(cls(**options)), cls(**options, segments=2)
    told.load_state_dict(plain.state_dict() | {"segment_embedding.weight": told.segment_embedding.weight})
    x, label = torch.randn(4, 1, 8, 8), torch.arange(4)
    half = T_MAX / 2
    t = torch.tensor([0.3, half, half + 1e-3, 1.5])
    assert torch.equal(told(x, t, label), plain(x, t, label))
    torch.nn.init.constant_(told.segment_embedding.weight[1], 0.5)
    moved = (told(x, t, label) - plain(x, t, label)).flatten(1).norm(dim=1) > 0
    assert moved.tolist() == [False, False, True, True]
    _, dF = torch.func.jvp(lambda t: told(x, t, label), (t,), (torch.ones(4),))
    h = 1e-3
    difference = (told(x[::3], t[::3] + h, label[::3]) - told(x[::3], t[::3] - h, label[::3])) / (2 * h)
    torch.testing.assert_close(dF[::3], difference, rtol=0.05, atol=0.02)


def test_network_starts_from_a_teacher_without(tmp_path):
    """A checkpoint lacks the embedding, which stays zero."""
    teacher, path = randomize(DDPMpp(**TINY)), tmp_path / "teacher.ckpt"
    torch.save({"state_dict": {f"backbone.{n}": w for n, w in teacher.state_dict().items()}}, path)
    student = load_backbone(DDPMpp(**TINY, segments=3), str(path))
    assert not student.segment_embedding.weight.any()
    assert torch.equal(student.out_conv.weight, teacher.out_conv.weight)


# --- The module -------------------------------------------------------------------------------------------------------


@pytest.fixture
def images():
    """Eight images of the digits' standard deviation with labels."""
    return SD * torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8)


def step(module, images):
    loss = module.training_step(images, 0)
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])]


def test_one_segment_is_scd_to_the_last_bit(make_net, images):
    """Loss, gradients, and samples but for the sampler's float64."""
    options = {"teacher": make_net(seed=5), "sigma_data": SD}
    scd = ConsistencyDistillation(make_net(dropout=0.2), times=[T_MAX], **options)
    one = MultistepConsistencyDistillation(make_net(dropout=0.2), segments=1, **options)
    assert all(map(torch.equal, step(one, images), step(scd, images)))
    ask = {"index": [0, 1], "shape": (1, 8, 8), "label": torch.tensor([1, 2])}
    torch.testing.assert_close(one.sample(**ask), scd.sample(**ask), rtol=1e-5, atol=1e-5)
    assert one.nfe == 1


@pytest.mark.parametrize(("guided", "normalization"), [(False, "l2"), (True, "l2"), (False, "clip")])
def test_step_by_hand(make_net, images, guided, normalization):
    """Algorithm 1 with u in place of t around the network."""
    teacher, net = make_net(seed=5), make_net(guidance=guided, segments=3)
    options = {"normalization": normalization} | ({"guidance_range": (1.0, 2.0)} if guided else {})
    module = MultistepConsistencyDistillation(net, segments=3, teacher=teacher, sigma_data=SD, **options)
    with module.draw(images, 0) as (x_0, z, t, label, scale):
        x_t = t.cos()[:, None, None, None] * x_0 + t.sin()[:, None, None, None] * z
        dx_t = module.velocity(x_t, x_0, z, t, label, scale)
    u = t - torch.tensor([T_MAX / 3 * min(2, int(time / T_MAX * 3)) for time in t.tolist()])
    assert len((t - u).unique()) > 1 and (u > 0).all()
    cos, sin = u.cos()[:, None, None, None], u.sin()[:, None, None, None]
    told = [label] if scale is None else [label, scale]
    F, dF = torch.func.jvp(lambda x, t: net(x, t, *told), (x_t / SD, t), (dx_t / SD, torch.ones(8)))
    g = -(cos**2) * (SD * F - dx_t) - cos * sin * (x_t + SD * dF)
    if normalization == "l2":
        g = g / (g.square().sum((1, 2, 3), keepdim=True).sqrt() + 0.1)
    else:
        assert (g.abs() > cos).any()
        g = g.clamp(-cos, cos)
    g = g.detach()
    wanted = (F - F.detach() - g).square().mean()
    parameters = [p for p in module.parameters() if p.requires_grad]
    found = step(module, images)
    torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(wanted, parameters, allow_unused=True)
    for ours, theirs, p in zip(found[1:], gradients, parameters, strict=True):
        if theirs is not None:  # the adaptive weight has one that is left out here
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=str(p.shape))


def test_trains_reloads_and_samples(make_net, quiet, tmp_path):
    """Four deterministic steps of one noise; a checkpoint says how many segments."""
    path = tmp_path / "student.ckpt"
    module = MultistepConsistencyDistillation(make_net(segments=4), 4, teacher=make_net(seed=5), sigma_data=SD, seed=3)
    trainer = L.Trainer(**quiet, max_steps=2, default_root_dir=tmp_path, callbacks=[EMA(decay=0.5)])
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=8))
    trainer.save_checkpoint(path)
    assert module.backbone.segment_embedding.weight.abs().sum() > 0
    reloaded = MultistepConsistencyDistillation.load_from_checkpoint(path, backbone=make_net(seed=1, segments=4))
    ask = {"index": [0, 1], "shape": (1, 8, 8), "label": torch.tensor([1, 2])}
    samples = module.sample(**ask)
    assert (reloaded.segments, reloaded.nfe, reloaded.seed) == (4, 4, 3)
    assert torch.equal(reloaded.sample(**ask), samples) and samples.isfinite().all()
    module.times = module.times[:2]  # as an evaluation of two steps would
    with pytest.raises(ValueError, match=r"4 segments takes the 4 steps.*steps=null"):
        module.sample(**ask)


def test_what_does_not_fit_is_refused(make_net, make_plain_net, tmp_path):
    """A network of other segments, an export, a monitor of the tangent; a network that knows none is not."""
    with pytest.raises(ValueError, match=r"segments=3 and its network was made with segments=2"):
        MultistepConsistencyDistillation(make_net(segments=2), 3)
    with pytest.raises(ValueError, match=r"made with segments=1"):
        MultistepConsistencyDistillation(make_net(), 3)
    module = MultistepConsistencyDistillation(make_plain_net(), 3)
    with pytest.raises(ValueError, match="one segment only"):
        TangentMonitor().setup(None, module, "fit")
    export = pytest.importorskip("sclightning.export").export
    state = {f"backbone.{n}": w for n, w in make_net().state_dict().items()}
    told = {"segments": 3, "backbone": {"class_path": "sclightning.backbones.DDPMpp", "init_args": TINY}}
    torch.save({"state_dict": state, "hyper_parameters": told}, tmp_path / "student.ckpt")
    with pytest.raises(ValueError, match=r"3 segments, whose steps an export does not have"):
        export(ckpt_path=str(tmp_path / "student.ckpt"), folder=str(tmp_path / "out"))


class Told(PlainNet):
    """The network that is not ours with the embedding, which needs no more of it."""

    def __init__(self):
        super().__init__()
        self.segments, self.embedding = 3, SegmentEmbedding(3, 4)

    def forward(self, x, t):
        return self.conv1(torch.tanh(self.conv0(x) + (t.cos()[:, None] + self.embedding(t))[..., None, None]))


def test_compiled_step_is_the_eager_one(make_plain_net, images):
    """One graph, embedding and segments in it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net = randomize(Told())
    eager, compiled = (
        MultistepConsistencyDistillation(net, 3, teacher=make_plain_net(seed=5), sigma_data=SD, compile=c)
        for c in (False, {"backend": "aot_eager"})
    )
    torch.testing.assert_close(step(compiled, images[0]), step(eager, images[0]), rtol=1e-4, atol=1e-5)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
