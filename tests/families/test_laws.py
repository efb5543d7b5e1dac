"""Laws 1, 2 and 3 of the state protocol, over every family."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from longroll.errors import LongrollError
from longroll.families import _dispatch
from longroll.families._cache import StateCache
from longroll.model import RecurrentLM
from longroll.state import RecurrentState
from zoo import (
    CONFIGS,
    CONTROLS,
    RECURRENT,
    VOCAB,
    assert_close,
    assert_same_state,
    build,
    lm_of,
    random_state,
    tokens,
)

few = settings(max_examples=5, deadline=None, derandomize=True)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-6}  # transformers' norms are float32 in any model
splits = st.lists(st.one_of(st.just(1), st.integers(1, 40)), min_size=1, max_size=5)
every_family = pytest.mark.parametrize("name", CONFIGS)
every_recurrent = pytest.mark.parametrize("name", RECURRENT)
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def read(lm, ids, pieces, state=None, *, detach=False):
    """Logits (B, T, V) and the final state of `ids` read piece by piece."""
    logits = []
    for piece in ids.split(pieces, dim=1):
        if state is not None and detach:
            state = state.detach()
        out, state = lm(piece, state)
        logits.append(out)
    return torch.cat(logits, dim=1), state


# ---- law 1: any chunking is the full forward


@every_family
@both_dtypes
@torch.no_grad()
def test_any_chunking_is_the_full_forward(name, dtype):
    lm = lm_of(name, dtype=dtype)

    @few
    @given(splits, st.integers(1, 3))
    def law(pieces, rows):
        ids = tokens(rows, sum(pieces))
        full, full_state = lm(ids)
        chunked, state = read(lm, ids, pieces)
        assert_close(chunked, full, TOLERANCE[dtype], "logits")
        assert_same_state(state, full_state, TOLERANCE[dtype])
        assert state.seen == sum(pieces)

    law()


@every_recurrent
@torch.no_grad()
def test_any_chunking_from_any_state(name):
    lm = lm_of(name)

    @few
    @given(splits)
    def law(pieces):
        ids, initial = tokens(2, sum(pieces)), random_state(lm, 2)
        full, full_state = lm(ids, initial)
        chunked, state = read(lm, ids, pieces, initial)
        assert_close(chunked, full, 2e-5, "logits")
        assert_same_state(state, full_state, 2e-5)

    law()


@every_family
@torch.no_grad()
def test_the_past_matters_in_these_models(name):
    """The power of the law above: a model that ignored its state would not pass."""
    lm = lm_of(name)
    ids = tokens(2, 60)
    full, _ = lm(ids)
    assert (lm(ids[:, 30:])[0] - full[:, 30:]).abs().mean() > 0.01 * full.abs().mean()


# ---- law 2: segments chained without detach give the full gradient


def gradients(lm, ids, pieces, *, detach=False):
    """Gradients of the mean cross-entropy into every weight and the input embeddings."""
    lm.zero_grad(set_to_none=True)
    table = lm.model.get_input_embeddings()
    embedded = []

    def keep(_module, _inputs, output):
        output = output.detach().requires_grad_()
        embedded.append(output)
        return output

    hook = table.register_forward_hook(keep)
    logits, _ = read(lm, ids[:, :-1], pieces, detach=detach)
    hook.remove()
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    grads = {key: p.grad.clone() for key, p in lm.model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, torch.cat([e.grad for e in embedded], dim=1)


@every_recurrent
@both_dtypes
def test_chained_segments_give_the_full_gradient(name, dtype):
    lm = lm_of(name, dtype=dtype)
    tolerance = 10 * TOLERANCE[dtype]

    @few
    @given(splits.filter(lambda pieces: len(pieces) > 1))
    def law(pieces):
        ids = tokens(2, sum(pieces) + 1)
        _, full, full_inputs = gradients(lm, ids, [sum(pieces)])
        _, chained, chained_inputs = gradients(lm, ids, pieces)
        assert chained.keys() == full.keys()
        for key in full:
            assert_close(chained[key], full[key], tolerance, key)
        assert_close(chained_inputs, full_inputs, tolerance, "input embeddings")

    law()


@every_recurrent
def test_a_detached_boundary_moves_the_gradient(name):
    lm = lm_of(name)
    ids = tokens(2, 33)
    loss, chained, inputs = gradients(lm, ids, [16, 16])
    detached_loss, detached, detached_inputs = gradients(lm, ids, [16, 16], detach=True)
    assert torch.equal(loss, detached_loss)
    assert any((detached[k] - chained[k]).abs().max() > 0.01 * chained[k].abs().max() for k in chained)
    assert (detached_inputs - inputs)[:, :16].abs().max() > 0.01 * inputs.abs().max()
    assert_close(detached_inputs[:, 16:], inputs[:, 16:], 1e-6)


@every_recurrent
def test_gradient_checkpointing_changes_nothing(name):
    lm = lm_of(name)
    lm.train()
    ids = tokens(2, 33)
    plain = gradients(lm, ids, [16, 1, 15])
    lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert lm.model.is_gradient_checkpointing
    recomputed = gradients(lm, ids, [16, 1, 15])
    assert torch.equal(plain[0], recomputed[0])
    for key in plain[1]:
        assert_close(recomputed[1][key], plain[1][key], 1e-6, key)
    assert_close(recomputed[2], plain[2], 1e-6, "input embeddings")


@every_recurrent
def test_a_state_enters_through_gradient_checkpointing(name):
    lm = lm_of(name)
    lm.train()
    ids, initial = tokens(2, 20), random_state(lm, 2)
    plain, plain_state = lm(ids, initial)
    lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    leaves = initial.map(lambda t: t.clone().requires_grad_())
    logits, state = lm(ids, leaves)
    assert torch.equal(logits, plain)
    assert_same_state(state.detach(), plain_state.detach())
    assert not torch.allclose(logits, lm(ids)[0], atol=1e-3)
    logits.square().mean().backward()
    assert all(leaf.grad.abs().max() > 0 for leaf in leaves.values())


# ---- law 3: zero state is no state; permuting rows permutes states; save -> load is bit-exact


@every_recurrent
@both_dtypes
@torch.no_grad()
def test_the_zero_state_is_no_state(name, dtype):
    lm = lm_of(name, dtype=dtype)
    ids = tokens(3, 21)
    zero = lm.zero_state(3)
    logits, state = lm(ids)
    from_zero, zero_final = lm(ids, zero)
    assert torch.equal(from_zero, logits)
    assert_same_state(zero_final, state)
    assert state.keys() == zero.keys()
    for key in state:
        assert (state[key].shape, state[key].dtype) == (zero[key].shape, zero[key].dtype)
    assert_same_state(lm(ids, RecurrentState({}))[1], state)
    recurrent_only, _ = lm(ids, zero.part("recurrent"))  # a missing part is a zero part
    assert torch.equal(recurrent_only, logits)


@every_family
@torch.no_grad()
def test_permuting_rows_permutes_states(name):
    lm = lm_of(name)
    ids = tokens(4, 30)
    _, state = lm(ids[:, :17])
    expected, expected_state = lm(ids[:, 17:], state)

    @few
    @given(st.permutations(range(4)))
    def law(order):
        order = list(order)
        logits, final = lm(ids[order, 17:], state.rows(order))
        assert_close(logits, expected[order], 1e-5, "logits")
        assert_same_state(final, expected_state.rows(order), 1e-5)

    law()


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_saved_state_goes_on_the_same(name, dtype, tmp_path):
    lm = lm_of(name, dtype=dtype)
    ids = tokens(2, 30)
    _, state = lm(ids[:, :17])
    state.save(tmp_path / "state.safetensors")
    loaded = RecurrentState.load(tmp_path / "state.safetensors")
    assert_same_state(loaded, state)
    assert torch.equal(lm(ids[:, 17:], loaded)[0], lm(ids[:, 17:], state)[0])


# ---- pure: the state is read, never written


@every_family
@pytest.mark.parametrize("length", [1, 2, 25])
def test_the_state_is_never_written(name, length):
    lm = lm_of(name)
    _, state = lm(tokens(2, 20))
    state = state.detach()
    before = state.map(torch.clone)
    ids = tokens(2, length, seed=1)
    first, _ = lm(ids, state)
    again, _ = lm(ids, state)
    again.mean().backward()
    assert torch.equal(first, again)
    assert_same_state(state, before)


@every_recurrent
@pytest.mark.parametrize("length", [1, 2, 25])
def test_gradients_reach_the_initial_state(name, length):
    lm = lm_of(name)
    leaves = random_state(lm, 2).map(lambda t: t.requires_grad_())
    before = leaves.detach().map(torch.clone)
    logits, final = lm(tokens(2, length), leaves)
    (logits.square().mean() + sum(t.square().mean() for t in final.values())).backward()
    for key, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.abs().max() > 0, key
        assert torch.equal(leaf.detach(), before[key])


# ---- the users' own models, bit for bit


@every_family
@torch.no_grad()
def test_logits_are_transformers_own(name):
    model, ids = build(name), tokens(2, 50)
    expected = model(ids).logits
    lm = RecurrentLM(model)
    logits, _ = lm(ids)
    hidden, _ = lm(ids, logits=False)
    assert_close(logits, expected, 2e-5)
    assert torch.equal(lm.head(hidden), logits)
    # the model itself is as it was for whoever calls it without longroll
    assert torch.equal(model(ids).logits, expected)


@pytest.fixture
def unpatched():
    """transformers' modules as imported, whatever other tests did to them; patched again afterwards."""
    patched = []
    for module_name in ("mamba", "falcon_mamba", "mamba2"):
        module = importlib.import_module(f"transformers.models.{module_name}.modeling_{module_name}")
        for function in _dispatch._ADAPTERS:
            current = getattr(module, function, None)
            if hasattr(current, "_longroll"):
                patched.append((module, function, current))
                setattr(module, function, current.args[-1])
    yield
    for module, function, current in patched:
        setattr(module, function, current)


@every_recurrent
def test_models_not_opened_by_longroll_compute_as_before(name, unpatched):
    model, ids = build(name), tokens(2, 24)

    def everything():
        model.zero_grad()
        out = model(ids, labels=ids)
        out.loss.backward()
        generated = model.generate(ids[:, :8], max_new_tokens=6, do_sample=False)
        return [out.logits.detach(), generated, *[p.grad.clone() for p in model.parameters()]]

    before = everything()
    opened = lm_of(name, seed=1)  # patches the modeling module
    module = importlib.import_module(type(model).__module__)
    assert any(hasattr(getattr(module, f, None), "_longroll") for f in _dispatch._ADAPTERS)
    state = opened(ids)[1].detach()
    opened(ids, state)
    for was, now in zip(before, everything(), strict=True):
        assert torch.equal(was, now)


@every_recurrent
@torch.no_grad()
def test_a_forward_that_died_leaves_nothing_behind(name, monkeypatch):
    model, opened, ids = build(name), lm_of(name, seed=1), tokens(2, 24)
    expected, state = model(ids).logits, random_state(opened, 2)

    def die(*_, **__):
        raise KeyboardInterrupt

    for function in ("short_conv", "selective_scan", "ssd"):
        with monkeypatch.context() as patch:
            patch.setattr(_dispatch.ops, function, die)
            if function == "short_conv" or (function == "ssd") == name.startswith("mamba2"):
                with pytest.raises(KeyboardInterrupt):
                    opened(ids, state)
        assert torch.equal(model(ids).logits, expected)


def test_patching_twice_is_patching_once():
    lm_of("mamba2")
    module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    once = module.mamba2_chunk_scan
    lm_of("mamba2", seed=1)
    assert module.mamba2_chunk_scan is once
    assert not hasattr(once.args[-1], "_longroll")


# ---- what a RecurrentLM says of itself


@every_recurrent
def test_layers_describe_the_state(name):
    lm = lm_of(name)
    _, state = lm(tokens(3, 5))
    assert [layer.layer for layer in lm.layers] == [0, 1]
    for layer in lm.layers:
        tensor = next(t for k, t in state.items() if k.layer == layer.layer and k.part == "recurrent")
        assert tensor.shape == (3, *layer.shape) and layer.heads == layer.shape[0]
        assert layer.kind == ("mamba2" if name.startswith("mamba2") else "mamba")
    assert lm.vocab_size == VOCAB


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_have_no_recurrent_layers(name):
    lm = lm_of(name)
    assert lm.layers == [] and len(lm.zero_state(2)) == 0
    assert lm.train_length == (256 if name == "gpt2" else 512)


def test_learned_positions_end_where_they_end():
    lm = lm_of("gpt2", n_positions=16)
    _, state = lm(tokens(1, 16))
    with pytest.raises(LongrollError, match="16 positions and was asked for 17"):
        lm(tokens(1, 1), state)


# ---- the self-check refuses what would give wrong numbers


@every_family
def test_self_check_passes_and_leaves_the_mode(name):
    for dtype in (torch.float32, torch.bfloat16):
        lm = lm_of(name, dtype=dtype)
        lm.train()
        lm.self_check()
        assert lm.training


@every_recurrent
@pytest.mark.parametrize("layer", [0, 1])
def test_self_check_names_the_layer_that_ignores_its_state(name, layer, monkeypatch):
    honest = StateCache.get_recurrent_state

    def forgetful(self, layer_idx, state_idx=0):
        if layer_idx == layer:
            self.initial = RecurrentState(
                {k: t for k, t in self.initial.items() if k[:2] != (layer, "recurrent")},
                seen=self.initial.seen,
            )
        return honest(self, layer_idx, state_idx)

    lm = lm_of(name)
    monkeypatch.setattr(StateCache, "get_recurrent_state", forgetful)
    with pytest.raises(LongrollError, match=f"self-check at layer {layer}, recurrent state"):
        lm.self_check()


def test_self_check_names_a_dropped_conv_tail(monkeypatch):
    lm = lm_of("mamba")
    monkeypatch.setattr(
        StateCache,
        "final",
        lambda self, tokens: RecurrentState(
            {k: torch.zeros_like(t) if k[:2] == (1, "conv") else t for k, t in self._final.items()},
            seen=self.initial.seen + tokens,
        ),
    )
    with pytest.raises(LongrollError, match="self-check at layer 1"):
        lm.self_check()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_self_check_refuses_weights_that_are_no_numbers(bad):
    lm = lm_of("mamba2")
    with torch.no_grad():
        lm.model.backbone.layers[1].mixer.D[2] = bad
    with pytest.raises(LongrollError, match=r"layers\.1\.mixer\.D holds NaN or infinity"):
        lm.self_check()
