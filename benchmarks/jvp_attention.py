"""Attention with its JVP on a GPU: milliseconds against the peers and the machine's floor, tangent errors, memory.

Peers: naive ``torch.func.jvp`` of matmul-softmax-matmul, jvp-flash-attention (if installed), and for EDM2's cosine
attention ``torch.compile`` of the naive jvp. Plain forwards of SDPA's flash and cuDNN backends are ceilings (a third of
the work). Times are medians of CUDA-graph replays, so of the kernels without Python, on random data. On Hopper the CUDA
extension (docs/cuda.md) has rows of its own, of the same run, also where Triton's kernel is the one taken.

Usage: python benchmarks/jvp_attention.py [--out benchmarks/results/jvp_attention.json] [--only attention cosine block]
With --only, what is not asked for stays in the file as it was.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import naive
import torch
import triton
from provenance import commit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sclightning.ops import Linear, cosine_attention, jvp_attention, reference
from sclightning.ops.cuda import launch

ATTENTION = [  # B, H, N, D
    (128, 12, 64, 64),
    (128, 9, 256, 64),
    (128, 1, 256, 256),
    (64, 16, 256, 72),
    (16, 16, 1024, 72),
    (2, 16, 4096, 64),
    (2, 16, 4096, 128),
    (1, 8, 16384, 128),
]
COSINE = [(128, 12, 64, 64), (128, 9, 256, 64)]
BLOCK = [(64, 256), (16, 1024)]  # B, N


def median_ms(f: Callable, repeats: int = 15) -> float:
    """Median milliseconds of ``f``: of replays of a CUDA graph of several calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once(g: Callable) -> float:
        start.record()
        g()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    f()
    calls = max(2, min(50, round(5 / min(once(f) for _ in range(3)))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            f()
    once(graph.replay)
    return statistics.median(once(graph.replay) for _ in range(repeats)) / calls


def limits() -> dict[str, float]:
    """The machine's ceilings: device copy in TB/s (read plus written), matrix product of bf16 and fp16 in TFLOP/s."""
    found = {}
    for dtype in (torch.bfloat16, torch.float16):
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        found[f"matmul_{str(dtype)[6:]}_tflop_s"] = 2 * 8192**3 / median_ms(lambda a=a, b=b: a @ b) / 1e9
    x = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    found["copy_tb_s"] = 2 * x.nbytes / median_ms(lambda: torch.neg(x, out=y)) / 1e9  # a graph's memcpy is slower
    return found


def floor_ms(B: int, H: int, N: int, D: int, dtype: torch.dtype, machine: dict[str, float]) -> float:
    """Six products at the matrix rate, or each input read and each output written once: whichever takes longer."""
    flops, nbytes = 12 * B * H * N**2 * D, 16 * B * H * N * D + 4 * B * H * N
    return max(flops / machine[f"matmul_{str(dtype)[6:]}_tflop_s"] / 1e9, nbytes / machine["copy_tb_s"] / 1e9)


def extra_megabytes(f: Callable) -> float:
    """Peak memory of a call above what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def peers_of_attention(x: tuple[Tensor, ...], t: tuple[Tensor, ...]) -> dict[str, Callable]:
    """What else computes this, and forwards that compute a third of it."""

    def forward(backend: SDPBackend) -> Callable:
        def f() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*x)

        return f

    peers = {"naive torch.func.jvp": lambda: torch.func.jvp(naive.attention, x, t)}
    try:
        from jvp_flash_attention.jvp_attention import JVPAttn
    except ImportError:
        pass
    else:
        peers["jvp-flash-attention"] = lambda: torch.func.jvp(JVPAttn.fwd_dual, x, t)
    peers["SDPA flash, forward only"] = forward(SDPBackend.FLASH_ATTENTION)
    peers["SDPA cuDNN, forward only"] = forward(SDPBackend.CUDNN_ATTENTION)
    return peers


def backends(fewest: dict[int, int], D: int, N: int) -> Iterator[str]:
    """Triton, and on Hopper the CUDA extension if it takes such heads, each switched on until the next.

    Raises:
        RuntimeError: If the extension does not build or is not right.
    """
    os.environ["SCLIGHTNING_CUDA"] = "0"
    yield "triton"
    if torch.cuda.get_device_capability() == (9, 0) and fewest.get(D, 2**31) <= N:
        os.environ["SCLIGHTNING_CUDA"] = "1"
        yield "cuda"
        if launch._library() is None or not all(launch._agrees.values()):
            raise RuntimeError("The CUDA extension was not used: see the warning above.")
    del os.environ["SCLIGHTNING_CUDA"]


def measure(
    shape, dtype, op: str, backend: str, ours: Callable, peers: dict[str, Callable], error: float, machine: dict
) -> dict:
    """One row of the table; a peer that fails is recorded with its error."""
    row = {"shape": list(shape), "dtype": str(dtype)[6:], "op": op, "backend": backend, "tangent_error": error}
    row |= {"ours_ms": median_ms(ours), "floor_ms": floor_ms(*shape, dtype, machine)}
    row |= {"peers_ms": {}, "peers_failed": {}}
    row["extra_mb"] = extra_megabytes(ours)
    for name, peer in peers.items():
        try:
            row["peers_ms"][name] = median_ms(peer)
        except Exception as failure:
            row["peers_failed"][name] = str(failure).splitlines()[0][:200]
            torch.cuda.synchronize()
    print(json.dumps(row), flush=True)
    return row


def relative_error(x: Tensor, expected: Tensor) -> float:
    return ((x.double() - expected).norm() / expected.norm()).item()


@torch.no_grad()
def attention(machine: dict) -> list[dict]:
    """Softmax attention in bf16. The error is that of 512 queries of one head, against float64."""
    rows = []
    for shape in ATTENTION:
        x, t = (tuple(torch.randn(3, *shape, device="cuda").bfloat16()) for _ in range(2))
        q, tq = (a[0][:1, :1, :512].double() for a in (x, t))
        k, v, tk, tv = (a[:1, :1].double() for a in (*x[1:], *t[1:]))
        exact = reference.attention_jvp(q, k, v, tq, tk, tv, shape[-1] ** -0.5)[1]
        ours = lambda x=x, t=t: torch.func.jvp(jvp_attention, x, t)  # noqa: E731
        peers = peers_of_attention(x, t)
        for backend in backends(launch.FEWEST_KEYS, shape[3], shape[2]):
            error = relative_error(ours()[1][:1, :1, :512], exact)
            rows.append(measure(shape, x[0].dtype, "jvp_attention", backend, ours, peers, error, machine))
            peers = {}  # once a shape
    return rows


@torch.no_grad()
def cosine(machine: dict) -> list[dict]:
    """EDM2's cosine attention in fp16, from the layout of the convolution."""
    rows = []
    for shape in COSINE:
        B, H, N, D = shape
        # Not halves of one tensor: PyTorch copies a tangent whose storage offset is not its primal's.
        x, t = (torch.randn(B, H, D, 3, N, device="cuda").half() for _ in range(2))
        exact = torch.func.jvp(naive.cosine_attention, (x[:2].double(),), (t[:2].double(),))[1]
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, t: torch.func.jvp(naive.cosine_attention, (x,), (t,)))
        peers = {
            "naive torch.func.jvp": lambda x=x, t=t: torch.func.jvp(naive.cosine_attention, (x,), (t,)),
            "torch.compile(naive torch.func.jvp)": lambda x=x, t=t, compiled=compiled: compiled(x, t),
        }
        ours = lambda x=x, t=t: torch.func.jvp(cosine_attention, (x,), (t,))  # noqa: E731
        for backend in backends(launch.FEWEST_POSITIONS, D, N):
            error = relative_error(ours()[1][:2], exact)
            rows.append(measure(shape, x.dtype, "cosine_attention", backend, ours, peers, error, machine))
            peers = {}  # once a shape
    return rows


def layer_norm(x: Tensor) -> Tensor:
    """Without weights, in float32; PyTorch's own yields a float32 tangent for a bfloat16 primal."""
    y = x - x.mean(-1, keepdim=True, dtype=torch.float32)
    length = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    return (y * torch.rsqrt(length.square() / x.shape[-1] + 1e-6)).to(x.dtype)


class Block(nn.Module):
    """A block of DiT-XL/2: width 1152, 16 heads of 72, its six modulations given."""

    def __init__(self, layer: type[nn.Linear], attend: Callable, width: int = 1152, heads: int = 16):
        super().__init__()
        self.heads, self.attend = heads, attend
        self.modulation, self.qkv, self.out = layer(width, 6 * width), layer(width, 3 * width), layer(width, width)
        self.mlp = nn.Sequential(layer(width, 4 * width), nn.GELU(approximate="tanh"), layer(4 * width, width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (B, N, width) conditioned on c (B, width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c))[:, None].chunk(6, -1)
        y = torch.addcmul(shift1, layer_norm(x), 1 + scale1)
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = torch.addcmul(x, gate1, self.out(self.attend(q, k, v).transpose(1, 2).flatten(2)))
        return torch.addcmul(x, gate2, self.mlp(torch.addcmul(shift2, layer_norm(x), 1 + scale2)))


@torch.no_grad()
def block(machine: dict) -> list[dict]:
    """Forward and JVP of a whole DiT-XL/2 block in bf16, ours against ``nn.Linear`` with naive attention."""
    rows = []
    for B, N in BLOCK:
        x, tx = (torch.randn(B, N, 1152, device="cuda").bfloat16() for _ in range(2))
        c, tc = (torch.randn(B, 1152, device="cuda").bfloat16() for _ in range(2))
        row = {"shape": [B, N, 1152], "op": "DiT-XL/2 block, forward and JVP", "dtype": "bfloat16"}
        for name, layer, attend in (("ours", Linear, jvp_attention), ("naive", nn.Linear, naive.attention)):
            net = Block(layer, attend).cuda().bfloat16()
            f = lambda net=net: torch.func.jvp(net, (x, c), (tx, tc))  # noqa: B023, E731
            row[f"{name}_ms"], row[f"{name}_extra_mb"] = median_ms(f), extra_megabytes(f)
            torch._dynamo.reset()
            compiled = torch.compile(f, fullgraph=True)
            row[f"{name}_compiled_ms"] = median_ms(compiled)
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/jvp_attention.json"))
    parser.add_argument("--only", nargs="*", choices=["attention", "cosine", "block"], default=None)
    options = parser.parse_args()
    only = options.only or ["attention", "cosine", "block"]
    torch.manual_seed(0)
    launch.FEWEST_KEYS = dict.fromkeys(launch.FEWEST_KEYS, 1)  # timed as well where Triton is the choice
    machine = limits()
    report = json.loads(options.out.read_text()) if options.only and options.out.exists() else {}
    report |= {"device": torch.cuda.get_device_name(), "commit": commit(), "limits": machine}
    report["versions"] = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    if importlib.util.find_spec("jvp_flash_attention"):
        report["versions"]["jvp-flash-attention"] = importlib.metadata.version("jvp-flash-attention")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name, run in (("attention", attention), ("cosine", cosine), ("block", block)):
        if name in only:
            key, rows = "blocks" if name == "block" else "results", run(machine)
            others = [row for row in report.get(key, []) if row["op"] != rows[0]["op"]]
            report[key] = others + [row | {"commit": commit()} for row in rows]
            # After each part, since a later one may run out of time.
            options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
