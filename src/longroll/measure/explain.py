"""Why a model breaks: what its states and its memory show, around the one roll-out of a diagnosis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from longroll.measure._blame import Blame, split_blame
from longroll.measure._coverage import CoverageRecorder, far_positions, in_range_positions
from longroll.measure._position_loss import PositionLoss, log_spaced
from longroll.measure._state_ablation import DAMAGE, state_ablation
from longroll.measure._state_statistics import StateRecorder
from longroll.measure.iid import ROWS, IIDTest, iid_test
from longroll.measure.remembrance import remembrance_map, spread_starts
from longroll.model import RecurrentLM
from longroll.state import RecurrentState

Progress = Callable[[str, int, int | None], None]
"""Told what is being done, how much of it is done, and how much there is, where that is known."""

_REMEMBERED_ROWS = 4  # texts of the remembrance map: it reads each of them many times over
_CAUSAL_LENGTHS = 16  # training lengths of text that show the damage
_LATER = "The damage begins past position {length}, up to which heads are held in range: none is named."


def stage(progress: Progress | None, what: str, total: int | None = None) -> Callable[[int], None] | None:
    """Progress on one stage, for a measure that says only how much is done."""
    return None if progress is None else lambda done: progress(what, done, total)


class StateWatch:
    """What is noted of the states as a roll-out comes by (its `watch`)."""

    def __init__(self, lm: RecurrentLM, length: int, train_length: int, *, seed: int) -> None:
        self.statistics = StateRecorder(lm, log_spaced(length, 3))
        self.coverage = CoverageRecorder(
            in_range_positions(train_length), far_positions(length, train_length), seed=seed
        )
        self.stops = [*self.statistics.positions, *self.coverage.stops]
        self._train_length, self._seed = train_length, seed
        self._at_edge = RecurrentState({})
        self.has_attention = False
        """Whether the model has a memory besides its recurrent state: the KV of a hybrid."""

    def __call__(self, position: int, state: RecurrentState) -> None:
        """Note the state after `position` tokens."""
        self.statistics(position, state)
        self.coverage(position, state)
        if position == self._train_length:
            self.has_attention = any(key.part == "attention" for key in state)
            self._at_edge = state.part("recurrent").rows(slice(0, ROWS))

    def iid(self) -> IIDTest:
        """Whether the states where training ends could be IID noise."""
        return iid_test(self._at_edge, seed=self._seed)


def explain_coverage(
    lm: RecurrentLM,
    tokens: Tensor,
    carried: PositionLoss,
    watch: StateWatch,
    train_length: int,
    *,
    healthy: bool,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Which heads left their training range and, for a model that breaks, which of them do the damage."""
    coverage = watch.coverage.coverage()
    section = coverage.to_json()
    if healthy:
        return section
    measured, length = tokens.shape[1] - 1, _CAUSAL_LENGTHS * train_length
    if measured < 2 * train_length:
        short = f"{measured} positions are too few to tell which heads do the damage"
        return section | {"causal_sentence": f"{short}: measure at least {2 * train_length}."}
    test = state_ablation(
        lm,
        tokens[:, : length + 1],
        coverage,
        train_length,
        carried=PositionLoss(carried.losses[:, :length]),
        progress=stage(progress, "holding heads in range"),
    )
    later = test.damage <= DAMAGE and measured > length
    return section | {
        "causal": test.table(),
        "causal_sentence": _LATER.format(length=length) if later else test.sentence,
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
    progress: Progress | None = None,
) -> Blame | None:
    """Whether states or attention of a hybrid do the damage; None where it has but one, or short texts."""
    measured, length = tokens.shape[1] - 1, _CAUSAL_LENGTHS * train_length
    if not watch.has_attention or measured < 2 * train_length:
        return None
    return split_blame(
        lm,
        tokens[:, : length + 1],
        watch.coverage.coverage(),
        train_length,
        carried=PositionLoss(carried.losses[:, :length]),
        seed=seed,
        progress=stage(progress, "splitting the blame"),
    )


def explain_remembrance(
    lm: RecurrentLM, tokens: Tensor, *, progress: Progress | None = None
) -> dict[str, Any]:
    """How much the tokens before t matter for the prediction at T, for T at the end and on the way."""
    length = tokens.shape[1] - 1
    # the control is read anew from every start, at a price that grows with the square of the length
    parts = 16 if lm.family.recurrent else 4
    starts = spread_starts(length, parts=parts)
    ends = sorted({max(1, i * length // parts) for i in range(1, parts + 1)})
    told = stage(progress, "forgetting the past", length)
    return remembrance_map(lm, tokens[:_REMEMBERED_ROWS, :length], starts, ends, progress=told).to_json()
