"""How far a set of samples is from real images: one pass of features, every distance in them."""

import hashlib
import math
import os
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image import FrechetInceptionDistance, InceptionScore, KernelInceptionDistance
from torchmetrics.utilities.distributed import gather_all_tensors

from sclightning.data.arrays import Split
from sclightning.metrics import InceptionFeatures, weights_digest

Extra = Literal["kid", "inception_score", "precision_recall"]

KID_SUBSET = 1000
"""Samples in each of KID's 100 subsets, as everywhere."""
KEPT = 50_000
"""Real images at most, evenly spaced, whose features are kept for KID, precision and recall."""


class Reference(NamedTuple):
    """Statistics of real images in the features of one extractor."""

    mu: np.ndarray
    """Mean, float64 (d,)."""
    sigma: np.ndarray
    """Covariance, float64 (d, d)."""
    features: Tensor | None
    """Features of some or all of the images, float32 (n, d)."""
    record: dict[str, Any]
    """What a result says about it."""


@dataclass(eq=False)
class Measure:
    """Distances of samples to real images in the features of one extractor.

    Sums are kept on rank 0 alone, in float64 and in the order of the batches, so that the last digit does not depend
    on the number of processes. torchmetrics has the Fréchet distance, KID (100 subsets of 1,000, drawn with seed 0) and
    the Inception score (10 splits); improved precision and recall (3 neighbours) are torch-fidelity's.

    Args:
        extractor: Module with ``name`` and ``num_features`` that maps uint8 images (B, C, H, W) to features (B, d), and
            with ``head``, from features to logits, for the Inception score.
        reference: Split of the data module that holds the real images, ``train`` or ``held_out``, or the path of an
            ``.npz`` with their ``mu`` and ``sigma``.
        extras: What to give besides the Fréchet distance.
    """

    extractor: nn.Module
    reference: str = "train"
    extras: Sequence[Extra] = ()

    def __post_init__(self):
        self.extractor.eval().requires_grad_(False)
        if self.reference not in get_args(Split) and not self.reference.endswith(".npz"):
            raise ValueError(
                f"There is no reference '{self.reference}'; give train, held_out or the path of an .npz with mu and "
                "sigma (pickles are never read: docs/evaluation.md has the conversion)."
            )
        if "inception_score" in self.extras and not hasattr(self.extractor, "head"):
            raise ValueError(
                f"The Inception score needs logits, which {type(self.extractor).__name__} does not have; take "
                "inception_score from its extras."
            )

    @property
    def key(self) -> str:
        """Name of the Fréchet distance, ``fid`` in Inception's features alone, ``fd_<extractor>`` in others."""
        return f"{'fid' if isinstance(self.extractor, InceptionFeatures) else 'fd'}{self._suffix}"

    @property
    def num_samples(self) -> int:
        """Samples taken in so far, on rank 0."""
        return int(self._frechet.fake_features_num_samples)

    @property
    def record(self) -> dict[str, Any]:
        """What was compared with what."""
        return {
            "extractor": {"name": self.extractor.name, "sha256": self._digest},
            "reference": self._reference.record,
        }

    def prepare(self, data: L.LightningDataModule, device: torch.device, num_samples: int) -> None:
        """Get the statistics of the real images; refuse what could only fail after the samples were made.

        Args:
            data: Where real images come from.
            device: Where features are made.
            num_samples: How many samples there will be.

        Raises:
            FileNotFoundError: If there is no such reference.
            ValueError: If it is of other data or another extractor, or there are too few samples or real images.
        """
        self._require(num_samples, "samples", "raise data.num_test_samples (in fit and validate data.num_val_samples)")
        self.device, self._digest = device, weights_digest(self.extractor)
        self.extractor.to(device)
        self._reference = self._read(data) if self.reference.endswith(".npz") else self._cached(data)
        mu, sigma = (torch.from_numpy(a).to(device) for a in (self._reference.mu, self._reference.sigma))
        # Two images of this mean and covariance: for no other number is the rounding smaller.
        self._frechet = self._new_frechet()
        self._frechet.real_features_num_samples += 2
        self._frechet.real_features_sum += 2 * mu
        self._frechet.real_features_cov_sum += sigma + 2 * torch.outer(mu, mu)
        self.reset()

    def reset(self) -> None:
        """Forget the samples."""
        self._frechet.reset()
        self._features: list[Tensor] = []

    def update(self, images: Tensor, batch_idx: int, num_batches: int) -> None:
        """Take in this process's batch of a round, together with those of the others.

        Args:
            images: uint8 samples (B, C, H, W).
            batch_idx: Number of the round.
            num_batches: Batches over all rounds and processes; what goes beyond is padding and dropped.
        """
        for features in self._round(images, batch_idx, num_batches):
            self._frechet.update(features.double(), real=False)
            if self.extras:
                self._features.append(features.cpu())

    def compute(self) -> dict[str, float]:
        """Distances of the samples taken in, on rank 0; nothing elsewhere."""
        if _rank() > 0:
            return {}
        result = {self.key: self._frechet.compute()}
        samples = torch.cat(self._features).to(self.device) if self.extras else None
        real = None if self._reference.features is None else self._reference.features.to(self.device)
        passed = nn.Identity()
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(0)  # of KID's subsets and the score's splits
            warnings.filterwarnings("ignore", message=".*will save all extracted features")
            if "kid" in self.extras:
                kid = KernelInceptionDistance(passed, subset_size=KID_SUBSET, sync_on_compute=False)
                kid.update(real.double(), real=True)
                kid.update(samples.double(), real=False)
                result["kid"], result["kid_std"] = kid.compute()
            if "inception_score" in self.extras:
                score = InceptionScore(passed, sync_on_compute=False)
                score.update(self.extractor.head(samples).double())
                result["inception_score"], result["inception_score_std"] = score.compute()
        if "precision_recall" in self.extras:
            # In parts: whole matrices of distances would be four of 10 GB.
            both = prc_features_to_metric(samples, real, save_cpu_ram=True, verbose=False)
            result["precision"], result["recall"] = both["precision"], both["recall"]
        return {name if name == self.key else name + self._suffix: float(value) for name, value in result.items()}

    @property
    def _suffix(self) -> str:
        return "" if isinstance(self.extractor, InceptionFeatures) else f"_{self.extractor.name}"

    def _new_frechet(self) -> FrechetInceptionDistance:
        passed = nn.Identity()
        passed.num_features = self.extractor.num_features
        frechet = FrechetInceptionDistance(passed, reset_real_features=False, antialias=False, sync_on_compute=False)
        return frechet.to(self.device)

    @torch.no_grad()
    def _extract(self, images: Tensor) -> Tensor:
        # cuDNN's default, TF32, keeps ten bits.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            return self.extractor(images.to(self.device)).float()

    def _round(self, images: Tensor, batch_idx: int, num_batches: int) -> list[Tensor]:
        """Features of all processes' batches, without padding, on rank 0."""
        batches = gather(self._extract(images))
        return batches[: num_batches - batch_idx * len(batches)] if _rank() == 0 else []

    def _require(self, count: int, what: str, remedy: str) -> None:
        d, kid = self.extractor.num_features, "kid" in self.extras
        if count < max(d + 1, KID_SUBSET * kid):
            why = f"the covariance of {d} features takes {d + 1}" + f", a subset of KID {KID_SUBSET}" * kid
            raise ValueError(f"{count} {what} are too few for {self.extractor.name}: {why}; {remedy}.")

    def _needs_features(self) -> bool:
        return "kid" in self.extras or "precision_recall" in self.extras

    def _read(self, data: L.LightningDataModule) -> Reference:
        """Statistics from a file, held to what the file says about itself and to some of the real images."""
        path, name, d = Path(self.reference), self.extractor.name, self.extractor.num_features
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no reference at {path}; get EDM's .npz or convert EDM2's (docs/evaluation.md), or set "
                "reference to train."
            )
        try:
            with np.load(path, allow_pickle=False) as file:
                content = dict(file)
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no .npz of arrays, or a damaged one; get it again.") from error
        if not {"mu", "sigma"} <= content.keys():
            raise ValueError(f"{path} has no mu and sigma but {', '.join(content)}; give statistics, not images.")
        mu, sigma = content["mu"].astype(np.float64), content["sigma"].astype(np.float64)
        if mu.shape != (d,) or sigma.shape != (d, d):
            raise ValueError(
                f"{path} holds statistics of {mu.size} features, {name} has {d}; give the reference of this extractor."
            )
        for key, ours in (("data", data.name), ("extractor", name), ("extractor_sha256", self._digest)):
            if key in content and str(content[key]) != ours:
                raise ValueError(f"{path} was made with {key} {content[key]}, not {ours}; give the right reference.")
        features = torch.from_numpy(content["features"]) if "features" in content else None
        if features is None and self._needs_features():
            raise ValueError(
                f"KID, precision and recall need the features of real images, and {path} has only their mean and "
                "covariance; set reference to train, or take them from the extras."
            )
        self._compare(mu, sigma, data)
        record = {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        return Reference(mu, sigma, features, record)

    def _compare(self, mu: np.ndarray, sigma: np.ndarray, data: L.LightningDataModule, n: int = 1024) -> None:
        """Refuse statistics of another data set: n of its images have a mean within tr(sigma)/n or so, squared."""
        try:
            split = data.split("train")
        except FileNotFoundError:
            rank_zero_info(f"{self.reference} was not compared with {data.name}, which is not on this machine.")
            return
        n, features = min(n, len(split)), []
        for start in range(0, n, 64):
            batch = split.__getitems__([i * len(split) // n for i in range(start, min(start + 64, n))])
            if batch[0].dtype != torch.uint8:  # latents, which training and sampling know what to do with
                x_0 = data.on_after_batch_transfer(tuple(tensor.to(self.device) for tensor in batch), 0)
                batch = [data.to_uint8(x_0 if isinstance(x_0, Tensor) else x_0[0])]
            features.append(self._extract(batch[0]))
        mean = torch.cat(features).double().mean(0).cpu()
        distance, expected = (mean - torch.from_numpy(mu)).square().sum().item(), sigma.trace() / n
        if not distance < 10 * expected:
            raise ValueError(
                f"{self.reference} is not of {data.name} in features of {self.extractor.name}: the mean of {n} real "
                f"images is {math.sqrt(distance / expected):.0f} times as far from it as it should be; give the "
                "reference of this data set."
            )

    def _cached(self, data: L.LightningDataModule) -> Reference:
        """Statistics of a split, made once and kept under the hashes of images and extractor."""
        split = data.reference_dataloader(self.reference).dataset
        self._require(len(split), "real images", "choose another split or extractor")
        path, record, reference = None, {}, None
        if _rank() == 0:
            record = {"data": data.name, "split": self.reference, "images": len(split), "sha256": split.digest()}
            name = f"{data.name}_{self.extractor.name}_{record['sha256'][:16]}_{self._digest[:16]}.npz"
            path = Path(torch.hub.get_dir()).parent / "sclightning" / name  # beside the weights that torch downloads
            if path.is_file():
                with np.load(path, allow_pickle=False) as file:
                    kept = torch.from_numpy(file["features"]) if "features" in file else None
                    reference = Reference(file["mu"], file["sigma"], kept, record)
        there = reference is not None and not (self._needs_features() and reference.features is None)
        if not gather(torch.tensor(there, device=self.device))[0]:
            reference = self._measure(data, record)
            if path is not None:
                _save(path, reference, extractor=self.extractor.name, extractor_sha256=self._digest)
                rank_zero_info(f"Kept the statistics of {len(split)} real images in {path}")
        if reference is None:  # not rank 0, which alone compares
            d = self.extractor.num_features
            reference = Reference(np.zeros(d), np.zeros((d, d)), None, {})
        return reference

    def _measure(self, data: L.LightningDataModule, record: dict) -> Reference | None:
        loader = data.reference_dataloader(self.reference, _world_size(), _rank())
        n, size = len(loader.dataset), loader.batch_size
        keep = np.zeros(n, dtype=bool)
        keep[np.arange(min(n, KEPT)) * n // min(n, KEPT)] = True
        frechet, kept, start = self._new_frechet(), [], 0
        for batch_idx, (images, _) in enumerate(loader):
            if images.dtype != torch.uint8:
                raise ValueError(
                    f"The split '{self.reference}' of {data.name} holds no images to compare with; set reference to "
                    "an .npz of their statistics."
                )
            for features in self._round(images, batch_idx, math.ceil(n / size)):
                frechet.update(features.double(), real=True)
                if self._needs_features():
                    kept.append(features.cpu()[torch.from_numpy(keep[start : start + len(features)])])
                start += len(features)
        if _rank() > 0:
            return None
        mu = frechet.real_features_sum / n
        sigma = (frechet.real_features_cov_sum - n * torch.outer(mu, mu)) / (n - 1)
        return Reference(mu.cpu().numpy(), sigma.cpu().numpy(), torch.cat(kept) if kept else None, record)


def gather(tensor: Tensor) -> list[Tensor]:
    """The tensors of all processes, by rank; shapes may differ."""
    return gather_all_tensors(tensor) if _world_size() > 1 else [tensor]


def _world_size() -> int:
    return torch.distributed.get_world_size() if _is_distributed() else 1


def _rank() -> int:
    return torch.distributed.get_rank() if _is_distributed() else 0


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _save(path: Path, reference: Reference, **content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if reference.features is not None:
        content["features"] = reference.features.numpy()
    unfinished = path.with_name(f"{os.getpid()}_{path.name}")
    np.savez(unfinished, mu=reference.mu, sigma=reference.sigma, **reference.record, **content)
    unfinished.replace(path)
