"""Measures: roll a model out, without gradients, and look."""

from longroll.measure.diagnose import Diagnosis, diagnose
from longroll.measure.position_loss import PositionLoss, position_loss
from longroll.measure.state_statistics import StateStatistics, state_statistics

__all__ = ["Diagnosis", "PositionLoss", "StateStatistics", "diagnose", "position_loss", "state_statistics"]
