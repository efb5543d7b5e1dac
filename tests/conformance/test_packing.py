import pytest

from longroll.conformance.packing import packing
from zoo import lm_of


@pytest.mark.parametrize("name", ["mamba2", "bamba", "qwen3_next", "gla", "rwkv", "llama"])
def test_longroll_keeps_documents_apart(name):
    lm = lm_of(name)
    found = packing(lm.model, lm)
    assert found.longroll < 1e-5


def test_a_leak_of_the_models_own_forward_is_found():
    lm = lm_of("mamba2")  # transformers' Mamba-2 reads on over the boundary
    found = packing(lm.model, lm)
    assert found.own > 0.01
    assert "lets the second document see the first" in found.sentences[1]
