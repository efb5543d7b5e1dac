"""How much text the causes of a damage are looked for in, so that a diagnosis takes few readings.

The unit is the loss of all texts. The loss takes one, the restarts that it is compared with at most two
(`excess_loss`); the causes share the numbers below. A search reads fewer texts or shorter ones until it keeps
to its share, as long as these texts show the damage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

REMEMBRANCE = 3.0
"""Readings that the map of remembrance may take."""
HEADS, HEADS_OF_HYBRID, BLAME = 4.0, 2.5, 3.5
"""Readings that the search for heads may take; those in a hybrid, and its split of state and attention."""
DAMAGE = 0.05
"""Nats: less damage than this has no cause worth looking for (`diagnose.TOLERANCE`)."""
_LENGTHS = (16, 12, 8, 6, 4, 3, 2)  # training lengths of text; longer ones where the damage begins later
_TEXTS = 8  # 8 texts find what most heads do
_SHORT, _FEWEST = 4096, 2048  # tokens of texts that are read whole at any cost; and of the least that tell
VISIBLE, VISIBLE_OF_HYBRID = 0.25, 0.5
"""Shares of the damage in the longest text that shorter ones must show: to find heads, and to split it."""


@dataclass(frozen=True)
class Excerpt:
    """Texts that are read again for each trial."""

    rows: int
    """Texts."""
    length: int
    """Tokens of each, from the beginning; a trial reads those past the training length."""
    trials: int
    """How many trials keep to the share, at least 1."""


def excerpt(
    ends: list[int],
    excess: Tensor,
    train_length: int,
    measured: int,
    *,
    trials: int,
    share: float,
    visible: float = VISIBLE,
) -> Excerpt:
    """Choose the most text of which `trials` trials take at most `share` readings.

    Texts are at most 16 T long, or twice that as often as it takes to show the damage. Where even the least
    text that shows it takes more, it is chosen, with as many trials as fit.

    Args:
        ends: the ends of the probes.
        excess: (B, K), loss carried minus loss restarted at each (`excess_loss`).
        train_length: T.
        measured: positions of each text, at least 2 T.
        trials: wanted.
        share: readings of all texts at all positions.
        visible: share of the damage in a longer text that a shorter one must show.
    """
    texts = len(excess)
    longest = _longest(ends, excess, train_length, measured, visible)
    if texts * longest <= _SHORT:
        return Excerpt(texts, longest, trials)
    lengths = [longest, *(n * train_length for n in _LENGTHS if n * train_length < longest)]
    least = max(DAMAGE, visible * damage(ends, excess, train_length, longest))
    choices = [(rows, length) for length in lengths for rows in dict.fromkeys([texts, min(texts, _TEXTS)])]
    seen = [
        (rows, length)
        for rows, length in choices
        if length == longest
        or (rows * length >= _FEWEST and damage(ends, excess[:rows], train_length, length) >= least)
    ]

    def afforded(rows: int, length: int) -> int:
        return math.floor(share * texts * measured / (rows * (length - train_length)))

    rows, length = next((choice for choice in seen if afforded(*choice) >= trials), seen[-1])
    return Excerpt(rows, length, max(1, min(trials, afforded(rows, length))))


def _longest(ends: list[int], excess: Tensor, train_length: int, measured: int, visible: float) -> int:
    """Return 16 T, doubled until a share of the damage in the longest text shows: no more than `measured`.

    Damage that the longest text does not show is looked for where there is most.
    """
    lengths = [min(_LENGTHS[0] * train_length, measured)]
    while lengths[-1] < measured:
        lengths.append(min(2 * lengths[-1], measured))
    found = [damage(ends, excess, train_length, length) for length in lengths]
    least = max(DAMAGE, visible * found[-1]) if math.isfinite(found[-1]) else DAMAGE
    shown = [length for length, here in zip(lengths, found, strict=True) if not here < least]  # NaN is damage
    return shown[0] if shown else lengths[found.index(max(found))]


def damage(ends: list[int], excess: Tensor, train_length: int, length: int) -> float:
    """Return the mean excess loss over the last octave of `length` tokens; NaN without probes there."""
    return excess[:, far_probes(ends, train_length, length)].double().mean().item()


def far_probes(ends: list[int], train_length: int, length: int) -> list[int]:
    """Return which probes lie in the last octave of `length` and compare only tokens past T."""
    half = train_length - train_length // 2
    return [i for i, end in enumerate(ends) if length // 2 < end <= length and end >= train_length + half]
