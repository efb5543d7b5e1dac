"""The paper's experiment on the official checkpoints of Mamba: the models, what a run takes and found."""

from longroll.reproduce.checkpoints import (
    ARMS,
    CHECKPOINTS,
    PAPER,
    Checkpoint,
    check_present,
    find_checkpoints,
)
from longroll.reproduce.plan import Machine, Need, Work, fit, needs
from longroll.reproduce.summary import Row, rows_of, write_index

__all__ = [
    "ARMS",
    "CHECKPOINTS",
    "PAPER",
    "Checkpoint",
    "Machine",
    "Need",
    "Row",
    "Work",
    "check_present",
    "find_checkpoints",
    "fit",
    "needs",
    "rows_of",
    "write_index",
]
