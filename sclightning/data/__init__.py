"""LightningDataModules: real images in, requests for samples out."""

from sclightning.data.digits import DigitsDataModule
from sclightning.data.fashion_mnist import FashionMNISTDataModule

__all__ = ["DigitsDataModule", "FashionMNISTDataModule"]
