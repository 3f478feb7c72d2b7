"""Feature extractors: torch-fidelity's Inception untouched, the classifier by hand, digests, errors."""

import hashlib

import pytest
import torch
import torch.nn.functional as nnF
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from sclightning.metrics import ClassifierFeatures, InceptionFeatures, weights_digest


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
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(inception_file))
    torch.manual_seed(1)
    colour = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    features = ours(colour)
    assert features.shape == (2, 2048) and ours.num_features == 2048
    assert torch.equal(features, theirs(colour)[0])
    assert (features[0] - features[1]).norm() > 1e-3 * features[0].norm() > 0
    grey = colour[:, :1]
    assert torch.equal(ours(grey), theirs(grey.repeat(1, 3, 1, 1))[0])
    assert not torch.equal(ours(grey), features)


def test_missing_inception_weights_are_refused():
    """One sentence that names the path and the file to get."""
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth.*weights-inception-2015-12-05-6726825d\.pth") as error:
        InceptionFeatures("nowhere.pth")
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
