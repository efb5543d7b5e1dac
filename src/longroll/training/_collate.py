"""From rows of a data set to a batch: columns that no forward takes are dropped, ragged rows are padded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longroll.errors import LongrollError
from longroll.training._batch import DROPPED, IGNORED, aligned

logger = logging.getLogger("longroll")

_FILLS = {"labels": IGNORED, "shift_labels": IGNORED, "attention_mask": 0, "starts": 0}


class Collator:
    """Make batches of rows: `input_ids` (T,), and what `_batch.KNOWN` lists.

    Rows of one length are stacked. Rows of several lengths are padded on the tokenizer's side with an
    `attention_mask`, labels with -100. A row without labels has its `input_ids` as labels. `labels` made of
    `shift_labels` are those of Trainer's convention: aligned with the inputs, the first of each row -100.

    Args:
        tokenizer: pads; None: rows of several lengths are refused.
        inner: the user's own collator, which then stacks and pads in the place of the above.
        drop: leave out columns that no forward takes (`_batch.DROPPED`, text and nested data), with one
            notice.

    Raises:
        LongrollError: when called with rows without `input_ids`, or with ragged ones that nothing can pad.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        inner: Callable[[list[Mapping[str, Any]]], Mapping[str, Any]] | None = None,
        *,
        drop: bool = True,
    ) -> None:
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.inner, self.drop = inner, drop
        self._said: set[str] = set()

    def __call__(self, items: list[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return a batch (B, T) of B rows."""
        rows = [self._kept(item) for item in items]
        batch = self._stacked(rows) if self.inner is None else dict(self.inner(rows))
        if "shift_labels" in batch and "labels" not in batch:
            batch["labels"] = aligned(batch["shift_labels"])
        return batch

    def _kept(self, item: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self.drop:
            return item
        dropped = [name for name, value in item.items() if name in DROPPED or not _numeric(value)]
        if new := sorted(set(dropped) - self._said):
            self._said.update(new)
            logger.warning("columns that no forward takes are dropped: %s", ", ".join(new))
        return {name: value for name, value in item.items() if name not in dropped}

    def _stacked(self, rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        if "input_ids" not in rows[0]:
            raise LongrollError(
                f"The rows have no `input_ids` but {', '.join(rows[0]) or 'nothing'}: tokenise them first."
            )
        if other := next((row for row in rows if row.keys() != rows[0].keys()), None):
            raise LongrollError(
                f"One row of a batch has {', '.join(sorted(rows[0]))}, another "
                f"{', '.join(sorted(other))}: give every row the same columns."
            )
        columns = {name: [_tensor(name, row[name]) for row in rows] for name in rows[0]}
        if "labels" not in columns and "shift_labels" not in columns:
            columns["labels"] = columns["input_ids"]
        lengths = [len(ids) for ids in columns["input_ids"]]
        if len(set(lengths)) == 1:
            return {name: torch.stack(values) for name, values in columns.items()}
        if self.tokenizer is None:
            raise LongrollError(
                f"The rows of a batch have {min(lengths)} to {max(lengths)} tokens: pass "
                "processing_class=tokenizer, which pads them, or rows of one length."
            )
        columns.setdefault("attention_mask", [torch.ones_like(ids) for ids in columns["input_ids"]])
        return {name: self._padded(name, values, lengths) for name, values in columns.items()}

    def _padded(self, name: str, values: list[Tensor], lengths: list[int]) -> Tensor:
        if values[0].ndim == 0:
            return torch.stack(values)
        if (found := [len(value) for value in values]) != lengths:
            raise LongrollError(
                f"The rows of a batch have {lengths} tokens and `{name}` of {found}: "
                "give one number for each token."
            )
        if name not in _FILLS and name != "input_ids":
            raise LongrollError(
                f"The rows of a batch have {min(lengths)} to {max(lengths)} tokens and `{name}`, which "
                "cannot be padded: drop the column."
            )
        fill = _FILLS.get(name, self._pad_id())
        left = getattr(self.tokenizer, "padding_side", "right") == "left"
        return torch.nn.utils.rnn.pad_sequence(
            values, batch_first=True, padding_value=fill, padding_side="left" if left else "right"
        )

    def _pad_id(self) -> int:
        """Any id will do: the mask keeps it out."""
        return next(
            (i for n in ("pad_token_id", "eos_token_id") if (i := getattr(self.tokenizer, n, None))), 0
        )


def _tensor(name: str, value: Any) -> Tensor:
    """Return a column of a row; token ids of any integers, and of no token at all, as an embedding takes
    them.
    """
    tensor = torch.as_tensor(value)
    ids = name in ("input_ids", "labels", "shift_labels")
    return tensor.long() if ids and (tensor.numel() == 0 or not tensor.is_floating_point()) else tensor


def _numeric(value: Any) -> bool:
    """Return whether a forward could take a value: numbers, however deep."""
    if isinstance(value, Tensor):
        return True
    if isinstance(value, str | bytes | Mapping) or value is None:
        return False
    try:
        return np.asarray(value).dtype.kind in "biuf"
    except ValueError:  # lists of several lengths
        return True
