"""What the operators share about forward-mode AD: reading dual numbers, and refusing what would be silently wrong."""

import torch
import torch.autograd.forward_ad as fwAD
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter


def _levels() -> list:
    return torch._C._functorch.get_interpreter_stack() or []


def forward_mode_depth() -> int:
    """Number of ``torch.func.jvp`` levels that are active (a plain ``dual_level`` counts as none: it cannot nest)."""
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in _levels())


def plain_rule_needed() -> bool:
    """Whether a functorch transform is active in which a fused rule cannot see or hand on dual numbers.

    Under ``torch.func.grad`` a custom_op with autograd raises; a ``vmap`` inside forward mode cannot unpack a dual.
    """
    transforms = torch._C._functorch.TransformType
    keys = [level.key() for level in _levels()]
    return bool(keys) and (keys[-1] == transforms.Vmap or transforms.Grad in keys)


def forward_mode_active() -> bool:
    """Whether tensors can carry a tangent at all: inside ``torch.func.jvp`` or a ``dual_level``."""
    return fwAD._current_level >= 0


# Dynamo enters the real functorch levels while it traces but cannot trace the lines that read them. This is what
# torch.compiler.assume_constant_result sets, without importing torch._dynamo (2 s) with the package.
forward_mode_depth._dynamo_marked_constant = True
plain_rule_needed._dynamo_marked_constant = True
# Seen by Dynamo, the level outside of a jvp would stand for the one inside, later in the same graph: a teacher's
# evaluation would break the student's.
forward_mode_active._dynamo_marked_constant = True


def in_vmap() -> bool:
    """Whether a ``torch.func.vmap`` is active (eager mode only)."""
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in _levels())


def below_forward_mode(function, *tensors: torch.Tensor) -> torch.Tensor:
    """``function`` of what the tensors hold below the active ``torch.func.jvp`` level, where reverse mode records it.

    torch.func would take an ``autograd.Function`` through a higher-order operator, at 0.5 ms a call.
    """
    if not _levels():
        return function(*tensors)
    interpreter = retrieve_current_functorch_interpreter()
    functorch = torch._C._functorch
    tensors = [functorch.get_unwrapped(x) if functorch.is_functorch_wrapped_tensor(x) else x for x in tensors]
    with interpreter.lower():
        result = function(*tensors)
    return functorch._wrap_for_grad(result, interpreter.level())


def unpack(x: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Primal and tangent of ``x`` at the innermost forward-mode level; the tangent is None where there is none."""
    if x is None or not forward_mode_active():
        return x, None
    primal, tangent = fwAD.unpack_dual(x)
    if tangent is not None and tangent.dtype != primal.dtype:
        tangent = tangent.to(primal.dtype)  # PyTorch's layer_norm in half precision has a float32 tangent
    return primal, tangent


def refuse_tangent_gradient(grad: torch.Tensor | None, op: str, alternative: str) -> None:
    """Raise if the gradient of a tangent was asked for: the fused rules have it for the primal only.

    It looks at values, since a compiled graph passes zeros where nobody asked; None, as in eager mode, costs nothing.
    """
    if grad is not None and bool((grad != 0).any()):
        raise RuntimeError(
            f"A gradient through the tangent of {op} was asked for, which its fused rule does not have: gradients "
            f"flow through the primal output only, so detach the tangent, or use {alternative} where it must be "
            "differentiated."
        )
