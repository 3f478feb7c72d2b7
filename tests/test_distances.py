"""Distances against torch-fidelity's whole pipeline, references from every source, what is refused before sampling."""

import os

import numpy as np
import pytest
import torch
import torch_fidelity
from torch import nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image import FrechetInceptionDistance

from sclightning.data.arrays import ArrayDataset, ImageDataModule
from sclightning.distances import Measure
from sclightning.metrics import weights_digest

pytestmark = pytest.mark.filterwarnings("ignore")
D, CPU = 12, torch.device("cpu")


class Projection(nn.Module):
    """Features of 4x4 images in one matrix product."""

    name, num_features = "projection", D

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(D, 48, generator=generator) / 48**0.5)
        self.classes = nn.Parameter(5 * torch.randn(5, D, generator=generator))
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return torch.tanh((images.flatten(1).float() / 127.5 - 1) @ self.weight.T) + 2

    def head(self, features):
        return (features - 2) @ self.classes.T


class FidelityProjection(FeatureExtractorBase):
    """The same for torch-fidelity."""

    def __init__(self, name, features_list, **options):
        super().__init__(name, features_list)
        self.net = Projection()

    @staticmethod
    def get_provided_features_list():
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "features"

    def forward(self, images):
        features = self.net(images)
        found = {"features": features, "logits": self.net.head(features)}
        return tuple(found[name] for name in self.features_list)


torch_fidelity.register_feature_extractor("projection", FidelityProjection)


def make_images(n, seed, shift=0.0):
    noise = np.random.default_rng(seed).normal(128 + shift, 50, (n, 3, 4, 4))
    return noise.clip(0, 255).astype(np.uint8)


class Images(ImageDataModule):
    """Random images; the held-out ones are darker."""

    name, image_shape, num_classes = "images", (3, 4, 4), 0

    def __init__(self, n=1000, batch_size=128):
        super().__init__(1, 1, 1, batch_size, 0)
        self.n = n

    def read(self, split):
        images = make_images(self.n, 1) if split == "train" else make_images(self.n // 2, 2, shift=-60)
        return ArrayDataset(images, np.zeros(len(images), dtype=np.int64))


@pytest.fixture(autouse=True)
def own_torch_home(tmp_path, monkeypatch):
    """No test finds the references of another."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))


def distances(measure, images, data=None, batch_size=100):
    """Prepare, take in, compute."""
    measure.prepare(data or Images(), CPU, len(images))
    batches = torch.from_numpy(images).split(batch_size)
    for i, batch in enumerate(batches):
        measure.update(batch, i, len(batches))
    return measure.compute()


def test_distances_are_those_of_torch_fidelitys_pipeline(monkeypatch):
    """Images in, all distances out, through its own data loaders, features and formulas."""
    fake = make_images(1000, 3, shift=15)
    # The score's splits are of a random order; give torchmetrics the one that torch-fidelity draws. KID's subsets are
    # of 1,000 of the 1,000 samples, so their order does not matter.
    order = torch.from_numpy(np.random.RandomState(2020).permutation(1000))
    monkeypatch.setattr(torch, "randperm", lambda n: order)
    ours = distances(Measure(Projection(), extras=["kid", "inception_score", "precision_recall"]), fake)

    class Tensors(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = torch.from_numpy(images)

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return self.images[i]

    theirs = torch_fidelity.calculate_metrics(
        input1=Tensors(fake), input2=Tensors(Images().split("train").images), feature_extractor="projection",
        isc=True, fid=True, kid=True, prc=True, cuda=False, cache=False, verbose=False, save_cpu_ram=True,
        kid_subsets=1,
    )  # fmt: skip
    # torch-fidelity takes means of float32 features in float32.
    assert ours["fd_projection"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert ours["kid_projection"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert ours["inception_score_projection"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    # One divides by the 10 splits, the other by 9.
    assert ours["inception_score_std_projection"] == pytest.approx(theirs["inception_score_std"] * (10 / 9) ** 0.5)
    assert (ours["precision_projection"], ours["recall_projection"]) == (theirs["precision"], theirs["recall"])
    assert 0.05 < ours["precision_projection"] != ours["recall_projection"] < 0.95
    assert ours["fd_projection"] > 0.01 and ours["inception_score_projection"] > 1.01
    assert len(ours) == 7


def test_frechet_distance_is_torch_fidelitys_to_1e8():
    """The same features in float64."""
    fake = make_images(700, 3, shift=15)
    ours = distances(Measure(Projection()), fake)["fd_projection"]
    with torch.no_grad():
        features = [Projection()(torch.from_numpy(x)).double() for x in (fake, Images().split("train").images)]
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, features), verbose=False)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-8)


def test_features_are_exact_and_repeat():
    """The default of cuDNN would round to ten bits, and choose algorithms that add up in any order."""
    seen = set()

    class Looking(Projection):
        def forward(self, images):
            seen.add((torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic))
            return super().forward(images)

    distances(Measure(Looking()), make_images(100, 3))
    assert seen == {(False, True)}


def test_injected_statistics_are_accumulated_ones():
    """Mean and covariance from the cache give what torchmetrics gives when it sees the images."""
    fake = make_images(300, 3, shift=15)
    ours = distances(Measure(Projection()), fake)["fd_projection"]
    whole = FrechetInceptionDistance(Projection(), antialias=False)
    with torch.no_grad():
        whole.update(torch.from_numpy(Images().split("train").images), real=True)
        whole.update(torch.from_numpy(fake), real=False)
    whole.orig_dtype = torch.float64  # in which it gives its result
    assert ours == pytest.approx(float(whole.compute()), rel=1e-10)


def test_padding_is_dropped_and_the_random_state_left_alone():
    """A batch beyond the last is not counted; the score's splits do not touch the random state of the run."""
    fake, measure = make_images(1000, 3), Measure(Projection(), extras=["inception_score", "precision_recall"])
    expected = distances(measure, fake)
    torch.manual_seed(5)
    after = torch.rand(1)
    torch.manual_seed(5)
    measure.compute()
    assert torch.equal(after, torch.rand(1))
    measure.update(torch.from_numpy(fake[:100]), 10, 10)
    assert measure.num_samples == 1000 and measure.compute() == expected
    measure.reset()
    assert measure.num_samples == 0


# --- References -------------------------------------------------------------------------------------------------------


def cached_files():
    folder = os.path.join(os.environ["TORCH_HOME"], "sclightning")
    return sorted(os.path.join(folder, name) for name in os.listdir(folder))


def test_reference_is_made_once_and_known_by_content():
    """Other images, another extractor, another split: another file; the same: none of the images is seen again."""
    data, first = Images(), Measure(Projection())
    first.prepare(data, CPU, 100)
    assert first.extractor.calls == 8
    (path,) = cached_files()
    again = Measure(Projection())
    again.prepare(Images(), CPU, 100)
    assert again.extractor.calls == 0 and again.record == first.record
    assert np.array_equal(again._reference.sigma, first._reference.sigma)
    split = data.split("train")
    record = {"data": "images", "split": "train", "images": 1000, "sha256": split.digest()}
    assert first.record["reference"] == record
    assert first.record["extractor"] == {"name": "projection", "sha256": weights_digest(Projection())}

    with torch.no_grad():
        features = Projection()(torch.from_numpy(split.images)).double().numpy()
    with np.load(path) as file:
        assert np.allclose(file["mu"], features.mean(0), rtol=1e-12)
        assert np.allclose(file["sigma"], np.cov(features, rowvar=False), rtol=1e-9)
        assert "features" not in file

    for measure, other in (
        (Measure(Projection(1)), data),
        (Measure(Projection(), reference="held_out"), data),
        (Measure(Projection()), Images(999)),
    ):
        n = len(cached_files())
        measure.prepare(other, CPU, 100)
        assert measure.extractor.calls > 0 and len(cached_files()) == n + 1

    more = Measure(Projection(), extras=["precision_recall"])  # needs the features, which the file does not have
    more.prepare(data, CPU, 100)
    assert more.extractor.calls == 8 and torch.equal(more._reference.features, torch.from_numpy(features).float())
    last = Measure(Projection(), extras=["precision_recall"])
    last.prepare(data, CPU, 100)
    assert last.extractor.calls == 0 and torch.equal(last._reference.features, more._reference.features)


def test_kept_features_are_evenly_spaced(monkeypatch):
    """Of many real images a part is kept, from all over the set; mean and covariance are of all."""
    monkeypatch.setattr("sclightning.distances.KEPT", 300)
    measure = Measure(Projection(), extras=["precision_recall"])
    measure.prepare(Images(), CPU, 100)
    with torch.no_grad():
        features = Projection()(torch.from_numpy(Images().split("train").images))
    assert torch.equal(measure._reference.features, features[np.arange(300) * 1000 // 300])
    assert np.allclose(measure._reference.mu, features.double().mean(0), rtol=1e-12)


def write_statistics(path, images, **content):
    """A file like EDM's."""
    with torch.no_grad():
        features = Projection()(torch.from_numpy(images)).double().numpy()
    np.savez(path, mu=features.mean(0), sigma=np.cov(features, rowvar=False), **content)
    return features


def test_reference_from_a_file_of_mean_and_covariance(tmp_path):
    """EDM's format gives the distance that the images give, and is recorded by hash."""
    path = tmp_path / "images-4x4.npz"
    write_statistics(path, Images().split("train").images)
    fake, measure = make_images(300, 3, shift=15), Measure(Projection(), reference=str(path))
    ours = distances(measure, fake)["fd_projection"]
    assert ours == pytest.approx(distances(Measure(Projection()), fake)["fd_projection"], rel=1e-10)
    assert measure.record["reference"]["file"] == str(path) and len(measure.record["reference"]["sha256"]) == 64


def test_kept_reference_can_be_given_as_a_file():
    """What was made from the data once serves where the data are not."""
    fake, extras = make_images(300, 3, shift=15), ["precision_recall"]
    expected = distances(Measure(Projection(), extras=extras), fake)
    (path,) = cached_files()

    class Nowhere(Images):
        def read(self, split):
            raise FileNotFoundError("The images are not here.")

    assert distances(Measure(Projection(), reference=path, extras=extras), fake, Nowhere()) == expected


# --- Refused before any sample is made --------------------------------------------------------------------------------


def refuse(match, measure, n=1000, data=None, error=ValueError):
    with pytest.raises(error, match=match) as caught:
        measure.prepare(data or Images(), CPU, n)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_too_few_samples_or_images():
    """Of 12 features 13 samples are the least, of KID 1,000."""
    refuse(r"12 samples are too few.*takes 13.*num_test_samples", Measure(Projection()), n=12)
    Measure(Projection()).prepare(Images(), CPU, 13)
    refuse(r"999 samples are too few.*KID 1000", Measure(Projection(), extras=["kid"]), n=999)
    refuse(r"10 real images are too few", Measure(Projection()), data=Images(10))
    refuse(r"500 real images.*KID 1000", Measure(Projection(), reference="held_out", extras=["kid"]))


def test_wrong_reference_for_the_data(tmp_path):
    """Statistics of other images, though nothing in the file says so."""
    path = tmp_path / "other.npz"
    write_statistics(path, Images().split("held_out").images)
    refuse(r"other\.npz is not of images.*times as far", Measure(Projection(), reference=str(path)))
    write_statistics(path, make_images(5000, 9))  # other images of the same kind
    Measure(Projection(), reference=str(path)).prepare(Images(), CPU, 100)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"data": "cifar-10"}, "data cifar-10, not images"),
        ({"extractor": "inception"}, "extractor inception, not projection"),
        ({"extractor_sha256": "0" * 64}, "extractor_sha256 0000"),
    ],
)
def test_reference_that_says_it_is_another(tmp_path, content, match):
    """What a file says about itself is believed."""
    write_statistics(tmp_path / "r.npz", Images().split("train").images, **content)
    refuse(match, Measure(Projection(), reference=str(tmp_path / "r.npz")))


def test_reference_of_no_use(tmp_path):
    """Missing, of another width, without statistics, without features, a pickle, a typing error."""
    path = tmp_path / "r.npz"
    refuse(r"no reference at .*r\.npz.*EDM", Measure(Projection(), reference=str(path)), error=FileNotFoundError)
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
    refuse(r"statistics of 2048 features, projection has 12", Measure(Projection(), reference=str(path)))
    np.savez(path, arr_0=np.zeros((4, 4)))
    refuse(r"no mu and sigma but arr_0", Measure(Projection(), reference=str(path)))
    write_statistics(path, Images().split("train").images)
    for extra in ("kid", "precision_recall"):
        refuse(r"need the features of real images", Measure(Projection(), reference=str(path), extras=[extra]))
    for wrong in ("img512.pkl", "heldout"):
        with pytest.raises(ValueError, match=rf"no reference '{wrong}'.*held_out.*\.npz"):
            Measure(Projection(), reference=wrong)


class Latents(Images):
    """The images shrunk to a half, as float16; what training makes of them is decoded by doubling."""

    def read(self, split):
        images = super().read(split).images
        return ArrayDataset((images / 127.5 - 1).astype(np.float16) / 2, np.zeros(len(images), dtype=np.int64))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0].float(), batch[1]

    def to_uint8(self, x):
        return super().to_uint8(2 * x)


def test_latents_are_no_reference_but_are_compared_with_one(tmp_path):
    """A split that holds no images; decoded, they tell their statistics from others."""
    refuse(r"holds no images.*\.npz", Measure(Projection()), data=Latents())
    for split in ("train", "held_out"):
        write_statistics(tmp_path / f"{split}.npz", Images().split(split).images)
    Measure(Projection(), reference=str(tmp_path / "train.npz")).prepare(Latents(), CPU, 100)
    refuse("is not of images", Measure(Projection(), reference=str(tmp_path / "held_out.npz")), data=Latents())


def test_score_without_logits():
    """Not every extractor is a classifier."""

    class Headless(nn.Module):
        name, num_features = "headless", D

    with pytest.raises(ValueError, match=r"logits.*Headless"):
        Measure(Headless(), extras=["inception_score"])


@pytest.mark.parametrize("damage", [lambda data: b"text", lambda data: b"", lambda data: data[: len(data) // 2]])
def test_reference_that_is_no_npz(tmp_path, damage):
    """Another file, an empty one, half of one."""
    path = tmp_path / "r.npz"
    write_statistics(path, Images().split("train").images)
    path.write_bytes(damage(path.read_bytes()))
    refuse(r"r\.npz is no \.npz of arrays, or a damaged one", Measure(Projection(), reference=str(path)))
