r"""Guided velocities: classifier-free guidance, only in an interval of noise levels, or by a second, weaker network.

Sources: Ho & Salimans 2207.12598; Kynkäänniemi et al. 2404.07724 (interval); Karras et al. 2406.02507 (autoguidance).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def guided_velocity(
    network: Callable,
    x: Tensor,
    t: Tensor,
    label: Tensor | Mapping[str, Tensor] | None,
    scale: Tensor | float,
    interval: tuple[float, float] | None = None,
    guide: Callable | None = None,
    guide_label: bool = True,
) -> Tensor:
    r"""Guidance :math:`F_0 + s\,(F - F_0)`; s = 1 is none.

    :math:`F_0` is the same network without label (classifier-free guidance), or a second network (autoguidance).

    Args:
        network: ``F(x, t, label=...)``; trained with dropped labels if there is no guide.
        x: Noisy images of unit variance, shape (B, C, H, W).
        t: Times in radians, shape (B,).
        label: Class labels, int64 (B,), or other conditions; "no label" is -1 for the former, their absence for the
            latter.
        scale: Guidance scale s, one number or shape (B,).
        interval: Times in radians between which guidance acts, lower end excluded; everywhere if not given.
        guide: Second network, a worse version of the first.
        guide_label: Whether the guide is given the label; EDM2's unconditional guides are not.

    Raises:
        ValueError: If there is neither a label to drop nor a guide.
    """
    scale = scale.to(t.dtype) if isinstance(scale, Tensor) else torch.full_like(t, scale)
    if interval is not None:
        scale = torch.where((t > interval[0]) & (t <= interval[1]), scale, torch.ones_like(scale))
    condition = {} if label is None else {"label": label}
    if guide is not None:
        F_0 = guide(x, t, **condition if guide_label else {})
    elif isinstance(label, Tensor):
        F_0 = network(x, t, label=torch.full_like(label, -1))
    elif label is not None:
        F_0 = network(x, t)
    else:
        raise ValueError("Classifier-free guidance needs labels to leave out; give labels, or guide by a network.")
    F = network(x, t, **condition)
    return F_0 + scale.view(-1, *[1] * (x.ndim - 1)) * (F - F_0)


class Guided(nn.Module):
    r"""A network behind guidance: a teacher that is distilled, or sampled from, as it is best used.

    Its scale is the ``guidance`` that it is called with, one per sample, for a student that is told the scale; without
    it, ``scale``, for a student of that scale alone.

    Args:
        network: ``F = net(x, t, label=None)``.
        scale: Guidance scale where none is given in the call.
        interval: Times in radians between which guidance acts, lower end excluded; a noise level σ is at
            :math:`t = \arctan(\sigma/\sigma_d)`. Everywhere if not given.
        guide: Second network, frozen; the network without label if not given.
        guide_label: Whether the guide is given the label.

    Raises:
        ValueError: If the interval is empty.
    """

    def __init__(
        self,
        network: nn.Module,
        scale: float | None = None,
        interval: tuple[float, float] | None = None,
        guide: nn.Module | None = None,
        guide_label: bool = True,
    ):
        super().__init__()
        if interval is not None and not interval[0] < interval[1]:
            raise ValueError(f"The guidance interval {tuple(interval)} is empty; give (lower, upper) in radians.")
        self.network, self.scale, self.interval = network, scale, interval
        self.guide = None if guide is None else guide.eval().requires_grad_(False)
        self.guide_label = guide_label

    def forward(
        self, x: Tensor, t: Tensor, label: Tensor | Mapping[str, Tensor] | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        """Guided velocity, shape of ``x``.

        Args:
            x: Noisy images of unit variance, shape (B, C, H, W).
            t: Times in radians, shape (B,).
            label: Class labels, int64 (B,), or other conditions.
            guidance: Guidance scale per sample, shape (B,).
        """
        scale = self.scale if guidance is None else guidance
        if scale is None:
            raise ValueError("Guided has no scale; set its scale, or the module's guidance_range or guidance_scale.")
        return guided_velocity(self.network, x, t, label, scale, self.interval, self.guide, self.guide_label)
