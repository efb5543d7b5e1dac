"""The table of families: what each can do, found by trying the laws on tiny random models."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longroll import ops
from longroll.conformance import laws
from longroll.conformance.tiny import CONFIGS, ON_GPU, VOCAB, build, every_expert
from longroll.families import Family, family_of
from longroll.families.fla_models.native import NativeFamily
from longroll.model import RecurrentLM

_Trial = Callable[[], laws.Gap]

COLUMNS = {
    "family": "family",
    "kind": "recurrence",
    "loads": "loads",
    "state": "state in/out",
    "gradient": "gradient",
    "cpu": "CPU path",
    "gpu": "GPU path",
    "reference": "checked against",
}
"""Key of a row -> heading."""


def paths(family: Family) -> tuple[str, str]:
    """Return what computes a family's recurrence on a CPU and on a GPU: longroll's op, or whose function."""
    if isinstance(family, NativeFamily):
        return "none", str(family.kernel)
    if family.op is not None:
        name = f"ops.{family.op}" if hasattr(ops, family.op) else family.op
        return name, f"fla.chunk_{family.op} or {name}" if family.on_fla else name
    return "transformers", "transformers" if family.kernel is None else f"{family.kernel} or transformers"


def tabulate(
    model_types: Iterable[str] | None = None,
    *,
    device: str | torch.device = "cpu",
    advance: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Return one row for each family: each law's widest gap over its tiny models, and whether that is within
    rounding.

    Args:
        model_types: which families; default: all that have a tiny model.
        device: where to try the laws.
        advance: called after each model.
    """
    models: dict[str, list[str]] = {}
    for name, (model_type, _) in (CONFIGS | ON_GPU).items():
        models.setdefault(model_type, []).append(name)
    with _exact_float32():
        return [
            _row(model_type, models[model_type], torch.device(device), advance)
            for model_type in (models if model_types is None else model_types)
        ]


def _row(
    model_type: str, names: list[str], device: torch.device, advance: Callable[[], None]
) -> dict[str, Any]:
    """Return the row of one family, of its tiny models `names`."""
    family = family_of(model_type)
    gaps: dict[str, list[laws.Gap]] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            for column, trial in _trials(name, family, device, Path(folder)):
                gaps.setdefault(column, []).append(_try(trial))
        advance()
    cpu, gpu = paths(family)
    row: dict[str, Any] = {
        "family": model_type,
        "kind": family.kind,
        "cpu": cpu,
        "gpu": gpu,
        "gpu_tried": device.type == "cuda",
        "reference": family.reference,
        "problems": [],
    }
    for column, found in gaps.items():
        widest = laws.widest(found)
        verdict = _verdict(column, widest, _tolerance(column, family, device))
        row[f"{column}_gap"] = widest._asdict()
        if verdict == "NO":
            row["problems"].append(f"{model_type}: {column}: {widest.where}, off by {widest.size:.0e}")
        if column == "bfloat16":
            row["gpu"] += f"; bfloat16 {verdict}"
        elif column == "reference":
            row[column] = f"not {family.reference}" if verdict == "NO" else family.reference
        else:
            row[column] = verdict
    return row


@contextlib.contextmanager
def _exact_float32() -> Iterator[None]:
    """Let float32 be float32 on a GPU: cudnn's convolutions and Triton's products are tf32 otherwise."""
    before, cudnn = os.environ.get("TRITON_F32_DEFAULT"), torch.backends.cudnn.allow_tf32
    os.environ["TRITON_F32_DEFAULT"], torch.backends.cudnn.allow_tf32 = "ieee", False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = cudnn
        if before is None:
            del os.environ["TRITON_F32_DEFAULT"]
        else:
            os.environ["TRITON_F32_DEFAULT"] = before


def _tolerance(column: str, family: Family, device: torch.device) -> float:
    """Return how wide rounding makes the gaps of a column."""
    if column == "bfloat16":
        return laws.TO_FLOAT32
    if device.type == "cuda":
        return laws.IN_TF32 if family.on_fla else laws.ON_GPU
    return laws.TOLERANCE[torch.float32]


def _trials(name: str, family: Family, device: torch.device, folder: Path) -> list[tuple[str, _Trial]]:
    """Return columns, and the laws that fill them, of one tiny model in float32; fla's kernels also in
    bfloat16.
    """
    if name in ON_GPU and device.type != "cuda":
        return []
    on_fla = family.on_fla and device.type == "cuda"
    experts = every_expert(name) if on_fla else {}

    def model(dtype: torch.dtype = torch.float32) -> Any:
        return build(name, dtype=dtype, **experts).to(device)  # type: ignore[arg-type]

    def ids(rows: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(VOCAB, (rows, length), generator=generator).to(device)

    # on fla several chunks of 64, where its layers leave their one-step kernels; a state lost last shows most
    pieces = [70, 1, 77, 2] if on_fla else [17, 1, 15, 2]
    text = ids(2, sum(pieces) + 1)
    trials: list[tuple[str, _Trial]] = [
        ("loads", lambda: laws.round_trip(model(), ids(2, 20), folder)),
        ("reference", lambda: laws.own_logits(model(), text)),
        ("state", lambda: laws.chunking(RecurrentLM(model()), text[:, 1:], pieces)),
        ("state", lambda: laws.permutation(RecurrentLM(model()), ids(3, 20), 9, [2, 0, 1])),
        ("state", lambda: laws.saving(RecurrentLM(model()), text, 9, folder)),
    ]
    if family.kind == "attention":
        return trials
    if on_fla:

        def in_16_bits() -> laws.Gap:
            rounded, exact = (RecurrentLM(model(dtype)) for dtype in (torch.bfloat16, torch.float32))
            return laws.rounding(rounded, exact, text[:, 1:], pieces)

        trials.append(("bfloat16", in_16_bits))

    def from_noise() -> laws.Gap:
        lm = RecurrentLM(model())
        return laws.chunking(lm, text[:, 1:], pieces, laws.random_state(lm, 2))

    def reached() -> laws.Gap:
        lm = RecurrentLM(model())
        missing = laws.unreached(lm, text, laws.random_state(lm, 2))
        return laws.Gap(float("inf") if missing else 0.0, f"no gradient into {missing}")

    return [
        *trials,
        ("state", from_noise),
        ("state", lambda: laws.zero_state(RecurrentLM(model()), text)),
        ("gradient", reached),
        ("gradient", lambda: laws.chaining(RecurrentLM(model()), text, pieces)),
        ("gradient", lambda: laws.checkpointing(RecurrentLM(model()), text, pieces)),
        ("gradient", lambda: laws.zero_intervention(RecurrentLM(model()), text)),
    ]


def _try(trial: _Trial) -> laws.Gap:
    try:
        return trial()
    except Exception as error:  # one family that fails must not hide the others
        return laws.Gap(float("inf"), f"{type(error).__name__}: {str(error)[:80].splitlines()[0]}")


def _verdict(column: str, gap: laws.Gap, tolerance: float) -> str:
    """`yes`, `to 1e-06` (the next power of ten above the gap), or `NO`."""
    if gap.size == 0:
        return "yes"
    limit = tolerance * (10 if column == "gradient" else 1)
    if not gap.size <= limit:  # NaN fails too
        return "NO"
    return next(f"to 1e-{digits:02}" for digits in range(12, -1, -1) if gap.size <= 10.0**-digits)


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    """Return the table as Markdown; a star where the GPU path was not tried."""
    lines = [" | ".join(COLUMNS.values()), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(cells(row)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def cells(row: dict[str, Any]) -> list[str]:
    """Return what a row shows, in the order of `COLUMNS`."""
    shown = (
        dict.fromkeys(("loads", "state", "gradient"), "-")
        | row
        | {"gpu": row["gpu"] + ("" if row["gpu_tried"] else " *")}
    )
    return [shown[column] for column in COLUMNS]
