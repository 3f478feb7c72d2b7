"""Bus bandwidth of an all-reduce between the GPUs of this machine, for benchmarks/scaling.py --intra.

Bus bandwidth is what NCCL's tests call so: 2 (n - 1) / n times the bytes over the time, which does not depend on n.

Usage: python benchmarks/allreduce.py [--out benchmarks/results/allreduce.json] [--megabytes 1074] [--repeats 12]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from provenance import commit


def measure(rank: int, devices: int, store: str, args: argparse.Namespace) -> None:
    """One process of ``devices``; the first writes the JSON."""
    cuda = torch.cuda.is_available()
    backend, device = ("nccl", torch.device("cuda", rank)) if cuda else ("gloo", torch.device("cpu"))
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(backend, f"file://{store}", rank=rank, world_size=devices)
    x, seconds = torch.zeros(int(args.megabytes * 1e6 / 4), device=device), []
    for _ in range(args.repeats):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(x)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        bandwidth = 2 * (devices - 1) / devices * x.nbytes / statistics.median(seconds[2:]) / 1e9
        result = {
            "bus_gb_s": round(bandwidth, 1),
            "megabytes": x.nbytes / 1e6,
            "devices": devices,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "backend": backend,
            "torch": torch.__version__,
            "commit": commit(),
        }
        args.out.write_text(json.dumps(result, indent=2) + "\n")
        print(result)
    dist.destroy_process_group()


def main() -> None:
    """One process a GPU; without one, two on the CPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/allreduce.json"))
    parser.add_argument("--megabytes", type=float, default=2**30 / 1e6)
    parser.add_argument("--repeats", type=int, default=12)
    args = parser.parse_args()
    devices = torch.cuda.device_count() or 2
    if devices < 2 or args.repeats < 3:
        parser.error("an all-reduce needs two GPUs, and --repeats at least 3: the first two are not counted")
    store = args.out.with_suffix(".store").resolve()
    store.unlink(missing_ok=True)
    torch.multiprocessing.spawn(measure, (devices, str(store), args), nprocs=devices)
    store.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
