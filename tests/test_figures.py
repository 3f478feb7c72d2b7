"""The figures' scripts: a small one end to end, variants that are what they say, a page that says what was run."""

import importlib
import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import randomize

from sclightning.backbones import DDPMpp
from sclightning.data.arrays import ArrayDataset
from sclightning.modules import ConsistencyTraining
from sclightning.trigflow import denoise, interpolate

ROOT = Path(__file__).parent.parent
NET = {"resolution": 8, "in_channels": 1, "channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
NET |= {"attention_resolutions": [4], "num_classes": 10}


@pytest.fixture(autouse=True)
def script(monkeypatch):
    """Importer of the scripts, from the folder in which they are run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/figures"))
    yield importlib.import_module
    for name in ("common", "classifier", *(p.stem for p in (ROOT / "benchmarks/figures").glob("*.py"))):
        sys.modules.pop(name, None)


@pytest.fixture
def tiny(script, tmp_path, monkeypatch):
    """A scale of four training steps on eighty images of noise."""
    common, classifier = script("common"), script("classifier")
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (80, 1, 8, 8), dtype=np.uint8), np.arange(80) % 10

    class Tiny(common.SmallFashionMNIST):
        name = "tiny"

        def read(self, split):
            return ArrayDataset(images, labels)

    monkeypatch.setattr(common, "Tiny", Tiny, raising=False)
    monkeypatch.setitem(classifier.DATA, "tiny", (Tiny, 1))
    monkeypatch.setitem(common.CONFIGS, "tiny", tmp_path)
    monkeypatch.setattr(common, "PARTS", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # also where there is one
    for folder in ("RUNS", "RESULTS", "PLOTS"):
        monkeypatch.setattr(common, folder, tmp_path / folder.lower())
    (tmp_path / "backbone.yaml").write_text(yaml.safe_dump({"class_path": "DDPMpp", "init_args": NET}))
    for kind in ("teacher", "scd", "sct"):
        config = yaml.safe_load((ROOT / f"benchmarks/figures/medium/{kind}.yaml").read_text())
        config["model"]["init_args"] |= {"sigma_data": 0.58}
        config["model"]["init_args"]["lr_scheduler"]["init_args"]["total_steps"] = 4
        config["model"]["init_args"] |= {"steps": 3} if kind == "teacher" else {}
        config["data"] = {"class_path": "common.Tiny", "init_args": {"batch_size": 8, "num_test_samples": 70}}
        config["trainer"] |= {"max_steps": 4, "accelerator": "cpu"}
        (tmp_path / f"{kind}.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_fig4_end_to_end(script, tiny, monkeypatch):
    """Three teachers are trained once, the JSON holds the norms that finite differences give, the plot is drawn."""
    common, fig4 = script("common"), script("fig4")
    monkeypatch.setattr(fig4, "SAMPLES", 4)
    monkeypatch.setattr(fig4, "TIMES", [0.1, 0.8, 1.5])
    monkeypatch.setattr(sys, "argv", ["fig4.py", "--scale", "tiny"])
    common.main("fig4", fig4.__doc__, fig4.compute, fig4.plot, fig4.rows)
    result = json.loads((tiny / "results/fig4.json").read_text())["tiny"]
    assert result["label"] == "8×8 Fashion-MNIST, 0.05 M parameters, CPU"
    assert {"device", "versions", "commit"} <= result.keys()
    assert (tiny / "plots/fig4_tiny.png").stat().st_size > 5_000

    run = common.fit("teacher", "tiny", edit=fig4.edm_positional)
    model = run.cli.model
    model.load_state_dict(torch.load(run.checkpoint, weights_only=False)["state_dict"])
    model.double().eval()
    images, label = run.cli.datamodule.split("held_out").__getitems__(list(range(4)))
    x_0 = images.double() / 127.5 - 1
    z = 0.58 * torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).double()
    row, h = result["t"].index(0.8), 1e-5
    t = torch.full((4,), 0.8, dtype=torch.float64)

    @torch.no_grad()
    def f(x_t, t):
        return denoise(model(x_t / 0.58, t, label), x_t, t, 0.58)

    x_t = interpolate(x_0, z, t)
    with torch.no_grad():
        dx_t = 0.58 * model(x_t / 0.58, t, label)
    along_x = (f(x_t + h * dx_t, t) - f(x_t - h * dx_t, t)) / (2 * h)
    along_t = (f(x_t, t + h) - f(x_t, t - h)) / (2 * h)
    network = result["networks"]["EDM, positional"]
    assert network["grad_x"][row] == pytest.approx(along_x.flatten(1).norm(dim=1).mean().item(), rel=1e-4)
    assert network["d_t"][row] == pytest.approx(along_t.flatten(1).norm(dim=1).mean().item(), rel=1e-4)
    assert network["run"]["images"] == 32 and network["fd"] > 0

    (tiny / "plots/fig4_tiny.png").unlink()
    monkeypatch.setattr(common, "_train", None)  # nothing is trained again
    monkeypatch.setattr(fig4, "compute", None)
    monkeypatch.setattr(sys, "argv", ["fig4.py", "--scale", "tiny", "--plot", "--jobs", "3"])
    common.main("fig4", fig4.__doc__, fig4.compute, fig4.plot, fig4.rows)
    assert (tiny / "plots/fig4_tiny.png").is_file() and common.JOBS == 3
    monkeypatch.setattr(sys, "argv", ["fig4.py", "--scale", "tiny", "--plot", "--length", "0.5"])
    with pytest.raises(KeyError, match=r"tiny_0\.5"):  # another length has a result of its own
        common.main("fig4", fig4.__doc__, fig4.compute, fig4.plot, fig4.rows)


def test_length_is_a_fraction_of_the_configs_steps(script, tiny, monkeypatch):
    """Half of four steps, schedule and warm-up with them, in a folder of their own; an interrupted run begins again."""
    common = script("common")
    whole = common.fit("scd", "tiny", teacher_checkpoint=common.fit("teacher", "tiny").checkpoint)
    monkeypatch.setattr(common, "LENGTH", 0.5)
    half = common.student("scd", "tiny")
    assert (whole.record["steps"], half.record["steps"]) == (4, 2) and whole.folder != half.folder
    assert whole.cli.config.model.init_args.compile is False  # which is not what the config says
    saved = [(path.name, path.stat().st_mtime_ns) for path in sorted(half.folder.glob("*.ckpt"))]
    (half.folder / "record.json").unlink()  # as if it had been interrupted
    again = common.student("scd", "tiny")
    found = [(path.name, path.stat().st_mtime_ns) for path in sorted(again.folder.glob("*.ckpt"))]
    assert [name for name, _ in found] == [name for name, _ in saved]
    assert all(new > old for (_, new), (_, old) in zip(found, saved, strict=True))
    assert half.cli.config.model.init_args.lr_scheduler.init_args.total_steps == 2
    for run, steps in ((whole, 300), (half, 150)):
        (warmup,) = (c for c in run.cli.trainer.callbacks if isinstance(c, common.TangentWarmup))
        assert warmup.steps == steps


def surroundings(case: int, folder: Path, processes: int) -> tuple:
    """What a process of ``each`` is told, as soon as there are so many of them."""
    (folder / str(os.getpid())).touch()
    deadline = time.monotonic() + 100
    while len([*folder.iterdir()]) < processes:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return case, os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"], importlib.import_module("common").LENGTH


def test_each_runs_side_by_side_on_the_gpus_in_turn(script, tmp_path, monkeypatch):
    """Results in order, from processes with a GPU each and the command line's length."""
    common = script("common")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    here = common.each(surroundings, [(i, tmp_path, 1) for i in range(2)])
    assert [one[:2] for one in here] == [(i, os.getpid()) for i in range(2)]
    monkeypatch.setattr(common, "JOBS", 2)
    monkeypatch.setattr(common, "LENGTH", 0.5)
    found = common.each(surroundings, [(i, tmp_path, 3) for i in range(4)])
    assert [case for case, *_ in found] == list(range(4))
    processes = {process: told for _, process, *told in found}
    assert os.getpid() not in processes
    assert sorted(processes.values()) == [["4", 0.5], ["7", 0.5]]


def test_students_of_fig5a(script, tiny, monkeypatch):
    """Students share one teacher, each tangent has its better rate; each has a distance for both checkpoints."""
    fig5a = script("fig5a")
    assert fig5a.TANGENTS.pop("clipped") == "clip"  # two of three: it is the slowest test here
    monkeypatch.setattr(fig5a, "RATES", (2e6, 2))
    result = fig5a.compute("tiny", [0])
    assert result["tangents"].keys() == {"raw", "normalised"}
    for entry in result["tangents"].values():
        best, worst = entry["search"]
        assert {best["rate"], worst["rate"]} == {8e-4, 8e2}  # the config has 4e-4
        assert best["fd_1step"] * best["fd_2step"] < worst["fd_1step"] * worst["fd_2step"]
        (curve,) = entry["seeds"]
        assert curve["steps"] == [2, 4]
        assert all(value > 0 for nfe in (1, 2) for value in curve[f"fd_{nfe}step"])
    raw, normalised = (result["tangents"][name]["seeds"][0]["fd_1step"][-1] for name in ("raw", "normalised"))
    assert raw != normalised
    assert len([*(tiny / "runs").glob("teacher_*/record.json")]) == 1
    assert result["floor"] == pytest.approx(script("common").floor(script("common").fit("teacher", "tiny")))


def test_curves_of_fig7(script, tiny):
    """Teacher and students have three metrics at every guidance scale: those of their samples at that scale."""
    common, fig7 = script("common"), script("fig7")
    result = fig7.compute("tiny", [0])
    names = ["teacher", "VSD, 1-step", "sCD, 1-step", "sCD, 2-step", "sCD + VSD, 1-step", "sCD + VSD, 2-step"]
    assert list(result["models"]) == names and len(fig7.rows(result)) == len(names)
    assert all(len(entry[metric]) == 6 for (entry,) in result["models"].values() for metric in fig7.METRICS)
    unguided = common.measure(fig7.teacher("tiny"))[0]["fd"]
    (teacher,) = result["models"]["teacher"]
    assert teacher["fd"][0] == pytest.approx(unguided, rel=1e-4) != teacher["fd"][-1]

    run = fig7.student("sCD + VSD", "tiny", 0)
    model = run.cli.model
    model.load_state_dict(torch.load(run.checkpoint, weights_only=False)["state_dict"])
    extractor = common.ClassifierFeatures(str(common.classifier_weights("tiny"))).eval()
    real = run.cli.datamodule.split("held_out")
    model.guidance_scale = 2.0
    samples = run.cli.datamodule.to_uint8(model.sample(range(70), (1, 8, 8), torch.arange(70) % 10))
    with torch.no_grad():
        images = (extractor(torch.from_numpy(real.images)).double(), extractor(samples).double())
    covered = []
    for centres, points in (images, images[::-1]):
        radius = torch.cdist(centres, centres).topk(4, largest=False).values[:, 3]  # the nearest is itself
        covered.append((torch.cdist(points, centres) <= radius).any(1).double().mean().item())
    means, covariances = zip(*((f.mean(0), f.T.cov()) for f in images), strict=True)
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt()
    fd = (means[0] - means[1]).square().sum() + sum(c.trace() for c in covariances) - 2 * roots.sum()
    (entry,) = result["models"]["sCD + VSD, 2-step"]
    assert (entry["precision"][-1], entry["recall"][-1]) == pytest.approx(covered, abs=0.5 / 70)
    assert entry["fd"][-1] == pytest.approx(fd.item(), rel=1e-4)


def test_variants(script):
    """AdaGN is norm(x)(1+s)+b; two dropout masks change the loss exactly where there is dropout; w_φ off is 0."""
    ablations, fig5b = script("ablations"), script("fig5b")
    block = next(iter(randomize(DDPMpp(**NET)).decoder.values()))
    h, emb = torch.randn(2, 16, 4, 4), torch.randn(2, 32)
    scale, shift = block.modulation(emb)[:, :, None, None].chunk(2, dim=1)
    block.__class__ = ablations.AdaGNBlock
    torch.testing.assert_close(block.modulate(h, emb), block.norm1(h) + scale * block.norm1(h) + shift)

    x_0, z = torch.randn(2, 8, 1, 8, 8)
    t, label = torch.linspace(0.2, 1.4, 8), torch.arange(8)
    for dropout in (0.0, 0.5):
        model = ConsistencyTraining(randomize(DDPMpp(**NET, dropout=dropout)))
        torch.manual_seed(0)
        one = model.loss(x_0, z, t, label)
        torch.manual_seed(0)
        two = ablations.loss_of_two_masks(model, x_0, z, t, label)
        torch.testing.assert_close(one.tangent_norm, two.tangent_norm)
        assert torch.allclose(one.loss, two.loss) == (dropout == 0)
    assert torch.equal(fig5b.NoWeight()(t), torch.zeros(8))


def test_page_says_what_was_measured(script):
    """Every row and plot of a recorded figure is in docs/figures.md, where no scale counts as run that was not."""
    page = (ROOT / "docs/figures.md").read_text()
    recorded = {
        path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks/results/figures").glob("*.json")
    }
    for scale in script("common").CONFIGS:
        (said,) = re.findall(rf"^- `--scale {scale}`.*?(?=^- |^```)", page, flags=re.MULTILINE | re.DOTALL)
        assert ("**Not run yet.**" in said) == all(scale not in scales for scales in recorded.values())
    for name, scales in recorded.items():
        for scale, result in scales.items():
            plot = f"figures/{name}.png" if scale == "medium" else f"figures/{name}_{scale}.png"
            assert f"({plot})" in page and (ROOT / "docs" / plot).stat().st_size < 100_000
            assert result["label"] in page
            for row in script(name).rows(result):
                assert row in page


def test_sizes_of_figure_6_can_be_made(script):
    """In each scale's network every size has heads that divide its channels, and more parameters than the last."""
    configs = {"medium": "benchmarks/figures/medium/backbone.yaml", "full": "configs/backbone/fashion_mnist.yaml"}
    for scale, config in configs.items():
        backbone = yaml.safe_load((ROOT / config).read_text())["init_args"]
        with torch.device("meta"):
            networks = [DDPMpp(**backbone | size) for size in script("fig6").SIZES[scale]]
        counts = [sum(p.numel() for p in network.parameters()) for network in networks]
        assert counts == sorted(set(counts)) and len(counts) == 3
