"""What forward-mode AD cannot pass in a network that was not written for it, by the module's name.

A consistency model differentiates its network forwards (Sec. 5.1). Fused attention has no rule for that, a rewritten
parameter is refused, an operator from ``torch.library.custom_op`` yields zeros without a word, and a compiled affine
norm fails (``docs/adapters.md``).
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from sclightning.adapters.process import time_span
from sclightning.adapters.velocity import VelocityAdapter
from sclightning.backbones.layers import SegmentEmbedding, check_conditions
from sclightning.parallelize import is_sharded

REMEDIES = {
    "scaled_dot_product": "call sclightning.adapters.enable_forward_ad(network), or attend by "
    "sclightning.ops.jvp_attention",
    "mutate a captured Tensor": "do not write to parameters or buffers in forward; rescale weights in a method "
    "normalize_weights(), which is called after each optimizer step",
    "autograd.Function": "give this autograd.Function setup_context and jvp, or write its forward in plain PyTorch "
    "(under torch.compile its jvp would be ignored, pytorch#192985)",
    "autograd Function": "give this autograd.Function setup_context and jvp, or write its forward in plain PyTorch",
}
"""What a message of PyTorch's contains -> what to do."""
OTHERWISE = "replace the operation by one with a forward-mode rule"


@torch.no_grad()
def check_forward_ad(
    network: nn.Module,
    x: Tensor,
    t: Tensor,
    label: Any = None,
    guidance: Tensor | None = None,
    *,
    every_module: bool = True,
    compiled: bool = False,
    rtol: float = 0.05,
    tangents: tuple[Tensor, Tensor] | None = None,
) -> None:
    r"""Raise if forward-mode AD fails in a network, or if it is silently wrong; name the innermost module at fault.

    The tangents of ``torch.func.jvp`` along a random direction of x and along t are compared with central differences,
    on the first two samples and in the mode (training or not) that the network is in. Half precision is too coarse for
    the comparison; there, only failures are found. A sharded network (FSDP2) is not looked at. The random state stays.

    Warns if the network's time input makes the tangent large: Fourier features, or times shown in the hundreds.

    Args:
        network: ``F = net(x, t, label=None, guidance=None)``.
        x: Noisy images of unit variance, shape (B, C, H, W).
        t: Times in radians, shape (B,).
        label: Class labels, or other conditions as a dictionary of tensors of B rows.
        guidance: Guidance scales, shape (B,).
        every_module: Compare each module by itself, from the inside out: finds what the whole network hides behind a
            gate that is still zero. Takes some forwards per level of nesting.
        compiled: The network will run inside ``torch.compile``: look for affine norms too.
        rtol: Relative difference from which on a tangent is wrong.
        tangents: Tangents of x and t; then this one direction is taken, and all samples.

    Raises:
        RuntimeError: If a module cannot be differentiated forwards, or is differentiated wrongly.
        ValueError: If the network does not take these conditions.
    """
    for message in time_warnings(network):
        warnings.warn(message, stacklevel=2)
    if compiled:
        for name, module in network.named_modules():
            if type(module).forward in (nn.GroupNorm.forward, nn.LayerNorm.forward) and module.weight is not None:
                raise RuntimeError(
                    f"Forward-mode AD under torch.compile fails in {_title(name, module)}: an affine norm "
                    "(pytorch#160508); call sclightning.adapters.enable_forward_ad(network)."
                )
    if any(map(is_sharded, network.parameters())):
        return
    if tangents is None:
        (x, t, label, guidance) = tree_map_only(Tensor, lambda v: v[:2], (x, t, label, guidance))
    conditions = {k: v for k, v in {"label": label, "guidance": guidance}.items() if v is not None}
    check_conditions(network, x, t, conditions)
    run = functools.partial(network, **conditions)
    state, inside = _random_state(x), []

    def leave(*_: Any) -> None:
        inside.pop()

    def function(leaves: list) -> list[Tensor]:
        _set_random_state(state)
        return [run(*leaves)]

    try:
        if tangents is None:
            generator = torch.Generator().manual_seed(0)
            d_x, d_t = torch.randn(x.shape, generator=generator).to(x), torch.ones_like(t)
            directions = ((d_x, torch.zeros_like(t)), (torch.zeros_like(x), d_t))
        else:
            (d_x, d_t), directions = tangents, (tangents,)
        found = None
        for tangents in directions:
            _set_random_state(state)
            with _hooks(network, lambda name, *_: inside.append(name), leave):
                try:
                    F, J = torch.func.jvp(run, (x, t), tangents)
                except (RuntimeError, NotImplementedError) as error:
                    name = inside[-1] if inside else ""
                    inside.clear()
                    function([x, t])  # what fails by itself is not forward mode's fault
                    raise RuntimeError(_failure(network, name, str(error))) from error
            found = found or _wrong(function, [*zip((x, t), tangents, strict=True)], [F], [J], rtol)
        if found or every_module:
            _set_random_state(state)
            _check_modules(network, run, (x, t), (d_x, d_t), rtol)
        if found:  # and every module by itself is right
            raise RuntimeError(_wrong_tangent(_title("", network), found))
    finally:
        _set_random_state(state)


def time_warnings(network: nn.Module) -> list[str]:
    r"""What is known to make a network's :math:`\partial F/\partial t`, and so the tangent, large (Sec. 4.1).

    Returns:
        Sentences, empty if nothing is known.
    """
    found = []
    for name, module in network.named_modules():
        if "fourier" in type(module).__name__.lower():
            found.append(
                f"In the student, {_title(name, module)} embeds the time in Fourier features, with which sCM is "
                "unstable (Sec. 4.1); start from a network with a positional embedding of t, as load_edm and "
                "load_edm2 of sclightning.backbones fill."
            )
        if isinstance(module, VelocityAdapter):
            span = time_span(module.process, module.sigma_data)
            if span > 20:
                found.append(
                    f"In the student, {_title(name, module)} shows its network times that span {span:.0f}, with which "
                    "sCM's tangent explodes; give time_scale=0.001 and fine-tune it as a TrigFlowDiffusion first (docs/"
                    "adapters.md)."
                )
    return found


def _check_modules(network: nn.Module, run: Callable, primals: tuple, tangents: tuple, rtol: float) -> None:
    """Raise at the first call of a module, innermost first, whose output tangent is not that of its input's."""
    entered, busy = [], False

    def enter(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if busy:
            return
        leaves, spec = tree_flatten((args, kwargs))
        pairs = [fwAD.unpack_dual(v) if isinstance(v, Tensor) else (v, None) for v in leaves]
        # Copies: an operation in place further on may write to them.
        copies = [[v.clone() if isinstance(v, Tensor) else v for v in pair] for pair in pairs]
        entered.append((copies, spec, _random_state(primals[0])))

    def leave(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        nonlocal busy
        if busy:
            return
        copies, spec, state = entered.pop()
        if all(step is None for _, step in copies) or isinstance(module, SegmentEmbedding):  # stairs that are meant
            return

        def function(leaves: list) -> list[Tensor]:
            _set_random_state(state)
            args, kwargs = tree_unflatten(leaves, spec)
            return _tensors(module(*args, **kwargs))

        duals = [fwAD.unpack_dual(v) for v in _tensors(output)]
        now, busy = _random_state(primals[0]), True
        found = _wrong(function, copies, [d.primal for d in duals], [d.tangent for d in duals], rtol)
        _set_random_state(now)
        busy = False
        if found is not None:
            raise RuntimeError(_wrong_tangent(_title(name, module), found))

    with _hooks(network, enter, leave), fwAD.dual_level():
        run(*map(fwAD.make_dual, primals, tangents))


def _wrong(
    function: Callable, inputs: Sequence, outputs: list[Tensor], tangents: list[Tensor | None], rtol: float
) -> float | None:
    """Relative difference of output tangents from central differences where it is too large, else None.

    ``inputs`` are pairs (value, tangent or None). The differences at two step sizes are extrapolated to zero; by how
    much they disagree is their error, to which rounding adds. A tangent of nothing but zeros is compared over a long
    way instead, on which stairs are not flat.
    """
    moving = [(v, d) for v, d in inputs if d is not None and d.any()]
    if not moving:
        return None
    h = 1e-3 * min(float((v.norm() + 1e-6) / d.norm()) for v, d in moving)

    def difference(h: float) -> list[Tensor]:
        ends = [function([v if d is None else v + sign * h * d for v, d in inputs]) for sign in (1, -1)]
        return [(up.double() - down.double()) / (2 * h) for up, down in zip(*ends, strict=True)]

    steps = difference(h), difference(h / 2)
    for i, (y, J, wide, narrow) in enumerate(zip(outputs, tangents, *steps, strict=True)):
        if not y.is_floating_point() or not wide.isfinite().all():
            continue
        rounding = 20 * torch.finfo(y.dtype).eps / h * y.double().norm()
        if J is None or not J.any():
            if difference(30 * h)[i].norm() > rounding:
                return 1.0
            continue
        expected, J = (4 * narrow - wide) / 3, J.double()
        size = max(J.norm(), expected.norm())
        error = (J - expected).norm()
        if not error <= rtol * size + 4 * (narrow - wide).norm() + rounding:
            return float(error / size)
    return None


@contextmanager
def _hooks(network: nn.Module, enter: Callable, leave: Callable) -> Iterator[None]:
    """Call ``enter`` and ``leave`` with the name of each module around its forward."""
    handles = []
    for name, module in network.named_modules():
        handles += [
            module.register_forward_pre_hook(functools.partial(enter, name), with_kwargs=True),
            module.register_forward_hook(functools.partial(leave, name), with_kwargs=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> list[Tensor]:
    return [v for v in tree_flatten(output)[0] if isinstance(v, Tensor)]


def _random_state(x: Tensor) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if x.is_cuda else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def _failure(network: nn.Module, name: str, message: str) -> str:
    first = message.split("\n")[0].split(". ")[0].rstrip(".")
    remedy = next((remedy for words, remedy in REMEDIES.items() if words in message), OTHERWISE)
    return f"Forward-mode AD fails in {_title(name, network.get_submodule(name))}: {first}; {remedy}."


def _title(name: str, module: nn.Module) -> str:
    return f"{name or 'the network itself'} ({type(module).__name__})"


def _wrong_tangent(title: str, error: float) -> str:
    size = f"{error:.0%}" if error > 0.01 else f"{error:.2%}"
    return (
        f"The forward-mode tangent of {title} is off by {size} from central differences, without an error from "
        "PyTorch; look in its forward for a torch.library.custom_op, .detach(), .item() or a cast of the time to "
        "integers, and use operations with a forward-mode rule (sclightning.ops)."
    )
