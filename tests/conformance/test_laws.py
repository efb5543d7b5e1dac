"""Laws 1 to 4 and 6 of the state protocol, over every family; and what a RecurrentLM says of itself."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longroll.conformance import laws
from longroll.conformance.tiny import every_expert
from longroll.errors import LongrollError
from longroll.families import _dispatch, family_of
from longroll.families._cache import StateCache
from longroll.interventions import INTERVENTIONS
from longroll.model import RecurrentLM
from longroll.state import RecurrentState
from zoo import (
    CONTROLS,
    EVERY,
    RECURRENT,
    VOCAB,
    build,
    lm_of,
    tokens,
)

FAMILY = {name: family_of(model_type) for name, (model_type, _) in EVERY.items()}
OURS = [name for name in EVERY if FAMILY[name].op]  # else transformers computes in float32 whatever the dtype
STATEFUL = [name for name in EVERY if FAMILY[name].kind != "attention"]
WITH_RECURRENCE = [name for name in EVERY if FAMILY[name].recurrent]

TOLERANCE = laws.TOLERANCE
few = settings(max_examples=4, deadline=None, derandomize=True)
splits = st.lists(st.one_of(st.just(1), st.integers(1, 40)), min_size=1, max_size=5)
every_family = pytest.mark.parametrize("name", EVERY)
every_stateful = pytest.mark.parametrize("name", STATEFUL)
every_family_and_dtype = pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in EVERY] + [(name, torch.float64) for name in OURS],
    ids=lambda value: str(value).removeprefix("torch."),
)
every_stateful_and_dtype = pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in STATEFUL] + [(name, torch.float64) for name in OURS],
    ids=lambda value: str(value).removeprefix("torch."),
)


def assert_holds(gap: laws.Gap, tolerance: float = 0.0) -> None:
    """A gap is no wider than the tolerance; 0: bit for bit."""
    assert gap.size <= tolerance, f"{gap.where}: {gap.size:.1e} > {tolerance:.0e}"


# ---- law 1: any chunking is the full forward


@every_family_and_dtype
def test_any_chunking_is_the_full_forward(name, dtype):
    lm = lm_of(name, dtype=dtype)

    @few
    @given(splits, st.integers(1, 3))
    def law(pieces, rows):
        assert_holds(laws.chunking(lm, tokens(rows, sum(pieces)), pieces), TOLERANCE[dtype])

    law()


@pytest.mark.parametrize("name", OURS)
def test_bfloat16_is_float32_but_for_rounding(name):
    rounded, exact = (
        RecurrentLM(build(name, dtype=dtype, **every_expert(name)))
        for dtype in (torch.bfloat16, torch.float32)
    )
    pieces = [30, 1, 27, 2]  # a state lost last shows most
    assert_holds(laws.rounding(rounded, exact, tokens(2, sum(pieces)), pieces), laws.TO_FLOAT32)


@every_stateful
def test_any_chunking_from_any_state(name):
    lm = lm_of(name)

    @few
    @given(splits)
    def law(pieces):
        state = laws.random_state(lm, 2)
        assert_holds(laws.chunking(lm, tokens(2, sum(pieces)), pieces, state), TOLERANCE[torch.float32])

    law()


@every_family
@torch.no_grad()
def test_the_past_matters_in_these_models(name):
    """The power of the law above: a model that ignored its state would not pass."""
    lm = lm_of(name)
    ids = tokens(2, 60)
    full, state = lm(ids)
    assert state.seen == 60
    assert (lm(ids[:, 30:])[0] - full[:, 30:]).abs().mean() > 0.01 * full.abs().mean()


@pytest.mark.parametrize("name", STATEFUL)
def test_states_hold_no_more_memory_than_they_need(name):
    _, state = lm_of(name)(tokens(2, 60))
    for key, tensor in state.part("recurrent", "conv").items():
        assert tensor.untyped_storage().nbytes() <= 2 * tensor.nbytes, key


# ---- law 2: segments chained without detach give the full gradient


@every_stateful_and_dtype
def test_chained_segments_give_the_full_gradient(name, dtype):
    lm = lm_of(name, dtype=dtype)

    @few
    @given(splits.filter(lambda pieces: len(pieces) > 1))
    def law(pieces):
        assert_holds(laws.chaining(lm, tokens(2, sum(pieces) + 1), pieces), 10 * TOLERANCE[dtype])

    law()


@every_stateful
def test_a_detached_boundary_moves_the_gradient(name):
    lm = lm_of(name)
    ids = tokens(2, 33)
    chained = laws.gradients(lm, ids, [16, 16])
    detached = laws.gradients(lm, ids, [16, 16], detach=True)
    assert torch.equal(chained.loss, detached.loss)
    assert laws.gradient_gap(detached, chained).size > 0.01
    moved, stayed = (chained.embeddings - detached.embeddings).abs().split(16, dim=1)
    assert moved.max() > 0.01 * chained.embeddings.abs().max()
    assert stayed.max() <= 1e-6 * chained.embeddings.abs().max()


@every_stateful
def test_gradient_checkpointing_changes_nothing(name):
    assert_holds(laws.checkpointing(lm_of(name), tokens(2, 33), [16, 1, 15]), 1e-6)


@every_stateful
@pytest.mark.parametrize("length", [1, 2, 25])
def test_gradients_reach_the_initial_state(name, length):
    lm = lm_of(name)
    assert laws.unreached(lm, tokens(2, length), laws.random_state(lm, 2)) == []


@every_stateful
def test_a_state_enters_through_gradient_checkpointing(name):
    lm = lm_of(name).train()
    ids, state = tokens(2, 20), laws.random_state(lm, 2)
    plain, final = lm(ids, state)
    lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert lm.model.is_gradient_checkpointing
    logits, recomputed = lm(ids, state)
    assert torch.equal(logits, plain)
    assert_holds(laws.state_gap(recomputed, final))
    assert not torch.allclose(logits, lm(ids)[0], atol=1e-3)
    assert laws.unreached(lm, ids, state, checkpoint=True) == []


# ---- law 3: zero state is no state; permuting rows permutes states; save -> load is bit-exact


@every_stateful_and_dtype
@pytest.mark.parametrize("length", [1, 21])
def test_the_zero_state_is_no_state(name, dtype, length):
    exact = name in OURS or FAMILY[name].kind == "conv"  # else one token, or a state, goes another way
    assert_holds(laws.zero_state(lm_of(name, dtype=dtype), tokens(3, length)), 0 if exact else 1e-5)


@every_family
def test_permuting_rows_permutes_states(name):
    lm = lm_of(name)

    @few
    @given(st.permutations(range(4)))
    def law(order):
        assert_holds(laws.permutation(lm, tokens(4, 30), 17, order), 1e-5)

    law()


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_state_goes_on_the_same(name, dtype, tmp_path):
    assert_holds(laws.saving(lm_of(name, dtype=dtype), tokens(2, 30), 17, tmp_path))


# ---- law 4: an intervention that yields the zero state trains as none does


@every_stateful
def test_a_zero_intervention_is_none(name):
    assert_holds(laws.zero_intervention(lm_of(name), tokens(2, 20)), 0)


# ---- law 6: a checkpoint in is a checkpoint out; and the numbers are the users' own model's


@every_family
def test_a_checkpoint_in_is_a_checkpoint_out(name, tmp_path):
    assert_holds(laws.round_trip(build(name), tokens(2, 30), tmp_path))


@every_family
@torch.no_grad()
def test_logits_are_transformers_own(name):
    model, ids = build(name), tokens(2, 50)
    expected = model(ids, use_cache=False).logits
    assert_holds(laws.own_logits(model, ids), TOLERANCE[torch.float32])
    # the model itself is as it was for whoever calls it without longroll
    assert torch.equal(model(ids, use_cache=False).logits, expected)


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
    assert_holds(laws.state_gap(state, before))


# ---- hybrids: what attention remembers rolls out, and a new sequence starts without it


@pytest.mark.parametrize("name", WITH_RECURRENCE)
@pytest.mark.parametrize("kind", sorted(INTERVENTIONS))
def test_interventions_leave_attention_alone(name, kind):
    """A new sequence starts from the recurrent and conv state alone, at position 0, and the state tells."""
    lm = lm_of(name)
    options = {} if kind == "random" else {"conv": True}
    intervention = INTERVENTIONS[kind](seed=1, **options)
    ids = {"input_ids": tokens(2, 12), "starts": torch.zeros(2)}
    intervention.observe(lm(ids["input_ids"])[1])
    state = intervention.initial_state(ids)
    assert state.seen == 0
    assert {key.part for key in state} <= {"recurrent", "conv"}
    assert all(t.is_floating_point() for t in state.values())
    logits, final = lm(ids["input_ids"], state)
    fresh, fresh_final = lm(ids["input_ids"])
    assert final.seen == 12
    assert {k: t.shape for k, t in final.items()} == {k: t.shape for k, t in fresh_final.items()}
    assert (logits - fresh)[:, 0].abs().max() > 1e-4 * fresh.abs().max()  # it enters before the first token
    cut, (first, second) = 5, ids["input_ids"].split([5, 7], dim=1)
    chunked, _ = laws.read(lm, torch.cat([first, second], 1), [cut, 7], state)
    assert_holds(laws.gap(chunked, logits, "logits"), 2e-5)


@pytest.mark.parametrize("name", [n for n in EVERY if "inkling" in n])
@torch.no_grad()
def test_a_sliding_window_keeps_what_the_next_token_sees(name):
    lm = lm_of(name)
    _, state = lm(tokens(1, 30))
    lengths = {t.shape[-2] for key, t in state.items() if key.part == "attention"}
    assert lengths == {7, 30}  # window - 1, and everything


# ---- models that longroll did not open


@pytest.fixture
def unpatched():
    """transformers' modules as imported, whatever other tests did to them; patched again afterwards."""
    patched = []
    for module_name in {model_type for model_type, _ in EVERY.values()}:
        try:
            module = importlib.import_module(f"transformers.models.{module_name}.modeling_{module_name}")
        except ImportError:
            continue
        for function in _dispatch._ADAPTERS:
            current = getattr(module, function, None)
            if hasattr(current, "_longroll"):
                patched.append((module, function, current))
                setattr(module, function, current.args[-1])
    yield
    for module, function, current in patched:
        setattr(module, function, current)


@pytest.mark.parametrize("name", [*RECURRENT, "jamba", "zamba", "bamba"])
def test_models_not_opened_by_longroll_compute_as_before(name, unpatched):
    model, ids = build(name), tokens(2, 24)

    def everything():
        model.zero_grad()
        out = model(ids, labels=ids)
        out.loss.backward()
        generated = model.generate(ids[:, :8], max_new_tokens=6, do_sample=False)
        return [
            out.logits.detach(),
            generated,
            *[p.grad.clone() for p in model.parameters() if p.grad is not None],
        ]

    before = everything()
    opened = lm_of(name, seed=1)  # patches the modeling module
    module = importlib.import_module(type(model).__module__)
    assert any(hasattr(getattr(module, f, None), "_longroll") for f in _dispatch._ADAPTERS)
    state = opened(ids)[1].detach()
    opened(ids, state)
    for was, now in zip(before, everything(), strict=True):
        assert torch.equal(was, now)


@pytest.mark.parametrize("name", [*RECURRENT, "jamba", "zamba", "bamba"])
@torch.no_grad()
def test_a_forward_that_died_leaves_nothing_behind(name, monkeypatch):
    model, opened, ids = build(name), lm_of(name, seed=1), tokens(2, 24)
    expected, state = model(ids).logits, laws.random_state(opened, 2)

    def die(*_, **__):
        raise KeyboardInterrupt

    for function in ("short_conv", "selective_scan", "ssd"):
        with monkeypatch.context() as patch:
            patch.setattr(_dispatch.ops, function, die)
            if function in ("short_conv", FAMILY[name].op):
                with pytest.raises(KeyboardInterrupt):
                    opened(ids, state)
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "jamba"])
def test_an_activation_that_the_ops_have_not_is_refused(name):
    with pytest.raises(LongrollError, match="'gelu' after its short convolution"):
        lm_of(name, hidden_act="gelu")


def test_patching_twice_is_patching_once():
    lm_of("mamba2")
    module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    once = module.mamba2_chunk_scan
    lm_of("mamba2", seed=1)
    assert module.mamba2_chunk_scan is once
    assert not hasattr(once.args[-1], "_longroll")


# ---- what a RecurrentLM says of itself


@every_stateful
def test_layers_describe_the_state(name):
    lm = lm_of(name)
    _, state = lm(tokens(3, 5))
    keys = [key for key in state if key.part == "recurrent"]
    assert [layer.layer for layer in lm.layers] == [key.layer for key in keys]
    assert bool(keys) == FAMILY[name].recurrent
    for layer, key in zip(lm.layers, keys, strict=True):
        assert state[key].shape == (3, *layer.shape) and layer.heads == layer.shape[0]
        assert layer.kind == FAMILY[name].kind
    assert lm.vocab_size >= VOCAB
    assert all((state[key] != 0).any() for key in lm.zero_state(1))


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_have_no_recurrent_layers(name):
    lm = lm_of(name)
    assert lm.layers == [] and len(lm.zero_state(2)) == 0
    assert lm.train_length == (256 if name == "gpt2" else 512)


def test_train_length_is_what_the_config_says():
    assert lm_of("mamba2", train_length=128).train_length == 128
    assert lm_of("rwkv", context_length=33).train_length == 33
    assert lm_of("mamba2").train_length is None


@pytest.mark.parametrize("name", ["zamba2", "jamba", "lfm2", "gla", "rwkv7", "qwen3_next"])
def test_positions_that_attention_may_reach_are_no_training_length(name):
    lm = lm_of(name, max_position_embeddings=262_144)
    assert lm.train_length is None
    with pytest.raises(LongrollError, match=r"max_position_embeddings 262144 .* give `train_length`"):
        lm.find_train_length()
    assert lm.find_train_length(77) == (77, "as given")
    assert lm_of(name, train_length=33).find_train_length() == (33, "train_length in the model's config")


def test_learned_positions_end_where_they_end():
    lm = lm_of("gpt2", n_positions=16)
    _, state = lm(tokens(1, 16))
    with pytest.raises(LongrollError, match="16 positions and was asked for 17"):
        lm(tokens(1, 1), state)


def test_an_unknown_family_is_refused_with_those_that_are_known():
    with pytest.raises(LongrollError, match=r"'t5' is not one .* mamba2, .*qwen3_next.*llama"):
        family_of("t5")


# ---- the self-check refuses what would give wrong numbers


@every_family
def test_self_check_passes_and_leaves_the_mode(name):
    for dtype in (torch.float32, torch.bfloat16):
        lm = lm_of(name, dtype=dtype)
        lm.train()
        lm.self_check()
        assert lm.training


@pytest.mark.parametrize(
    ("name", "layer", "dtype"),
    [(name, layer, torch.float32) for name in (*RECURRENT, "qwen3_5_recurrent") for layer in (0, 1)]
    + [(name, layer, torch.bfloat16) for name in ("jamba", "granitemoehybrid") for layer in (0, 2)],
    ids=str,
)
def test_self_check_names_the_layer_that_ignores_its_state(name, layer, dtype, monkeypatch):
    honest = StateCache.__init__

    def forgetful(self, config, initial, **options):
        if initial is not None:
            kept = {k: t for k, t in initial.items() if k[:2] != (layer, "recurrent")}
            initial = RecurrentState(kept, seen=initial.seen)
        honest(self, config, initial, **options)

    lm = lm_of(name, dtype=dtype)
    if dtype == torch.bfloat16:  # where experts may flip, only the loss of much memory is told from it
        for parameter in [p for n, p in lm.named_parameters() if "A_log" in n]:
            parameter.data.sub_(4)
    monkeypatch.setattr(StateCache, "__init__", forgetful)
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
