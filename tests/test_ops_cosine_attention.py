"""cosine_attention on the CPU: EDM2's layout, values, gradients, compile, and what it refuses."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD

from sclightning.ops import conv2d, cosine_attention, reference


def naive(qkv, scale=None, eps=1e-4):
    """Pixel norm and attention over (B, H, D, 3, N), written out with einsum."""
    D = qkv.shape[2]
    qkv = qkv / (eps + qkv.square().mean(2, keepdim=True).sqrt())
    q, k, v = qkv.unbind(3)
    weights = torch.softmax(torch.einsum("bhdn,bhdm->bhnm", q, k) * (D**-0.5 if scale is None else scale), -1)
    return torch.einsum("bhnm,bhdm->bhdn", weights, v)


def tensors(B=2, H=3, D=8, N=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x, t, g = (torch.randn(B, H, D, 3, N, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    return x, t, g[:, :, :, 0]


def test_the_layout_is_that_of_the_convolution():
    B, H, D, h, w = 2, 3, 8, 4, 5
    torch.manual_seed(0)
    x, weight = torch.randn(B, 6, h, w, dtype=torch.float64), torch.randn(H * D * 3, 6, 1, 1, dtype=torch.float64)
    y = cosine_attention(conv2d(x, weight).reshape(B, H, D, 3, h * w))
    by_channel = torch.einsum("bchw,oc->bohw", x, weight[:, :, 0, 0]).flatten(2)
    for head in range(H):
        q, k, v = (by_channel[:, [(head * D + d) * 3 + i for d in range(D)]] for i in range(3))
        expected = naive(torch.stack([q, k, v], 2)[:, None])[:, 0]
        torch.testing.assert_close(y[:, head], expected, rtol=1e-12, atol=1e-12)
    assert y.is_contiguous() and y.shape == (B, H, D, h * w)


@pytest.mark.parametrize("options", [{}, {"scale": 0.2}, {"scale": -0.2}, {"eps": 0.1}])
def test_tangent_is_the_derivative(options):
    x, t, _ = tensors()
    y, ty = torch.func.jvp(lambda x: cosine_attention(x, **options), (x,), (t,))
    expected, t_expected = torch.func.jvp(lambda x: naive(x, **options), (x,), (t,))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(ty, t_expected, rtol=0, atol=1e-12)
    difference = (naive(x + 1e-6 * t, **options) - naive(x - 1e-6 * t, **options)) / 2e-6
    torch.testing.assert_close(ty, difference, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(cosine_attention(x, **options), expected, rtol=0, atol=1e-13)
    with fwAD.dual_level():
        ty_dual = fwAD.unpack_dual(cosine_attention(fwAD.make_dual(x, t), **options)).tangent
    assert torch.equal(ty_dual, ty)


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2.5e-3), (torch.float16, 6e-4), (torch.float32, 2e-6)])
@pytest.mark.parametrize("tangent_scale", [1.0, 1e-3])
def test_accuracy(dtype, bound, tangent_scale):
    x, t, _ = tensors(D=32, N=40)
    x, t = x.to(dtype), (t * tangent_scale).to(dtype)
    y, ty = torch.func.jvp(cosine_attention, (x,), (t,))
    expected, t_expected = torch.func.jvp(naive, (x.double(),), (t.double(),))
    assert y.dtype == ty.dtype == dtype
    assert ((y - expected).norm() / expected.norm()).item() < bound
    assert ((ty - t_expected).norm() / t_expected.norm()).item() < bound


def test_gradients_through_the_primal_and_not_through_the_tangent():
    x, t, g = tensors()
    x.requires_grad_()
    (expected,) = torch.autograd.grad(naive(x), x, g)
    y, ty = torch.func.jvp(cosine_attention, (x,), (t,))
    torch.testing.assert_close(torch.autograd.grad(y, x, g, retain_graph=True)[0], expected, rtol=1e-9, atol=1e-11)
    with pytest.raises(RuntimeError, match="A gradient through the tangent"):
        ty.sum().backward()
    torch.testing.assert_close(torch.autograd.grad(cosine_attention(x), x, g)[0], expected, rtol=1e-9, atol=1e-11)


def test_zero_vectors_have_finite_tangents():
    x, t, g = tensors()
    x[..., 0] = 0
    x.requires_grad_()
    y, ty = torch.func.jvp(cosine_attention, (x,), (t,))
    assert y.isfinite().all() and ty.isfinite().all()
    assert torch.autograd.grad(y, x, g)[0].isfinite().all()


def test_compile_fullgraph():
    torch._dynamo.reset()
    x, t, g = tensors()
    x.requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x, t):
        y, ty = torch.func.jvp(cosine_attention, (x,), (t,))
        return y, ty.detach()

    y, ty = step(x, t)
    expected, t_expected = torch.func.jvp(naive, (x.detach(),), (t,))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(ty, t_expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(naive(x), x, g)[0])


def test_transforms():
    x, t, _ = tensors(B=1, H=1, N=3)
    both = torch.stack([x, 2 * x])
    for transform in (
        lambda f: torch.func.vmap(lambda x: torch.func.jvp(f, (x,), (t,))[1])(both),
        lambda f: torch.func.jvp(torch.func.vmap(f), (both,), (both.flip(0),))[1],
        lambda f: torch.func.grad(lambda x: torch.func.jvp(f, (x,), (t,))[1].square().sum())(x),
    ):
        torch.testing.assert_close(transform(cosine_attention), transform(naive), rtol=1e-8, atol=1e-9)
    with pytest.raises(RuntimeError, match="nested forward mode"):
        torch.func.jvp(lambda x: torch.func.jvp(cosine_attention, (x,), (t,))[1], (x,), (t,))


def test_pixel_norm_is_the_papers():
    x, t, g = tensors()
    y, _ = reference.pixel_norm_jvp(x, t, 2, 1e-4)
    torch.testing.assert_close(y, reference.pixel_norm(x, 2, 1e-4))
    torch.testing.assert_close(y.square().mean(2).sqrt(), torch.ones_like(y[:, :, 0]), rtol=1e-3, atol=0)
    g = g[:, :, :, None].expand_as(x)
    dx, tangent = reference.pixel_norm_vjp(t, x, 2, 1e-4), reference.pixel_norm_jvp(x, g, 2, 1e-4)[1]
    torch.testing.assert_close((dx * g).sum(), (tangent * t).sum())


def test_error():
    with pytest.raises(ValueError, match="shape"):
        cosine_attention(torch.zeros(2, 3, 8, 12))
