"""Features of images, in which distances between sets of images are taken."""

import hashlib
import pickle
import warnings
from pathlib import Path
from typing import Literal
from urllib.error import URLError

import torch
import torch.nn.functional as nnF
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchvision.transforms.functional import normalize


class InceptionFeatures(nn.Module):
    """The 2048 pool features of the 2015 Inception graph as torch-fidelity has it: what "FID" means in papers.

    Args:
        weights: Path of ``weights-inception-2015-12-05-6726825d.pth``; torch-fidelity downloads it if not given.
    """

    name = "inception-v3-2015"
    num_features = 2048

    def __init__(self, weights: str | None = None):
        super().__init__()
        file = "weights-inception-2015-12-05-6726825d.pth"
        if weights is not None:
            _read_weights(weights, f"download {file} from torch-fidelity's releases, or leave 'weights' out online")
        try:
            self.inception = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights)
        except URLError as error:
            raise ConnectionError(
                f"The Inception weights cannot be downloaded ({error.reason}); set the extractor's 'weights' to a "
                f"local {file}, or measure in other features."
            ) from error
        except RuntimeError as error:
            raise ValueError(f"{weights} holds another network than the 2015 Inception; get {file}.") from error

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 2048) of uint8 images (B, 1 or 3, H, W), resized as TensorFlow 1 does."""
        return self.inception(images.expand(-1, 3, -1, -1))[0]

    def head(self, features: Tensor) -> Tensor:
        """Logits (B, 1008) without bias, in which the Inception score is taken (torch-fidelity's logits_unbiased)."""
        return features @ self.inception.fc.weight.to(features.dtype).T


class DINOv2Features(nn.Module):
    """Class token of DINOv2, 1024 wide for ViT-L/14: the features of FD-DINOv2 (Stein et al. 2023).

    Code and weights are read from disk; nothing is downloaded.

    Args:
        repository: Path of a clone of github.com/facebookresearch/dinov2, whose ``hubconf.py`` builds the network.
        weights: Path of ``dinov2_vitl14_pretrain.pth`` (or another size's).
        model: Name in ``hubconf.py``.
        resize: To 224x224 by ``bicubic`` antialiased, as Stein et al. and EDM2 do, or as ``torch-fidelity`` does,
            bilinear of TensorFlow 1. The numbers of the two are not comparable.
    """

    def __init__(
        self,
        repository: str,
        weights: str,
        model: str = "dinov2_vitl14",
        resize: Literal["bicubic", "torch-fidelity"] = "bicubic",
    ):
        super().__init__()
        if not (Path(repository) / "hubconf.py").is_file():
            raise FileNotFoundError(
                f"There is no hubconf.py in {repository}; set the extractor's 'repository' to a clone of "
                "github.com/facebookresearch/dinov2."
            )
        state = _read_weights(weights, f"download {model}_pretrain.pth from github.com/facebookresearch/dinov2")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*xFormers")  # an optional speed-up
            self.dino = torch.hub.load(repository, model, source="local", pretrained=False)
        try:
            self.dino.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{weights} holds another network than {model}; get {model}_pretrain.pth.") from error
        self.resize, self.num_features = resize, self.dino.embed_dim
        self.name = model if resize == "bicubic" else f"{model}-tf"

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, num_features) of uint8 images (B, 1 or 3, H, W)."""
        x = images.expand(-1, 3, -1, -1).float()
        if self.resize == "bicubic":
            x = nnF.interpolate(x, size=(224, 224), mode="bicubic", antialias=True)
        else:
            x = interpolate_bilinear_2d_like_tensorflow1x(x, size=(224, 224), align_corners=False)
        # ImageNet's mean and standard deviation, on which DINOv2 was trained.
        return self.dino(normalize(x / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


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


def _read_weights(path: str, remedy: str) -> dict[str, Tensor]:
    """State dict of a file of tensors and nothing else, which torch-fidelity itself would not insist on."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There are no weights at {path}; {remedy}.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is no file of PyTorch weights, or a damaged one; {remedy}.") from error


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of a module's weights, so that a result says in which features it was measured."""
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()
