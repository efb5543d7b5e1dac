"""The price of a repair: what a model reads worse in range than before, and better far out.

A flat curve can be bought: a model that forgets its context holds its level at every length, and reads worse
in range. So a repair is held against the model before it, and against a control that took as many steps from
zero states. A difference counts where its interval over texts does not hold zero.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from longroll.errors import LongrollError
from longroll.measure._position_loss import PositionLoss
from longroll.measure.bootstrap import bootstrap_mean
from longroll.results import DiagnosisResult

_BYTES = 0.01  # by which the bytes of a token may differ: more is another tokenizer


@dataclass(frozen=True)
class Difference:
    """Nats by which one run reads above another, with the 95 % interval over texts."""

    mean: float
    low: float | None
    """None where a run does not hold the losses of its texts, as those of earlier releases."""
    high: float | None
    paired: bool
    """Whether each text was compared with itself."""

    @property
    def sign(self) -> int:
        """1 for above, -1 for below, 0 where the interval holds zero or there is none."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class Comparison:
    """One run against another."""

    label: str
    """Names the other run."""
    in_range: Difference
    """Over positions [0, T)."""
    far: Difference | None
    """Over the last octave of positions; None where the runs end at different ones."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for results."""
        return asdict(self)

    @property
    def price(self) -> str:
        """The price of the run in range, as the end of a sentence."""
        paid, against = self.in_range, f"against {self.label}"
        if not math.isfinite(paid.mean):
            return f"without a finite loss in range to compare {against}"
        if paid.low is None or paid.high is None:
            way = "lower" if paid.mean < 0 else "higher"
            size = _nats(abs(paid.mean))
            return f"reads {size} nats {way} in range {against}, without an interval: measure both again"
        interval = f"({_nats(paid.low)} to {_nats(paid.high)})"
        if not paid.sign:
            return f"no cost in range shows {against} {interval}"
        verb = "costs" if paid.sign > 0 else "gains"
        return f"{verb} {_nats(abs(paid.mean))} nats in range {against} {interval}"


def text_losses(tokens: Tensor, carried: PositionLoss, train_length: int) -> dict[str, Any]:
    """Return what a result keeps of each text, so that another run can be compared with it.

    Args:
        tokens: (B, L + 1).
        carried: their losses from the zero state.
        train_length: T.

    Returns:
        A fingerprint of the tokens, and the mean loss of each text in range and over the last octave.
    """
    length = carried.losses.shape[1]
    ids = tokens.cpu().to(torch.int64).contiguous().numpy()
    return {
        "fingerprint": hashlib.sha256(ids.tobytes()).hexdigest()[:16],
        "in_range": carried.losses[:, :train_length].double().mean(dim=1).tolist(),
        "far": carried.losses[:, length // 2 :].double().mean(dim=1).tolist(),
    }


def compare(run: DiagnosisResult, other: DiagnosisResult, *, seed: int = 0) -> Comparison:
    """Compare two diagnoses.

    Args:
        run: the one to be judged.
        other: the result of the model before, or of a control.
        seed: random seed of the bootstrap.
    """
    same_end = run.max_position == other.max_position
    return Comparison(
        other.label or "another run",
        _difference(run, other, "in_range", seed),
        _difference(run, other, "far", seed) if same_end else None,
    )


def check_comparable(
    other: DiagnosisResult, train_length: int, bytes_per_token: float | None, argument: str
) -> None:
    """Refuse another run whose losses are of another range or of another kind of token.

    Raises:
        LongrollError: naming `argument`, which gave `other`.
    """
    if other.train_length != train_length:
        raise LongrollError(
            f"{argument} was trained at {other.train_length} tokens and this model at {train_length}: their "
            "losses in range are of other positions. Give both the same `train_length`."
        )
    sizes = [size or math.nan for size in (bytes_per_token, other.bytes_per_token)]
    if max(sizes) > (1 + _BYTES) * min(sizes):
        raise LongrollError(
            f"{argument} has tokens of {sizes[1]:.2f} bytes and this run of {sizes[0]:.2f}: nats of two "
            "tokenizers, or of two kinds of text, cannot be compared."
        )


def _difference(run: DiagnosisResult, other: DiagnosisResult, level: str, seed: int) -> Difference:
    if run.texts is None or other.texts is None:
        return Difference(run.level(level) - other.level(level), None, None, False)
    ours, theirs = (
        torch.tensor([math.nan if x is None else x for x in getattr(texts, level)], dtype=torch.float64)
        for texts in (run.texts, other.texts)
    )
    if run.texts.fingerprint == other.texts.fingerprint and len(ours) == len(theirs):
        mean, low, high = (t.item() for t in bootstrap_mean((ours - theirs)[:, None], seed=seed))
        return Difference(mean, low, high, True)
    return _unpaired(ours, theirs, seed)


def _unpaired(ours: Tensor, theirs: Tensor, seed: int) -> Difference:
    """Return difference of the means of independent texts, (B,) and (C,): their intervals' arms add in
    squares.

    Source: Zou & Donner 2008, "Construction of confidence limits about effect measures".
    """
    a, a_low, a_high = (t.item() for t in bootstrap_mean(ours[:, None], seed=seed))
    b, b_low, b_high = (t.item() for t in bootstrap_mean(theirs[:, None], seed=seed + 1))
    mean = a - b
    return Difference(
        mean, mean - math.hypot(a - a_low, b_high - b), mean + math.hypot(a_high - a, b - b_low), False
    )


def _nats(nats: float) -> str:
    """Return nats to two places, to three where two would show next to nothing."""
    return f"{nats:.2f}" if abs(nats) >= 0.095 else f"{nats:.3f}"
