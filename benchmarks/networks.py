"""What the paper's networks cost: on paper for every size, measured on a GPU for the sizes S and M.

Counts parameters, forward FLOPs and activations without allocating any, and works out the memory of weights, gradients,
Adam's moments, the average and a frozen teacher. With a GPU it also times whole training steps of teacher, sCT and sCD
as the configs run them: autocast to float16, loss scaling, Adam, forced weight normalisation, average.

Usage: python benchmarks/networks.py [--out benchmarks/results/networks.json] [--only measured --seconds 200]
"""

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sclightning.backbones import EDM2, DDPMpp
from sclightning.backbones.layers import AdaptiveWeight
from sclightning.objective import consistency_loss, weighted_loss
from sclightning.trigflow import interpolate, sample_time, velocity

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
        with FlopCounterMode(display=False) as counter, torch.no_grad():
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


class Step:
    """A training step as the configs run it, without the Trainer around it.

    Args:
        kind: ``teacher``, ``sct``, ``scd``, or ``scd_guided`` with two evaluations of its teacher.
        channels: Channels of the EDM2 network.
        batch: Images.
        compiled: Whether the loss is compiled as one function.
    """

    def __init__(self, kind: str, channels: int, batch: int, compiled: bool):
        self.kind, self.batch = kind, batch
        guided = kind == "scd_guided"
        with torch.device("cuda"):
            self.network = EDM2(channels=channels, num_classes=1000, guidance=guided)
            nn.init.ones_(self.network.out_gain)
            self.teacher = None
            if kind.startswith("scd"):
                self.teacher = EDM2(channels=channels, num_classes=1000).eval().requires_grad_(False)
            self.w_phi = AdaptiveWeight()
        parameters = [*self.network.parameters(), *self.w_phi.parameters()]
        self.optimizer = torch.optim.Adam(parameters, 1e-4, betas=(0.9, 0.99), eps=1e-11)
        self.scaler = torch.amp.GradScaler("cuda")
        self.average = [p.detach().clone() for p in self.network.parameters()]
        self.loss = self.diffusion if kind == "teacher" else self.consistency
        self.teach = self.teacher_velocity
        if compiled:
            self.loss = torch.compile(self.loss, fullgraph=True)
            self.teach = torch.compile(self.teach, fullgraph=True)

    def __call__(self) -> None:
        x_0, z = (SIGMA_DATA * torch.randn(self.batch, 4, 64, 64, device="cuda") for _ in range(2))
        t = sample_time(self.batch, -0.8, 1.6, SIGMA_DATA, device="cuda")
        label = torch.randint(0, 1000, (self.batch,), device="cuda")
        guidance = 1 + torch.rand(self.batch, device="cuda") if self.kind == "scd_guided" else None
        x_t, v_t = interpolate(x_0, z, t), velocity(x_0, z, t)
        with torch.autocast("cuda", torch.float16):
            if self.teacher is not None:
                with torch.no_grad():
                    v_t = self.teach(x_t, t, label, guidance)
            loss = self.loss(x_t, v_t, t, label, guidance)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.network.normalize_weights()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.network.parameters()), 1e-3)

    def teacher_velocity(self, x_t: Tensor, t: Tensor, label: Tensor, guidance: Tensor | None) -> Tensor:
        F = self.teacher(x_t / SIGMA_DATA, t, label).float()
        if guidance is not None:
            F_0 = self.teacher(x_t / SIGMA_DATA, t, torch.full_like(label, -1)).float()
            F = F_0 + guidance.view(-1, 1, 1, 1) * (F - F_0)
        return SIGMA_DATA * F

    def diffusion(self, x_t: Tensor, v_t: Tensor, t: Tensor, label: Tensor, guidance: None) -> Tensor:
        F = self.network(x_t / SIGMA_DATA, t, label).float()
        return weighted_loss(SIGMA_DATA * F - v_t, self.w_phi(t)).mean()

    def consistency(self, x_t: Tensor, v_t: Tensor, t: Tensor, label: Tensor, guidance: Tensor | None) -> Tensor:
        def F(x: Tensor, t: Tensor) -> Tensor:
            return self.network(x, t, label, guidance)

        return consistency_loss(F, self.w_phi(t), x_t, v_t, t, SIGMA_DATA).loss.mean()


def measure(step: Step, repeats: int = 10) -> dict:
    """Median time of a step and the peak of allocated memory."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    ms = sorted(times)[repeats // 2]
    return {
        "ms": round(ms, 1),
        "images_per_second": round(1000 * step.batch / ms),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "finite": all(p.isfinite().all().item() for p in step.network.parameters()),
    }


@torch.no_grad()
def precision_of_the_tangent() -> dict:
    """Relative errors of F and dF/dt in half precision against float32, EDM2-S at initialisation."""
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


def measured(seconds: float, batch: int) -> Iterator[tuple[str, dict]]:
    """Training steps on this GPU, all of them eager, then compiled ones until ``seconds`` have passed."""
    deadline = time.monotonic() + seconds
    eager = [(size, kind, False) for size in ("s", "m") for kind in ("teacher", "sct", "scd", "scd_guided")]
    compiled = [(size, kind, True) for size in ("s", "m") for kind in ("sct", "teacher", "scd")]
    for size, kind, is_compiled in eager + compiled:
        if is_compiled and time.monotonic() > deadline:
            return
        try:
            result = measure(Step(kind, CHANNELS[size], batch, is_compiled))
        except Exception as error:  # say so and go on: the rest is worth having
            result = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        yield f"{kind}_{size}_{'compiled' if is_compiled else 'eager'}", result


def main() -> None:
    """Write the JSON, after each measurement anew; what is not asked for stays as it was."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/networks.json"))
    parser.add_argument("--only", choices=["paper", "measured"], help="one of the two parts")
    parser.add_argument("--seconds", type=float, default=200, help="begin no compiled measurement after this time")
    parser.add_argument("--batch", type=int, default=32, help="images a step; the configs' share of a device")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}

    def write() -> None:
        args.out.write_text(json.dumps(results, indent=2) + "\n")

    if args.only != "measured":
        results["networks"] = {name: on_paper(make) for name, make in networks().items()}
        write()
        for name, costs in results["networks"].items():
            print(name, json.dumps({k: v for k, v in costs.items() if k != "state_gb"}))
    if args.only != "paper" and torch.cuda.is_available():
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        results["measured"] = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "commit": commit or None,
            "batch": args.batch,
            "precision": "float16 autocast",
            "tangent_error": precision_of_the_tangent(),
        }
        print(results["measured"])
        for name, result in measured(args.seconds, args.batch):
            results["measured"][name] = result
            write()
            print(name, result, flush=True)


if __name__ == "__main__":
    main()
