"""Operations of pretrained networks replaced by ones that forward-mode AD can pass."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as nnF
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from sclightning.backbones.layers import group_norm
from sclightning.ops import Conv2d, Linear, jvp_attention


def enable_forward_ad(network: nn.Module) -> nn.Module:
    """Make a network differentiable forwards, in place: same parameters, same names, same function.

    Attention processors of diffusers attend by :func:`~sclightning.ops.jvp_attention` where they called PyTorch's fused
    attention (with a mask: by the plain one); affine group and layer norms multiply and add explicitly, which
    ``torch.compile`` survives; linear layers and convolutions become :class:`~sclightning.ops.Linear` and
    :class:`~sclightning.ops.Conv2d`, whose JVP costs two products for three.

    Args:
        network: Any network; what is not known stays as it is.

    Returns:
        The network.
    """
    swaps = {nn.Linear: Linear, nn.Conv2d: Conv2d, nn.GroupNorm: ExplicitGroupNorm, nn.LayerNorm: ExplicitLayerNorm}
    for module in network.modules():
        if type(module) in swaps:
            module.__class__ = swaps[type(module)]
        processor = getattr(module, "processor", None)
        if callable(processor) and hasattr(module, "set_processor") and not hasattr(processor, "forward_ad"):
            processor.__class__ = _forward_ad_processor(type(processor))
    return network


@functools.cache
def _forward_ad_processor(cls: type) -> type:
    """The processor's class with its call inside :class:`_ForwardADAttention`.

    A subclass and not a wrapper: diffusers reads the signature of ``__call__``, and Dynamo traces it.
    """

    @functools.wraps(cls.__call__)
    def call(self, *args, **kwargs):
        with _ForwardADAttention():
            return cls.__call__(self, *args, **kwargs)

    return type(f"ForwardAD{cls.__name__}", (cls,), {"__call__": call, "forward_ad": True})


class _ForwardADAttention(TorchFunctionMode):
    """Turns calls of ``scaled_dot_product_attention`` into ones with a forward-mode rule."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None):
        kwargs = kwargs or {}
        if func is not nnF.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        given = dict(zip(names, args, strict=False)) | kwargs
        plain = not any(given.get(name) for name in ("dropout_p", "is_causal", "enable_gqa"))
        if plain and given.get("attn_mask") is None:
            return jvp_attention(given["query"], given["key"], given["value"], scale=given.get("scale"))
        with sdpa_kernel(SDPBackend.MATH):
            return func(*args, **kwargs)


class ExplicitGroupNorm(nn.GroupNorm):
    """:class:`torch.nn.GroupNorm` (same arguments, same state dict) that forward-mode AD under compile can pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, ...) over groups of channels and all positions, in float32 or wider."""
        return group_norm(x, self.num_groups, self.eps, self.weight, self.bias)


class ExplicitLayerNorm(nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` (same arguments, same state dict) that forward-mode AD under compile can pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimensions of ``x``."""
        y = nnF.layer_norm(x, self.normalized_shape, None, None, self.eps)
        if self.weight is not None:
            y = y * self.weight
        return y if self.bias is None else y + self.bias
