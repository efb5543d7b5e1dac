"""Effective remembrance: how much the tokens before t still matter for the prediction at T.

`EffRem_T(t) = d(q(. | x[0:T]), q(. | x[t:T]))`, each suffix read from the zero state (Buitrago Ruiz & Gu
2025, section 5). The suffixes differ only in where they start, so they are read together: one batch in which
every start joins, as rows of zero state, when its t is reached. K evenly spaced starts then cost half of K
forwards, in batches instead of one by one, and one pass gives every T on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from longroll import ranks
from longroll.errors import LongrollError
from longroll.measure.bootstrap import bootstrap_mean
from longroll.measure.distances import Distance, check_distance, head_distance
from longroll.measure.roll_out import check_ids, chunk_tokens, roll_out, rows_at_once
from longroll.model import RecurrentLM
from longroll.state import RecurrentState

_SHORTEST = 64  # tokens of a row in one forward


@dataclass(frozen=True)
class Remembrance:
    """EffRem for every start t and end T; NaN where t >= T."""

    distances: Tensor
    """(B, S, E) float64, on the CPU: rows, starts, ends."""
    starts: list[int]
    ends: list[int]
    distance: Distance

    @cached_property
    def _interval(self) -> list[Tensor]:
        flat = bootstrap_mean(self.distances.flatten(1))
        return [values.view(self.distances.shape[1:]) for values in flat]

    @property
    def mean(self) -> Tensor:
        """Mean over rows, (S, E)."""
        return self.distances.mean(dim=0)

    @property
    def low(self) -> Tensor:
        """Lower end of the 95 % bootstrap interval over rows, (S, E)."""
        return self._interval[1]

    @property
    def high(self) -> Tensor:
        """Upper end of the interval, (S, E)."""
        return self._interval[2]

    def to_json(self) -> dict[str, Any]:
        """Return plain data for results, null where the start is not before the end."""
        values = {"mean": self.mean, "low": self.low, "high": self.high}
        return {
            "starts": self.starts,
            "ends": self.ends,
            "distance": self.distance,
            **{
                name: [[None if v != v else v for v in row] for row in t.tolist()]
                for name, t in values.items()
            },
        }


def effective_remembrance(
    lm: RecurrentLM,
    tokens: Tensor,
    starts: Sequence[int],
    ends: Sequence[int] | None = None,
    *,
    distance: Distance = "tv",
    chunk_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Return mean over rows of `EffRem_T(t)` for t in `starts` and T in `ends`, (S, E); see
    `remembrance_map`.
    """
    options = {"distance": distance, "chunk_size": chunk_size, "progress": progress}
    return remembrance_map(lm, tokens, starts, ends, **options).mean  # type: ignore[arg-type]


def remembrance_map(
    lm: RecurrentLM,
    tokens: Tensor,
    starts: Sequence[int],
    ends: Sequence[int] | None = None,
    *,
    distance: Distance = "tv",
    chunk_size: int | None = None,
    progress: Callable[[int], None] | None = None,
    dealt: bool = False,
) -> Remembrance:
    """Measure `EffRem_T(t)` for every t in `starts` and T in `ends`, with intervals over rows.

    The Transformer control, whose rows cannot have pasts of different lengths, is read once a start.

    Args:
        lm: the model.
        tokens: (B, L); every row is one text from its beginning.
        starts: t, the first token kept, 0 <= t < L; in any order.
        ends: T, how many tokens were read when the prediction is made, 1 <= T <= L; default: L.
        distance: `tv` (total variation, as in the paper), `js` or `kl` (nats; from the full text's prediction
            to the suffix's).
        chunk_size: tokens of a row in one forward; default: as many as keep the processor busy.
        progress: called with how many positions of each row are done.
        dealt: deal rows and starts to the ranks, each of which must call this and gets the whole map.

    Raises:
        LongrollError: for starts and ends outside the text, an unknown distance, tokens outside the
            vocabulary, and a `chunk_size` below 1.
    """
    starts, ends = [int(t) for t in starts], [int(t) for t in (ends or [tokens.shape[-1]])]
    _check(lm, tokens, starts, ends, distance, chunk_size)
    joining = sorted({0, *(t for t in starts if t < max(ends))})
    distances = torch.full((tokens.shape[0], len(joining), len(set(ends))), torch.nan, dtype=torch.float64)
    with ranks.together(dealt):
        share = ranks.deal(len(tokens))
        mine = joining[share.part :: share.parts]
        read = sorted({0, *mine})  # every suffix is compared with the whole text
        measured = _distances(lm, tokens[share.rows], read, sorted(set(ends)), distance, chunk_size, progress)
        measured = measured[:, [read.index(t) for t in mine]]
        for other, part in ranks.gather((share, measured)):
            distances[other.rows, other.part :: other.parts] = part
    blank = distances.new_full((tokens.shape[0], 1, distances.shape[2]), torch.nan)  # starts past every end
    distances = torch.cat([distances, blank], dim=1)
    row_of = [joining.index(t) if t in joining else len(joining) for t in starts]
    column_of = [sorted(set(ends)).index(t) for t in ends]
    return Remembrance(distances[:, row_of][:, :, column_of], starts, ends, distance)


@torch.no_grad()
def _distances(
    lm: RecurrentLM,
    tokens: Tensor,
    joining: list[int],
    ends: list[int],
    distance: Distance,
    chunk_size: int | None,
    progress: Callable[[int], None] | None,
) -> Tensor:
    """Return distances (B, S, E) float64 for sorted starts, 0 the first of them, and sorted ends."""
    probe = lm(tokens[:1, :1].to(lm.device), logits=False)[1]
    together = not any(key.part == "attention" for key in probe)
    most = len(joining) * len(tokens)
    group = max(1, rows_at_once(lm, _SHORTEST, most) // len(joining))
    groups = tokens.split(group) if together else [tokens]
    work = _Work(progress, ends[-1], len(groups) if together else len(joining))
    distances = torch.full((tokens.shape[0], len(joining), len(ends)), torch.nan, dtype=torch.float64)
    for rows, out in zip(groups, distances.split([len(g) for g in groups]), strict=True):
        read = _read_together if together else _read_apart
        for end, hidden in read(lm, rows, joining, ends, chunk_size, work):
            measured = head_distance(lm, hidden[0], hidden, distance)
            measured[0] = 0  # the text against itself
            out[:, : len(hidden), ends.index(end)] = measured.T.double().cpu()
    return distances


_CLOSE = (1, 16, 256)  # tokens from the ends, where curves bend


def affordable_starts(length: int, *, parts: int, most: float) -> list[int]:
    """Return `spread_starts`, so few that reading from all takes at most `most` times `length` tokens.

    The fewest are a quarter of `parts`, and at least 0 and the middle.
    """
    choices = [(parts // fewer, close) for fewer in (1, 2, 4) for close in (_CLOSE, _CLOSE[:1], ())]
    for some, close in choices:
        if some > 1:
            starts = spread_starts(length, parts=some, close=close)
            if sum(length - start for start in starts) <= most * length:
                break
    return starts


def spread_starts(length: int, *, parts: int = 16, close: Sequence[int] = _CLOSE) -> list[int]:
    """Return starts over [0, length): `parts` at even distances, and a few `close` to the ends, where curves
    bend.

    Args:
        length: the length of the text.
        parts: how many.
        close: at these distances from the ends.
    """
    close = [step for step in close if step < length // parts]
    return sorted({*close, *(length - step for step in close), *(i * length // parts for i in range(parts))})


class _Work:
    """Tells `progress` how many of `total` positions are done, over several passes of that many each."""

    def __init__(self, progress: Callable[[int], None] | None, total: int, passes: int) -> None:
        self.progress, self.total, self.passes, self.done = progress, total, passes, 0

    def add(self, positions: int) -> None:
        self.done += positions
        if self.progress is not None:
            self.progress(self.done // self.passes)


def _read_together(
    lm: RecurrentLM, tokens: Tensor, starts: list[int], ends: list[int], chunk_size: int | None, work: _Work
) -> Iterable[tuple[int, Tensor]]:
    """Yield each end with the last hidden states (K, B, d_model) of the K starts before it, staggered."""
    batch, tokens = tokens.shape[0], tokens.to(lm.device)
    zero = lm.zero_state(batch)
    state: RecurrentState | None = None
    cuts = sorted({*starts, *ends})
    for cut, next_cut in pairwise(c for c in cuts if c <= ends[-1]):
        if cut in starts:
            state = zero if state is None else _append(state, zero)
        assert state is not None  # 0 is a start
        read = state.batch_size // batch
        size = chunk_size or max(_SHORTEST, chunk_tokens(lm) // state.batch_size)
        for first in range(cut, next_cut, size):
            piece = tokens[:, first : min(first + size, next_cut)]
            hidden, state = lm(piece.repeat(read, 1), state, logits=False)
            work.add(piece.shape[1])
        if next_cut in ends:
            yield next_cut, hidden[:, -1].unflatten(0, (read, batch))


def _append(state: RecurrentState, rows: RecurrentState) -> RecurrentState:
    return RecurrentState({key: torch.cat([t, rows[key].to(t)]) for key, t in state.items()}, seen=state.seen)


def _read_apart(
    lm: RecurrentLM, tokens: Tensor, starts: list[int], ends: list[int], chunk_size: int | None, work: _Work
) -> Iterable[tuple[int, Tensor]]:
    """Return the same, one start after another: for states that cannot stand in one batch (KV)."""
    hidden_at: dict[int, list[Tensor]] = {end: [] for end in ends}
    for start in starts:
        stops = [end - start for end in ends if end > start]
        text = tokens[:, start : ends[-1]]
        for chunk in roll_out(lm, text, chunk_size=chunk_size, stops=stops):
            stop = start + chunk.start + chunk.hidden.shape[1]
            if stop in hidden_at:
                hidden_at[stop].append(chunk.hidden[:, -1])
        work.add(ends[-1])
    for end in ends:
        yield end, torch.stack(hidden_at[end])


def _check(
    lm: RecurrentLM, tokens: Tensor, starts: list[int], ends: list[int], distance: str, chunk_size: int | None
) -> None:
    check_distance(distance)
    if tokens.ndim != 2 or not tokens.numel():
        raise LongrollError(f"tokens {tuple(tokens.shape)}: remembrance needs (B, L) with L >= 1.")
    length = tokens.shape[1]
    if not starts or min(starts) < 0 or max(starts) >= length:
        raise LongrollError(f"starts must lie in 0..{length - 1}, the {length} tokens given.")
    if min(ends) < 1 or max(ends) > length:
        raise LongrollError(f"ends must lie in 1..{length}, the {length} tokens given.")
    if chunk_size is not None and chunk_size < 1:
        raise LongrollError(f"`chunk_size` {chunk_size}: a chunk has at least one token.")
    check_ids(lm, tokens)
