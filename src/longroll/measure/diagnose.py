"""One call that says whether a model holds past its training length, and where it breaks."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from longroll.errors import LongrollError
from longroll.measure.bootstrap import bootstrap_mean
from longroll.measure.position_loss import PositionLoss, log_spaced, position_loss
from longroll.measure.restart import excess_loss, probe_losses
from longroll.measure.state_statistics import StateRecorder
from longroll.model import RecurrentLM
from longroll.results import provenance

Verdict = Literal["healthy", "fades", "explodes"]

TOLERANCE = 0.05
"""Nats: a loss above that of a fresh start by less than this is not called a break."""
EXPLOSION = 1.0
"""Nats above a fresh start from which a model that breaks is said to explode rather than fade."""


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; `to_json` is what reports are drawn from."""

    verdict: Verdict
    edge: int | None
    """Where the loss first exceeds its level in range, and a fresh start's, beyond the intervals; or None."""
    severity: float
    """Nats above a fresh start over the last octave of positions."""
    levels: dict[str, float | None]
    """Mean loss in nats: `in_range` over [0, T); `2x`, `8x`, `64x` over the octave up to there; `far`."""
    sentence: str
    details: dict[str, Any] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Plain data: numbers that are not finite become null."""
        data = {
            "kind": "diagnosis",
            **self.details,
            "levels": self.levels,
            "edge": self.edge,
            "severity": self.severity,
            "verdict": self.verdict,
            "sentence": self.sentence,
        }
        return json.loads(json.dumps(data, default=float), parse_constant=lambda _: None)


def diagnose(
    lm: RecurrentLM,
    tokens: Tensor,
    *,
    train_length: int | None = None,
    label: str = "base",
    bytes_per_token: float | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Diagnosis:
    """Roll a model out over `tokens` and say how it does past its training length.

    A model breaks where its loss is above its level in range and also above that of the same model restarted
    within its training length on the same tokens (`restart.excess_loss`), so that a text whose later parts
    are harder is not taken for a fault.

    Args:
        lm: the model.
        tokens: (B, L + 1), L above the training length and at least 4 sequences.
        train_length: T; default: what the model's config says.
        label: what to call this run in a report.
        bytes_per_token: of the text, for bits per byte.
        chunk_size: tokens of a row in one forward.
        seed: of the bootstrap.
        progress: called with how many positions of each row are done.

    Raises:
        LongrollError: for an unknown training length, too few sequences, or too short ones.
    """
    began = time.perf_counter()
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    train_length = train_length or lm.train_length
    if train_length is None:
        raise LongrollError("The model does not say at which length it was trained: give --train-length.")
    if length <= train_length:
        raise LongrollError(
            f"{length} positions do not go past the training length {train_length}: raise --length."
        )
    if rows < 4:
        raise LongrollError(f"{rows} sequences are too few for an interval: give at least 4 (--sequences).")
    stops = log_spaced(length, 3)
    recorder = StateRecorder(lm, stops) if lm.family.recurrent else None
    carried = position_loss(
        lm, tokens, chunk_size=chunk_size, stops=stops if recorder else (), watch=recorder, progress=progress
    )
    ends, excess = excess_loss(lm, tokens, carried, train_length)
    mean, low, high = bootstrap_mean(excess, seed=seed)
    level = carried.losses[:, :train_length].mean(dim=1, keepdim=True)
    _, low_rise, _ = bootstrap_mean(probe_losses(carried, ends, train_length) - level, seed=seed)
    # `not <=`, not `>`: a NaN loss is damage
    above = ~((low <= 0) | (mean <= TOLERANCE) | (low_rise <= 0))
    edge = _edge(ends, above.tolist(), train_length)
    far = [i for i, end in enumerate(ends) if end > length // 2]
    severity = mean[far].mean().item()
    verdict: Verdict = "healthy" if edge is None else "explodes" if not severity < EXPLOSION else "fades"
    levels = _levels(carried, train_length)
    details = {
        "label": label,
        "model": lm.name,
        "architecture": lm.model.config.model_type,
        "parameters": sum(p.numel() for p in lm.parameters()),
        "train_length": train_length,
        "sequences": rows,
        "max_position": length,
        "bytes_per_token": bytes_per_token,
        "curve": carried.curve(),
        "excess": {
            "position": ends,
            "mean": mean.tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
        },
        "states": recorder.statistics().to_json() if recorder else None,
        "provenance": provenance(lm, seed=seed, seconds=time.perf_counter() - began),
    }
    return Diagnosis(verdict, edge, severity, levels, _sentence(verdict, edge, severity, length), details)


def _edge(ends: list[int], above: list[bool], train_length: int) -> int | None:
    """Where the damage begins: the first probe from which two in a row are above."""
    for i in range(len(ends)):
        if above[i] and above[min(i + 1, len(ends) - 1)]:
            return ends[i - 1] if i else train_length
    return None


def _levels(carried: PositionLoss, train_length: int) -> dict[str, float | None]:
    length = carried.losses.shape[1]
    levels: dict[str, float | None] = {"in_range": carried.between(0, train_length)}
    for times in (2, 8, 64):
        stop = times * train_length
        levels[f"{times}x"] = carried.between(stop // 2, stop) if stop <= length else None
    levels["far"] = carried.between(length // 2, length)
    return levels


def _sentence(verdict: Verdict, edge: int | None, severity: float, length: int) -> str:
    if edge is None:
        holds = f"Holds to {short(length)}: the loss stays at its level in range."
        if severity > TOLERANCE:
            far = f"{short(length // 2)}-{short(length)}"
            return f"{holds} A fresh start would still be {severity:.2f} nats better at {far}."
        return f"{holds} Leave it alone: a repair would only cost loss in range."
    size = f"{severity:.2f} nats above a fresh start" if math.isfinite(severity) else "not finite"
    how = "and explodes" if verdict == "explodes" else "and fades"
    return f"Breaks at t ~ {short(edge)} {how}: at {short(length // 2)}-{short(length)} it is {size}."


def short(position: int) -> str:
    """A position as people say it: 212, 4k, 131k."""
    return str(position) if position < 1000 else f"{position / 1024:.3g}k"
