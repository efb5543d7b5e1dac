import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longroll import (
    TBPTT,
    FittedNoise,
    LongrollError,
    RandomNoise,
    RecurrentState,
    StateKey,
    StatePassing,
    ranks,
)
from longroll.interventions import INTERVENTIONS, Intervention, intervention_of
from zoo import assert_same_state

few = settings(max_examples=10, deadline=None, derandomize=True)
every = pytest.mark.parametrize("kind", INTERVENTIONS.values(), ids=INTERVENTIONS.keys())
H, CONV = StateKey(0, "recurrent"), StateKey(0, "conv")


def final_state(rows=4, seed=0, scale=1.0, shift=0.0, kv=True):
    """What a forward might leave: two recurrent layers, their conv tails, the KV of a third; on a graph."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        tensor = torch.randn(rows, *shape, generator=generator) * scale + shift
        return tensor.requires_grad_() * 1

    tensors = {}
    for layer in (0, 1):
        tensors[StateKey(layer, "recurrent")] = noise(3, 5, 7)
        tensors[StateKey(layer, "conv")] = noise(6, 4)
    if kv:
        tensors[StateKey(2, "attention", 0)] = noise(2, 9, 4)
    return RecurrentState(tensors, seen=9)


def batch(rows=4, starts=None):
    starts = torch.zeros(rows, dtype=torch.bool) if starts is None else torch.tensor(starts)
    return {"input_ids": torch.zeros(rows, 8, dtype=torch.long), "starts": starts}


# ---- all four


@every
def test_the_first_batch_starts_from_zero(kind):
    assert kind().initial_state(batch()) is None


@every
def test_states_are_fresh_ones_without_kv_or_graph(kind):
    intervention = kind(conv=True)
    final = final_state()
    before = final.detach().map(torch.clone)
    intervention.observe(final)
    state = intervention.initial_state(batch())
    assert {key.part for key in state} == {"recurrent", "conv"}
    assert state.seen == 0
    for key, tensor in state.items():
        assert tensor.shape == final[key].shape and tensor.dtype == final[key].dtype
        assert not tensor.requires_grad
    assert_same_state(final.detach(), before)


@every
def test_conv_is_an_option(kind):
    intervention = kind(conv=False)
    intervention.observe(final_state())
    assert {key.part for key in intervention.initial_state(batch())} == {"recurrent"}


def test_conv_tails_are_noised_only_when_asked():
    random = RandomNoise()
    random.observe(final_state())
    assert {key.part for key in random.initial_state(batch())} == {"recurrent"}


@every
@pytest.mark.parametrize("probability", [0.25, 1.0])
def test_zero_probability_is_that_of_a_row(kind, probability):
    intervention = kind(zero_probability=probability, seed=3)
    intervention.observe(final_state(rows=1000, shift=5.0))
    state = intervention.initial_state(batch(1000))
    zero = torch.stack([t.flatten(1).abs().amax(1) == 0 for t in state.values()])
    assert (zero == zero[0]).all()  # a row is zero in all its tensors or in none
    assert zero[0].float().mean().item() == pytest.approx(probability, abs=0.05)
    again = intervention.initial_state(batch(1000))
    if probability < 1:
        assert not torch.equal(zero[0], again[H].flatten(1).abs().amax(1) == 0)


@every
def test_draws_do_not_touch_the_global_generator(kind):
    intervention = kind(zero_probability=0.5)
    intervention.observe(final_state())
    torch.manual_seed(1)
    before = torch.get_rng_state()
    intervention.initial_state(batch())
    assert torch.equal(torch.get_rng_state(), before)


@every
def test_the_seed_tells_the_draws(kind):
    def run(seed):
        intervention = kind(zero_probability=0.5, seed=seed)
        intervention.observe(final_state(rows=64))
        return intervention.initial_state(batch(64))

    assert_same_state(run(1), run(1))
    assert not torch.equal(run(1)[H], run(2)[H])


@every
@pytest.mark.parametrize("conv", [True, False])
def test_a_loaded_state_dict_goes_on_identically(kind, conv, tmp_path):
    def step(intervention, number):
        state = intervention.initial_state(batch(4, [number % 2 == 0, False, False, True]))
        intervention.observe(final_state(seed=number, shift=number))
        return state

    never_killed = kind(zero_probability=0.3, conv=conv, seed=5)
    for number in range(3):
        step(never_killed, number)
    torch.save(never_killed.state_dict(), tmp_path / "memory.pt")
    resumed = kind(zero_probability=0.3, conv=conv, seed=99)  # the seed too comes from the file
    resumed.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    for number in range(3, 8):
        assert_same_state(step(resumed, number), step(never_killed, number))


@every
def test_a_state_dict_of_a_fresh_intervention_loads(kind):
    intervention = kind(zero_probability=0.5, seed=4)
    intervention.load_state_dict(kind(zero_probability=0.5, seed=4).state_dict())
    assert intervention.initial_state(batch()) is None
    other = kind(zero_probability=0.5, seed=4)
    for one in (intervention, other):
        one.observe(final_state(rows=32))
    assert_same_state(intervention.initial_state(batch(32)), other.initial_state(batch(32)))


@every
def test_loading_before_the_first_use_or_saving_before_it_loses_no_draws(kind):
    """A run killed again before its first step after a resume."""
    first = kind(zero_probability=0.5, seed=4)
    first.observe(final_state(rows=32))
    first.initial_state(batch(32))
    second, third = kind(zero_probability=0.5), kind(zero_probability=0.5)
    second.load_state_dict(first.state_dict())
    third.load_state_dict(second.state_dict())
    assert_same_state(third.initial_state(batch(32)), first.initial_state(batch(32)))


@every
@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_no_probability(kind, probability):
    with pytest.raises(LongrollError, match="`zero_probability`"):
        kind(zero_probability=probability)


@every
def test_a_batch_may_be_of_another_size(kind):
    for rows in (1, 3, 4, 6):
        intervention = kind()
        intervention.observe(final_state(rows=4))
        assert intervention.initial_state(batch(rows)).batch_size == rows


def test_names_are_those_of_the_command_line():
    assert list(INTERVENTIONS) == ["random", "fitted", "sp", "tbptt"]


def test_interventions_by_name():
    for name, kind in INTERVENTIONS.items():
        assert type(intervention_of(name)) is kind
    assert intervention_of("none") is None is intervention_of(None)
    with pytest.raises(LongrollError, match=r"'noise' is none of .*none\."):
        intervention_of("noise")


def test_an_intervention_must_choose():
    with pytest.raises(LongrollError, match="must say how"):
        Intervention().initial_state(torch.zeros(2, 3, dtype=torch.long))


# ---- state passing


@few
@given(st.lists(st.integers(1, 4), min_size=2, max_size=5))
def test_state_passing_hands_on_the_last_batch_exactly(sizes):
    passing = StatePassing()
    last = None
    for number, rows in enumerate(sizes):
        state = passing.initial_state(torch.zeros(rows, 8, dtype=torch.long))
        if last is not None:
            kept = last.detach().part("recurrent", "conv")
            assert_same_state(state, kept.rows([row % kept.batch_size for row in range(rows)]))
        last = final_state(rows=rows, seed=number)
        passing.observe(last)


@few
@given(st.integers(0, 99), st.sampled_from([0.3, 0.7, 1.0]))
def test_a_passed_state_waits_while_its_row_starts_from_zero(seed, probability):
    passing = StatePassing(zero_probability=probability, seed=seed)
    passing.observe(final_state(seed=100))
    waiting = final_state(seed=100).detach().part("recurrent", "conv")
    for number in range(6):
        state = passing.initial_state(batch())
        taken = state[H].flatten(1).any(1)
        assert_same_state(state, waiting.where(taken))
        final = final_state(seed=number).detach().part("recurrent", "conv")
        passing.observe(final)
        waiting = final.where(taken, waiting)
        assert_same_state(passing.passed, waiting)


def test_no_state_waits_for_the_rows_of_a_batch_of_another_size():
    passing = StatePassing(zero_probability=1.0)
    passing.observe(final_state(rows=4, seed=1))
    passing.initial_state(batch(3))
    last = final_state(rows=3, seed=2)
    passing.observe(last)
    assert_same_state(passing.passed, last.detach().part("recurrent", "conv"))


# ---- TBPTT


@few
@given(st.lists(st.booleans(), min_size=4, max_size=4))
def test_tbptt_sets_back_the_rows_that_begin_a_document(starts):
    tbptt, final = TBPTT(), final_state(shift=3.0)
    tbptt.observe(final)
    state = tbptt.initial_state(batch(4, starts))
    for key, tensor in state.items():
        for row, begins in enumerate(starts):
            expected = torch.zeros_like(tensor[row]) if begins else final[key][row].detach()
            assert torch.equal(tensor[row], expected)


def test_tbptt_goes_on_from_where_the_text_is_after_a_zero_by_chance():
    tbptt, last = TBPTT(zero_probability=0.5), None
    for number in range(10):
        state = tbptt.initial_state(batch())
        if number:
            for row in range(4):
                assert not state[H][row].any() or torch.equal(state[H][row], last[H][row])
        last = final_state(seed=number).detach()
        tbptt.observe(last)


def test_tbptt_sets_back_states_that_exploded():
    tbptt = TBPTT()
    tbptt.observe(final_state().map(lambda t: t * float("inf")))
    state = tbptt.initial_state(batch(4, [True] * 4))
    assert not any(tensor.any() for tensor in state.values())


@pytest.mark.parametrize("given", [torch.zeros(2, 8), {"input_ids": torch.zeros(2, 8)}])
def test_tbptt_asks_for_document_starts(given):
    with pytest.raises(LongrollError, match=r"longroll\.data\.Lanes"):
        TBPTT().initial_state(given)


# ---- random noise


@pytest.mark.parametrize("std", [0.0, 0.3, 4.0])
def test_random_noise_has_its_size_whatever_was_seen(std):
    random = RandomNoise(std, conv=True)
    random.observe(final_state(rows=2, scale=100.0, shift=50.0))
    state = random.initial_state(batch(2000))
    for tensor in state.values():
        assert tensor.mean().item() == pytest.approx(0, abs=0.03 * std + 1e-12)
        assert tensor.std().item() == pytest.approx(std, rel=0.02)
    if std:
        assert not torch.equal(state[H], random.initial_state(batch(2000))[H])
        assert not torch.equal(state[H][0], state[H][1])


@pytest.mark.parametrize("std", [-1.0, float("nan"), float("inf")])
def test_random_noise_of_no_size(std):
    with pytest.raises(LongrollError, match="`std`"):
        RandomNoise(std)


# ---- fitted noise


def moments(tensor):
    """Mean and mean square of each head, axis 1, directly."""
    heads = tensor.detach().double().transpose(0, 1).flatten(1)
    return heads.mean(1), heads.square().mean(1)


def test_fitted_noise_has_the_moments_of_each_layer_and_head():
    final = final_state(rows=8)
    factors = torch.tensor([0.1, 1.0, 10.0]).view(1, 3, 1, 1)
    final = final.map(lambda t: t * factors + factors if t.ndim == 4 and t.shape[1] == 3 else t * 2)
    fitted = FittedNoise()
    fitted.observe(final)
    state = fitted.initial_state(batch(3000))
    for key, tensor in state.items():
        (mean, square), (drawn_mean, drawn_square) = moments(final[key]), moments(tensor)
        std, drawn_std = (square - mean**2).sqrt(), (drawn_square - drawn_mean**2).sqrt()
        assert torch.allclose(drawn_std, std, rtol=0.05), key
        assert torch.all((drawn_mean - mean).abs() < 0.05 * std), key


@few
@given(st.floats(0, 0.95), st.integers(1, 4))
def test_fitted_noise_averages_with_momentum(momentum, batches):
    fitted, expected = FittedNoise(momentum), None
    for number in range(batches):
        final = final_state(seed=number, scale=1 + number, shift=number)
        fitted.observe(final)
        new = moments(final[H])
        expected = (
            new
            if expected is None
            else [momentum * old + (1 - momentum) * now for old, now in zip(expected, new, strict=True)]
        )
    for found, moment in zip(fitted.moments[H], expected, strict=True):  # mean and mean square
        torch.testing.assert_close(found.flatten().double(), moment, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_fitted_noise_of_several_ranks_is_that_of_all_their_rows(order, monkeypatch):
    """Ranks of 1, 2 and 5 rows, one after another: the last reads the sum of what all sent."""
    final, sent = final_state(rows=8), []
    parts = list(zip(*(tensor.split([1, 2, 5]) for tensor in final.values()), strict=True))
    whole, fitted = FittedNoise(), FittedNoise()
    whole.observe(final)

    def all_reduce(tensor):
        sent.append(tensor.clone())
        tensor.copy_(sum(sent))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(ranks, "alone", lambda: False)
    for rank in order:
        fitted = FittedNoise()
        fitted.observe(RecurrentState(dict(zip(final, parts[rank], strict=True)), seen=final.seen))
    assert len(sent) == len(order)
    for key, expected in whole.moments.items():
        torch.testing.assert_close(fitted.moments[key], expected, rtol=1e-5, atol=1e-6)


def test_fitted_noise_of_a_constant_state_is_that_state():
    fitted = FittedNoise()
    fitted.observe(final_state(scale=0.0, shift=1.5))
    for tensor in fitted.initial_state(batch()).values():
        torch.testing.assert_close(tensor, torch.full_like(tensor, 1.5), atol=1e-3, rtol=0)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_no_momentum(momentum):
    with pytest.raises(LongrollError, match="`momentum`"):
        FittedNoise(momentum)


def test_fitted_noise_forgets_moments_that_overflow_and_those_of_a_skipped_step():
    """Squares of 1e25 overflow float32, though the state is finite; other heads learn on."""
    fitted, no, yes = FittedNoise(momentum=0.5), torch.tensor(False), torch.tensor(True)
    key = StateKey(0, "recurrent")
    fitted.observe(RecurrentState({key: torch.ones(3, 2, 4)}))
    assert fitted.forget(no, no) == 0
    before = fitted.moments[key].clone()
    large = torch.full((3, 2, 4), 3.0)
    large[:, 1] = 1e25
    fitted.observe(RecurrentState({key: large}))
    fitted.forget(no, no)
    assert fitted.moments[key][:, 1].equal(before[:, 1])
    assert fitted.moments[key][0, 0].item() == 2.0 and fitted.moments[key][1, 0].item() == 5.0
    before = fitted.moments[key].clone()
    fitted.observe(RecurrentState({key: torch.full((3, 2, 4), 9.0)}))
    fitted.forget(yes, no)
    assert fitted.moments[key].equal(before)


@pytest.mark.parametrize("kind", [StatePassing, TBPTT])
def test_passed_states_that_are_not_finite_are_forgotten_row_by_row(kind):
    passing, no, yes = kind(), torch.tensor(False), torch.tensor(True)
    assert passing.forget(yes, yes) == 0  # there is none yet
    keys = [StateKey(0, "recurrent"), StateKey(1, "conv")]
    rows = {key: torch.randn(4, 2, 3) for key in keys}
    rows[keys[0]][1, 0, 2], rows[keys[1]][3, 1, 1] = torch.inf, torch.nan
    passing.observe(RecurrentState(rows))
    assert passing.forget(yes, no) == 2
    for key in keys:
        assert not passing.passed[key][[1, 3]].any()
        assert passing.passed[key][[0, 2]].equal(rows[key][[0, 2]])
    assert passing.forget(yes, yes) == 4 and not passing.passed[keys[0]].any()
