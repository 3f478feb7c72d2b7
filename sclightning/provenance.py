"""Provenance of weights: whose they are and under which licence, from a teacher to its students and their exports.

A record is a plain dictionary with the keys ``name``, ``licence``, ``sha256`` and ``source``, any of them None if it is
not known. A network that brings foreign weights has one as its attribute ``provenance``.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

Record = dict[str, str | None]


def recorded(module: nn.Module) -> list[Record]:
    """Records of a module and of everything inside it; a checkpoint's network has a list of them."""
    found = [getattr(m, "provenance", None) for m in module.modules()]
    return merge(*([p] if isinstance(p, dict) else p for p in found if p))


def of_checkpoint(path: str) -> list[Record]:
    """Record of a checkpoint, then those of the weights that it was made from.

    Args:
        path: A Lightning checkpoint: a file, or the folder of a sharded one.
    """
    path = Path(path)
    meta = path / "meta.pt" if path.is_dir() else path
    checkpoint = torch.load(meta, map_location="cpu", weights_only=True, mmap=True)
    cls = checkpoint.get("hyper_parameters", {}).get("_class_path", "checkpoint").rpartition(".")[2]
    own = {"name": f"{cls} {path.name}", "licence": None, "sha256": _sha256(path), "source": str(path)}
    return merge([own], checkpoint.get("provenance", []))


def merge(*provenances: Iterable[Record]) -> list[Record]:
    """Records in order, weights of the same hash once."""
    found = {}
    for record in (record for provenance in provenances for record in provenance):
        found.setdefault(record.get("sha256") or tuple(sorted(record.items())), dict(record))
    return list(found.values())


def is_non_commercial(licence: str | None) -> bool:
    """Whether the name of a licence says so: "CC BY-NC-SA 4.0", "non-commercial", "research only"."""
    return bool(re.search(r"(?<![a-z])nc(?![a-z])|non.?commercial|research.only", licence or "", re.IGNORECASE))


def notice(provenance: Iterable[Record]) -> str | None:
    """Sentence that tells who made non-commercial weights that these derive from; None if nobody did."""
    bound = [f"{r['name']} ({r['licence']})" for r in provenance if is_non_commercial(r.get("licence"))]
    if not bound:
        return None
    return f"These weights derive from {' and '.join(bound)} and may not be used commercially."


def _sha256(path: Path) -> str:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return hashlib.sha256("".join(map(_sha256, files)).encode()).hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
