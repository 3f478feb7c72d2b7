"""Files of tensors: what is read, what is refused, where it came from."""

import hashlib

import pytest
import torch
from torch import nn

from sclightning.adapters import EDM, VelocityAdapter, load_weights
from sclightning.adapters.weights import provenance, read_state_dict


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_network_is_filled(tmp_path, suffix):
    """Weights arrive, and say where they came from, through an adapter too."""
    source, path = nn.Linear(3, 2), tmp_path / f"linear.{suffix}"
    if suffix == "pt":
        torch.save(source.state_dict(), path)
    else:
        pytest.importorskip("safetensors.torch").save_file(source.state_dict(), path)
    network = load_weights(nn.Linear(3, 2), str(path), licence="MIT")
    assert torch.equal(network.weight, source.weight) and torch.equal(network.bias, source.bias)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    expected = {"name": "linear", "licence": "MIT", "sha256": sha256, "source": str(path)}
    assert network.provenance == expected
    assert VelocityAdapter(network, EDM(), "edm", 0.5).provenance == expected


def test_other_networks_are_refused(tmp_path):
    """By shape and by name, before anything is copied."""
    path = tmp_path / "linear.pt"
    torch.save(nn.Linear(3, 2).state_dict(), path)
    for other in (nn.Linear(3, 4), nn.Linear(3, 2, bias=False), nn.LSTM(3, 2)):
        with pytest.raises(ValueError, match="another network than"):
            load_weights(other, str(path))


def test_other_files_are_refused(tmp_path):
    """Nothing there, something that is no state dict, something that is no file of torch's."""
    with pytest.raises(FileNotFoundError, match="give the path"):
        read_state_dict(str(tmp_path / "none.safetensors"))
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "checkpoint.pt")
    for name in ("list.pt", "checkpoint.pt"):
        with pytest.raises(ValueError, match="not a state dict"):
            read_state_dict(str(tmp_path / name))
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="more than tensors"):
        read_state_dict(str(tmp_path / "text.pt"))


def test_several_files_have_one_hash(tmp_path):
    """That of one after the other; larger than one read."""
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    (tmp_path / "b").write_bytes(b"y")
    found = provenance([tmp_path / "a", tmp_path / "b"], "two", None)["sha256"]
    assert found == hashlib.sha256(b"x" * 3_000_000 + b"y").hexdigest()
