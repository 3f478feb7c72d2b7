"""LightningModules: the TrigFlow diffusion teacher, the two ways to a consistency model, and what they compare with."""

from sclightning.modules.consistency import ConsistencyDistillation, ConsistencyTraining
from sclightning.modules.diffusion import TrigFlowDiffusion
from sclightning.modules.discrete import (
    DiscreteConsistencyDistillation,
    DiscreteConsistencyTraining,
    EasyConsistencyTuning,
)
from sclightning.modules.multistep import MultistepConsistencyDistillation
from sclightning.modules.vsd import VariationalScoreDistillation

__all__ = [
    "ConsistencyDistillation",
    "ConsistencyTraining",
    "DiscreteConsistencyDistillation",
    "DiscreteConsistencyTraining",
    "EasyConsistencyTuning",
    "MultistepConsistencyDistillation",
    "TrigFlowDiffusion",
    "VariationalScoreDistillation",
]
