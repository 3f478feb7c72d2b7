"""ImageNet at 512x512 as latents of the Stable Diffusion VAE, from memory-mapped arrays."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sclightning.data.arrays import ArrayDataset, ImageDataModule, Split
from sclightning.data.imagenet64 import map_array


class ImageNetLatentDataModule(ImageDataModule):
    """Latents (4, 64, 64) of ImageNet at 512x512, a fresh sample of the VAE's posterior at each visit (App. G).

    The encoder is ``stabilityai/sd-vae-ft-mse``. Latents are whitened per channel to a standard deviation of 0.5.

    Args:
        root: Folder of ``{train,held_out}_moments.npy``, float16 (N, 8, 64, 64): the posterior's four means, then its
            four standard deviations, and of ``{train,held_out}_labels.npy``, int64 (N,). Mapped into memory, not read.
        mean: Mean of each latent channel. The defaults, the paper's, belong to images in [-1, 1] before the encoder.
        std: Standard deviation of each latent channel.
        batch_size: Latents per step and process.
        num_val_samples: Samples to make in each validation.
        num_test_samples: Samples to make in test and prediction.
        sample_batch_size: Samples to make at once.
        seed: Seed of the order of training images and of the posterior's noise.
    """

    name = "imagenet-512-latents"
    image_shape = (4, 64, 64)
    num_classes = 1000
    sigma_data = 0.5
    """By construction."""

    def __init__(
        self,
        root: str = "data/imagenet512",
        mean: Sequence[float] = (1.56, -0.695, 0.483, 0.729),
        std: Sequence[float] = (5.27, 5.91, 4.21, 4.31),
        batch_size: int = 32,
        num_val_samples: int = 100,
        num_test_samples: int = 50_000,
        sample_batch_size: int = 250,
        seed: int = 0,
    ):
        super().__init__(batch_size, num_val_samples, num_test_samples, sample_batch_size, seed)
        self.root, self.mean, self.std = root, list(mean), list(std)

    def read(self, split: Split) -> ArrayDataset:
        """Memory maps of a split.

        Raises:
            FileNotFoundError: If an array is missing.
            ValueError: If an array is of another shape or type.
        """
        moments = map_array(Path(self.root) / f"{split}_moments.npy", np.float16, (8, 64, 64))
        labels = map_array(Path(self.root) / f"{split}_labels.npy", np.int64, ())
        return ArrayDataset(moments, labels)

    def on_after_batch_transfer(self, batch, dataloader_idx: int):
        """A sample of each posterior, whitened to a standard deviation of 0.5, on the device."""
        if not (isinstance(batch, tuple | list) and isinstance(batch[0], Tensor) and batch[0].ndim == 4):
            return batch
        moments = batch[0].float()
        # Keyed by (seed, rank, batch): ranks differ, and a resumed run draws what the unbroken one would have drawn.
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        key = np.random.SeedSequence((self.hparams.seed, self.trainer.global_rank, batches)).generate_state(
            1, np.uint64
        )
        generator = torch.Generator(moments.device).manual_seed(int(key[0] >> 1))
        mean, std = moments.chunk(2, dim=1)
        latents = mean + std * torch.randn(std.shape, generator=generator, device=std.device)
        return whiten(latents, self.mean, self.std), *batch[1:]

    def to_uint8(self, x: Tensor) -> Tensor:
        """Refused: a decoder is needed.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "Latents are no images and this data module has no VAE decoder; decode (x * std / 0.5 + mean) with "
            "stabilityai/sd-vae-ft-mse, and leave SampleGrid and FIDEvaluation out of the run."
        )


def whiten(latents: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Latents (B, C, H, W) of channel mean 0 and standard deviation 0.5, the model's ``sigma_data``."""
    mean, std = (torch.tensor(values, device=latents.device).view(-1, 1, 1) for values in (mean, std))
    return (latents - mean) * (0.5 / std)
