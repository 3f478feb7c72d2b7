"""Training steps to be timed: teacher, sCT and sCD on the paper's networks, ours and the peers' way.

Ours is what the configs run: the modules of this package, half-precision autocast, one compiled function. The peers'
way is ``torch.func.jvp`` without gradient around PyTorch's own layers and naive attention, then a forward pass with
gradient, and before both the teacher's.
"""

import argparse
import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from unittest import mock

import naive
import torch
from dit import DiT
from torch import Tensor, nn
from torch.nn import functional as nnF

from sclightning.backbones import EDM2, DDPMpp
from sclightning.modules import ConsistencyDistillation, ConsistencyTraining, TrigFlowDiffusion
from sclightning.modules.base import TrigFlowModule
from sclightning.objective import normalize, tangent, weighted_loss
from sclightning.trigflow import interpolate

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # maker and images a step
    "edm2_s": (lambda: EDM2(num_classes=1000), 64),
    "ddpmpp": (lambda: DDPMpp(dropout=0.13), 256),
    "dit_xl": (lambda: DiT(num_classes=1000), 64),
    "edm2_m": (lambda: EDM2(channels=256, num_classes=1000), 32),
}
TINY: dict[str, tuple[Callable[[], nn.Module], int]] = {  # to try it without a GPU
    "edm2_s": (lambda: EDM2(channels=16, channel_mult=[1] * 3, num_blocks=1, head_channels=16, num_classes=1000), 2),
    "ddpmpp": (lambda: DDPMpp(resolution=8, channels=16, channel_mult=[1], num_blocks=1, dropout=0.13), 2),
    "dit_xl": (lambda: DiT(num_classes=1000, hidden=32, depth=2, heads=4), 2),
    "edm2_m": (lambda: EDM2(channels=32, channel_mult=[1] * 3, num_blocks=1, head_channels=16, num_classes=1000), 2),
}


class Step:
    """A training step of a module as it stands, without a Trainer.

    Args:
        kind: ``diffusion``, ``sct`` or ``scd``.
        make: Maker of the network.
        batch: Images.
        args: Of the command line: device, dtype, channels_last, and what :func:`compile_options` reads.
        compiled: Whether to compile.
        peers: Whether to do it the peers' way.
    """

    def __init__(
        self, kind: str, make: Callable, batch: int, args: argparse.Namespace, compiled: bool, peers: bool = False
    ):
        options = compile_options(args) if compiled else False
        self.args, self.module = args, module_of(kind, make, args, False if peers else options)
        self.module.to(args.device).train()
        network = self.module.backbone
        self.x_0 = 0.5 * torch.randn(batch, network.in_channels, *[network.resolution] * 2, device=args.device)
        self.label = torch.randint(network.num_classes, (batch,), device=args.device) if network.num_classes else None
        self.loss = functools.partial(peers_loss, self.module, kind)
        if peers and compiled:
            self.loss = torch.compile(self.loss, **{"fullgraph": True, **options})
        self.peers, self.steps = peers, 0
        self.optimizer = self.module.configure_optimizers()
        self.scaler = torch.amp.GradScaler(args.device, enabled=args.dtype == torch.float16)
        self.average = [p.detach().clone() for p in network.parameters()]

    def forward_backward(self) -> None:
        self.steps += 1
        self.optimizer.zero_grad()
        with torch.autocast(self.args.device, self.args.dtype):
            if self.peers:
                with self.module._draw(self.x_0, self.steps) as (z, t):
                    loss = self.loss(self.x_0, z, t, self.label).mean()
            else:
                loss = self.module.training_step((self.x_0, self.label), self.steps)
        self.scaler.scale(loss).backward()

    def update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.module._normalize_weights()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.module.backbone.parameters()), 1e-3)


def compile_options(args: argparse.Namespace) -> dict:
    given = {"mode": args.mode, "options": {key: json.loads(value) for key, value in args.options} or None}
    return {"backend": args.backend} | {name: value for name, value in given.items() if value is not None}


def module_of(kind: str, make: Callable, args: argparse.Namespace, compile: bool | dict) -> TrigFlowModule:
    """A module with weights none of which is at its zero initial value."""
    torch.manual_seed(0)

    def network() -> nn.Module:
        with torch.device(args.device):
            net = make()
        for p in net.parameters():
            if not p.any():
                nn.init.constant_(p, 1.0) if p.numel() == 1 else nn.init.normal_(p, std=0.02)
        return net

    # fused: no other optimizer can look for infinite gradients of float16 without making the host wait
    optimizer = functools.partial(torch.optim.Adam, lr=1e-4, betas=(0.9, 0.99), eps=1e-11, fused=True)
    options = {"optimizer": optimizer, "compile": compile, "channels_last": args.channels_last}
    if kind == "diffusion":
        return TrigFlowDiffusion(network(), **options)
    if kind == "sct":
        return ConsistencyTraining(network(), **options)
    return ConsistencyDistillation(network(), teacher=network(), **options)


def peers_loss(module: TrigFlowModule, kind: str, x_0: Tensor, z: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """Loss per sample as other implementations have it: teacher, no-gradient jvp and student each pass by itself."""
    if kind == "diffusion":
        return module.loss(x_0, z, t, label)
    x_t = interpolate(x_0, z, t)
    dx_t = module.velocity(x_t, x_0, z, t, label, None)
    cos_sin = t.cos() * t.sin()
    with torch.no_grad():
        tangents = cos_sin.view(-1, 1, 1, 1) * dx_t, cos_sin * module.sigma_data
        F_minus, J = torch.func.jvp(lambda x, t: module(x, t, label), (x_t / module.sigma_data, t), tangents)
        g = normalize(tangent(F_minus.float(), J.float(), x_t, dx_t, t, module.sigma_data, module.tangent_warmup))
    F = module(x_t / module.sigma_data, t, label)
    return weighted_loss(F.float() - F_minus - g, module.adaptive_weight(t))


@contextlib.contextmanager
def plain_operators() -> Iterator[None]:
    """The networks with PyTorch's own linear layers and convolutions and with naive attention."""
    with contextlib.ExitStack() as stack:
        for name, operator in (
            ("sclightning.ops.dual.linear", nnF.linear),
            ("sclightning.ops.dual.conv2d", nnF.conv2d),
            ("sclightning.backbones.layers.linear", nnF.linear),
            ("sclightning.backbones.layers.conv2d", nnF.conv2d),
            ("sclightning.backbones.edm2.cosine_attention", naive.cosine_attention),
            ("sclightning.backbones.ddpmpp.jvp_attention", naive.attention),
            ("dit.jvp_attention", naive.attention),
        ):
            stack.enter_context(mock.patch(name, operator))
        yield
