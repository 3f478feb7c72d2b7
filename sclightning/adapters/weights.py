"""Weights from files of plain tensors, and where they came from. Nothing here unpickles code."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sclightning.checkpoint import mismatched


def read_state_dict(path: str) -> dict[str, Tensor]:
    """Read a state dict: ``.safetensors``, or what ``torch.save`` wrote of a dictionary of tensors.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is none.
        ImportError: If it is a safetensors file and safetensors is not installed.
        ValueError: If it holds anything but tensors by name, as NVIDIA's pickles do.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There are no weights at {path}; give the path of a .safetensors or .pt file.")
    if Path(path).suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ImportError(
                f"Reading {path} needs safetensors, which is not installed: pip install 'sclightning[diffusers]'."
            ) from None
        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler stumbled over
        raise ValueError(
            f"{path} holds more than tensors, and loading it would run its code; convert it once to a state dict where "
            "you trust it, as docs/adapters.md shows."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is not a state dict; save one with torch.save(network.state_dict(), path).")
    return state


def provenance(paths: Sequence[Path | str], name: str, licence: str | None) -> dict:
    """Where weights come from: ``name``, ``licence``, ``sha256`` of the files one after the other, ``source``.

    Args:
        paths: Files of weights.
        name: Name of the model.
        licence: Licence of the weights, None if it is not known.
    """
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return {"name": name, "licence": licence, "sha256": digest.hexdigest(), "source": str(paths[0])}


def load_weights(
    network: nn.Module, weights: str | None, name: str | None = None, licence: str | None = None
) -> nn.Module:
    """Fill a network from a file of tensors whose names are its own.

    Args:
        network: Network to fill.
        weights: A ``.safetensors`` file, or a ``.pt`` file of a plain state dict; with None the network stays as it is.
        name: Name of the model in its provenance; the file's if not given.
        licence: Licence of the weights.

    Returns:
        ``network``, with the attribute ``provenance``.

    Raises:
        ValueError: If the names or shapes are not the network's.
    """
    if weights is None:
        return network
    state = read_state_dict(weights)
    wrong = mismatched(network.state_dict(), state)
    if wrong:
        raise ValueError(
            f"{weights} holds another network than {type(network).__name__} ({len(wrong)} tensors differ, first "
            f"{wrong[0]}); make the network with the arguments that it was trained with."
        )
    network.load_state_dict(state)
    network.provenance = provenance([weights], name or Path(weights).stem, licence)
    return network
