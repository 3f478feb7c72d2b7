"""jvp_attention and the dual layers under DDP and FSDP2, two processes with gloo: values and gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from sclightning.ops import Linear, jvp_attention


class Net(nn.Module):
    """Two attention blocks. Called with a tangent, each block runs the jvp inside itself and hands its tangent on."""

    def __init__(self, blockwise):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.blockwise = blockwise
        self.double()

    def forward(self, x, tx):
        if self.blockwise:
            for block in self.blocks:
                x, tx = block(x, tx)
            return x, tx
        o, to = torch.func.jvp(lambda x: self.blocks[1].primal(self.blocks[0].primal(x)), (x,), (tx,))
        return o, to.detach()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = Linear(8, 24)

    def primal(self, x):
        return x + attend(self.qkv(x), jvp_attention)

    def forward(self, x, tx):
        o, to = torch.func.jvp(self.primal, (x,), (tx,))
        return o, to.detach()


def attend(qkv, attention):
    q, k, v = qkv.unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    return attention(q, k, v).transpose(1, 2).flatten(2)


def data():
    torch.manual_seed(1)
    return torch.randn(4, 5, 8, dtype=torch.float64), torch.randn(4, 5, 8, dtype=torch.float64)


def expected():
    """Output, tangent and gradients of the whole batch, from PyTorch's own rules."""
    net = Net(blockwise=False)

    def plain(x):
        for block in net.blocks:
            x = x + attend(F.linear(x, block.qkv.weight, block.qkv.bias), naive)
        return x

    o, to = torch.func.jvp(plain, *((a,) for a in data()))
    o.square().sum(1).mean().backward()
    return o.detach(), to.detach(), [p.grad for p in net.parameters()]


def naive(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v


def worker(kind):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    net = Net(blockwise=kind == "fsdp")
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(net)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
        wrapped = fully_shard(net, mesh=mesh)
    x, tx = (a[2 * rank : 2 * rank + 2] for a in data())
    o, to = wrapped(x, tx)
    o.square().sum(1).mean().backward()
    o_expected, to_expected, gradients = expected()
    torch.testing.assert_close(o, o_expected[2 * rank : 2 * rank + 2])
    torch.testing.assert_close(to, to_expected[2 * rank : 2 * rank + 2])
    for p, gradient in zip(net.parameters(), gradients, strict=True):
        grad = p.grad if kind == "ddp" else p.grad.full_tensor()
        torch.testing.assert_close(grad, gradient)
    dist.barrier()  # a rank that leaves early takes its connections with it
    print("values agree", flush=True)
    os._exit(0)  # torch's own teardown after FSDP2 aborts now and then: "terminate called without an active exception"


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes(kind):
    """DDP: the jvp of the whole network inside the wrapped forward. FSDP2: in each block's."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    command += [__file__, kind]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout.count("values agree") == 2, run.stdout + run.stderr


def test_the_blocks_own_jvp_is_that_of_the_network():
    whole, blockwise = (Net(b)(*data()) for b in (False, True))
    for a, b in zip(whole, blockwise, strict=True):
        torch.testing.assert_close(a, b)


if __name__ == "__main__":
    worker(sys.argv[1])
