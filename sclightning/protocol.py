"""Which samples a test makes: seeds, guidance scales, numbers of steps, or a search for the intermediate time."""

import math
from collections.abc import Generator, Sequence
from itertools import product
from typing import Any, NamedTuple

GOLDEN = (math.sqrt(5) - 1) / 2


class Setting(NamedTuple):
    """How one set of samples is made; names of a module's attributes."""

    times: list[float] | None
    """Sampling times in radians; none for a diffusion model, which has its solver."""
    guidance_scale: float | None
    seed: int


def grid(
    times: Sequence[list[float] | None], guidance_scales: Sequence[float | None], seeds: Sequence[int]
) -> list[Setting]:
    """Every combination, seeds innermost."""
    return [Setting(*setting) for setting in product(times, guidance_scales, seeds)]


def golden_section(low: float, high: float, evaluations: int) -> Generator[float, float, None]:
    """Search for a minimum (Kiefer 1953): yields where to evaluate and wants the value sent back.

    Args:
        low: Lower end of the interval.
        high: Upper end of the interval.
        evaluations: How many; the interval in which the minimum lies shrinks by 0.618 with each after the first.
    """
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    f_left = yield left
    f_right = yield right
    for _ in range(evaluations - 2):
        if f_left < f_right:
            high, right, f_right = right, left, f_left
            left = high - GOLDEN * (high - low)
            f_left = yield left
        else:
            low, left, f_left = left, right, f_right
            right = low + GOLDEN * (high - low)
            f_right = yield right


def golden_evaluations(low: float, high: float, tolerance: float) -> int:
    """Evaluations after which the interval is no longer than ``tolerance``."""
    return max(2, 1 + math.ceil(math.log(tolerance / (high - low)) / math.log(GOLDEN)))


def least_of_seeds(runs: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Of the runs that differ in nothing but the seed, the one of the least ``key``, as papers report it."""
    best: dict[tuple, dict[str, Any]] = {}
    for run in runs:
        setting = (run["nfe"], tuple(run["times"] or ()), run["guidance_scale"])
        if setting not in best or run[key] < best[setting][key]:
            best[setting] = run
    return list(best.values())
