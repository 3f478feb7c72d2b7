"""The Triton kernels: values in the interpreter, registers and spills by compiling, values and gradients on a GPU."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from sclightning.ops import cosine_attention, jvp_attention, reference

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ROOT = str(Path(__file__).parent.parent)


def relative_error(x, expected):
    return ((x.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


# --- interpreter: runs as `python test_ops_triton.py` with TRITON_INTERPRET=1, so that the variable does not leak


def check_attention(config, N, M, D, E=None, dtype=torch.float32, has=(1, 1, 1), strided=False, small=False):
    from sclightning.ops.triton import launch

    def tensor(n, d):
        return torch.randn(2, n, 3, d).to(dtype).transpose(1, 2) if strided else torch.randn(2, 3, n, d).to(dtype)

    q, k, v = tensor(N, D), tensor(M, D), tensor(M, E or D)
    t = [torch.randn_like(x) if h else None for x, h in zip((q, k, v), has, strict=True)]
    o, to = (reference.output_like(q, v).fill_(torch.nan) for _ in range(2))
    lse = torch.full((2, 3, N), torch.nan)
    arguments = (q, k, v, *t, o, to, lse, D**-0.5, config)
    launch.launch_small(*arguments, 4) if small else launch.launch_attention(*arguments)
    exact = reference.attention_jvp(*(None if x is None else x.double() for x in (q, k, v, *t)), D**-0.5)
    bound = 1e-6 if dtype == torch.float32 else 6e-4
    errors = [relative_error(a, b) for a, b in zip((o, to, lse), exact, strict=True)]
    assert max(errors) < bound, (config, N, M, D, E, dtype, has, errors)


def check_cosine(config, D, N, dtype, programs):
    from sclightning.ops.triton import launch

    x, tx = torch.randn(2, 2, D, 3, N).to(dtype), torch.randn(2, 2, D, 3, N).to(dtype)
    o, to = (torch.full((2, 2, D, N), torch.nan, dtype=dtype) for _ in range(2))
    lse = torch.full((2, 2, N), torch.nan)
    launch.launch_cosine(x, tx, o, to, lse, D**-0.5, 1e-4, config, programs)
    y, ty = reference.pixel_norm_jvp(x.double(), tx.double(), 2, 1e-4)
    y, ty = (a.transpose(2, 4).unbind(3) for a in (y, ty))
    exact = reference.attention_jvp(*y, *ty, D**-0.5)
    errors = [relative_error(a, b) for a, b in zip((o.transpose(2, 3), to.transpose(2, 3), lse), exact, strict=True)]
    assert max(errors) < (1e-6 if dtype == torch.float32 else 7e-4), (config, D, N, dtype, errors)


def let_triton_3_6_run_on_newer_numpy():
    """Its interpreter turns arrays of one element into integers, which numpy 2.3 took away."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend


def interpreted():
    from sclightning.ops.triton.configs import Config

    torch.manual_seed(0)
    for tma in (False, True):
        check_attention(Config(16, 16, 4, 2, tma), 7, 20, 16)
        check_attention(Config(16, 16, 4, 2, tma), 33, 48, 72, strided=True)
        check_attention(Config(16, 16, 4, 2, tma), 20, 33, 24, 40)
        check_attention(Config(16, 32, 4, 1, tma), 9, 33, 192)  # two programs share the values
        check_attention(Config(16, 16, 4, 2, tma), 20, 33, 8, dtype=torch.float16)
        for has in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
            check_attention(Config(16, 16, 4, 2, tma), 5, 17, 16, has=has)
    check_attention(Config(32, 32, 4, 2, True), 20, 30, 16, small=True)
    check_attention(Config(32, 32, 4, 2, True), 32, 32, 16, dtype=torch.float16, small=True)
    check_cosine(Config(64, 64, 4, 1), 16, 64, torch.float16, 3)
    check_cosine(Config(64, 64, 4, 1), 16, 40, torch.float32, 4)
    check_cosine(Config(16, 16, 4, 1), 16, 40, torch.float32, 3)
    check_cosine(Config(32, 16, 4, 1), 16, 48, torch.float16, 1)


@needs_triton
def test_values_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and "values agree" in run.stdout, run.stdout[-2000:] + run.stderr[-4000:]


# --- compilation for GPUs that are not here


def compile_for(kernel, capability, constants, descriptors, config):
    """Registers a thread and bytes of stack (spills) of a kernel of bf16 tensors, from the compiled binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, signature, attributes = kernel.arg_names, {}, {}
    for i, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in descriptors:
            signature[name] = f"tensordesc<bf16[1,1,{descriptors[name][0]},{descriptors[name][1]}]>"
        elif name in ("scale", "root", "eps"):
            signature[name] = "fp32"
        elif name.isupper() and name not in ("H", "NQ", "NK", "BH", "NU"):
            signature[name] = "*fp32" if name == "LSE" else "*bf16"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return registers, stack, compiled


SPILLS = 128  # bytes a thread: a few addresses at most, never an accumulator (64 x 64 x 2 of them are 256 bytes)


@needs_triton
@pytest.mark.parametrize("D, N", [(64, 256), (64, 4096), (72, 256), (72, 1024), (128, 256), (256, 256)])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_attention_compiles_without_spills(capability, D, N):
    from sclightning.ops.triton.configs import attention_config
    from sclightning.ops.triton.kernels import attention_jvp_kernel
    from sclightning.ops.triton.launch import SPLIT_AT, _columns

    config = attention_config((capability // 10, 0), D, N)
    if N > 256 and config == attention_config((capability // 10, 0), D, 256):
        pytest.skip("the configuration of the shorter length")
    D0, D1, D_END0, D_END1 = _columns(D)
    constants = {"D0": D0, "D1": D1, "D_END0": D_END0, "D_END1": D_END1, "SPLIT": max(1, D // SPLIT_AT), "SHIFT": 0.0}
    constants |= {"E0": min(D0, SPLIT_AT), "E1": D1, "E_END0": D_END0, "E_END1": D_END1}
    constants |= dict.fromkeys(("HAS_TQ", "HAS_TK", "HAS_TV"), True) | {"RAGGED": False, "TMA": config.tma}
    constants |= {"BM": config.BM, "BN": config.BN}
    columns = {"K": D0, "TK": D0, "V": min(D0, SPLIT_AT), "TV": min(D0, SPLIT_AT)}
    columns |= {name + "1": D1 or columns[name] for name in tuple(columns)}
    descriptors = {name: (config.BN, width) for name, width in columns.items()} if config.tma else {}
    registers, stack, compiled = compile_for(attention_jvp_kernel, capability, constants, descriptors, config)
    assert 32 <= registers <= 255 and stack <= SPILLS
    assert ("wgmma" in compiled.asm["ptx"]) == (capability == 90)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_small_and_cosine_kernels_compile_without_spills(capability):
    from sclightning.ops.triton import configs, cosine_kernel, kernels

    if config := configs.small_config((capability // 10, 0), 64, 64):
        constants = {"D": 64, "SHIFT": 0.0, "BM": 64, "BN": 64, "STAGES": config.stages}
        descriptors = dict.fromkeys(("Q", "K", "V", "TQ", "TK", "TV"), (64, 64))
        registers, stack, _ = compile_for(
            kernels.attention_jvp_small_kernel, capability, constants, descriptors, config
        )
        assert 32 <= registers <= 255 and stack <= SPILLS

    config = configs.cosine_config((capability // 10, 0), 64, 64)
    constants = {"D": 64, "SHIFT": 6.0, "BN": 64}
    registers, stack, _ = compile_for(cosine_kernel.cosine_jvp_small_kernel, capability, constants, {}, config)
    assert 32 <= registers <= 255 and stack <= SPILLS

    config = configs.cosine_config((capability // 10, 0), 64, 256)
    constants |= {"BM": config.BM, "BN": config.BN, "STAGES": config.stages, "RAGGED": False}
    registers, stack, _ = compile_for(cosine_kernel.cosine_jvp_kernel, capability, constants, {}, config)
    assert 32 <= registers <= 255 and stack <= SPILLS


# --- on a GPU


@pytest.fixture(autouse=True)
def triton_on_hopper_too(monkeypatch):
    monkeypatch.setenv("SCLIGHTNING_CUDA", "0")


BOUNDS = {torch.bfloat16: (2.5e-3, 5e-3), torch.float16: (6e-4, 1.5e-3), torch.float32: (2e-6, 5e-6)}
SHAPES = [
    (N, M, D) for N, M in ((64, 64), (65, 65), (256, 256), (80, 999), (999, 80)) for D in (8, 20, 64, 72, 128, 192, 256)
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("N, M, D", SHAPES)
def test_values_and_gradients_on_the_gpu(N, M, D, dtype):
    torch.manual_seed(0)
    x = [torch.randn(2, n, 3, D, device="cuda").to(dtype).transpose(1, 2).requires_grad_() for n in (N, M, M)]
    t = [torch.randn_like(a) for a in x]
    o, to = torch.func.jvp(jvp_attention, tuple(x), tuple(t))
    exact = [a.detach().double().requires_grad_() for a in x]
    attention = lambda q, k, v: reference.attention(q, k, v, D**-0.5)  # noqa: E731
    expected, t_expected = torch.func.jvp(attention, tuple(exact), tuple(a.double() for a in t))
    bound, gradient_bound = BOUNDS[dtype]
    assert relative_error(o, expected) < bound and relative_error(to, t_expected) < bound
    g = torch.randn_like(o)
    for a, b in zip(torch.autograd.grad(o, x, g), torch.autograd.grad(expected, exact, g.double()), strict=True):
        assert relative_error(a, b) < gradient_bound


CASES = {
    "large logits": lambda q, k, v, *t: (8 * q, k, v, *t),
    "one-hot rows": lambda q, k, v, *t: (20 * k, k, v, *t),
    "tiny tangents": lambda q, k, v, *t: (q, k, v, *(1e-3 * a for a in t)),
    "offset values": lambda q, k, v, *t: (q, k, v + 3, *t),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("N, D", [(64, 64), (256, 64), (300, 128)])
def test_accuracy_of_hard_cases_on_the_gpu(case, dtype, N, D):
    torch.manual_seed(0)
    x = [a.to(dtype) for a in CASES[case](*torch.randn(6, 2, 3, N, D, device="cuda"))]
    o, to = torch.func.jvp(jvp_attention, tuple(x[:3]), tuple(x[3:]))
    exact = reference.attention_jvp(*(a.double() for a in x), D**-0.5)
    # float32 scores of 30 carry 30 times the rounding error of 1, whoever computes them
    bound = 2 * BOUNDS[dtype][0] if dtype == torch.float32 else BOUNDS[dtype][0]
    assert relative_error(o, exact[0]) < bound and relative_error(to, exact[1]) < bound


@pytest.mark.gpu
@pytest.mark.parametrize("N, D", [(64, 64), (40, 64), (256, 64), (200, 32), (1024, 16), (77, 64), (256, 128)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cosine_attention_on_the_gpu(N, D, dtype):
    torch.manual_seed(0)
    x, t = torch.randn(2, 5, 3, D, 3, N, device="cuda").to(dtype)
    x.requires_grad_()
    o, to = torch.func.jvp(cosine_attention, (x,), (t,))
    exact = x.detach().double().requires_grad_()
    q = torch.func.jvp(lambda x: cosine_attention(x), (exact,), (t.double(),))
    bound = {torch.float16: 6e-4, torch.bfloat16: 5e-3}[dtype]
    assert relative_error(o, q[0]) < bound and relative_error(to, q[1]) < bound
    g = torch.randn_like(o)
    gradients = (torch.autograd.grad(a, b, g.to(a.dtype))[0] for a, b in ((o, x), (q[0], exact)))
    assert relative_error(*gradients) < 3 * bound


@pytest.mark.gpu
def test_many_heads_empty_batches_and_subsets_on_the_gpu():
    for B, H in ((70_000, 1), (3, 40_000), (0, 4)):
        x = torch.randn(3, B, H, 8, 16, device="cuda").bfloat16()
        o, to = torch.func.jvp(jvp_attention, tuple(x), tuple(x.flip(0)))
        exact = reference.attention_jvp(*x.double(), *x.flip(0).double(), 0.25)
        assert o.shape == x[0].shape
        assert B == 0 or relative_error(to, exact[1]) < 3e-3
    x, t = torch.randn(2, 3, 2, 3, 64, 100, device="cuda").bfloat16().transpose(-1, -2)  # D is not the fastest
    for i in range(3):
        f = lambda a: jvp_attention(*(a if i == j else x[j] for j in range(3)))  # noqa: B023, E731
        _, to = torch.func.jvp(f, (x[i],), (t[i],))
        exact = reference.attention_jvp(*x.double(), *(t[j].double() if i == j else None for j in range(3)), 0.125)
        assert relative_error(to, exact[1]) < 2.5e-3


@pytest.mark.gpu
def test_no_recompilation_when_batch_heads_or_length_change():
    from sclightning.ops.triton.kernels import attention_jvp_kernel

    def run(B, H, N):
        x = torch.randn(3, B, H, N, 64, device="cuda").bfloat16()
        torch.func.jvp(jvp_attention, tuple(x), tuple(x))

    run(2, 3, 256), run(2, 3, 255)
    kernels = sum(len(cache[0]) for cache in attention_jvp_kernel.device_caches.values())
    for shape in ((1, 1, 128), (3, 5, 192), (16, 1, 384), (2, 2, 99), (1, 7, 401)):
        run(*shape)
    assert sum(len(cache[0]) for cache in attention_jvp_kernel.device_caches.values()) == kernels


if __name__ == "__main__":
    let_triton_3_6_run_on_newer_numpy()
    interpreted()
    print("values agree")
