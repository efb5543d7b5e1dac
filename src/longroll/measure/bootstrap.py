"""Means over sequences with bootstrap intervals."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 1000
LEVEL = 0.95
_ENDS = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
_COLUMNS = 1024  # at a time, to keep memory constant in the number of positions


def bootstrap_mean(
    values: Tensor, *, seed: int = 0, counted: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean over rows of `values` (B, L) and the ends of its 95 % percentile interval, (L,) float64
    each.

    Rows (sequences) are drawn with replacement, 1,000 times, the same draws for every column. One row gives
    an interval of no width, which says nothing. Source: Efron & Tibshirani 1993, chapter 13.

    Args:
        values: (B, L).
        seed: seed of the draws.
        counted: (B, L), false at values that do not exist; None: all exist. A column without any is NaN.
    """
    if counted is not None:
        return _of_counted(values.double().where(counted, 0), counted.double(), seed)
    weights = _weights(values.shape[0], seed)
    intervals = [
        torch.quantile(weights @ columns.double(), _ENDS, dim=0) for columns in values.split(_COLUMNS, dim=1)
    ]
    low, high = torch.cat(intervals, dim=1)
    return values.double().mean(dim=0), low, high


def bootstrap_ratio(values: Tensor, whole: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean over rows of `values` (B, L) over that of `whole` (B,), and its 95 % interval, (L,)
    float64 each.

    Rows are drawn together, so that a share is paired with what it is a share of.
    """
    values, whole = values.double(), whole.double()
    weights = _weights(values.shape[0], seed)
    drawn = (weights @ values) / (weights @ whole)[:, None]
    low, high = torch.quantile(drawn, _ENDS, dim=0)
    return values.mean(dim=0) / whole.mean(), low, high


def _of_counted(values: Tensor, counted: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return means of what exists in each draw; a draw in which nothing exists is left out."""
    weights = _weights(values.shape[0], seed)
    intervals = [
        torch.nanquantile((weights @ some) / (weights @ exist), _ENDS, dim=0)
        for some, exist in zip(values.split(_COLUMNS, dim=1), counted.split(_COLUMNS, dim=1), strict=True)
    ]
    low, high = torch.cat(intervals, dim=1)
    return values.sum(dim=0) / counted.sum(dim=0), low, high


def _weights(rows: int, seed: int) -> Tensor:
    """Share of each row in each draw, (draws, rows)."""
    draws = np.random.default_rng(seed).multinomial(rows, [1 / rows] * rows, size=RESAMPLES)
    return torch.from_numpy(draws / rows)
