"""The VAE between images and latents: diffusers' ``AutoencoderKL``."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sclightning.data.arrays import to_uint8

Convention = Literal["paper", "edm2"]


class Statistics(NamedTuple):
    """What a convention of latents consists of, measured on ImageNet 512 and ``stabilityai/sd-vae-ft-mse``."""

    low: float
    """Black before the encoder; white is 1."""
    mean: tuple[float, ...]
    """Mean of each latent channel."""
    std: tuple[float, ...]
    """Standard deviation of each latent channel."""


CONVENTIONS: dict[Convention, Statistics] = {
    "paper": Statistics(-1.0, (1.56, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31)),  # App. G
    "edm2": Statistics(0.0, (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)),
}
"""The encoder was trained on images in [-1, 1]; EDM2 shows it [0, 1], which costs its largest models FID (App. G)."""


def load_vae(path: str) -> nn.Module:
    """The ``AutoencoderKL`` of diffusers in evaluation mode, float32.

    Args:
        path: Local folder in diffusers' layout, or name on the Hugging Face hub.

    Raises:
        ImportError: If diffusers is not installed.
        FileNotFoundError: If there is no such autoencoder.
    """
    try:
        from diffusers import AutoencoderKL  # an extra, and slow to import
    except ImportError as error:
        raise ImportError("Encoding needs diffusers; run pip install 'sclightning[diffusers]'.") from error
    try:
        return AutoencoderKL.from_pretrained(path).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"There is no AutoencoderKL at {path}; give a folder with its config.json and weights, or a name on "
            "the Hugging Face hub and a connection to it."
        ) from error


@torch.inference_mode()
def encode(vae: nn.Module, images: Tensor, convention: Convention) -> Tensor:
    """Moments of the posterior: means, then standard deviations, float16 (B, 2C, h, w).

    Args:
        vae: Autoencoder.
        images: uint8 (B, 3, H, W), on its device.
        convention: Range of the images before the encoder.
    """
    low = CONVENTIONS[convention].low
    posterior = vae.encode(images.float() / 255 * (1 - low) + low).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1).half().cpu()


@torch.inference_mode()
def decode(vae: nn.Module, latents: Tensor, convention: Convention) -> Tensor:
    """Pictures of latents as they come out of the encoder, uint8 (B, 3, H, W); a few at a time, for memory.

    Args:
        vae: Autoencoder.
        latents: Shape (B, C, h, w), on its device.
        convention: Range of the images before the encoder.
    """
    low = CONVENTIONS[convention].low
    pictures = torch.cat([vae.decode(part).sample for part in latents.float().split(16)])
    return to_uint8(2 * (pictures - low) / (1 - low) - 1)


def channel_statistics(moments: np.ndarray) -> dict[str, list[float]]:
    """Mean and standard deviation of each latent channel over all posteriors, of moments (N, 2C, h, w)."""
    sums = np.zeros((3, moments.shape[1] // 2))
    for i in range(0, len(moments), 1024):
        mean, std = np.split(moments[i : i + 1024].astype(np.float64), 2, axis=1)
        sums += [array.sum((0, 2, 3)) for array in (mean, mean**2, std**2)]
    mean, mean_square, variance = sums / (len(moments) * moments.shape[2] * moments.shape[3])
    return {"mean": mean.tolist(), "std": np.sqrt(mean_square - mean**2 + variance).tolist()}
