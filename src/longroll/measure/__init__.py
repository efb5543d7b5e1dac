"""Measures: roll a model out, without gradients, and look."""

from longroll.measure._blame import Blame, split_blame
from longroll.measure._coverage import Coverage, coverage
from longroll.measure._diagnose import Diagnosis, diagnose
from longroll.measure._forecast import Forecast, forecast
from longroll.measure._position_loss import PositionLoss, position_loss
from longroll.measure._state_ablation import CausalTest, causal, state_ablation
from longroll.measure._state_statistics import StateStatistics, state_statistics
from longroll.measure.calibration import Calibration, calibrate
from longroll.measure.kept import Kept
from longroll.measure.remembrance import Remembrance, effective_remembrance, remembrance_map

__all__ = [
    "Blame",
    "Calibration",
    "CausalTest",
    "Coverage",
    "Diagnosis",
    "Forecast",
    "Kept",
    "PositionLoss",
    "Remembrance",
    "StateStatistics",
    "calibrate",
    "causal",
    "coverage",
    "diagnose",
    "effective_remembrance",
    "forecast",
    "position_loss",
    "remembrance_map",
    "split_blame",
    "state_ablation",
    "state_statistics",
]
