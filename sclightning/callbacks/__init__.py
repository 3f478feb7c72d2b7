"""Schedules and measuring around a run."""

from sclightning.callbacks.ema import EMA
from sclightning.callbacks.fid import FIDEvaluation
from sclightning.callbacks.finite_gradients import FiniteGradients
from sclightning.callbacks.gradient_norm import GradientNorm
from sclightning.callbacks.jvp_self_check import JVPSelfCheck
from sclightning.callbacks.posthoc_ema import PostHocEMA
from sclightning.callbacks.samples import SampleGrid, SampleWriter
from sclightning.callbacks.tangent_monitor import TangentMonitor
from sclightning.callbacks.tangent_warmup import TangentWarmup

__all__ = [
    "EMA",
    "FIDEvaluation",
    "FiniteGradients",
    "GradientNorm",
    "JVPSelfCheck",
    "PostHocEMA",
    "SampleGrid",
    "SampleWriter",
    "TangentMonitor",
    "TangentWarmup",
]
