"""The operators of :mod:`sclightning.ops.reference` in CUDA C++ on Hopper; what its kernels do not take is Triton's.

Which shapes they take, the checks before a launch, and the trial on first use.
"""

import ctypes
import functools
import warnings

import torch
from torch import Tensor

from .. import reference, triton
from ..triton.launch import _aligned, _is_aligned, attention_vjp, cosine_jvp
from . import build

__all__ = ["attention_jvp", "attention_vjp", "cosine_jvp"]

# Head dimension: fewest keys from which these kernels are chosen over Triton's. It awaits measurement: no row was timed
# (docs/cuda.md has the command). At 64 keys half of a block would have nothing to do.
FEWEST_KEYS = {64: 65, 72: 65, 128: 65, 256: 65}
BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 1e-3}


class Arguments(ctypes.Structure):
    """SclightningAttention of csrc/interface.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("q", "k", "v", "tq", "tk", "tv", "o", "to", "lse")]
        + [("strides", ctypes.c_int64 * 3 * 7)]
        + [(name, ctypes.c_int32) for name in ("B", "H", "queries", "keys", "D", "bf16", "blocks")]
        + [("scale", ctypes.c_float)]
    )


def attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, its tangent and the log-sum-exp: :func:`sclightning.ops.reference.attention_jvp`, on Hopper."""
    inputs = (q, k, v, tq, tk, tv)
    taken = (
        None not in inputs
        and v.shape[-1] == q.shape[-1]
        and k.shape[2] >= FEWEST_KEYS.get(q.shape[-1], 2**31)
        and q.numel() > 0
        and scale > 0
    )
    library = usable(q) if taken else None
    if library is None:
        return triton.attention_jvp(*inputs, scale)
    o, to = reference.output_like(q, v), reference.output_like(q, v)
    outputs = (o, to) if _is_aligned(o) else [q.new_empty(q.shape) for _ in range(2)]
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    launch_attention(library, *map(_aligned, inputs), *outputs, lse, scale, _multiprocessors(q.device))
    if outputs[0] is not o:
        o.copy_(outputs[0])
        to.copy_(outputs[1])
    return o, to, lse


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_attention(library: ctypes.CDLL, q, k, v, tq, tk, tv, o, to, lse, scale: float, blocks: int) -> None:
    """Launch on the current stream, on a grid of at most ``blocks`` blocks; tensors (B, H, N, D), lse (B, H, N).

    Raises:
        ValueError: If a tensor is not what the kernel takes. Nothing was launched.
        RuntimeError: If CUDA refuses the launch.
    """
    B, H, queries, D = q.shape
    keys = k.shape[2]
    tensors = {"q": q, "k": k, "v": v, "tq": tq, "tk": tk, "tv": tv, "o": o, "to": to}
    if q.dtype not in BOUNDS or any(x.dtype != q.dtype for x in tensors.values()) or lse.dtype != torch.float32:
        raise ValueError(
            f"launch_attention expected bfloat16 or float16 throughout and lse in float32, but got "
            f"{[str(x.dtype) for x in (*tensors.values(), lse)]}: cast them."
        )
    if any(x.device != q.device or x.device.type != library.device for x in (*tensors.values(), lse)):
        raise ValueError(
            f"launch_attention expected one device of type {library.device}, but got "
            f"{[str(x.device) for x in (*tensors.values(), lse)]}: move them."
        )
    for name, x in tensors.items():
        expected = (B, H, keys if name in ("k", "v", "tk", "tv") else queries, D)
        if x.shape != expected or not _is_aligned(x):
            raise ValueError(
                f"launch_attention expected {name} of shape {expected} with unit stride of D, D and the other strides "
                f"multiples of 8 and data at a multiple of 16 bytes, but got {tuple(x.shape)}, strides {x.stride()}, "
                f"at {x.data_ptr() % 16} bytes: make it contiguous."
            )
    if lse.shape != (B, H, queries) or not lse.is_contiguous() or o.stride() != to.stride():
        raise ValueError(
            f"launch_attention expected lse of shape {(B, H, queries)}, contiguous, and o and to of the same strides, "
            f"but got {tuple(lse.shape)}, {lse.stride()} and {o.stride()}, {to.stride()}: allocate them so."
        )
    if not (0 < D <= 256 and q.numel() > 0 and keys > 0 and scale > 0 and blocks > 0):
        raise ValueError(
            f"launch_attention expected a head dimension of 8 to 256, no empty tensor, a positive scale and at least "
            f"one block, but got D = {D}, q {tuple(q.shape)}, {keys} keys, scale {scale}, {blocks} blocks."
        )
    arguments = Arguments(
        **{name: x.data_ptr() for name, x in tensors.items()}, lse=lse.data_ptr(),
        strides=(ctypes.c_int64 * 3 * 7)(*((ctypes.c_int64 * 3)(*x.stride()[:3]) for x in (q, k, v, tq, tk, tv, o))),
        B=B, H=H, queries=queries, keys=keys, D=D, bf16=q.dtype == torch.bfloat16, blocks=blocks, scale=scale,
    )  # fmt: skip
    stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else None
    with torch.cuda.device_of(q):
        error = library.sclightning_attention(ctypes.byref(arguments), stream)
    if error:
        raise RuntimeError(f"The CUDA attention kernel was not launched: {error.decode()}.")


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        return build.load()
    except (RuntimeError, OSError, AttributeError) as error:
        warnings.warn(f"SCLIGHTNING_CUDA=1, but {error}\nTriton's kernels take over.", stacklevel=2)
        return None


def usable(q: Tensor) -> ctypes.CDLL | None:
    """The library, if its results for queries like these are right on their device, which is tried on first use."""
    library, kind = _library(), (q.device, q.dtype, q.shape[-1])
    if library is None:
        return None
    if kind not in _agrees:
        if q.is_cuda and torch.cuda.is_current_stream_capturing():  # a graph must not hold the trial
            return None
        with torch.cuda.device_of(q):
            error = trial(library, *kind)
        _agrees[kind] = error < BOUNDS[q.dtype]
        if not _agrees[kind]:
            warnings.warn(
                f"The CUDA attention kernel for {q.dtype} and D = {q.shape[-1]} is wrong on {q.device}, by {error:.1e} "
                "against the formula: Triton's takes over. Please report it.",
                stacklevel=2,
            )
    return library if _agrees[kind] else None


_agrees: dict[tuple[torch.device, torch.dtype, int], bool] = {}


def trial(library: ctypes.CDLL, device: torch.device, dtype: torch.dtype, D: int) -> float:
    """Largest relative error of small launches against the formula in float64; infinite where it is not a number."""
    generator = torch.Generator(device).manual_seed(0)  # the user's random numbers stay as they are
    q, tq = torch.randn(2, 1, 3, 150, D, generator=generator, device=device).to(dtype)
    k, v, tk, tv = torch.randn(4, 1, 3, 200, D, generator=generator, device=device).to(dtype)
    exact = reference.attention_jvp(*(x.double() for x in (q, k, v, tq, tk, tv)), D**-0.5)
    errors = []
    for blocks in (2, 16):  # heads whose keys stay in shared memory, and heads that are streamed
        o, to = torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)
        lse = torch.full(q.shape[:3], torch.nan, device=device)
        launch_attention(library, q, k, v, tq, tk, tv, o, to, lse, D**-0.5, blocks)
        errors += [(a.double() - b).norm() / b.norm() for a, b in zip((o, to, lse), exact, strict=True)]
    return torch.stack(errors).nan_to_num(nan=torch.inf).max().item()
