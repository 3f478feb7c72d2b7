"""Features of images, in which a Fréchet distance is taken."""

import hashlib
from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn.functional as nnF
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


class InceptionFeatures(nn.Module):
    """The 2048 pool features of the 2015 Inception graph as torch-fidelity has it: what "FID" means in papers.

    Args:
        weights: Path of ``weights-inception-2015-12-05-6726825d.pth``; torch-fidelity downloads it if not given.
    """

    name = "inception-v3-2015"
    num_features = 2048

    def __init__(self, weights: str | None = None):
        super().__init__()
        if weights is not None and not Path(weights).is_file():
            raise FileNotFoundError(
                f"There are no Inception weights at {weights}; download weights-inception-2015-12-05-6726825d.pth from "
                "torch-fidelity's releases, or leave 'weights' out where the network is reachable."
            )
        try:
            self.inception = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights)
        except URLError as error:
            raise ConnectionError(
                f"The Inception weights cannot be downloaded ({error.reason}); set the extractor's 'weights' to a "
                "local weights-inception-2015-12-05-6726825d.pth, or measure in other features."
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 2048) of uint8 images (B, 1 or 3, H, W), resized as TensorFlow 1 does."""
        return self.inception(images.expand(-1, 3, -1, -1))[0]


class ClassifierFeatures(nn.Module):
    """Features of a small convolutional classifier, for images that Inception does not suit. Never call it FID.

    Three convolutions, the last two of stride 2, pooled to ``num_features``. ``benchmarks/classifier.py`` trains it.

    Args:
        weights: Path of the trained ``state_dict``; untrained if not given.
        in_channels: Channels of the images.
        num_classes: Number of classes.
        num_features: Width of the features.
    """

    name = "classifier"

    def __init__(self, weights: str | None = None, in_channels: int = 1, num_classes: int = 10, num_features: int = 64):
        super().__init__()
        self.num_features = num_features
        self.conv0 = nn.Conv2d(in_channels, num_features // 2, 3, padding=1)
        self.conv1 = nn.Conv2d(num_features // 2, num_features, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(num_features, num_features, 3, stride=2, padding=1)
        self.head = nn.Linear(num_features, num_classes)
        if weights is not None:
            if not Path(weights).is_file():
                raise FileNotFoundError(
                    f"There are no classifier weights at {weights}; train them with benchmarks/classifier.py."
                )
            self.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, num_features) of uint8 images (B, in_channels, H, W)."""
        x = images.float() / 127.5 - 1
        for conv in (self.conv0, self.conv1, self.conv2):
            x = nnF.silu(conv(x))
        return x.mean((2, 3))

    def logits(self, images: Tensor) -> Tensor:
        """Class logits (B, num_classes) of uint8 images."""
        return self.head(self(images))


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of a module's weights, so that a result says in which features it was measured."""
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()
