"""Layers: exact values, and magnitudes kept at initialisation."""

import math

import pytest
import torch
import torch.nn.functional as nnF
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sclightning.backbones import layers as L


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rms(x):
    return x.square().mean().sqrt().item()


def test_positional_embedding_is_of_t_itself():
    embedding = L.PositionalEmbedding(128)
    frequencies = embedding(torch.tensor([1e-6], dtype=torch.float64))[0, 64:] / 1e-6  # sines of small angles
    assert frequencies[0].item() == pytest.approx(1) and frequencies[-1].item() == pytest.approx(1e-4)
    # "Fourier scale 0.02": the mean frequency of both kinds is about 0.1 (paper, Sec. 4.1).
    assert frequencies.mean().item() == pytest.approx(0.115, abs=0.002)
    t = torch.tensor([0.3])
    torch.testing.assert_close(embedding(t)[0, [0, 64]], torch.tensor([math.cos(0.3), math.sin(0.3)]))
    assert rms(embedding(torch.rand(64))) == pytest.approx(math.sqrt(0.5), abs=1e-6)
    with pytest.raises(ValueError, match="even number"):
        L.PositionalEmbedding(7)


@pytest.mark.parametrize("channels", [128, 96, 12, 4])
def test_group_norm_is_torchs(channels):
    ours = L.GroupNorm(channels)
    theirs = nn.GroupNorm(ours.groups, channels, eps=1e-6)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        nn.init.normal_(p)
        q.data.copy_(p)
    x = 3 * torch.randn(2, channels, 4, 4) + 1
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert channels // ours.groups >= 4
    x = x + 1000 * torch.randn(channels, 1, 1)  # far from zero, where the mean of squares has lost what varies
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    scale, shift = torch.randn(2, 2, channels)
    expected = theirs(x) * scale[..., None, None] + shift[..., None, None]
    torch.testing.assert_close(ours(x, scale, shift), expected, rtol=1e-4, atol=1e-3)


def test_group_norm_has_torchs_derivatives():
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 8, 3, 3), (8,), (8,)))
    x[1] = 0.7  # nothing varies

    def derivatives(norm):
        inputs = [v.clone().requires_grad_() for v in (x, weight, bias)]
        y = norm(*inputs)
        pulled = torch.autograd.grad(y, inputs, torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y))
        return y, pulled, torch.func.jvp(lambda x: norm(x, weight, bias), (x,), (x.roll(1, -1),))[1]

    ours = derivatives(lambda x, w, b: L.group_norm(x, 2, 1e-3, w, b))
    torch.testing.assert_close(ours, derivatives(lambda x, w, b: nnF.group_norm(x, 2, w, b, 1e-3)))


def test_pixel_norm_in_half_precision_does_not_overflow():
    x = torch.full((1, 8, 1, 1), 300.0, dtype=torch.float16)
    torch.testing.assert_close(L.pixel_norm(x), torch.ones_like(x))
    zero = torch.zeros_like(x)
    assert torch.equal(L.pixel_norm(zero), zero)


@pytest.mark.parametrize("op", ["silu", "sum", "cat"])
def test_operations_keep_the_magnitude(op):
    a, b = torch.randn(64, 96, 16, 16), torch.randn(64, 32, 16, 16)
    if op == "silu":
        assert rms(L.mp_silu(a)) == pytest.approx(1, abs=0.005)
    elif op == "sum":
        for weight in (0.3, 0.5):
            assert rms(L.mp_sum(a[:, :32], b, weight)) == pytest.approx(1, abs=0.005)
        assert L.mp_sum(torch.tensor(1.0), torch.tensor(0.0), 0.3).item() == pytest.approx(0.7 / math.sqrt(0.58))
    else:
        y = L.mp_cat(a, b)
        assert rms(y) == pytest.approx(1, abs=0.005)
        # The narrow input contributes as much as the wide one.
        assert y[:, 96:].square().sum().item() == pytest.approx(y[:, :96].square().sum().item(), rel=0.01)


@pytest.mark.parametrize("make", [lambda: L.MPLinear(48, 512), lambda: L.MPConv2d(48, 512, 1)], ids=["linear", "conv1"])
def test_weights_keep_the_magnitude(make):
    layer = make()
    x = torch.randn(256, 48) if isinstance(layer, L.MPLinear) else torch.randn(4, 48, 8, 8)
    assert rms(layer(x)) == pytest.approx(1, abs=0.03)
    with torch.no_grad():
        layer.weight *= 7  # the scale of the stored weight is no degree of freedom
    assert rms(layer(x)) == pytest.approx(1, abs=0.03)


def test_convolution_keeps_the_magnitude_away_from_the_edges():
    y = L.MPConv2d(32, 256, 3)(torch.randn(2, 32, 16, 16))
    assert y.shape == (2, 256, 16, 16)
    assert rms(y[:, :, 1:-1, 1:-1]) == pytest.approx(1, abs=0.03)


def test_effective_rows_have_unit_norm_and_the_gradient_is_orthogonal_to_the_weight():
    layer = L.MPConv2d(8, 5, 3)
    norms = torch.linalg.vector_norm(layer.effective_weight(torch.float32).flatten(1), dim=1)
    torch.testing.assert_close(norms, torch.ones(5), rtol=1e-5, atol=1e-5)
    layer(torch.randn(2, 8, 6, 6)).pow(3).sum().backward()
    along = (layer.weight.grad * layer.weight).flatten(1).sum(1) / layer.weight.grad.flatten(1).norm(dim=1)
    assert along.abs().max() < 1e-3 * layer.weight[0].norm()


def test_forced_normalisation_changes_the_stored_weight_only():
    layer = L.MPLinear(64, 10)
    with torch.no_grad():
        layer.weight.mul_(torch.linspace(0.5, 3, 10)[:, None])
    x = torch.randn(4, 64)
    before = layer(x)
    layer.normalize_weight()
    torch.testing.assert_close(layer(x), before)
    torch.testing.assert_close(layer.weight.square().mean(1), torch.ones(10))
    stored = layer.weight.clone()
    layer.normalize_weight()
    torch.testing.assert_close(layer.weight, stored)


def test_resampling_by_averages_and_repetition():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert L.resample(x, "down").flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    torch.testing.assert_close(L.resample(L.resample(x, "up"), "down"), x)
    assert L.resample(x, None) is x


@pytest.mark.parametrize("mode", ["up", "down"])
def test_resampling_under_a_compiled_jvp(mode):
    x, dx = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)

    def step(x):
        return torch.func.jvp(lambda x: L.resample(x, mode) ** 2, (x,), (dx,))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(x), step(x), strict=True):
        torch.testing.assert_close(ours, eager)


def test_adaptive_weight_reaches_log_D():
    # Minimum of e^w/D * |residual|^2 - w for |residual| = 1, the L2-normalised tangent, is w = log D at every t.
    D = 64 * 64 * 4
    weight = L.AdaptiveWeight()
    optimizer = torch.optim.Adam(weight.parameters(), 2e-2)
    t = torch.linspace(0, math.pi / 2, 32)
    for _ in range(700):
        w = weight(t)
        optimizer.zero_grad()
        (w.exp() / D - w).mean().backward()
        optimizer.step()
    assert (weight(t) - math.log(D)).abs().max() < 0.1


def test_label_embedding_of_no_label_is_zero():
    embedding = L.LabelEmbedding(3, 8)
    y = embedding(torch.tensor([2, -1]))
    torch.testing.assert_close(y[0], embedding.weight[2])
    assert not y[1].any()


def test_magnitude_preserving_label_embedding_is_a_map_of_scaled_one_hot_vectors():
    embedding = L.MPLabelEmbedding(7, 8)
    with torch.no_grad():
        embedding.weight *= 3
    label = torch.tensor([6, 0, -1])
    one_hot = torch.eye(7)[label] * (label >= 0)[:, None] * math.sqrt(7)
    torch.testing.assert_close(embedding(label), one_hot @ embedding.effective_weight(torch.float32).t())
    assert rms(embedding(torch.arange(7))) == pytest.approx(1, abs=1e-5)


def test_load_renamed_copies_all_or_nothing():
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    source = {f"x.{k}": torch.randn_like(v) for k, v in before.items()}

    def rename(name):
        return None if name == "1.bias" else f"x.{name}"

    for broken, message in [
        ({"x.1.weight": torch.zeros(4, 5)}, r"x.1.weight gives a shape of \(4, 5\)"),
        ({}, "no x.1.w"),
    ]:
        state = {k: v for k, v in source.items() if k != "x.1.weight"} | broken
        with pytest.raises(ValueError, match=message):
            L.load_renamed(network, state, rename, lambda name, value: value)
        for k, v in network.state_dict().items():
            assert torch.equal(v, before[k])
    kept = L.load_renamed(network, source, rename, lambda name, value: 2 * value)
    assert kept == ["1.bias"]
    assert torch.equal(network[0].weight, 2 * source["x.0.weight"])
    assert torch.equal(network[1].bias, before["1.bias"])


@pytest.mark.parametrize(
    "layer", [L.pixel_norm, L.mp_silu, lambda x: L.mp_sum(x, x.square(), 0.3), lambda x: L.mp_cat(x, x[:, :2])]
)
def test_numbers_have_no_tangents(layer):
    """A zero tangent for a number in a product costs the host more than the product does."""
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made.append(function)
            return function(*args, **(kwargs or {}))

    x, dx = torch.randn(2, 2, 4, 3, 3)
    with Watch():
        torch.func.jvp(layer, (x,), (dx,))
    assert made and torch.ops.aten._efficientzerotensor.default not in made
