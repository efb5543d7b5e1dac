"""The report: one HTML page and paper-ready figures, drawn from saved results."""

from longroll.report.export import write_figures
from longroll.report.figures import (
    blame_figure,
    coverage_map,
    excess_figure,
    position_figure,
    remembrance_curves,
    remembrance_map,
    state_figure,
    task_curves,
    task_heatmap,
)
from longroll.report.page import render, write_report
from longroll.report.svg import to_svg

__all__ = [
    "blame_figure",
    "coverage_map",
    "excess_figure",
    "position_figure",
    "remembrance_curves",
    "remembrance_map",
    "render",
    "state_figure",
    "task_curves",
    "task_heatmap",
    "to_svg",
    "write_figures",
    "write_report",
]
