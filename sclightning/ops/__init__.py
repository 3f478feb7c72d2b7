"""Operators with their own forward-mode rule: fused attention, and linear and convolution at two products for three."""

from .cosine_attention import cosine_attention
from .dual import Conv2d, Linear, conv2d, linear
from .jvp_attention import jvp_attention

__all__ = ["Conv2d", "Linear", "conv2d", "cosine_attention", "jvp_attention", "linear"]
