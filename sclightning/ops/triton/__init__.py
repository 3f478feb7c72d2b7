"""Triton implementations on CUDA (sm_80 and newer) with the signatures of :mod:`sclightning.ops.reference`."""

from .launch import attention_jvp, attention_vjp, cosine_jvp

__all__ = ["attention_jvp", "attention_vjp", "cosine_jvp"]
