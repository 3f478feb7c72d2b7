"""The command ``export``: files that load without us knowing, and that make the samples of the run."""

import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import yaml
from torch import nn

pytest.importorskip("huggingface_hub")
pytest.importorskip("diffusers")

from conftest import TINY, PlainNet
from diffusers import DiffusionPipeline
from safetensors import safe_open

from sclightning.adapters import load_diffusers
from sclightning.checkpoint import build_backbone
from sclightning.cli import main
from sclightning.export import Generator, compare, export, model_card, without_files
from sclightning.modules import ConsistencyDistillation, ConsistencyTraining, TrigFlowDiffusion
from sclightning.pipeline import SCMPipeline
from sclightning.sampling import sample_noise

pytestmark = pytest.mark.filterwarnings("ignore")

ADAM = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}
EMA = {"class_path": "sclightning.callbacks.EMA", "init_args": {"decay": 0.5}}
EDM = {"name": "edm-imagenet", "licence": "CC BY-NC-SA 4.0", "sha256": "0" * 64, "source": "https://nvlabs"}


class Licensed(PlainNet):
    """A teacher whose weights come with terms."""

    provenance = EDM


class Odd(PlainNet):
    """A network that is another one when it is traced."""

    def forward(self, x, t):
        return super().forward(x, t) * (2 if torch.compiler.is_compiling() else 1)


class Untraceable(PlainNet):
    """A network that looks at its values."""

    def forward(self, x, t):
        return super().forward(x, t) if x.sum() > 0 else x


class Restless(PlainNet):
    """A network with a number that no file holds."""

    made = 0

    def __init__(self):
        super().__init__()
        Restless.made += 1
        self.factor = Restless.made

    def forward(self, x, t):
        return super().forward(x, t) * self.factor


class Needy(PlainNet):
    """A network that needs more than a label."""

    def forward(self, x, t, label=None):
        return super().forward(x, t) * label["text"]


load = L.LightningModule.load_from_checkpoint


@pytest.fixture(scope="module")
def student(tmp_path_factory, write_config):
    """A guided, class-conditional student with an EMA, trained and exported through the command."""
    folder = tmp_path_factory.mktemp("student")
    config = write_config(
        folder,
        "ConsistencyDistillation",
        net={"guidance": True},
        teacher={"class_path": "sclightning.backbones.DDPMpp", "init_args": TINY},
        guidance_range=[1.0, 2.0],
        guidance_scale=1.5,
        times=[1.5, 0.9],
        optimizer=ADAM,
        callbacks=[EMA],
    )
    main(["fit", "--config", str(config)])
    main(["export", "--ckpt_path", str(folder / "last.ckpt"), "--folder", str(folder / "out")])
    return SimpleNamespace(folder=folder, out=folder / "out", ckpt=folder / "last.ckpt")


def save(module, path):
    """Checkpoint of a module that Python code made."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return str(path)


def tell(path, class_path, **more):
    """Let a checkpoint say which network it holds, as those of the command line do."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["backbone"] = {"class_path": class_path}
    torch.save(checkpoint | more, path)


def test_every_file_makes_the_samples_of_the_run(student):
    """Safetensors and pipeline bit for bit, at the run's averaged weights, labels and guidance."""
    module = load(student.ckpt)
    label, noise = torch.arange(6), sample_noise(range(6), (1, 8, 8), 2)
    expected = module.sample(range(6), (1, 8, 8), label)
    assert expected.std() > 0.1
    generator = Generator.from_pretrained(student.out)
    assert torch.equal(generator.sample(noise, label), expected)
    pipeline = DiffusionPipeline.from_pretrained(
        student.out / "pipeline", custom_pipeline="pipeline", trust_remote_code=True
    )
    assert torch.equal(pipeline(noise=noise, class_labels=label.tolist(), output_type="latent").images, expected)

    one = load(student.ckpt, times=[1.5])
    program = torch.export.load(student.out / "generator.pt2").module()
    for scale, B in ((1.5, 6), (1.0, 1)):
        one.guidance_scale = scale
        samples = program(noise[0, :B], label=label[:B], guidance=torch.full((B,), scale))
        expected = one.sample(range(B), (1, 8, 8), label[:B])
        torch.testing.assert_close(samples, expected, rtol=1e-4, atol=1e-5)


def test_exported_weights_are_the_averaged_ones(student):
    """Those of the checkpoint's state_dict, not those in training."""
    checkpoint = torch.load(student.ckpt, weights_only=True)
    files = {"": student.out / "model.safetensors"}
    files["pipeline"] = student.out / "pipeline" / "network" / "diffusion_pytorch_model.safetensors"
    for kind, path in files.items():
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["provenance"]) == [] and file.metadata()["format"] == "pt"
            weight = file.get_tensor(f"{'net' if kind else 'backbone'}.out_conv.weight")
        assert torch.equal(weight, checkpoint["state_dict"]["backbone.out_conv.weight"])
        assert not torch.equal(weight, checkpoint["ema"]["weights"]["out_conv.weight"])


def test_config_is_complete(student):
    config = json.loads((student.out / "config.json").read_text())
    assert (config["sigma_data"], config["times"], config["guidance_scale"]) == (0.752, [1.5, 0.9], 1.5)
    assert config["backbone"]["class_path"] == "sclightning.backbones.DDPMpp" and config["provenance"] == []
    assert Generator.from_pretrained(student.out).config["shape"] == [1, 8, 8]
    extra = {"config.json": ""}
    torch.export.load(student.out / "generator.pt2", extra_files=extra)
    assert json.loads(extra["config.json"])["times"] == [1.5, 0.9]


def test_formats_and_guidance_scale_are_options(student, tmp_path, capsys):
    args = ["--ckpt_path", str(student.ckpt), "--folder", str(tmp_path), "--guidance_scale", "1.2"]
    main(["export", *args, '--formats=["safetensors"]'])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text())["guidance_scale"] == 1.2
    assert "differ from the model's by 0.0e+00" in capsys.readouterr().out


def test_licence_of_the_teacher_travels(make_plain_net, tmp_path, capsys):
    """Record, sentence and card: from the teacher's attribute through two checkpoints into every file."""
    module = ConsistencyDistillation(make_plain_net(), teacher=Licensed(), sigma_data=0.5)
    path = save(module, tmp_path / "student.ckpt")
    tell(path, "conftest.PlainNet")
    export(ckpt_path=path, folder=str(tmp_path / "out"), shape=(1, 8, 8))
    sentence = "These weights derive from edm-imagenet (CC BY-NC-SA 4.0) and may not be used commercially."
    assert sentence in capsys.readouterr().out
    out = tmp_path / "out"
    assert json.loads((out / "config.json").read_text())["provenance"] == [EDM]
    for folder, weights in (
        (out, "model.safetensors"),
        (out / "pipeline", "network/diffusion_pytorch_model.safetensors"),
    ):
        card = (folder / "README.md").read_text()
        assert sentence in card and EDM["sha256"] in card
        head = yaml.safe_load(card.split("---")[1])
        assert head["license"] == "other" and head["license_name"] == "CC BY-NC-SA 4.0"
        with safe_open(folder / weights, "pt") as file:
            assert json.loads(file.metadata()["provenance"]) == [EDM]
    assert json.loads((out / "pipeline" / "network" / "config.json").read_text())["provenance"] == [EDM]
    # A card of before is not left standing.
    tell(path, "conftest.PlainNet", provenance=[])
    export(ckpt_path=path, folder=str(out), formats=["safetensors"], shape=(1, 8, 8))
    assert "edm" not in (out / "README.md").read_text() and "commercially" not in capsys.readouterr().out


def test_card_without_licences_names_none():
    config = {"provenance": [EDM | {"licence": None}], "times": [1.5], "shape": [3, 32, 32]}
    card = model_card(config)
    assert (
        "license" not in yaml.safe_load(card.split("---")[1])
        and "not recorded" in card
        and "1 network evaluation." in card
    )
    mit = model_card(config | {"provenance": [EDM, EDM | {"licence": "MIT", "sha256": "1"}]})
    assert yaml.safe_load(mit.split("---")[1])["license_name"] == "CC BY-NC-SA 4.0"  # the stricter of the two


# --- Students that start from files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [True, False])
def test_export_of_a_diffusers_student_needs_no_file_of_its_teacher(tmp_path, labelled):
    """Its config, not its folder, is in the export; labels are an input; every file makes the run's samples."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    options = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 1, "num_layers": 1, "sample_size": 8}
    unet = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "norm_num_groups": 4}
    unet |= {"layers_per_block": 1, "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    network = diffusers.DiTTransformer2DModel(**options) if labelled else diffusers.UNet2DModel(**unet)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # DiT starts at zero
    network.save_pretrained(tmp_path / "pretrained/unet")
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "pretrained/scheduler")
    given = {"folder": str(tmp_path / "pretrained"), "sigma_data": 0.5, "student": True}
    module = ConsistencyTraining(load_diffusers(**given), sigma_data=0.5)
    label = torch.tensor([3, 1, 2]) if labelled else None
    expected, path = module.sample(range(3), (1, 8, 8), label), save(module, tmp_path / "x.ckpt")
    backbone = {"class_path": "sclightning.adapters.load_diffusers", "init_args": given}
    export(ckpt_path=path, folder=str(tmp_path / "out"), backbone=backbone)

    (tmp_path / "pretrained").rename(tmp_path / "gone")
    noise, out = sample_noise(range(3), (1, 8, 8), 2), tmp_path / "out"
    model = Generator.from_pretrained(out).eval()
    assert torch.equal(model.sample(noise, label), expected)
    pipeline = SCMPipeline.from_pretrained(out / "pipeline")
    assert torch.equal(pipeline(noise=noise, class_labels=label, output_type="latent").images, expected)
    program = torch.export.load(out / "generator.pt2").module()
    given = {"label": label} if labelled else {}
    torch.testing.assert_close(program(noise[0], **given), model(noise[0], **given), rtol=1e-4, atol=1e-5)


def test_descriptions_without_files():
    """Every loader of this package is described so that its network is built where its file is not."""
    inner = {"class_path": "sclightning.backbones.DDPMpp", "init_args": TINY | {"double_norm": False}}
    edm2 = {"class_path": "sclightning.backbones.EDM2"}
    edm2["init_args"] = {"resolution": 8, "in_channels": 1, "channels": 16, "channel_mult": [1], "num_blocks": 1}
    edm2["init_args"]["head_channels"] = 16
    for loader, given in (
        ("load_weights", {"network": inner, "weights": "gone.pt"}),
        ("load_edm", {"network": inner, "weights": "gone.pt"}),
        ("load_edm2", {"network": edm2, "weights": "gone.pt"}),
        ("load_backbone", {"backbone": inner, "checkpoint": "gone.ckpt"}),
    ):
        module = "modules.consistency" if loader == "load_backbone" else "adapters"
        description = {"class_path": f"sclightning.{module}.{loader}", "init_args": given}
        around = {"network": description, "process": {"class_path": "sclightning.adapters.EDM"}}
        around |= {"prediction": "trigflow", "sigma_data": 0.5}
        nested = {"class_path": "sclightning.adapters.VelocityAdapter", "init_args": around}
        x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 1.0])
        assert build_backbone(without_files(nested))(x, t).shape == x.shape
        assert "gone" in str(description) and "gone" not in str(without_files(description))


# --- The check can fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "formats", "match"),
    [
        (Odd, "torch_export", r"generator\.pt2 differ from the model's by"),
        (Restless, "safetensors", r"model\.safetensors differ from the model's by"),
        (Restless, "diffusers", r"pipeline differ from the model's by"),
        (Untraceable, "torch_export", r"torch\.export cannot trace Untraceable .*leave it out of --formats"),
    ],
)
def test_files_that_make_other_samples_are_refused(tmp_path, network, formats, match):
    path = save(ConsistencyTraining(network(), sigma_data=0.5), tmp_path / "x.ckpt")
    tell(path, f"test_export.{network.__name__}")
    with pytest.raises(RuntimeError, match=match) as error:
        export(ckpt_path=path, folder=str(tmp_path / "out"), formats=[formats], shape=(1, 8, 8))
    assert "\n" not in str(error.value)


def test_nan_is_a_difference():
    with pytest.raises(RuntimeError, match="differ"):
        compare("x", torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]), 1e-4)
    assert compare("x", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 1e-5]), 1e-4) == pytest.approx(1e-5, rel=0.1)


# --- What is refused --------------------------------------------------------------------------------------------------


def test_refusals_are_sentences(make_plain_net, make_net, student, tmp_path, capsys):
    python = save(ConsistencyTraining(make_plain_net(), sigma_data=0.5), tmp_path / "python.ckpt")
    teacher = save(TrigFlowDiffusion(make_plain_net(), sigma_data=0.5), tmp_path / "teacher.ckpt")
    plain = '--backbone={"class_path": "conftest.PlainNet"}'
    needy = '--backbone={"class_path": "test_export.Needy"}'
    (tmp_path / "no.ckpt").write_bytes(b"")
    torch.save({"weights": 1}, tmp_path / "no.ckpt")
    for match, args in (
        ("There is no checkpoint at", ["--ckpt_path", str(tmp_path / "gone.ckpt")]),
        ("has no state_dict", ["--ckpt_path", str(tmp_path / "no.ckpt")]),
        ("does not say which network it holds; give --backbone", ["--ckpt_path", python]),
        ("holds no consistency model", ["--ckpt_path", teacher, plain]),
        ("PlainNet does not tell its images' shape; give shape", ["--ckpt_path", python, plain]),
        ("makes no samples of noise and class labels alone", ["--ckpt_path", python, needy, "--shape=[1,8,8]"]),
        ("are not those of conftest.PlainNet", ["--ckpt_path", str(student.ckpt), plain, "--shape=[1,8,8]"]),
    ):
        with pytest.raises(SystemExit):
            main(["export", *args, "--folder", str(tmp_path / "out")])
        err = capsys.readouterr().err
        assert "sclightning: error: " in err and match in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()
    main(["export", "--ckpt_path", python, plain, "--shape=[1,8,8]", "--folder", str(tmp_path / "out")])
    expected = ConsistencyTraining(make_plain_net(), sigma_data=0.5).sample(range(2), (1, 8, 8))
    samples = Generator.from_pretrained(tmp_path / "out").sample(sample_noise(range(2), (1, 8, 8), 2))
    assert torch.equal(samples, expected)


def test_guidance_input_without_a_scale_is_refused(make_net, tmp_path):
    module = ConsistencyDistillation(make_net(guidance=True), teacher=nn.Identity(), sigma_data=0.5)
    path, backbone = save(module, tmp_path / "x.ckpt"), {"class_path": "sclightning.backbones.DDPMpp"}
    backbone["init_args"] = TINY | {"guidance": True}
    with pytest.raises(ValueError, match=r"guidance input and the checkpoint no scale for it; give --guidance_scale"):
        export(ckpt_path=path, folder=str(tmp_path / "out"), backbone=backbone)


@pytest.mark.parametrize(
    ("library", "module", "match"),
    [
        ("huggingface_hub", "sclightning.export", "Exporting needs huggingface_hub and safetensors; pip install"),
        ("safetensors.torch", "sclightning.export", "Exporting needs huggingface_hub and safetensors; pip install"),
        ("diffusers", "sclightning.pipeline", "A diffusers pipeline needs diffusers; pip install"),
    ],
)
def test_missing_library_is_one_sentence(monkeypatch, library, module, match):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ImportError, match=match) as error:
        importlib.import_module(module)
    assert "\n" not in str(error.value)


def test_missing_libraries_trouble_nothing_else():
    """The command and the callbacks import without them; the callback that needs one says so."""
    code = "import sys; sys.modules |= dict.fromkeys(['huggingface_hub', 'safetensors', 'diffusers']); "
    code += "import sclightning.cli; from sclightning.callbacks import PostHocEMA; print('imported'); PostHocEMA()"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert run.stdout == "imported\n" and "ImportError: Snapshots of averages need safetensors; pip" in run.stderr
