"""Networks ``F = net(x, t, label=None, guidance=None)``: the contract is in ``docs/extending.md``."""

from sclightning.backbones.ddpmpp import DDPMpp
from sclightning.backbones.edm2 import EDM2

__all__ = ["EDM2", "DDPMpp"]
