"""Every Python example of the documentation runs, in the order of its page."""

import re
from pathlib import Path

import pytest
import torch
import yaml

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("page", ["python", "extending", "adapters", "export"])
def test_examples_run(page, tmp_path, monkeypatch):
    """The examples of a page run from an empty folder, and the samples they make are finite images."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), flags=re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), namespace)
    for name in {"samples", "two_step"} & namespace.keys():
        assert namespace[name].shape == (16, 3, 8, 8)
        assert namespace[name].isfinite().all()
        assert namespace[name].std() > 0.1


def shrink(config):
    """A config whose networks of the paper's size are tiny ones, of the same arguments otherwise."""
    if isinstance(config, list):
        return [shrink(value) for value in config]
    if not isinstance(config, dict):
        return config
    config = {key: shrink(value) for key, value in config.items()}
    if str(config.get("class_path")).startswith("sclightning.backbones."):
        tiny = {"resolution": 8, "in_channels": 1, "channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
        tiny |= {"attention_resolutions": [4], "head_channels": 8}
        config["init_args"] = config.get("init_args", {}) | tiny
    if str(config.get("class_path")) == "my_package.FlowNet":
        config["class_path"] = "torch.nn.Identity"
    return config


def test_configs_of_adapters(tmp_path, monkeypatch):
    """Every YAML example of docs/adapters.md makes a module whose teacher is what it says, from files of its names."""
    diffusers = pytest.importorskip("diffusers")
    safetensors = pytest.importorskip("safetensors.torch")
    from test_adapters_diffusers_model import UNET, save
    from test_backbones_ddpmpp import published as edm_state
    from test_backbones_edm2 import published as edm2_state

    from sclightning.adapters import Guided, VelocityAdapter
    from sclightning.backbones import EDM2, DDPMpp
    from sclightning.cli import SCLightningCLI

    monkeypatch.chdir(tmp_path)
    save(tmp_path / "ddpm-cifar10-32", diffusers.UNet2DModel(**UNET), diffusers.DDPMScheduler())
    tiny = shrink({"class_path": "sclightning.backbones."})["init_args"]
    edm = edm_state(DDPMpp(**tiny, double_norm=False))
    safetensors.save_file(edm, "edm-cifar10-32x32-uncond-vp.safetensors")
    edm2 = edm2_state(EDM2(**tiny, num_classes=1000, double_norm=False))
    safetensors.save_file(edm2, "edm2-img512-s.safetensors")
    torch.save({}, "flow.pt")
    (tmp_path / "runs/guide").mkdir(parents=True)
    guide = {f"backbone.{name}": value for name, value in DDPMpp(**tiny).state_dict().items()}
    torch.save({"state_dict": guide}, "runs/guide/last.ckpt")

    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "adapters.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 5
    teachers = []
    for block in blocks:
        config = shrink(yaml.safe_load(block))
        if "teacher" in config:
            student = {"class_path": "sclightning.backbones.DDPMpp", "init_args": tiny}
            init_args = {"backbone": student, "sigma_data": 0.5} | config
            config = {"model": {"class_path": "sclightning.modules.ConsistencyDistillation", "init_args": init_args}}
        config["data"] = {"class_path": "sclightning.data.DigitsDataModule"}
        Path("run.yaml").write_text(yaml.safe_dump(config))
        teachers.append(SCLightningCLI(["--config", "run.yaml"], run=False).model.teacher)
    assert [type(teacher) for teacher in teachers] == [VelocityAdapter] * 4 + [Guided]
    from sclightning.provenance import recorded

    assert [recorded(teacher)[0]["licence"] for teacher in teachers] == [None, *["CC-BY-NC-SA-4.0"] * 2, "MIT", None]
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 1.2])
    for teacher in (*teachers[:3], teachers[4].network):
        assert teacher(x, t).isfinite().all()
    assert teachers[4].interval == (0.51, 1.4) and torch.equal(
        teachers[4].guide.out_conv.weight, guide["backbone.out_conv.weight"]
    )
