"""Fig. 5b: adaptive weighting on and off, each with the L2 and the RMS norm in the tangent's normalisation.

The paper writes ‖·‖ and leaves open which norm it is. Off means w_φ = 0: the loss is the plain mean square.

Usage: python benchmarks/figures/fig5b.py [--scale full] [--seeds 0 1 2] [--plot]
"""

from collections.abc import Sequence

import common
import torch
from torch import Tensor, nn

NORMS = {"l2": "L2", "rms": "RMS"}


class NoWeight(nn.Module):
    """w_φ = 0."""

    def forward(self, t: Tensor) -> Tensor:
        """Zero for each time (B,)."""
        return torch.zeros_like(t)


def unweighted(cli):
    cli.model.adaptive_weight = NoWeight()


WEIGHTINGS = {"on": None, "off": unweighted}


def trained(scale: str, seed: int, norm: str, weighting: str) -> dict:
    """Distances at every checkpoint."""
    run = common.student("scd", scale, seed, WEIGHTINGS[weighting], normalization=norm)
    return {"seed": seed, **common.curve(run), "run": run.record}


def compute(scale: str, seeds: Sequence[int]) -> dict:
    """Train a student per norm, weighting and seed, measure every checkpoint."""
    teacher = common.fit("teacher", scale)
    settings = [(norm, weighting) for norm in NORMS for weighting in WEIGHTINGS]
    norms = {norm: {} for norm in NORMS}
    for (norm, weighting), entry in zip(settings, common.each_setting(trained, scale, seeds, settings), strict=True):
        norms[norm][weighting] = entry
    return {"norms": norms, **common.references(teacher)}


def plot(result: dict, figure) -> None:
    """Distance over iterations, one panel a norm; thin lines are seeds."""
    figure.set_size_inches(7.2, 2.6)
    for axes, (norm, weightings) in zip(figure.subplots(1, 2, sharey=True), result["norms"].items(), strict=True):
        for weighting, colour in (("on", "C0"), ("off", "C1")):
            for i, seed in enumerate(weightings[weighting]):
                for nfe, style in ((1, "-"), (2, ":")):
                    name = None if i else f"weighting {weighting}, {nfe}-step"
                    axes.plot(seed["steps"], seed[f"fd_{nfe}step"], colour, ls=style, lw=1, marker=".", label=name)
        axes.axhline(result["teacher"]["fd"], color="grey", ls="--", label="teacher (35 evaluations)")
        axes.set(title=f"{NORMS[norm]} norm", xlabel="iterations", yscale="log")
        axes.set_ylabel(common.DISTANCE if norm == "l2" else "")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")


def rows(result: dict) -> list[str]:
    """Distances of one and two steps at the end, by seed."""
    table = [
        common.seeds_row(f"{NORMS[norm]}, weighting {weighting}", seeds)
        for norm, weightings in result["norms"].items()
        for weighting, seeds in weightings.items()
    ]
    return table + common.reference_rows(result)


if __name__ == "__main__":
    common.main("fig5b", __doc__, compute, plot, rows)
