"""Do texts end as they go on? State Passing starts the next text where the last one ended.

A final state is a sensible beginning only if what follows it could have been text. Where sequences end in
something of their own (the answer of a passkey, an end-of-document rite) it is not, and State Passing is the
wrong tool (Buitrago Ruiz & Gu 2025, section 6.2). Compared are the tokens of the last stretch of every
sequence with those of its other stretches; the null distribution takes any stretch for the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEAST_DRIFT = 0.15
"""Total variation beyond what any other stretch shows, from which an end is called another kind of text."""
_PERMUTATIONS = 999
_STRETCHES = 64
_KINDS = 1023  # tokens told apart, the most frequent; the others count as one


@dataclass(frozen=True)
class EndDrift:
    """How unlike the rest the ends are."""

    drift: float
    """Total variation between the tokens of the ends and of the rest, less its mean for any other stretch."""
    p: float
    """Share of random choices of a stretch that are as unlike the rest."""

    @property
    def stationary(self) -> bool:
        """Whether the ends are no text of their own."""
        return self.drift < LEAST_DRIFT or self.p > 0.01

    def to_json(self) -> dict[str, Any]:
        """Return plain data for results."""
        return {"drift": self.drift, "p": self.p, "stationary": self.stationary}


def end_drift(tokens: Tensor, stretch: int, *, seed: int = 0) -> EndDrift:
    """Compare the last `stretch` tokens of sequences (B, L) with up to 63 other stretches of each.

    Sequences with less than three stretches tell nothing: drift 0, p 1.
    """
    rows, length = tokens.shape
    count = min(_STRETCHES, length // stretch)
    if count < 3:
        return EndDrift(0.0, 1.0)
    starts = torch.linspace(length - stretch - (length // stretch - 1) * stretch, length - stretch, count)
    pieces = torch.stack([tokens[:, s : s + stretch] for s in starts.long().tolist()], dim=1).cpu()
    found = pieces.flatten().bincount()  # of every id, without the sort of `unique`
    kinds, counts = (found > 0).cumsum(0).sub_(1)[pieces], found[found > 0]
    rank = counts.argsort(descending=True).argsort().clamp_max(_KINDS)
    histogram = torch.zeros(rows, count, int(rank.max()) + 1)
    histogram.scatter_add_(2, rank[kinds], torch.ones(kinds.shape))
    whole = histogram.sum(dim=(0, 1))

    def unlike(chosen: Tensor) -> float:
        of_chosen = histogram[torch.arange(rows), chosen].sum(dim=0)
        rest = whole - of_chosen
        return 0.5 * (of_chosen / of_chosen.sum() - rest / rest.sum()).abs().sum().item()

    observed = unlike(torch.full((rows,), count - 1))
    generator = torch.Generator().manual_seed(seed)
    null = torch.tensor(
        [unlike(torch.randint(count, (rows,), generator=generator)) for _ in range(_PERMUTATIONS)]
    )
    p = (1 + (null >= observed - 1e-6).sum().item()) / (1 + _PERMUTATIONS)
    return EndDrift(observed - null.mean().item(), p)
