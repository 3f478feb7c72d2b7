"""Models that diffusers saved, as TrigFlow velocities: the network's folder and its scheduler's config."""

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sclightning.adapters.operators import enable_forward_ad
from sclightning.adapters.process import EDM, FlowMatching, VariancePreserving
from sclightning.adapters.velocity import Prediction, VelocityAdapter
from sclightning.adapters.weights import provenance, read_state_dict

PREDICTIONS: dict[str, Prediction] = {"epsilon": "noise", "sample": "data", "v_prediction": "v"}
PARTS = ("unet", "transformer")

FLOW_MODELS = ("DiTTransformer2DModel", "SD3Transformer2DModel", "UNet2DConditionModel", "UNet2DModel")
"""Networks that are shown the scheduler's steps, 0 to 1000, as they are."""


class DiffusersNetwork(nn.Module):
    """A model of diffusers that takes images, ``timestep`` and conditions, called as adapters call.

    Of an output with more channels than the images (a learned variance), the first are the prediction.

    Args:
        model: UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel, SD3Transformer2DModel or one like these.
        null_label: Class that stands for "no label".
        null_conditions: Conditions of one row that stand for "no label" otherwise: an empty prompt's embeddings.
    """

    def __init__(
        self, model: nn.Module, null_label: int | None = None, null_conditions: Mapping[str, Tensor] | None = None
    ):
        super().__init__()
        self.model, self.null_label = model, null_label
        self.null_names = list(null_conditions or {})
        for name, value in (null_conditions or {}).items():
            self.register_buffer(f"null_{name}", value, persistent=False)
        self._accepted = list(inspect.signature(model.forward).parameters)
        config = model.config
        self.in_channels, self.resolution = config.in_channels, config.get("sample_size")
        classes = config.get("num_embeds_ada_norm") or config.get("num_class_embeds") or 0
        self.num_classes = classes if "class_labels" in self._accepted else 0

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        label: Tensor | Mapping[str, Tensor] | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The model's prediction, shape of ``x``.

        Args:
            x: Noisy images in the model's own scale, shape (B, C, H, W).
            time: The model's own time, shape (B,).
            label: Class labels, int64 (B,), -1 for none; or the model's own conditions by their names.
            guidance: Guidance scale per sample, shape (B,), for a model that has an input for it.
        """
        conditions = self._conditions(x, label)
        if guidance is not None:
            conditions["guidance"] = guidance
        unknown = [name for name in conditions if name not in self._accepted]
        if unknown:
            raise ValueError(
                f"{type(self.model).__name__} takes no {unknown[0]}; its conditions are the keyword arguments of its "
                "forward."
            )
        if "class_labels" in conditions and getattr(self.model, "class_embedding", self) is None:
            raise ValueError(
                f"{type(self.model).__name__} was made without labels (num_class_embeds), but labels were given; use "
                "data without."
            )
        conditions = tree_map_only(Tensor, lambda v: v.to(x.dtype) if v.is_floating_point() else v, conditions)
        return self.model(x, timestep=time, **conditions, return_dict=False)[0][:, : x.shape[1]]

    def _conditions(self, x: Tensor, label: Tensor | Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        if isinstance(label, Mapping):
            return dict(label)
        if self.null_names and label is None:
            rows = {name: getattr(self, f"null_{name}") for name in self.null_names}
            return {name: row.expand(x.shape[0], *row.shape[1:]) for name, row in rows.items()}
        if self.null_label is not None:
            none = torch.full((x.shape[0],), self.null_label, device=x.device)  # len(x) would be traced as a constant
            return {"class_labels": none if label is None else torch.where(label < 0, none, label)}
        return {} if label is None else {"class_labels": label}


def load_diffusers(
    folder: str | dict[str, Any],
    sigma_data: float,
    scheduler: str | None = None,
    null_label: int | None = None,
    null_conditions: str | None = None,
    time_scale: float = 1.0,
    student: bool = False,
    licence: str | None = None,
) -> VelocityAdapter:
    """Make a teacher, or a student's first state, of a model that diffusers saved.

    The scheduler says what the network predicts and along which process: DDPM, DDIM and their kin by their betas, flow
    matching, or EDM. The way they step does not matter here.

    Args:
        folder: A pipeline's folder (``unet`` or ``transformer`` and ``scheduler`` in it), or the model's own. What
            ``configs`` read of it gives the network without its weights, for those of an export.
        sigma_data: Standard deviation of the data as the network saw them: about 0.5 for images in [-1, 1], about 1 for
            latents times their ``scaling_factor``.
        scheduler: The scheduler's folder; ``folder/scheduler`` if not given.
        null_label: Class that stands for "no label"; known for DiT.
        null_conditions: ``.safetensors`` file with the conditions of an empty prompt, one row each, by their names.
        time_scale: Factor on the time that the network is shown. With anything but 1 it has to be trained on.
        student: Make it differentiable forwards (:func:`~sclightning.adapters.enable_forward_ad`) and put it into
            training mode.
        licence: Licence of the weights; the model card's if not given and there is one.

    Raises:
        ImportError: If diffusers is not installed.
        FileNotFoundError: If a config is missing.
        ValueError: If the scheduler or the network's time embedding cannot be used.
    """
    try:
        import diffusers
    except ImportError:
        raise ImportError(
            "A model of diffusers needs diffusers, which is not installed: pip install 'sclightning[diffusers]'."
        ) from None
    source = {}
    if isinstance(folder, dict):
        model = _named(diffusers, folder["model"]).from_config(folder["model"])
    else:
        path, folder = _model_folder(folder), configs(folder, scheduler)
        model = _named(diffusers, folder["model"]).from_pretrained(path, local_files_only=True, low_cpu_mem_usage=False)
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        root = path.parent if path.name in PARTS else path
        source = provenance(files, root.resolve().name, licence or _licence(root)) | {"source": str(root)}
    process, prediction = _process(diffusers, folder["scheduler"], sigma_data, time_scale)
    if isinstance(process, FlowMatching) and folder["model"]["_class_name"] not in FLOW_MODELS:
        raise ValueError(
            f"How a {folder['model']['_class_name']} takes the time of flow matching is not known here (some multiply "
            "it by 1000 themselves); wrap it in sclightning.adapters.VelocityAdapter with FlowMatching(time_scale=…)."
        )
    if model.config.get("time_embedding_type") == "learned":
        raise ValueError(
            f"This {type(model).__name__} looks its time up in a table (time_embedding_type: learned), which has no "
            "value between two steps; use a model with a positional embedding."
        )
    if type(model).__name__ == "DiTTransformer2DModel" and null_label is None:
        null_label = model.config.num_embeds_ada_norm
    for module in model.modules():
        if type(module).__name__ == "LabelEmbedding":
            module.dropout_prob = 0.0  # in training mode it would drop labels on its own, in each block other ones
    if student:
        enable_forward_ad(model).train()
    network = DiffusersNetwork(model, null_label, read_state_dict(null_conditions) if null_conditions else None)
    return VelocityAdapter(network, process, prediction, sigma_data, source)


def configs(folder: str, scheduler: str | None = None) -> dict[str, Any]:
    """The configs of a saved model and its scheduler, all that :func:`load_diffusers` needs for its architecture.

    Args:
        folder: A pipeline's folder, or the model's own.
        scheduler: The scheduler's folder; ``folder/scheduler`` if not given.

    Raises:
        FileNotFoundError: If a config is missing.
    """
    path = _model_folder(folder)
    schedule = Path(scheduler) if scheduler else Path(folder) / "scheduler"
    if not (schedule / "scheduler_config.json").is_file():
        raise FileNotFoundError(
            f"There is no scheduler_config.json in {schedule}; give the folder of the scheduler that the model was "
            "trained with as scheduler."
        )
    files = {"model": path / "config.json", "scheduler": schedule / "scheduler_config.json"}
    read = {part: json.loads(file.read_text()) for part, file in files.items()}
    return {part: {k: v for k, v in config.items() if k != "_name_or_path"} for part, config in read.items()}


def _model_folder(folder: str) -> Path:
    root = Path(folder)
    path = next((p for p in (root, *(root / part for part in PARTS)) if (p / "config.json").is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"There is no model of diffusers at {folder}; give the folder that save_pretrained wrote, which holds "
            "config.json or a folder unet or transformer."
        )
    return path


def _named(diffusers, config: dict[str, Any]) -> type:
    return getattr(diffusers, config["_class_name"])


def _process(diffusers, config: dict, sigma_data: float, time_scale: float) -> tuple[nn.Module, Prediction]:
    """Process and prediction of a scheduler's config."""
    name, kind = config["_class_name"], config.get("prediction_type", "epsilon")
    if "FlowMatch" in name or kind == "flow_prediction" or config.get("use_flow_sigmas"):
        return FlowMatching(time_scale * config.get("num_train_timesteps", 1000)), "flow"
    scheduler = _named(diffusers, config).from_config(config)
    if name.startswith("EDM"):
        if scheduler.config.sigma_data != sigma_data:
            raise ValueError(
                f"The {name} of the model has sigma_data={scheduler.config.sigma_data}, and sigma_data={sigma_data} "
                "was given; give the scheduler's."
            )
        return EDM(time_scale), "edm" if kind == "epsilon" else "trigflow"
    continuous = config.get("timestep_type") == "continuous"  # shown as log(sigma)/4, not as a step
    if continuous or not hasattr(scheduler, "alphas_cumprod") or kind not in PREDICTIONS:
        raise ValueError(
            f"The scheduler is a {name} with prediction_type {kind}, which no adapter knows; wrap the "
            "network in sclightning.adapters.VelocityAdapter with a process of yours."
        )
    return VariancePreserving(scheduler.alphas_cumprod.tolist(), time_scale), PREDICTIONS[kind]


def _licence(folder: Path) -> str | None:
    """The licence in the front matter of a model card; its name where the Hub knows it as "other" only."""
    card = folder / "README.md"
    found = re.search(r"\A---\n(.*?)^---", card.read_text(), re.M | re.S) if card.is_file() else None
    head = yaml.safe_load(found.group(1)) if found else {}
    licence = head.get("license_name") if head.get("license") in ("other", None) else None
    licence = licence or head.get("license")
    return None if licence is None else str(licence)
