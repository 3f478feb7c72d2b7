"""Multi-step sCD: the arc in segments, one step of sampling for each."""

from typing import Any

from torch import Tensor, nn

from sclightning.modules.consistency import ConsistencyDistillation
from sclightning.sampling import ddim
from sclightning.segments import segment_start, segment_times


class MultistepConsistencyDistillation(ConsistencyDistillation):
    r"""sCD in M segments: trajectories end at their segment's start (:mod:`sclightning.segments`); M = 1 is sCD.

    A sample takes one step for each segment and no fresh noise; fewer steps would not reach the data.

    Args:
        backbone: Network ``F = net(x, t, label=None, guidance=None)``, ours with as many ``segments``. Another is told
            the segment by t alone, and a smooth one is blurred where two of them meet.
        segments: Number of segments M; the paper reports 2 to 16.
        options: The others of :class:`~sclightning.modules.consistency.ConsistencyDistillation` but ``times``.

    Raises:
        ValueError: If the network was made with another number of segments.
    """

    def __init__(self, backbone: nn.Module, segments: int = 2, **options: Any):
        super().__init__(backbone, times=segment_times(segments), **options)
        self.hparams.pop("times", None)  # they follow from the segments
        self.segments = segments
        told = getattr(backbone, "segments", None)
        if told not in (None, segments):
            raise ValueError(
                f"The model has segments={segments} and its network was made with segments={told}; give "
                "model.init_args.segments and model.init_args.backbone.init_args.segments the same number."
            )

    def start_time(self, t: Tensor) -> Tensor:
        """Start of the segment that each of the times ``t`` is in, shape (B,)."""
        return segment_start(t, self.segments)

    _noise_draws = 1

    def sampler(self, noise: Tensor, label: Tensor | None) -> Tensor:
        """From each segment's end to its start, from unit noise (1, B, C, H, W).

        Raises:
            ValueError: If ``times`` are no longer those of the segments.
        """
        if self.times != segment_times(self.segments):
            raise ValueError(
                f"A model of {self.segments} segments takes the {self.segments} steps of its segments and no others; "
                "leave steps and search of the evaluation out (--evaluation.steps=null)."
            )
        return ddim(self._conditioned(noise, label), noise[0], [*self.times, 0.0], self.sigma_data)
