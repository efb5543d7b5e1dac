"""How documents share forwards: the cheapest groups, found in time linear in the documents."""

import random

import pytest

from longroll.families._documents import _cheapest


def by_trying_all(lengths, overhead):
    """The definition: for each number of documents, every start of the last group."""
    cost, first = [0], [0]
    for stop in range(1, len(lengths) + 1):
        costs = [cost[start] + overhead + (stop - start) * lengths[start] for start in range(stop)]
        cost.append(min(costs))
        first.append(costs.index(cost[-1]))
    sizes, stop = [], len(lengths)
    while stop:
        sizes.append(stop - first[stop])
        stop = first[stop]
    return sizes[::-1]


@pytest.mark.parametrize("overhead", [0, 1, 64, 4096])
@pytest.mark.parametrize("longest", [1, 3, 50, 4000])
def test_the_groups_are_those_of_trying_all(longest, overhead):
    draw = random.Random(longest * 10_000 + overhead)
    for _ in range(60):
        lengths = sorted((draw.randint(1, longest) for _ in range(draw.randrange(40))), reverse=True)
        assert _cheapest(lengths, overhead) == by_trying_all(lengths, overhead)


def test_many_documents_take_no_quadratic_time():
    """A hundred thousand documents would take hours by trying all starts."""
    draw = random.Random(0)
    lengths = sorted((draw.randint(1, 4000) for _ in range(100_000)), reverse=True)
    assert sum(_cheapest(lengths, 64)) == len(lengths)
