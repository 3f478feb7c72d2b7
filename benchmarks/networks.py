"""What the paper's networks cost on paper, and on a GPU how far half precision is off in the tangent.

Counts parameters, forward FLOPs and activations without allocating any, and works out the memory of weights, gradients,
Adam's moments, the average and a frozen teacher. What a step costs in time is measured by training_step.py.

Usage: python benchmarks/networks.py [--out benchmarks/results/networks.json]
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from provenance import commit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sclightning.backbones import EDM2, DDPMpp
from sclightning.trigflow import sample_time

SIGMA_DATA = 0.5
CHANNELS = {"s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}
BYTES = {"teacher": 4 + 4 + 8 + 4, "sct": 4 + 4 + 8 + 4, "scd": 4 + 4 + 8 + 4 + 4}  # per parameter, float32


def networks() -> dict[str, Callable[[], nn.Module]]:
    """Makers of the paper's networks by name."""
    edm2 = {f"edm2_{size}": (lambda c=c: EDM2(channels=c, num_classes=1000)) for size, c in CHANNELS.items()}
    return {"ddpmpp": DDPMpp, **edm2}


def on_paper(make: Callable[[], nn.Module]) -> dict:
    """Parameters, forward FLOPs and activations of an image, state per device."""
    with FakeTensorMode():  # shapes without memory
        torch.set_default_dtype(torch.float16)
        network = make()
        torch.set_default_dtype(torch.float32)
        saved = [saved_bytes(network, batch) for batch in (1, 2)]
        # The counter does not know the CPU's flash attention.
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            network(*inputs(network, 1))
    parameters = sum(p.numel() for p in network.parameters())
    return {
        "parameters": parameters,
        "resolution": network.resolution,
        "forward_gflop": counter.get_total_flops() / 1e9,
        # The difference of two batch sizes: what does not grow with the batch is not an activation.
        "activations_mb": (saved[1] - saved[0]) / 1e6,
        "state_gb": {
            kind: {devices: parameters * size / devices / 1e9 for devices in (1, 8, 64)} for kind, size in BYTES.items()
        },
    }


def inputs(network: nn.Module, batch: int) -> tuple[Tensor, Tensor]:
    """Images and times."""
    x = torch.empty(batch, network.in_channels, network.resolution, network.resolution)
    return x, torch.empty(batch)


def saved_bytes(network: nn.Module, batch: int) -> int:
    """Bytes that an eager forward pass in half precision keeps for its backward pass, weights apart."""
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    kept = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage, x)  # the tensor too, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        network(*inputs(network, batch)).sum()
    return sum(storage.nbytes() for storage, _ in kept.values())


@torch.no_grad()
def precision_of_the_tangent() -> dict:
    """Relative errors of F and its JVP J in half precision against float32, EDM2-S at initialisation."""
    torch.manual_seed(0)
    network = EDM2(num_classes=1000).cuda().eval()
    nn.init.ones_(network.out_gain)
    x, dx = (torch.randn(8, 4, 64, 64, device="cuda") for _ in range(2))
    t, label = sample_time(8, -0.8, 1.6, SIGMA_DATA, device="cuda"), torch.arange(8, device="cuda")
    tangents = (t.cos() * t.sin()).view(-1, 1, 1, 1) * dx, t.cos() * t.sin()

    def evaluate() -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda x, t: network(x, t, label), (x, t), tangents)

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    exact = evaluate()
    errors = {}
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype):
            rounded = evaluate()
        errors[str(dtype).removeprefix("torch.")] = {
            name: ((a.float() - b).norm() / b.norm()).item() for name, a, b in zip("FJ", rounded, exact, strict=True)
        }
    return errors


def main() -> None:
    """Write the JSON; without a GPU the tangent's errors stay as they were."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/networks.json"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    results["networks"] = {name: on_paper(make) for name, make in networks().items()}
    for name, costs in results["networks"].items():
        print(name, json.dumps({k: v for k, v in costs.items() if k != "state_gb"}))
    if torch.cuda.is_available():
        results["tangent_error"] = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "commit": commit(),
            **precision_of_the_tangent(),
        }
        print(results["tangent_error"])
    args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
