"""Families whose state travels in a container of its own: what their zero state is, and their scans."""

import pytest
import torch

from longroll.conformance import laws
from longroll.families.recurrent_gemma import linear_scan
from longroll.families.rwkv4 import wkv
from longroll.model import RecurrentLM
from longroll.state import RecurrentState, StateKey
from zoo import assert_close, build, lm_of, tokens

SHAPES = [(1, 1, 1), (2, 5, 3), (3, 40, 4)]  # B, T, D


def random(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def gradients_of(function, *inputs):
    leaves = [t.clone().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    sum((t * (i + 1)).sin().sum() for i, t in enumerate(outputs)).backward()
    return [*outputs, *[leaf.grad for leaf in leaves]]


# ---- RWKV-4


def wkv_by_definition(time_decay, time_first, key, value, mean, weight):
    """Sums of weights as they are, in float64, without the exponent that keeps them small."""
    total = torch.expm1(weight)
    weighted, outputs = mean * total, []
    for t in range(key.shape[1]):
        now = (key[:, t] + time_first).exp()
        outputs.append((weighted + now * value[:, t]) / (total + now))
        kept, now = (-time_decay.exp()).exp(), key[:, t].exp()
        weighted, total = kept * weighted + now * value[:, t], kept * total + now
    return torch.stack(outputs, dim=1), weighted / total, total.log1p()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_wkv_is_its_definition(shape):
    rows, _, width = shape
    inputs = random((width,), (width,), shape, shape, (rows, width), (rows, width))
    inputs[-1] = inputs[-1].abs()

    def ours(*given):
        outputs, (mean, weight, _) = wkv(*given[:4], initial_state=given[4:])
        return outputs, mean, weight

    for actual, expected in zip(
        gradients_of(ours, *inputs), gradients_of(wkv_by_definition, *inputs), strict=True
    ):
        assert_close(actual, expected, 1e-10)


@pytest.mark.parametrize("size", [-60.0, 60.0])
def test_wkv_keeps_to_numbers(size):
    """Weights far beyond float32: transformers' exponent is kept inside."""
    keys, values = (t.float() for t in random((2, 9, 3), (2, 9, 3)))
    state = torch.zeros(2, 3), torch.full((2, 3), 200.0)
    outputs, (mean, weight, _) = wkv(torch.zeros(3), torch.zeros(3), keys + size, values, initial_state=state)
    assert all(torch.isfinite(t).all() for t in (outputs, mean, weight))


def test_a_negative_weight_is_none():
    lm, ids = lm_of("rwkv"), tokens(2, 9)
    state = laws.random_state(lm, 2)
    clipped = {k: t.clamp_min(0) if k[1:] == ("recurrent", 1) else t for k, t in state.items()}
    assert torch.equal(lm(ids, state)[0], lm(ids, RecurrentState(clipped))[0])


@pytest.mark.parametrize("rescale_every", [0, 1, 6])
def test_rwkv_weights_stay_what_they_are(rescale_every, tmp_path):
    model, ids = build("rwkv", rescale_every=rescale_every), tokens(2, 12)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    expected = model(ids).logits  # upstream rescales here
    lm = RecurrentLM(model)
    assert_close(lm(ids)[0], expected, 1e-4)
    for mode in (True, False):
        lm.train(mode)(ids)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert laws.round_trip(build("rwkv", rescale_every=rescale_every), ids, tmp_path).size == 0


# ---- xLSTM


def test_xlstm_in_training_mode_stops_at_any_token():
    """`mode = "train"` of a checkpoint needs whole chunks, and is only another way to the same numbers."""
    ids = tokens(2, 32)
    expected, state = lm_of("xlstm")(ids)
    lm = lm_of("xlstm", mode="train")
    logits, final = lm(ids)
    assert_close(logits, expected, 1e-5)
    assert laws.state_gap(final, state).size < 1e-5
    assert laws.chunking(lm, ids, [5, 1, 26]).size < 2e-5


def test_the_state_of_xlstm_is_the_memory_itself():
    """What is read hardly depends on the exponent, however it is set: m alone is no state."""
    lm, ids = lm_of("xlstm"), tokens(2, 9)
    state = laws.random_state(lm, 2)
    logits, _ = lm(ids, state)
    without = RecurrentState({k: t for k, t in state.items() if k.slot != 2})
    assert_close(lm(ids, without)[0], logits, 1e-4)
    assert (lm(ids)[0] - logits).abs().max() > 0.05 * logits.abs().max()


# ---- RecurrentGemma


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_scan_is_its_definition(shape):
    x, decay, state = random(shape, shape, (shape[0], shape[2]))

    def by_definition(x, decay, state):
        h = torch.zeros_like(x)
        for t in range(x.shape[1]):
            h = h + torch.cat(
                [
                    0 * h[:, :t],
                    (decay[:, t] * (h[:, t - 1] if t else state) + x[:, t])[:, None],
                    0 * h[:, t + 1 :],
                ],
                1,
            )
        return h, h[:, -1]

    for actual, expected in zip(
        gradients_of(linear_scan, x, decay, state), gradients_of(by_definition, x, decay, state), strict=True
    ):
        assert_close(actual, expected, 1e-10)


@torch.no_grad()
def test_recurrent_gemma_reads_on_and_starts_anew():
    """At a later position the state decays into a scaled input; at position 0 the input enters whole."""
    lm, ids = lm_of("recurrent_gemma"), tokens(2, 20)
    full, _ = lm(ids)
    _, state = lm(ids[:, :9])
    assert_close(lm(ids[:, 9:], state)[0], full[:, 9:], 1e-5)
    passed = state.part("recurrent", "conv")
    assert passed.seen == 0 and StateKey(1, "attention", 0) not in passed
    restarted, _ = lm(ids[:, 9:], passed)
    fresh, _ = lm(ids[:, 9:])
    assert (restarted - fresh)[:, 0].abs().max() > 1e-3 * fresh.abs().max()
    assert torch.equal(lm(ids[:, 9:], passed.map(torch.zeros_like))[0], fresh)


# ---- Qwen4-Exp and ZAYA: what is remembered but is no state


@torch.no_grad()
@pytest.mark.parametrize(("name", "kinds"), [("qwen4_exp", {torch.int64}), ("zaya", {torch.float32})])
def test_what_cannot_be_zero_is_context(name, kinds):
    lm = lm_of(name)
    _, state = lm(tokens(2, 20))
    context = [t for key, t in state.items() if key.part == "attention" and key.slot > 2]
    assert {t.dtype for t in context} == kinds
    assert all(t.is_floating_point() for t in state.part("recurrent", "conv").values())


@torch.no_grad()
def test_zaya_with_biases_starts_at_them():
    """The previous token's value starts at a bias, not at zero: the zero state says nothing of it."""
    model = build("zaya", attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("v_proj_delayed.bias"):
            parameter.add_(1)
    lm = RecurrentLM(model)
    assert laws.zero_state(lm, tokens(2, 9)).size == 0
    assert laws.chunking(lm, tokens(2, 9), [1, 4, 4]).size < 2e-5
