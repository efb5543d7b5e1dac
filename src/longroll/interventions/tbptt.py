"""TBPTT: start from the final state of the text just before, without its gradient (paper, section 3.2)."""

from __future__ import annotations

import torch

from longroll.errors import LongrollError
from longroll.interventions._base import Batch, fit_rows
from longroll.interventions.state_passing import StatePassing
from longroll.state import RecurrentState


class TBPTT(StatePassing):
    """Row b of batch i goes on in the text of row b of batch i - 1, with its state.

    Needs document-contiguous data (`longroll.data.Lanes`): a batch's `starts` (B,) marks the rows that begin
    a document, and these start from zero.
    """

    name = "tbptt"

    def _choose(self, batch: Batch, rows: int) -> RecurrentState | None:
        if isinstance(batch, torch.Tensor) or "starts" not in batch:
            raise LongrollError(
                "TBPTT needs to know where documents start: give it batches with `starts` (B,), as "
                "longroll.data.Lanes makes them."
            )
        if self.passed is None:
            return None
        return fit_rows(self.passed, rows).where(~batch["starts"].bool())

    def _learn(self, final_state: RecurrentState) -> None:
        self.passed = final_state  # of every row: the text has moved on, so an older state is of no use
