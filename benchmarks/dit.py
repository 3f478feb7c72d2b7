"""A diffusion transformer of the size of DiT-XL/2 (Peebles & Xie 2212.09748) to measure training steps with."""

import torch
from torch import Tensor, nn
from torch.nn import functional as nnF

from sclightning.backbones.layers import PositionalEmbedding
from sclightning.ops import Conv2d, Linear, jvp_attention


class DiT(nn.Module):
    """Patches, blocks of attention and MLP modulated by time and label (adaLN-zero), linear layer back to patches.

    Args:
        resolution: Height and width of the images; 32 for the latents of 256x256 images.
        in_channels: Channels of the images.
        patch: Pixels of a patch's side.
        hidden: Width; XL has 1152.
        depth: Blocks.
        heads: Heads of attention.
        num_classes: Number of class labels.
    """

    def __init__(self, resolution=32, in_channels=4, patch=2, hidden=1152, depth=28, heads=16, num_classes=0):
        super().__init__()
        self.resolution, self.in_channels, self.patch, self.num_classes = resolution, in_channels, patch, num_classes
        self.patches = Conv2d(in_channels, hidden, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn((resolution // patch) ** 2, hidden))
        self.time = nn.Sequential(PositionalEmbedding(256), Linear(256, hidden), nn.SiLU(), Linear(hidden, hidden))
        self.label = nn.Parameter(0.02 * torch.randn(num_classes + 1, hidden))  # the last is "no label"
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(depth))
        self.modulation = Linear(hidden, 2 * hidden)
        self.out = Linear(hidden, patch**2 * in_channels)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Velocity of the shape of ``x`` (B, C, H, W) at times ``t`` (B,)."""
        B, C, H, W = x.shape
        emb = self.time(t) + (self.label[-1] if label is None else self.label[label])
        emb = nnF.silu(emb)
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, emb)
        shift, scale = self.modulation(emb)[:, None].chunk(2, -1)
        x = self.out(norm(x) * (1 + scale) + shift).view(B, H // self.patch, W // self.patch, self.patch, self.patch, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the embedding."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = Linear(hidden, 3 * hidden), Linear(hidden, hidden)
        self.mlp = nn.Sequential(Linear(hidden, 4 * hidden), nn.GELU(approximate="tanh"), Linear(4 * hidden, hidden))
        self.modulation = Linear(hidden, 6 * hidden)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map tokens (B, N, hidden) and the embedding (B, hidden) to tokens."""
        shift0, scale0, gate0, shift1, scale1, gate1 = self.modulation(emb)[:, None].chunk(6, -1)
        qkv = self.qkv(norm(x) * (1 + scale0) + shift0).unflatten(-1, (3, self.heads, -1))
        attended = jvp_attention(*qkv.permute(2, 0, 3, 1, 4).unbind()).transpose(1, 2).flatten(2)
        x = x + gate0 * self.proj(attended)
        return x + gate1 * self.mlp(norm(x) * (1 + scale1) + shift1)


def norm(x: Tensor) -> Tensor:
    """Layer norm without affine part: with one it fails inside a compiled jvp (pytorch#160508)."""
    return nnF.layer_norm(x, x.shape[-1:], eps=1e-6)
