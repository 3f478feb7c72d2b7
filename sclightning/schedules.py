r"""Learning-rate schedules of the paper (App. G): constant or falling as a power law, with EDM2's ramp."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class InverseSqrtLR(LRScheduler):
    r"""EDM2's schedule (Eq. 67 there): a linear ramp, then constant, then falling with the root of the step n.

    .. math:: \alpha(n) = \alpha_{ref}\,\frac{\min(n/n_{ramp},\, 1)}{\sqrt{\max(n/t_{ref},\, 1)}}

    Args:
        optimizer: Optimizer; its learning rate is :math:`\alpha_{ref}`.
        t_ref: Steps after which the learning rate falls; it stays constant if not given.
        ramp_steps: Steps of the linear rise from zero. EDM and EDM2 give 10 million images: 10^7 over the batch.
        last_epoch: Step to continue from.

    Raises:
        ValueError: If ``t_ref`` or ``ramp_steps`` is negative, or ``t_ref`` zero.
    """

    def __init__(self, optimizer: Optimizer, t_ref: float | None = None, ramp_steps: int = 0, last_epoch: int = -1):
        if (t_ref is not None and t_ref <= 0) or ramp_steps < 0:
            raise ValueError(
                f"The schedule has t_ref={t_ref} and ramp_steps={ramp_steps}; t_ref must be above 0 (or left out for a "
                "constant rate) and ramp_steps 0 or above."
            )
        self.t_ref, self.ramp_steps = t_ref, ramp_steps
        super().__init__(optimizer, last_epoch)

    def factor(self, step: int) -> float:
        """Multiple of the reference rate at a step, counted from 0."""
        factor = 1.0 if self.t_ref is None else max(step / self.t_ref, 1.0) ** -0.5
        return factor * min(step / self.ramp_steps, 1.0) if self.ramp_steps else factor

    def get_lr(self) -> list[float]:
        """Rates of the parameter groups at this step, a function of the step alone."""
        return [rate * self.factor(self.last_epoch) for rate in self.base_lrs]
