"""Networks that somebody else trained, behind the contract of a backbone: ``docs/adapters.md``."""

from sclightning.adapters.diffusers_model import load_diffusers
from sclightning.adapters.edm import load_edm, load_edm2
from sclightning.adapters.forward_ad import check_forward_ad
from sclightning.adapters.guidance import Guided, guided_velocity
from sclightning.adapters.operators import enable_forward_ad
from sclightning.adapters.process import EDM, FlowMatching, VariancePreserving
from sclightning.adapters.velocity import VelocityAdapter
from sclightning.adapters.weights import load_weights

__all__ = [
    "EDM",
    "FlowMatching",
    "Guided",
    "VariancePreserving",
    "VelocityAdapter",
    "check_forward_ad",
    "enable_forward_ad",
    "guided_velocity",
    "load_diffusers",
    "load_edm",
    "load_edm2",
    "load_weights",
]
