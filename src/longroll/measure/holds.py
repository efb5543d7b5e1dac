"""Ways to read a text that need no training: before each piece a hold replaces a part of the state.

- `reset` reads the last tokens again from zero, attention too: a sliding window over everything;
- `rescan` reads them again for the recurrent states, while attention keeps all keys;
- `decay` weakens the recurrent states a little for every token, and `clip` scales them back to the norms that
  they have in training (after thunlp/stuffed-mamba, Chen et al. 2025, who do so inside each step);
- `window` keeps attention to the last keys, `window+first` to these and the first ones (StreamingLLM).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longroll import ranks
from longroll.errors import LongrollError
from longroll.heads import head_norms, scale_heads
from longroll.measure._attention_readings import FIRST, Hold, Positions, Rescan, Window
from longroll.measure._position_loss import PositionLoss, token_losses
from longroll.measure.kept import Kept
from longroll.measure.roll_out import check_ids, roll_out
from longroll.model import RecurrentLM
from longroll.state import RecurrentState, StateKey

HOLDS = ("reset", "decay", "clip", "rescan", "window", "window+first")

STRIDE = 64
"""Tokens between two looks at the state."""


class Decay:
    """Multiply the recurrent state by `per_token` for every token read past `after`.

    Args:
        per_token: just below 1: 1 - 1/T forgets over a training length.
        after: tokens that are read as ever.
        stride: tokens between two multiplications.
    """

    def __init__(self, per_token: float, *, after: int, stride: int = STRIDE) -> None:
        self.per_token, self.after, self.stride = per_token, after, stride

    def __call__(self, position: int, state: RecurrentState) -> RecurrentState:
        """Return the state, weaker."""
        factor = torch.tensor(self.per_token ** min(self.stride, max(0, position - self.after)))
        return _scaled(state, lambda key, tensor: factor)


class Clip:
    """Scale a head's state down to its limit, (1, heads) each, whenever its norm is above."""

    def __init__(self, limits: dict[StateKey, Tensor]) -> None:
        self.limits = limits

    def __call__(self, position: int, state: RecurrentState) -> RecurrentState:
        """Return the state in its limits."""
        return _scaled(
            state, lambda key, tensor: (self.limits[key] / head_norms(tensor).clamp_min(1e-30)).clamp_max(1)
        )


def state_limits(lm: RecurrentLM, tokens: Tensor, *, stride: int = STRIDE) -> dict[StateKey, Tensor]:
    """Return the largest norm of each head's state over ordinary text, (1, heads) each (`longroll.heads`).

    Args:
        lm: the model.
        tokens: (B, T), texts as long as those of training.
        stride: tokens between two looks.
    """
    limits: dict[StateKey, Tensor] = {}
    for chunk in roll_out(lm, tokens, chunk_size=stride):
        for key, tensor in chunk.state.part("recurrent").items():
            largest = head_norms(tensor).amax(dim=0, keepdim=True)
            limits[key] = torch.maximum(limits[key], largest) if key in limits else largest
    return limits


def make_hold(name: str, lm: RecurrentLM, tokens: Tensor, window: int, *, stride: int) -> Hold:
    """Return a hold by its name.

    Args:
        name: one of `HOLDS`.
        lm: the model.
        tokens: (B, L), the text that is read under the hold.
        window: tokens it works over; T is the natural choice.
        stride: tokens between two looks at the state.

    Raises:
        LongrollError: for another name, a window no longer than the stride, and a model without the part of
            the state that the hold is for.
    """
    check_hold(name, lm)
    if window <= stride:
        raise LongrollError(
            f"`window` {window}: `reading` {name} looks every {stride} tokens: give a longer one."
        )
    if name == "window":
        return Window(window - stride)
    if name == "window+first":
        if window - stride <= FIRST:
            raise LongrollError(
                f"`window` {window}: `reading` {name} keeps {FIRST} tokens besides: give a longer one."
            )
        return Window(window - stride, FIRST, Positions(lm).frequencies)
    if name in ("reset", "rescan"):
        return Rescan(lm, tokens, window - stride, attention=name == "rescan")
    if name == "decay":
        return Decay(1 - 1 / window, after=window, stride=stride)
    return Clip(state_limits(lm, tokens[:, :window], stride=stride))


def check_hold(name: str, lm: RecurrentLM) -> None:
    """Refuse a hold for a part of the state that a model does not have.

    Raises:
        LongrollError: for `window` and `window+first` without attention or with keys that cannot be dropped,
            for `window+first` with positions that cannot be moved, and for the others but `reset` without a
            recurrent state.
    """
    if name not in HOLDS:
        raise LongrollError(f"`reading` {name} is not one of plain, {', '.join(HOLDS)}.")
    if name in ("window", "window+first"):
        positions = Positions(lm) if lm.has_attention else None
        if positions is None or not positions.windows:
            raise LongrollError(f"`reading` {name}: {lm.name} has no attention whose keys can be dropped.")
        if name == "window+first" and positions.kind == "other":
            raise LongrollError(
                f"`reading` {name}: the keys of {lm.name} cannot be moved to other positions: take window."
            )
    if name in ("decay", "clip", "rescan") and not lm.layers:
        raise LongrollError(f"`reading` {name}: {lm.name} has no recurrent state.")


@torch.no_grad()
def held_loss(
    lm: RecurrentLM,
    tokens: Tensor,
    hold: Hold,
    *,
    stride: int,
    start: int = 0,
    state: RecurrentState | None = None,
    measured_from: int = 0,
    progress: Callable[[int], None] | None = None,
    kept: Kept | None = None,
) -> PositionLoss:
    """Return loss at every position of `tokens`, read in pieces with `hold` between them.

    Args:
        lm: the model.
        tokens: (B, L + 1).
        hold: called before each piece with the position and the state there.
        stride: tokens of a piece.
        start: position to read from.
        state: the state there; None: zero, at position 0.
        measured_from: position from which losses are wanted; NaN before the piece that holds it.
        progress: called with how many positions of each row are done.
        kept: where the reading is kept from time to time, for holds without a memory of their own, whose
            reading begins at 0; it goes on from what is there.
    """
    check_ids(lm, tokens)
    tokens, length = tokens.to(lm.device), tokens.shape[1] - 1
    losses = torch.full((len(tokens), length), torch.nan, device=lm.device)  # nothing waits for the GPU
    if kept is not None:
        start, state = kept.go_on(losses)
    for begin in range(start, length, stride):
        stop = min(begin + stride, length)
        ids = tokens[:, begin : stop + 1]
        hidden, state = lm(ids[:, :-1], state if state is None else hold(begin, state), logits=False)
        if stop > measured_from:
            losses[:, begin:stop] = token_losses(lm, hidden, ids[:, 1:]).float()
        if progress is not None:
            progress(stop)
        if kept is not None:
            kept.note(stop, state, losses)
    return PositionLoss(losses.cpu())


def loss_under(
    name: str,
    lm: RecurrentLM,
    tokens: Tensor,
    window: int,
    *,
    progress: Callable[[int], None] | None = None,
    dealt: bool = False,
    kept: Kept | None = None,
) -> PositionLoss:
    """Return loss at every position of `tokens` (B, L + 1), read under a hold by its name (`make_hold`).

    Args:
        name: the name of the hold.
        lm: the model.
        tokens: (B, L + 1).
        window: tokens that the hold works over; it looks at the state every quarter of them, or sooner.
        progress: called with how many positions of each row are done.
        dealt: deal the rows to the ranks, each of which must call this and gets the losses of all.
        kept: see `position_loss`.
    """
    check_hold(name, lm)
    stride = min(STRIDE, max(1, window // 4))
    with ranks.together(dealt):
        mine = tokens[ranks.share(len(tokens))]
        if not len(mine):  # fewer rows than ranks
            return PositionLoss(ranks.gather_rows(torch.empty(mine[:, 1:].shape)))
        hold: Hold = (
            Clip(state_limits(lm, tokens[:, :window], stride=stride))  # the same on every rank
            if name == "clip"
            else make_hold(name, lm, mine, window, stride=stride)
        )
        kept = None if name == "window+first" else kept  # it remembers the first keys
        read = held_loss(lm, mine, hold, stride=stride, progress=progress, kept=kept)
        return PositionLoss(ranks.gather_rows(read.losses))


def _scaled(state: RecurrentState, factor: Callable[[StateKey, Tensor], Tensor]) -> RecurrentState:
    """Return recurrent tensors times a factor for each head, (B, heads) or (); the rest as it is."""
    recurrent = state.part("recurrent")
    return state.changed({key: scale_heads(t, factor(key, t).to(t)) for key, t in recurrent.items()})
