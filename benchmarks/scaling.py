"""What a run of the paper takes on 8 to 1024 GPUs, worked out from what was measured on one; put in your own numbers.

Memory, communication and time of a step under DDP (compiled) and FSDP2 (eager), and the GPU-hours of the run. The model
and the source of each default stand in docs/scaling.md.

Usage: python benchmarks/scaling.py [--network edm2_xxl] [--memory 80] [--intra 323] [--inter 50] …
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from sclightning.backbones import EDM2
from sclightning.parallelize import blocks

NETWORKS = Path(__file__).parent / "results" / "networks.json"
CHANNELS = {"edm2_s": 192, "edm2_m": 256, "edm2_l": 320, "edm2_xl": 384, "edm2_xxl": 448}


@dataclass
class Cluster:
    """Numbers of a machine; defaults are H200s, eight a node, where not said otherwise."""

    tflops: float = 452.0
    """TFLOP/s of the compiled step at a full batch, measured."""
    eager: float = 3.84
    """Time of the eager step over the compiled one's, measured on an H100."""
    half_batch: float = 1.0
    """Images a device at which the step runs at half of its speed; assumed."""
    hbm: float = 4.27
    """Memory bandwidth of a device in TB/s, measured."""
    memory: float = 141.0
    """Memory of a device in GB."""
    node: int = 8
    """Devices a node."""
    intra: float = 323.0
    """Bus bandwidth of a collective within a node in GB/s, measured on two H200s."""
    inter: float = 50.0
    """Bandwidth of a device's adapter to other nodes in GB/s, 400 Gb/s; assumed."""


@dataclass
class Run:
    """Numbers of a training run; defaults are sCD-XXL, guided, as in the paper."""

    network: str = "edm2_xxl"
    passes: float = 6.0
    """FLOPs of a step in forward passes: 3 teacher's training, 4 sCT, 5 sCD, 6 guided sCD."""
    teachers: int = 2
    """Evaluations of the frozen teacher a step; 0 for none."""
    batch: int = 2048
    iterations: int = 200_000
    gradient_bytes: int = 4
    """Of a gradient on the wire: 2 with DDP's compression hooks."""
    limit: int = 32
    """Images a device at most at a time."""


@dataclass
class Step:
    """A step of a run on some devices."""

    micro_batch: int
    accumulate: int
    memory_gb: float
    sent_gb: float
    compute_s: float
    communication_s: float
    update_s: float
    step_s: float
    efficiency: float
    gpu_hours: float


def step(strategy: Literal["ddp", "fsdp"], devices: int, run: Run, cluster: Cluster) -> Step | None:
    """Time and memory of a step; None if one image does not fit."""
    network = json.loads(NETWORKS.read_text())["networks"][run.network]
    parameters, flop = network["parameters"], run.passes * network["forward_gflop"] * 1e9
    images = math.ceil(run.batch / devices)
    ddp = strategy == "ddp"

    # Weights, gradients, Adam's two moments, average and teacher in float32, half-precision weights for the backward.
    state = (20 + 4 * (run.teachers > 0)) * parameters / (1 if ddp else devices) / 1e9
    state += (2 * parameters if ddp else 2 * 4 * largest_block(run.network)) / 1e9  # FSDP2 has two blocks gathered
    fits = int((cluster.memory - state) / (network["activations_mb"] / 1e3))
    if fits < 1:
        return None
    accumulate = math.ceil(images / min(fits, run.limit, images))
    micro_batch = math.ceil(images / accumulate)

    slow = (1 + cluster.half_batch / micro_batch) * (1 if ddp else cluster.eager)
    compute = images * flop / (cluster.tflops * 1e12)
    if ddp:  # one all-reduce, after the compiled backward pass: nothing to hide behind
        volume = 2 * run.gradient_bytes * parameters
    else:  # gathers for each teacher's pass and the student's two, and its gradients, at each micro-batch
        volume = accumulate * (4 * (run.teachers + 2) + run.gradient_bytes) * parameters
    sent = volume * (devices - 1) / devices
    # NCCL's rings leave a node by all of its adapters at once.
    bandwidth = cluster.intra if devices <= cluster.node else min(cluster.intra, cluster.node * cluster.inter)
    communication = sent / (bandwidth * 1e9)
    exposed = communication if ddp else max(0.0, communication - compute * slow)
    # Adam reads four and writes three numbers of a weight, the average two and one, the normalisation one and one.
    update = 12 * 4 * parameters / (1 if ddp else devices) / (cluster.hbm * 1e12)
    total = compute * slow + exposed + update
    return Step(
        micro_batch=micro_batch,
        accumulate=accumulate,
        memory_gb=state + micro_batch * network["activations_mb"] / 1e3,
        sent_gb=sent / 1e9,
        compute_s=compute * slow,
        communication_s=communication,
        update_s=update,
        step_s=total,
        efficiency=compute / total,
        gpu_hours=devices * total * run.iterations / 3600,
    )


def largest_block(network: str) -> int:
    """Parameters of the largest block that FSDP2 gathers at once."""
    with torch.device("meta"):
        found = blocks(EDM2(channels=CHANNELS[network], num_classes=1000))
    return max(sum(p.numel() for p in block.parameters()) for block in found)


def table(run: Run, cluster: Cluster, devices: list[int]) -> str:
    """Both strategies on each number of devices, in Markdown."""
    columns = ["GPUs", "", "images × accumulation", "memory", "sent", "step", "waiting", "efficiency", "GPU-hours"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for n in devices:
        for strategy in ("ddp", "fsdp"):
            found = step(strategy, n, run, cluster)
            if found is None:
                lines.append(f"| {n} | {strategy} | does not fit |  |  |  |  |  |  |")
                continue
            waiting = max(0.0, found.step_s - found.compute_s - found.update_s)
            cells = [n, strategy, f"{found.micro_batch} × {found.accumulate}", f"{found.memory_gb:.1f} GB"]
            cells += [f"{found.sent_gb:.1f} GB", f"{found.step_s:.3f} s", f"{waiting:.3f} s"]
            cells += [f"{found.efficiency:.0%}", f"{found.gpu_hours:,.0f}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for group in (Run(), Cluster()):
        for name, value in vars(group).items():
            choices = list(CHANNELS) if name == "network" else None
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, choices=choices)
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1024])
    args = vars(parser.parse_args())
    run, cluster = (type(g)(**{name: args[name] for name in vars(g)}) for g in (Run(), Cluster()))
    print(table(run, cluster, args["devices"]))


if __name__ == "__main__":
    main()
