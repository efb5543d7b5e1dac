"""Results are data: a dataclass for each kind, its schema version, its JSON, and what made it."""

from longroll.results._fingerprint import fingerprint, fingerprint_of_arrays
from longroll.results._json import read_json, write_json
from longroll.results._provenance import package_versions, provenance
from longroll.results._read import KINDS, Diagnoses, Tasks, read_result, read_results
from longroll.results._result import SCHEMA_VERSION, Provenance, Result, Section
from longroll.results._same import check_settings, same_form, warn_of_changes
from longroll.results.benchmark import BenchmarkResult
from longroll.results.calibration import CalibrationResult
from longroll.results.diagnosis import (
    IID,
    AdviceResult,
    BlameResult,
    BlameShare,
    Causal,
    Comparison,
    Coverage,
    Curve,
    DiagnosisResult,
    Difference,
    Excess,
    LayerStates,
    Precision,
    Remembrance,
    States,
    Stationarity,
    Texts,
)
from longroll.results.doctor import DoctorResult, PackingResult
from longroll.results.forecast import ForecastResult
from longroll.results.loss import LossResult
from longroll.results.plan import PlanResult
from longroll.results.posttrain import PosttrainResult
from longroll.results.quickstart import QuickstartResult
from longroll.results.task import Cell, Grid, Score, TaskResult

__all__ = [
    "IID",
    "KINDS",
    "SCHEMA_VERSION",
    "AdviceResult",
    "BenchmarkResult",
    "BlameResult",
    "BlameShare",
    "CalibrationResult",
    "Causal",
    "Cell",
    "Comparison",
    "Coverage",
    "Curve",
    "Diagnoses",
    "DiagnosisResult",
    "Difference",
    "DoctorResult",
    "Excess",
    "ForecastResult",
    "Grid",
    "LayerStates",
    "LossResult",
    "PackingResult",
    "PlanResult",
    "PosttrainResult",
    "Precision",
    "Provenance",
    "QuickstartResult",
    "Remembrance",
    "Result",
    "Score",
    "Section",
    "States",
    "Stationarity",
    "TaskResult",
    "Tasks",
    "Texts",
    "check_settings",
    "fingerprint",
    "fingerprint_of_arrays",
    "package_versions",
    "provenance",
    "read_json",
    "read_result",
    "read_results",
    "same_form",
    "warn_of_changes",
    "write_json",
]
