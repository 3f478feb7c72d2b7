"""Feature extractors: torch-fidelity's Inception untouched, the classifier by hand, digests, errors."""

import hashlib

import pytest
import torch
import torch.nn.functional as nnF
from conftest import Unpickled
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from sclightning.metrics import ClassifierFeatures, DINOv2Features, InceptionFeatures, weights_digest


class UntrainedInception(FeatureExtractorInceptionV3):
    """torch-fidelity's network as it is before its weights are read."""

    def load_state_dict(self, *args, **kwargs):
        pass


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights in the file format of the real ones, which cannot be downloaded everywhere."""
    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    net = UntrainedInception("inception-v3-compat", ["2048"], str(folder / "empty.pth"))
    for p in net.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=(2 / p[0].numel()) ** 0.5)
    torch.save(net.state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


def test_inception_features_are_torch_fidelitys(inception_file):
    """The same 2048 numbers for colour images; a grey image is that image in three channels."""
    ours = InceptionFeatures(str(inception_file)).eval()
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(inception_file))
    torch.manual_seed(1)
    colour = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    features = ours(colour)
    assert features.shape == (2, 2048) and ours.num_features == 2048
    expected, logits = theirs(colour)
    assert torch.equal(features, expected)
    assert (features[0] - features[1]).norm() > 1e-3 * features[0].norm() > 0
    torch.testing.assert_close(ours.head(features), logits, rtol=1e-5, atol=1e-5 * logits.abs().max().item())
    assert logits.shape == (2, 1008) and logits.std() > 0
    grey = colour[:1, :1]
    in_grey = ours(grey)
    assert torch.equal(in_grey, theirs(grey.repeat(1, 3, 1, 1))[0])
    assert not torch.equal(in_grey, features[:1])


def test_missing_inception_weights_are_refused():
    """One sentence that names the path and the file to get."""
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth.*weights-inception-2015-12-05-6726825d\.pth") as error:
        InceptionFeatures("nowhere.pth")
    assert "\n" not in str(error.value)


def test_files_that_are_no_weights_are_refused(tmp_path, inception_file, capsys):
    """Another network's weights, a damaged file, and a pickle whose code is not run."""
    path = tmp_path / "weights.pth"
    torch.save(ClassifierFeatures().state_dict(), path)
    with pytest.raises(ValueError, match=r"weights\.pth holds another network.*6726825d") as error:
        InceptionFeatures(str(path))
    assert "\n" not in str(error.value)
    path.write_bytes(inception_file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="no file of PyTorch weights, or a damaged one"):
        InceptionFeatures(str(path))
    torch.save(Unpickled(), path)
    with pytest.raises(ValueError, match="no file of PyTorch weights"):
        InceptionFeatures(str(path))
    assert "code has run" not in capsys.readouterr().out


# --- DINOv2 -----------------------------------------------------------------------------------------------------------

HUBCONF = """
import torch


class Tokens(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_dim = 6
        self.patch_embed = torch.nn.Conv2d(3, 6, 14, stride=14)
        self.norm = torch.nn.LayerNorm(6)

    def forward(self, x):
        assert x.shape[1:] == (3, 224, 224)
        return self.norm(self.patch_embed(x).square().mean((2, 3)))


def dinov2_vits14(pretrained=True):
    assert not pretrained
    return Tokens()
"""


@pytest.fixture
def dinov2(tmp_path):
    """A repository with ``hubconf.py`` as DINOv2's is, of a small network, and random weights."""
    (tmp_path / "hubconf.py").write_text(HUBCONF)
    net = torch.hub.load(str(tmp_path), "dinov2_vits14", source="local", pretrained=False)
    weights = {name: torch.randn_like(tensor) for name, tensor in net.state_dict().items()}
    torch.save(weights, tmp_path / "weights.pth")
    net.load_state_dict(weights)
    return {"repository": str(tmp_path), "weights": str(tmp_path / "weights.pth"), "model": "dinov2_vits14"}, net


@torch.no_grad()
def test_dinov2_features_by_hand(dinov2):
    """Bicubic and antialiased to 224, ImageNet's mean and deviation; another rule, another name."""
    options, net = dinov2
    ours = DINOv2Features(**options).eval()
    images = torch.randint(0, 256, (2, 3, 400, 300), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = nnF.interpolate(images / 255, size=(224, 224), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(ours(images), net((x - mean) / std), rtol=1e-4, atol=1e-4)
    assert ours.num_features == 6 and ours.name == "dinov2_vits14"
    assert torch.equal(ours(images[:, :1]), ours(images[:, :1].repeat(1, 3, 1, 1)))


@torch.no_grad()
def test_dinov2_features_as_torch_fidelity_resizes(dinov2, monkeypatch):
    """Its own extractor, which knows no local path, given the same network."""
    options, net = dinov2
    ours, bicubic = (DINOv2Features(**options, resize=rule).eval() for rule in ("torch-fidelity", "bicubic"))
    monkeypatch.setattr(torch.hub, "load", lambda *names: net)
    theirs = FeatureExtractorDinoV2("dinov2-vit-s-14", ["dinov2"])
    images = torch.randint(0, 256, (2, 3, 100, 300), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(images), theirs(images)[0], rtol=1e-4, atol=1e-4)
    assert (ours(images) - bicubic(images)).abs().max() > 0.01
    assert ours.name == "dinov2_vits14-tf"


def test_missing_dinov2_is_refused(dinov2, tmp_path):
    """No repository, no weights, another network's weights: one sentence with the place to get them."""
    options, _ = dinov2
    with pytest.raises(FileNotFoundError, match=r"no hubconf\.py in .*nowhere.*facebookresearch/dinov2"):
        DINOv2Features(**options | {"repository": str(tmp_path / "nowhere")})
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth.*dinov2_vits14_pretrain\.pth"):
        DINOv2Features(**options | {"weights": str(tmp_path / "nowhere.pth")})
    torch.save({"other": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="holds another network than dinov2_vits14") as error:
        DINOv2Features(**options)
    assert "\n" not in str(error.value)


def test_classifier_features_by_hand(classifier_file):
    """Three convolutions with SiLU, the last two of stride 2, pooled; logits are linear in the features."""
    net = ClassifierFeatures(str(classifier_file), num_features=16)
    w = torch.load(classifier_file, weights_only=True)
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = images / 127.5 - 1
    for i, stride in enumerate((1, 2, 2)):
        x = nnF.silu(nnF.conv2d(x, w[f"conv{i}.weight"], w[f"conv{i}.bias"], stride=stride, padding=1))
    assert x.shape == (3, 16, 2, 2)
    torch.testing.assert_close(net(images), x.mean((2, 3)))
    torch.testing.assert_close(net.logits(images), x.mean((2, 3)) @ w["head.weight"].T + w["head.bias"])


def test_missing_classifier_weights_are_refused():
    """One sentence that names the path and what trains them."""
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt.*classifier\.py") as error:
        ClassifierFeatures("nowhere.pt")
    assert "\n" not in str(error.value)


def test_weights_digest_covers_names_and_values(classifier_file):
    """Equal weights, equal digest; another value or another name, another digest."""
    net, same = (ClassifierFeatures(str(classifier_file), num_features=16) for _ in range(2))
    assert weights_digest(net) == weights_digest(same)
    with torch.no_grad():
        same.head.bias[0] += 1e-3
    assert weights_digest(net) != weights_digest(same)
    one = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        one.weight.fill_(2.0)
    assert weights_digest(one) == hashlib.sha256(b"weight" + one.weight.detach().numpy().tobytes()).hexdigest()
    assert weights_digest(one.bfloat16()) != weights_digest(net)
