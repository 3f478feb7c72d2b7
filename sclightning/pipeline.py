"""A consistency model as a diffusers pipeline: our network, diffusers' ``SCMScheduler``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sclightning.checkpoint import build_backbone
from sclightning.trigflow import interpolate

try:
    from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SCMScheduler
    from diffusers.configuration_utils import register_to_config
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError("A diffusers pipeline needs diffusers; pip install 'sclightning[diffusers]'.") from error


class SCMNetwork(ModelMixin, ConfigMixin):
    """A backbone as diffusers saves and loads it, with what a sampler has to know about it.

    Args:
        backbone: Description of the network, ``{"class_path": …, "init_args": {…}}``.
        shape: Shape of one sample, (C, H, W).
        sigma_data: Standard deviation of the data.
        times: Sampling times in radians, decreasing.
        guidance_scale: Guidance scale in sampling, for a network with a guidance input.
        provenance: Records of the weights that these were made from, see :mod:`sclightning.provenance`.
    """

    @register_to_config
    def __init__(
        self,
        backbone: dict[str, Any],
        shape: Sequence[int],
        sigma_data: float,
        times: Sequence[float],
        guidance_scale: float | None = None,
        provenance: Sequence[dict[str, str | None]] = (),
    ):
        super().__init__()
        self.net = build_backbone(dict(backbone))  # "backbone" is the name of an entry of the config

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        """Velocity F, arguments as in a backbone's contract, in the dtype of ``x``."""
        conditions = {"label": label, "guidance": guidance}
        F = self.net(x.to(self.dtype), t, **{name: c for name, c in conditions.items() if c is not None})
        return F.to(x.dtype)


class SCMPipeline(DiffusionPipeline):
    """Samples in one or a few network evaluations, the same as :func:`sclightning.sampling.consistency` makes.

    Args:
        network: The consistency model.
        scheduler: Diffusers' scheduler, made with the network's ``sigma_data``.
    """

    def __init__(self, network: SCMNetwork, scheduler: SCMScheduler):
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)
        self.image_processor = VaeImageProcessor()

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Sequence[int] | Tensor | None = None,
        num_inference_steps: int | None = None,
        times: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Make samples.

        Args:
            batch_size: How many, where neither ``class_labels`` nor ``noise`` says it.
            class_labels: Class of each sample, -1 for none.
            num_inference_steps: Take only so many of the model's times.
            times: Times in radians, decreasing, in place of the model's.
            guidance_scale: Guidance scale in place of the model's.
            generator: Where the noise comes from; one, or one per sample.
            noise: Unit noise itself, shape (steps, B, C, H, W), as from :func:`sclightning.sampling.sample_noise`.
            output_type: ``pil``, ``np`` or ``pt`` for images in [0, 1], ``latent`` for the model's own range.
            return_dict: Whether to return an ``ImagePipelineOutput`` or a tuple.

        Raises:
            ValueError: If images are asked for from a model that makes none.
        """
        config, device = self.network.config, self._execution_device
        if output_type != "latent" and config.shape[0] not in (1, 3):
            raise ValueError(
                f"The model makes latents of shape {tuple(config.shape)}, no images; pass output_type='latent' and "
                "decode what you get."
            )
        times = list(config.times if times is None else times)[:num_inference_steps]
        if noise is not None:
            batch_size, noise = noise.shape[1], config.sigma_data * noise.to(device)
        elif class_labels is not None:
            batch_size = len(class_labels)
        label = None if class_labels is None else torch.as_tensor(class_labels, device=device)
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        guidance = None if scale is None else torch.full((batch_size,), scale, dtype=torch.float32, device=device)

        self.scheduler.set_timesteps(
            len(times), timesteps=[*times, 0.0], device=device, max_timesteps=None, intermediate_timesteps=None
        )
        self.scheduler.set_begin_index(0)
        if noise is None:
            shape = (batch_size, *config.shape)
            x = config.sigma_data * randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        else:
            x = noise[0]
        for step, t in enumerate(self.progress_bar(self.scheduler.timesteps[:-1]), start=1):
            F = self.network(x / config.sigma_data, t.expand(batch_size), label, guidance)
            x, x_0 = self.scheduler.step(config.sigma_data * F, t, x, generator=generator, return_dict=False)
            if noise is not None and step < len(times):  # the scheduler can only draw noise, not be given it
                x = interpolate(x_0, noise[step], self.scheduler.timesteps[step].expand(batch_size))
        images = self.image_processor.postprocess(x, output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
