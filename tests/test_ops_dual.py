"""linear and conv2d with dual rules: two products, PyTorch's values, gradients through the primal only."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sclightning.ops import Conv2d, Linear, conv2d, jvp_attention, linear

DOUBLE = {"dtype": torch.float64}


def flops(f):
    # Plain attention, since the counter does not know the CPU's flash attention.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        f()
    return counter.get_total_flops()


def linear_case():
    torch.manual_seed(0)
    return linear, F.linear, torch.randn(5, 3, 8, **DOUBLE), torch.randn(6, 8, **DOUBLE), torch.randn(6, **DOUBLE)


def conv_case(**options):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 4, 9, 8, **DOUBLE), torch.randn(6, 4, 3, 3, **DOUBLE), torch.randn(6, **DOUBLE)
    weight = weight[:, : 4 // options.get("groups", 1)].contiguous()
    return lambda *a: conv2d(*a, **options), lambda *a: F.conv2d(*a, **options), x, weight, bias


CASES = {
    "linear": linear_case,
    "conv": conv_case,
    "strided": lambda: conv_case(stride=2, padding=(1, 2), dilation=2),
    "grouped": lambda: conv_case(groups=2, padding="same"),
}


@pytest.mark.parametrize("case", CASES)
def test_bit_identical_to_pytorch(case):
    ours, theirs, x, weight, bias = CASES[case]()
    t = torch.randn_like(x)
    for b in (None, bias):
        pair = [torch.func.jvp(lambda x, f=f, b=b: f(x, weight, b), (x,), (t,)) for f in (ours, theirs)]
        for y, expected in zip(*pair, strict=True):
            assert torch.equal(y, expected)
        assert torch.equal(ours(x, weight, b), theirs(x, weight, b))


@pytest.mark.parametrize("subset", [(1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("case", ["linear", "conv"])
def test_weights_and_biases_that_carry_a_tangent(case, subset):
    ours, theirs, *x = CASES[case]()
    t = [torch.randn_like(a) for a in x]

    def through(f):
        def g(*duals):
            arguments = list(x)
            for i, dual in zip(subset, duals, strict=True):
                arguments[i] = dual
            return f(*arguments)

        return torch.func.jvp(g, tuple(x[i] for i in subset), tuple(t[i] for i in subset))

    for y, expected in zip(through(ours), through(theirs), strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_two_products_not_three(case):
    ours, theirs, x, weight, bias = CASES[case]()
    forward = flops(lambda: ours(x, weight, bias))
    assert flops(lambda: torch.func.jvp(lambda x: ours(x, weight, bias), (x,), (x,))) == 2 * forward
    # What the rule is for. Should PyTorch stop multiplying with zeros (pytorch#69687), this file can go.
    assert flops(lambda: torch.func.jvp(lambda x: theirs(x, weight, bias), (x,), (x,))) == 3 * forward


class Block(nn.Module):
    """A DiT block: attention and an MLP, modulated by a conditioning vector."""

    def __init__(self, width=64, heads=4, plain=False):
        super().__init__()
        layer = nn.Linear if plain else Linear
        self.attention = naive if plain else jvp_attention
        self.heads = heads
        self.modulation, self.qkv, self.out = layer(width, 6 * width), layer(width, 3 * width), layer(width, width)
        self.mlp = nn.Sequential(layer(width, 4 * width), nn.GELU(), layer(4 * width, width))

    def forward(self, x, c):
        a, b, g, d, e, f = self.modulation(F.silu(c))[:, None].chunk(6, -1)
        y = F.layer_norm(x, x.shape[-1:]) * (1 + a) + b
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + g * self.out(self.attention(q, k, v).transpose(1, 2).flatten(2))
        return x + f * self.mlp(F.layer_norm(x, x.shape[-1:]) * (1 + d) + e)


def naive(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v


def blocks():
    torch.manual_seed(0)
    plain = Block(plain=True).double()
    block = Block().double()
    block.load_state_dict(plain.state_dict())
    x, c = torch.randn(2, 16, 64, **DOUBLE), torch.randn(2, 64, **DOUBLE)
    return block, plain, (x, c), (torch.randn_like(x), torch.randn_like(c))


def test_a_dit_block_costs_twice_its_forward():
    block, plain, x, t = blocks()
    forward = flops(lambda: plain(*x))
    jvp = flops(lambda: torch.func.jvp(block, x, t))
    attention = 4 * 2 * 4 * 16 * 16 * 16  # 4 B H N^2 D, whose JVP takes six products instead of two
    assert jvp == 2 * forward + attention
    assert jvp <= 2.05 * forward
    assert flops(lambda: torch.func.jvp(plain, x, t)) >= 2.9 * forward


def test_gradients_of_the_shared_primal_pass():
    block, plain, x, t = blocks()
    y, ty = torch.func.jvp(block, x, t)
    expected = plain(*x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ty, torch.func.jvp(plain, x, t)[1], rtol=1e-10, atol=1e-11)
    g = torch.randn_like(y)
    y.backward(g)
    expected.backward(g)
    for p, q in zip(block.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


def test_gradients_of_linear_layers_are_identical():
    for case in CASES:
        ours, theirs, x, weight, bias = CASES[case]()
        weight.requires_grad_(), bias.requires_grad_(), x.requires_grad_()
        y = torch.func.jvp(lambda x, p=(weight, bias), f=ours: f(x, *p), (x,), (torch.ones_like(x),))[0]
        g = torch.randn_like(y)
        for a, b in zip(
            *(torch.autograd.grad(z, (x, weight, bias), g) for z in (y, theirs(x, weight, bias))), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("how", ["backward", "mixed", "grad"])
def test_gradient_through_the_tangent_is_refused(how):
    _, _, x, weight, _ = linear_case()
    weight.requires_grad_()
    y, ty = torch.func.jvp(lambda x: linear(linear(x, weight).relu()[..., :1].expand(5, 3, 8), weight), (x,), (x,))
    with pytest.raises(RuntimeError, match="A gradient through the tangent of linear or conv2d"):
        if how == "grad":
            torch.autograd.grad((y + ty).sum(), weight)
        else:
            (ty if how == "backward" else y + ty).sum().backward()


def test_tangents_save_no_activations():
    """In eager mode with gradients a layer's tangent keeps nothing for backward, so its memory is the forward's."""
    _, _, x, weight, _ = linear_case()
    weight.requires_grad_()
    saved = {}
    for name, f in (("ours", linear), ("forward", linear), ("theirs", F.linear)):
        count = 0

        def pack(tensor):
            nonlocal count
            count += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if name == "forward":
                linear(x, weight)
            else:
                kept = torch.func.jvp(lambda x, f=f: f(x, weight), (x,), (x,))
        saved[name] = count
    del kept
    assert saved["ours"] == saved["forward"] < saved["theirs"]


def test_transforms():
    _, _, x, weight, bias = linear_case()
    t = torch.randn_like(x)
    for transform in (
        lambda f: torch.func.vmap(lambda x: torch.func.jvp(lambda x: f(x, weight, bias).sin(), (x,), (t[0],))[1])(x),
        lambda f: torch.func.jvp(torch.func.vmap(lambda x: f(x, weight, bias).sin()), (x,), (t,))[1],
        lambda f: torch.func.hessian(lambda w: f(x, w, bias).sin().sum())(weight),
        lambda f: torch.func.jvp(
            lambda w: torch.func.jvp(lambda x: f(x, w).sin(), (x,), (t,))[1], (weight,), (weight,)
        )[1],
        lambda f: torch.func.grad(lambda w: torch.func.jvp(lambda x: f(x, w).sin(), (x,), (t,))[1].sum())(weight),
    ):
        torch.testing.assert_close(transform(linear), transform(F.linear), rtol=1e-11, atol=1e-12)


def test_compile_fullgraph_keeps_values_gradients_and_the_tangents_gradient():
    torch._dynamo.reset()
    _, _, x, weight, bias = linear_case()
    weight.requires_grad_()

    def step(f, x, weight):
        return torch.func.jvp(lambda x: f(x, weight, bias).sin(), (x,), (x,))

    compiled = torch.compile(lambda x, w: step(linear, x, w), fullgraph=True, backend="aot_eager")(x, weight)
    expected = step(F.linear, x, weight)
    for y, z in zip(compiled, expected, strict=True):
        torch.testing.assert_close(y, z, rtol=1e-13, atol=1e-13)
    gradients = [torch.autograd.grad(y.sum() + ty.sum(), weight)[0] for y, ty in (compiled, expected)]
    torch.testing.assert_close(*gradients)


def test_autocast():
    _, _, x, weight, bias = linear_case()
    x, weight, bias = x.float(), weight.float(), bias.float()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (torch.func.jvp(lambda x, f=f: f(x, weight, bias), (x,), (x,)) for f in (linear, F.linear))
    for y, expected in zip(ours, theirs, strict=True):
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected)


def test_modules_are_drop_ins():
    torch.manual_seed(0)
    for ours, theirs, x in (
        (Linear(8, 6), nn.Linear(8, 6), torch.randn(5, 8)),
        (Conv2d(4, 6, 3, padding=1, stride=2), nn.Conv2d(4, 6, 3, padding=1, stride=2), torch.randn(2, 4, 8, 8)),
        (
            Conv2d(4, 6, 3, padding=2, padding_mode="circular"),
            nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"),
            torch.randn(2, 4, 8, 8),
        ),
    ):
        ours.load_state_dict(theirs.state_dict())
        for y, expected in zip(torch.func.jvp(ours, (x,), (x,)), torch.func.jvp(theirs, (x,), (x,)), strict=True):
            torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("name", ["DDPMpp", "EDM2"])
def test_the_backbones_cost_twice_their_forward(name):
    from sclightning import backbones

    torch.manual_seed(0)
    net = getattr(backbones, name)(resolution=16, channels=32, attention_resolutions=[8], num_classes=10).eval()
    label = torch.tensor([1, 2])
    x, t = torch.randn(2, net.in_channels, 16, 16), torch.rand(2)
    forward = flops(lambda: net(x, t, label))
    jvp = flops(
        lambda: torch.func.jvp(lambda x, t: net(x, t, label), (x, t), (torch.randn_like(x), torch.ones_like(t)))
    )
    assert 1.8 * forward < jvp <= 2.05 * forward


def test_pointwise_convolution_in_channels_last_is_a_product_of_matrices():
    """Values, tangent and gradients of the convolution; the layout is kept and no convolution runs."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4, 4, **DOUBLE).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(8, 6, 1, 1, **DOUBLE).requires_grad_(), torch.randn(8, **DOUBLE).requires_grad_()
    results = [torch.func.jvp(lambda x, f=f: f(x, weight, bias), (x,), (x.cos(),)) for f in (conv2d, F.conv2d)]
    for y, expected in zip(*results, strict=True):
        torch.testing.assert_close(y, expected)
        assert y.is_contiguous(memory_format=torch.channels_last)
    gradients = [torch.autograd.grad(y.square().sum(), (weight, bias)) for y, _ in results]
    torch.testing.assert_close(*gradients)
    with FlopCounterMode(display=False) as counter:
        conv2d(x, weight, bias)
    assert {str(op) for op in counter.get_flop_counts()["Global"]} == {"aten.addmm"}


@pytest.mark.gpu
def test_a_tangent_of_another_dtype_than_its_primal():
    """PyTorch's layer_norm on CUDA gives a bfloat16 primal a float32 tangent, on which its own linear fails."""
    x, t, weight = (torch.randn(8, 8, device="cuda").bfloat16() for _ in range(3))

    def f(x, weight):
        return linear(F.layer_norm(x, (8,)), weight)

    _, ty = torch.func.jvp(lambda x: f(x, weight), (x,), (t,))
    expected = torch.func.jvp(lambda x: f(x, weight.double()), (x.double(),), (t.double(),))[1]
    assert ty.dtype == torch.bfloat16
    torch.testing.assert_close(ty.double(), expected, rtol=0.05, atol=0.05)
