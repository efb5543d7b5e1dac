"""What is dealt to ranks: every row once, and what they find together is what one process finds."""

import copy
import threading

import pytest
import torch
from planted import TRAIN_LENGTH, planted_lm, texts_of_twin

import zoo
from longroll import RecurrentLM, diagnose, position_loss, ranks
from longroll.errors import LongrollError
from longroll.measure import remembrance_map


@pytest.fixture
def several(monkeypatch):
    """Run a function as so many ranks, threads of which one at a time runs; its results."""

    def run(size, function):
        here, running, met = threading.local(), threading.Lock(), threading.Barrier(size, timeout=60)
        box, results, errors = [None] * size, [None] * size, []

        def gather(item):
            if ranks.alone():
                return [item]
            box[here.rank] = copy.deepcopy(item)
            meet()
            found = list(box)
            meet()  # before the box is filled anew
            return found

        def meet():
            running.release()
            try:
                met.wait()
            finally:
                running.acquire()

        def on_first(function):
            if ranks.alone():
                return function()
            with ranks.together(False):
                found = function() if here.rank == 0 else None
            return gather(found)[0]

        def work(rank):
            here.rank = rank
            with running:
                try:
                    results[rank] = function()
                except Exception as error:
                    errors.append(error)
                    met.abort()

        with monkeypatch.context() as patch:
            patch.setattr(ranks, "alone", lambda: ranks._apart)
            patch.setattr(ranks, "rank", lambda: 0 if ranks._apart else here.rank)
            patch.setattr(ranks, "world_size", lambda: 1 if ranks._apart else size)
            patch.setattr(ranks, "gather", gather)
            patch.setattr(ranks, "on_first", on_first)
            threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if errors:
            raise errors[0]
        return results

    return run


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_every_row_and_part_is_dealt_once(size, several):
    for count in range(1, 12):
        numbers = list(range(count))
        shares = several(size, lambda: numbers[ranks.share(count)])  # noqa: B023
        assert [number for share in shares for number in share] == numbers
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        dealt = several(size, lambda: ranks.deal(count))  # noqa: B023
        pairs = [(row, share.part) for share in dealt for row in numbers[share.rows]]
        parts = dealt[0].parts
        assert sorted(pairs) == [(row, part) for row in numbers for part in range(parts)]
        assert all(numbers[share.rows] and share.parts == parts for share in dealt)


def test_ranks_diagnose_what_one_process_does(several):
    """8 ranks and 5 texts: three ranks read none, and trials and starts are dealt too."""
    lm = RecurrentLM(copy.deepcopy(planted_lm().model).double())
    texts = texts_of_twin()[:5, :81]
    told = {"train_length": TRAIN_LENGTH, "label": "one"}
    alone = diagnose(lm, texts, **told).to_json()
    saved = []
    found = several(8, lambda: diagnose(lm, texts, save=saved.append, dealt=True, **told).to_json())
    assert len(saved) == 1 and alone["coverage"]["causal"]
    for one in (alone, *found):
        del one["provenance"], one["advice"]
    for one in found:
        zoo.assert_same_numbers(one, alone)


def test_measures_that_are_not_dealt_speak_to_no_rank(several):
    """As on rank 0 alone, in a process group that others wait in."""
    texts = texts_of_twin()[:4, :65]
    lm = planted_lm()
    expected = diagnose(lm, texts, train_length=TRAIN_LENGTH).severity

    def only_first():
        return diagnose(lm, texts, train_length=TRAIN_LENGTH).severity if ranks.rank() == 0 else None

    assert several(2, only_first) == [expected, None]


@pytest.mark.parametrize("name", ["mamba2", "granitemoehybrid"])  # read together, and start after start
def test_starts_are_dealt_where_rows_are_few(name, several):
    lm = zoo.lm_of(name, dtype=torch.float64)
    starts, ends = [31, 0, 7, 12, 1, 39], [20, 40, 33]
    alone = remembrance_map(lm, zoo.tokens(2, 40), starts, ends)
    for found in several(6, lambda: remembrance_map(lm, zoo.tokens(2, 40), starts, ends, dealt=True)):
        torch.testing.assert_close(found.distances, alone.distances, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_documents_inside_rows_are_not_dealt():
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[:, 4] = True
    with pytest.raises(LongrollError, match=r"`dealt` and `kept` need rows of one document each"):
        position_loss(zoo.lm_of("mamba2"), zoo.tokens(2, 9), starts=starts, dealt=True)
