"""What reading on costs: the loss on a text's own tokens, rolled out against restarted.

Text gets easier or harder as a document goes on, so a loss at 16k above the loss in range proves nothing
yet. Here the same tokens are predicted twice: with the state carried from the beginning, and with a fresh
state started half to a whole training length before them. A positive difference is damage done by the state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longroll import ranks
from longroll.measure._position_loss import PositionLoss, log_spaced, token_losses
from longroll.measure.roll_out import chunk_tokens
from longroll.model import RecurrentLM


@torch.no_grad()
def excess_loss(
    lm: RecurrentLM,
    tokens: Tensor,
    carried: PositionLoss,
    train_length: int,
    *,
    per_octave: int = 6,
    dealt: bool = False,
) -> tuple[list[int], Tensor]:
    """Loss carried minus loss restarted, at log-spaced positions past the training length.

    Args:
        lm: the model.
        tokens: (B, L + 1), those of `carried`.
        carried: their losses from the zero state.
        train_length: T; a probe restarts T tokens before its end and compares the last half of them.
        per_octave: probes to a doubling of the position.
        dealt: deal the rows to the ranks, each of which must call this and gets the differences of all.

    Returns:
        Where the probes end (K,), and the differences (B, K) in nats, a mean over T - T // 2 tokens each.
    """
    ends = [p for p in log_spaced(carried.losses.shape[1], per_octave) if p > train_length]
    with ranks.together(dealt):
        mine = tokens[ranks.share(len(tokens))]
        fresh = _restarted(lm, mine, ends, train_length) if len(mine) else torch.empty(0, len(ends))
        return ends, probe_losses(carried, ends, train_length) - ranks.gather_rows(fresh)


def _restarted(lm: RecurrentLM, tokens: Tensor, ends: list[int], train_length: int) -> Tensor:
    """Mean loss of the last half of the `train_length` tokens before each end, read afresh, (B, K)."""
    half = train_length // 2
    rows = max(1, chunk_tokens(lm) // (train_length * tokens.shape[0]))
    restarted = []
    for some in (ends[i : i + rows] for i in range(0, len(ends), rows)):
        windows = torch.stack([tokens[:, end - train_length : end + 1] for end in some], dim=1)
        windows = windows.flatten(0, 1).to(lm.device)  # (B * K, T + 1)
        hidden, _ = lm(windows[:, :-1], logits=False)
        losses = token_losses(lm, hidden[:, half:], windows[:, half + 1 :]).mean(dim=1).cpu()
        restarted.append(losses.view(tokens.shape[0], len(some)))
    return torch.cat(restarted, dim=1)


def probe_losses(carried: PositionLoss, ends: list[int], train_length: int) -> Tensor:
    """Carried loss of the tokens that each probe compares: the T - T // 2 before its end, (B, K) means."""
    size = train_length - train_length // 2
    return torch.stack([carried.losses[:, end - size : end].mean(dim=1) for end in ends], dim=1)
