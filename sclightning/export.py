"""A consistency model as files that others load: safetensors, a diffusers pipeline, a ``torch.export`` program."""

import json
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor, nn

from sclightning.adapters import load_diffusers, load_edm, load_edm2, load_weights
from sclightning.adapters.diffusers_model import configs
from sclightning.checkpoint import backbone_weights, build_backbone, read_checkpoint
from sclightning.modules.consistency import load_backbone
from sclightning.provenance import is_non_commercial, notice
from sclightning.sampling import consistency, sample_noise

try:
    from huggingface_hub import ModelCard, PyTorchModelHubMixin
    from safetensors.torch import load_file, save_file, save_model
except ImportError as error:
    raise ImportError(
        "Exporting needs huggingface_hub and safetensors; pip install 'sclightning[diffusers]'."
    ) from error

WEIGHTS = {load_weights: "weights", load_edm: "weights", load_edm2: "weights", load_backbone: "checkpoint"}
"""Functions that fill a network -> their argument without which it stays empty."""

Format = Literal["safetensors", "diffusers", "torch_export"]

TOLERANCE = 1e-4
"""Largest difference of a traced program from the model, relative to the samples' largest value."""


class Generator(nn.Module, PyTorchModelHubMixin, library_name="sclightning"):
    """A consistency model without its training: noise in, samples out; ``from_pretrained`` and ``save_pretrained``.

    Args:
        backbone: Description of the network, ``{"class_path": …, "init_args": {…}}``.
        sigma_data: Standard deviation of the data.
        times: Sampling times in radians, decreasing.
        guidance_scale: Guidance scale in sampling, for a network with a guidance input.
        shape: Shape of one sample, (C, H, W); from the network's ``in_channels`` and ``resolution`` if not given.
        provenance: Records of the weights that these were made from, see :mod:`sclightning.provenance`.

    Raises:
        ValueError: If the shape is neither given nor known to the network.
    """

    def __init__(
        self,
        backbone: dict[str, Any],
        sigma_data: float,
        times: Sequence[float],
        guidance_scale: float | None = None,
        shape: Sequence[int] | None = None,
        provenance: Sequence[dict[str, str | None]] = (),
    ):
        super().__init__()
        self.backbone = build_backbone(backbone)
        if shape is None:
            size = [getattr(self.backbone, name, None) for name in ("in_channels", "resolution")]
            if not all(isinstance(number, int) for number in size):
                raise ValueError(
                    f"{type(self.backbone).__name__} does not tell its images' shape; give shape (C, H, W)."
                )
            shape = (size[0], size[1], size[1])
        self.config = {
            "backbone": backbone,
            "shape": list(shape),
            "sigma_data": sigma_data,
            "times": list(times),
            "guidance_scale": guidance_scale,
            "provenance": list(provenance),
        }

    def forward(self, noise: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            noise: Unit Gaussian noise, shape (B, C, H, W).
            label: Class labels, int64 (B,).
            guidance: Guidance scale per sample, shape (B,); the model's if not given.

        Returns:
            Samples in the range of the data, shape (B, C, H, W).
        """
        return self.sample(noise[None], label, guidance)

    def sample(self, noise: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        """As many steps of the model's ``times`` as there are noises, shape (steps, B, C, H, W)."""
        scale = self.config["guidance_scale"]
        if guidance is None and scale is not None:
            guidance = noise.new_full((noise.shape[1],), scale)
        given = {"label": label, "guidance": guidance}
        conditions = {name: condition for name, condition in given.items() if condition is not None}
        times, sigma_data = self.config["times"][: len(noise)], self.config["sigma_data"]
        return consistency(lambda x, t: self.backbone(x, t, **conditions), noise, times, sigma_data)

    def generate_model_card(self, *args, **kwargs) -> ModelCard:
        """README of the folder: what the model is, how to load it, whose weights it derives from."""
        return ModelCard(model_card(self.config))

    def _save_pretrained(self, save_directory: Path) -> None:
        save_model(self, save_directory / "model.safetensors", metadata(self.config))


def export(
    *,
    ckpt_path: str,
    folder: str,
    formats: Sequence[Format] = ("safetensors", "diffusers", "torch_export"),
    guidance_scale: float | None = None,
    shape: tuple[int, int, int] | None = None,
    backbone: dict[str, Any] | None = None,
) -> None:
    """Write a trained consistency model for others to use; each file is loaded again and its samples compared.

    The folder gets ``config.json``, ``model.safetensors`` and ``README.md`` for ``Generator.from_pretrained``;
    ``pipeline/`` for diffusers; ``generator.pt2``, one step for any batch size, for ``torch.export.load``. The weights
    are the averaged ones if the run had an EMA.

    Args:
        ckpt_path: Checkpoint of ConsistencyDistillation or ConsistencyTraining.
        folder: Where to write; made if it is not there.
        formats: What to write.
        guidance_scale: Guidance scale that samples get by default; the checkpoint's if not given.
        shape: Shape of one sample (C, H, W), for a network that does not tell it.
        backbone: Network as in a config, class_path and init_args, for a checkpoint that Python code wrote.

    Raises:
        ValueError: If the checkpoint does not say which network or sampler it holds.
        RuntimeError: If what was written does not make the model's samples.
    """
    checkpoint = read_checkpoint(ckpt_path)
    told = checkpoint.get("hyper_parameters", {})
    description = without_files(backbone or told.get("backbone"))
    if description is None:
        raise ValueError(f"{ckpt_path} does not say which network it holds; give --backbone its class_path, init_args.")
    if told.get("segments", 1) > 1:
        raise ValueError(
            f"{ckpt_path} holds a model of {told['segments']} segments, whose steps an export does not have; sample it "
            "with sclightning predict."
        )
    if "times" not in told:
        raise ValueError(
            f"{ckpt_path} holds no consistency model, only those have a generator; export a student of it."
        )
    model = Generator(
        backbone=description,
        sigma_data=told["sigma_data"],
        times=told["times"],
        guidance_scale=told.get("guidance_scale") if guidance_scale is None else guidance_scale,
        shape=shape,
        provenance=checkpoint.get("provenance", []),
    ).eval()
    if getattr(model.backbone, "guidance", False) and model.config["guidance_scale"] is None:
        raise ValueError("The network has a guidance input and the checkpoint no scale for it; give --guidance_scale.")
    try:
        model.backbone.load_state_dict(backbone_weights(checkpoint))
    except RuntimeError as error:
        raise ValueError(
            f"The weights of {ckpt_path} are not those of {description['class_path']} with the given init_args; give "
            "--backbone as it was trained."
        ) from error

    noise, conditions = trial(model, 3)
    try:
        model.sample(noise, **conditions)
    except Exception as error:
        raise ValueError(
            f"The network of {ckpt_path} makes no samples of noise and class labels alone "
            f"({str(error).strip().partition(chr(10))[0]}), and only such networks are exported."
        ) from error
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    if sentence := notice(model.config["provenance"]):
        print(sentence)
    write = {"safetensors": save_safetensors, "diffusers": save_pipeline, "torch_export": save_program}
    for name in formats:
        difference = write[name](model, out)
        print(f"Wrote {name} to {out}; its samples differ from the model's by {difference:.1e} at most.")


def without_files(description: Any) -> Any:
    """A network's description with what its loaders read from disk left out or written in: it builds anywhere."""
    if not isinstance(description, dict):
        return description
    description = {key: without_files(value) for key, value in description.items()}
    if "class_path" not in description:
        return description
    loader, given = pkgutil.resolve_name(description["class_path"]), description.get("init_args", {})
    if loader is load_diffusers and not isinstance(given["folder"], dict):
        read = configs(given["folder"], given.get("scheduler"))
        given |= {"folder": read, "scheduler": None, "null_conditions": None}
    elif loader in WEIGHTS:
        given[WEIGHTS[loader]] = None
    return description


def save_safetensors(model: Generator, folder: Path) -> float:
    """Write ``config.json``, ``model.safetensors`` and ``README.md``; gives the largest difference of samples."""
    (folder / "README.md").unlink(missing_ok=True)  # the mixin would leave an old one
    model.save_pretrained(folder)
    written = Generator.from_pretrained(folder)
    noise, conditions = trial(model, 3)
    return compare("model.safetensors", written.sample(noise, **conditions), model.sample(noise, **conditions), 0)


def save_pipeline(model: Generator, folder: Path) -> float:
    """Write ``pipeline/`` for diffusers; gives the largest difference of samples."""
    from sclightning.pipeline import SCMNetwork, SCMPipeline, SCMScheduler

    folder = folder / "pipeline"
    network = SCMNetwork(**model.config)
    network.net.load_state_dict(model.backbone.state_dict())
    SCMPipeline(network, SCMScheduler(sigma_data=model.config["sigma_data"])).save_pretrained(folder)
    for file in (folder / "network").glob("*.safetensors"):
        save_file(load_file(file), file.with_suffix(".tmp"), metadata(model.config))
        file.with_suffix(".tmp").replace(file)  # not in place: what was loaded is a memory map of it
    # For ``DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)``.
    (folder / "pipeline.py").write_text("from sclightning.pipeline import SCMPipeline  # noqa: F401\n")
    (folder / "README.md").write_text(model_card(model.config, diffusers=True))

    pipeline = SCMPipeline.from_pretrained(folder, low_cpu_mem_usage=False)  # else it advises to install accelerate
    pipeline.set_progress_bar_config(disable=True)
    noise, conditions = trial(model, 3)
    samples = pipeline(class_labels=conditions.get("label"), noise=noise, output_type="latent").images
    return compare(str(folder), samples, model.sample(noise, **conditions), 0)


def save_program(model: Generator, folder: Path) -> float:
    """Write ``generator.pt2``, one step at any batch size it takes; gives the largest difference of samples."""
    noise, conditions = trial(model, 2, explicit=True)
    for largest in (None, 63):  # diffusers' U-Nets take another branch from 64 images on
        batch = torch.export.Dim("batch", min=1, max=largest)
        dynamic = {name: {0: batch} for name in ("noise", *conditions)}
        try:
            program = torch.export.export(model, (noise[0],), conditions, dynamic_shapes=dynamic)
            break
        except Exception as error:
            failure = error
    else:
        reason = str(failure).strip().partition("\n")[0]
        raise RuntimeError(
            f"torch.export cannot trace {type(model.backbone).__name__} ({reason}); leave it out of --formats."
        ) from failure
    path = folder / "generator.pt2"
    torch.export.save(program, path, extra_files={"config.json": json.dumps(model.config)})
    noise, conditions = trial(model, 3, explicit=True)
    samples = torch.export.load(path).module()(noise[0], **conditions)
    return compare(str(path), samples, model(noise[0], **conditions), TOLERANCE)


def trial(model: Generator, batch_size: int, explicit: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Noise (steps, B, C, H, W) and conditions to try a model on; ``explicit`` guidance is an input of its own."""
    config = model.config
    noise, conditions = sample_noise(range(batch_size), config["shape"], len(config["times"])), {}
    if classes := getattr(model.backbone, "num_classes", 0):
        conditions["label"] = torch.arange(batch_size) % classes
    if explicit and config["guidance_scale"] is not None:
        conditions["guidance"] = torch.linspace(1, config["guidance_scale"], batch_size)
    return noise, conditions


def compare(name: str, written: Tensor, expected: Tensor, tolerance: float) -> float:
    """Largest difference of samples.

    Raises:
        RuntimeError: If it exceeds ``tolerance`` times the largest value.
    """
    difference = (written - expected).abs().max().item()
    if not difference <= tolerance * expected.abs().max().item():
        raise RuntimeError(
            f"The samples of {name} differ from the model's by {difference:.1e}, so it is not to be used; report this "
            "with the checkpoint's config."
        )
    return difference


def metadata(config: dict[str, Any]) -> dict[str, str]:
    """Metadata of a safetensors file, which are strings."""
    return {"format": "pt", "provenance": json.dumps(config["provenance"])}


def model_card(config: dict[str, Any], diffusers: bool = False) -> str:
    """Model card in Markdown with the Hub's YAML head.

    Args:
        config: Arguments of :class:`Generator`.
        diffusers: Whether it is for the pipeline's folder.
    """
    provenance, steps = config["provenance"], len(config["times"])
    head: dict[str, Any] = {
        "library_name": "diffusers" if diffusers else "sclightning",
        "tags": ["consistency-model", "sCM", "few-step-generation"],
    }
    licences = sorted({record["licence"] for record in provenance if record.get("licence")}, key=is_non_commercial)
    if licences:
        head |= {"license": "other", "license_name": licences[-1]}
    loading = "from sclightning.export import Generator\n\nmodel = Generator.from_pretrained(folder)"
    if diffusers:
        loading = "from sclightning.pipeline import SCMPipeline\n\npipeline = SCMPipeline.from_pretrained(folder)"
    rows = "".join(
        f"| {' | '.join(record.get(key) or 'not recorded' for key in ('name', 'licence', 'sha256', 'source'))} |\n"
        for record in provenance
    )
    origin = f"\n| weights | licence | SHA-256 | source |\n|---|---|---|---|\n{rows}" if rows else "No other weights.\n"
    sentence = notice(provenance)
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# Consistency model\n\n"
        f"Continuous-time consistency model (sCM, https://arxiv.org/abs/2410.11081) of samples of shape "
        f"{tuple(config['shape'])}, made in {steps} network evaluation{'s' * (steps > 1)}.\n\n"
        f"```python\n{loading}\n```\n\n## Provenance\n\n"
        f"{f'**{sentence}**' if sentence else 'No licence that forbids commercial use is on record.'}\n\n"
        f"Made from: {origin}"
    )
