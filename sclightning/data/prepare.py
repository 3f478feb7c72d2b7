"""``sclightning prepare``: from images to the arrays that the data modules map into memory."""

import hashlib
import importlib.metadata
import json
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sclightning import __version__
from sclightning.data.arrays import Split
from sclightning.data.autoencoder import Convention, channel_statistics, encode, load_vae
from sclightning.data.requests import whole
from sclightning.data.sources import Source, centre_crop, open_source
from sclightning.data.storage import Kind, PartialSplit, differences, read_metadata, remove_partial, write_metadata
from sclightning.metrics import weights_digest

_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, struct.error)
_UNREADABLE += (Image.DecompressionBombError,)


def prepare(
    source: str,
    out: str,
    split: Split = "train",
    resolution: int | None = None,
    vae: str | None = None,
    convention: Convention | None = None,
    corrupt: Literal["refuse", "skip"] = "refuse",
    devices: int | None = None,
    workers: int = 4,
    batch_size: int = 32,
) -> None:
    """Prepare a data set: centre crop and bicubic resize as in ADM and EDM2, and a VAE's posterior if one is given.

    Killed at any time, the same command goes on where it was.

    Args:
        source: Folder of class folders (ImageNet's layout), ZIP file of EDM or EDM2 (images, or EDM2's latents), or
            folder that holds torchvision's ``cifar-10-batches-py``.
        out: Folder to write to.
        split: Which split of the data set this is.
        resolution: Side of the square images in pixels; required but for a ZIP file of latents.
        vae: Encode with this AutoencoderKL: a local folder in diffusers' layout or a name on the Hugging Face hub, the
            paper's being ``stabilityai/sd-vae-ft-mse``. Needs ``pip install 'sclightning[diffusers]'``.
        convention: Range of the images before the encoder: the ``paper``'s, [-1, 1], or ``edm2``'s, [0, 1]. The paper's
            if not given, EDM2's for a ZIP file of latents.
        corrupt: Whether images that cannot be read are refused, which stops the command, or left out.
        devices: Number of processes, each with a GPU of its own where there are GPUs; all GPUs with a VAE, else one.
        workers: Processes that read images for each of these.
        batch_size: Images to read, encode and write at once.

    Raises:
        FileNotFoundError: If there is nothing to prepare, or no VAE.
        ValueError: If the arguments contradict each other, or what is in ``out``, or an image cannot be read.
    """
    for name, value in (("resolution", resolution), ("devices", devices), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; give a number above 0.")
    if Path(out).exists() and not Path(out).is_dir():
        raise NotADirectoryError(f"{out} is a file; give a folder to write to.")
    images = open_source(source, split)
    job = _plan(images, out, split, resolution, vae, convention, workers, batch_size)
    partial = _begin(job)
    if partial is None:
        remove_partial(out, split)  # of a run that was killed between its last two lines
        print(f"{out} holds this {split} split already.")
        return
    gpus = torch.cuda.device_count()
    world = devices or (gpus if vae else 0) or 1
    if gpus and vae and world > gpus:
        raise ValueError(f"There are {gpus} GPUs for {world} processes; set --devices to at most {gpus}.")
    report = _Report(images, _Items(images, resolution, job.shape), partial, refuse=corrupt == "refuse")
    with report.progress:
        if world == 1:
            for _ in _work(0, 1, job):
                report.update()
        else:
            processes = torch.multiprocessing.spawn(_exhaust, (world, job), world, join=False)
            try:
                while not processes.join(timeout=0.5):
                    report.update()
            finally:
                for process in processes.processes:
                    process.terminate()
        report.update()
    skipped = [images.names[i] for i in partial.corrupt]
    if len(skipped) == len(images.names):
        raise ValueError(f"None of the {len(skipped)} images in {source} can be read, so there is nothing to prepare.")
    array = partial.finish(images.labels)
    measured = {"channels": channel_statistics(array)} if job.kind == "moments" else {}
    packages = ["torch", "numpy", "pillow", *(["diffusers"] if vae else [])]
    versions = {"sclightning": __version__} | {name: importlib.metadata.version(name) for name in packages}
    write_metadata(out, split, job.kind, skipped=skipped, versions=versions, **measured, **job.recipe)
    remove_partial(out, split)
    print(f"{out} holds {len(array)} {job.kind} of {split}" + (f", {len(skipped)} were skipped." if skipped else "."))


@dataclass
class _Job:
    """What the processes of a command share; they get it pickled."""

    source: Source
    out: str
    split: Split
    kind: Kind
    shape: tuple[int, ...]
    recipe: dict
    resolution: int | None
    vae: str | None
    workers: int
    batch_size: int


def _plan(
    source: Source,
    out: str,
    split: Split,
    resolution: int | None,
    vae: str | None,
    convention: Convention | None,
    workers: int,
    batch_size: int,
) -> _Job:
    stored = source.names[0].endswith(".npy")
    if stored and (vae or resolution):
        raise ValueError(f"{source.path} holds latents already; leave out --vae and --resolution.")
    if not stored and resolution is None:
        raise ValueError("The images need a size; give --resolution, 64 for ImageNet 64, 512 for ImageNet 512.")
    if not stored and not vae and convention:
        raise ValueError("A convention is a matter of latents; give --vae or leave out --convention.")
    kind, encoder = "images", None
    if stored:
        kind, convention, shape = "moments", convention or "edm2", source.read(source.names[0]).shape
    elif vae:
        kind, convention, network = "moments", convention or "paper", load_vae(vae)
        factor = 2 ** (len(network.config.block_out_channels) - 1)
        if resolution % factor:
            raise ValueError(f"The VAE divides the resolution by {factor}, and {resolution} is no multiple of it.")
        shape = (2 * network.config.latent_channels, resolution // factor, resolution // factor)
        encoder = {"path": vae, "sha256": weights_digest(network)}
    else:
        shape = (3, resolution, resolution)
    listing = json.dumps([source.names, source.labels.tolist()]).encode()
    recipe = {
        "source": {"path": str(Path(source.path).resolve()), "sha256": hashlib.sha256(listing).hexdigest()},
        "resolution": resolution,
        "vae": encoder,
        "convention": convention,
        "num_classes": source.num_classes,
    }
    return _Job(source, out, split, kind, shape, recipe, resolution, vae, workers, batch_size)


def _begin(job: _Job) -> PartialSplit | None:
    """The files to write to; None if all of it is written."""
    metadata = read_metadata(job.out, job.split)
    if metadata is None:
        dtype = np.float16 if job.kind == "moments" else np.uint8
        shape = (len(job.source.names), *job.shape)
        return PartialSplit.begin(job.out, job.split, job.kind, dtype, shape, job.recipe)
    other = differences(metadata, job.recipe)
    if other:
        raise ValueError(
            f"{job.out} holds a '{job.split}' split of another {' and '.join(other)}; choose another folder, or delete "
            f"{Path(job.out) / job.split}*."
        )
    return None


def _work(rank: int, world: int, job: _Job):
    """One process's share; yields after each batch that is safe on disk."""
    partial = PartialSplit(job.out, job.split, job.kind)
    device = torch.device("cuda", rank) if job.vae and torch.cuda.is_available() else torch.device("cpu")
    vae = load_vae(job.vae).to(device) if job.vae else None
    todo = partial.todo(job.batch_size, rank, world)
    loader = DataLoader(
        _Items(job.source, job.resolution, job.shape),
        batch_sampler=todo,
        collate_fn=whole,
        num_workers=job.workers,
        # Started by spawn, this process would spawn its workers too, and each import everything for seconds.
        multiprocessing_context="fork" if job.workers and os.name == "posix" else None,
    )
    for good, values, bad in loader:
        if good and vae is not None:
            values = encode(vae, values.to(device), job.recipe["convention"])
        partial.write(good, values, bad)
        yield


def _exhaust(rank: int, world: int, job: _Job) -> None:
    for _ in _work(rank, world, job):
        pass


class _Items(Dataset):
    """Batches ``(items that could be read, their values, items that could not)``."""

    def __init__(self, source: Source, resolution: int | None, shape: tuple[int, ...]):
        self.source, self.resolution, self.shape = source, resolution, shape

    def __getitem__(self, item: int) -> Tensor:
        value = self.source.read(self.source.names[item])
        if self.resolution is not None:
            return torch.from_numpy(centre_crop(value, self.resolution))
        if value.shape != self.shape:
            raise ValueError(f"its shape is {value.shape}, the first one's {self.shape}")
        return torch.from_numpy(value).half()

    def __getitems__(self, items: list[int]) -> tuple[list[int], Tensor | None, list[int]]:
        values, bad = {}, []
        for item in items:
            try:
                values[item] = self[item]
            except _UNREADABLE:
                bad.append(item)
        return list(values), torch.stack(list(values.values())) if values else None, bad

    def why(self, item: int) -> str:
        """What is wrong with an item that could not be read."""
        try:
            self[item]
        except _UNREADABLE as error:
            return str(error)
        return "the first time"


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} images/s" if speed else "- images/s")


class _Report:
    """Progress of all processes, read off the flags, and what could not be read."""

    def __init__(self, source: Source, items: "_Items", partial: PartialSplit, refuse: bool):
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()
        )
        self.source, self.items, self.partial, self.refuse = source, items, partial, refuse
        self.task = self.progress.add_task(partial.split, total=len(source.names), completed=partial.done)
        self.reported: set[int] = set()

    def update(self) -> None:
        self.progress.update(self.task, completed=self.partial.done)
        for item in sorted({*self.partial.corrupt} - self.reported):
            self.reported.add(item)
            what = f"{self.source.where(item)} cannot be read ({self.items.why(item)})"
            if self.refuse:
                raise ValueError(f"{what}; repair it and repeat the command, or leave it out with --corrupt=skip.")
            self.progress.console.print(f"Skipped: {what}", soft_wrap=True, markup=False)
