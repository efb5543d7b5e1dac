"""Which heads do the damage: put their states back into the training range and see what loss comes back.

That a head has left its range (`coverage`) does not prove that it matters. Here the text past the training
length is read again with some heads held in range: whenever a chunk ends, their norm is scaled back to the
range seen in training, or their state is replaced by the one at T. The loss that this recovers, as a share of
the damage (loss carried minus loss of a fresh start on the same tokens), is theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from longroll import ranks
from longroll.errors import LongrollError
from longroll.heads import choose_heads, head_norms, scale_heads
from longroll.measure._budget import DAMAGE, far_probes
from longroll.measure._coverage import Coverage, Head, LayerCoverage
from longroll.measure._head_search import smallest_group
from longroll.measure._position_loss import PositionLoss, position_loss, token_losses
from longroll.measure.bootstrap import bootstrap_mean
from longroll.measure.excess_loss import excess_loss
from longroll.measure.roll_out import rows_at_once
from longroll.model import RecurrentLM
from longroll.state import RecurrentState, StateKey

Mode = Literal["rescale", "swap"]

SHARE = 0.8
"""Share of what all heads recover: heads that recover as much are said to carry the damage."""
_EXPLAINS = 0.2  # of the damage: with less than this back, all heads held, their range is not the cause
_GAIN = 0.01  # a head that adds less to the greedy list ends it
_ROWS = 64  # of trials and texts read together
_NAMED = 8  # heads of a group that are named one by one


@dataclass(frozen=True)
class Recovery:
    """What holding `heads` in range recovers: a share of the damage with its interval over texts."""

    heads: list[Head]
    recovered: float
    low: float
    high: float

    @property
    def what(self) -> str:
        """Name of the heads; of many, their layers."""
        if len(self.heads) <= _NAMED:
            return " + ".join(map(str, self.heads))
        layers = sorted({head.layer for head in self.heads})
        places = ", ".join(map(str, layers)) if len(layers) <= _NAMED else f"{layers[0]} to {layers[-1]}"
        return f"{len(self.heads)} heads of layer{'s' if len(layers) > 1 else ''} {places}"


@dataclass(frozen=True)
class CausalTest:
    """What `state_ablation` found."""

    damage: float
    """Nats: loss carried minus loss of a fresh start, over the last octave."""
    alone: list[Recovery]
    """Single heads, and whole layers, the largest share first."""
    together: list[Recovery]
    """The greedy list: the best head, the best pair that holds it, ..., until they carry the damage. After a
    search by groups: the groups that carry it, each smaller than the one before."""
    all_heads: Recovery | None
    """Every head of the model held in range: about the most that this can recover."""
    mode: Mode

    @property
    def explained(self) -> bool | None:
        """Whether leaving the training range explains some of the damage; None where that cannot be told."""
        recovery = self.all_heads
        if recovery is None or not math.isfinite(recovery.recovered):
            return None
        if recovery.recovered >= _EXPLAINS:
            return True
        return None if recovery.high > _EXPLAINS else False

    @property
    def sentence(self) -> str:
        """The finding in words."""
        if not math.isfinite(self.damage):
            return "The loss is not finite: no share of the damage can be told."
        if self.all_heads is None:
            return f"No damage to explain: reading on costs {self.damage:.2f} nats."
        most = self.all_heads.recovered
        if not math.isfinite(most):
            return "With all heads held in range the loss is not finite: no share of the damage can be told."
        if self.explained is None:
            interval = f"{_percent(self.all_heads.low)} to {_percent(self.all_heads.high)}"
            return (
                "These texts are too few or too short to tell whether the range of the states explains the "
                f"damage: with all heads held in it, {interval} comes back."
            )
        ceiling = f"all heads together {_percent(most)}"
        if not self.explained:
            return (
                "The range of the states does not explain the damage: with all heads held in it, "
                f"{_percent(most)} comes back."
            )
        if not self.together:
            interval = f"{_percent(self.all_heads.low)} to {_percent(self.all_heads.high)}"
            return (
                "No head is outside its training range by more than these texts scatter. Holding all in "
                f"range brings back {_percent(most)} ({interval}) of a damage of {self.damage:.2f} nats: "
                "measure more, or longer, texts."
            )
        best = self.together[-1]
        if best.recovered >= SHARE * most:
            many = len(best.heads) > 1
            who = f"These {len(best.heads)} heads carry" if many else "One head carries"
            return f"{who} {_percent(best.recovered)} of the damage ({ceiling}): {best.what}."
        first = self.together[0]
        if len(first.heads) > 1:
            return (
                f"The heads outside their training range, {len(first.heads)} of them, carry "
                f"{_percent(first.recovered)} of the damage ({ceiling}): no few heads do it."
            )
        pair = f", the best {len(best.heads)} {_percent(best.recovered)}" if len(best.heads) > 1 else ""
        return (
            f"None alone does the damage: {first.what} carries {_percent(first.recovered)}{pair}, {ceiling}."
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain data for results: lists of the rows of the report's table."""
        return {
            "damage": self.damage,
            "mode": self.mode,
            "sentence": self.sentence,
            "alone": [_row(recovery) for recovery in self.alone],
            "together": [_row(recovery) for recovery in self.together],
            "all_heads": None if self.all_heads is None else _row(self.all_heads, "all heads"),
        }

    def table(self) -> list[dict[str, Any]]:
        """Return rows `what`, `recovered` for the `causal` entry of a coverage section."""
        more = [recovery for recovery in self.together if recovery not in self.alone]
        rows = [_row(recovery) for recovery in [*self.alone, *more]]
        return rows if self.all_heads is None else [*rows, _row(self.all_heads, "all heads")]


def _row(recovery: Recovery, what: str = "") -> dict[str, Any]:
    shares = {"recovered": recovery.recovered, "low": recovery.low, "high": recovery.high}
    return {"what": what or recovery.what, **shares, "heads": [list(head) for head in recovery.heads]}


def _finite(recovery: Recovery) -> float:
    """Return the share recovered, below all others where it is not finite."""
    return recovery.recovered if math.isfinite(recovery.recovered) else -math.inf


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


@torch.no_grad()
def state_ablation(
    lm: RecurrentLM,
    tokens: Tensor,
    coverage: Coverage,
    train_length: int | None = None,
    *,
    mode: Mode = "rescale",
    candidates: int = 8,
    most: int = 4,
    interval: int | None = None,
    carried: PositionLoss | None = None,
    restarted: tuple[list[int], Tensor] | None = None,
    trials: int | None = None,
    progress: Callable[[int], None] | None = None,
    dealt: bool = False,
) -> CausalTest:
    """Hold heads in their training range past T and report the share of the far damage that this recovers.

    Args:
        lm: the model.
        tokens: (B, L + 1), each row a text from its beginning; 16 T tokens are enough to see damage.
        coverage: coverage of the same model: which heads to try, and their range.
        train_length: T; default: what the model's config says.
        mode: `rescale` scales the norm of a head that has left its range to the nearest end of it; `swap`
            puts the state that the same text had at T in its place, whether it has left or not.
        candidates: heads to try, the farthest out first; whole layers are tried besides.
        most: heads in the greedy list.
        interval: tokens between two corrections; default: T / 4.
        carried: losses of `tokens` from the zero state, when they are known already.
        restarted: what `excess_loss` returns for them.
        trials: the most that may be made, at least 1. Where they are too few for every candidate and every
            layer, heads are searched by groups (`smallest_group`). Default: as many as candidates ask for.
        progress: called with how many trials are done.
        dealt: deal texts and trials to the ranks, each of which must call this and gets the result.

    Raises:
        LongrollError: for an unknown training length, texts not past 2 T, and an unknown mode.
    """
    with ranks.together(dealt):
        return _ablated(
            lm, tokens, coverage, train_length, mode, candidates, most, interval, carried, restarted, trials,
            progress,
        )  # fmt: skip


def _ablated(
    lm: RecurrentLM,
    tokens: Tensor,
    coverage: Coverage,
    train_length: int | None,
    mode: Mode,
    candidates: int,
    most: int,
    interval: int | None,
    carried: PositionLoss | None,
    restarted: tuple[list[int], Tensor] | None,
    trials: int | None,
    progress: Callable[[int], None] | None,
) -> CausalTest:
    """Return `state_ablation` among the ranks that work on it."""
    train_length = train_length or lm.train_length
    if train_length is None:
        raise LongrollError("The model does not say at which length it was trained: give `train_length`.")
    if mode not in ("rescale", "swap"):
        raise LongrollError(f"mode {mode!r} is not one of rescale, swap.")
    length = tokens.shape[1] - 1
    if length < 2 * train_length:
        raise LongrollError(
            f"{length} positions are too few to see damage: give at least {2 * train_length}."
        )
    carried = carried or position_loss(lm, tokens, dealt=True)
    ends, excess = restarted or excess_loss(lm, tokens, carried, train_length, dealt=True)
    half = train_length - train_length // 2  # what a probe compares; heads are held from T on
    far = far_probes(ends, train_length, length)
    damage = excess[:, far].double().mean().item()
    if damage <= DAMAGE or not math.isfinite(damage):
        return CausalTest(damage, [], [], None, mode)
    spans = [(ends[i] - half, ends[i]) for i in far]
    readings = _Trials(
        lm, tokens, coverage, train_length, mode, interval or max(1, train_length // 4), progress
    )

    def measure(choices: list[list[Head]]) -> list[Recovery]:
        losses = readings.losses(choices, spans)
        return ranks.on_first(lambda: compare(choices, losses))  # which heads are tried next hangs on it

    def compare(choices: list[list[Head]], means: list[Tensor]) -> list[Recovery]:
        recoveries = []
        for heads, losses in zip(choices, means, strict=True):
            before = torch.stack([carried.losses[:, a:b].mean(dim=1) for a, b in spans], dim=1)
            shares = (before.double() - losses).mean(dim=1, keepdim=True) / damage
            mean, low, high = (t.item() for t in bootstrap_mean(shares))
            recoveries.append(Recovery(heads, mean, low, high))
        return recoveries

    layers = [Head(layer.key.layer, None) for layer in coverage.layers]
    out = coverage.ranking()
    if trials is not None and trials < trials_for(coverage, candidates=candidates, most=most):
        everything = measure([layers])[0]
        found = CausalTest(damage, [], [], everything, mode)
        if found.explained and out and trials > 1:
            together = _by_groups(out, measure, everything, trials - 1)
            single = [group for group in together if len(group.heads) == 1]
            found = CausalTest(damage, single, together, everything, mode)
        return found
    ranked = out[:candidates]
    alone = measure([[head] for head in dict.fromkeys([*ranked, *layers])])
    everything = measure([layers])[0]
    together = _greedy(ranked, [r for r in alone if r.heads[0] in ranked], measure, everything, most)
    alone.sort(key=_finite, reverse=True)
    return CausalTest(damage, alone, together, everything, mode)


def trials_for(coverage: Coverage, *, candidates: int = 8, most: int = 4) -> int:
    """Return how many trials `state_ablation` makes at most where nothing bounds them."""
    count = min(candidates, len(coverage.ranking()))
    return count + len(coverage.layers) + 1 + sum(max(0, count - more) for more in range(1, most))


_Measure = Callable[[list[list[Head]]], list[Recovery]]


def _greedy(
    ranked: list[Head], single: list[Recovery], measure: _Measure, everything: Recovery, most: int
) -> list[Recovery]:
    """Return the best head, the best pair that holds it, ..., until they carry the damage."""
    together: list[Recovery] = []
    while single and len(together) < most:
        if together:
            rest = [head for head in ranked if head not in together[-1].heads]
            if not rest:
                break
            single = measure([[*together[-1].heads, head] for head in rest])
        best = max(single, key=_finite)
        if together and best.recovered < together[-1].recovered + _GAIN:
            break
        together.append(best)
        if best.recovered >= SHARE * everything.recovered:
            break
    return together


def _by_groups(ranked: list[Head], measure: _Measure, everything: Recovery, trials: int) -> list[Recovery]:
    """Return groups that carry the damage, each smaller than the one before; all heads where none does."""
    tried: list[Recovery] = []

    def carries(group: list[Head]) -> bool:
        tried.extend(measure([group]))
        return tried[-1].recovered >= SHARE * everything.recovered

    if smallest_group(ranked, carries, trials) is None:
        return tried
    return [group for group in tried if group.recovered >= SHARE * everything.recovered]


class _Trials:
    """Reads the text past T again, with chosen heads held in range; several choices in one batch."""

    def __init__(
        self,
        lm: RecurrentLM,
        tokens: Tensor,
        coverage: Coverage,
        train_length: int,
        mode: Mode,
        interval: int,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.texts, self.share = len(tokens), ranks.deal(len(tokens))
        self.tokens = tokens[self.share.rows].to(lm.device)
        self.lm, self.mode, self.interval = lm, mode, interval
        self.layers = {layer.key: layer for layer in coverage.layers}
        self.start, self.progress, self.done = train_length, progress, 0
        self.at_once = max(1, rows_at_once(lm, interval, _ROWS) // len(self.tokens))
        _, self.at_edge = lm(self.tokens[:, :train_length], logits=False)

    def losses(self, choices: Sequence[list[Head]], spans: list[tuple[int, int]]) -> list[Tensor]:
        """Return, for each choice of heads, the mean loss of every text over every span, (B, spans)
        float64.
        """
        step = self.at_once
        means: list[Tensor] = []
        mine = choices[self.share.part :: self.share.parts]
        for i in range(0, len(mine), step):
            some = mine[i : i + step]
            losses = self._read([set(heads) for heads in some], spans)
            columns = torch.stack([losses[:, :, a:b].mean(dim=2) for a, b in spans], dim=2)
            means.extend(columns.unbind(0))
            self.done += len(some)
            if self.progress is not None:
                self.progress(self.done * self.share.parts)
        found = torch.empty(len(choices), self.texts, len(spans), dtype=torch.float64)
        for share, part in ranks.gather((self.share, means)):
            if part:
                found[share.part :: share.parts, share.rows] = torch.stack(part)
        return list(found)

    def _read(self, choices: list[set[Head]], spans: list[tuple[int, int]]) -> Tensor:
        """Return losses (choices, B, L) float64; NaN before the first span."""
        texts, length = self.tokens.shape[0], self.tokens.shape[1] - 1
        held = {key: self._mask(layer, choices) for key, layer in self.layers.items()}
        losses = torch.full((len(choices), texts, length), torch.nan, dtype=torch.float64)
        read: list[tuple[int, int, Tensor]] = []
        state = self.at_edge.map(lambda t: t.repeat(len(choices), *[1] * (t.ndim - 1)))
        first = min(a for a, _ in spans)
        for start in range(self.start, length, self.interval):
            stop = min(start + self.interval, length)
            piece = self.tokens[:, start : stop + 1].repeat(len(choices), 1)
            hidden, state = self.lm(piece[:, :-1], self._hold(state, held), logits=False)
            if stop > first:
                read.append((start, stop, token_losses(self.lm, hidden, piece[:, 1:])))
        for start, stop, piece_losses in read:  # no piece waits for the losses of the one before
            losses[:, :, start:stop] = piece_losses.cpu().double().unflatten(0, (len(choices), texts))
        return losses

    def _mask(self, layer: LayerCoverage, choices: list[set[Head]]) -> Tensor:
        """Return which heads of a layer are held in which row, (choices * B, H)."""
        whole = Head(layer.key.layer, None)
        mask = torch.tensor(
            [[head in heads or whole in heads for head in layer.heads()] for heads in choices]
        )
        return mask.repeat_interleave(len(self.tokens), dim=0).to(self.lm.device)

    def _hold(self, state: RecurrentState, held: dict[StateKey, Tensor]) -> RecurrentState:
        tensors: dict[StateKey, Tensor] = {}
        for key, mask in held.items():
            tensor, layer = state[key], self.layers[key]
            mask = mask.to(tensor.device)  # layers may lie on several
            if self.mode == "swap":
                edge = self.at_edge[key].repeat(len(tensor) // len(self.tokens), *[1] * (tensor.ndim - 1))
                tensors[key] = choose_heads(mask, edge, tensor)
                continue
            norm = head_norms(tensor)
            low, high = layer.norm_low.to(norm), layer.norm_high.to(norm)
            factor = norm.clamp(low, high) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
            tensors[key] = scale_heads(tensor, torch.where(mask, factor, 1))
        return state.changed(tensors)


causal = state_ablation
"""The earlier name of `state_ablation`."""
