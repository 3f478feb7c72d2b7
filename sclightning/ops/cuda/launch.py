"""The operators of :mod:`sclightning.ops.reference` in CUDA C++ on Hopper; what its kernels do not take is Triton's.

Which shapes they take, the checks before a launch, and the trial on first use.
"""

import ctypes
import functools
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import reference, triton
from ..triton.launch import _aligned, _is_aligned, attention_vjp
from . import build

__all__ = ["attention_jvp", "attention_vjp", "cosine_jvp"]

# Head dimension: fewest keys from which these kernels are chosen over Triton's: where they are faster in
# benchmarks/results/jvp_attention.json. The kernel of small heads, up to 64 keys, is faster for cosine attention only.
FEWEST_KEYS = {64: 65, 72: 65, 128: 65, 256: 65}
FEWEST_POSITIONS = {64: 1}  # of cosine attention, whose kernel has D = 64 only
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of the trial: well above the errors of a kernel that is right


class Arguments(ctypes.Structure):
    """SclightningAttention of csrc/interface.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("q", "k", "v", "tq", "tk", "tv", "o", "to", "lse")]
        + [("strides", ctypes.c_int64 * 3 * 7)]
        + [(name, ctypes.c_int32) for name in ("B", "H", "queries", "keys", "D", "bf16", "blocks")]
        + [("scale", ctypes.c_float)]
    )


class CosineArguments(ctypes.Structure):
    """SclightningCosine of csrc/interface.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("x", "tx", "o", "to", "lse")]
        + [(name, ctypes.c_int32) for name in ("B", "H", "N", "D", "bf16", "blocks")]
        + [(name, ctypes.c_float) for name in ("scale", "eps")]
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
    library = usable(trial, q.device, q.dtype, q.shape[-1]) if taken else None
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


def cosine_jvp(qkv: Tensor, tqkv: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """Cosine attention of (B, H, D, 3, N), its tangent and log-sum-exp; None for shapes that no kernel takes."""
    B, H, D, _, N = qkv.shape
    taken = FEWEST_POSITIONS.get(D, 2**31) <= N and N % 8 == 0 and qkv.numel() > 0 and scale > 0
    library = usable(cosine_trial, qkv.device, qkv.dtype, D) if taken else None
    if library is None:
        return triton.cosine_jvp(qkv, tqkv, scale, eps)
    x, tx = (a if a.data_ptr() % 16 == 0 else a.clone() for a in (qkv.contiguous(), tqkv.contiguous()))
    o, to = (torch.empty(B, H, D, N, dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    lse = torch.empty(B, H, N, dtype=torch.float32, device=qkv.device)
    launch_cosine(library, x, tx, o, to, lse, scale, eps, _multiprocessors(qkv.device))
    return o, to, lse


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_attention(library: ctypes.CDLL, q, k, v, tq, tk, tv, o, to, lse, scale: float, blocks: int) -> None:
    """Launch on the current stream, on at most ``blocks`` multiprocessors; tensors (B, H, N, D), lse (B, H, N).

    Raises:
        ValueError: If a tensor is not what the kernel takes. Nothing was launched.
        RuntimeError: If CUDA refuses the launch.
    """
    B, H, queries, D = q.shape
    keys = k.shape[2]
    tensors = {"q": q, "k": k, "v": v, "tq": tq, "tk": tk, "tv": tv, "o": o, "to": to}
    _check("launch_attention", library, tensors, lse)
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
    _call(library.sclightning_attention, arguments, q)


def launch_cosine(library: ctypes.CDLL, x, tx, o, to, lse, scale: float, eps: float, blocks: int) -> None:
    """Launch on the current stream: x and tx (B, H, D, 3, N), o and to (B, H, D, N), lse (B, H, N), contiguous.

    Raises:
        ValueError: If a tensor is not what the kernel takes. Nothing was launched.
        RuntimeError: If CUDA refuses the launch.
    """
    B, H, D, _, N = x.shape
    tensors = {"x": x, "tx": tx, "o": o, "to": to}
    _check("launch_cosine", library, tensors, lse)
    for name, y in (tensors | {"lse": lse}).items():
        expected = (B, H, N) if name == "lse" else (B, H, D, N) if name in ("o", "to") else (B, H, D, 3, N)
        if y.shape != expected or not y.is_contiguous() or y.data_ptr() % 16:
            raise ValueError(
                f"launch_cosine expected {name} of shape {expected}, contiguous, at a multiple of 16 bytes, but got "
                f"{tuple(y.shape)}, strides {y.stride()}, at {y.data_ptr() % 16} bytes: make it contiguous."
            )
    if not (0 < D <= 64 and N % 8 == 0 and x.numel() > 0 and scale > 0 and blocks > 0):
        raise ValueError(
            f"launch_cosine expected D up to 64, N a multiple of 8, no empty tensor, a positive scale and at least one "
            f"block, but got x {tuple(x.shape)}, scale {scale}, {blocks} blocks."
        )
    arguments = CosineArguments(
        **{name: y.data_ptr() for name, y in tensors.items()}, lse=lse.data_ptr(), B=B, H=H, N=N, D=D,
        bf16=x.dtype == torch.bfloat16, blocks=blocks, scale=scale, eps=eps,
    )  # fmt: skip
    _call(library.sclightning_cosine, arguments, x)


def _check(name: str, library: ctypes.CDLL, tensors: dict[str, Tensor], lse: Tensor) -> None:
    found = (*tensors.values(), lse)
    dtype, device = found[0].dtype, found[0].device
    if dtype not in BOUNDS or any(x.dtype != dtype for x in tensors.values()) or lse.dtype != torch.float32:
        raise ValueError(
            f"{name} expected bfloat16 or float16 throughout and lse in float32, but got "
            f"{[str(x.dtype) for x in found]}: cast them."
        )
    if any(x.device != device or x.device.type != library.device for x in found):
        raise ValueError(
            f"{name} expected one device of type {library.device}, but got {[str(x.device) for x in found]}: move them."
        )


def _call(function, arguments: ctypes.Structure, x: Tensor) -> None:
    """Call a function of the library on the device and the current stream of ``x``."""
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    with torch.cuda.device_of(x):
        error = function(ctypes.byref(arguments), stream)
    if error:
        raise RuntimeError(f"The CUDA attention kernel was not launched: {error.decode()}.")


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        return build.load()
    except (RuntimeError, OSError, AttributeError) as error:
        warnings.warn(
            f"The CUDA attention kernels for Hopper are not used: {error}\nTriton's kernels take over. "
            "SCLIGHTNING_CUDA=0 chooses those, without this warning.",
            stacklevel=2,
        )
        return None


def usable(trial: Callable, device: torch.device, dtype: torch.dtype, D: int) -> ctypes.CDLL | None:
    """The library, if ``trial`` of it, made on first use, finds its results for this dtype and head dimension right."""
    library, kind = _library(), (trial, device, dtype, D)
    if library is None:
        return None
    if kind not in _agrees:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # a graph must not hold the trial
            return None
        error = torch.stack([*trial(library, device, dtype, D)]).nan_to_num(nan=torch.inf).max().item()
        _agrees[kind] = error < BOUNDS[dtype]
        if not _agrees[kind]:
            warnings.warn(
                f"The CUDA attention kernel for {dtype} and D = {D} is wrong on {device}, by {error:.1e} against the "
                "formula: Triton's takes over. Please report it.",
                stacklevel=2,
            )
    return library if _agrees[kind] else None


_agrees: dict[tuple, bool] = {}
TRIAL_HEADS = 6  # more than four, which one multiprocessor has at a time if they are small
TRIAL_BLOCKS = (1, 16)  # multiprocessors: the keys of a head stay in shared memory, or are streamed
TRIAL_LENGTHS = ((150, 200), (60, 48))  # queries and keys; the second are for the kernel of small heads


def trial(library: ctypes.CDLL, device: torch.device, dtype: torch.dtype, D: int) -> Iterator[Tensor]:
    """Relative errors of small launches against the formula in float64, of the lengths that are taken."""
    generator = torch.Generator(device).manual_seed(0)  # the user's random numbers stay as they are
    for queries, keys in (lengths for lengths in TRIAL_LENGTHS if lengths[1] >= FEWEST_KEYS[D]):
        q, tq = torch.randn(2, 1, TRIAL_HEADS, queries, D, generator=generator, device=device).to(dtype)
        k, v, tk, tv = torch.randn(4, 1, TRIAL_HEADS, keys, D, generator=generator, device=device).to(dtype)
        exact = reference.attention_jvp(*(x.double() for x in (q, k, v, tq, tk, tv)), D**-0.5)
        for blocks in TRIAL_BLOCKS:
            found = [torch.full_like(x, torch.nan) for x in (q, q, q[..., 0].float())]
            launch_attention(library, q, k, v, tq, tk, tv, *found, D**-0.5, blocks)
            yield from map(_error, found, exact)


def cosine_trial(library: ctypes.CDLL, device: torch.device, dtype: torch.dtype, D: int) -> Iterator[Tensor]:
    """Likewise for cosine attention, whose vectors here have lengths from a tenth to ten."""
    generator = torch.Generator(device).manual_seed(0)
    for N in (keys for _, keys in TRIAL_LENGTHS if keys >= FEWEST_POSITIONS[D]):
        lengths = torch.logspace(-1, 1, N, device=device)
        x, tx = (torch.randn(2, 1, TRIAL_HEADS, D, 3, N, generator=generator, device=device) * lengths).to(dtype)
        y = (a.transpose(2, 4).unbind(3) for a in reference.pixel_norm_jvp(x.double(), tx.double(), 2, 1e-4))
        o, to, lse = reference.attention_jvp(*(a for triple in y for a in triple), D**-0.5)
        for blocks in TRIAL_BLOCKS:
            found = [torch.full((1, TRIAL_HEADS, D, N), torch.nan, dtype=dtype, device=device) for _ in range(2)]
            found.append(torch.full((1, TRIAL_HEADS, N), torch.nan, device=device))
            launch_cosine(library, x, tx, *found, D**-0.5, 1e-4, blocks)
            yield from map(_error, found, (o.mT, to.mT, lse))


def _error(x: Tensor, exact: Tensor) -> Tensor:
    return (x - exact).norm() / exact.norm()
