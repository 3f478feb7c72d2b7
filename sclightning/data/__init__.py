"""LightningDataModules: real images in, requests for samples out."""

from sclightning.data.cifar10 import CIFAR10DataModule
from sclightning.data.digits import DigitsDataModule
from sclightning.data.fashion_mnist import FashionMNISTDataModule
from sclightning.data.imagenet64 import ImageNet64DataModule
from sclightning.data.latents import ImageNetLatentDataModule

__all__ = [
    "CIFAR10DataModule",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageNet64DataModule",
    "ImageNetLatentDataModule",
]
