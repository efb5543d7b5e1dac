"""Means over sequences with bootstrap intervals."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 1000
LEVEL = 0.95
_COLUMNS = 1024  # at a time, to keep memory constant in the number of positions


def bootstrap_mean(values: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over rows of `values` (B, L) and the ends of its 95 % percentile interval, (L,) float64 each.

    Rows (sequences) are drawn with replacement, 1,000 times, the same draws for every column. One row gives
    an interval of no width, which says nothing. Source: Efron & Tibshirani 1993, chapter 13.
    """
    rows = values.shape[0]
    draws = np.random.default_rng(seed).multinomial(rows, [1 / rows] * rows, size=RESAMPLES)
    weights = torch.from_numpy(draws / rows)
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    intervals = [
        torch.quantile(weights @ columns.double(), ends, dim=0) for columns in values.split(_COLUMNS, dim=1)
    ]
    low, high = torch.cat(intervals, dim=1)
    return values.double().mean(dim=0), low, high
