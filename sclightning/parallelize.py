"""What many devices do to a network, beside it: sharding (FSDP2) and activation checkpointing, block by block.

And what they do to a run: :func:`stop_together`.
"""

import functools
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    import lightning as L
    from torch.distributed.device_mesh import DeviceMesh


def blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network: what its outermost lists (ModuleList, ModuleDict, Sequential) hold, in order."""
    if isinstance(network, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return list(network.children())
    return [block for child in network.children() for block in blocks(child)]


def shard(network: nn.Module, mesh: "DeviceMesh") -> None:
    """Shard a network's parameters over the devices of ``mesh`` (FSDP2), each block gathered on its own.

    Frozen parameters are sharded like the others. A network that is sharded already stays as it is.

    Args:
        network: Network with its weights, the same on all devices; any depth of blocks, none too.
        mesh: One-dimensional mesh.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(network, FSDPModule):
        return
    for block in blocks(network):
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh)
    # Also what the blocks leave over: an evaluation of a frozen network has no backward pass that would free it.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def checkpoint_blocks(network: nn.Module) -> None:
    """Have each block keep its inputs only, and compute its activations again in the backward pass.

    To be called before :func:`shard`, whose hooks must lie outside.

    Raises:
        ValueError: If the network has no module lists, whose entries the blocks are.
    """
    if not (found := blocks(network)):
        raise ValueError(
            f"activation_checkpointing found no blocks in {type(network).__name__}, which has no nn.ModuleList or "
            "nn.ModuleDict; put its blocks into one, or leave the option out."
        )
    for block in found:
        if "forward" not in vars(block):
            block.forward = functools.partial(_recompute, block.forward)


def _recompute(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)  # nothing to save
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def is_sharded(x: Any) -> bool:
    """Whether ``x`` is a tensor of which each device has a part (DTensor)."""
    return hasattr(x, "full_tensor")


def local(x: Tensor) -> Tensor:
    """This device's part of a sharded tensor, sharing its memory; another tensor as it is."""
    return x.to_local() if is_sharded(x) else x


def full(x: Tensor) -> Tensor:
    """The whole of a sharded tensor in host memory, for which all devices must ask; another tensor as it is."""
    return x.full_tensor().cpu() if is_sharded(x) else x


def shard_like(x: Tensor, reference: Tensor) -> Tensor:
    """The whole tensor ``x``, which all devices have, in parts like ``reference``; as it is if that is not sharded."""
    if is_sharded(x) or not is_sharded(reference):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, reference.device_mesh, reference.placements, src_data_rank=None)


def stop_together(trainer: "L.Trainer") -> None:
    """Have a SIGTERM to any process end the run of all, before the same batch, without the host waiting for the device.

    Lightning 2.6 asks before every batch whether the first process has had one, and the host waits for the answer
    (Lightning-AI/pytorch-lightning#21487), so it can never prepare a step while the device is at the one before. Here
    each process is asked too, and the answer is read a batch later, when it has long been there. In Lightning's place
    only while it trains, and for this one signal; what else handles it still does.
    """
    from lightning.pytorch.utilities.exceptions import SIGTERMException  # networks import this file without Lightning

    loop, connector = trainer.fit_loop.epoch_loop, trainer._signal_connector
    if trainer.world_size == 1 or not hasattr(loop, "_broadcast_sigterm_tensor"):
        return
    signalled, device = trainer.received_sigterm, trainer.strategy.root_device
    answer: tuple[Tensor, torch.cuda.Event | None] | None = None

    def ask() -> None:
        nonlocal answer
        flag = torch.full((1,), float(signalled), device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        before, answer = answer, (flag.to("cpu", non_blocking=True), torch.cuda.Event() if flag.is_cuda else None)
        if answer[1] is not None:
            answer[1].record()
        told, arrived = before or answer  # the first time there is nothing else to wait for
        if arrived is not None:
            arrived.synchronize()
        if told.item():
            connector.received_sigterm = True  # as callbacks know it
            raise SIGTERMException

    def flag_it(signum: int, frame: Any) -> None:
        nonlocal signalled
        signalled = True
        if not trainer.training:
            connector._sigterm_notifier_fn(signum, frame)

    loop._broadcast_sigterm_tensor = ask
    # Lightning's own handler broadcasts, which only its own question could receive.
    handlers = getattr(signal.getsignal(signal.SIGTERM), "signal_handlers", [])
    handlers[:] = [flag_it if h == connector._sigterm_notifier_fn else h for h in handlers]
