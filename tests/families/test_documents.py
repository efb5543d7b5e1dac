"""Law 7: a padded or packed row gives the loss, the gradient and the final state that it has alone."""

import pytest
import torch
from torch import Tensor

from longroll.conformance import laws
from longroll.conformance.tiny import CONFIGS
from longroll.model import RecurrentLM
from longroll.state import RecurrentState
from zoo import assert_close, assert_same_state, lm_of, tokens

LENGTHS = (11, 23, 6)
TOLERANCE = 1e-5
OURS = ["mamba", "mamba2_groups", "jamba", "zamba", "bamba", "qwen3_next", "kimi_linear", "recurrent_gemma"]
OURS += ["gla_hybrid", "delta_net", "gated_deltanet", "retnet", "rwkv6", "rwkv7", "rwkv", "xlstm", "minimax"]


def padded(side: str, lengths=LENGTHS) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Ids (B, T), mask (B, T), and the texts alone."""
    time = max(lengths)
    ids, mask = tokens(len(lengths), time, seed=9), torch.zeros(len(lengths), time, dtype=torch.long)
    texts = []
    for row, length in enumerate(lengths):
        where = slice(time - length, time) if side == "left" else slice(0, length)
        if side == "scattered":  # a mask with holes
            keep = torch.randperm(time, generator=torch.Generator().manual_seed(row))[:length].sort().values
            mask[row, keep] = 1
        else:
            mask[row, where] = 1
        texts.append(ids[row : row + 1, mask[row].bool()])
    return ids, mask, texts


def alone(lm: RecurrentLM, texts: list[Tensor], state: RecurrentState | None) -> tuple[list[Tensor], list]:
    outputs, finals = [], []
    for row, text in enumerate(texts):
        logits, final = lm(text, None if state is None else state.rows([row]))
        outputs.append(logits[0])
        finals.append(final.part("recurrent", "conv"))
    return outputs, finals


def start(lm: RecurrentLM, rows: int) -> RecurrentState | None:
    return laws.random_state(lm, rows) if lm.family.recurrent else None


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_padding_is_not_read(name, side):
    lm = lm_of(name)
    ids, mask, texts = padded(side)
    state = start(lm, len(texts))
    outputs, finals = alone(lm, texts, state)
    logits, final = lm(ids, state, attention_mask=mask)
    for row, expected in enumerate(outputs):
        assert_close(logits[row][mask[row].bool()], expected, TOLERANCE, f"logits of row {row}")
        got = final.part("recurrent", "conv").rows([row])
        assert_same_state(got, RecurrentState(finals[row], seen=got.seen), TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_documents_of_a_row_do_not_see_each_other(name):
    lm = lm_of(name)
    texts = [[tokens(1, n, seed=n) for n in lengths] for lengths in ((7, 12, 5), (20, 4))]
    ids = torch.cat([torch.cat(row, dim=1) for row in texts])
    starts = torch.zeros_like(ids)
    starts[0, [7, 19]] = 1  # the first document of a row goes on from its state
    starts[1, [0, 20]] = 1  # this one does not
    state = start(lm, 2)
    logits, final = lm(ids, state, starts=starts)
    for row, documents in enumerate(texts):
        at = 0
        for number, text in enumerate(documents):
            begins = state is not None and row == 0 and number == 0
            expected, last = lm(text, state.rows([row]) if begins else None)
            assert_close(logits[row, at : at + text.shape[1]], expected[0], TOLERANCE, f"{row}, {number}")
            at += text.shape[1]
        got = final.part("recurrent", "conv").rows([row])
        assert_same_state(got, RecurrentState(last.part("recurrent", "conv"), seen=got.seen), TOLERANCE)
