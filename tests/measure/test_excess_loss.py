"""Probes share restarts: what each compares is read afresh, at ages from half of T to T, once each."""

import pytest
import torch

import zoo
from longroll.measure import position_loss
from longroll.measure._position_loss import log_spaced
from longroll.measure.excess_loss import excess_loss, window_starts


@pytest.mark.parametrize("train_length", [2, 3, 16, 17, 2048])
@pytest.mark.parametrize("times", [2, 3.3, 8, 128])
def test_windows_cover_every_probe(train_length, times):
    length, size = int(times * train_length), train_length - train_length // 2
    ends = [end for end in log_spaced(length, 6) if end > train_length]
    starts = window_starts(ends, train_length)
    assert starts == sorted(starts) and starts[0] >= 0 and starts[-1] + train_length <= length
    ages = {}
    for start in starts:
        ages |= {start + age: age for age in range(train_length - size, train_length)}
    for end in ends:
        compared = [ages[token] for token in range(end - size, end)]
        assert min(compared) >= train_length // 2 and max(compared) < train_length
    apart = [e for i, e in enumerate(ends) if all(abs(e - other) >= size for other in ends if other != e)]
    assert {end - train_length for end in apart} <= set(starts)
    if train_length > 3:
        assert len(starts) * train_length <= 2 * length


def test_restarted_losses_are_those_of_each_window_alone():
    """Against one forward a token: the token's loss, read from its window's start."""
    lm, tokens, trained = zoo.lm_of("mamba2"), zoo.tokens(3, 101), 12
    carried = position_loss(lm, tokens)
    done = []
    ends, excess = excess_loss(lm, tokens, carried, trained, progress=lambda *counts: done.append(counts))
    starts = window_starts(ends, trained)
    fresh = {}
    for start in starts:
        losses = position_loss(lm, tokens[:, start : start + trained + 1]).losses
        fresh |= {start + age: losses[:, age] for age in range(trained // 2, trained)}
    for column, end in enumerate(ends):
        window = range(end - (trained - trained // 2), end)
        expected = torch.stack([carried.losses[:, t] - fresh[t] for t in window]).mean(0)
        torch.testing.assert_close(excess[:, column], expected, atol=1e-5, rtol=1e-5)
    assert done[-1] == (len(starts), len(starts))
