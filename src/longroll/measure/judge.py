"""Whether a model holds past its training length, and where it breaks, from its losses alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from longroll.measure._position_loss import PositionLoss
from longroll.measure.bootstrap import bootstrap_mean
from longroll.measure.excess_loss import probe_losses

Verdict = Literal["healthy", "fades", "explodes"]

TOLERANCE = 0.05
"""Nats: a loss above that of a fresh start by less than this is not called a break."""
EXPLOSION = 1.0
"""Nats above a fresh start from which a model that breaks is said to explode rather than fade."""


@dataclass(frozen=True)
class Judgement:
    """Verdict on a model from the losses of some texts."""

    verdict: Verdict
    edge: int | None
    """Where the loss first exceeds its level in range, and a fresh start's, beyond the intervals; or None."""
    severity: float
    """Nats above a fresh start over the last octave of positions."""
    suffers: bool
    """Whether it breaks, or reads worse far out than from a fresh start and only seems to hold because the
    text gets easier."""
    length: int
    """Positions that were read."""
    mean: Tensor
    """Nats above a fresh start at each probe (K,)."""
    low: Tensor
    """Lower ends of the 95 % intervals (K,)."""
    high: Tensor
    """Upper ends (K,)."""

    def sentence(self, price: str = "") -> str:
        """Return the verdict in words, and the price of a repair, where there was one."""
        far = f"{short(self.length // 2)}-{short(self.length)}"
        price = f"; {price}" if price else ""
        if self.edge is None:
            holds = f"Holds to {short(self.length)}{price or ': the loss stays at its level in range'}."
            if self.severity > TOLERANCE:
                return f"{holds} A fresh start would still be {self.severity:.2f} nats better at {far}."
            return holds
        finite = math.isfinite(self.severity)
        size = f"{self.severity:.2f} nats above a fresh start" if finite else "not finite"
        how = "and explodes" if self.verdict == "explodes" else "and fades"
        return f"Breaks at t ~ {short(self.edge)} {how}: at {far} it is {size}{price}."


def judge(
    carried: PositionLoss, ends: list[int], excess: Tensor, train_length: int, *, seed: int = 0
) -> Judgement:
    """Return judge a model by its losses.

    Args:
        carried: the carried of texts from the zero state.
        ends: where the probes of `excess_loss` end (K,).
        excess: nats above a fresh start (B, K).
        train_length: T.
        seed: random seed of the bootstrap.
    """
    length = carried.losses.shape[1]
    mean, low, high = bootstrap_mean(excess, seed=seed)
    level = carried.losses[:, :train_length].mean(dim=1, keepdim=True)
    _, low_rise, _ = bootstrap_mean(probe_losses(carried, ends, train_length) - level, seed=seed)
    # `not <=`, not `>`: a NaN loss is damage
    above = ~((low <= 0) | (mean <= TOLERANCE) | (low_rise <= 0))
    edge = _edge(ends, above.tolist(), train_length)
    far = [i for i, end in enumerate(ends) if end > length // 2]
    severity = mean[far].mean().item()
    verdict: Verdict = "healthy" if edge is None else "explodes" if not severity < EXPLOSION else "fades"
    _, (far_low,), _ = bootstrap_mean(excess[:, far].mean(dim=1, keepdim=True), seed=seed)
    suffers = edge is not None or (severity > TOLERANCE and far_low.item() > 0)
    return Judgement(verdict, edge, severity, suffers, length, mean, low, high)


def _edge(ends: list[int], above: list[bool], train_length: int) -> int | None:
    """Return where the damage begins: the first probe from which two in a row are above."""
    for i in range(len(ends)):
        if above[i] and above[min(i + 1, len(ends) - 1)]:
            return ends[i - 1] if i else train_length
    return None


def short(position: int) -> str:
    """Return a position as people say it: 212, 4k, 131k."""
    return str(position) if position < 1000 else f"{position / 1024:.3g}k"
