r"""Multi-step consistency models: the arc in M segments, a consistency function in each (Heek et al. 2024).

From a time t in the segment :math:`(t_k, t_{k+1}]` the function leads along the PF-ODE to the segment's start,

.. math:: f(x_t, t) = \cos u\,x_t - \sin u\,\sigma_d F(x_t/\sigma_d, t), \qquad u = t - t_k,
   \qquad t_k = \tfrac kM t_{max},

which for M = 1 is Eq. 5. The tangent is Eq. 6 with u in place of t around the same network, and sampling takes M steps,
without fresh noise. The paper gives results of it for M up to 16 and no details; equal segments are ours.
"""

from torch import Tensor

from sclightning.sampling import T_MAX


def segment_index(t: Tensor, segments: int, t_max: float = T_MAX) -> Tensor:
    """Index k of the segment that each time is in, int64, shape of ``t``; a boundary belongs to the segment below it.

    Args:
        t: Times in radians; those above ``t_max`` are in the last segment.
        segments: Number of segments M.
        t_max: End of the last segment in radians.
    """
    # The sampler is at boundaries, which float32 rounds to either side.
    return ((t.detach() * (segments / t_max) - 1e-4).ceil().long() - 1).clamp(0, segments - 1)


def segment_start(t: Tensor, segments: int, t_max: float = T_MAX) -> Tensor:
    """Start :math:`t_k` of the segment that each time is in, shape and dtype of ``t``. Arguments as above."""
    return segment_index(t, segments, t_max).to(t.dtype) * (t_max / segments)


def segment_times(segments: int, t_max: float = T_MAX) -> list[float]:
    """Times of the sampler, the segments' ends in radians, decreasing, length M.

    Raises:
        ValueError: If there is no segment.
    """
    if segments < 1:
        raise ValueError(f"There are segments={segments}; give 1 or more.")
    return [t_max * k / segments for k in range(segments, 0, -1)]
