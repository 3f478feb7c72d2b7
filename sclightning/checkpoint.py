"""Lightning checkpoints outside a Trainer: read one, sharded or not, and build the network that it describes."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn


def read_checkpoint(path: str) -> dict[str, Any]:
    """Checkpoint on the CPU, its ``state_dict`` whole also if it was saved in shards.

    Args:
        path: The file, or the folder of a sharded checkpoint.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is no checkpoint of Lightning's, or a damaged one.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"There is no checkpoint at {path}; give --ckpt_path the path of one.")
    if Path(path).is_dir():
        from lightning.fabric.utilities.load import _load_distributed_checkpoint

        checkpoint = _load_distributed_checkpoint(Path(path))
    else:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{path} is no checkpoint, or a damaged one; give one that fit wrote (for weights from elsewhere see "
                "docs/adapters.md)."
            ) from error
    if "state_dict" not in checkpoint:
        raise ValueError(f"{path} has no state_dict, so it is not a checkpoint of a run; give one that fit wrote.")
    return checkpoint


def backbone_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of the backbone: the averaged ones where the run had an :class:`~sclightning.callbacks.ema.EMA`."""
    prefix = "backbone."
    return {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}


def mismatched(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that one of two state dicts lacks, or that differ in shape."""
    return [k for k in {**own, **other} if k not in own or k not in other or own[k].shape != other[k].shape]


def build_backbone(description: dict[str, Any]) -> nn.Module:
    """Network from its description in a config, ``{"class_path": …, "init_args": {…}}``.

    The class is imported, as every config's is: build what you trust.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--backbone", type=nn.Module)
    return parser.instantiate(parser.parse_object({"backbone": description})).backbone
