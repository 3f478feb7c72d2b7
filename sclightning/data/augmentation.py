r"""EDM's non-leaky augmentation (Karras et al. 2022, App. F.2): six geometric transformations and their conditioning.

Eight parameters a_0 … a_7 an image, those of each transformation zero but with its probability, make one affine map and
a vector of nine numbers that tells the network what was done. With the vector zero, as in sampling, images come out
upright.

=========== ============================================ ====================== ===========================
            transformation                               parameters             condition
=========== ============================================ ====================== ===========================
x-flip      scale(1 - 2 a_0, 1), probability 1           a_0 ~ {0, 1}           a_0
y-flip      scale(1, 1 - 2 a_1)                          a_1 ~ {0, 1}           a_1
scaling     scale(2^{0.2 a_2})                           a_2 ~ N(0, 1)          a_2
rotation    rotate(-a_3)                                 a_3 ~ U(-π, π)         cos a_3 - 1, sin a_3
anisotropy  rotate(a_4) scale(2^{0.2 a_5}, 2^{-0.2 a_5}) a_4 ~ U(-π, π)         a_5 cos a_4, a_5 sin a_4
            rotate(-a_4)                                 a_5 ~ N(0, 1)
translation by (a_6, a_7) / 8 of the width               a_6, a_7 ~ N(0, 1)     a_6, a_7
=========== ============================================ ====================== ===========================
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as nnF
from torch import Tensor

CONDITION_DIM = 9
"""Length of the vector that tells the network what was done to an image."""

_SCALE, _ANISOTROPY, _TRANSLATION = 2**0.2, 2**0.2, 1 / 8


def draw_parameters(seed: int, positions: Iterable[int], probability: float) -> Tensor:
    """Parameters a_0 … a_7 of images, a pure function of (seed, position in the stream).

    Args:
        seed: Seed of the data module.
        positions: Position of each image.
        probability: Probability of each transformation but the x-flip, whose coin is always tossed.

    Returns:
        float32 (B, 8).
    """
    rows = []
    for position in positions:
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, position)))
        flips, (scale, stretch, right, down) = rng.integers(0, 2, 2), rng.standard_normal(4)
        rotation, direction = rng.uniform(-np.pi, np.pi, 2)
        y, s, r, a, t = rng.random(5) < probability
        rows.append([flips[0], flips[1] * y, scale * s, rotation * r, direction * a, stretch * a, right * t, down * t])
    return torch.tensor(np.array(rows), dtype=torch.float32)


def send(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device, without the host waiting for what the device is at."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def condition(parameters: Tensor) -> Tensor:
    """What the network is told, (B, 9), of parameters (B, 8)."""
    a = parameters.unbind(1)
    return torch.stack(
        [a[0], a[1], a[2], a[3].cos() - 1, a[3].sin(), a[5] * a[4].cos(), a[5] * a[4].sin(), a[6], a[7]], dim=1
    )


def transform(images: Tensor, parameters: Tensor) -> Tensor:
    """Square images (B, C, H, H), on any device, under the affine maps of parameters (B, 8), on the CPU.

    Bicubic interpolation, reflection beyond the border. EDM filters with a wavelet at twice the resolution instead.
    """
    a = parameters.double().unbind(1)
    # Of the content, in the order of the table, in units of half the width.
    maps = _translate(2 * _TRANSLATION * a[6], 2 * _TRANSLATION * a[7])
    maps = maps @ _rotate(a[4]) @ _scale(_ANISOTROPY ** a[5], _ANISOTROPY ** -a[5]) @ _rotate(-a[4])
    maps = maps @ _rotate(-a[3]) @ _scale(_SCALE ** a[2], _SCALE ** a[2]) @ _scale(1 - 2 * a[0], 1 - 2 * a[1])
    # Sampling asks the other way round: where in the source does a pixel of the result come from?
    inverse = send(torch.linalg.inv(maps)[:, :2].to(images.dtype), images.device)
    grid = nnF.affine_grid(inverse, list(images.shape), align_corners=False)
    return nnF.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)


def _matrix(xx: Tensor, xy: Tensor, yx: Tensor, yy: Tensor, x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(xx), torch.ones_like(xx)
    return torch.stack([xx, xy, x, yx, yy, y, zero, zero, one], dim=1).view(-1, 3, 3)


def _scale(x: Tensor, y: Tensor) -> Tensor:
    zero = torch.zeros_like(x)
    return _matrix(x, zero, zero, y, zero, zero)


def _rotate(angle: Tensor) -> Tensor:
    zero = torch.zeros_like(angle)
    return _matrix(angle.cos(), -angle.sin(), angle.sin(), angle.cos(), zero, zero)


def _translate(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrix(one, zero, zero, one, x, y)
