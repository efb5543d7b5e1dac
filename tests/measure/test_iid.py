"""Are states IID: noise is, a product of few vectors is not, whatever the shape."""

import math

import pytest
import torch

from longroll import load
from longroll.data import ByteTokenizer, Corpus, long_sequences
from longroll.measure.iid import iid_test
from longroll.state import RecurrentState, StateKey

SHAPES = [(4, 16, 8), (2, 8, 32), (6, 64, 64)]


def state_of(tensor: torch.Tensor) -> RecurrentState:
    return RecurrentState(
        {StateKey(0, "recurrent"): tensor, StateKey(0, "conv"): torch.zeros(len(tensor), 3, 4)}
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_of_any_moments_is_iid(shape):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        scale = torch.rand(1, shape[0], 1, 1, generator=generator) * 5
        drift = torch.randn(1, shape[0], 1, 1, generator=generator)
        found = iid_test(state_of(torch.randn(6, *shape, generator=generator) * scale + drift), seed=seed)
        assert found.share == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_what_few_tokens_wrote_is_not(shape):
    heads, rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    written = torch.randn(6, heads, rows, 2, generator=generator) @ torch.randn(
        6, heads, 2, columns, generator=generator
    )
    found = iid_test(state_of(written))
    assert found.share == 1
    real, noise = found.ranks
    assert real < 2.1 < noise
    assert found.to_json() == {"share_not_iid": 1.0, "state_rank": real, "noise_rank": noise}


def test_zero_states_tell_nothing():
    assert math.isnan(iid_test(state_of(torch.zeros(4, 2, 8, 8))).share)


def test_states_of_a_trained_model_are_not():
    corpus = Corpus.from_source("stdlib", ByteTokenizer(), split="validation", max_tokens=20_000)
    with torch.no_grad():
        _, state = load("specimen", device="cpu")(long_sequences(corpus, 128, 4, concatenate=True)[:, :128])
    assert iid_test(state).share == 1
