import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longroll.state import RecurrentState, StateKey
from zoo import assert_same_state

few = settings(max_examples=10, deadline=None, derandomize=True)


def make_state(rows: int = 3, layers: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        tensors[StateKey(layer, "recurrent")] = torch.randn(rows, 4, 5, 2, generator=generator).to(dtype)
        tensors[StateKey(layer, "conv")] = torch.randn(rows, 6, 3, generator=generator).to(dtype)
        tensors[StateKey(layer, "conv", 1)] = torch.randint(9, (rows, 2), generator=generator)
    tensors[StateKey(layers, "attention", 0)] = torch.randn(rows, 2, 7, 4, generator=generator).to(dtype)
    tensors[StateKey(layers, "attention", 1)] = torch.randn(rows, 2, 7, 4, generator=generator).to(dtype)
    return RecurrentState(tensors, seen=7)


def test_is_an_immutable_mapping():
    source = {StateKey(0, "recurrent"): torch.ones(2, 3)}
    state = RecurrentState(source)
    source[StateKey(1, "recurrent")] = torch.ones(2, 3)
    assert list(state) == [StateKey(0, "recurrent")]  # the caller's dict is not the state's
    with pytest.raises(TypeError):
        state[StateKey(0, "recurrent")] = torch.zeros(2, 3)
    with pytest.raises(TypeError):
        del state[StateKey(0, "recurrent")]


def test_its_repr_names_shapes():
    state = RecurrentState(
        {StateKey(0, "conv", 1): torch.ones(2, 3), StateKey(3, "recurrent"): torch.ones(2)}
    )
    assert repr(state) == "RecurrentState(seen=0, 0.conv.1: (2, 3), 3.recurrent.0: (2,))"


def test_every_operation_leaves_the_state_alone(tmp_path):
    state, same = make_state(), make_state()
    state.detach().to(torch.float64).rows([2, 0])
    state.map(lambda t: t + 1)
    state.where(torch.tensor([True, False, True]))
    state.part("conv")
    state.save(tmp_path / "state.safetensors")
    assert_same_state(state, same)


@few
@given(st.permutations(range(4)))
def test_permuting_rows(order):
    state = make_state(rows=4)
    permuted = state.rows(list(order))
    for key, tensor in state.items():
        assert torch.equal(permuted[key], tensor[list(order)])
    inverse = [list(order).index(row) for row in range(4)]
    assert_same_state(permuted.rows(inverse), state)


def test_rows_by_mask_slice_and_tensor():
    state = make_state()
    mask = torch.tensor([True, False, True])
    assert_same_state(state.rows(mask), state.rows([0, 2]))
    assert_same_state(state.rows(torch.tensor([0, 2])), state.rows([0, 2]))
    assert_same_state(state.rows(slice(1, None)), state.rows([1, 2]))
    assert state.rows(slice(0, 1)).batch_size == 1
    assert state.batch_size == 3 and RecurrentState({}).batch_size == 0


@few
@given(st.lists(st.booleans(), min_size=3, max_size=3))
def test_where_takes_whole_rows(kept):
    state, other = make_state(seed=0), make_state(seed=1)
    mask = torch.tensor(kept)
    mixed, zeroed = state.where(mask, other), state.where(mask)
    for key in state:
        for row, keep in enumerate(kept):
            assert torch.equal(mixed[key][row], (state if keep else other)[key][row])
            assert torch.equal(zeroed[key][row], state[key][row] * keep)
    assert mixed.seen == zeroed.seen == state.seen


def test_a_stack_is_not_stacked_again():
    state = make_state().part("recurrent")
    once = state.where(torch.tensor([True, False, True]))
    seen = []
    twice = once.map_stacked(lambda stack: seen.append(stack.data_ptr()) or stack + 1)
    assert set(seen) == {once[keys[0]].data_ptr() for keys in once.alike()}
    assert_same_state(twice, once.map(lambda t: t + 1))
    apart = RecurrentState(dict(reversed(list(once.items()))))  # the same memory in another order
    assert_same_state(apart.map_stacked(lambda stack: stack + 1), twice)


def test_where_keeps_dtypes_and_drops_what_is_not_finite():
    state = make_state(dtype=torch.bfloat16).map(lambda t: t * float("nan") if t.is_floating_point() else t)
    zeroed = state.where(torch.zeros(3, dtype=torch.bool))
    for key, tensor in zeroed.items():
        assert tensor.dtype == state[key].dtype
        assert not tensor.any()


def test_part_starts_a_fresh_sequence_without_kv():
    state = make_state()
    recurrent = state.part("recurrent", "conv")
    assert {key.part for key in recurrent} == {"recurrent", "conv"}
    assert recurrent.seen == 0
    assert state.part("attention").seen == 7
    assert len(state.part("recurrent")) == 2


def test_detach_cuts_the_graph():
    leaf = torch.ones(2, 3, requires_grad=True)
    state = RecurrentState({StateKey(0, "recurrent"): leaf * 2}, seen=4)
    assert state[StateKey(0, "recurrent")].requires_grad
    detached = state.detach()
    assert not detached[StateKey(0, "recurrent")].requires_grad and detached.seen == 4


def test_named_round_trip():
    state = make_state()
    assert_same_state(RecurrentState.from_named(state.named(), seen=7), state)
    assert all(StateKey.parse(str(key)) == key for key in state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_save_and_load_is_bit_exact(tmp_path, dtype):
    path = tmp_path / "state.safetensors"
    state = make_state(dtype=dtype)
    state.save(path)
    loaded = RecurrentState.load(path)
    assert_same_state(loaded, state)
    assert all(loaded[key].dtype == state[key].dtype for key in state)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # nothing half-written is left


def test_save_takes_views_and_graphs(tmp_path):
    whole = torch.randn(4, 6, requires_grad=True)
    keys = StateKey(0, "recurrent"), StateKey(1, "recurrent")
    state = RecurrentState({keys[0]: whole.t(), keys[1]: whole[:2]})
    state.save(tmp_path / "state.safetensors")
    assert_same_state(RecurrentState.load(tmp_path / "state.safetensors"), state.detach())


def test_an_empty_state_survives_saving(tmp_path):
    RecurrentState({}, seen=3).save(tmp_path / "state.safetensors")
    loaded = RecurrentState.load(tmp_path / "state.safetensors")
    assert len(loaded) == 0 and loaded.seen == 3
