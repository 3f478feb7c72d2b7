"""jvp_attention on the CPU: values against float64, transforms, compile, autocast, and what it refuses."""

import re
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sclightning.ops import jvp_attention, linear, reference


def naive(q, k, v, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(q @ k.transpose(-1, -2) * scale, -1) @ v


def relative_error(x, expected):
    return ((x.double() - expected).norm() / expected.norm()).item()


def tensors(B=2, H=3, N=7, M=9, D=8, E=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, H, N, D), (B, H, M, D), (B, H, M, E or D)] * 2
    x = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return tuple(x[:3]), tuple(x[3:])


def jvp_of_subset(attention, x, t, subset):
    def f(*duals):
        arguments = list(x)
        for i, dual in zip(subset, duals, strict=True):
            arguments[i] = dual
        return attention(*arguments)

    return torch.func.jvp(f, tuple(x[i] for i in subset), tuple(t[i] for i in subset))


@pytest.mark.parametrize("subset", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_every_subset_of_tangents_is_the_derivative(subset):
    x, t = tensors()
    o, to = jvp_of_subset(jvp_attention, x, t, subset)
    expected, t_expected = jvp_of_subset(naive, x, t, subset)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(to, t_expected, rtol=0, atol=1e-14)
    h = 1e-6
    moved = [[a + s * h * b if i in subset else a for i, (a, b) in enumerate(zip(x, t, strict=True))] for s in (1, -1)]
    difference = (naive(*moved[0]) - naive(*moved[1])) / (2 * h)
    torch.testing.assert_close(to, difference, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("N, M", [(65, 65), (80, 80), (999, 17), (1, 5), (5, 1)])
def test_any_length_and_chunks_of_queries(N, M, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 2 * 3 * M * 4)  # four queries in a chunk, so the last one is ragged
    x, t = tensors(N=N, M=M)
    o, to = torch.func.jvp(jvp_attention, x, t)
    expected, t_expected = torch.func.jvp(naive, x, t)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(to, t_expected, rtol=0, atol=1e-12)


def test_memory_is_linear_in_the_length(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 2**12)
    x, t = tensors(B=1, H=1, N=512, M=512)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for y in torch.utils._pytree.tree_leaves(out):
                largest = max(largest, y.numel() if isinstance(y, torch.Tensor) else 0)
            return out

    with Largest():
        reference.attention_jvp(*x, *t, 0.3)
        reference.attention_vjp(x[0], *x, x[0], x[0][..., 0], 0.3)
    assert largest == 2**12  # scores are 512 x 512 = 2^18; q alone is 2^12


@pytest.mark.parametrize("D, E", [(8, 8), (72, 72), (256, 256), (20, 12)])
def test_head_dimensions_scale_and_strides(D, E):
    x, t = tensors(D=D, E=E)
    x = tuple(a.transpose(1, 2).contiguous().transpose(1, 2) for a in x)
    o, to = torch.func.jvp(lambda *a: jvp_attention(*a, scale=-0.7), x, t)
    expected, t_expected = torch.func.jvp(lambda *a: naive(*a, scale=-0.7), x, t)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(to, t_expected, rtol=0, atol=1e-11)
    if D == E:
        assert o.stride() == x[0].stride() and not o.is_contiguous()


def test_without_tangents_it_is_scaled_dot_product_attention():
    x, _ = tensors(dtype=torch.float32)
    assert torch.equal(jvp_attention(*x), F.scaled_dot_product_attention(*x))
    with fwAD.dual_level():
        assert torch.equal(jvp_attention(*x, scale=2.0), F.scaled_dot_product_attention(*x, scale=2.0))


@pytest.mark.parametrize("sizes", [{"B": 0}, {"H": 0}, {"N": 0}, {"M": 0}])
def test_empty(sizes):
    x, t = tensors(**sizes)
    o, to = torch.func.jvp(jvp_attention, x, t)
    assert o.shape == to.shape == x[0].shape
    assert not o.any() and not to.any()


CASES = {
    "normal": lambda q, k, v, *t: (q, k, v, *t),
    "large logits": lambda q, k, v, *t: (8 * q, k, v, *t),
    "one-hot rows": lambda q, k, v, *t: (20 * k[:, :, : q.shape[2]], k, v, *t),
    "tiny tangents": lambda q, k, v, *t: (q, k, v, *(1e-3 * a for a in t)),
    "offset values": lambda q, k, v, *t: (q, k, v + 3, *t),
}


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2.5e-3), (torch.float16, 6e-4), (torch.float32, 2e-6)])
@pytest.mark.parametrize("case", CASES)
def test_accuracy_against_float64_on_the_same_rounded_inputs(case, dtype, bound):
    x, t = tensors(N=33, M=65, D=64)
    rounded = [a.to(dtype) for a in CASES[case](*x, *t)]
    o, to = torch.func.jvp(jvp_attention, tuple(rounded[:3]), tuple(rounded[3:]))
    exact = [a.double() for a in rounded]
    expected, t_expected = torch.func.jvp(naive, tuple(exact[:3]), tuple(exact[3:]))
    assert o.dtype == to.dtype == dtype
    assert relative_error(o, expected) < bound
    assert relative_error(to, t_expected) < bound


def network(x, W, attention, project):
    q, k, v = project(x, W).unflatten(-1, (3, -1)).unbind(-2)
    return x + attention(q, k, v).sin()


def setup_network(seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(24, 8, generator=generator, dtype=torch.float64).requires_grad_()
    x, t, g = (torch.randn(2, 3, 7, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    return W, x, t, g


def twice(x, W, attention, project):
    return network(network(x, W, attention, project), W, attention, project)


@pytest.mark.parametrize("transform", ["func.jvp", "dual_level"])
def test_gradients_flow_through_the_primal_while_forward_mode_is_active(transform):
    W, x, t, g = setup_network()
    (expected,) = torch.autograd.grad(twice(x, W, naive, F.linear), W, g)
    if transform == "func.jvp":
        o, to = torch.func.jvp(lambda x: twice(x, W, jvp_attention, linear), (x,), (t,))
        (gradient,) = torch.autograd.grad(o, W, g)
    else:
        with fwAD.dual_level():
            o, to = fwAD.unpack_dual(twice(fwAD.make_dual(x, t), W, jvp_attention, linear))
            (gradient,) = torch.autograd.grad(o, W, g)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(to, torch.func.jvp(lambda x: twice(x, W, naive, F.linear), (x,), (t,))[1])


def test_gradient_with_respect_to_the_arguments():
    x, t = tensors(dtype=torch.float64)
    x = tuple(a.requires_grad_() for a in x)
    g = torch.randn_like(x[0])
    o, _ = torch.func.jvp(jvp_attention, x, t)
    for gradient, expected in zip(torch.autograd.grad(o, x, g), torch.autograd.grad(naive(*x), x, g), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mixed", [False, True])
def test_gradient_through_the_tangent_is_refused(mixed):
    x, t = tensors()
    q = x[0].requires_grad_()
    o, to = torch.func.jvp(lambda k: jvp_attention(q, k, x[2]), x[1:2], t[1:2])
    loss = (o + to).sum() if mixed else to.sum()
    with pytest.raises(RuntimeError, match=r"A gradient through the tangent of .* detach the tangent"):
        loss.backward()


def test_nested_forward_mode_is_refused():
    x, t = tensors()

    def inner(q):
        return torch.func.jvp(lambda q: jvp_attention(q, *x[1:]), (q,), (t[0],))[1]

    with pytest.raises(RuntimeError, match="nested forward mode"):
        torch.func.jvp(inner, (x[0],), (t[0],))


def test_double_backward_is_refused():
    x, t = tensors()
    q = x[0].requires_grad_()
    o, _ = torch.func.jvp(lambda k: jvp_attention(q, k, x[2]), x[1:2], t[1:2])
    (gradient,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x, t: torch.func.vmap(lambda x: torch.func.jvp(f, (x,), (t,))[1])(torch.stack([x, 2 * x])),
        lambda f, x, t: torch.func.jvp(torch.func.vmap(f), (torch.stack([x, 2 * x]),), (torch.stack([t, t]),))[1],
        lambda f, x, t: torch.func.jacfwd(f)(x[:1, :1]),
        lambda f, x, t: torch.func.grad(lambda x: torch.func.jvp(f, (x,), (t,))[0].square().sum())(x),
        lambda f, x, t: torch.func.grad(lambda x: torch.func.jvp(f, (x,), (t,))[1].square().sum())(x),
        lambda f, x, t: torch.func.jvp(torch.func.grad(lambda x: f(x).square().sum()), (x,), (t,))[1],
    ],
    ids=["vmap of jvp", "jvp of vmap", "jacfwd", "grad of primal", "grad of tangent", "hessian-vector product"],
)
def test_function_transforms(transform):
    """Where a custom_op would fail or drop a tangent, plain attention takes over and every derivative is right."""
    W, x, t, _ = setup_network()
    W = W.detach()
    result = transform(lambda x: network(x, W, jvp_attention, linear), x, t)
    torch.testing.assert_close(result, transform(lambda x: network(x, W, naive, F.linear), x, t), rtol=1e-9, atol=1e-10)


def values_of_jvp_and_gradient(attention, project, compiled):
    W, x, t, g = setup_network()

    def step(x, t):
        o, to = torch.func.jvp(lambda x: twice(x, W, attention, project), (x,), (t,))
        return o, to.detach()

    step = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    o, to = step(x, t)
    return o.detach(), to, torch.autograd.grad(o, W, g)[0]


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compile_fullgraph_around_the_jvp(fresh_dynamo):
    compiled = values_of_jvp_and_gradient(jvp_attention, linear, compiled=True)
    for value, expected in zip(compiled, values_of_jvp_and_gradient(naive, F.linear, compiled=False), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


def test_compile_refuses_the_gradient_of_the_tangent_but_not_its_presence(fresh_dynamo):
    x, t = tensors()
    q = x[0].clone().requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, k, t):
        return torch.func.jvp(lambda k: jvp_attention(q, k, x[2]), (k,), (t,))

    o, _ = step(q, x[1], t[1])
    o.sum().backward()
    torch.testing.assert_close(q.grad, torch.autograd.grad(naive(q, *x[1:]).sum(), q)[0])
    with pytest.raises(RuntimeError, match="A gradient through the tangent"):
        step(q, x[1], t[1])[1].sum().backward()


@pytest.mark.parametrize("kind", ["custom_op", "autograd.Function"])
def test_a_wrong_rule_is_caught(kind, fresh_dynamo):
    """Both usual ways to write a fused operator lose the tangent without an error: the checks above must see it."""
    if kind == "custom_op":

        @torch.library.custom_op("sclightning_test::attention", mutates_args=())
        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return naive(q, k, v)

        attention.register_fake(lambda q, k, v: torch.empty_like(q))
        compiled = False
    else:

        class Attention(torch.autograd.Function):
            @staticmethod
            def forward(q, k, v):
                return naive(q, k, v)

            @staticmethod
            def setup_context(ctx, inputs, output):
                ctx.save_for_forward(*inputs)

            @staticmethod
            def jvp(ctx, tq, tk, tv):
                return 2 * torch.func.jvp(naive, ctx.saved_tensors, (tq, tk, tv))[1]  # wrong, and ignored by Dynamo

        attention, compiled = Attention.apply, True

    x, t = tensors()

    def step(q, t):
        return torch.func.jvp(lambda q: attention(q, *x[1:]), (q,), (t,))

    step = torch.compile(step, backend="aot_eager") if compiled else step
    wrong = step(x[0], t[0])[1]
    expected = torch.func.jvp(lambda q: naive(q, *x[1:]), x[:1], t[:1])[1]
    if compiled:
        torch.testing.assert_close(wrong, expected)  # pytorch#192985: the doubled rule never ran
        with pytest.raises(AssertionError):
            torch.testing.assert_close(2 * wrong, expected)
    else:
        with pytest.raises(AssertionError):
            torch.testing.assert_close(wrong, expected)


def test_autocast():
    x, t = tensors(N=33, M=65, D=32, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        o, to = torch.func.jvp(jvp_attention, x, t)
        mixed = jvp_attention(x[0].bfloat16(), *x[1:])
    exact = [a.bfloat16().double() for a in (*x, *t)]
    expected, t_expected = torch.func.jvp(naive, tuple(exact[:3]), tuple(exact[3:]))
    assert o.dtype == to.dtype == mixed.dtype == torch.bfloat16
    assert relative_error(o, expected) < 2.5e-3 and relative_error(to, t_expected) < 2.5e-3


def test_checkpointing_a_block_that_runs_the_jvp_inside():
    W, x, t, g = setup_network()

    def block(x, t):
        o, to = torch.func.jvp(lambda x: twice(x, W, jvp_attention, linear), (x,), (t,))
        return o, to.detach()

    o, to = checkpoint(block, x, t, use_reentrant=False)
    expected, t_expected = block(x, t)
    assert torch.equal(o, expected) and torch.equal(to, t_expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, W, g)[0] for y in (o, expected)))


def test_the_example_of_the_documentation():
    """The DiT of the documentation runs, with the derivative of the same network of PyTorch's operators."""
    text = (Path(__file__).parent.parent / "docs" / "jvp_attention.md").read_text()
    source = re.search(r"```python\n(# A DiT.*?)```", text, re.DOTALL).group(1)
    assert len(source.splitlines()) <= 66
    ours, plain = {}, {}
    exec(source, ours)
    exec(source.replace("from sclightning.ops import Linear, jvp_attention", "from torch.nn import Linear"), plain)
    assert "jvp_attention" not in plain
    plain["jvp_attention"] = naive
    torch.manual_seed(0)
    nets = [
        namespace["DiT"](size=8, patch=2, channels=3, width=32, depth=2, heads=2).double()
        for namespace in (ours, plain)
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    x, t = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    results = [
        namespace["velocity_and_derivative"](net, x, t) for namespace, net in zip((ours, plain), nets, strict=True)
    ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert results[0][1].abs().max() > 0.1


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: (q[0], k, v), "shape"),
        (lambda q, k, v: (q, k[..., :4], v), "expand|expected"),
        (lambda q, k, v: (q[:, :1], k, v), "expand batch and heads"),
        (lambda q, k, v: (q.float(), k, v), "one dtype"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        jvp_attention(*change(*tensors()[0]))
