"""What both networks promise: F = net(x, t, label, guidance), its tangent, its errors."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sclightning.backbones import EDM2, DDPMpp

B = 3
SMALL = {"resolution": 16, "in_channels": 2, "channels": 16, "channel_mult": (1, 2), "num_blocks": 1}
SMALL |= {"attention_resolutions": (8,), "head_channels": 16, "num_classes": 5}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=[EDM2, DDPMpp], ids=["edm2", "ddpmpp"])
def make(request):
    """Small networks with no weight at its (often zero) initial value, so that every layer matters."""

    def make(**options):
        network = request.param(**SMALL | options)
        with torch.no_grad():
            for p in network.parameters():
                p.copy_(p + 0.3 * torch.randn_like(p) if p.ndim < 2 else torch.randn_like(p) * p[0].numel() ** -0.5)
        return network

    return make


def inputs(**options):
    x, t = torch.randn(B, 2, 16, 16), torch.tensor([0.05, 0.8, 1.5])
    return x, t, torch.tensor([0, 4, -1]), torch.tensor([1.0, 1.5, 2.0]) if options.get("guidance") else None


def seeded(network, label, guidance):
    """The network with the same dropout mask at each call."""

    def F(x, t):
        torch.manual_seed(1)
        return network(x, t, label, guidance)

    return F


@pytest.mark.parametrize("options", [{}, {"guidance": True, "dropout": 0.3}, {"double_norm": False}])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_tangent_equals_central_differences(make, options, training):
    network = make(**options).train(training)
    x, t, label, guidance = inputs(**options)
    dx, dt = torch.randn_like(x), torch.rand(B) + 0.5

    F, J = torch.func.jvp(seeded(network, label, guidance), (x, t), (dx, dt))

    oracle = seeded(network.double(), label, guidance)
    x, t, dx, dt = (a.double() for a in (x, t, dx, dt))
    h = 1e-5
    expected = (oracle(x + h * dx, t + h * dt) - oracle(x - h * dx, t - h * dt)) / (2 * h)
    for ours, theirs, tolerance in [(F, oracle(x, t), 1e-5), (J, expected, 2e-5)]:
        assert theirs.square().mean() > 1e-3  # a network that ignores its input would pass
        assert ours.dtype == torch.float32
        assert ((ours - theirs).norm() / theirs.norm()).item() < tolerance
    by_time = (oracle(x, t + h * dt) - oracle(x, t - h * dt)) / (2 * h)
    assert by_time.norm() > 0.01 * expected.norm()


def test_compiled_function_with_the_jvp_inside(make):
    network = make(
        guidance=True, channel_mult=(1,), attention_resolutions=(16,)
    )  # small: tracing takes a second a block
    x, t, label, guidance = inputs(guidance=True)
    tangents = torch.randn_like(x), torch.rand(B) + 0.5

    def step(x, t):
        return torch.func.jvp(lambda x, t: network(x, t, label, guidance), (x, t), tangents)

    torch._dynamo.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        F, J = function(x, t)
        gradient = torch.autograd.grad(F.square().mean(), list(network.parameters()))
        results.append((F.detach(), J.detach(), torch.cat([g.flatten() for g in gradient])))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_jvp_costs_two_forwards(make):
    network = make(guidance=True)
    x, t, label, guidance = inputs(guidance=True)

    def F(x, t):
        return network(x, t, label, guidance)

    def flops(function, *args):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function(*args)
        counts = counter.get_flop_counts()["Global"]
        # Attention, fused or not, is tested with the ops.
        return sum(n for op, n in counts.items() if str(op) in ("aten.convolution", "aten.addmm", "aten.mm"))

    jvp = flops(torch.func.jvp, F, (x, t), (torch.randn_like(x), torch.ones(B)))
    assert jvp / flops(F, x, t) == pytest.approx(2, abs=0.01)


def test_every_parameter_gets_a_gradient_in_one_pass_with_the_tangent(make):
    network = make(guidance=True)
    x, t, label, guidance = inputs(guidance=True)
    plain = torch.autograd.grad(network(x, t, label, guidance).square().sum(), list(network.parameters()))
    F, _ = torch.func.jvp(lambda x, t: network(x, t, label, guidance), (x, t), (torch.randn_like(x), torch.ones(B)))
    shared = torch.autograd.grad(F.square().sum(), list(network.parameters()))
    for (name, _), ours, expected in zip(network.named_parameters(), shared, plain, strict=True):
        assert expected.norm() > 0, name
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item(), msg=name)


def test_label_minus_one_is_no_label_and_labels_matter(make):
    network = make().eval()
    x, t, *_ = inputs()
    none = network(x, t)
    torch.testing.assert_close(network(x, t, torch.full((B,), -1)), none)
    assert (network(x, t, torch.zeros(B, dtype=torch.int64)) - none).abs().max() > 1e-2


@pytest.mark.parametrize("network", [EDM2, DDPMpp], ids=["edm2", "ddpmpp"])
def test_guidance_has_no_effect_at_initialisation_but_a_gradient(network):
    network = network(**SMALL, guidance=True)
    if isinstance(network, EDM2):  # F = 0 at initialisation would hide everything
        torch.nn.init.ones_(network.out_gain)
    x, t, label, _ = inputs()
    one, two = (network(x, t, label, torch.full((B,), s)) for s in (1.0, 2.0))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    two.square().sum().backward()
    grads = [p.grad.norm() for name, p in network.named_parameters() if "guidance" in name]
    assert max(grads) > 0


def test_guidance_matters_once_trained(make):
    network = make(guidance=True)
    x, t, label, _ = inputs()
    one, two = (network(x, t, label, torch.full((B,), s)) for s in (1.0, 2.0))
    assert (one - two).abs().max() > 1e-3


@pytest.mark.parametrize("dropout_resolution, masked", [(None, {16, 8}), (8, {8}), (4, set())])
def test_dropout_by_resolution(make, dropout_resolution, masked):
    network = make(dropout=0.5, dropout_resolution=dropout_resolution)
    for part in (network.encoder, network.decoder):
        for name, block in part.items():
            if not name.endswith("conv"):
                assert block.dropout == (0.5 if int(name.split("x")[0]) in masked else 0.0), name
    x, t, *_ = inputs()
    same = torch.equal(network(x, t), network(x, t))
    assert same == (not masked)
    assert torch.equal(network.eval()(x, t), network(x, t))


def test_half_precision(make):
    network = make(guidance=True)
    x, t, label, guidance = inputs(guidance=True)
    tangents = torch.randn_like(x), torch.ones(B)

    def F(x, t):
        return network(x, t, label, guidance)

    expected = torch.func.jvp(F, (x, t), tangents)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = torch.func.jvp(F, (x, t), tangents)
    network.bfloat16()
    true = torch.func.jvp(F, (x, t), tangents)
    for half in (autocast, true):
        for ours, theirs in zip(half, expected, strict=True):
            assert ((ours.float() - theirs).norm() / theirs.norm()).item() < 0.06


def test_double_network_takes_double_and_single(make):
    x, t, label, _ = inputs()
    network = make().double()
    F = network(x.double(), t.double(), label)
    assert F.dtype == torch.float64
    torch.testing.assert_close(network(x, t, label), F, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.randn(B, 3, 16, 16)}, ValueError, r"images of shape \(2, 16, 16\), not \(3, 16, 16\)"),
        ({"x": torch.randn(B, 2, 16, 16).double()}, TypeError, "Images are float64"),
        ({"t": torch.rand(B).half()}, TypeError, "Times are torch.float16"),
        ({"t": torch.rand(())}, ValueError, r"Times are torch.float32 of shape \(\)"),
        ({"label": torch.tensor([0, 5, 1])}, ValueError, "Label 5 is out of range"),
        ({"label": torch.tensor([0, -2, 1])}, ValueError, "Label -2 is out of range"),
        ({"label": torch.zeros(B)}, TypeError, "Labels are torch.float32"),
        ({"label": torch.zeros(B, 5, dtype=torch.int64)}, ValueError, r"Labels are torch.int64 of shape \(3, 5\)"),
        ({"guidance": torch.ones(B)}, ValueError, "made with guidance=False, but guidance was given"),
    ],
)
def test_wrong_input_gets_one_sentence(make, change, error, message):
    x, t, label, guidance = inputs()
    with pytest.raises(error, match=message) as e:
        make()(**{"x": x, "t": t, "label": label, "guidance": guidance} | change)
    assert "\n" not in str(e.value) and len(str(e.value)) < 250


def test_missing_conditions_and_impossible_sizes(make):
    x, t, label, _ = inputs()
    with pytest.raises(ValueError, match="guidance was missing"):
        make(guidance=True)(x, t, label)
    with pytest.raises(ValueError, match="num_classes=0, but labels were given"):
        make(num_classes=0)(x, t, label)
    with pytest.raises(ValueError, match="15x15 cannot be halved 1 times"):
        make(resolution=15)
    with pytest.raises(ValueError, match="32 channels does not divide into heads of 12"):
        make(head_channels=12)


def test_no_parameter_is_a_scalar(make):
    """FSDP2 shards none."""
    assert all(
        p.ndim > 0 for options in ({"guidance": True}, {"double_norm": False}) for p in make(**options).parameters()
    )


def test_channels_last(make):
    network = make()
    x, t, label, _ = inputs()
    expected = network(x, t, label)
    network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(x.to(memory_format=torch.channels_last), t, label), expected)


def test_mathematics_and_networks_do_without_lightning():
    """Whoever trains in a loop of their own need not install it."""
    code = "import sys; import sclightning.backbones, sclightning.objective, sclightning.ops, sclightning.sampling; "
    code += "assert not {'lightning', 'lightning.pytorch', 'torchmetrics', 'jsonargparse'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
