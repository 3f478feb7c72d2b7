"""Fig. 5a: raw, clipped and normalised tangents, distance of one and two steps over the training of sCD.

Raw is df/dt as it comes, clipped is clip(df/dt, -1, 1), normalised is g / (‖g‖ + 0.1) with the L2 norm of a sample; the
paper does not say which norm (Fig. 5b has the other). Each tangent has the learning rate, of three, that is best for it
on a seed that is not reported, since what suits one need not suit another.

Usage: python benchmarks/figures/fig5a.py [--scale full] [--seeds 0 1 2] [--plot]
"""

import math
from collections.abc import Sequence

import common

TANGENTS = {"raw": "none", "clipped": "clip", "normalised": "l2"}
RATES = (0.5, 1, 2)  # times the config's
SEARCH_SEED = 100


def student(scale: str, seed: int, normalization: str, rate: float) -> common.Run:
    """An sCD with one tangent at one learning rate."""
    rates = {"optimizer__init_args__lr": rate, "lr_scheduler__init_args__max_lr": rate}
    return common.student("scd", scale, seed, normalization=normalization, **rates)


def searched(scale: str, normalization: str, rate: float) -> dict:
    """Distances at a learning rate."""
    return {"rate": rate, **common.distances(student(scale, SEARCH_SEED, normalization, rate))}


def mean_log(entry: dict) -> float:
    """What learning rates are compared by: the mean logarithm of the distances of one and two steps."""
    values = [entry["fd_1step"], entry["fd_2step"]]
    return math.inf if None in values else sum(map(math.log, values)) / 2


def trained(scale: str, seed: int, normalization: str, rate: float) -> dict:
    """Distances at every checkpoint, and how jumpy the tangent was."""
    run = student(scale, seed, normalization, rate)
    return {"seed": seed, **common.curve(run), "tangent_norm": common.spread(run), "run": run.record}


def compute(scale: str, seeds: Sequence[int]) -> dict:
    """Search a learning rate per tangent, train a student per tangent and seed, measure every checkpoint."""
    teacher = common.fit("teacher", scale)
    config = common.read("scd", scale)["model"]["init_args"]
    rates = [factor * float(config["optimizer"]["init_args"]["lr"]) for factor in RATES]
    found = iter(common.each(searched, [(scale, n, rate) for n in TANGENTS.values() for rate in rates]))
    search = {name: sorted((next(found) for _ in rates), key=mean_log) for name in TANGENTS}
    settings = [(n, search[name][0]["rate"]) for name, n in TANGENTS.items()]
    entries = zip(TANGENTS, common.each_setting(trained, scale, seeds, settings), strict=True)
    tangents = {name: {"search": search[name], "seeds": entry} for name, entry in entries}
    return {"tangents": tangents, **common.references(teacher)}


def plot(result: dict, figure) -> None:
    """Distance over iterations, one panel for each number of steps; thin lines are seeds."""
    figure.set_size_inches(7.2, 2.6)
    for axes, nfe in zip(figure.subplots(1, 2, sharey=True), (1, 2), strict=True):
        for colour, (name, entry) in zip(("C3", "C1", "C0"), result["tangents"].items(), strict=True):
            for i, seed in enumerate(entry["seeds"]):
                axes.plot(seed["steps"], seed[f"fd_{nfe}step"], colour, lw=1, marker=".", label=None if i else name)
        axes.axhline(result["teacher"]["fd"], color="grey", ls="--", label="teacher (35 evaluations)")
        axes.set(title=f"{nfe}-step", xlabel="iterations", yscale="log", ylabel=common.DISTANCE if nfe == 1 else "")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")


def rows(result: dict) -> list[str]:
    """Distances of one and two steps at the end, by seed."""
    table = [
        common.seeds_row(f"{name}, rate {entry['search'][0]['rate']:g}", entry["seeds"])
        for name, entry in result["tangents"].items()
    ]
    return table + common.reference_rows(result)


if __name__ == "__main__":
    common.main("fig5a", __doc__, compute, plot, rows)
