"""Fig. 7: precision, recall and distance against the guidance scale, for the teacher, VSD, sCD and sCD + VSD.

Students are told the scale, drawn from [1, 2] for each training sample; the teacher is guided without its label. VSD is
the adaptive form (Alg. 3), which the paper does not say of Fig. 7. One-step VSD, the others in one and two steps.

Usage: python benchmarks/figures/fig7.py [--scale full] [--seeds 0 1 2] [--plot]
"""

from collections.abc import Sequence
from typing import Any

import common

from sclightning.sampling import T_MAX

SCALES = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
VSD = "sclightning.modules.VariationalScoreDistillation"
TWO_STEPS = [T_MAX, 1.1]
STUDENTS = {
    "VSD": {"class_path": VSD},
    "sCD": {"times": TWO_STEPS},
    "sCD + VSD": {"class_path": VSD, "scd": True, "times": TWO_STEPS},
}
METRICS = {"precision": "precision", "recall": "recall", "fd": common.DISTANCE}
COLOURS = {"teacher": "k", "VSD": "C1", "sCD": "C0", "sCD + VSD": "C2"}


def teacher(scale: str) -> common.Run:
    """The figures' teacher, which must have been trained with dropped labels."""
    return common.fit("teacher", scale, label_dropout=0.1)


def student(name: str, scale: str, seed: int) -> common.Run:
    """A student with a guidance input, of a teacher that has none."""
    run = teacher(scale)
    return common.fit(
        "scd",
        scale,
        seed,
        **STUDENTS[name],
        normalization="l2",
        teacher=run.cli.config.model.init_args.backbone.clone(with_meta=False).as_dict(),
        teacher_checkpoint=run.checkpoint,
        backbone__guidance=True,
        guidance_range=[1.0, 2.0],
    )


def curves(run: common.Run, steps: Sequence[int] | None = None) -> dict[int, dict[str, Any]]:
    """All three metrics over the guidance scales by number of evaluations; none where samples are not finite."""
    measured = common.measure(run, steps, SCALES, ["precision_recall"])
    found = {(r["nfe"], r["guidance_scale"]): r for r in measured}
    return {
        nfe: {metric: [found.get((nfe, scale), {}).get(metric) for scale in SCALES] for metric in METRICS}
        for nfe in steps or [run.cli.model.nfe]
    }


def measured(name: str, scale: str, seed: int) -> dict[str, dict]:
    """Curves of a model, trained, by the name that they have in the figure."""
    if name == "teacher":
        (curve,) = curves(teacher(scale)).values()
        return {name: curve}
    run = student(name, scale, seed)
    found = curves(run, [1] if name == "VSD" else [1, 2])
    return {f"{name}, {nfe}-step": {"seed": seed, **curve, "run": run.record} for nfe, curve in found.items()}


def compute(scale: str, seeds: Sequence[int]) -> dict:
    """Train the students of every seed, measure them and the teacher at every guidance scale."""
    run, models = teacher(scale), {}
    cases = [("teacher", scale, 0), *((name, scale, seed) for seed in seeds for name in STUDENTS)]
    for found in common.each(measured, cases):
        for name, entry in found.items():
            models.setdefault(name, []).append(entry)
    return {"guidance": SCALES, "models": models, "floor": common.floor(run), "label": common.label(run)}


def plot(result: dict, figure) -> None:
    """One panel a metric; dotted lines are two steps, thin lines seeds."""
    figure.set_size_inches(8.6, 2.6)
    panels = figure.subplots(1, 3)
    for axes, (metric, title) in zip(panels, METRICS.items(), strict=True):
        for name, entries in result["models"].items():
            colour, style = COLOURS[name.split(",")[0]], ":" if name.endswith("2-step") else "-"
            for i, entry in enumerate(entries):
                label = None if i else name
                axes.plot(result["guidance"], entry[metric], colour, ls=style, lw=1, marker=".", label=label)
        axes.set(xlabel="guidance scale", title=title.replace("\n", " "))
    panels[-1].set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")


def rows(result: dict) -> list[str]:
    """Precision, recall and distance at the least and the greatest scale, by seed."""
    ends = [
        [[e[metric][i] for e in entries] for entries in result["models"].values()]
        for metric in METRICS
        for i in (0, -1)
    ]
    return [common.row(name, *cells) for name, *cells in zip(result["models"], *ends, strict=True)]


if __name__ == "__main__":
    common.main("fig7", __doc__, compute, plot, rows)
