"""Do texts end as they go on: no alarm for text that does, a passkey's question found."""

import torch

from longroll.measure.stationarity import end_drift


def text(seed: int, rows: int = 16, length: int = 2048, kinds: int = 200) -> torch.Tensor:
    """Tokens of Zipf's frequencies, in runs of a topic."""
    generator = torch.Generator().manual_seed(seed)
    shares = 1 / torch.arange(1, kinds + 1)
    topics = torch.stack([shares[torch.randperm(kinds, generator=generator)] + shares for _ in range(8)])
    which = torch.randint(8, (rows, length // 64), generator=generator).repeat_interleave(64, dim=1)
    return torch.multinomial(topics[which.flatten()], 1, generator=generator).view(rows, length)


def test_text_that_goes_on_raises_no_alarm():
    assert all(end_drift(text(seed), 32, seed=seed).stationary for seed in range(20))


def test_an_end_of_its_own_is_found():
    for seed in range(5):
        tokens = text(seed)
        tokens[:, -24:] = torch.arange(24) * 7  # the same question in every row
        found = end_drift(tokens, 32, seed=seed)
        assert not found.stationary
        assert found.drift > 0.3 and found.p <= 0.01
        assert found.to_json()["stationary"] is False


def test_a_common_beginning_is_no_end():
    tokens = text(0)
    tokens[:, :24] = torch.arange(24) * 7
    assert end_drift(tokens, 32).stationary


def test_too_short_tells_nothing():
    assert (end_drift(text(0)[:, :64], 32).drift, end_drift(text(0)[:, :64], 32).p) == (0.0, 1.0)


def test_large_vocabularies_are_told_apart_by_their_frequent_tokens():
    tokens = torch.randint(0, 200_000, (16, 2048), generator=torch.Generator().manual_seed(0))
    assert end_drift(tokens, 128).stationary
