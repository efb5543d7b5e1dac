"""The figures, each a function from runs to a matplotlib Figure; none touches pyplot's state."""

from longroll.report.figures.blame import blame_figure
from longroll.report.figures.coverage import coverage_map
from longroll.report.figures.excess import excess_figure
from longroll.report.figures.position import position_figure
from longroll.report.figures.remembrance import remembrance_curves, remembrance_map
from longroll.report.figures.states import state_figure
from longroll.report.figures.tasks import task_curves, task_figure, task_heatmap

__all__ = [
    "blame_figure",
    "coverage_map",
    "excess_figure",
    "position_figure",
    "remembrance_curves",
    "remembrance_map",
    "state_figure",
    "task_curves",
    "task_figure",
    "task_heatmap",
]
