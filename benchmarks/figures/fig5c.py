"""Fig. 5c: discrete-time sCD on grids of N steps against continuous time, distance of one step.

The same teacher, warm-up, normalisation, adaptive weight and number of images for all; a discrete step takes a second
evaluation of the student in place of the JVP (App. E, Alg. 2).

Usage: python benchmarks/figures/fig5c.py [--scale full] [--seeds 0 1 2] [--plot]
"""

from collections.abc import Sequence

import common

GRIDS = (16, 64, 256, 1024, 4096)
"""The paper's 256 and up, and two coarser ones."""
DISCRETE = "sclightning.modules.DiscreteConsistencyDistillation"


def trained(scale: str, seed: int, N: int | None) -> dict:
    """Distances of a student of N steps, or in continuous time."""
    grid = {} if N is None else {"class_path": DISCRETE, "N": N}
    run = common.student("scd", scale, seed, **grid, normalization="l2")
    return {"seed": seed, **common.distances(run), "run": run.record}


def compute(scale: str, seeds: Sequence[int]) -> dict:
    """Train a student per grid and seed, and those in continuous time."""
    teacher = common.fit("teacher", scale)
    continuous, *discrete = common.each_setting(trained, scale, seeds, [(N,) for N in (None, *GRIDS)])
    result = {"discrete": dict(zip(map(str, GRIDS), discrete, strict=True)), "continuous": continuous}
    return result | common.references(teacher)


def plot(result: dict, figure) -> None:
    """Distance of one step over N; thin lines are seeds."""
    figure.set_size_inches(4, 2.8)
    axes = figure.subplots()
    for i, continuous in enumerate(result["continuous"]):
        y = [seeds[i]["fd_1step"] for seeds in result["discrete"].values()]
        axes.plot([*map(int, result["discrete"])], y, "C1", marker="o", lw=1, label=None if i else "discrete time")
        axes.axhline(continuous["fd_1step"], color="C0", lw=1, label=None if i else "continuous time")
    axes.axhline(result["teacher"]["fd"], color="grey", ls="--", label="teacher (35 evaluations)")
    axes.set(xlabel="N", ylabel=common.DISTANCE, title="1-step", xscale="log", yscale="log")
    axes.set_xticks([*map(int, result["discrete"])], [*result["discrete"]])
    axes.set_xticks([], minor=True)
    axes.legend()


def rows(result: dict) -> list[str]:
    """Distances of one and two steps, by seed."""
    table = [common.seeds_row(f"N = {N}", seeds) for N, seeds in result["discrete"].items()]
    return [*table, common.seeds_row("continuous", result["continuous"]), *common.reference_rows(result)]


if __name__ == "__main__":
    common.main("fig5c", __doc__, compute, plot, rows)
