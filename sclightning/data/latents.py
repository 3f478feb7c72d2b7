"""ImageNet at 512x512 as latents of the Stable Diffusion VAE, from memory-mapped arrays."""

import functools
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sclightning.data.arrays import ArrayDataset, ImageDataModule, Split
from sclightning.data.autoencoder import CONVENTIONS, Convention, decode, load_vae
from sclightning.data.storage import open_split


class ImageNetLatentDataModule(ImageDataModule):
    """Latents (4, 64, 64) of ImageNet at 512x512, a fresh sample of the VAE's posterior at each visit (App. G).

    Latents are whitened per channel to a standard deviation of 0.5. Those of any other images, or of another VAE, will
    do by their name, shape, number of classes, mean and standard deviation.

    Args:
        root: Folder that ``sclightning prepare`` wrote, its ``moments`` of float16 (N, 8, 64, 64): the posterior's four
            means, then its four standard deviations. Mapped into memory, not read.
        convention: Range of the images before the encoder and statistics of ImageNet's latents: the ``paper``'s, [-1,
            1], or ``edm2``'s, [0, 1]. Refused if the data was prepared in the other.
        mean: Mean of each latent channel; the convention's if not given.
        std: Standard deviation of each latent channel; the convention's if not given.
        vae: Decoder of samples, needed for pictures only: a local folder in diffusers' layout or a name on the Hugging
            Face hub, the paper's being ``stabilityai/sd-vae-ft-mse``. Needs ``pip install 'sclightning[diffusers]'``.
        name: Name of the data in results.
        image_shape: (C, H, W) of a latent.
        num_classes: Number of labels; 0 for unconditional data.
        batch_size: Latents per step and process.
        num_val_samples: Samples to make in each validation.
        num_test_samples: Samples to make in test and prediction.
        sample_batch_size: Samples to make at once.
        seed: Seed of the order of training images and of the posterior's noise.
    """

    sigma_data = 0.5
    """By construction."""

    def __init__(
        self,
        root: str = "data/imagenet512",
        convention: Convention = "paper",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        vae: str | None = None,
        name: str = "imagenet-512-latents",
        image_shape: tuple[int, int, int] = (4, 64, 64),
        num_classes: int = 1000,
        batch_size: int = 32,
        num_val_samples: int = 100,
        num_test_samples: int = 50_000,
        sample_batch_size: int = 250,
        seed: int = 0,
    ):
        super().__init__(batch_size, num_val_samples, num_test_samples, sample_batch_size, seed)
        self.root, self.convention, self.vae, self._decoder = root, convention, vae, None
        self.mean = list(CONVENTIONS[convention].mean if mean is None else mean)
        self.std = list(CONVENTIONS[convention].std if std is None else std)
        self.name, self.image_shape, self.num_classes = name, tuple(image_shape), num_classes
        if not len(self.mean) == len(self.std) == image_shape[0]:
            raise ValueError(
                f"There are {len(self.mean)} channel means and {len(self.std)} standard deviations for latents of "
                f"{image_shape[0]} channels; give data.init_args.mean and std one number a channel."
            )

    def read(self, split: Split) -> ArrayDataset:
        """Memory maps of a split, see :func:`~sclightning.data.storage.open_split`."""
        shape = (2 * self.image_shape[0], *self.image_shape[1:])
        return open_split(self.root, split, "moments", np.float16, shape, self.num_classes, self.convention)

    def on_after_batch_transfer(self, batch, dataloader_idx: int):
        """A sample of each posterior, whitened to a standard deviation of 0.5, on the device.

        The sample is a function of (seed, position in the stream): a resumed run draws what the unbroken one would have
        drawn, on any number of processes.
        """
        if not (isinstance(batch, tuple | list) and isinstance(batch[0], Tensor) and batch[0].ndim == 4):
            return batch
        mean, std = batch[0].float().chunk(2, dim=1)
        z = posterior_noise(mean.shape[1:], self.hparams.seed, self.positions(len(mean)), mean.device)
        x_0 = whiten(mean + std * z, self.mean, self.std)
        return (x_0, batch[1]) if self.num_classes else x_0

    def to_uint8(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of whitened latents, by the VAE's decoder.

        Raises:
            ValueError: If no VAE was given.
        """
        if self.vae is None:
            raise ValueError(
                "Samples are latents, and pictures of them need a decoder; set data.init_args.vae to "
                "stabilityai/sd-vae-ft-mse or a local copy, or leave out what looks at pictures."
            )
        if self._decoder is None:
            self._decoder = load_vae(self.vae)
        mean, std = _per_channel(tuple(self.mean), x.device), _per_channel(tuple(self.std), x.device)
        return decode(self._decoder.to(x.device), x * (std / 0.5) + mean, self.convention)

    def reference_dataloader(self, *args, **options) -> DataLoader:
        """Refused: the real images are not here.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "Stored latents are no images to compare samples with; give reference statistics of the images themselves."
        )


def posterior_noise(shape: Sequence[int], seed: int, positions: Iterable[int], device: torch.device) -> Tensor:
    """Unit noise, one of ``shape`` for each position: a pure function of (seed, position) for a kind of device."""
    generator, noise = torch.Generator(device), []
    for position in positions:
        key = np.random.SeedSequence(seed, spawn_key=(2, position)).generate_state(1, np.uint64)
        generator.manual_seed(int(key[0] >> 1))
        noise.append(torch.randn(shape, generator=generator, device=device))
    return torch.stack(noise)


def whiten(latents: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Latents (B, C, H, W) of channel mean 0 and standard deviation 0.5, the model's ``sigma_data``."""
    mean, std = _per_channel(tuple(mean), latents.device), _per_channel(tuple(std), latents.device)
    return (latents - mean) * (0.5 / std)


@functools.cache  # a copy to the device would wait for it at every step
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(-1, 1, 1)
