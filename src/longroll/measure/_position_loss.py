"""Loss at every position of long sequences: the curve that shows where a model breaks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from longroll import ranks
from longroll.errors import LongrollError
from longroll.families._documents import Documents
from longroll.measure.bootstrap import bootstrap_mean
from longroll.measure.kept import Kept
from longroll.measure.roll_out import LEAST, LOGITS, check_ids, check_rows, roll_out
from longroll.model import RecurrentLM
from longroll.state import RecurrentState

_MANY = 64  # rows from which their memory is looked at


@dataclass(frozen=True)
class PositionLoss:
    """Losses in nats: entry t is -log p(x_{t+1} | x_0..x_t), every position once."""

    losses: Tensor
    """(B, L) float32, on the CPU."""
    counted: Tensor | None = None
    """(B, L), false where no next token of the same document follows; None: true everywhere."""

    @cached_property
    def _interval(self) -> tuple[Tensor, Tensor, Tensor]:
        return bootstrap_mean(self.losses, counted=self.counted)

    @property
    def mean(self) -> Tensor:
        """Mean over sequences at each position, (L,); NaN where no sequence has a target."""
        return _mean(self.losses, self.counted, 0)

    @property
    def low(self) -> Tensor:
        """Lower end of the 95 % bootstrap interval over sequences, (L,)."""
        return self._interval[1]

    @property
    def high(self) -> Tensor:
        """Upper end of the interval, (L,)."""
        return self._interval[2]

    def between(self, start: int, stop: int) -> float:
        """Return mean loss over positions [start, stop)."""
        counted = None if self.counted is None else self.counted[:, start:stop]
        return _mean(self.losses[:, start:stop], counted).item()

    def curve(self, per_octave: int = 6) -> dict[str, list[float]]:
        """Return the loss over log-spaced bins of positions [start, stop), with its interval."""
        edges = log_spaced(self.losses.shape[1], per_octave)
        bins = list(zip([0, *edges[:-1]], edges, strict=True))
        counted = [None if self.counted is None else self.counted[:, a:b] for a, b in bins]
        means = [_mean(self.losses[:, a:b], c, 1) for (a, b), c in zip(bins, counted, strict=True)]
        exist = [c.any(dim=1) for c in counted if c is not None]
        mean, low, high = bootstrap_mean(
            torch.stack(means, dim=1), counted=torch.stack(exist, dim=1) if exist else None
        )
        return {
            "start": [a for a, _ in bins],
            "stop": [b for _, b in bins],
            # a bin stands at the geometric middle of the (1-based) positions it covers
            "position": [math.sqrt((a + 1) * b) for a, b in bins],
            "loss": mean.tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
        }


def _mean(losses: Tensor, counted: Tensor | None, dim: int | None = None) -> Tensor:
    """Return mean of what counts, in float64."""
    if counted is None:
        return losses.double().mean(dim=dim)
    return losses.double().where(counted, 0).sum(dim=dim) / counted.sum(dim=dim)


def log_spaced(length: int, per_octave: int) -> list[int]:
    """Return distinct positions 1..length, `per_octave` to a doubling, powers of two and `length` among
    them.
    """
    count = math.floor(math.log2(length) * per_octave) + 1 if length > 1 else 1
    return sorted({round(2 ** (i / per_octave)) for i in range(count)} | {length})


def position_loss(
    lm: RecurrentLM,
    tokens: Tensor,
    *,
    chunk_size: int | None = None,
    stops: Iterable[int] = (),
    watch: Callable[[int, RecurrentState], None] | None = None,
    progress: Callable[[int], None] | None = None,
    attention_mask: Tensor | None = None,
    starts: Tensor | None = None,
    dealt: bool = False,
    kept: Kept | None = None,
) -> PositionLoss:
    """Measure the loss at every position of `tokens` from the zero state, in constant memory.

    Args:
        lm: the model.
        tokens: (B, L + 1); every sequence is one text from its beginning.
        chunk_size: tokens of a row in one forward.
        stops: positions at which `watch` must see the state.
        watch: called with how many tokens were read, and the state, after every chunk.
        progress: called with how many positions of each row are done.
        attention_mask: (B, L + 1), 1 at real tokens and 0 at padding; None: every token is real.
        starts: (B, L + 1), nonzero at the first token of each document inside a row, which is read from the
            zero state; None: each row is one document. Only tokens that the next token of the same document
            follows have a loss (`PositionLoss.counted`).
        dealt: deal the rows to the ranks, each of which must call this and gets the losses of all; `watch`
            sees those of its rank.
        kept: where the reading is kept from time to time; it goes on from what is there.

    Raises:
        LongrollError: for fewer than two tokens, tokens outside the vocabulary, a mask or starts of another
            shape, and `watch`, `stops`, `dealt` or `kept` together with either: documents end at different
            positions.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise LongrollError(f"tokens {tuple(tokens.shape)}: a loss needs (B, L + 1) with L >= 1.")
    documents = None
    if attention_mask is not None or starts is not None:
        documents = Documents(attention_mask, starts, tokens.shape)
    if documents is not None and not documents.whole:
        if watch is not None or tuple(stops) or dealt or kept is not None:
            raise LongrollError(
                "`watch`, `stops`, `dealt` and `kept` need rows of one document each, without padding."
            )
        return _of_documents(lm, tokens, documents, chunk_size, progress)
    check_ids(lm, tokens)
    with ranks.together(dealt):
        mine = tokens[ranks.share(len(tokens))]
        if not len(mine):  # fewer rows than ranks
            return PositionLoss(ranks.gather_rows(torch.empty(mine[:, 1:].shape)))
        return PositionLoss(
            ranks.gather_rows(_read(lm, mine, chunk_size, stops, watch, progress, kept or Kept()))
        )


def _read(
    lm: RecurrentLM,
    tokens: Tensor,
    chunk_size: int | None,
    stops: Iterable[int],
    watch: Callable[[int, RecurrentState], None] | None,
    progress: Callable[[int], None] | None,
    kept: Kept,
) -> Tensor:
    """Return the losses (B, L) of whole rows."""
    if len(tokens) > _MANY:
        check_rows(lm, len(tokens), tokens.shape[1] - 1, chunk_size)
    tokens = tokens.to(lm.device)
    losses = torch.empty(tokens[:, 1:].shape, device=lm.device)  # nothing waits for the GPU
    first, state = kept.go_on(losses)
    chunks = roll_out(lm, tokens[:, :-1], chunk_size=chunk_size, stops=stops, state=state, first=first)
    for start, hidden, state in chunks:
        stop = start + hidden.shape[1]
        losses[:, start:stop] = token_losses(lm, hidden, tokens[:, start + 1 : stop + 1])
        if watch is not None:
            watch(stop, state)
        if progress is not None:
            progress(stop)
        kept.note(stop, state, losses)
    return losses


def _of_documents(
    lm: RecurrentLM,
    tokens: Tensor,
    documents: Documents,
    chunk_size: int | None,
    progress: Callable[[int], None] | None,
) -> PositionLoss:
    """Return the losses of documents, those of one length at a time."""
    losses = torch.zeros(tokens.numel())
    counted = torch.zeros(tokens.numel(), dtype=torch.bool)
    done = 0
    for group in documents.groups(padded=False):
        if group.place.shape[1] > 1:
            place = group.place[:, :-1].flatten()
            ids = tokens.flatten()[group.place.to(tokens.device)]
            losses[place] = position_loss(lm, ids, chunk_size=chunk_size).losses.flatten()
            counted[place] = True
        done += group.place.numel()
        if progress is not None:
            progress(done * tokens.shape[1] // tokens.numel())
    return PositionLoss(losses.view(tokens.shape)[:, :-1], counted.view(tokens.shape)[:, :-1])


@torch.no_grad()
def token_losses(lm: RecurrentLM, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return cross-entropy (B, T) of `targets` (B, T) from hidden states; the logits exist a slice at a
    time.
    """
    kind = hidden.device.type if hidden.device.type in LOGITS else "cpu"
    rows = hidden.shape[0]
    slice_size = max(1, LOGITS[kind] // (rows * lm.vocab_size), LEAST[kind] // rows)
    pieces = []
    for h, y in zip(hidden.split(slice_size, dim=1), targets.split(slice_size, dim=1), strict=True):
        logits = lm.head(h).flatten(0, 1)
        y = y.to(logits.device)
        pieces.append(F.cross_entropy(logits, y.flatten(), reduction="none").view(y.shape))
    return torch.cat(pieces, dim=1)
