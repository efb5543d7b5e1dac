"""RoPE whose angles change with the length read gives one answer for any chunks, or none."""

import pytest
import torch

from longroll import LongrollError, RecurrentLM
from longroll.conformance import laws
from longroll.measure import position_loss
from zoo import assert_close, build, tokens

LIMIT = 48
LONG = {"original_max_position_embeddings": LIMIT, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
KINDS = {
    "dynamic": {"rope_type": "dynamic"},
    "longrope": {"rope_type": "longrope"} | LONG,
    "yarn": {"rope_type": "yarn", "original_max_position_embeddings": LIMIT},
}


def lm_with(name, kind):
    rope = {"rope_theta": 10_000.0, "factor": 4.0, "partial_rotary_factor": 1.0} | KINDS[kind]
    return RecurrentLM(
        build(name, rope_parameters=rope, max_position_embeddings=LIMIT if kind == "dynamic" else 4 * LIMIT)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bamba", "falcon_h1", "granitemoehybrid", "llama"])
def test_any_chunks_give_one_answer_or_none(name, kind):
    lm = lm_with(name, kind)
    assert laws.chunking(lm, tokens(2, LIMIT), [30, 1, 15, 2]).size < 1e-4
    text = tokens(2, 3 * LIMIT + 1)
    if kind != "yarn":
        for chunk in (16, LIMIT, 3 * LIMIT):
            with pytest.raises(LongrollError, match=f"more than {LIMIT} positions.*{kind}.*`tokens.shape"):
                position_loss(lm, text, chunk_size=chunk)
        return
    with torch.no_grad():
        logits = lm.model(text[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), text[:, 1:].flatten(), reduction="none"
    )
    for chunk in (16, 100, 3 * LIMIT):
        assert_close(position_loss(lm, text, chunk_size=chunk).losses.flatten().float(), expected, 1e-4)
