"""Launching the Triton kernels: strides, tensor descriptors, and PyTorch's own backward of the primal."""

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import reference
from .configs import Config, attention_config, cosine_config, small_config
from .cosine_kernel import cosine_jvp_kernel, cosine_jvp_small_kernel
from .kernels import attention_jvp_kernel, attention_jvp_small_kernel

SPLIT_AT = 128  # wider values are split over programs: two accumulators of 64 x 256 do not fit the registers


def _shift(dtype: torch.dtype) -> float:
    """fp16 has no exponents to spare: weights scaled by 2^6 keep small tangents out of its subnormal numbers."""
    return 6.0 if dtype == torch.float16 else 0.0


def _columns(D: int) -> tuple[int, int, int, int]:
    """Two powers of two that cover D columns, and for each where D ends in it (0 where it is full)."""
    first = max(16, 1 << (D.bit_length() - 1))
    if first >= D:
        return first, 0, (D if first > D else 0), 0
    second = max(16, triton.next_power_of_2(D - first))
    return first, second, 0, (D if first + second > D else 0)


def _is_aligned(x: Tensor) -> bool:
    """Whether D is a multiple of 8 of unit stride, the other strides positive multiples of 8, the data at 16 bytes."""
    return (
        x.shape[-1] % 8 == 0
        and x.stride(-1) == 1
        and all(s > 0 and s % 8 == 0 for s in x.stride()[:-1])
        and x.data_ptr() % 16 == 0
    )


def _aligned(x: Tensor) -> Tensor:
    """``x`` or, if it is not aligned, a contiguous copy with D padded by zeros to a multiple of 8."""
    if _is_aligned(x):
        return x
    return F.pad(x, (0, -x.shape[-1] % 8)).clone(memory_format=torch.contiguous_format)


def attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, its tangent and the log-sum-exp: :func:`sclightning.ops.reference.attention_jvp` as one kernel."""
    o, to = reference.output_like(q, v), reference.output_like(q, v)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if o.numel() == 0 or k.shape[2] == 0:
        return o.zero_(), to.zero_(), lse.fill_(-torch.inf)
    if scale < 0:  # the kernels take the largest score from the largest product
        q, tq, scale = -q, None if tq is None else -tq, -scale
    inputs = [None if x is None else _aligned(x) for x in (q, k, v, tq, tk, tv)]
    outputs = [o, to]
    if not _is_aligned(o):
        outputs = [q.new_empty(*q.shape[:3], inputs[2].shape[-1]) for _ in range(2)]
    capability, D, E = torch.cuda.get_device_capability(q.device), q.shape[-1], v.shape[-1]
    small = small_config(capability, D, max(q.shape[2], k.shape[2]))
    if small and D == E and all(x is not None for x in inputs):
        launch_small(*inputs, *outputs, lse, scale, small, programs(q, small))
    else:
        config = attention_config(capability, max(D, E), k.shape[2])
        launch_attention(*inputs, *outputs, lse, scale, config)
    if outputs[0] is not o:
        o.copy_(outputs[0][..., :E])
        to.copy_(outputs[1][..., :E])
    return o, to, lse


def launch_attention(q, k, v, tq, tk, tv, o, to, lse, scale: float, config: Config) -> None:
    """Launch ``attention_jvp_kernel`` on aligned tensors of shape (B, H, N, D); tangents may be None."""
    has = {"HAS_TQ": tq is not None, "HAS_TK": tk is not None, "HAS_TV": tv is not None}
    B, H, NQ, D = q.shape
    NK, E = k.shape[2], v.shape[3]
    D0, D1, D_END0, D_END1 = _columns(D)
    E0, E1, E_END0, E_END1 = _columns(E)
    split = 1
    if E > SPLIT_AT:
        E0, E1, E_END0, E_END1 = SPLIT_AT, 0, (E if E % SPLIT_AT else 0), 0
        split = -(-E // SPLIT_AT)
    tq, tk, tv = (x if t is None else t for x, t in ((q, tq), (k, tk), (v, tv)))
    first = rest = [k, v, tk, tv]
    if config.tma:
        first = _descriptors(first, config.BN, [D0, E0] * 2)
        rest = _descriptors(rest, config.BN, [D1 or D0, E1 or E0] * 2) if D1 or E1 else first
    strides = [s // 8 for x in (q, k, v, tq, tk, tv, o) for s in x.stride()[:3]]
    with torch.cuda.device_of(q):
        attention_jvp_kernel[(split * -(-NQ // config.BM) * B * H,)](
            q, tq, *first, *rest, o, to, lse, scale, *strides, H, NQ, NK,
            D0=D0, D1=D1, D_END0=D_END0, D_END1=D_END1, E0=E0, E1=E1, E_END0=E_END0, E_END1=E_END1, SPLIT=split,
            **has, SHIFT=_shift(q.dtype), RAGGED=NK % config.BN != 0, TMA=config.tma,
            BM=config.BM, BN=config.BN, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip


def launch_small(q, k, v, tq, tk, tv, o, to, lse, scale: float, config: Config, programs: int) -> None:
    """Launch ``attention_jvp_small_kernel``, which needs all tangents, on at most ``programs`` programs."""
    B, H, NQ, D = q.shape
    queries, keys = (
        _descriptors(x, rows, [D] * len(x)) for x, rows in (([q, tq], config.BM), ([k, v, tk, tv], config.BN))
    )
    with torch.cuda.device_of(q):
        attention_jvp_small_kernel[(min(B * H, programs),)](
            queries[0], *keys[:2], queries[1], *keys[2:], o, to, lse, scale, *(s // 8 for s in o.stride()[:3]),
            H, NQ, k.shape[2], B * H,
            D=D, SHIFT=_shift(q.dtype), BM=config.BM, BN=config.BN, STAGES=config.stages, num_warps=config.warps,
        )  # fmt: skip


def _descriptors(inputs: list[Tensor], rows: int, columns: list[int]) -> list[TensorDescriptor]:
    return [TensorDescriptor.from_tensor(x, [1, 1, rows, c]) for x, c in zip(inputs, columns, strict=True)]


def programs(x: Tensor, config: Config) -> int:
    """Programs of a kernel that runs over heads: as many as are resident on the device at once."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count * config.resident


def cosine_jvp(qkv: Tensor, tqkv: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """Cosine attention of (B, H, D, 3, N), its tangent and log-sum-exp; None for shapes the kernels do not take."""
    B, H, D, _, N = qkv.shape
    if D not in (16, 32, 64, 128) or N % 8 or qkv.numel() == 0 or scale < 0:
        return None
    o, to = (torch.empty(B, H, D, N, dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    lse = torch.empty(B, H, N, dtype=torch.float32, device=qkv.device)
    config = cosine_config(torch.cuda.get_device_capability(qkv.device), D, N)
    launch_cosine(qkv.contiguous(), tqkv.contiguous(), o, to, lse, scale, eps, config, programs(qkv, config))
    return o, to, lse


def launch_cosine(qkv, tqkv, o, to, lse, scale: float, eps: float, config: Config, programs: int) -> None:
    """Launch a cosine kernel on contiguous tensors, on at most ``programs`` programs: the small one if N <= BN."""
    B, H, D, _, N = qkv.shape
    BM, BN, warps, stages = config[:4]
    programs = min(B * H, programs)
    arguments = (scale, D**-0.5, eps, B * H, N // 8)
    with torch.cuda.device_of(qkv):
        if N <= BN:
            cosine_jvp_small_kernel[(programs,)](
                qkv, tqkv, o, to, lse, *arguments, D=D, SHIFT=_shift(qkv.dtype), BN=BN, num_warps=warps,
            )  # fmt: skip
        else:
            scratch = torch.empty(programs, 4, D, -(-N // BN) * BN, dtype=qkv.dtype, device=qkv.device)
            cosine_jvp_kernel[(programs,)](
                qkv, tqkv, o, to, lse, scratch, *arguments, D=D, SHIFT=_shift(qkv.dtype), RAGGED=N % BN != 0,
                BM=BM, BN=BN, STAGES=stages, num_warps=warps,
            )  # fmt: skip


def attention_vjp(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the primal from PyTorch's flash attention, or by the formula where that does not reach."""
    B, H, _, D = q.shape
    capability = torch.cuda.get_device_capability(q.device)
    flash = v.shape[-1] == D and max(B, H) < 2**16 and 0 not in (q.numel(), k.numel())
    if not flash or (D > 192 and capability[0] == 8 and capability[1] > 0):  # sm_86 and sm_89 lack the shared memory
        return reference.attention_vjp(do, q, k, v, o, lse, scale)
    do, q, k, v, o = map(_aligned, (do, q, k, v, o))
    seed = torch.empty((), dtype=torch.int64, device=q.device)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        do, q, k, v, o, lse, None, None, q.shape[2], k.shape[2], 0.0, False, seed, seed, scale=scale
    )
    return tuple(g[..., :D] for g in grads)
