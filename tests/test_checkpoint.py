"""Reading checkpoints outside a Trainer. Sharded ones are in test_posthoc_ema, the refusals also in test_export."""

from argparse import ArgumentError

import pytest
import torch
from conftest import TINY, Unpickled

from sclightning.backbones import DDPMpp
from sclightning.checkpoint import backbone_weights, build_backbone, read_checkpoint


def test_weights_of_the_backbone_and_of_nothing_else(tmp_path):
    state = {"backbone.conv.weight": torch.ones(2), "adaptive_weight.linear.bias": torch.zeros(1)}
    torch.save({"state_dict": state | {"teacher.backbone.x": torch.zeros(1)}, "epoch": 3}, tmp_path / "x.ckpt")
    checkpoint = read_checkpoint(str(tmp_path / "x.ckpt"))
    weights = backbone_weights(checkpoint)
    assert (
        checkpoint["epoch"] == 3
        and list(weights) == ["conv.weight"]
        and torch.equal(weights["conv.weight"], torch.ones(2))
    )


def test_network_from_its_description():
    """What a config says, and a class that is no network is refused."""
    network = build_backbone({"class_path": "sclightning.backbones.DDPMpp", "init_args": TINY | {"channels": 16}})
    assert type(network) is DDPMpp and network.out_conv.in_channels == 16
    with pytest.raises(ArgumentError, match="does not correspond to a subclass of Module"):
        build_backbone({"class_path": "collections.OrderedDict"})


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    torch.save({"state_dict": {}, "x": Unpickled()}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="no checkpoint, or a damaged one"):
        read_checkpoint(str(tmp_path / "x.ckpt"))
    assert "code has run" not in capsys.readouterr().out


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*x\.ckpt; give --ckpt_path"):
        read_checkpoint(str(tmp_path / "x.ckpt"))
    torch.save({"weights": 1}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"has no state_dict, so it is not a checkpoint of a run"):
        read_checkpoint(str(tmp_path / "x.ckpt"))
