"""Forecast of the position where a model breaks, from texts no longer than its training length T.

A recurrence is affine in the state that it starts from: after a text of T tokens the state is what the text
adds plus what is left of the initial state. Both are measured on texts of T tokens. The state after n T
tokens is then put together from the states that n texts leave, each weakened by the texts after it, and short
texts are read from it. The forecast is the first n T from which they read worse than from the zero state.

State of n texts, by doubling: S_2n = S_n(later texts) + d^n * S_n(earlier texts), elementwise, where d is the
share of a foreign element that a text leaves, its root mean square over texts. The sum is exact for one
layer without convolution whose decays do not depend on the text; a transition that turns the state (RetNet's
rotary positions, the delta rule) is taken for a decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longroll.errors import LongrollError
from longroll.measure._position_loss import token_losses
from longroll.measure.bootstrap import bootstrap_mean
from longroll.measure.judge import TOLERANCE, short
from longroll.measure.roll_out import check_ids
from longroll.model import RecurrentLM
from longroll.state import RecurrentState

TIMES = 64
"""Training lengths up to which the state is put together, unless it is said otherwise."""
TEXTS = 4
"""Texts that a forecast takes at least."""


@dataclass(frozen=True)
class Forecast:
    """What `forecast` found."""

    train_length: int
    """T."""
    times: list[int]
    """Training lengths n after which the state is that of the entry (K,)."""
    mean: list[float]
    """Nats over the second half of short texts, above the loss from the state of one other text (K,)."""
    low: list[float]
    """Lower ends of their 95 % intervals over texts (K,)."""
    high: list[float]
    """Upper ends (K,)."""
    rise: list[float]
    """`mean` plus the loss of the same tokens from the zero state, above the level in range (K,)."""
    low_rise: list[float]
    """Lower ends of their 95 % intervals (K,)."""
    has_attention: bool = False
    """Whether the model has attention, which is left out."""

    @property
    def edge(self) -> int | None:
        """Position where the loss is forecast to leave its level; None where it holds."""
        return None if self.octaves is None else round(self.train_length * 2**self.octaves)

    @property
    def octaves(self) -> float | None:
        """log2 of the edge over T, interpolated between the lengths tried; None where the loss holds."""
        margins = [min(m - TOLERANCE, r) for m, r in zip(self.mean, self.rise, strict=True)]
        for i, margin in enumerate(margins):
            if margin <= 0 or self.low[i] <= 0 or self.low_rise[i] <= 0:  # a NaN loss is damage
                continue
            before = margins[i - 1] if i else 0.0
            within = 0.0 if before >= 0 or not math.isfinite(margin) else before / (before - margin)
            return max(0.0, math.log2(self.times[i]) - 1 + within)
        return None

    @property
    def sentence(self) -> str:
        """The forecast in words."""
        longest = short(self.times[-1] * self.train_length)
        what = "its recurrent states hold" if self.has_attention else "it holds"
        less = " Its attention is not forecast." if self.has_attention else ""
        if self.edge is None:
            return f"Forecast from texts of {self.train_length} tokens: {what} to {longest}.{less}"
        return (
            f"Forecast from texts of {self.train_length} tokens: it breaks near t ~ {short(self.edge)}; at "
            f"{longest} it is {self.mean[-1]:.2f} nats above the state "
            f"of one text.{less}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain data for results."""
        return vars(self) | {"edge": self.edge, "sentence": self.sentence}


def readings_of(times: int) -> int:
    """Return how many readings of the texts a forecast to `times` training lengths takes."""
    return max(1, times).bit_length() + 1


@torch.no_grad()
def forecast(
    lm: RecurrentLM,
    tokens: Tensor,
    train_length: int | None = None,
    *,
    times: int = TIMES,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Forecast:
    """Forecast where the loss of a model leaves its level, from texts of T tokens.

    Keys and values of attention are left out: the forecast is that of the recurrent states.

    Args:
        lm: a model with recurrent layers.
        tokens: (B, T + 1) or longer, B texts, of which the first T + 1 tokens are read. As many as `times`
            are the texts of a state put together without repetition.
        train_length: T; default: what the model's config says.
        times: the longest roll-out that is forecast, in training lengths.
        seed: random seed of the bootstrap.
        progress: called with how many readings are done, of `readings_of(times)`.

    Raises:
        LongrollError: for a model without recurrent layers, an unknown training length, fewer than 4 texts,
            and texts shorter than T + 1 tokens.
    """
    train_length, _ = lm.find_train_length(train_length)
    if not lm.layers:
        raise LongrollError(f"{lm.name} has no recurrent state: there is nothing to forecast.")
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    if rows < TEXTS:
        raise LongrollError(
            f"{rows} texts are too few for an interval: give at least {TEXTS} (`tokens.shape[0]`)."
        )
    if train_length < 2 or length < train_length:
        raise LongrollError(
            f"A forecast reads texts of `train_length` {train_length} tokens and one more, at least 3: "
            f"`tokens` have {length + 1}."
        )
    check_ids(lm, tokens)
    ids = tokens[:, : train_length + 1].to(lm.device)
    counts = [2**k for k in range(readings_of(times) - 1)]

    def read(state: RecurrentState | None, done: int) -> tuple[Tensor, RecurrentState]:
        hidden, final = lm(ids[:, :-1], state, logits=False)
        if progress is not None:
            progress(done)
        return token_losses(lm, hidden, ids[:, 1:]).double().cpu(), final.part("recurrent", "conv")

    losses, state = read(None, 1)
    late = losses[:, train_length // 2 :].mean(dim=1, keepdim=True)
    level = losses.mean(dim=1, keepdim=True)  # in range
    far, left = [], {}
    for i, n in enumerate(counts):
        foreign = _turned(state, 1)
        losses, passed = read(foreign, i + 2)
        far.append(losses[:, train_length // 2 :].mean(dim=1))
        if n == 1:
            left = {key: _left(passed[key] - state[key], foreign[key]) for key in state.part("recurrent")}
        earlier = _turned(state, n)
        state = state.changed({key: t + d**n * earlier[key] for key, d in left.items() for t in [state[key]]})
    read_far = torch.stack(far, dim=1)  # (B, K)
    cost = read_far - read_far[:, :1]
    mean, low, high = (end.tolist() for end in bootstrap_mean(cost, seed=seed))
    rise, low_rise, _ = (end.tolist() for end in bootstrap_mean(cost + late - level, seed=seed))
    return Forecast(train_length, counts, mean, low, high, rise, low_rise, lm.has_attention)


def _left(moved: Tensor, foreign: Tensor) -> Tensor:
    """Return the share of each element of a foreign state that a text leaves, (1, ...), at most 1."""
    dtype = torch.promote_types(moved.dtype, torch.float32)
    sizes = [t.to(dtype).square().mean(dim=0, keepdim=True) for t in (moved, foreign)]
    share = (sizes[0] / sizes[1].clamp_min(1e-30)).sqrt().clamp(max=1)
    return share.to(moved)


def _turned(state: RecurrentState, by: int) -> RecurrentState:
    """Return the states of other rows."""
    rows = state.batch_size
    return state.rows([(row + by) % rows for row in range(rows)])
