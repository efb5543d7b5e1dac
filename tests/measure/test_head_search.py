"""Group testing finds any guilty stretch of heads exactly, in few trials; a budget is kept."""

import math
import random

import pytest
import torch

from longroll.measure._budget import excerpt
from longroll.measure._head_search import smallest_group
from longroll.measure._position_loss import log_spaced


@pytest.mark.parametrize("heads", [1, 2, 3, 7, 100, 3712])
@pytest.mark.parametrize("guilty", [1, 2, 5])
def test_the_smallest_group_is_found(heads, guilty):
    generator = random.Random(heads * guilty)
    for _ in range(100):
        bad = set(generator.sample(range(heads), min(guilty, heads)))
        trials = []

        def carries(group, bad=bad, trials=trials):
            trials.append(group)
            return bad <= set(group)

        assert smallest_group(range(heads), carries, 10**6) == list(range(min(bad), max(bad) + 1))
        assert len(trials) <= 5 * math.log2(heads) + 5


@pytest.mark.parametrize("trials", range(1, 14))
def test_no_more_trials_are_made_than_allowed(trials):
    made = []

    def carries(group):
        made.append(group)
        return 300 in group

    found = smallest_group(range(1000), carries, trials)
    assert len(made) <= trials and 300 in found


def test_nobody_is_blamed_where_no_head_is_guilty():
    assert smallest_group(range(9), lambda group: False, 20) is None


@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize("times", [2, 4, 8, 128])
@pytest.mark.parametrize("trials", [3, 14, 56])
def test_an_excerpt_keeps_to_its_share(rows, times, trials):
    train_length, share = 1024, 4.0
    measured = times * train_length
    ends = [end for end in log_spaced(measured, 6) if end > train_length]
    even = torch.full((rows, len(ends)), 2.0)
    found = excerpt(ends, even, train_length, measured, trials=trials, share=share)
    read = found.trials * found.rows * (found.length - train_length)
    assert 1 <= found.trials <= trials and read <= share * rows * measured
    # damage that only the end of some text shows is looked for there
    for longest in {min(measured, 16 * train_length), measured}:
        late = torch.tensor([8.0 * (0.9 * longest < end <= longest) for end in ends]).expand(rows, -1)
        found = excerpt(ends, late, train_length, measured, trials=trials, share=share)
        assert found.length == longest
        read = found.trials * found.rows * (longest - train_length)
        assert found.trials == 1 or read <= share * rows * measured


@pytest.mark.parametrize(
    ("small", "from_", "large", "length"),
    [(0.0, 32, 1.0, 64), (0.0, 32, math.nan, 64), (0.06, 64, 2.0, 128), (1.0, 64, 2.0, 16),
     (0.0, 999, 0.0, 16), (math.nan, 16, math.nan, 16), (0.06, 32, 0.0, 16)],
)  # fmt: skip
def test_an_excerpt_reads_to_where_the_damage_is(small, from_, large, length):
    """`small` nats past 8 T, `large` ones past `from_` T; texts of 128 T."""
    train_length, rows = 64, 16
    ends = [end for end in log_spaced(128 * train_length, 6) if end > train_length]
    shown = torch.tensor(
        [large if end > from_ * train_length else small * (end > 8 * train_length) for end in ends]
    )
    found = excerpt(ends, shown.expand(rows, -1), train_length, 128 * train_length, trials=14, share=3.5)
    assert found.length == length * train_length
