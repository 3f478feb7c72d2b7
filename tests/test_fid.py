"""Evaluation in ``fit`` and ``test``: distances against torch-fidelity, settings, results, samples, refusals."""

import hashlib
import json
import math

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchvision.io import read_image

from sclightning.callbacks import FIDEvaluation
from sclightning.data import DigitsDataModule
from sclightning.data.arrays import to_uint8
from sclightning.distances import Measure
from sclightning.metrics import ClassifierFeatures, InceptionFeatures
from sclightning.modules import ConsistencyTraining, TrigFlowDiffusion

pytestmark = pytest.mark.filterwarnings("ignore")


class Shades(torch.nn.Module):
    """A network that costs nothing: every pixel by itself, its label, time and guidance."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.8))

    def forward(self, x, t, label, guidance=None):
        offset = t.cos() + label / 10 + (0 if guidance is None else guidance / 4)
        return -torch.tanh(self.gain * x + offset[:, None, None, None])


@pytest.fixture
def make_net():
    """Factory of it."""
    return lambda **options: Shades()


@pytest.fixture
def model(make_net):
    """A consistency model whose samples are grey values, not all black or white."""
    return ConsistencyTraining(make_net(), sigma_data=0.752, seed=3)


@pytest.fixture
def extractor(classifier_file):
    return ClassifierFeatures(str(classifier_file), num_features=16)


def frechet(a, b):
    """Fréchet distance of two sets of features, in float64 through symmetric eigenvalues."""
    a, b = a.double(), b.double()
    root = lambda m: (lambda e: e[1] * e[0].clamp_min(0).sqrt() @ e[1].T)(torch.linalg.eigh(m))  # noqa: E731
    A, C = torch.cov(a.T), torch.cov(b.T)
    cross = torch.linalg.eigvalsh(root(A) @ C @ root(A)).clamp_min(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + C.trace() - 2 * cross).item()


def evaluate(model, quiet, tmp_path, extractor, n=200, stage="test", data=None, **options):
    """Run a stage with the callback; the callback and the logged metrics."""
    callback = FIDEvaluation(extractor, **options)
    settings = {**quiet, "limit_val_batches": 1.0, "default_root_dir": tmp_path, "callbacks": [callback]}
    data = data or DigitsDataModule(num_test_samples=n, num_val_samples=n, sample_batch_size=64)
    return callback, getattr(L.Trainer(**settings), stage)(model, datamodule=data, verbose=False)[0]


@pytest.mark.parametrize("reference", ["train", "held_out"])
@pytest.mark.parametrize("stage", ["test", "validate"])
def test_frechet_distance_is_torch_fidelitys(model, quiet, tmp_path, classifier_file, reference, stage):
    """The same features through torch-fidelity and through a closed form give the same number."""
    extractor = ClassifierFeatures(str(classifier_file), num_features=16)
    callback, logged = evaluate(model, quiet, tmp_path, extractor, stage=stage, reference=reference)
    assert list(logged) == [callback.key] == ["fd_classifier"]
    data = DigitsDataModule()
    real = extractor(torch.from_numpy(data.split(reference).images))
    batches = torch.arange(200).split(64)
    fake = extractor(to_uint8(torch.cat([model.sample(i, (1, 8, 8), i % 10) for i in batches])))
    statistics = [fid_features_to_statistics(f.double()) for f in (fake, real)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert expected == pytest.approx(frechet(fake, real), rel=1e-8)
    assert callback.measures[0].compute()["fd_classifier"] == pytest.approx(expected, rel=1e-8)
    assert logged["fd_classifier"] == pytest.approx(expected, rel=1e-6)  # Lightning logs in float32
    assert logged["fd_classifier"] > 0.1


def test_frechet_distance_of_the_real_images_is_zero(make_net, quiet, tmp_path, classifier_file):
    """A model that returns the reference set has no distance to it, whatever the batches."""

    class Perfect(ConsistencyTraining):
        def validation_step(self, batch, batch_idx):
            images = self.trainer.datamodule.split("train").images[batch.index]
            return torch.from_numpy(images).float() / 127.5 - 1

        test_step = validation_step

    module, extractor = Perfect(make_net(), sigma_data=0.752), ClassifierFeatures(str(classifier_file), num_features=16)
    _, logged = evaluate(module, quiet, tmp_path, extractor, n=899)
    assert logged["fd_classifier"] == pytest.approx(0, abs=1e-5)


def test_frechet_distance_forgets_the_last_samples(model, quiet, tmp_path, classifier_file):
    """A second validation is not mixed with the first."""
    callback = FIDEvaluation(ClassifierFeatures(str(classifier_file), num_features=16))
    settings = {**quiet, "limit_val_batches": 1.0, "default_root_dir": tmp_path, "callbacks": [callback]}
    trainer, data = L.Trainer(**settings), DigitsDataModule(num_val_samples=50)
    first = trainer.validate(model, datamodule=data, verbose=False)
    model.seed = 8
    second = trainer.validate(model, datamodule=data, verbose=False)
    model.seed = 3
    assert first == trainer.validate(model, datamodule=data, verbose=False) != second


def test_frechet_distance_during_fit_is_logged_and_skips_the_sanity_check(make_net, quiet, tmp_path, classifier_file):
    """After each validation of a run there is a number; the metric enters neither the module nor its checkpoint."""
    module = ConsistencyTraining(make_net(), sigma_data=0.752)
    callback = FIDEvaluation(ClassifierFeatures(str(classifier_file), num_features=16))
    options = {**quiet, "num_sanity_val_steps": 1, "limit_val_batches": 1.0, "val_check_interval": 2}
    trainer = L.Trainer(
        **options, max_steps=2, check_val_every_n_epoch=None, default_root_dir=tmp_path, callbacks=[callback]
    )
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=4, num_val_samples=50))
    assert math.isfinite(trainer.callback_metrics["fd_classifier"])
    assert not any("metric" in name or "classifier" in name for name in module.state_dict())


def test_result_says_what_was_compared_with_what(model, quiet, tmp_path, classifier_file):
    """The JSON of ``test``: extractor, reference with hash and size, samples, steps, seed, checkpoint."""
    checkpoint = tmp_path / "some.ckpt"
    trainer = L.Trainer(**quiet, default_root_dir=tmp_path)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(checkpoint)
    extractor = ClassifierFeatures(str(classifier_file), num_features=16)
    trainer = L.Trainer(**quiet, default_root_dir=tmp_path, callbacks=[FIDEvaluation(extractor, reference="held_out")])
    data = DigitsDataModule(num_test_samples=30)
    (logged,) = trainer.test(model, datamodule=data, ckpt_path=checkpoint, verbose=False)
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert path.name.startswith("some_fd_classifier") and "nfe2" in path.name and "seed3" in path.name
    assert result["fd_classifier"] == pytest.approx(logged["fd_classifier"], rel=1e-6)
    held_out = data.split("held_out")
    sha = hashlib.sha256(held_out.images.tobytes() + held_out.labels.tobytes()).hexdigest()
    assert result["reference"] == {"data": "digits", "split": "held_out", "images": 898, "sha256": sha}
    assert result["extractor"]["name"] == "classifier" and len(result["extractor"]["sha256"]) == 64
    assert (result["samples"], result["nfe"], result["seed"]) == (30, 2, 3)
    assert result["guidance_scale"] is None and result["checkpoint"] == str(checkpoint)


def test_results_of_different_settings_do_not_overwrite_each_other(make_net, quiet, tmp_path, classifier_file):
    """Steps, seed, guidance and reference are part of the file's name."""
    extractor = ClassifierFeatures(str(classifier_file), num_features=16)
    settings = (
        ([1.5], 0, 1.0, "train"),
        ([1.5, 1.1], 0, 1.0, "train"),
        ([1.5], 1, 1.0, "train"),
        ([1.5], 0, 2.0, "train"),
        ([1.5], 0, 1.0, "held_out"),
    )
    for n, (times, seed, scale, reference) in enumerate(settings, start=1):
        model = ConsistencyTraining(make_net(), sigma_data=0.752, times=times, seed=seed)
        model.guidance_scale = scale
        evaluate(model, quiet, tmp_path, extractor, n=20, reference=reference)
        assert len(list(tmp_path.glob("*.json"))) == n


def test_samples_that_are_not_finite_are_refused(make_net, quiet, tmp_path, classifier_file):
    """One NaN is enough, and it is said before it becomes a number."""

    class Diverged(ConsistencyTraining):
        def sampler(self, noise, label):
            x = torch.zeros(noise.shape[1:])
            x[-1, 0, 0, 0] = torch.nan
            return x

    extractor = ClassifierFeatures(str(classifier_file), num_features=16)
    with pytest.raises(ValueError, match=r"not finite.*diverged") as error:
        evaluate(Diverged(make_net(), sigma_data=0.752), quiet, tmp_path, extractor)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*.json"))


def test_evaluation_without_real_images_is_refused(model, quiet, tmp_path, classifier_file):
    """No data module, or one that has no reference."""
    callback = FIDEvaluation(ClassifierFeatures(str(classifier_file), num_features=16))
    trainer = L.Trainer(**quiet, default_root_dir=tmp_path, callbacks=[callback])
    with pytest.raises(ValueError, match=r"no data module.*reference_dataloader") as error:
        trainer.test(model, DataLoader([1]))
    assert "\n" not in str(error.value)


def test_only_inception_is_called_fid(classifier_file):
    """Other features have another name."""
    callback = FIDEvaluation(ClassifierFeatures(str(classifier_file), num_features=16))
    assert callback.key == "fd_classifier"
    extractor = callback.measures[0].extractor
    assert not extractor.training and not any(p.requires_grad for p in extractor.parameters())
    inception = InceptionFeatures.__new__(InceptionFeatures)
    torch.nn.Module.__init__(inception)
    assert FIDEvaluation(inception).key == "fid"


# --- Settings of a test -----------------------------------------------------------------------------------------------


def read_result(folder):
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_every_setting_is_the_test_of_that_setting(make_net, quiet, tmp_path, extractor, capsys):
    """Steps, guidance scales and seeds in one command give what separate tests give; the least seed is the result."""
    net, (one, two) = make_net(), ([1.5], [1.5, 1.1])

    def make(times, scale, seed):
        module = ConsistencyTraining(net, sigma_data=0.752, times=times, seed=seed)
        module.guidance_scale = scale
        return module

    together = tmp_path / "together"
    together.mkdir()
    module = make(two, 1.0, 7)
    settings = {"seeds": [0, 1], "guidance_scales": [1.0, 1.5], "steps": [1, 2]}
    _, logged = evaluate(module, quiet, together, extractor, n=40, **settings)
    result = read_result(together)
    keys = [(run["times"], run["guidance_scale"], run["seed"]) for run in result["runs"]]
    assert keys == [(times, scale, seed) for times in (one, two) for scale in (1.0, 1.5) for seed in (0, 1)]
    assert len({run["fd_classifier"] for run in result["runs"]}) == 8
    for run in result["runs"]:
        alone = tmp_path / str(len(list(tmp_path.iterdir())))
        alone.mkdir()
        arguments = run["times"], run["guidance_scale"], run["seed"]
        evaluate(make(*arguments), quiet, alone, extractor, n=40)
        assert read_result(alone)["fd_classifier"] == run["fd_classifier"]
        assert run["samples"] == 40 and run["images_per_second"] > 0 and run["seconds"] > 0
        assert run["nfe"] == len(run["times"])

    pairs = [result["runs"][i : i + 2] for i in range(0, 8, 2)]
    least = [min(pair, key=lambda run: run["fd_classifier"]) for pair in pairs]
    assert result["least_of_seeds"] == least
    best = min(least, key=lambda run: run["fd_classifier"])
    assert {name: result[name] for name in best} == best
    assert logged == {"fd_classifier": pytest.approx(best["fd_classifier"], rel=1e-6)}
    assert (module.times, module.guidance_scale, module.seed) == (two, 1.0, 7)
    assert module.trainer.datamodule.test_passes == 1
    (path,) = together.glob("*.json")
    assert path.stem == "model_fd_classifier_train_n40_nfe1-2_t1.1_guidance1-1.5_seed0-1"


def test_one_table_is_printed(model, quiet, tmp_path, extractor, capsys):
    """A row for each number of steps, with each seed's distance and the speed."""
    evaluate(model, quiet, tmp_path, extractor, n=40, seeds=[0, 1, 2], steps=[1, 2])
    result, printed = read_result(tmp_path), capsys.readouterr().out
    for run in result["runs"]:
        assert f"{run['fd_classifier']:.4g}" in printed
    for name in ("evaluations", "images/s", "seed"):
        assert printed.count(name) >= 1
    assert printed.count("┡") == 1


def test_teacher_takes_what_applies_to_it(make_net, quiet, tmp_path, extractor):
    """No consistency times and no guidance: the seeds alone, at Heun's 63 evaluations for 32 steps."""
    module = TrigFlowDiffusion(make_net(), sigma_data=0.752, steps=32)
    settings = {"seeds": [0, 1], "guidance_scales": [1.0, 1.5], "steps": [1, 2]}
    evaluate(module, quiet, tmp_path, extractor, n=20, **settings)
    runs = read_result(tmp_path)["runs"]
    assert [(run["nfe"], run["times"], run["guidance_scale"], run["seed"]) for run in runs] == [
        (63, None, None, 0),
        (63, None, None, 1),
    ]


def test_guidance_of_a_teacher_is_swept(make_net, quiet, tmp_path, extractor):
    """Each scale is sampled with."""
    module = TrigFlowDiffusion(make_net(), sigma_data=0.752, steps=2, guidance_scale=1.0)
    evaluate(module, quiet, tmp_path, extractor, n=20, guidance_scales=[1.0, 1.5, 2.0])
    runs = read_result(tmp_path)["runs"]
    assert [run["guidance_scale"] for run in runs] == [1.0, 1.5, 2.0]
    assert len({run["fd_classifier"] for run in runs}) == 3 and module.guidance_scale == 1.0


def test_search_finds_the_intermediate_time(make_net, quiet, tmp_path, extractor):
    """A network that errs by (t - 0.9)^2 in its last step is best there; fixed noise, every distance on record."""

    class Valley(ConsistencyTraining):
        def sampler(self, noise, label):
            real = torch.from_numpy(self.trainer.datamodule.split("train").images[: noise.shape[1]])
            assert len(self.times) == len(noise) == 2 and self.times[0] == 1.5
            return real.float() / 127.5 - 1 + 0.8 * (self.times[1] - 0.9) ** 2

    module = Valley(make_net(), sigma_data=0.752, times=[1.5, 1.1])
    options = {"search": (0.4, 1.4), "search_tolerance": 0.05, "seeds": [4, 5]}
    evaluate(module, quiet, tmp_path, extractor, n=64, **options)
    result = read_result(tmp_path)
    assert abs(result["times"][1] - 0.9) <= 0.05 and len(result["runs"]) == 8  # 0.618^7 < 0.05
    assert {run["seed"] for run in result["runs"]} == {4} and module.times == [1.5, 1.1]
    assert result["search"] == {"interval": [0.4, 1.4], "tolerance": 0.05}
    order = sorted(result["runs"], key=lambda run: abs(run["times"][1] - 0.9))
    assert order[0]["times"] == result["times"]


def test_other_features_see_the_same_samples(model, quiet, tmp_path, extractor, classifier_file):
    """One pass, two extractors, each with distances and record of its own."""

    class Wide(ClassifierFeatures):
        name = "wide"

    torch.manual_seed(0)
    wide = Wide(num_features=24)
    extras = ["inception_score", "precision_recall"]
    others = [Measure(wide, reference="held_out", extras=["precision_recall"])]
    _, logged = evaluate(model, quiet, tmp_path, extractor, n=100, extras=extras, others=others)
    result = read_result(tmp_path)
    for name in ("inception_score", "inception_score_std", "precision", "recall"):
        assert f"{name}_classifier" in result
    assert {"fd_wide", "precision_wide", "recall_wide"} < logged.keys() and len(logged) == 8
    assert result["others"]["fd_wide"]["reference"]["split"] == "held_out"
    assert result["others"]["fd_wide"]["extractor"]["name"] == "wide"
    alone = tmp_path / "alone"
    alone.mkdir()
    evaluate(model, quiet, alone, wide, n=100, reference="held_out")
    assert read_result(alone)["fd_wide"] == result["fd_wide"]
    with pytest.raises(ValueError, match="fd_wide, fd_wide"):
        FIDEvaluation(wide, others=others)


class TinyInception(InceptionFeatures):
    """Inception in name and rank, a few pixels in fact."""

    num_features = 16

    def __init__(self):
        torch.nn.Module.__init__(self)

    def forward(self, images):
        return images[:, 0, 2:6, 2:6].flatten(1).float() / 255

    def head(self, features):
        return 5 * features


def test_names_in_inceptions_features(model, quiet, tmp_path):
    """The names that papers have, for Inception alone; no key of the record takes the place of a distance."""
    extras = ["kid", "inception_score", "precision_recall"]
    data = DigitsDataModule(num_test_samples=1000, sample_batch_size=500)
    data.split("train").images = np.concatenate([data.split(s).images for s in ("train", "held_out")])
    data.split("train").labels = np.concatenate([data.split(s).labels for s in ("train", "held_out")])
    _, logged = evaluate(model, quiet, tmp_path, TinyInception(), data=data, extras=extras)
    names = {"fid", "kid", "kid_std", "inception_score", "inception_score_std", "precision", "recall"}
    result = read_result(tmp_path)
    assert logged.keys() == names
    for name in names:
        assert result[name] == result["runs"][0][name] == pytest.approx(logged[name], rel=1e-6)
    assert 0 <= result["precision"] <= 1 and result["inception_score"] > 1 and result["fid"] > 0.1


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_samples_are_kept_on_request(model, quiet, tmp_path, extractor, kind):
    """Every sample of every setting, the model's, under its index."""
    evaluate(model, quiet, tmp_path, extractor, n=70, seeds=[0, 1], save=kind)
    for seed in (0, 1):
        path = tmp_path / f"model_fd_classifier_train_n70_nfe2_t1.1_seed{seed}"
        if kind == "npz":
            with np.load(f"{path}.npz") as file:
                saved = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
            assert [p for p in tmp_path.iterdir() if p.suffix == ".npy"] == []
        else:
            names = [f"{i:06d}.png" for i in range(70)]
            assert sorted(p.name for p in path.iterdir()) == names
            saved = torch.stack([read_image(str(path / name)) for name in names])
        samples = [model.sample(i, (1, 8, 8), i % 10, seed=seed) for i in torch.arange(70).split(64)]
        assert torch.equal(saved, to_uint8(torch.cat(samples))) and saved.float().std() > 5


def test_speed_is_that_of_sampling(make_net, quiet, tmp_path, extractor):
    """Images per second of a sampler that takes a known time; features and the first batch do not count."""
    import time

    class Slow(ConsistencyTraining):
        batches = 0

        def sampler(self, noise, label):
            self.batches += 1
            time.sleep(0.5 if self.batches == 1 else 0.1)
            return noise[0]

    evaluate(Slow(make_net(), sigma_data=0.752), quiet, tmp_path, extractor, n=64 * 3)
    pace = read_result(tmp_path)["images_per_second"]
    assert 0.5 * 640 < pace <= 640


def test_result_names_versions_and_hashes(model, quiet, tmp_path, extractor):
    """Enough to know the number again."""
    evaluate(model, quiet, tmp_path, extractor, n=20)
    result = read_result(tmp_path)
    assert result["versions"]["torch"] == torch.__version__
    assert {"sclightning", "lightning", "torchmetrics", "torch-fidelity"} < result["versions"].keys()
    assert result["devices"] == 1 and result["trainer_precision"] == "32-true"
    assert len(result["extractor"]["sha256"]) == len(result["reference"]["sha256"]) == 64


# --- Refused before any sample is made --------------------------------------------------------------------------------


class Never(ConsistencyTraining):
    """A model that must not be sampled from."""

    def sampler(self, noise, label):
        pytest.fail("A sample was made.")


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_too_few_samples_are_refused(make_net, quiet, tmp_path, extractor, stage):
    """Before the first of them is made."""
    with pytest.raises(ValueError, match="16 samples are too few"):
        evaluate(Never(make_net(), sigma_data=0.752), quiet, tmp_path, extractor, n=16, stage=stage)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": [1, 3]}, "1, 3 steps are asked for, but the model has 2"),
        ({"steps": [0]}, "0 steps are asked for"),
        ({"search": (0.5, 1.0), "save": "png"}, "no save"),
        ({"search": (0.5, 1.0), "search_tolerance": 0.0}, "tolerance above 0"),
        ({"search": (0.5, 1.6)}, r"within 0 and 1\.5645"),
        ({"search": (0.9, 0.8)}, "interval"),
        ({"reference": "missing.npz"}, r"no reference at missing\.npz"),
        ({"extras": ["kid"]}, "100 samples are too few.*KID"),
    ],
)
def test_impossible_settings_are_refused(make_net, quiet, tmp_path, extractor, options, match):
    """One sentence each."""
    with pytest.raises((ValueError, FileNotFoundError), match=match) as error:
        evaluate(Never(make_net(), sigma_data=0.752), quiet, tmp_path, extractor, n=100, **options)
    assert "\n" not in str(error.value)


def test_search_without_intermediate_time_is_refused(make_net, quiet, tmp_path, extractor):
    """A diffusion model has none."""
    with pytest.raises(ValueError, match="TrigFlowDiffusion has no intermediate time"):
        evaluate(TrigFlowDiffusion(make_net(), sigma_data=0.752), quiet, tmp_path, extractor, search=(0.5, 1.0))


def test_latents_without_decoder_are_refused(make_net, quiet, tmp_path, extractor):
    """What the data module says when it cannot make images."""

    class Latents(DigitsDataModule):
        def to_uint8(self, x):
            raise NotImplementedError("Latents are no images.")

    with pytest.raises(NotImplementedError, match="Latents are no images"):
        evaluate(Never(make_net(), sigma_data=0.752), quiet, tmp_path, extractor, data=Latents(num_test_samples=50))


def test_two_evaluations_in_one_test_are_refused(make_net, quiet, tmp_path, extractor):
    """Each would give the model its own settings, and both measure those of the second."""
    callbacks = [FIDEvaluation(extractor), FIDEvaluation(extractor, seeds=[0, 1])]
    trainer = L.Trainer(**quiet, default_root_dir=tmp_path, callbacks=callbacks)
    with pytest.raises(ValueError, match="two FIDEvaluations would set the model's times and seeds twice"):
        trainer.test(Never(make_net(), sigma_data=0.752), datamodule=DigitsDataModule(num_test_samples=20))


def test_training_without_validation_needs_no_reference(make_net, quiet, tmp_path, extractor):
    """A run that does not validate reads no statistics."""
    module = ConsistencyTraining(make_net(), sigma_data=0.752)
    callback = FIDEvaluation(extractor, reference="missing.npz")
    trainer = L.Trainer(**quiet, max_steps=1, default_root_dir=tmp_path, callbacks=[callback])
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=4))
    assert trainer.global_step == 1
