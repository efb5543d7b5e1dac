"""Unexplored states: no alarm for stationary states, the planted head found, numbers against direct ones."""

import importlib

import pytest
import torch
from planted import PLANTED, TRAIN_LENGTH, planted_lm, texts_of_twin

import zoo
from longroll.errors import LongrollError
from longroll.measure._coverage import CoverageRecorder, Head, coverage, far_positions, in_range_positions
from longroll.report.figures import coverage_map
from longroll.state import RecurrentState, StateKey

module = importlib.import_module("longroll.measure._coverage")  # the package gives the function this name

KEYS = [StateKey(0, "recurrent"), StateKey(2, "recurrent")]


def synthetic(
    seed: int, *, texts: int = 8, heads: int = 6, decay: float = 0.98, grow: tuple[int, int] | None = None
) -> CoverageRecorder:
    """States as an AR(1) walk that starts stationary; `grow` (layer index, head) triples after T = 64.

    A text has a level of its own, so that its states hang together over all positions.
    """
    generator = torch.Generator().manual_seed(seed)
    recorder = CoverageRecorder(in_range_positions(64), far_positions(1024, 64), seed=seed)
    shape = (texts, heads, 6, 5)
    levels = {key: 1 + 0.2 * torch.rand(texts, heads, 1, 1, generator=generator) for key in KEYS}
    tensors = {key: torch.randn(shape, generator=generator) for key in KEYS}
    last = 0
    for stop in recorder.stops:
        kept = decay ** (stop - last)
        last = stop
        for key in KEYS:
            fresh = torch.randn(shape, generator=generator)
            tensors[key] = kept * tensors[key] + (1 - kept**2) ** 0.5 * fresh
        seen = {key: levels[key] * t for key, t in tensors.items()}
        if grow and stop > 64:
            seen[KEYS[grow[0]]][:, grow[1]] *= 3
        recorder(stop, RecurrentState(seen))
    return recorder


@pytest.mark.parametrize("decay", [0.5, 0.98])
def test_stationary_states_raise_no_alarm(decay):
    alarms = [str(head) for seed in range(20) for head in synthetic(seed, decay=decay).coverage().ranking()]
    assert alarms == []


def test_a_growing_head_is_found_alone():
    for seed in range(5):
        found = synthetic(seed, grow=(1, 4)).coverage()
        assert found.ranking() == [Head(2, 4)]
        assert found.layers[1].shift[4] > 3
        assert found.layers[1].log_variance_ratio[4] > 1.5  # log 9, less the noise of the variances


def test_one_head_among_many_is_found():
    recorder = CoverageRecorder([1, 2], [5, 6])
    generator = torch.Generator().manual_seed(0)
    for stop in recorder.stops:
        tensor = torch.randn(16, 200, 3, 3, generator=generator)
        tensor[:, 123] *= 1 if stop < 3 else 4
        recorder(stop, RecurrentState({KEYS[0]: tensor}))
    assert recorder.coverage().ranking() == [Head(0, 123)]


def test_a_head_that_only_changes_direction_is_found():
    recorder = CoverageRecorder([1, 2], [5, 6])
    generator = torch.Generator().manual_seed(0)
    for stop in recorder.stops:
        tensor = torch.randn(12, 3, 4, 4, generator=generator)
        tensor[:, 1, 0] += 5 if stop < 3 else -5  # the norm stays
        recorder(stop, RecurrentState({KEYS[0]: tensor}))
    found = recorder.coverage()
    assert found.ranking() == [Head(0, 1)]
    assert found.layers[0].shift[1].abs() < 1


def test_numbers_against_direct_computation():
    generator = torch.Generator().manual_seed(3)
    near, far = (torch.randn(2, 5, 3, 4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    recorder = CoverageRecorder([7, 8], [20, 30])
    for stop, tensor in zip(recorder.stops, [*near, *(2 * far)], strict=True):
        recorder(stop, RecurrentState({KEYS[0]: tensor}))
    found = recorder.coverage().layers[0]
    norms = near.flatten(3).norm(dim=3).log().movedim(2, 0).flatten(1)  # (heads, samples)
    far_norms = (2 * far).flatten(3).norm(dim=3).log().movedim(2, 0).flatten(1)
    torch.testing.assert_close(found.shift, (far_norms.mean(1) - norms.mean(1)) / norms.std(1))
    variance = near.flatten(0, 1).var(dim=0, correction=0).flatten(1).mean(1)
    far_variance = (2 * far).flatten(0, 1).var(dim=0, correction=0).flatten(1).mean(1)
    torch.testing.assert_close(found.log_variance_ratio, (far_variance / variance).log())
    torch.testing.assert_close(found.norm_high, norms.amax(1).exp())


def test_energy_distance_against_its_definition():
    generator = torch.Generator().manual_seed(0)
    near, far = (
        torch.randn(1, 6, k, 2, generator=generator, dtype=torch.float64) + i
        for i, k in enumerate((3, 2))  # as many positions as there are, not the same on both sides
    )
    energy, p = module._energy_test(near, far, generator)
    scale = near.flatten(1, 2).std(dim=1)[:, None, None]

    def mean(a, b):
        return ((a / scale).flatten(1, 2)[0][:, None] - (b / scale).flatten(1, 2)[0]).abs().sum(-1).mean()

    expected = 2 * mean(near, far) - mean(near, near) - mean(far, far)
    torch.testing.assert_close(energy[0], expected)
    assert p[0] < 0.05


def test_planted_head_is_ranked_first():
    found = coverage(planted_lm(), texts_of_twin(), TRAIN_LENGTH)
    assert found.ranking()[0] == PLANTED


def test_states_that_overflow_are_outside():
    recorder = CoverageRecorder([1, 2], [5])
    for stop in recorder.stops:
        tensor = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(stop))
        if stop == 5:
            tensor[:, 0] = torch.inf
            tensor[:4, 0, 0] = torch.nan
        recorder(stop, RecurrentState({KEYS[0]: tensor}))
    found = recorder.coverage()
    assert found.ranking() == [Head(0, 0)]
    assert torch.isfinite(found.layers[0].shift).all()


def test_heads_that_are_vectors_count_as_their_layer():
    lm = zoo.lm_of("mamba")
    found = coverage(lm, zoo.tokens(6, 96), 16)
    assert [layer.heads() for layer in found.layers] == [[Head(0, None)], [Head(1, None)]]


def test_json_is_what_the_report_draws():
    data = synthetic(0, grow=(0, 1)).coverage().to_json()
    assert data["layers"] == [0, 2]
    assert [len(row) for row in data["map"]] == [6, 6]
    assert data["significant"][0][1] is True
    assert data["ranking"] == ["layer 0 head 1"]
    coverage_map({"label": "base", "coverage": data})


def test_refusals():
    with pytest.raises(LongrollError, match="no recurrent state"):
        coverage(zoo.lm_of("llama"), zoo.tokens(8, 64), 16)
    with pytest.raises(LongrollError, match="past the training length"):
        coverage(zoo.lm_of("mamba2"), zoo.tokens(8, 64), 16, [16])
    with pytest.raises(LongrollError, match="at least 4"):
        coverage(zoo.lm_of("mamba2"), zoo.tokens(3, 64), 16)
    with pytest.raises(LongrollError, match="`train_length`"):
        coverage(zoo.lm_of("mamba2"), zoo.tokens(8, 64))
