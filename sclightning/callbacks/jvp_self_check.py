"""Whether forward-mode AD gives the tangent that it should, looked at before the first step."""

import copy
import warnings
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sclightning.adapters import check_forward_ad
from sclightning.callbacks.tangent import TangentCallback
from sclightning.modules.consistency import ConsistencyModel
from sclightning.objective import direction
from sclightning.parallelize import is_sharded
from sclightning.trigflow import interpolate


class JVPSelfCheck(TangentCallback):
    r"""Compares the tangents of the first batch with central differences, and names the first layer that is wrong.

    Every fit of a consistency model compares the network as a whole on two samples, see
    :func:`~sclightning.adapters.check_forward_ad`. In its place this one takes the step's own images, noise, times,
    conditions and direction :math:`(\cos t\sin t\,\dot x_t,\ \cos t\sin t\,\sigma_d)`, and compares layer by layer:

    - the network as it is, to 5 % (half precision is too coarse, there only failures are found);
    - a copy of it in float64, to ``rtol``, unless an operator has no float64;
    - with ``compile``, the tangent norms of the compiled step with those of the eager one, to 1 % in float32 and 10 %
      in half precision, unless dropout makes the two different or the module has a training step of its own.

    What agrees and what was not looked at is said in one line. The run that follows is the same to the last bit.

    Args:
        samples: How many samples of the batch to take.
        rtol: Relative difference from which on a tangent in float64 is wrong.
        action: ``raise`` the finding, or ``warn`` of it and train.
    """

    def __init__(self, samples: int = 8, rtol: float = 1e-3, action: Literal["raise", "warn"] = "raise"):
        if samples < 1 or action not in ("raise", "warn"):
            raise ValueError(f"JVPSelfCheck has samples={samples}, action={action}; give 1 or more, and raise or warn.")
        self.samples, self.rtol, self.action = samples, rtol, action
        self._done = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the first batch, once, in place of the module's own look.

        Raises:
            RuntimeError: If a tangent is wrong or cannot be had, and ``action`` is ``raise``.
        """
        if self._done:
            return
        self._done = pl_module._forward_ad_checked = True
        if any(map(is_sharded, pl_module.backbone.parameters())):
            rank_zero_info("JVPSelfCheck did not look at the tangent: the network is sharded.")
            return
        try:
            found = [*self._layers(pl_module, batch, batch_idx)]
            if pl_module.compile_options is not None:
                with trainer.precision_plugin.train_step_context():
                    found.append(_compiled_step(pl_module, batch, batch_idx))
        except RuntimeError as error:
            if self.action == "raise":
                raise
            warnings.warn(f"JVPSelfCheck: {error}", stacklevel=2)
        else:
            rank_zero_info(f"JVPSelfCheck, tangents against central differences: {'; '.join(found)}.")

    def _layers(self, module: ConsistencyModel, batch: Any, batch_idx: int) -> list[str]:
        with torch.no_grad(), module.draw(batch, batch_idx) as (x_0, z, t, label, guidance):
            x_t = interpolate(x_0, z, t)
            dx_t = module.velocity(x_t, x_0, z, t, label, guidance)
            inputs = (x_t / module.sigma_data, t, label, guidance)
            tangents = direction(dx_t, t, module.sigma_data)
            inputs, tangents = tree_map_only(Tensor, lambda v: v[: self.samples], (inputs, tangents))
            network, compiled = module.backbone, module.compile_options is not None
            (x, *others), (d_x, d_t) = inputs, tangents
            own = module.dtype
            check_forward_ad(network, x.to(own), *others, compiled=compiled, tangents=(d_x.to(own), d_t))
            half = torch.finfo(own).bits < 32
            found = [f"half precision of {own}, no failure" if half else f"all layers agree to 5 % in {own}"]
            inputs, tangents = tree_map_only(Tensor, _double, (inputs, tangents))
            double = _copy_in_double(network, inputs)
            if double is None:
                return [*found, "torch.float64 not looked at, an operator does not have it"]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # said above
                check_forward_ad(double, *inputs, rtol=self.rtol, tangents=tangents)
            return [*found, f"to {self.rtol:.1%} in torch.float64"]


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _copy_in_double(network: nn.Module, inputs: tuple) -> nn.Module | None:
    """A copy of the network in float64, or None where it does not run in that."""
    names = ("label", "guidance")
    conditions = {name: value for name, value in zip(names, inputs[2:], strict=True) if value is not None}
    try:
        double = copy.deepcopy(network).double()
        double(*inputs[:2], **conditions)
    except (RuntimeError, TypeError, ValueError):  # also of copying a network that holds an operator as an attribute
        return None
    return double


def _compiled_step(module: ConsistencyModel, batch: Any, batch_idx: int) -> str:
    """Compare tangent norms of the compiled step, the one that will train, with the eager ones.

    Raises:
        RuntimeError: If they differ.
    """
    if type(module).training_step is not ConsistencyModel.training_step:
        return f"the compiled step not looked at, {type(module).__name__} has one of its own"
    warmup = module.tangent_warmup.clone()
    module.tangent_warmup.fill_(1.0)  # at the first step it may hide all that was differentiated
    try:
        norms = []
        for seed in (None, 0):
            with torch.no_grad(), module.draw(batch, batch_idx) as inputs:
                if seed is not None:
                    torch.manual_seed(seed)  # inside the step's own random state
                norms.append(module.loss(*inputs).tangent_norm)
        if not torch.equal(*norms):
            return "the compiled step not looked at, it draws other dropout masks than the eager one"
        with module.draw(batch, batch_idx) as inputs:  # with gradient: it is the graph of the steps to come
            found = module._evaluate(*inputs).tangent_norm.detach()
    finally:
        module.tangent_warmup.copy_(warmup)
    half = torch.finfo(module.dtype).bits < 32 or torch.is_autocast_enabled(found.device.type)
    error = float((found - norms[0]).norm() / norms[0].norm())
    if not error <= (0.1 if half else 0.01):
        raise RuntimeError(
            f"The tangent norms of the compiled step are off by {error:.0%} from the eager ones, which agree with "
            "central differences; look in the network for an autograd.Function, whose jvp torch.compile ignores "
            "(pytorch#192985), use operations with a forward-mode rule (sclightning.ops), or leave compile out."
        )
    return f"the compiled step is off by {error:.1g} from the eager one"
