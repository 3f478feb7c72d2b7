"""Replaced operations: the same function and names, and a tangent where there was none, eager and compiled."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as nnF

from sclightning.adapters import enable_forward_ad
from sclightning.adapters.operators import _ForwardADAttention
from sclightning.ops import Conv2d, Linear


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Norms(nn.Module):
    """Layers of every kind that is replaced, and one that is not."""

    def __init__(self):
        super().__init__()
        self.conv, self.group = nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(4, 8, eps=1e-3)
        self.linear, self.layer = nn.Linear(8, 8), nn.LayerNorm(8, eps=1e-3)
        self.plain, self.tokens = nn.LayerNorm(8, elementwise_affine=False), nn.GroupNorm(2, 8)
        for p in self.parameters():
            nn.init.normal_(p, std=0.5)

    def forward(self, x):
        x = self.group(self.conv(x)).flatten(2).transpose(1, 2)
        x = torch.tanh(self.plain(self.layer(self.linear(x))))
        return self.tokens(x.transpose(1, 2))


def test_norms_and_layers():
    """The same values and gradients; the tangent is the central difference, inside torch.compile too."""
    torch.manual_seed(0)
    stock = Norms().double()
    patched = enable_forward_ad(copy.deepcopy(stock))
    assert isinstance(patched.conv, Conv2d) and isinstance(patched.linear, Linear)
    assert list(patched.state_dict()) == list(stock.state_dict())
    x, d, h = noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=1), 1e-6
    torch.testing.assert_close(patched(x), stock(x), rtol=1e-12, atol=1e-12)
    for network in (patched, stock):
        network(x).square().sum().backward()
    for a, b in zip(patched.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)
    expected = (stock(x + h * d) - stock(x - h * d)) / (2 * h)

    def jvp(x, d):
        return torch.func.jvp(patched, (x,), (d,))[1]

    for run in (jvp, torch.compile(jvp, backend="aot_eager", fullgraph=True)):
        torch.testing.assert_close(run(x, d), expected, rtol=1e-6, atol=1e-7)


def test_half_precision_norms_are_those_of_torch():
    """Statistics in float32, output in the input's precision."""
    norm, x = nn.GroupNorm(4, 8).bfloat16(), 5 + noise(2, 8, 4, 4).bfloat16()
    expected = norm(x)
    torch.testing.assert_close(enable_forward_ad(norm)(x), expected)


def attend(q, k, v, **options):
    with _ForwardADAttention():
        return nnF.scaled_dot_product_attention(q, k, v, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.3}, {"is_causal": True}, {"attn_mask": torch.ones(5, 5).tril().bool()}],
    ids=["plain", "scale", "causal", "mask"],
)
def test_attention(options):
    """PyTorch's function, masks included, with a tangent."""
    q, k, v = noise(3, 2, 3, 5, 4)
    torch.testing.assert_close(attend(q, k, v, **options), nnF.scaled_dot_product_attention(q, k, v, **options))
    tangents, h = tuple(noise(3, 2, 3, 5, 4, seed=1)), 1e-6
    _, J = torch.func.jvp(lambda *qkv: attend(*qkv, **options), (q, k, v), tangents)
    ends = [
        attend(*(a + sign * h * d for a, d in zip((q, k, v), tangents, strict=True)), **options) for sign in (1, -1)
    ]
    torch.testing.assert_close(J, (ends[0] - ends[1]) / (2 * h), rtol=1e-6, atol=1e-7)


def test_grouped_queries():
    """Fewer keys than queries."""
    q, k, v = noise(2, 4, 5, 4), noise(2, 2, 5, 4, seed=1), noise(2, 2, 5, 4, seed=2)
    expected = nnF.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v, enable_gqa=True), expected)


def test_patching_twice_and_copies(tmp_path):
    """It changes nothing more, and a patched network can be copied."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    make = lambda: diffusers.DiTTransformer2DModel(2, 8, 2, num_layers=1, sample_size=4, num_embeds_ada_norm=3)  # noqa: E731
    model = enable_forward_ad(make()).eval()
    classes = [type(module) for module in model.modules()]
    processor = type(model.transformer_blocks[0].attn1.processor)
    assert processor.__name__ == "ForwardADAttnProcessor2_0"
    enable_forward_ad(model)
    assert [type(module) for module in model.modules()] == classes
    assert type(model.transformer_blocks[0].attn1.processor) is processor
    x, options = torch.randn(1, 2, 4, 4), {"timestep": torch.ones(1), "class_labels": torch.zeros(1).long()}
    torch.testing.assert_close(copy.deepcopy(model)(x, **options).sample, model(x, **options).sample)
    assert type(make().transformer_blocks[0].attn1.processor).__name__ == "AttnProcessor2_0"


def test_a_patched_diffusers_model_compiles():
    """A transformer of diffusers under forward mode under torch.compile is one graph, and right."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(2, 8, 2, num_layers=1, sample_size=4, num_embeds_ada_norm=3)
    enable_forward_ad(model.double().eval())

    def run(x, t, d):
        def F(x, t):
            return model(x, timestep=t, class_labels=torch.tensor([1]), return_dict=False)[0]

        return torch.func.jvp(F, (x, t), (d, torch.ones_like(t)))[1]

    inputs = noise(1, 2, 4, 4), torch.tensor([0.7], dtype=torch.float64), noise(1, 2, 4, 4, seed=1)
    torch.testing.assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs), run(*inputs))
