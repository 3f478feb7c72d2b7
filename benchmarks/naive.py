"""Attention from PyTorch's own operators, as the peers have it: what the fused passes are timed against."""

import torch
from torch import Tensor

from sclightning.ops import reference


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention on (B, H, N, D)."""
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v


def cosine_attention(qkv: Tensor) -> Tensor:
    """EDM2's attention on (B, H, D, 3, N)."""
    q, k, v = reference.pixel_norm(qkv, 2, 1e-4).unbind(3)
    weights = torch.softmax(torch.einsum("bhdn,bhdm->bhnm", q, k * q.shape[2] ** -0.5), -1)
    return torch.einsum("bhnm,bhdm->bhdn", weights, v)
