"""Open result files: of one result, or of several runs together as in recipes/results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from longroll.errors import LongrollError
from longroll.results._json import decode, read_bytes
from longroll.results._result import SCHEMA_VERSION, Result, Version
from longroll.results.benchmark import BenchmarkResult
from longroll.results.calibration import CalibrationResult
from longroll.results.diagnosis import DiagnosisResult
from longroll.results.doctor import DoctorResult, PackingResult
from longroll.results.forecast import ForecastResult
from longroll.results.loss import LossResult
from longroll.results.plan import PlanResult
from longroll.results.posttrain import PosttrainResult
from longroll.results.quickstart import QuickstartResult
from longroll.results.task import TaskResult

R = TypeVar("R", bound=Result)


@dataclass(frozen=True, kw_only=True)
class Diagnoses(Result):
    """Diagnoses of several runs in one file."""

    kind: Literal["diagnoses"] = "diagnoses"
    schema_version: Version = SCHEMA_VERSION
    runs: Annotated[list[DiagnosisResult], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class Tasks(Result):
    """Results of one task of several runs in one file, by name."""

    kind: Literal["tasks"] = "tasks"
    schema_version: Version = SCHEMA_VERSION
    runs: Annotated[dict[str, TaskResult], Field(min_length=1)]


KINDS: dict[str, type[Result]] = {
    "diagnosis": DiagnosisResult,
    "diagnoses": Diagnoses,
    "position_loss": LossResult,
    "task": TaskResult,
    "tasks": Tasks,
    "posttrain": PosttrainResult,
    "plan": PlanResult,
    "quickstart": QuickstartResult,
    "benchmark": BenchmarkResult,
    "calibration": CalibrationResult,
    "forecast": ForecastResult,
    "doctor": DoctorResult,
    "packing": PackingResult,
}
"""Every kind of result file by its field `kind`."""


def read_result(path: str | Path) -> Result:
    """Open a result file of any kind.

    Raises:
        LongrollError: naming the file and the field, for a file that is missing or holds no valid result.
    """
    text = read_bytes(path)
    kind = _kind(decode(text, path))
    if kind not in KINDS:
        raise LongrollError(f"{path} is not a result of longroll: name a result file.")
    return KINDS[kind].from_text(text, source=path)


def read_results(path: str | Path, *kinds: type[R], otherwise: str) -> list[R]:
    """Open a file of results of given kinds, one or several.

    Args:
        path: the file.
        kinds: what its results may be.
        otherwise: says of a file of another kind what it is not, after its name in the error.

    Raises:
        LongrollError: naming the file and the field, for a file that is missing or holds something else.
    """
    text = read_bytes(path)
    named = KINDS.get(_kind(decode(text, path)))
    if named is None or not issubclass(named, (*kinds, Diagnoses, Tasks)):
        raise LongrollError(f"{path} {otherwise}")
    result = named.from_text(text, source=path)
    runs: Sequence[Any] = [result]
    if isinstance(result, Diagnoses):
        runs = result.runs
    elif isinstance(result, Tasks):
        runs = list(result.runs.values())
    found = [run for run in runs if isinstance(run, kinds)]
    if len(found) < len(runs):
        raise LongrollError(f"{path} {otherwise}")
    return found


def _kind(data: Any) -> str:
    kind = data.get("kind") if isinstance(data, dict) else None
    return kind if isinstance(kind, str) else ""
