"""CUDA C++ for Hopper with the signatures of :mod:`sclightning.ops.reference`; what it does not take goes to Triton."""

from ..triton import attention_vjp, cosine_jvp
from .launch import attention_jvp

__all__ = ["attention_jvp", "attention_vjp", "cosine_jvp"]
