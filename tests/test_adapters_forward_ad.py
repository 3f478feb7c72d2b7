"""What forward-mode AD cannot pass is found by name, what it can pass is let through, and nothing is changed."""

import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from sclightning.adapters import EDM, FlowMatching, VelocityAdapter, check_forward_ad
from sclightning.adapters.edm import FourierEmbedding
from sclightning.adapters.forward_ad import time_warnings
from sclightning.backbones import EDM2, DDPMpp
from sclightning.modules import ConsistencyTraining


@torch.library.custom_op("tests::double", mutates_args=())
def double_op(x: torch.Tensor) -> torch.Tensor:
    """An opaque operator: forward mode drops its tangent without a word."""
    return 2 * x


class ContextFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad


class SetupFunction(ContextFunction):
    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


class ForcedWeight(nn.Module):
    """EDM2's own way: weights are rewritten in the forward pass of training."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((8, 1, 1), 2.0))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.weight.copy_(self.weight / self.weight.norm())
        return x * self.weight


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Host(nn.Module):
    """A small network, with a suspect in the middle and a gate behind it."""

    def __init__(self, suspect=None, gate=1.0, embed=torch.cos):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.inner = nn.Sequential(nn.SiLU(), suspect or nn.Identity())
        self.embed, self.gate = Apply(embed), gate

    def forward(self, x, t, label=None, guidance=None):
        h = self.first(x) + self.embed(t).to(x.dtype)[:, None, None, None]
        h = h + self.gate * self.inner(h)
        return self.last(torch.tanh(h))


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 1, 8, 8, generator=generator), torch.tensor([0.3, 1.1, 0.7, 0.2])


def fused(x):
    x = x.flatten(2)[:, None]
    return nn.functional.scaled_dot_product_attention(x, x, x)[:, 0].view(x.shape[0], 8, 8, 8)


@pytest.mark.parametrize(
    ("suspect", "words"),
    [
        (lambda: Apply(fused), "inner.1 .Apply.: .*flash.*enable_forward_ad"),
        (lambda: Apply(ContextFunction.apply), "inner.1 .Apply.: .*setup_context.*give this autograd.Function"),
        (lambda: Apply(SetupFunction.apply), "inner.1 .Apply.: .*jvp function.*give this autograd.Function"),
        (ForcedWeight, "inner.1 .ForcedWeight.: .*in-place.*normalize_weights"),
        (lambda: nn.BatchNorm2d(8), "inner.1 .BatchNorm2d.: .*in-place.*do not write"),
        (lambda: Apply(lambda x: torch.from_numpy(x.numpy())), "inner.1 .Apply.: .*replace the operation"),
    ],
    ids=["attention", "ctx", "no jvp", "weights", "batch norm", "numpy"],
)
def test_what_fails_is_named_with_its_remedy(inputs, suspect, words):
    """The innermost module, what PyTorch says, what to do: one sentence."""
    with pytest.raises(RuntimeError, match=f"Forward-mode AD fails in {words}") as error:
        check_forward_ad(Host(suspect()), *inputs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "suspect",
    [lambda: Apply(double_op), lambda: Apply(lambda x: x.detach() * x), lambda: Apply(lambda x: x * x.mean().item())],
    ids=["custom_op", "detach", "item"],
)
@pytest.mark.parametrize("every_module", [True, False])
def test_a_wrong_tangent_is_named(inputs, suspect, every_module):
    """No error from PyTorch, but not the central difference."""
    with pytest.raises(RuntimeError, match=r"tangent of inner.1 \(Apply\) is off by \d+% from central differences"):
        check_forward_ad(Host(suspect()), *inputs, every_module=every_module)


def test_a_wrong_tangent_behind_a_closed_gate(inputs):
    """The network as a whole is still right; module by module it is seen."""
    host = Host(Apply(double_op), gate=0.0)
    check_forward_ad(host, *inputs, every_module=False)
    with pytest.raises(RuntimeError, match=r"tangent of inner.1 \(Apply\) is off by 100%"):
        check_forward_ad(host, *inputs)


@pytest.mark.parametrize("every_module", [True, False])
def test_a_time_cast_to_integers(inputs, every_module):
    """As of a network that looks its time up: the derivative in t is lost, and small differences miss the stairs."""
    host = Host(embed=lambda t: (100 * t).long().float() / 10)
    with pytest.raises(RuntimeError, match=r"tangent of embed \(Apply\) is off by 100%.*cast of the time"):
        check_forward_ad(host, inputs[0], inputs[1] + 0.005, every_module=every_module)


def test_a_network_that_fails_by_itself_is_not_blamed_on_forward_mode(inputs):
    """Its own error comes through."""
    with pytest.raises(RuntimeError, match=r"^Given groups=1"):
        check_forward_ad(Host(nn.Conv2d(5, 8, 1)), *inputs)


def test_a_condition_that_the_network_does_not_take(inputs, make_plain_net):
    """It is named before forward mode is tried."""
    with pytest.raises(ValueError, match=r"net\(x, t, label=label\).*docs/extending.md"):
        check_forward_ad(make_plain_net(), *inputs, torch.arange(4))


def test_writing_to_weights_counts_in_the_mode_in_which_it_happens(inputs):
    """In evaluation mode EDM2's own layer can be differentiated."""
    check_forward_ad(Host(ForcedWeight()).eval(), *inputs)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("network", [DDPMpp, EDM2])
def test_our_networks_pass(network, dtype, mode):
    """With dropout, labels and guidance, compiled or not."""
    options = {"resolution": 8, "in_channels": 1, "channels": 16, "channel_mult": (1, 2), "num_blocks": 1}
    options["head_channels"] = 8
    net = network(**options, attention_resolutions=(4,), num_classes=3, guidance=True, dropout=0.3).to(dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim < 2 else p[0].numel() ** -0.5))
    x, t = torch.randn(2, 1, 8, 8, dtype=dtype), torch.tensor([0.3, 1.1], dtype=dtype)
    check_forward_ad(net.train(mode), x, t, torch.tensor([0, 2]), torch.tensor([1.5, 2.0]).to(dtype), compiled=True)


@pytest.mark.parametrize(
    "function", [torch.relu, lambda x: x.clamp(-0.5, 0.5), lambda x: nn.functional.dropout(x, 0.5)]
)
def test_kinks_and_dropout_are_no_wrong_tangents(inputs, function):
    """Differences across a kink are not exact, and the same mask is drawn for every evaluation."""
    check_forward_ad(Host(Apply(function)).train(), *inputs)


def test_half_precision_is_not_compared(inputs):
    """Differences in bfloat16 are noise: no false alarm."""
    check_forward_ad(Host().bfloat16(), inputs[0].bfloat16(), inputs[1])


def test_writing_in_place_further_on_is_no_wrong_tangent(inputs):
    """A module's input that is overwritten after it was used."""
    check_forward_ad(Host(nn.Sequential(nn.Conv2d(8, 8, 1), Apply(torch.tanh_))), *inputs)


def test_nothing_is_left_behind(inputs):
    """No hook, no gradient, the same random state, also after a failure."""
    for host in (Host(nn.Dropout(0.5)).train(), Host(Apply(ContextFunction.apply)), Host(Apply(double_op))):
        state = torch.get_rng_state()
        try:
            check_forward_ad(host, *inputs)
        except RuntimeError:
            assert not isinstance(host.inner[1], nn.Dropout)
        assert torch.equal(torch.get_rng_state(), state)
        for module in host.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks
        assert all(p.grad is None for p in host.parameters())


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.LayerNorm(8)])
def test_affine_norms_fail_when_compiled(inputs, norm):
    """Named if the network will be compiled, and only then."""
    check_forward_ad(Host(norm), *inputs)
    with pytest.raises(RuntimeError, match=rf"under torch.compile fails in inner.1 \({type(norm).__name__}\).*affine"):
        check_forward_ad(Host(norm), *inputs, compiled=True)
    check_forward_ad(Host(nn.GroupNorm(2, 8, affine=False)), *inputs, compiled=True)


def test_time_inputs_that_make_the_tangent_large():
    """Fourier features by name, times in the hundreds by the process; radians and ln(sigma)/4 are fine."""
    assert time_warnings(Host()) == time_warnings(VelocityAdapter(Host(), EDM(), "edm", 0.5)) == []
    assert time_warnings(VelocityAdapter(Host(), FlowMatching(1.0), "flow", 0.5)) == []
    (message,) = time_warnings(VelocityAdapter(Host(), FlowMatching(1000.0), "flow", 1.0))
    assert "span 960" in message and "time_scale=0.001" in message
    (message,) = time_warnings(Host(FourierEmbedding(torch.ones(2), torch.ones(2))))
    assert "inner.1 (FourierEmbedding)" in message and "positional" in message


def test_a_fit_starts_with_the_check(inputs, quiet, tmp_path):
    """The first batch finds the module; a network that passes trains without a word, and is looked at once."""
    data = DataLoader(inputs[0], batch_size=2)
    trainer = L.Trainer(**quiet, max_steps=2, default_root_dir=tmp_path)
    with pytest.raises(RuntimeError, match=r"fails in inner.1 \(Apply\).*enable_forward_ad"):
        trainer.fit(ConsistencyTraining(Host(Apply(fused))), data)
    evaluations = []
    host = Host()
    host.register_forward_hook(lambda *_: evaluations.append(1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="In the student")
        L.Trainer(**quiet, max_steps=2, default_root_dir=tmp_path).fit(ConsistencyTraining(host), data)
    assert len(evaluations) == 10 + 2  # two jvps and four ends of differences for each, then one evaluation a step
    adapter = VelocityAdapter(Host(), FlowMatching(1000.0), "flow", 0.5)
    with pytest.warns(UserWarning, match="shows its network times that span"):
        L.Trainer(**quiet, max_steps=1, default_root_dir=tmp_path).fit(ConsistencyTraining(adapter), data)
