"""Padded and packed batches as documents: which tokens of a batch are one text, and which forward reads them.

A recurrence reads padding as text, and reads across the documents of a packed row. Here the real tokens of
each document become a row of their own, padded on the right only, so that convolutions, recurrences and
attention see one document each. Documents share a forward where their padding costs less than another one.
A family that cannot keep padding out of its state reads documents of one length together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longroll.errors import LongrollError
from longroll.state import RecurrentState, StateKey


class Group(NamedTuple):
    """Documents that are read in one forward; N of them, the longest of L tokens."""

    place: Tensor
    """(N, L) place of each token in the flattened batch; anything at padding."""
    lengths: Tensor | None
    """(N,) tokens of each document, on the CPU; None: L each, so that there is no padding."""
    tokens: Tensor
    """(n,) places of the tokens among the N * L of this group."""
    row: Tensor
    """(N,) row of the batch that each document is in."""
    fresh: Tensor
    """(N,) whether a document starts from zero rather than from the state of its row."""
    last: Tensor
    """Which documents are the last of their rows."""
    rows: bool
    """The documents are the rows of the batch, all of them and in their order, going on from their states."""

    def to(self, device: torch.device) -> Group:
        """Return the same on a device, its lengths excepted."""
        moved = {name: getattr(self, name).to(device) for name in ("place", "tokens", "row", "fresh", "last")}
        return self._replace(**moved)


class Documents:
    """The documents of a batch.

    Args:
        attention_mask: (B, T), 1 at real tokens and 0 at padding; None: every token is real.
        starts: (B, T), nonzero at the first token of a document; None: each row is one document.
        shape: (B, T) of the batch.
        overhead: tokens of padding that cost as much as one more forward.

    Raises:
        LongrollError: for a mask or starts of another shape, other values in the mask, and starts at padding.
    """

    def __init__(
        self,
        attention_mask: Tensor | None,
        starts: Tensor | None,
        shape: torch.Size,
        *,
        overhead: int = 0,
    ) -> None:
        self.overhead = overhead
        real = _flags("attention_mask", attention_mask, shape)
        begins = _flags("starts", starts, shape)
        self.whole = bool(real.all()) and not bool(begins.any())
        """Every row is one document without padding, which goes on from the state of its row."""
        self.rows = not bool(begins.any())
        """Every row is one document, padded or not."""
        if self.whole:
            return
        if not bool(real.any()):
            raise LongrollError("`attention_mask` marks no token as real: there is nothing to read.")
        if bool((begins & ~real).any()):
            raise LongrollError("`starts` marks padding as the first token of a document: mark real tokens.")
        row, time = real.nonzero(as_tuple=True)  # in the order of reading
        new = begins[row, time]
        first = torch.ones_like(new)  # of the tokens of a row
        first[1:] = row[1:] != row[:-1]
        heads = (new | first).nonzero().squeeze(1)
        self._batch = shape[0]
        self._place = row * shape[1] + time
        self._head = heads
        self._length = torch.diff(heads, append=torch.tensor([len(row)]))
        self._row = row[heads]
        self._fresh = new[heads]
        self._last = torch.ones(len(heads), dtype=torch.bool)
        self._last[:-1] = self._row[1:] != self._row[:-1]

    def groups(self, *, padded: bool, together: bool = True, once: bool = False) -> Iterator[Group]:
        """Return documents to read in one forward each, the longest first.

        Args:
            padded: the family keeps padding out of its state; otherwise the documents of a group have one
                length.
            together: documents that start from zero and others may share a group.
            once: make one group of all.

        Raises:
            LongrollError: for `once` where one group cannot hold all.
        """
        if once and not padded and len(set(self._length.tolist())) > 1:
            raise LongrollError(
                "This family reads documents of different lengths in several forwards, and the ranks of DDP "
                "and FSDP must make equally many: give documents of one length, or train in one process."
            )
        kinds = [torch.ones_like(self._fresh)] if together else [self._fresh, ~self._fresh]
        for kind in kinds:
            chosen = kind.nonzero().squeeze(1)
            chosen = chosen[self._length[chosen].argsort(descending=True, stable=True)]
            lengths = self._length[chosen]
            if once or (padded and self.rows):
                sizes = [len(chosen)] if len(chosen) else []
            elif padded:
                sizes = _cheapest(lengths.tolist(), self.overhead)
            else:
                sizes = torch.unique_consecutive(lengths, return_counts=True)[1].tolist()
            for documents in chosen.split(sizes):
                yield self._group(documents.sort().values)

    def _group(self, chosen: Tensor) -> Group:
        lengths = self._length[chosen]
        real = torch.arange(int(lengths.max())) < lengths[:, None]
        place = self._head[chosen, None] + torch.arange(real.shape[1])
        place = self._place[place.clamp_max(len(self._place) - 1)]
        tokens = real.flatten().nonzero().squeeze(1)
        row, fresh, last = (t[chosen] for t in (self._row, self._fresh, self._last))
        padding = lengths if len(tokens) < real.numel() else None
        rows = self.rows and len(chosen) == self._batch
        return Group(place, padding, tokens, row, fresh, last.nonzero().squeeze(1), rows)


def _cheapest(lengths: list[int], overhead: int) -> list[int]:
    """Return sizes of the groups, longest documents first, that cost least with padding and overhead
    counted; of equal costs, the largest last group.

    Each start of the last group makes the cost of `stop` documents a line in `stop`, whose slope is the
    length of its longest document. Slopes fall as starts grow, so that the lines that are lowest somewhere
    are kept in order, and all groups are found in time linear in the documents.
    """
    cost, first = 0, [0]
    lines: deque[tuple[int, int, int]] = deque()  # slope, offset, start
    for stop, slope in enumerate(lengths, start=1):
        line = slope, cost + overhead - (stop - 1) * slope, stop - 1
        if lines and lines[-1][0] == slope and line[1] < lines[-1][1]:
            lines.pop()
        if not lines or lines[-1][0] > slope:
            while len(lines) > 1 and _never_lowest(lines[-2], lines[-1], line):
                lines.pop()
            lines.append(line)
        while len(lines) > 1 and _at(lines[1], stop) < _at(lines[0], stop):
            lines.popleft()
        cost = _at(lines[0], stop)
        first.append(lines[0][2])
    sizes: list[int] = []
    stop = len(lengths)
    while stop:
        sizes.append(stop - first[stop])
        stop = first[stop]
    return sizes[::-1]


def _at(line: tuple[int, int, int], stop: int) -> int:
    return line[0] * stop + line[1]


def _never_lowest(a: tuple[int, int, int], b: tuple[int, int, int], c: tuple[int, int, int]) -> bool:
    """Return whether a line is nowhere below the lines before and after it, whose slopes enclose its own."""
    return (c[1] - a[1]) * (a[0] - b[0]) <= (b[1] - a[1]) * (a[0] - c[0])


class Results:
    """Outputs and final states of groups, put back into the places of their tokens and rows.

    Args:
        shape: (B, T) of the batch.
        state: what its rows started from; a row without tokens ends there.
    """

    def __init__(self, shape: torch.Size, state: RecurrentState | None) -> None:
        self.shape, self.state = shape, state
        self._whole = False
        self._outputs: list[tuple[Tensor, Tensor]] = []  # places in the flattened batch, and what is there
        self._finals: list[tuple[Tensor, RecurrentState]] = []  # rows, and their states
        self._routed: list[list[Tensor]] = []

    def add(self, group: Group, output: Tensor, final: RecurrentState, routed: Sequence[Tensor] = ()) -> None:
        """Take the outputs (N, L, D), final states and router logits (N * L, E a layer) of a group."""
        self._whole = group.rows
        place = group.place.flatten()[group.tokens]
        self._outputs.append((place, output.flatten(0, 1)[group.tokens]))
        self._routed.append([logits.reshape(-1, logits.shape[-1])[group.tokens] for logits in routed])
        if not group.rows:  # most launches on a GPU are made for states
            final = final.rows(group.last)
        self._finals.append((group.row[group.last], final))

    def whole(self) -> tuple[Tensor, RecurrentState]:
        """Return outputs (B, T, D), zero at padding, and the state after the last token of each row."""
        places, values = (torch.cat(t) for t in zip(*self._outputs, strict=True))
        outputs = _placed(places, values, self.shape.numel())
        rows = torch.cat([row for row, _ in self._finals])
        states = [state for _, state in self._finals]
        final = {
            key: states[0][key] if self._whole else self._final(key, rows, states)
            for key in states[0]
            if key.part != "attention"
        }
        seen = 0 if self.state is None else self.state.seen
        ragged = len(final) < len(states[0])
        return outputs.unflatten(0, self.shape), RecurrentState(
            final, seen=0 if ragged else seen + self.shape[1], ragged=ragged
        )

    @property
    def router_logits(self) -> tuple[Tensor, ...] | None:
        """Router logits (B * T, E) of each layer with experts, zero at padding; None without experts."""
        places = torch.cat([place for place, _ in self._outputs])
        layers = zip(*self._routed, strict=True)
        return tuple(_placed(places, torch.cat(layer), self.shape.numel()) for layer in layers) or None

    def _final(self, key: StateKey, rows: Tensor, states: list[RecurrentState]) -> Tensor:
        others = None if self.state is None else self.state.get(key)
        return _placed(rows, torch.cat([state[key] for state in states]), self.shape[0], others)


def _placed(index: Tensor, values: Tensor, size: int, others: Tensor | None = None) -> Tensor:
    """Return a tensor of `size` rows, `values` at `index` and those of `others` (default: zeros)
    elsewhere.
    """
    if others is None or len(index) == size:
        others = values.new_zeros(size, *values.shape[1:])
    return others.to(values.dtype).index_copy(0, index, values)


def _flags(name: str, given: Tensor | None, shape: torch.Size) -> Tensor:
    """Return (B, T) booleans on the CPU."""
    if given is None:
        return torch.full(shape, name == "attention_mask")
    if given.shape != shape:
        raise LongrollError(
            f"`{name}` has shape {tuple(given.shape)} and the tokens {tuple(shape)}: give both as (B, T)."
        )
    given = given.to("cpu")
    if name == "attention_mask" and not bool(((given == 0) | (given == 1)).all()):
        raise LongrollError(
            "`attention_mask` has values other than 1 at real tokens and 0 at padding: mark documents in "
            "`starts`."
        )
    return given != 0
