"""What reading on costs: the loss on a text's own tokens, rolled out against restarted.

Text gets easier or harder as a document goes on, so a loss at 16k above the loss in range proves nothing
yet. Here the same tokens are predicted twice: with the state carried from the beginning, and with a fresh
state started half to a whole training length before them. A positive difference is damage done by the state.
Probes that overlap share their restarts, so that all of them read at most twice the text.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longroll import ranks
from longroll.measure._position_loss import PositionLoss, log_spaced, token_losses
from longroll.measure.roll_out import rows_at_once
from longroll.model import RecurrentLM


@torch.no_grad()
def excess_loss(
    lm: RecurrentLM,
    tokens: Tensor,
    carried: PositionLoss,
    train_length: int,
    *,
    per_octave: int = 6,
    progress: Callable[[int, int], None] | None = None,
    dealt: bool = False,
) -> tuple[list[int], Tensor]:
    """Return loss carried minus loss restarted, at log-spaced positions past the training length.

    Args:
        lm: the model.
        tokens: (B, L + 1), those of `carried`.
        carried: their losses from the zero state.
        train_length: T; a probe compares the T - T // 2 tokens before its end, each read T // 2 to T tokens
            after a restart.
        per_octave: probes to a doubling of the position.
        progress: called with how many windows are read, and how many there are.
        dealt: deal the rows to the ranks, each of which must call this and gets the differences of all.

    Returns:
        Where the probes end (K,), and the differences (B, K) in nats, a mean over T - T // 2 tokens each.
    """
    ends = [p for p in log_spaced(carried.losses.shape[1], per_octave) if p > train_length]
    with ranks.together(dealt):
        mine = tokens[ranks.share(len(tokens))]
        fresh = _restarted(lm, mine, ends, train_length, progress) if len(mine) else torch.empty(0, len(ends))
        return ends, probe_losses(carried, ends, train_length) - ranks.gather_rows(fresh)


def _restarted(
    lm: RecurrentLM,
    tokens: Tensor,
    ends: list[int],
    train_length: int,
    progress: Callable[[int, int], None] | None,
) -> Tensor:
    """Return mean loss of the last half of the `train_length` tokens before each end, read afresh, (B, K)."""
    size = train_length - train_length // 2
    starts = window_starts(ends, train_length)
    tokens = tokens.to(lm.device)
    fresh = torch.full(tokens[:, 1:].shape, torch.nan, device=lm.device)  # no window waits for the last one
    texts = tokens.shape[0]
    rows = max(1, rows_at_once(lm, train_length, texts * len(starts)) // texts)
    for i in range(0, len(starts), rows):
        some = starts[i : i + rows]
        windows = torch.stack([tokens[:, s : s + train_length + 1] for s in some], dim=1)
        windows = windows.flatten(0, 1)  # (B * K, T + 1)
        hidden, _ = lm(windows[:, :-1], logits=False)
        losses = token_losses(lm, hidden[:, -size:], windows[:, -size:]).to(fresh.device)
        for start, piece in zip(some, losses.unflatten(0, (-1, len(some))).unbind(1), strict=True):
            fresh[:, start + train_length - size : start + train_length] = piece
        if progress is not None:
            progress(i + len(some), len(starts))
    return probe_losses(PositionLoss(fresh.cpu()), ends, train_length)


def window_starts(ends: list[int], train_length: int) -> list[int]:
    """Return where to restart, in order, so that the tokens of every probe are read afresh.

    A probe far from its neighbours has a window of its own, which ends where the probe ends. The tokens of
    probes that overlap are covered by windows side by side: each token is then at an age from T // 2 to T,
    and the T - T // 2 tokens of a probe have each of these ages once, whatever windows they fall into.

    Args:
        ends: the ends of the probes, in order, all above T.
        train_length: T.
    """
    size = train_length - train_length // 2
    runs: list[list[int]] = []  # the first token and the end of each stretch of tokens to cover
    for end in ends:
        if runs and end - size < runs[-1][1]:
            runs[-1][1] = end
        else:
            runs.append([end - size, end])
    return [
        min(first, stop - size) + size - train_length
        for begin, stop in runs
        for first in range(begin, stop, size)
    ]


def probe_losses(carried: PositionLoss, ends: list[int], train_length: int) -> Tensor:
    """Return carried loss of the tokens that each probe compares: the T - T // 2 before its end, (B, K)
    means.
    """
    size = train_length - train_length // 2
    return torch.stack([carried.losses[:, end - size : end].mean(dim=1) for end in ends], dim=1)
