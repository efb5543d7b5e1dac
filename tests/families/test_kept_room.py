"""What Mamba-2 keeps for a faster backward is a part of what the run leaves free."""

import pytest
import torch

from longroll.conformance import tiny
from longroll.families import _mixers
from longroll.families._cache import StateCache
from longroll.families._room import assume_free


def room(free: float, cache: StateCache | None = None, *, rows: int = 2) -> float:
    model = tiny.build("mamba2")
    mixer = model.base_model.layers[0].mixer
    projected = torch.zeros(rows, 16, mixer.in_proj.out_features)
    with assume_free(free):
        return _mixers._room(mixer, projected, cache or StateCache(model.config, None))


def test_it_is_what_activations_and_gradients_leave():
    assert room(0) == room(1000) == 0.0
    assert room(2e9) - room(1e9) == pytest.approx(_mixers.KEPT * 1e9)
    assert room(1e9, rows=64) < room(1e9) < _mixers.KEPT * 1e9


def test_a_forward_that_is_run_again_keeps_the_same():
    cache = StateCache(tiny.build("mamba2").config, None)
    first = room(1e9, cache)
    assert room(0, cache) == first > 0


def test_a_reading_keeps_nothing():
    with torch.no_grad():
        assert room(1e12) == 0.0
