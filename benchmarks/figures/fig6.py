"""Fig. 6 in small: distance of students of three sizes, and its ratio to the teacher's of the same size.

Usage: python benchmarks/figures/fig6.py [--scale full] [--plot]
"""

from collections.abc import Sequence

import common
import torch
from torch.utils.flop_counter import FlopCounterMode

SIZES = {
    "medium": [{"channels": 8}, {"channels": 16}, {"channels": 32}],
    "full": [{"channels": 32, "head_channels": 32}, {"channels": 64}, {"channels": 96, "head_channels": 96}],
}


def flops(run: common.Run) -> int:
    """Floating point operations of one forward pass of one image, multiply and add counted apart."""
    shape = run.cli.datamodule.image_shape
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run.cli.model.backbone(torch.zeros(1, *shape), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    return counter.get_total_flops()


def teacher(scale: str, network: dict) -> common.Run:
    """The teacher of a size."""
    return common.fit("teacher", scale, **network)


def measured(scale: str, network: dict) -> dict:
    """Size and distance of a teacher."""
    run = teacher(scale, network)
    return {"parameters": common.parameters(run), "flops": flops(run), "teacher": common.measure(run)[0]["fd"]}


def student(scale: str, network: dict, kind: str) -> dict:
    """Distances of a student of a size."""
    run = common.fit(kind, scale, **network, teacher_checkpoint=teacher(scale, network).checkpoint)
    return common.distances(run) | {"run": run.record}


def compute(scale: str, seeds: Sequence[int]) -> dict:
    """A teacher, an sCD and an sCT of each size."""
    shared = common.fit("teacher", scale)
    networks = [{f"backbone__{name}": value for name, value in size.items()} for size in SIZES[scale]]
    teachers = common.each(measured, [(scale, network) for network in networks])
    students = common.each(student, [(scale, network, kind) for network in networks for kind in ("scd", "sct")])
    sizes = [
        size | found | {"scd": scd, "sct": sct}
        for size, found, scd, sct in zip(SIZES[scale], teachers, students[::2], students[1::2], strict=True)
    ]
    data_and_device = [common.label(shared).split(", ")[i] for i in (0, -1)]
    millions = ", ".join(f"{size['parameters'] / 1e6:.2f}" for size in sizes)
    label = f"{data_and_device[0]}, {millions} M parameters, {data_and_device[1]}"
    return {"sizes": sizes, "floor": common.floor(shared), "label": label}


def plot(result: dict, figure) -> None:
    """Distance and ratio over the cost of a forward pass."""
    figure.set_size_inches(7.2, 2.6)
    sizes = result["sizes"]
    x = [size["flops"] / 1e6 for size in sizes]
    distance, ratio = figure.subplots(1, 2)
    distance.plot(x, [size["teacher"] for size in sizes], "k--", marker="s", label="teacher")
    for kind, colour in (("scd", "C0"), ("sct", "C1")):
        for nfe, style in ((1, "-"), (2, ":")):
            y = [size[kind][f"fd_{nfe}step"] for size in sizes]
            name = f"{kind[0]}{kind[1:].upper()}, {nfe}-step"
            distance.plot(x, y, colour, ls=style, marker="o", label=name)
            ratio.plot(x, [a / b["teacher"] for a, b in zip(y, sizes, strict=True)], colour, ls=style, marker="o")
    ratio.axhline(1, color="k", ls="--")
    for axes, title in ((distance, common.DISTANCE), (ratio, "ratio to the teacher's")):
        axes.set(xlabel="single forward pass, MFLOPs", ylabel=title, xscale="log", yscale="log")
        axes.set_xticks(x, [f"{v:.2g}" for v in x], minor=False)
        axes.set_xticks([], minor=True)
    figure.legend(*distance.get_legend_handles_labels(), loc="outside right center")


def rows(result: dict) -> list[str]:
    """Teacher's distance and the students' ratios to it."""
    return [
        common.row(
            f"{size['parameters'] / 1e6:.2f} M",
            f"{size['flops'] / 1e6:.1f}",
            size["teacher"],
            *(size[kind][f"fd_{nfe}step"] / size["teacher"] for kind in ("scd", "sct") for nfe in (1, 2)),
        )
        for size in result["sizes"]
    ]


if __name__ == "__main__":
    common.main("fig6", __doc__, compute, plot, rows)
