"""How many tokens a reading takes at a time: as many as are planned to fit."""

import pytest
import torch

from longroll.measure import roll_out
from longroll.training.plan import outline_of
from zoo import lm_of


@pytest.fixture
def large(monkeypatch):
    """A device that more tokens than a CPU's keep busy, with as much memory as is asked for."""
    monkeypatch.setattr(roll_out, "most_tokens", lambda _: 65_536)
    return lambda free: monkeypatch.setattr(roll_out, "free_bytes", lambda _: free)


def test_the_plan_tells_where_the_bound_does_not(large):
    lm = lm_of("bamba")
    each = roll_out.planned_bytes(lm)
    assert each < roll_out._TOKEN_BYTES * lm.width
    for tokens in (65_536, 32_768, 8_192):
        large(2 * tokens * each)
        assert roll_out.chunk_tokens(lm) == tokens
        assert roll_out.default_chunk(lm, 4) == tokens // 4
    large(0)
    assert roll_out.chunk_tokens(lm) == 4096


def test_a_module_without_a_config_is_bounded(large):
    lm = lm_of("mamba2")
    roll_out._PLANNED[lm.model] = None
    large(2 * 8_192 * roll_out._TOKEN_BYTES * lm.width)
    assert roll_out.chunk_tokens(lm) == 8_192


@pytest.mark.parametrize("name", ["mamba2", "bamba"])
def test_a_plan_and_a_reading_take_the_same(name):
    lm = lm_of(name)
    assert outline_of(lm).chunk(4, 100, 1e12) == roll_out.default_chunk(lm, 4, 100)


def test_a_reading_takes_its_chunk_from_there(monkeypatch):
    lm, ids = lm_of("mamba2"), torch.zeros(2, 640, dtype=torch.long)
    monkeypatch.setattr(roll_out, "chunk_tokens", lambda _: 256)
    assert [c.hidden.shape[1] for c in roll_out.roll_out(lm, ids)] == [128] * 5


def test_a_long_reading_of_a_hybrid_takes_a_small_part_of_its_keys(large):
    lm = lm_of("bamba")
    each, sizes = roll_out.planned_bytes(lm), roll_out._planned_sizes(lm)
    large(1e12)
    length = 2**18
    keys = sizes.keys_and_values(length)
    assert keys > sizes.weights
    found = roll_out.default_chunk(lm, 1, length)
    assert found == 4096 or found * each <= keys / 12 < 2 * found * each
    assert roll_out.default_chunk(lm, 1, 2**12) == 65_536
    assert roll_out.tokens_beside(16_384, 60_000, 8 * 2**30, 2 * 2**30) == 8_192
    assert roll_out.tokens_beside(16_384, 60_000, 2**30, 2 * 2**30) == 16_384
