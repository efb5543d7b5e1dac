"""Measures: roll a model out, without gradients, and look."""

from longroll.measure.causal import CausalTest, causal
from longroll.measure.coverage import Coverage, coverage
from longroll.measure.diagnose import Diagnosis, diagnose
from longroll.measure.position_loss import PositionLoss, position_loss
from longroll.measure.remembrance import Remembrance, effective_remembrance, remembrance_map
from longroll.measure.state_statistics import StateStatistics, state_statistics

__all__ = [
    "CausalTest",
    "Coverage",
    "Diagnosis",
    "PositionLoss",
    "Remembrance",
    "StateStatistics",
    "causal",
    "coverage",
    "diagnose",
    "effective_remembrance",
    "position_loss",
    "remembrance_map",
    "state_statistics",
]
