"""Which side of a hybrid does the damage past T: its recurrent states, its attention, both, or neither.

The far text is read again with the states held in their training range, with attention held in its, and
with both. What each reading recovers of the damage (loss carried minus loss of a fresh start on the same
tokens) is a game of two players, and a side's part is its Shapley value: the mean of what it recovers alone
and of what it adds to the other. The two parts sum to what both recover. Source: Shapley 1953, "A value for
n-person games". A side with a small part of a large damage is named, too, where reading with the other side
held alone would leave damage.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from longroll import ranks
from longroll.errors import LongrollError
from longroll.families._rope import KINDS, RopeScaling, scaled_rope
from longroll.measure._attention_readings import FIRST, Clipped, Hold, Norms, Positions, Rescan, Window, both
from longroll.measure._budget import DAMAGE, far_probes
from longroll.measure._coverage import Coverage
from longroll.measure._position_loss import PositionLoss, position_loss
from longroll.measure.bootstrap import bootstrap_ratio
from longroll.measure.excess_loss import excess_loss
from longroll.measure.holds import held_loss
from longroll.measure.judge import short
from longroll.model import RecurrentLM
from longroll.state import RecurrentState

Side = Literal["state", "attention"]
SIDES: tuple[Side, ...] = ("state", "attention")
WINDOWS = ("window", "window+first")
EXPLAINS = 0.2
"""Share of the damage from which a side is named as a cause."""
READINGS = 14
"""The most readings past T that `split_blame` takes; a rescan reads T tokens a piece and counts as four."""
HOLDS = 9
"""The most ways of reading past T that `split_blame` tries."""
_AS_GOOD = (
    0.8  # of the best reading of attention: a RoPE scaling, which can be saved, is preferred from there
)


@dataclass(frozen=True)
class Share:
    """A share of the damage with its 95 % interval over texts."""

    what: str
    """The reading, or the side."""
    recovered: float
    low: float
    high: float

    @property
    def blamed(self) -> bool:
        """Whether it is a part of the damage worth naming, beyond its interval."""
        return self.recovered >= EXPLAINS and self.low > 0

    def __str__(self) -> str:
        return f"{_percent(self.recovered)} ({_percent(self.low)} to {_percent(self.high)})"


@dataclass(frozen=True)
class Blame:
    """What `split_blame` found."""

    damage: float
    """Nats: loss carried minus loss of a fresh start, over the last octave. Where it is not finite, shares
    count the texts whose loss is not, and a reading recovers those whose loss it makes finite."""
    factor: float
    """By which positions were scaled."""
    states: list[Share]
    """Readings that hold the recurrent states, the largest share first."""
    attentions: list[Share]
    """Readings that hold attention, the largest share first."""
    together: Share | None
    """The best of either kind together."""
    parts: dict[Side, Share]
    """The Shapley value of each side."""
    positions: str
    """How attention takes positions: `none`, `rotary`, `other`."""
    left: dict[Side, Share] = field(default_factory=dict)
    """The share of the damage that each side does while the other side alone is held."""
    length: int | None = None
    """Positions that were read: the damage is that of their last octave."""

    def _is_named(self, side: Side) -> bool:
        """Return whether a side does a large share of the damage, or breaks the model by itself."""
        part, left = self.parts[side], self.left.get(side)
        return part.blamed or (left is not None and part.low > 0 and left.low * self.damage >= DAMAGE)

    @property
    def verdict(self) -> Literal["state", "attention", "both", "neither"] | None:
        """The side that is to blame; None where these texts do not tell."""
        if not self.parts or not all(math.isfinite(part.recovered) for part in self.parts.values()):
            return None
        named = [side for side in self.parts if self._is_named(side)]
        if len(named) == 2:
            return "both"
        if named:  # the other side may do as much where its interval says neither that nor the contrary
            other = self.parts["attention" if named[0] == "state" else "state"]
            return None if other.low <= 0 and other.high > EXPLAINS else named[0]
        return None if any(part.high > EXPLAINS for part in self.parts.values()) else "neither"

    @property
    def scaling(self) -> RopeScaling | None:
        """The RoPE scaling that recovers about as much as any reading of attention, or as can be had."""
        best = self.attentions[0].recovered if self.attentions else 0.0
        kinds = [share for share in self.attentions if share.what in KINDS]
        if not kinds or best <= 0 or kinds[0].recovered <= 0:
            return None
        if self.window is not None and kinds[0].recovered < _AS_GOOD * best:
            return None
        return RopeScaling(kinds[0].what, self.factor)

    @property
    def window(self) -> str | None:
        """The reading with an attention window that recovers most, `window` or `window+first`; None where
        none recovers.
        """
        windows = [share for share in self.attentions if share.what in WINDOWS and share.recovered > 0]
        if not windows:
            return None
        plain = next((share for share in windows if share.what == WINDOWS[0]), windows[0])
        return plain.what if plain.recovered >= _AS_GOOD * windows[0].recovered else windows[0].what

    @property
    def sentence(self) -> str:
        """The finding in words."""
        if self.together is None and self.states:
            return (
                f"The attention of this model cannot be read otherwise, so damage of {self.damage:.2f} nats "
                "is not split."
            )
        if self.together is None:
            return f"There is no damage to split: reading on costs {self.damage:.2f} nats."
        state, attention = (f"{side} {share}" for side, share in self.parts.items())
        whose = {
            "state": "The recurrent states do the damage, not the attention",
            "attention": "The attention does the damage, not the recurrent states",
            "both": "The recurrent states and the attention both do damage",
            "neither": "Neither the recurrent states nor the attention do the damage",
            None: "These texts are too few or too short to tell whether states or attention do the damage",
        }[self.verdict]
        finite = math.isfinite(self.damage)
        damage = f"{self.damage:.2f} nats" if finite else "the texts whose loss is not finite"
        if self.length is not None:
            damage += f" at {short(self.length // 2)}-{short(self.length)}"
        return f"{whose}: of {damage}, {state}, {attention} (95 % intervals over texts)."

    def to_json(self) -> dict[str, Any]:
        """Return plain data for results."""
        return {
            "verdict": self.verdict,
            "sentence": self.sentence,
            "damage": self.damage,
            "positions": self.positions,
            "factor": self.factor,
            "length": self.length,
            "parts": [vars(share) for share in self.parts.values()],
            "left": [vars(share) for share in self.left.values()],
            "states": [vars(share) for share in self.states],
            "attentions": [vars(share) for share in self.attentions],
            "together": None if self.together is None else vars(self.together),
        }


def scaling_factor(length: int, train_length: int) -> float:
    """Return the least power of two that brings `length` positions into T."""
    return 2.0 ** math.ceil(math.log2(length / train_length))


@torch.no_grad()
def split_blame(
    lm: RecurrentLM,
    tokens: Tensor,
    coverage: Coverage,
    train_length: int | None = None,
    *,
    factor: float | None = None,
    carried: PositionLoss | None = None,
    restarted: tuple[list[int], Tensor] | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    dealt: bool = False,
) -> Blame:
    """Read a hybrid past T with its states, its attention and both held in range, and split the damage.

    Args:
        lm: a model with recurrent layers and attention layers.
        tokens: (B, L + 1), each row a text from its beginning, L at least 2 T.
        coverage: coverage of the same model: the range of the norms of its states.
        train_length: T; default: what the model's config says.
        factor: the factor by which rotary positions are scaled; default: the power of two that brings L into
            T.
        carried: losses of `tokens` from the zero state, when they are known already.
        restarted: what `excess_loss` returns for them.
        seed: random seed of the bootstrap.
        progress: called with how many readings are done.
        dealt: deal the texts to the ranks, each of which must call this and gets the result.

    Raises:
        LongrollError: for a model without one of the two, an unknown training length, and texts not past 2 T.
    """
    with ranks.together(dealt):
        return _split(lm, tokens, coverage, train_length, factor, carried, restarted, seed, progress)


def _split(
    lm: RecurrentLM,
    tokens: Tensor,
    coverage: Coverage,
    train_length: int | None,
    factor: float | None,
    carried: PositionLoss | None,
    restarted: tuple[list[int], Tensor] | None,
    seed: int,
    progress: Callable[[int], None] | None,
) -> Blame:
    """Return `split_blame` among the ranks that work on it."""
    train_length, _ = lm.find_train_length(train_length)
    if not (lm.layers and lm.has_attention):
        raise LongrollError(f"{lm.name} has no recurrent layers beside attention layers: it is no hybrid.")
    length = tokens.shape[1] - 1
    if length < 2 * train_length:
        raise LongrollError(
            f"{length} positions are too few to see damage: give at least {2 * train_length}."
        )
    factor = factor or scaling_factor(length, train_length)
    positions = Positions(lm)
    carried = carried or position_loss(lm, tokens, dealt=True)
    ends, excess = restarted or excess_loss(lm, tokens, carried, train_length, dealt=True)
    half = train_length - train_length // 2
    far = far_probes(ends, train_length, length)
    whole = excess[:, far].double().mean(dim=1)  # (B,)
    damage = whole.mean().item()
    if damage <= DAMAGE:
        return Blame(damage, factor, [], [], None, {}, positions.kind, length=length)
    share = ranks.deal(len(tokens))
    mine = tokens[share.rows]
    readings = _Readings(lm, mine, train_length, [(ends[i] - half, ends[i]) for i in far], progress)
    before = readings.mean(carried.losses.double())
    lost = ~whole.isfinite()
    if lost.any():  # a text of no finite loss is lost or read again; the others do not count
        whole = whole[lost].new_ones(int(lost.sum()))

    stride, keep = readings.stride, max(1, train_length - readings.stride)
    states: dict[str, Callable[[], Hold]] = {
        "norms": lambda: Norms(coverage),
        "rescan": lambda: Rescan(lm, mine, keep),
    }
    attentions: dict[str, Callable[[], Hold]] = {}
    if positions.windows:
        attentions["window"] = lambda: Window(keep)
    if positions.windows and positions.kind != "other" and keep > FIRST + stride:
        attentions["window+first"] = lambda: Window(keep, FIRST, positions.frequencies)
    if positions.frequencies is not None:
        frequencies = positions.frequencies
        attentions["clipped"] = lambda: Clipped(keep, frequencies)
    scalings = {kind: RopeScaling(kind, factor) for kind in KINDS}

    def recovered(state: str | None, attention: str | None) -> Tensor:
        """Return nats of each text, (B,); of texts that are lost, whether each is read now."""
        made = [states[state]()] if state else []
        made += [attentions[attention]()] if attention in attentions else []
        read = readings.read(both(*made), scalings.get(attention or ""))
        read = ranks.gather_rows(read if share.part == 0 else read[:0])
        return read[lost].isfinite().double() if lost.any() else before - read

    alone_states = {name: recovered(name, None) for name in states}
    alone_attentions = {name: recovered(None, name) for name in attentions}
    for kind in scalings:
        with contextlib.suppress(LongrollError):  # one that the model does not have
            alone_attentions[kind] = recovered(None, kind)
    if not alone_attentions:
        alone = _shares(alone_states, whole, seed)
        return Blame(damage, factor, [*alone.values()], [], None, {}, positions.kind, length=length)
    best_state, best_attention = (
        max(alone, key=lambda name: _finite(alone[name])) for alone in (alone_states, alone_attentions)
    )
    together = recovered(best_state, best_attention)
    state, attention = alone_states[best_state], alone_attentions[best_attention]
    columns = {**alone_states, **alone_attentions, f"{best_state} and {best_attention}": together}
    columns |= {"state": (state + together - attention) / 2, "attention": (attention + together - state) / 2}
    columns |= {"state left": together - attention, "attention left": together - state}
    shares = _shares(columns, whole, seed)

    best = shares[f"{best_state} and {best_attention}"]

    def ranked(names: dict[str, Tensor]) -> list[Share]:
        return sorted((shares[name] for name in names), key=lambda share: -_or_least(share.recovered))

    return Blame(
        damage, factor, ranked(alone_states), ranked(alone_attentions), best,
        {"state": shares["state"], "attention": shares["attention"]}, positions.kind,
        {side: replace(shares[f"{side} left"], what=side) for side in SIDES}, length,
    )  # fmt: skip


class _Readings:
    """Reads the text past T under a hold, and returns the loss over the spans that the damage was seen in."""

    def __init__(
        self,
        lm: RecurrentLM,
        tokens: Tensor,
        train_length: int,
        spans: list[tuple[int, int]],
        progress: Callable[[int], None] | None,
    ) -> None:
        self.lm, self.tokens, self.train_length, self.spans = lm, tokens.to(lm.device), train_length, spans
        self.stride = max(1, train_length // 4)
        self.progress, self.done = progress, 0
        self._at_edge: RecurrentState | None = None

    def mean(self, losses: Tensor) -> Tensor:
        """Return mean loss of each text over the spans, (B,), of losses (B, L)."""
        return torch.stack([losses[:, a:b].mean(dim=1) for a, b in self.spans], dim=1).mean(dim=1)

    def read(self, hold: Hold, scaling: RopeScaling | None) -> Tensor:
        """Return mean loss of each text over the spans, (B,) float64, read under `hold` from T on."""
        lm, edge = self.lm, self.train_length
        with scaled_rope(lm.model, scaling, edge) if scaling else contextlib.nullcontext():
            state = self._edge(scaled=scaling is not None)
            losses = held_loss(
                lm, self.tokens, hold,
                stride=self.stride, start=edge, state=state, measured_from=min(a for a, _ in self.spans),
            ).losses.double()  # fmt: skip
        self.done += 1
        if self.progress is not None:
            self.progress(self.done)
        return self.mean(losses)

    def _edge(self, *, scaled: bool) -> RecurrentState:
        """Return the state at T."""
        if self._at_edge is not None and not scaled:
            return self._at_edge
        state: RecurrentState
        _, state = self.lm(self.tokens[:, : self.train_length], logits=False)
        if not scaled:
            self._at_edge = state
        return state


def _shares(columns: dict[str, Tensor], whole: Tensor, seed: int) -> dict[str, Share]:
    mean, low, high = bootstrap_ratio(torch.stack(list(columns.values()), dim=1), whole, seed=seed)
    return {
        name: Share(name, *(end[i].item() for end in (mean, low, high))) for i, name in enumerate(columns)
    }


def _finite(recovered: Tensor) -> float:
    return _or_least(recovered.mean().item())


def _or_least(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
