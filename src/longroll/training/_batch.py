"""What a batch says: which tokens are read, which are targets, where padding is, where documents begin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longroll.errors import LongrollError

IGNORED = -100  # the target that cross-entropy leaves out

_CU_SEQ_LENS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seq_lens", "cu_seqlens")
KNOWN = frozenset(
    [
        *("input_ids", "labels", "shift_labels", "attention_mask", "starts", "position_ids", "seq_idx"),
        *_CU_SEQ_LENS,
        *("max_length_q", "max_length_k"),  # these follow from cu_seq_lens
    ]
)
"""The keys of a batch that the loss reads; any other is refused by name."""

DROPPED = frozenset(
    [
        *("id", "ids", "idx", "index", "length", "token_count", "timestamp", "__index_level_0__"),
        *("token_type_ids", "special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping"),
    ]
)
"""Columns that no forward takes: dropped with one notice, as are those of text and nested data."""


class Rows(NamedTuple):
    """A batch of B rows of T tokens, as `RecurrentLM` reads it."""

    input_ids: Tensor
    """(B, T) token ids."""
    targets: Tensor
    """(B, T) the token after each input; -100 is ignored."""
    attention_mask: Tensor | None
    """(B, T) true at real tokens; None: every token is real."""
    starts: Tensor | None
    """(B, T) true at the first token of each document but a row's first; None: each row is one document."""


def read_batch(inputs: Mapping[str, Any], *, strict: bool = True) -> Rows:
    """Read a batch of any collator.

    Where documents begin is read from `starts` (B, T), `position_ids` that start again at 0, `cu_seq_lens*`
    or `seq_idx`. The first document of a row goes on from the state that the intervention chose; the others
    start from zero. Neither padding nor the first token of a document that starts from zero is a target.

    Args:
        inputs: `input_ids` (B, T); `labels` (B, T), aligned with the inputs, or `shift_labels` (B, T), the
            token after each input.
        strict: refuse keys that the loss does not read, and batches without targets; else these are a host
            trainer's own affair.

    Raises:
        LongrollError: for an unknown key, a batch without tokens or targets, a mask of another shape, and
            boundaries that contradict each other.
    """
    if strict and (unknown := sorted(set(inputs) - KNOWN)):
        raise LongrollError(
            f"The batch has {', '.join(f'`{key}`' for key in unknown)}, which the loss does not read: remove "
            f"the key in the collator or the column of the data. Known keys: {', '.join(sorted(KNOWN))}."
        )
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise LongrollError("The batch has no `input_ids` (B, T): give rows of token ids.")
    if ids.shape[1] == 0:
        raise LongrollError("The rows of a batch have no tokens in `input_ids`: leave such rows out.")
    mask = _mask(inputs, ids)
    starts = _starts(inputs, ids, mask)
    if not strict and inputs.get("labels") is None and inputs.get("shift_labels") is None:
        return Rows(ids, torch.full_like(ids, IGNORED), mask, starts)
    return Rows(ids, _targets(inputs, ids, mask, starts), mask, starts)


def row_starts(inputs: Mapping[str, Any]) -> Tensor | None:
    """Return (B,) whether each row begins a document, from `starts` (B,) or (B, T); None where nothing says
    so.
    """
    starts: Tensor | None = inputs.get("starts")
    if starts is None or starts.ndim == 1:
        return starts
    first = _first_real(starts, _mask(inputs, starts))
    return (starts.bool() & first).any(dim=1)


def _mask(inputs: Mapping[str, Any], ids: Tensor) -> Tensor | None:
    """Return (B, T) true at real tokens; None where all are."""
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None:
        if mask.shape != ids.shape:
            raise LongrollError(
                f"`attention_mask` has shape {tuple(mask.shape)} and `input_ids` {tuple(ids.shape)}: give "
                "one flag for each token, 1 at real tokens and 0 at padding."
            )
        if bool((mask == 1).all()):
            return None
        if bool((mask < 0).any()) or (mask.is_floating_point() and bool((mask > 1).any())):
            raise LongrollError(
                "`attention_mask` looks like an additive mask: give 1 at real tokens and 0 at padding."
            )
        mask = mask != 0
    elif (index := inputs.get("seq_idx")) is not None:  # as in causal-conv1d
        mask = _each("seq_idx", index, ids) >= 0
    elif positions is not None and not any(
        inputs.get(name) is not None for name in _CU_SEQ_LENS
    ):  # padding-free collators pad a row's end with positions 0
        tail = (_each("position_ids", positions, ids) == 0).flip(1).cumprod(1).flip(1)
        mask = (tail == 0) | (tail.sum(1, keepdim=True) < 2)  # one zero is a document of one token
        mask[:, 0] = True
    return None if mask is None or bool(mask.all()) else mask


def _starts(inputs: Mapping[str, Any], ids: Tensor, mask: Tensor | None) -> Tensor | None:
    """Return (B, T) true where a document begins behind another one in its row; None where none does."""
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    behind = real & ~_first_real(ids, mask)
    found: Tensor | None = None
    for name, flags in _marks(inputs, ids, real):
        flags = flags & behind
        if found is not None and not torch.equal(flags, found):
            raise LongrollError(
                f"`{name}` contradicts the other keys that say where documents begin: give one."
            )
        found = flags
    return found if found is not None and bool(found.any()) else None


def _marks(inputs: Mapping[str, Any], ids: Tensor, real: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Return the keys that say where documents begin, each with (B, T) true there."""
    if (starts := inputs.get("starts")) is not None and starts.ndim > 1:
        yield "starts", _each("starts", starts, ids) != 0
    if (mask := inputs.get("attention_mask")) is not None and bool((mask > 1).any()):
        yield "attention_mask", F.pad(mask.diff() != 0, (1, 0), value=False)
    if (positions := inputs.get("position_ids")) is not None:
        positions = _each("position_ids", positions, ids)
        zero = positions == 0
        if not bool((zero | ~real | F.pad(positions.diff() == 1, (1, 0), value=False)).all()):
            raise LongrollError(
                "`position_ids` neither count on by 1 nor start again at 0: leave them out, or let them mark "
                "the documents of packed rows."
            )
        yield "position_ids", zero
    if (index := inputs.get("seq_idx")) is not None:
        yield "seq_idx", F.pad(_each("seq_idx", index, ids).diff() != 0, (1, 0), value=False)
    for name in _CU_SEQ_LENS:
        if inputs.get(name) is not None:
            yield name, _cumulative(name, inputs[name], ids)


def _each(name: str, given: Tensor, ids: Tensor) -> Tensor:
    """Return a number for each token, (B, T)."""
    given = given.unsqueeze(0) if given.ndim == 1 else given
    if given.ndim != 2 or given.shape[1] != ids.shape[1] or len(given) not in (1, len(ids)):
        raise LongrollError(
            f"`{name}` has shape {tuple(given.shape)} and `input_ids` {tuple(ids.shape)}: give one "
            "number for each token."
        )
    return given.expand(ids.shape)


def _cumulative(name: str, lengths: Tensor, ids: Tensor) -> Tensor:
    ends = lengths.flatten().tolist()
    if len(ids) != 1 or ends != sorted(ends) or [ends[0], ends[-1]] != [0, ids.shape[1]]:
        raise LongrollError(
            f"`{name}` must rise from 0 to {ids.shape[1]}, the tokens of the only row of its batch; it is "
            f"{ends[:4]} ... {ends[-1]} for {len(ids)} rows."
        )
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[0, ends[:-1]] = True
    return starts


def _first_real(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return (B, T) true at the first real token of each row."""
    if mask is None:
        return (torch.arange(ids.shape[1], device=ids.device) == 0).expand(ids.shape)
    return mask & (mask.cumsum(1) == 1)


def _targets(inputs: Mapping[str, Any], ids: Tensor, mask: Tensor | None, starts: Tensor | None) -> Tensor:
    targets, labels = inputs.get("shift_labels"), inputs.get("labels")
    real = mask
    if targets is None:
        if labels is None:
            raise LongrollError(
                "The batch has no `labels` or `shift_labels` (B, T): there is nothing to predict."
            )
        targets = _next(labels, IGNORED)
        real = None if mask is None else mask & _next(mask, False)
    if targets.shape != ids.shape:
        raise LongrollError(
            f"The labels have shape {tuple(targets.shape)} and `input_ids` {tuple(ids.shape)}: give one a "
            "token."
        )
    if real is not None:
        targets = targets.masked_fill(~real, IGNORED)
    return targets if starts is None else targets.masked_fill(_next(starts, False), IGNORED)


def aligned(targets: Tensor) -> Tensor:
    """Return `labels` (B, T) of Trainer's convention from `shift_labels`: aligned with inputs, the first
    -100.
    """
    return F.pad(targets[:, :-1], (1, 0), value=IGNORED)


def _next(values: Tensor, last: int | bool) -> Tensor:
    return F.pad(values[:, 1:], (0, 1), value=last)
