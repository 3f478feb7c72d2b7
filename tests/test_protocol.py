"""Settings in order, golden section against SciPy's, the least of the seeds."""

import itertools

import pytest
from scipy.optimize import minimize_scalar

from sclightning.protocol import Setting, golden_evaluations, golden_section, grid, least_of_seeds


def test_grid_has_every_combination_with_seeds_innermost():
    """Three options make eight settings."""
    settings = grid([[1.5], [1.5, 1.1]], [1.0, 1.2], [0, 1])
    assert settings == [Setting(*s) for s in itertools.product(([1.5], [1.5, 1.1]), (1.0, 1.2), (0, 1))]
    assert grid([None], [None], [3]) == [Setting(None, None, 3)]


def search(f, low, high, tolerance):
    """All (time, value) of a search, in order."""
    n = golden_evaluations(low, high, tolerance)
    found, plan, value = [], golden_section(low, high, n), None
    for _ in range(n):
        time = plan.send(value)
        value = f(time)
        found.append((time, value))
    with pytest.raises(StopIteration):
        plan.send(value)
    return found


@pytest.mark.parametrize("minimum", [0.41, 0.9, 1.1, 1.39])
@pytest.mark.parametrize("tolerance", [0.1, 0.003])
def test_golden_section_finds_scipys_minimum(minimum, tolerance):
    """A lopsided valley: within the tolerance, and all inside the interval."""

    def f(t):
        return abs(t - minimum) ** 1.5 + 0.2 * max(t - minimum, 0)

    found = search(f, 0.4, 1.4, tolerance)
    expected = minimize_scalar(f, bracket=(0.4, minimum, 1.4), method="golden", options={"xtol": 1e-9}).x
    best = min(found, key=lambda pair: pair[1])[0]
    assert abs(best - expected) <= tolerance and abs(expected - minimum) < 1e-6
    assert all(0.4 <= t <= 1.4 for t, _ in found) and len({t for t, _ in found}) == len(found)


def test_golden_section_needs_as_many_evaluations_as_promised():
    """0.618^(n-1) of the interval is the tolerance or less, 0.618^(n-2) is more."""
    for tolerance in (0.5, 0.1, 0.02, 1e-4):
        n = golden_evaluations(0.4, 1.4, tolerance)
        assert 0.6180339887 ** (n - 1) <= tolerance < 0.6180339888 ** (n - 2)
    assert golden_evaluations(0.4, 1.4, 5.0) == 2


def test_least_of_seeds():
    """One run for each setting: the seed of the least distance, and nothing mixed between settings."""
    runs = [
        {"nfe": len(times or [0] * 63), "times": times, "guidance_scale": scale, "seed": seed, "fid": fid}
        for times, scale, fids in (([1.5], 1.0, (3.0, 2.0, 4.0)), ([1.5, 1.1], 1.0, (2.5, 1.5, 1.9)))
        for seed, fid in enumerate(fids)
    ]
    runs += [{"nfe": 1, "times": [1.5], "guidance_scale": 1.5, "seed": 0, "fid": 9.0}]
    runs += [{"nfe": 63, "times": None, "guidance_scale": None, "seed": 2, "fid": 1.0}]
    assert [(run["fid"], run["seed"]) for run in least_of_seeds(runs, "fid")] == [
        (2.0, 1),
        (1.5, 1),
        (9.0, 0),
        (1.0, 2),
    ]
