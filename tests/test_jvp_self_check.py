"""The check before the first step: wrong rules are found and their layer is named, right networks train as ever."""

import logging
import warnings

import lightning as L
import pytest
import torch
from test_adapters_forward_ad import Apply, Host, fused
from torch import nn
from torch.utils.data import DataLoader

from sclightning.adapters import EDM, FlowMatching, VelocityAdapter
from sclightning.backbones import EDM2, DDPMpp
from sclightning.backbones.layers import SegmentEmbedding
from sclightning.callbacks import JVPSelfCheck, TangentWarmup
from sclightning.modules import (
    ConsistencyDistillation,
    ConsistencyTraining,
    MultistepConsistencyDistillation,
    TrigFlowDiffusion,
)
from sclightning.modules.vsd import VariationalScoreDistillation
from sclightning.ops import jvp_attention
from sclightning.sampling import T_MAX

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning", "ignore::FutureWarning")


@torch.library.custom_op("tests::triple", mutates_args=())
def triple_op(x: torch.Tensor) -> torch.Tensor:
    """An opaque operator: forward mode drops its tangent without a word."""
    return 3 * x


triple_op.register_autograd(lambda ctx, grad: 3 * grad)


class Sine(torch.autograd.Function):
    """The sine with a forward-mode rule that is right up to a factor."""

    factor = 1.0
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()

    @classmethod
    def jvp(cls, ctx, tangent):
        return cls.factor * tangent * ctx.saved_tensors[0].cos()


class Wrong(Sine):
    factor = 1.3


class SlightlyWrong(Sine):
    factor = 1.004


class Tripled(Sine):
    """An operator behind a right rule, which Dynamo passes over for what the operator does."""

    @staticmethod
    def forward(x):
        return triple_op(x)

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad

    @staticmethod
    def jvp(ctx, tangent):
        return 3 * tangent


@triple_op.register_fake
def _(x):
    return torch.empty_like(x)


def batch(n=8):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def fit(module, quiet, tmp_path, *callbacks, data=None, **options):
    options = {**quiet, "max_steps": 2, "default_root_dir": tmp_path, **options}
    trainer = L.Trainer(**options, callbacks=[*callbacks])
    trainer.fit(module, DataLoader(batch() if data is None else data, batch_size=4))
    return trainer


@pytest.mark.parametrize(
    ("suspect", "size"),
    [
        (triple_op, "100%"),
        (Wrong.apply, "23%"),
        (SlightlyWrong.apply, r"0\.40%"),
        (lambda x: x.detach() * x.cos(), r"\d+%"),
    ],
    ids=["custom_op", "wrong jvp", "slightly wrong jvp", "detach"],
)
def test_a_wrong_rule_is_found_in_its_layer(quiet, tmp_path, suspect, size):
    """The first layer whose input's tangent is right and whose own is not, among layers behind it that hand it on."""
    host = Host(nn.Sequential(nn.Conv2d(8, 8, 1), Apply(suspect), nn.Conv2d(8, 8, 1)))
    words = rf"tangent of inner\.1\.1 \(Apply\) is off by {size} from central differences"
    with pytest.raises(RuntimeError, match=words) as error:
        fit(ConsistencyTraining(host), quiet, tmp_path, JVPSelfCheck())
    assert "\n" not in str(error.value)


def test_what_the_fit_finds_by_itself(quiet, tmp_path):
    """An error of 0.4 % passes the look that every fit takes; the callback's float64 is what finds it."""
    fit(ConsistencyTraining(Host(Apply(SlightlyWrong.apply))), quiet, tmp_path)
    fit(ConsistencyTraining(Host(Apply(SlightlyWrong.apply))), quiet, tmp_path, JVPSelfCheck(rtol=0.01))


def test_what_fails_is_named_too(quiet, tmp_path):
    """Fused attention has no forward-mode rule."""
    with pytest.raises(RuntimeError, match=r"fails in inner.1 \(Apply\).*enable_forward_ad"):
        fit(ConsistencyTraining(Host(Apply(fused))), quiet, tmp_path, JVPSelfCheck())


def test_a_warning_in_place_of_an_error(quiet, tmp_path):
    """The run goes on, past the module's own look too."""
    with pytest.warns(UserWarning, match=r"JVPSelfCheck: .*inner.1 \(Apply\) is off by 100%"):
        trainer = fit(ConsistencyTraining(Host(Apply(triple_op))), quiet, tmp_path, JVPSelfCheck(action="warn"))
    assert trainer.global_step == 2


def attention(x):
    q = x.flatten(2).transpose(1, 2)[:, None]
    return x + jvp_attention(q, q, q)[:, 0].transpose(1, 2).view_as(x)


TINY = {"resolution": 8, "in_channels": 1, "channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
TINY |= {"attention_resolutions": [4], "head_channels": 8, "dropout": 0.3}
RIGHT = {
    "DDPM++": lambda: DDPMpp(**TINY),
    "EDM2": lambda: EDM2(**TINY),
    "relu": lambda: Host(nn.ReLU()),
    "attention": lambda: Host(Apply(attention)),
    "right jvp": lambda: Host(nn.Sequential(Apply(Sine.apply), Apply(Tripled.apply))),
    "EDM adapter": lambda: VelocityAdapter(Host(nn.Dropout(0.5)), EDM(), "edm", 0.5),
    "flow adapter": lambda: VelocityAdapter(Host(), FlowMatching(), "flow", 0.5),
}


@pytest.mark.parametrize("network", RIGHT)
def test_right_networks_pass(quiet, tmp_path, caplog, network):
    """In training mode, dropout and all; one line says what agreed."""
    net = RIGHT[network]()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim < 2 else p[0].numel() ** -0.5))
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(ConsistencyTraining(net), quiet, tmp_path, JVPSelfCheck(samples=2), max_steps=1)
    (line,) = [r.message for r in caplog.records if "JVPSelfCheck" in r.message]
    assert "all layers agree to 5 % in torch.float32; to 0.1% in torch.float64." in line


def test_half_precision_and_operators_without_float64_are_said(quiet, tmp_path, caplog):
    """What was not looked at is in the line."""

    def only_float32(x):
        if x.dtype == torch.float64:
            raise RuntimeError("no double")
        return x

    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(ConsistencyTraining(Host(Apply(only_float32))), quiet, tmp_path, JVPSelfCheck())
        fit(ConsistencyTraining(Host()), quiet, tmp_path, JVPSelfCheck(), precision="bf16-true")
    first, second = [r.message for r in caplog.records if "JVPSelfCheck" in r.message]
    assert "float64 not looked at" in first and "half precision of torch.bfloat16" in second
    with pytest.raises(RuntimeError, match=r"inner.1 \(Apply\) is off by 100%"):  # which the copy in float64 shows
        host = Host(Apply(lambda x: triple_op(x)))
        fit(ConsistencyTraining(host), quiet, tmp_path, JVPSelfCheck(), precision="bf16-true")


def test_the_run_is_none_the_wiser(make_net, quiet, tmp_path):
    """Losses and random state bit for bit, with labels, guidance, dropout and a teacher; the look is taken once."""

    class Rows(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            rows.append(torch.cat([outputs["loss"][None], torch.get_rng_state().float()]))

    runs, data = [], [(x, i % 10) for i, x in enumerate(batch())]
    for callbacks in ([], [JVPSelfCheck()]):
        torch.manual_seed(0)
        rows, student = [], make_net(guidance=True, dropout=0.2)
        module = ConsistencyDistillation(student, teacher=make_net(seed=1), guidance_range=(1.0, 2.0))
        fit(module, quiet, tmp_path, *callbacks, Rows(), data=data)
        runs.append(torch.stack(rows))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    assert torch.equal(*runs)


class Told(Host):
    """The small network with an embedding of the segment that training has moved."""

    def __init__(self, suspect=None):
        super().__init__(suspect)
        self.embedding = SegmentEmbedding(3, 8)
        torch.nn.init.normal_(self.embedding.weight)

    def forward(self, x, t):
        h = self.first(x) + (self.embed(t)[:, None] + self.embedding(t))[..., None, None]
        return self.last(self.inner(h) * self.gate)


class NearTheBoundaries(MultistepConsistencyDistillation):
    """Times at, above and below those at which one of three segments ends."""

    def draw_time(self, x_0):
        offset = torch.tensor([0.0, 1e-4, -1e-4, 1e-2])[: len(x_0)]
        return T_MAX / 3 * torch.tensor([1, 1, 2, 2])[: len(x_0)] + offset


def test_segments_are_no_error_and_hide_none(quiet, tmp_path, caplog):
    """The jump where two meet is meant; a wrong rule beside it is found, in its layer and in the compiled step."""

    def check(suspect, **options):
        student = NearTheBoundaries(Told(Apply(suspect)), segments=3, teacher=Host(), **options)
        fit(student, quiet, tmp_path, JVPSelfCheck(), max_steps=1)

    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        check(torch.sin)
    (line,) = [r.message for r in caplog.records if "JVPSelfCheck" in r.message]
    assert "all layers agree to 5 % in torch.float32; to 0.1% in torch.float64." in line
    for suspect in (Wrong.apply, SlightlyWrong.apply):
        with pytest.raises(RuntimeError, match=r"tangent of inner\.1 \(Apply\) is off by"):
            check(suspect)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"compiled step are off by"):
        check(Tripled.apply, compile={"backend": "eager"})


class Warmups(L.Callback):
    """The warm-up of every step."""

    def __init__(self):
        self.rows = []

    def on_after_backward(self, trainer, pl_module):
        self.rows.append(pl_module.tangent_warmup.item())


def compiled(suspect, quiet, tmp_path):
    torch._dynamo.reset()
    module, warmups = ConsistencyTraining(Host(Apply(suspect)), compile={"backend": "eager"}), Warmups()
    fit(module, quiet, tmp_path, TangentWarmup(10), JVPSelfCheck(), warmups)
    return warmups.rows


def test_a_rule_that_only_the_compiler_ignores_is_found(quiet, tmp_path, caplog):
    """Right in eager mode, wrong compiled, from the first step on, at which the warm-up hides the derivative."""
    with pytest.raises(RuntimeError, match=r"compiled step are off by \d+%.*pytorch#192985") as error:
        compiled(Tripled.apply, quiet, tmp_path)
    assert "\n" not in str(error.value)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        warmups = compiled(torch.sin, quiet, tmp_path)
        compiled(lambda x: nn.functional.dropout(x, 0.5), quiet, tmp_path)
    first, second = [r.message for r in caplog.records if "JVPSelfCheck" in r.message]
    assert "compiled step is off by" in first and "compiled step not looked at" in second
    assert warmups == pytest.approx([0.0, 0.1])


def test_a_step_of_its_own_is_not_compared(quiet, tmp_path, caplog):
    """That of sCD + VSD compiles another loss, of more draws; its network is looked at all the same."""
    module = VariationalScoreDistillation(Host(), scd=True, teacher=Host(), compile={"backend": "eager"})
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(module, quiet, tmp_path, JVPSelfCheck(), max_steps=1)
    (line,) = [r.message for r in caplog.records if "JVPSelfCheck" in r.message]
    assert "0.1% in torch.float64; the compiled step not looked at, VariationalScoreDistillation has one" in line


def test_bad_arguments_and_modules_are_refused(make_plain_net, quiet, tmp_path):
    """A diffusion model has no tangent."""
    for arguments in ({"samples": 0}, {"action": "shout"}):
        with pytest.raises(ValueError, match="JVPSelfCheck has"):
            JVPSelfCheck(**arguments)
    with pytest.raises(ValueError, match="TrigFlowDiffusion has not"), warnings.catch_warnings():
        fit(TrigFlowDiffusion(make_plain_net()), quiet, tmp_path, JVPSelfCheck())
