"""Packing of alike tensors: what was packed comes back, a copy shares no memory, a view copies nothing."""

import torch

from longroll.conformance import laws
from longroll.stacks import Stacks
from longroll.state import RecurrentState
from zoo import assert_same_state, lm_of


def of(stacks: Stacks, packed, seen: int) -> RecurrentState:
    return RecurrentState(stacks.split(packed), seen=seen)


def test_stacks_give_the_state_back():
    state = laws.random_state(lm_of("mamba2"), 2)
    stacks = Stacks(state.alike())
    assert_same_state(of(stacks, stacks.view(state), state.seen), state)
    packed = stacks.copy(state)
    assert_same_state(of(stacks, packed, state.seen), state)
    stacks.copy(state.map(lambda t: 2 * t), out=packed)
    assert_same_state(of(stacks, packed, state.seen), state.map(lambda t: 2 * t))


def test_a_view_takes_no_memory_and_a_copy_its_own():
    state = laws.random_state(lm_of("mamba2"), 2)
    stacks = Stacks(state.alike())
    packed = stacks.copy(state)
    parts = stacks.split(packed)
    again, copied = list(stacks.view(parts)), stacks.copy(parts)
    assert [t.data_ptr() for t in again] == [t.data_ptr() for t in packed]
    assert not {t.data_ptr() for t in copied} & {t.data_ptr() for t in packed}
    assert all(torch.equal(a, b) for a, b in zip(again, copied, strict=True))


def test_a_view_keeps_the_graph():
    leaf = torch.ones(3, 2, requires_grad=True)
    (stack,) = Stacks([[0, 1]]).view({0: leaf[0], 1: leaf[1]})
    stack.sum().backward()
    assert torch.equal(leaf.grad, torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]))
