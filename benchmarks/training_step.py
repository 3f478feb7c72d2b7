"""What a training step costs on a GPU: teacher, sCT and sCD, ours and the peers' way, bare and under the Trainer.

What is timed is in ``steps.py``, all of it on the same networks in the same run. ``*_ms`` is forward and backward;
``update_ms`` is optimizer, weight normalisation and average. ``ceiling_fraction`` counts 3, 4 and 5 forward passes for
teacher, sCT and sCD against a matrix product of the same precision measured in this run.

Usage: python benchmarks/training_step.py [--out FILE] [--networks edm2_s …] [--parts compiled …] [--seconds 540]
Many processes compile, one at a time is timed: python benchmarks/training_step.py --jobs 6
Two devices: python benchmarks/training_step.py --parts trainer --networks edm2_s --devices 2
"""

import argparse
import contextlib
import functools
import gc
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from provenance import commit
from steps import NETWORKS, TINY, Step, compile_options, module_of, plain_operators
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sclightning.callbacks import EMA, TangentWarmup
from sclightning.data.arrays import ArrayDataset, ImageDataModule, from_uint8

PASSES = {"diffusion": 3, "sct": 4, "scd": 5}
PARTS = ["compiled", "peers", "trainer", "eager", "peers_compiled"]


# --- Measuring --------------------------------------------------------------------------------------------------------


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def clock(device: str) -> Callable[[], Callable[[], float]]:
    """A function that marks a moment on the device's time line and gives its milliseconds once the device is done."""
    if device != "cuda":
        return lambda: functools.partial(lambda now: 1000 * now, time.perf_counter())
    first = torch.cuda.Event(enable_timing=True)
    first.record()

    def mark() -> Callable[[], float]:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return lambda: first.elapsed_time(event)

    return mark


def warm_up(step: Step) -> None:
    """The first steps, which compile; again, where the processes beside this one have the memory for a while."""
    for attempt in itertools.count():
        try:
            for _ in range(3):
                step.forward_backward()
                step.update()
            wait(step.args.device)
            return
        except torch.OutOfMemoryError:
            if step.args.jobs == 1 or attempt == 20:
                raise
        gc.collect()  # what is compiled stays
        torch.cuda.empty_cache()
        time.sleep(10)


def measure(step: Step, repeats: int, ready: Callable[[], None]) -> dict:
    """Median forward and backward, update, and both on end; images per second; peak of allocated memory."""
    device, start = step.args.device, time.perf_counter()
    warm_up(step)
    seconds = time.perf_counter() - start
    ready()
    step.forward_backward()  # allocates again what was given back while others compiled
    step.update()
    wait(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    mark, marks = clock(device), []
    for _ in range(repeats):  # without waiting in between, as in training
        marks.append(mark())
        step.forward_backward()
        marks.append(mark())
        step.update()
    marks.append(mark())
    wait(device)
    times = [moment() for moment in marks]
    parts = [b - a for a, b in itertools.pairwise(times)]
    ms, update_ms = statistics.median(parts[::2]), statistics.median(parts[1::2])
    step_ms = (times[-1] - times[0]) / repeats
    return {
        "ms": round(ms, 3),
        "update_ms": round(update_ms, 3),
        "step_ms": round(step_ms, 3),
        "images_per_second": round(1000 * len(step.x_0) / step_ms, 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3) if device == "cuda" else None,
        "first_three_steps_s": round(seconds, 1),
        "finite": all(p.isfinite().all().item() for p in step.module.backbone.parameters()),
    }


def kernels(step: Step) -> list[str]:
    """Where the device's time goes in one step: the forty kernels that take most, in milliseconds."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step.forward_backward()
        step.update()
        wait(step.args.device)
    times: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times.setdefault(event.name[:100], []).append(event.device_time / 1000)
    ranked = sorted(times.items(), key=lambda item: -sum(item[1]))[:40]
    return [f"{sum(t):8.3f} ms {len(t):5d} x {name}" for name, t in ranked]


def ceiling_tflop_s(args: argparse.Namespace) -> float:
    """Matrix product of the steps' precision on random data, 8192 cubed on a GPU."""
    n, times = (8192 if args.device == "cuda" else 256), []
    a, b = (torch.randn(n, n, device=args.device, dtype=args.dtype) for _ in range(2))
    for _ in range(7):
        mark = clock(args.device)
        moments = mark(), [a @ b for _ in range(10)], mark()
        wait(args.device)
        times.append((moments[2]() - moments[0]()) / 10)
    return 2 * n**3 / statistics.median(times) / 1e9


def forward_gflop(make: Callable) -> float:
    """FLOPs of a forward pass of one image, a multiplication and an addition counted as two."""
    # Plain attention, since the counter does not know the CPU's flash attention.
    with FakeTensorMode(), FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network = make()
        network(torch.empty(1, network.in_channels, *[network.resolution] * 2), torch.empty(1))
    return counter.get_total_flops() / 1e9


# --- Under the Trainer ------------------------------------------------------------------------------------------------


class Timer(L.Callback):
    """Wall time from the end of step ``first`` to the end of the last, waiting for the device at both only."""

    def __init__(self, first: int, last: int, ready: Callable[[], None]):
        self.first, self.last, self.ready = first, last, ready

    def on_train_batch_end(self, trainer: L.Trainer, *_) -> None:
        if trainer.global_step == self.first - 1:
            wait("cuda" if trainer.strategy.root_device.type == "cuda" else "cpu")
            self.ready()
        if trainer.global_step in (self.first, self.last):
            wait("cuda" if trainer.strategy.root_device.type == "cuda" else "cpu")
            if trainer.global_step == self.first:
                self.start = time.perf_counter()
            else:
                self.ms = 1000 * (time.perf_counter() - self.start) / (self.last - self.first)


class RandomLatents(ImageDataModule):
    """Bytes and labels drawn once, from the loader and the stream that the package's data have."""

    name, image_shape, num_classes, sigma_data = "random", (4, 64, 64), 1000, 0.5

    def __init__(self, batch_size: int):
        super().__init__(batch_size, 0, 0, 1, 0)

    def read(self, split: str) -> ArrayDataset:
        rng = np.random.default_rng(0)
        images = rng.integers(256, size=(2048, *self.image_shape), dtype=np.uint8)
        return ArrayDataset(images, rng.integers(1000, size=len(images)))

    def on_after_batch_transfer(self, batch, dataloader_idx: int):
        return from_uint8(batch[0]), batch[1]


def under_trainer(
    make: Callable, batch: int, devices: int, args: argparse.Namespace, ready: Callable[[], None] = lambda: None
) -> dict:
    """A step of sCD as a user runs it: data, autocast, optimizer, weight normalisation, average, logging, bar."""
    first, last = (10, 10 + 4 * args.repeats) if args.device == "cuda" else (2, 4)
    with tempfile.TemporaryDirectory() as folder:
        timer = Timer(first, last, ready)
        trainer = L.Trainer(
            accelerator="gpu" if args.device == "cuda" else "cpu",
            devices=[torch.cuda.current_device()] if args.device == "cuda" and devices == 1 else devices,
            strategy=DDPStrategy(gradient_as_bucket_view=True, bucket_cap_mb=100) if devices > 1 else "auto",
            precision={torch.float16: "16-mixed", torch.bfloat16: "bf16-mixed"}[args.dtype],
            max_steps=last,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_model_summary=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            callbacks=[EMA(sigma_rel=0.05), TangentWarmup(), timer],
            benchmark=args.cudnn_benchmark,
        )
        trainer.fit(module_of("scd", make, args, compile_options(args)), datamodule=RandomLatents(batch))
    if trainer.global_rank:
        sys.exit()  # the rest is for the process that writes
    return {"ms": round(timer.ms, 3), "images_per_second": round(1000 * batch * devices / timer.ms, 1)}


# --- The run ----------------------------------------------------------------------------------------------------------


def plan(args: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """(network, part, kind) of each measurement, what matters most first."""
    for name in args.networks:
        for part in args.parts:
            kinds = ["scd"] if part in ("peers", "peers_compiled", "trainer") else ["diffusion", "scd", "sct"]
            if part == "trainer" and not name.startswith("edm2"):
                continue  # the data are random latents
            yield from ((name, part, kind) for kind in kinds)


def run(name: str, part: str, kind: str, args: argparse.Namespace, ready: Callable[[], None] = lambda: None) -> dict:
    """One measurement; ``ready`` is called when all is compiled and returns when the device is free to be timed."""
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    make, batch = (TINY if args.tiny else NETWORKS)[name]
    batch = args.batch or batch
    if part == "trainer":
        found = under_trainer(make, batch, args.devices, args, ready)
        if args.devices > 1:  # and each of them by itself, all at the same time, a moment later
            with ProcessPoolExecutor(args.devices, multiprocessing.get_context("spawn")) as pool:
                found["alone"] = list(pool.map(functools.partial(alone, name, kind, args), range(args.devices)))
        return found
    peers = part.startswith("peers")
    with plain_operators() if peers else contextlib.nullcontext():
        step = Step(kind, make, batch, args, compiled=part in ("compiled", "peers_compiled"), peers=peers)
        found = measure(step, args.repeats, ready)
        if args.profile and args.device == "cuda":
            found["kernels"] = kernels(step)
    return found


def alone(name: str, kind: str, args: argparse.Namespace, device: int) -> dict:
    """The part ``trainer`` on one of several devices; for a process of its own."""
    if args.device == "cuda":
        torch.cuda.set_device(device)
    return run(name, "trainer", kind, argparse.Namespace(**vars(args) | {"devices": 1}))


def tried(*measurement: Any) -> dict:
    """As :func:`run`; a failure is recorded and the rest goes on: it is worth having."""
    try:
        return run(*measurement)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}


def work(connection: Connection, index: int, *measurement: Any) -> None:
    """One measurement in a process of its own, which says when it has compiled and waits for its turn.

    The processes take the GPUs that there are in turn, so that more of them find room.
    """
    warnings.filterwarnings("ignore")
    if torch.cuda.is_available():
        torch.cuda.set_device(index % torch.cuda.device_count())

    def ready() -> None:
        gc.collect()
        torch.cuda.empty_cache()
        connection.send(None)
        connection.recv()

    connection.send(tried(*measurement, ready))


def together(jobs: list[tuple[str, str, str]], args: argparse.Namespace, deadline: float) -> Iterator[dict]:
    """Measurements whose processes compile side by side and are timed one after the other, in their order.

    What has not compiled by ``deadline`` is given up, for the sake of the others.
    """
    context, running = multiprocessing.get_context("spawn"), []
    for index, job in enumerate(jobs):
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, index, *job, args))
        process.start()
        theirs.close()  # so that its death is an end of file here
        running.append((process, ours))

    def receive(connection: Connection) -> dict | None:
        try:
            return connection.recv()
        except EOFError:
            return {"failed": "the process died"}

    compiled = []
    for process, connection in running:
        if connection.poll(max(0, deadline - time.monotonic())):
            compiled.append(receive(connection))
        else:
            process.kill()
            compiled.append({"failed": "not compiled in time"})
    for (process, connection), found in zip(running, compiled, strict=True):
        if found is None:
            connection.send(None)
            found = receive(connection)
        process.join()
        yield found


def summary(results: dict, name: str, devices: int) -> None:
    """The figures that the README and the tests of a claim read, where their parts are measured."""
    network = results["networks"][name]
    together = network.get(f"trainer_{devices}_devices", {}).get("scd", {})
    if "ms" in together:  # of the images a second that they do apart
        apart = sum(found["images_per_second"] for found in together["alone"])
        network[f"scaling_efficiency_{devices}"] = round(together["images_per_second"] / apart, 3)
    compiled, peers = network.get("compiled", {}), network.get("peers", {}).get("scd", {})
    base = compiled.get("diffusion", {})
    network |= {f"{kind}_ms": compiled[kind]["ms"] for kind in compiled if "ms" in compiled[kind]}
    if "ms" in peers:
        network["peers_scd_ms"] = peers["ms"]
    if "ms" not in base:
        return
    for kind in ("sct", "scd"):
        if "ms" in compiled.get(kind, {}):
            network[f"{kind}_over_diffusion"] = round(compiled[kind]["ms"] / base["ms"], 3)
    if compiled.get("scd", {}).get("peak_gb"):
        network["peak_over_diffusion"] = round(compiled["scd"]["peak_gb"] / base["peak_gb"], 3)
    images = {kind: compiled[kind].get("batch", network["batch"]) for kind in compiled}
    tflop = {kind: PASSES[kind] * network["forward_gflop"] * images[kind] / 1e3 for kind in compiled}
    network["tflop_s"] = {k: round(1e3 * tflop[k] / compiled[k]["ms"], 4) for k in compiled if "ms" in compiled[k]}
    network["ceiling_fraction"] = {k: round(v / network["ceiling_tflop_s"], 4) for k, v in network["tflop_s"].items()}
    trainer = network.get("trainer", {}).get("scd", {})
    if "ms" in trainer and "ms" in compiled.get("scd", {}):
        network["trainer_over_bare"] = round(trainer["ms"] / compiled["scd"]["step_ms"], 3)


def table(results: dict) -> str:
    """The measurements in Markdown."""
    lines = ["| network, images | | diffusion | sCT | sCD | update | sCD images/s | peak GB, sCD | sCD / diffusion |"]
    lines.append("|" + "---|" * 9)
    for name, network in results["networks"].items():
        for part in PARTS:
            found = network.get(part, {})
            if part == "trainer" or not found:
                continue
            ms = [f"{found[k]['ms']:.1f}" if "ms" in found.get(k, {}) else "-" for k in PASSES]
            scd, base = found.get("scd", {}), found.get("diffusion", network.get("eager", {}).get("diffusion", {}))
            ratio = f"{scd['ms'] / base['ms']:.2f}" if "ms" in scd and "ms" in base else "-"
            cells = [scd.get(key, "-") for key in ("update_ms", "images_per_second", "peak_gb")]
            lines.append("| " + " | ".join([f"{name}, {network['batch']}", part, *ms, *map(str, cells), ratio]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Write the JSON after each measurement anew; what is not asked for stays as it was."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training_step.json"))
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seconds", type=float, default=540, help="neither begin nor compile after this time")
    parser.add_argument("--jobs", type=int, default=1, help="measurements that compile side by side")
    parser.add_argument("--resume", action="store_true", help="leave out what the file has already")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--batch", type=int, help="images a step, if not the network's own")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--cudnn-benchmark",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let cuDNN try its algorithms, as the configs do",
    )
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--mode", help="of torch.compile")
    parser.add_argument(
        "--options",
        type=lambda text: text.split("=", 1),
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="of torch.compile, such as realize_opcount_threshold=100, where there is no mode",
    )
    parser.add_argument("--profile", action="store_true", help="also list each step's kernels")
    parser.add_argument("--devices", type=int, default=1, help="of the part trainer, with DDP")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="networks of a few thousand weights")
    args = parser.parse_args()
    args.dtype, deadline = getattr(torch, args.dtype), time.monotonic() + args.seconds
    warnings.filterwarnings("ignore")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.out.read_text()) if args.out.exists() else {"networks": {}}
    results |= {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "precision": f"{args.dtype} autocast".removeprefix("torch."),
        "channels_last": args.channels_last,
        "cudnn_benchmark": args.cudnn_benchmark,
        "compile": compile_options(args),
    }
    ceiling = round(ceiling_tflop_s(args), 4)
    suffix = "" if args.devices == 1 else f"_{args.devices}_devices"
    jobs = list(plan(args))
    if args.resume:
        had = results["networks"]
        jobs = [(n, p, k) for n, p, k in jobs if "ms" not in had.get(n, {}).get(p + suffix, {}).get(k, {})]
    while jobs and time.monotonic() < deadline:
        chunk, jobs = jobs[: args.jobs], jobs[args.jobs :]
        found_in_turn = together(chunk, args, deadline) if args.jobs > 1 else (tried(*job, args) for job in chunk)
        for (name, part, kind), found in zip(chunk, found_in_turn, strict=True):
            make, batch = (TINY if args.tiny else NETWORKS)[name]
            batch = args.batch or batch
            network = results["networks"].setdefault(name, {})
            network |= {"batch": batch, "forward_gflop": forward_gflop(make)}
            if part == "compiled":  # whose fractions of it are reported
                network["ceiling_tflop_s"] = ceiling
            network.setdefault(part + suffix, {})[kind] = found | {"batch": batch, "commit": commit()}
            summary(results, name, args.devices)
            args.out.write_text(json.dumps(results, indent=2) + "\n")
            print(name, part + suffix, kind, json.dumps({k: v for k, v in found.items() if k != "kernels"}), flush=True)
            print("".join(f"{line}\n" for line in found.get("kernels", [])), end="", flush=True)
            torch._dynamo.reset()
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    print(table(results))


if __name__ == "__main__":
    main()
