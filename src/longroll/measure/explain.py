"""Why a model breaks: what its states and its memory show, around the one roll-out of a diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from longroll import ranks
from longroll.measure._blame import HOLDS, READINGS, Blame, split_blame
from longroll.measure._budget import (
    BLAME,
    HEADS,
    HEADS_OF_HYBRID,
    REMEMBRANCE,
    VISIBLE_OF_HYBRID,
    Excerpt,
    excerpt,
)
from longroll.measure._coverage import Coverage, CoverageRecorder, far_positions, in_range_positions
from longroll.measure._position_loss import PositionLoss, log_spaced
from longroll.measure._state_ablation import state_ablation, trials_for
from longroll.measure._state_statistics import RANK_ROWS, StateRecorder
from longroll.measure.excess_loss import excess_loss
from longroll.measure.iid import ROWS, IIDTest, iid_test
from longroll.measure.remembrance import affordable_starts, remembrance_map
from longroll.model import RecurrentLM
from longroll.state import RecurrentState

Progress = Callable[[str, int, int | None], None]
"""Told what is being done, how much of it is done, and how much there is, where that is known."""

Restarted = tuple[list[int], Tensor]
"""Where probes end, and the loss carried minus the loss restarted there (`excess_loss`)."""

_REMEMBERED_ROWS = 4  # texts of the remembrance map: it reads each of them many times over


def stage(progress: Progress | None, what: str, total: int | None = None) -> Callable[..., None] | None:
    """Return progress on one stage, for a measure that says how much is done, and may say of how much."""
    return None if progress is None else lambda done, of=total: progress(what, done, of)


def watched_positions(length: int, train_length: int) -> list[int]:
    """Return positions whose states are described: two to a doubling; below an eighth of T powers of 4.

    A GPU waits for Python in each forward of a few tokens, and what matters are states about T and past it.
    """
    powers = {4**i for i in range(train_length.bit_length() // 2 + 1)}
    return [p for p in log_spaced(length, 2) if 8 * p >= train_length or p in powers]


class StateWatch:
    """Recorder of the states of a roll-out (its `watch`).

    Args:
        lm: the model.
        length: L.
        train_length: T.
        seed: random seed of projections, permutations and noise.
        first: which of all texts is the first one read here: measures of a few texts take the first ones.
        compares: whether states past T are compared with those of training (`compare`), which stops the
            reading eight times more.
    """

    def __init__(
        self,
        lm: RecurrentLM,
        length: int,
        train_length: int,
        *,
        seed: int,
        first: int = 0,
        compares: bool = True,
    ) -> None:
        ranked = max(0, RANK_ROWS - first)
        self.statistics = StateRecorder(lm, watched_positions(length, train_length), rank_rows=ranked)
        in_range, far = in_range_positions(train_length), far_positions(length, train_length)
        self.coverage = CoverageRecorder(*((in_range, far) if compares else ((), ())), seed=seed)
        self.stops = [*self.statistics.positions, train_length, *self.coverage.stops]
        self._train_length, self._seed = train_length, seed
        self._edge_rows = max(0, ROWS - first)
        self._at_edge = RecurrentState({})
        self.has_attention = False
        """Whether the model has a memory besides its recurrent state: the KV of a hybrid."""
        self._compared: Coverage | None = None

    def __call__(self, position: int, state: RecurrentState) -> None:
        """Note the state after `position` tokens."""
        self.statistics(position, state)
        self.coverage(position, state)
        if position == self._train_length:
            self.has_attention = any(key.part == "attention" for key in state)
            self._at_edge = state.part("recurrent").rows(slice(0, self._edge_rows)).map(torch.clone)

    def state_dict(self) -> dict[str, Any]:
        """Return what was noted so far."""
        return {
            "statistics": self.statistics.state_dict(),
            "coverage": self.coverage.state_dict(),
            "at_edge": self._at_edge.named(),
            "has_attention": self.has_attention,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was noted before."""
        self.statistics.load_state_dict(state["statistics"])
        self.coverage.load_state_dict(state["coverage"])
        self._at_edge = RecurrentState.from_named(state["at_edge"])
        self.has_attention = state["has_attention"]

    def over_ranks(self) -> None:
        """Take on rank 0 what all ranks saw for seen there; every rank must call this."""
        if ranks.alone():
            return
        self.statistics.over_ranks()
        if self.coverage.stops:
            self.coverage.over_ranks()
        self.has_attention = any(ranks.gather(self.has_attention))
        parts = [part for part in ranks.gather(self._at_edge) if part.batch_size]
        self._at_edge = RecurrentState({key: torch.cat([part[key] for part in parts]) for key in parts[0]})

    def compare(self, progress: Progress | None = None) -> Coverage:
        """Return which heads have left their training range; tested once."""
        if self._compared is None:
            self._compared = self.coverage.coverage(progress=stage(progress, "comparing states"))
        return self._compared

    def iid(self) -> IIDTest:
        """Return whether the states where training ends could be IID noise."""
        return iid_test(self._at_edge, seed=self._seed)


def explain_coverage(
    lm: RecurrentLM,
    tokens: Tensor,
    carried: PositionLoss,
    watch: StateWatch,
    train_length: int,
    *,
    healthy: bool,
    restarted: Restarted | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return which heads left their training range and, for a model that breaks, which of them do the damage.

    Texts are dealt to the ranks that work together; `watch` is that of rank 0.
    """
    coverage = ranks.on_first(lambda: watch.compare(progress))
    section = coverage.to_json()
    if healthy:
        return section
    measured = tokens.shape[1] - 1
    if measured < 2 * train_length:
        short = f"{measured} positions are too few to tell which heads do the damage"
        return section | {"causal_sentence": f"{short}: measure at least {2 * train_length}."}
    restarted = restarted or excess_loss(lm, tokens, carried, train_length, dealt=True)
    share = HEADS_OF_HYBRID if watch.has_attention else HEADS
    chosen = excerpt(*restarted, train_length, measured, trials=trials_for(coverage), share=share)
    texts, losses, restarted = _cut(tokens, carried, restarted, chosen)
    test = state_ablation(
        lm,
        texts,
        coverage,
        train_length,
        carried=losses,
        restarted=restarted,
        trials=chosen.trials,
        progress=stage(progress, "holding heads in range", chosen.trials),
        dealt=True,
    )
    return section | {
        "causal": test.table(),
        "causal_sentence": test.sentence,
        "explained": test.explained,
    }


def explain_blame(
    lm: RecurrentLM,
    tokens: Tensor,
    carried: PositionLoss,
    watch: StateWatch,
    train_length: int,
    *,
    seed: int,
    restarted: Restarted | None = None,
    progress: Progress | None = None,
) -> Blame | None:
    """Return whether states or attention of a hybrid do the damage; None where it has but one, or short
    texts.
    """
    measured = tokens.shape[1] - 1
    if not watch.has_attention or measured < 2 * train_length:
        return None
    restarted = restarted or excess_loss(lm, tokens, carried, train_length, dealt=True)
    chosen = excerpt(
        *restarted, train_length, measured, trials=READINGS, share=BLAME, visible=VISIBLE_OF_HYBRID
    )
    texts, losses, restarted = _cut(tokens, carried, restarted, chosen)
    return split_blame(
        lm,
        texts,
        ranks.on_first(lambda: watch.compare(progress)),
        train_length,
        carried=losses,
        restarted=restarted,
        seed=seed,
        progress=stage(progress, "splitting the blame", HOLDS),
        dealt=True,
    )


def _cut(
    tokens: Tensor, carried: PositionLoss, restarted: Restarted, chosen: Excerpt
) -> tuple[Tensor, PositionLoss, Restarted]:
    """Return the texts of an excerpt, their losses, and the probes within them."""
    rows, length = chosen.rows, chosen.length
    ends = [end for end in restarted[0] if end <= length]
    return (
        tokens[:rows, : length + 1],
        PositionLoss(carried.losses[:rows, :length]),
        (ends, restarted[1][:rows, : len(ends)]),
    )


def explain_remembrance(
    lm: RecurrentLM, tokens: Tensor, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Return how much the tokens before t matter for the prediction at T, for T at the end and on the way.

    Texts and starts are dealt to the ranks that work together.
    """
    length = tokens.shape[1] - 1
    texts = tokens[:_REMEMBERED_ROWS, :length]
    # the control is read again from every start, at a price that grows with the square of the length
    parts = 16 if lm.family.recurrent else 4
    starts = affordable_starts(length, parts=parts, most=REMEMBRANCE * len(tokens) / len(texts))
    ends = sorted({max(1, i * length // parts) for i in range(1, parts + 1)})
    told = stage(progress, "forgetting the past", length)
    return remembrance_map(lm, texts, starts, ends, progress=told, dealt=True).to_json()
