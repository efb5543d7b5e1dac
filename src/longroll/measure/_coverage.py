"""Unexplored states, measured: the states past the training length against those of training.

A model trained from the zero state at length T has learned to read the states of t <= T. For every head this
compares where the state was over (T/2, T], the end of what training visited, with where it is far past T:

- shift of the mean log norm, in standard deviations of the in-range log norm: signed, what a map shows;
- log of the ratio of the variances of the state's elements over texts;
- energy distance, which sees any difference, on the log norm and on random projections of the state.

States that never left still differ by sampling noise, so "outside" is a permutation test of the energy
distance: texts are exchanged between the two samples, whole texts at a time since the states of one text hang
together, and the p-values of all heads go through Benjamini-Hochberg.
Sources: Szekely & Rizzo 2013 (energy distance); Benjamini & Hochberg 1995.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longroll import ranks
from longroll.errors import LongrollError
from longroll.heads import has_heads, heads_of
from longroll.measure.roll_out import roll_out
from longroll.model import RecurrentLM
from longroll.state import RecurrentState, StateKey

FALSE_DISCOVERIES = 0.01
"""Share of the heads called outside that may be so by chance."""
PERMUTATIONS = 9_999
_PROJECTIONS = 8
_LEAST_STD = 1e-3  # of a log norm: a head that varies by less than 0.1 % is not thereby infinitely far out
_LARGEST = 1e30  # stands for numbers that have overflowed
_ENTRIES = 2**20  # numbers of the permutation test that exist at once


class Head(NamedTuple):
    """One head, or a whole layer (`head` None) where heads are vectors, as in Mamba-1."""

    layer: int
    head: int | None

    def __str__(self) -> str:
        return f"layer {self.layer}" if self.head is None else f"layer {self.layer} head {self.head}"


@dataclass(frozen=True)
class LayerCoverage:
    """How far the heads of one layer have left their range; a tensor each, (H,) float64."""

    key: StateKey
    """The state tensor it speaks of."""
    shift: Tensor
    """Mean far log norm minus mean in-range log norm, in in-range standard deviations."""
    log_variance_ratio: Tensor
    """log of the variance of the elements over texts, far over in range."""
    energy: Tensor
    """Energy distance, in in-range standard deviations: 0 for the same distribution."""
    p: Tensor
    """The p-value of the permutation test."""
    outside: Tensor
    """Whether the difference is more than sampling noise, all heads of the model considered."""
    norm_low: Tensor
    """Smallest in-range norm."""
    norm_high: Tensor
    """Largest in-range norm."""
    vectors: bool
    """Heads are vectors: the one entry is of the layer."""

    def heads(self) -> list[Head]:
        """Return names of the entries."""
        return [Head(self.key.layer, None if self.vectors else i) for i in range(len(self.shift))]


@dataclass(frozen=True)
class Coverage:
    """What `coverage` found, layer by layer."""

    layers: list[LayerCoverage]
    in_range: list[int]
    """Positions of the in-range states."""
    far: list[int]
    """Positions of the far states."""

    def ranking(self, *, outside_only: bool = True) -> list[Head]:
        """Return heads by how far they are out, the largest energy distance first."""
        rows = [
            (layer.energy[i].item(), head)
            for layer in self.layers
            for i, head in enumerate(layer.heads())
            if layer.outside[i] or not outside_only
        ]
        return [head for _, head in sorted(rows, key=lambda row: -row[0])]

    def to_json(self) -> dict[str, Any]:
        """Return plain data for results: for each layer a list of its heads."""
        table = {
            name: [getattr(layer, attribute).tolist() for layer in self.layers]
            for name, attribute in (
                ("map", "shift"),
                ("significant", "outside"),
                ("log_variance_ratio", "log_variance_ratio"),
                ("energy", "energy"),
                ("p", "p"),
            )
        }
        return {
            "layers": [layer.key.layer for layer in self.layers],
            **table,
            "in_range": self.in_range,
            "far": self.far,
            "false_discoveries": FALSE_DISCOVERIES,
            "ranking": [str(head) for head in self.ranking()],
            "causal": [],
        }


def in_range_positions(train_length: int) -> list[int]:
    """Return four positions over (T/2, T], T among them."""
    return sorted({max(1, train_length * i // 8) for i in (5, 6, 7, 8)})


def far_positions(length: int, train_length: int) -> list[int]:
    """Return four positions over the last octave (L/2, L] past the training length."""
    return sorted({max(train_length + 1, length * i // 8) for i in (5, 6, 7, 8)})


class CoverageRecorder:
    """Takes in-range and far states as a roll-out comes by (its `watch`), in memory independent of it.

    Args:
        in_range: positions whose states training has visited.
        far: positions past the training length.
        seed: random seed of the projections and permutations.
    """

    def __init__(self, in_range: Sequence[int], far: Sequence[int], *, seed: int = 0) -> None:
        self.in_range, self.far, self.seed = sorted(set(in_range)), sorted(set(far)), seed
        self.stops = [*self.in_range, *self.far]
        self._samples: dict[StateKey, _Samples] = {}

    def __call__(self, position: int, state: RecurrentState) -> None:
        """Note the state after `position` tokens, if it is one asked for."""
        if position not in self.stops:
            return
        for key in sorted(state):
            if key.part == "recurrent":
                if key not in self._samples:
                    self._samples[key] = _Samples(state[key], self.seed + len(self._samples))
                self._samples[key].add(state[key], far=position in self.far)

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen so far."""
        return {str(key): samples.state_dict() for key, samples in self._samples.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was seen before."""
        self._samples = {StateKey.parse(key): _Samples.of(held) for key, held in state.items()}

    def over_ranks(self) -> None:
        """Take on rank 0 what the recorders of all ranks saw for seen there; every rank must call this."""
        if ranks.alone():
            return
        keys = next(keys for keys in ranks.gather(list(self._samples)) if keys)
        for key in keys:  # one after another: they are as large as the states
            mine = self._samples.pop(key, None)
            parts = [part for part in ranks.gather(mine) if part]
            if mine and ranks.rank() == 0:
                self._samples[key] = mine.of_all(parts)

    def coverage(self, *, progress: Callable[[int, int], None] | None = None) -> Coverage:
        """Compare what was seen.

        Args:
            progress: called with how many state tensors are compared, and how many there are.

        Raises:
            LongrollError: for fewer than 4 texts, and when in-range or far states were not seen.
        """
        generator = torch.Generator().manual_seed(self.seed)
        layers = []
        for key, samples in self._samples.items():
            layers.append(samples.compare(key, generator))
            if progress is not None:
                progress(len(layers), len(self._samples))
        if not layers:
            raise LongrollError("No recurrent state was seen at the positions to be compared.")
        outside = _benjamini_hochberg(torch.cat([layer.p for layer in layers]))
        parts = outside.split([len(layer.p) for layer in layers])
        layers = [
            LayerCoverage(**{**layer.__dict__, "outside": part})
            for layer, part in zip(layers, parts, strict=True)
        ]
        return Coverage(layers, self.in_range, self.far)


def coverage(
    lm: RecurrentLM,
    tokens: Tensor,
    train_length: int | None = None,
    positions: Sequence[int] | None = None,
    *,
    chunk_size: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Coverage:
    """Compare the states past the training length with those of training, head by head.

    Args:
        lm: the model.
        tokens: (B, L), B >= 4 texts from their beginnings. Exchanging 4 tells next to nothing; 8 find what
            most heads do, 16 a single head among a thousand.
        train_length: T; default: what the model's config says.
        positions: where the far states are taken, all > T; default: four over the last octave of L.
        chunk_size: tokens of a row in one forward.
        seed: random seed of the projections and permutations.
        progress: called with how many positions of each row are done.

    Raises:
        LongrollError: for a model without recurrent state, an unknown training length, positions not past
            it or outside the text, and too few texts.
    """
    train_length = train_length or lm.train_length
    if not lm.family.recurrent:
        raise LongrollError(f"{lm.name} has no recurrent state to compare.")
    if train_length is None:
        raise LongrollError("The model does not say at which length it was trained: give `train_length`.")
    length = tokens.shape[1]
    far = list(positions) if positions is not None else far_positions(length, train_length)
    if not far or min(far) <= train_length or max(far) > length:
        raise LongrollError(
            f"far positions must lie past the training length {train_length} in the {length} tokens given."
        )
    recorder = CoverageRecorder(in_range_positions(train_length), far, seed=seed)
    for chunk in roll_out(lm, tokens[:, : max(far)], chunk_size=chunk_size, stops=recorder.stops):
        stop = chunk.start + chunk.hidden.shape[1]
        recorder(stop, chunk.state)
        if progress is not None:
            progress(stop)
    return recorder.coverage()


class _Samples:
    """In-range and far states of one layer, as features and running moments."""

    def __init__(self, like: Tensor, seed: int) -> None:
        self.vectors = not has_heads(like)
        size = heads_of(like)[0, 0].numel()
        directions = torch.randn(_PROJECTIONS, size, generator=torch.Generator().manual_seed(seed))
        self.directions = (directions / size**0.5).to(like.device, torch.float64)
        self.features: dict[bool, list[Tensor]] = {False: [], True: []}  # each (B, H, 1 + projections)
        self.moments = {False: _Moments(), True: _Moments()}

    def state_dict(self) -> dict[str, Any]:
        moments = {far: vars(moments) for far, moments in self.moments.items()}
        return vars(self) | {"moments": moments}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> _Samples:
        """Return those that had this `state_dict`."""
        found = cls.__new__(cls)
        vars(found).update(state)
        found.moments = {far: _Moments() for far in state["moments"]}
        for far, moments in found.moments.items():
            vars(moments).update(state["moments"][far])
        return found

    def of_all(self, parts: Sequence[_Samples]) -> _Samples:
        """Return those of all rows from those of parts of the rows, compared on the device of these here."""
        found = copy.copy(self)
        found.features = {
            far: [torch.cat(rows) for rows in zip(*(part.features[far] for part in parts), strict=True)]
            for far in (False, True)
        }
        found.moments = {far: _Moments() for far in (False, True)}
        for part in parts:
            for far, moments in part.moments.items():
                found.moments[far].merge(moments)
        return found

    def add(self, tensor: Tensor, *, far: bool) -> None:
        heads = torch.nan_to_num(heads_of(tensor.double()).flatten(2), _LARGEST, _LARGEST, -_LARGEST)
        log_norm = heads.norm(dim=2, keepdim=True).clamp_min(1 / _LARGEST).log()
        self.features[far].append(torch.cat([log_norm, heads @ self.directions.T], dim=2))
        self.moments[far].add(heads)

    def compare(self, key: StateKey, generator: torch.Generator) -> LayerCoverage:
        if not self.features[False] or not self.features[True]:
            raise LongrollError("Both in-range and far states must be seen: positions past the text?")
        # (B, H, k, F); what was seen lies where the states are, since nothing may wait for a GPU
        near, far = (torch.stack(self.features[which], dim=2).cpu() for which in (False, True))
        if near.shape[0] < 4:
            raise LongrollError(f"{near.shape[0]} texts are too few to compare states: give at least 4.")
        near, far = near.transpose(0, 1).contiguous(), far.transpose(0, 1).contiguous()  # (H, B, k, F)
        norms = near[..., 0].flatten(1)
        std = norms.std(dim=1).clamp_min(_LEAST_STD)
        variance = {which: moments.variance() for which, moments in self.moments.items()}
        device = self.directions.device
        energy, p = (t.cpu() for t in _energy_test(near.to(device), far.to(device), generator))
        return LayerCoverage(
            key=key,
            shift=(far[..., 0].flatten(1).mean(dim=1) - norms.mean(dim=1)) / std,
            log_variance_ratio=(variance[True].clamp_min(1e-300) / variance[False].clamp_min(1e-300)).log(),
            energy=energy,
            p=p,
            outside=torch.zeros_like(p, dtype=torch.bool),
            norm_low=norms.amin(dim=1).exp(),
            norm_high=norms.amax(dim=1).exp(),
            vectors=self.vectors,
        )


class _Moments:
    """Variance of the numbers of a head over texts and positions, by streamed moments.

    The mean of every number is kept, in float32, and a head's sum of squares about it. Source: Chan, Golub
    and LeVeque 1983 (Welford 1962, in batches).
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        mean = rows.mean(dim=0)
        self._add(len(rows), mean, (rows - mean).square().sum(dim=(0, 2)))

    def merge(self, other: _Moments) -> None:
        if isinstance(other.mean, Tensor) and isinstance(other.squares, Tensor):
            self._add(other.count, other.mean, other.squares)

    def _add(self, added: int, mean: Tensor, within: Tensor) -> None:
        count = self.count + added
        away = mean - self.mean
        self.squares = self.squares + within + away.square().sum(dim=1) * (self.count * added / count)
        self.mean = (self.mean + away * (added / count)).float()
        self.numbers, self.count = mean.shape[1], count

    def variance(self) -> Tensor:
        """Return mean variance of a head's numbers, (H,) float64."""
        assert isinstance(self.squares, Tensor)
        return (self.squares / (self.count * self.numbers)).cpu()


def _energy_test(near: Tensor, far: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return energy distances (H,) between (H, B, k, F) and (H, B, k', F), and their permutation p-values.

    The metric is |difference of log norms| + mean |difference of projections|, each in in-range standard
    deviations. With weights w = 1/B for a text in range and -1/B for a far one, the energy distance is
    -w' D w, D the mean distance between the states of two texts: a permutation of texts permutes w.
    """
    texts, features = near.shape[1], near.shape[3]
    flat = near.flatten(1, 2)
    least = _LEAST_STD * flat.square().mean(dim=1).sqrt()
    least[:, 0] = _LEAST_STD  # the log norm has no scale of its own
    scale = torch.maximum(flat.std(dim=1), least).clamp_min(1 / _LARGEST)[:, None, None]
    share = near.new_tensor([1.0] + [1 / (features - 1)] * (features - 1))
    near, far = near * (share / scale), far * (share / scale)
    between = _distances(near, far)  # (H, 2B, 2B)
    weight = near.new_tensor([1.0] * texts + [-1.0] * texts) / texts
    observed = -(weight @ between @ weight)
    chosen = torch.rand(PERMUTATIONS, 2 * texts, generator=generator).argsort(dim=1)
    weights = weight[chosen.to(weight.device)]
    step = max(1, _ENTRIES // weights.numel())
    p = [
        _p_value(-((weights @ some) * weights).sum(-1), seen, texts)
        for some, seen in zip(between.split(step), observed.split(step), strict=True)
    ]
    return observed.clamp_min(0), torch.cat(p)


def _p_value(null: Tensor, observed: Tensor, texts: int) -> Tensor:
    """Share of the null (heads, R) as large as what was observed (heads,).

    Where fewer than 10 are, the tail of the gamma distribution with the null's mean, variance and skewness
    tells more: a single head of a thousand needs a p of 1e-5 to be found. It is never taken below what all
    exchanges of the texts could tell. Source: Knijnenburg et al. 2009; Minas & Montana 2014.
    """
    # equal up to rounding counts as as large
    at_least = (null >= (observed - 1e-9 * observed.abs())[:, None]).sum(dim=1)
    p = (at_least.double() + 1) / (null.shape[1] + 1)
    centred = null - null.mean(dim=1, keepdim=True)
    std = centred.square().mean(dim=1).sqrt().clamp_min(1e-300)
    skewness = (centred / std[:, None]).pow(3).mean(dim=1).clamp_min(1e-3)
    shape = 4 / skewness.square()
    at = shape + (observed - null.mean(dim=1)) / std * shape.sqrt()
    tail = torch.special.gammaincc(shape, at.clamp_min(0)).clamp_min(2 / math.comb(2 * texts, texts))
    return torch.where(at_least < 10, torch.minimum(p, tail), p)


def _distances(near: Tensor, far: Tensor) -> Tensor:
    """Return mean city-block distances between the states of two texts, in range and far: (H, 2B, 2B)."""
    texts = near.shape[1]
    step = max(1, _ENTRIES // (texts * (near.shape[2] + far.shape[2])) ** 2)

    def mean(a: Tensor, b: Tensor) -> Tensor:
        pairs = torch.cdist(a.flatten(1, 2), b.flatten(1, 2), p=1.0)
        return pairs.view(len(a), texts, a.shape[2], texts, b.shape[2]).mean(dim=(2, 4))

    parts = []
    for a, b in zip(near.split(step), far.split(step), strict=True):
        across = mean(a, b)
        within = mean(a, a), mean(b, b)
        parts.append(torch.cat([torch.cat([within[0], across], 2), torch.cat([across.mT, within[1]], 2)], 1))
    return torch.cat(parts)


def _benjamini_hochberg(p: Tensor) -> Tensor:
    """Return which hypotheses to reject at the rate `FALSE_DISCOVERIES`."""
    ordered, order = p.sort()
    line = FALSE_DISCOVERIES * torch.arange(1, len(p) + 1) / len(p)
    below = (ordered <= line).nonzero()
    rejected = torch.zeros_like(p, dtype=torch.bool)
    if len(below):
        rejected[order[: int(below[-1]) + 1]] = True
    return rejected
