"""LightningModules: the TrigFlow diffusion teacher and the two ways to a consistency model."""

from sclightning.modules.consistency import ConsistencyDistillation, ConsistencyTraining
from sclightning.modules.diffusion import TrigFlowDiffusion

__all__ = ["ConsistencyDistillation", "ConsistencyTraining", "TrigFlowDiffusion"]
