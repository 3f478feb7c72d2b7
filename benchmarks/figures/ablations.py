"""What the paper claims and does not show: double normalisation, tangent warm-up, one dropout mask for both passes.

Double normalisation against AdaGN: a teacher and an sCD of each. Warm-up: sCD with and without. Dropout: sCT whose F
and whose tangent see one mask or two.

Usage: python benchmarks/figures/ablations.py [--scale full] [--seeds 0 1 2] [--plot]
"""

import types
from collections.abc import Sequence

import common
from torch import Tensor

from sclightning.backbones.ddpmpp import Block
from sclightning.callbacks import TangentWarmup
from sclightning.objective import ConsistencyLoss, forward_jvp, normalize, tangent, weighted_loss
from sclightning.trigflow import interpolate

DROPOUT = 0.2
"""The paper's for sCT on CIFAR-10."""


class AdaGNBlock(Block):
    """Block with AdaGN, norm(x) (1 + s) + b, in place of the double normalisation of s and b."""

    def modulate(self, h: Tensor, emb: Tensor) -> Tensor:
        """Modulated activations, shape of ``h``."""
        scale, shift = self.modulation(emb).chunk(2, dim=1)
        return self.norm1(h, 1 + scale, shift)


def adagn(cli):
    for block in cli.model.backbone.modules():
        if isinstance(block, Block):
            block.__class__ = AdaGNBlock


def no_warmup(cli):
    cli.trainer.callbacks = [c for c in cli.trainer.callbacks if not isinstance(c, TangentWarmup)]


def loss_of_two_masks(self, x_0, z, t, label=None, guidance=None) -> ConsistencyLoss:
    """ConsistencyModel.loss, but F draws a dropout mask of its own: F - F⁻ is no longer zero."""
    x_t = interpolate(x_0, z, t)
    dx_t = self.velocity(x_t, x_0, z, t, label, guidance)

    def network(x, t):
        return self(x, t, label, guidance)

    F_minus, J = (value.detach() for value in forward_jvp(network, x_t, dx_t, t, self.sigma_data))
    g = tangent(F_minus, J, x_t, dx_t, t, self.sigma_data, self.tangent_warmup)
    residual = network(x_t / self.sigma_data, t) - F_minus - normalize(g, self.c, self.normalization)
    return ConsistencyLoss(weighted_loss(residual, self.adaptive_weight(t)), g.square().flatten(1).mean(1).sqrt())


def two_masks(cli):
    cli.model.loss = types.MethodType(loss_of_two_masks, cli.model)


STUDENTS = {
    "double norm": ("scd", None, {"normalization": "l2"}),
    "AdaGN": ("scd", adagn, {"normalization": "l2"}),
    "off": ("scd", no_warmup, {"normalization": "l2"}),
    "shared": ("sct", None, {"backbone__dropout": DROPOUT}),
    "two": ("sct", two_masks, {"backbone__dropout": DROPOUT}),
}
SETTINGS = {
    "modulation: double norm": "double norm",
    "modulation: AdaGN": "AdaGN",
    "warm-up: on": "double norm",
    "warm-up: off": "off",
    "dropout mask: shared": "shared",
    "dropout mask: two": "two",
}


def trained(scale: str, seed: int, name: str) -> dict:
    """Distances of a student, and how jumpy its tangent was."""
    kind, edit, init_args = STUDENTS[name]
    own = {"teacher_checkpoint": common.fit("teacher", scale, edit=adagn).checkpoint} if edit is adagn else {}
    run = common.student(kind, scale, seed, edit, **init_args, **own)
    return {"seed": seed, **common.distances(run), "tangent_norm": common.spread(run), "run": run.record}


def compute(scale: str, seeds: Sequence[int]) -> dict:
    """Train and measure both settings of every ablation."""
    entries = common.each_setting(trained, scale, seeds, [(name,) for name in STUDENTS])
    found = dict(zip(STUDENTS, entries, strict=True))
    teacher, other = common.fit("teacher", scale), common.fit("teacher", scale, edit=adagn)
    return {
        "settings": {setting: found[name] for setting, name in SETTINGS.items()},
        "teachers": {"double norm": common.measure(teacher)[0], "AdaGN": common.measure(other)[0]},
        "floor": common.floor(teacher),
        "label": common.label(teacher),
    }


def plot(result: dict, figure) -> None:
    """Distances of both settings, one panel an ablation; a dot is a seed."""
    figure.set_size_inches(7.2, 2.4)
    settings = list(result["settings"].items())
    for i, axes in enumerate(figure.subplots(1, 3)):
        for x, (_, seeds) in enumerate(settings[2 * i : 2 * i + 2]):
            for nfe, colour in ((1, "C0"), (2, "C1")):
                heights = [seed[f"fd_{nfe}step"] for seed in seeds]
                axes.plot([x] * len(heights), heights, colour, ls="", marker="o", label=None if x else f"{nfe}-step")
        axes.set(title=settings[2 * i][0].split(":")[0], xlim=(-0.5, 1.5), ylabel="" if i else common.DISTANCE)
        axes.set_xticks([0, 1], [name.split(": ")[1] for name, _ in settings[2 * i : 2 * i + 2]])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")


def rows(result: dict) -> list[str]:
    """Distances of one and two steps by seed, and the largest jump of the tangent's norm from step to step."""
    table = []
    for name, seeds in result["settings"].items():
        jumps = [seed["tangent_norm"]["largest_jump"] for seed in seeds]
        table.append(common.seeds_row(name, seeds) + f" {common.row(jumps)[2:]}")
    return table + [common.row(f"teacher, {name}", t["fd"]) for name, t in result["teachers"].items()]


if __name__ == "__main__":
    common.main("ablations", __doc__, compute, plot, rows)
