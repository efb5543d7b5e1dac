"""Effective remembrance: against K separate forwards, and distances against hand-made distributions."""

import math

import pytest
import torch

import zoo
from longroll.errors import LongrollError
from longroll.measure._state_statistics import head_rank, state_statistics
from longroll.measure.distances import head_distance, logit_distance
from longroll.measure.remembrance import effective_remembrance, remembrance_map, spread_starts
from longroll.measure.roll_out import LOGITS
from longroll.report.figures import remembrance_curves
from longroll.report.figures import remembrance_map as draw_map

STARTS = [40, 0, 1, 7, 99, 64, 7, 96]  # in no order, one twice, one past every end but the last
ENDS = [100, 8, 64, 96]


@torch.no_grad()
def separately(lm, tokens, starts, ends, distance):
    """One forward of all logits for every start and end."""
    found = torch.full((len(tokens), len(starts), len(ends)), torch.nan, dtype=torch.float64)
    for j, end in enumerate(ends):
        whole = lm(tokens[:, :end])[0][:, -1]
        for i, start in enumerate(starts):
            if start < end:
                found[:, i, j] = logit_distance(whole, lm(tokens[:, start:end])[0][:, -1], distance)
    return found


@pytest.mark.parametrize("distance", ["tv", "js", "kl"])
@pytest.mark.parametrize("name", zoo.RECURRENT)
def test_staggered_is_separate(name, distance):
    lm, tokens = zoo.lm_of(name, dtype=torch.float64), zoo.tokens(3, 100)
    found = remembrance_map(lm, tokens, STARTS, ENDS, distance=distance, chunk_size=13)
    expected = separately(lm, tokens, STARTS, ENDS, distance)
    assert expected.nanmean() > 1e-3  # the past matters in these models
    torch.testing.assert_close(found.distances, expected, atol=1e-5, rtol=0, equal_nan=True)
    assert torch.equal(found.distances[:, 1], torch.zeros(3, len(ENDS), dtype=torch.float64))


@pytest.mark.parametrize("name", zoo.CONTROLS)
def test_control_is_separate(name):
    lm, tokens = zoo.lm_of(name, dtype=torch.float64), zoo.tokens(2, 100)
    found = remembrance_map(lm, tokens, STARTS, ENDS, chunk_size=32)
    expected = separately(lm, tokens, STARTS, ENDS, "tv")
    torch.testing.assert_close(found.distances, expected, atol=1e-5, rtol=0, equal_nan=True)


def test_rows_in_groups_are_rows_at_once(monkeypatch):
    lm, tokens = zoo.lm_of("mamba2"), zoo.tokens(5, 48)
    done: list[int] = []
    whole = remembrance_map(lm, tokens, [0, 10, 30], [20, 48])
    monkeypatch.setattr("longroll.measure.remembrance.rows_at_once", lambda *_: 1)
    apart = remembrance_map(lm, tokens, [0, 10, 30], [20, 48], progress=done.append)
    torch.testing.assert_close(apart.distances, whole.distances, atol=1e-6, rtol=0, equal_nan=True)
    assert done == sorted(done) and done[-1] == 48


def test_mean_over_rows_and_default_end():
    lm, tokens = zoo.lm_of("mamba2"), zoo.tokens(6, 40)
    full = remembrance_map(lm, tokens, [0, 5, 20])
    mean = effective_remembrance(lm, tokens, [0, 5, 20])
    assert mean.shape == (3, 1)
    torch.testing.assert_close(mean, full.distances.mean(dim=0))
    assert full.ends == [40]
    assert ((full.low <= full.mean + 1e-12) & (full.mean <= full.high + 1e-12)).all()


def test_json_is_what_the_report_draws():
    lm, tokens = zoo.lm_of("mamba2"), zoo.tokens(4, 64)
    data = remembrance_map(lm, tokens, [0, 8, 40], [32, 64]).to_json()
    assert data["starts"] == [0, 8, 40] and data["ends"] == [32, 64] and data["distance"] == "tv"
    for name in ("mean", "low", "high"):
        assert data[name][2][0] is None  # starts at 40, ends at 32
        assert data[name][0] == [0, 0]
    run = {"label": "base", "remembrance": data}
    remembrance_curves([run])
    draw_map(run)


def test_distances_of_hand_made_distributions():
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]]).log()
    q = torch.tensor([[0.25, 0.5, 0.25], [0.0, 0.5, 0.5], [0.2, 0.3, 0.5]]).log()
    tv, js, kl = (logit_distance(p, q, distance) for distance in ("tv", "js", "kl"))
    torch.testing.assert_close(tv, torch.tensor([0.25, 1.0, 0.0]))
    torch.testing.assert_close(js[1:], torch.tensor([math.log(2), 0.0]))
    torch.testing.assert_close(kl, torch.tensor([0.5 * math.log(2), math.inf, 0.0]))
    middle = torch.tensor([0.375, 0.5, 0.125])
    expected = 0.5 * (0.5 * math.log(0.5 / middle[0])) + 0.5 * (
        0.25 * math.log(0.25 / middle[0]) + 0.25 * math.log(0.25 / middle[2])
    )
    torch.testing.assert_close(js[0], torch.tensor(expected), check_dtype=False)


def test_distances_stay_within_their_bounds():
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 10, 1000):
        p, q = torch.randn(2, 50, 64, generator=generator) * scale
        assert (logit_distance(p, q, "tv") <= 1).all() and (logit_distance(p, q, "tv") >= 0).all()
        js = logit_distance(p, q, "js")
        assert (js >= 0).all() and (js <= math.log(2) + 1e-6).all()
        torch.testing.assert_close(js, logit_distance(q, p, "js"))
        assert (logit_distance(p, q, "kl") >= 0).all()


def test_slices_of_rows_change_nothing(monkeypatch):
    lm = zoo.lm_of("mamba2")
    hidden = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
    whole = head_distance(lm, hidden[0], hidden, "tv")
    monkeypatch.setitem(LOGITS, "cpu", 600)
    torch.testing.assert_close(head_distance(lm, hidden[0], hidden, "tv"), whole)


def test_spread_starts():
    starts = spread_starts(8192)
    assert starts[0] == 0 and starts[-1] == 8191 and starts == sorted(set(starts))
    assert set(range(0, 8192, 512)) <= set(starts) and len(starts) == 22
    assert spread_starts(2) == [0, 1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([],), "starts"),
        (([64],), "starts"),
        (([0], [65]), "ends"),
        (([0], [0]), "ends"),
    ],
)
def test_refusals(arguments, message):
    lm = zoo.lm_of("mamba2")
    with pytest.raises(LongrollError, match=message):
        effective_remembrance(lm, zoo.tokens(1, 64), *arguments)


def test_unknown_distance_is_refused():
    with pytest.raises(LongrollError, match="tv, js, kl"):
        effective_remembrance(zoo.lm_of("mamba2"), zoo.tokens(1, 8), [0], distance="l2")  # type: ignore


def test_effective_rank():
    equal = torch.zeros(2, 3, 6, 8)
    equal[:, 0, 0, 0] = 5.0  # one singular value
    equal[:, 1, :4, :4] = torch.eye(4) * 1e-4  # four equal ones
    equal[:, 2, 0, 0], equal[:, 2, 1, 1] = 3.0, 1.0
    expected = torch.tensor([1.0, 4.0, 10**2 / 82], dtype=torch.float64)
    torch.testing.assert_close(head_rank(equal), expected, atol=1e-4, rtol=0)
    assert head_rank(torch.randn(2, 12, 4)).shape == (1,)  # heads are vectors: the layer's
    assert head_rank(torch.full((2, 1, 3, 3), torch.inf)).isnan().all()
    assert head_rank(torch.zeros(2, 1, 3, 3)).isnan().all()


@pytest.mark.parametrize("shape", [(1, 2, 9, 5), (3, 4, 5, 9), (2, 1, 64, 64), (4, 24, 6), (2, 7)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_effective_rank_is_that_of_the_singular_values(shape, scale):
    """Against float64 singular values, for heads of matrices, of vectors and of numbers."""
    state = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
    matrices = state if state.ndim == 4 else state.reshape(len(state), 1, state.shape[1], -1)
    squares = torch.linalg.svdvals(matrices.double()).square()
    expected = (squares.sum(-1).square() / squares.square().sum(-1)).mean(0)
    torch.testing.assert_close(head_rank(state), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(head_rank(state.double()), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_statistics_hold_ranks_and_conv_tails(name):
    lm, tokens = zoo.lm_of(name), zoo.tokens(3, 40)
    found = state_statistics(lm, tokens, [10, 40])
    with torch.no_grad():
        _, state = lm(tokens)
    for key, tensor in state.items():
        if key.part == "recurrent":
            torch.testing.assert_close(
                found.layers[key.layer]["rank"][1], head_rank(tensor), atol=1e-3, rtol=0
            )
        else:
            conv = found.conv[key.layer]
            torch.testing.assert_close(conv["std"][1], tensor.double().std(correction=0), rtol=1e-4, atol=0)
            torch.testing.assert_close(conv["max"][1], tensor.double().abs().max(), rtol=1e-4, atol=0)
    row = found.to_json()["layers"][0]
    assert len(row["rank"]) == 2 and row["rank"][1] > 1
    assert len(row["conv"]["norm"]) == 2
