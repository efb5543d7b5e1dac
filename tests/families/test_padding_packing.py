"""Law 7: a padded or packed row gives the loss, the gradient and the final state that it has alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longroll.conformance import laws
from longroll.conformance.tiny import CONFIGS
from longroll.errors import LongrollError
from longroll.families._padding import Padding, limited_steps
from longroll.model import RecurrentLM
from longroll.ops._ssd import NO_LIMIT
from longroll.state import RecurrentState
from zoo import assert_close, assert_same_state, lm_of, tokens

LENGTHS = (11, 23, 6)
TOLERANCE = 1e-5
OURS = ["mamba", "mamba2_groups", "jamba", "zamba", "bamba", "qwen3_next", "kimi_linear", "recurrent_gemma"]
OURS += ["gla_hybrid", "delta_net", "gated_deltanet", "retnet", "rwkv6", "rwkv7", "rwkv", "xlstm", "minimax"]

KERNELS = ["mamba", "mamba2_groups", "bamba", "qwen3_next", "gla", "delta_net", "gated_deltanet"]
KERNELS += ["rwkv6", "rwkv7"]


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


def loss(lm: RecurrentLM, logits: Tensor, ids: Tensor, final: RecurrentState) -> Tensor:
    """Some number that every output and every state reaches."""
    weights = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)
    state = sum(t.double().square().sum() for key, t in final.items() if key.part == "recurrent")
    return (logits.double() @ weights.double()).square().sum() + 0.1 * state


@pytest.mark.parametrize("name", OURS)
def test_gradients_are_those_of_the_documents_alone(name):
    lm = lm_of(name, dtype=torch.float64)
    ids, mask, texts = padded("left", (9, 17, 4))
    starts = torch.zeros_like(mask)
    starts[1, [5, 11]] = 1
    state = start(lm, 3)
    state = None if state is None else state.map(lambda t: t.double().requires_grad_())
    parameters = [p for p in lm.parameters() if p.requires_grad]
    inputs = [*parameters, *state.values()]

    def gradients(total: Tensor) -> list:
        return torch.autograd.grad(total, inputs, allow_unused=True)

    logits, final = lm(ids, state, attention_mask=mask, starts=starts)
    together = gradients(loss(lm, logits[mask.bool()], ids, final))
    total = torch.zeros((), dtype=torch.float64)
    for row, text in enumerate(texts):
        pieces, given = text.split([5, 6, 6] if row == 1 else [text.shape[1]], dim=1), state.rows([row])
        for number, piece in enumerate(pieces):
            logits, final = lm(piece, given if number == 0 else None)
            ends = final if number == len(pieces) - 1 else RecurrentState({})
            total = total + loss(lm, logits, piece, ends)
    for ours, expected in zip(together, gradients(total), strict=True):
        if expected is not None:
            assert_close(ours, expected, 1e-6)  # some classes compute decays in float32
        assert (ours is None or not ours.any()) or expected is not None


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ["mamba2_groups", "gla_hybrid", "rwkv7", "xlstm"])
@torch.no_grad()
def test_any_layout(name, data):
    lm = lm_of(name)
    rows, time = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 24))
    ids = tokens(rows, time)
    flags = st.lists(st.lists(st.booleans(), min_size=time, max_size=time), min_size=rows, max_size=rows).map(
        torch.tensor
    )
    mask = data.draw(flags)
    begins = data.draw(flags) & mask
    state = start(lm, rows)
    if not mask.any():
        with pytest.raises(LongrollError, match="attention_mask"):
            lm(ids, state, attention_mask=mask)
        return
    restart = data.draw(st.sampled_from(["zero", "state"]))
    logits, final = lm(ids, state, attention_mask=mask, starts=begins, restart=restart)
    for row in range(rows):
        where = mask[row].nonzero().squeeze(1).tolist()
        last = state.rows([row])
        pieces: list[list[int]] = []
        for position in where:
            if begins[row, position] or not pieces:
                pieces.append([])
            pieces[-1].append(position)
        for piece in pieces:
            anew = begins[row, piece[0]]
            given = None if anew and restart == "zero" else state.rows([row])
            expected, last = lm(ids[row : row + 1, piece], given)
            assert_close(logits[row, piece], expected[0], TOLERANCE)
        got = final.part("recurrent", "conv").rows([row])
        assert_same_state(got, RecurrentState(last.part("recurrent", "conv"), seen=got.seen), TOLERANCE)


def test_a_ragged_state_of_a_hybrid_cannot_be_read_on_from():
    lm = lm_of("bamba")
    ids, mask, _ = padded("right")
    _, final = lm(ids, attention_mask=mask)
    assert final.ragged
    with pytest.raises(LongrollError, match="keys and values"):
        lm(ids, final)
    lm(ids, final.part("recurrent", "conv"))


def test_a_pure_recurrence_reads_on_from_padded_rows():
    lm = lm_of("mamba2")
    ids, mask, texts = padded("right")
    _, final = lm(ids, attention_mask=mask)
    more = tokens(3, 5, seed=1)
    logits, _ = lm(more, final)
    for row, text in enumerate(texts):
        expected, _ = lm(torch.cat([text, more[row : row + 1]], dim=1))
        assert_close(logits[row], expected[0, -5:], TOLERANCE)


@pytest.mark.parametrize("wrong", ["attention_mask", "starts"])
def test_a_mask_of_another_shape_is_refused_by_name(wrong):
    with pytest.raises(LongrollError, match=f"`{wrong}`"):
        lm_of("mamba2")(tokens(2, 5), **{wrong: torch.ones(2, 4)})


def test_starts_at_padding_are_refused():
    mask = torch.tensor([[0, 1, 1]])
    with pytest.raises(LongrollError, match="`starts`"):
        lm_of("mamba2")(tokens(1, 3), attention_mask=mask, starts=1 - mask)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_a_lower_limit_makes_no_step_of_padding(softplus, biased):
    dt, bias = torch.randn(2, 5, 3), torch.randn(3) if biased else None
    padding = Padding(torch.tensor([5, 3]), 5, dt.device)
    found = limited_steps(dt, bias, softplus, (0.1, 0.9), padding)
    steps = dt if bias is None else dt + bias
    steps = (F.softplus(steps) if softplus else steps).clamp(0.1, 0.9)
    assert_close(
        found[0], torch.cat([steps[:, :3], steps[:, 3:] * torch.tensor([1, 0]).view(2, 1, 1)], 1), 1e-6
    )
    assert found[1:] == (None, False, NO_LIMIT)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_keep_padding_out(name):
    lm = lm_of(name).to("cuda")
    ids, mask, texts = padded("left", (70, 129, 66))  # fla's layers and kernels change their ways at 64
    ids, mask, texts = ids.cuda(), mask.cuda(), [text.cuda() for text in texts]
    starts = torch.zeros_like(mask)
    starts[1, 66] = 1
    state = start(lm, 3)
    with torch.no_grad():
        logits, final = lm(ids, state, attention_mask=mask, starts=starts)
        for row, text in enumerate(texts):
            pieces = text.split([66, 63], dim=1) if row == 1 else [text]
            given, expected = state.rows([row]), []
            for piece in pieces:
                output, last = lm(piece, given)
                expected.append(output[0])
                given = None
            assert_close(logits[row][mask[row].bool()], torch.cat(expected), 2e-2, f"logits of row {row}")
            got = final.part("recurrent", "conv").rows([row])
            assert_same_state(got, RecurrentState(last.part("recurrent", "conv"), seen=got.seen), 2e-2)
