import pytest
import torch
from agreement import assert_close, drop, few, run, with_state
from hypothesis import example, given
from hypothesis import strategies as st

from longroll.ops import short_conv
from longroll.ops.reference import short_conv_reference

fast = with_state(short_conv)
sizes = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 7), st.integers(1, 5))
activations = st.sampled_from([None, "silu", "swish"])
flags = st.tuples(st.booleans(), st.booleans())


def inputs(size, seed=0):
    B, T, D, W = size
    torch.manual_seed(seed)
    shapes = {"x": (B, T, D), "weight": (D, W), "bias": (D,), "initial_state": (B, D, W)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


@given(size=sizes, keep=flags, activation=activations, single=st.booleans(), seed=st.integers(0, 99))
@example(size=(1, 1, 1, 1), keep=(True, True), activation=None, single=True, seed=0)
@example(size=(2, 3000, 60, 4), keep=(True, True), activation="silu", single=True, seed=0)
@few
def test_agrees_with_the_oracle(size, keep, activation, single, seed):
    arguments = drop(keep, inputs(size, seed), ("bias", "initial_state"))
    options = {"activation": activation}
    found = run(fast, arguments, options, dtype=torch.float32 if single else torch.float64)
    assert_close(found, run(short_conv_reference, arguments, options), 1e-5 if single else 1e-11)


@given(size=sizes, cut=st.floats(0, 1))
@few
def test_two_parts_equal_the_whole(size, cut):
    arguments = inputs(size)
    at = int(cut * size[1])
    if not 0 < at < size[1]:
        return

    def in_two(x, **a):
        y, a["initial_state"] = fast(x=x[:, :at], **a)
        y_rest, state = fast(x=x[:, at:], **a)
        return torch.cat([y, y_rest], 1), state

    options = {"activation": "silu"}
    assert_close(run(in_two, arguments, options), run(fast, arguments, options), 1e-11)


@given(size=sizes)
@few
def test_no_state_is_the_zero_state_and_the_oldest_slot_is_not_read(size):
    arguments = {k: v.float() for k, v in inputs(size).items()}
    zero = torch.zeros_like(arguments.pop("initial_state"))
    y, state = fast(**arguments)
    y_zero, state_zero = fast(**arguments, initial_state=zero)
    assert torch.equal(y, y_zero) and torch.equal(state, state_zero)
    zero[..., 0] = 7
    assert torch.equal(fast(**arguments, initial_state=zero)[0], y)


def test_half_precision_under_autocast():
    arguments = {k: v.bfloat16().requires_grad_() for k, v in inputs((2, 20, 6, 4)).items()}
    with torch.autocast("cpu", torch.bfloat16):
        y, state = fast(**arguments, activation="silu")
    (y.float().sum() + state.sum()).backward()
    exact, _ = short_conv_reference(
        **{k: v.detach().double() for k, v in arguments.items()}, activation="silu"
    )
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert all(v.grad.dtype == torch.bfloat16 for v in arguments.values())
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)


def test_the_final_state_does_not_hold_on_to_the_inputs():
    x = torch.randn(1, 1000, 8)
    _, state = fast(x=x, weight=torch.randn(8, 4))
    assert state.untyped_storage().nbytes() == state.numel() * 4


def test_misfits_are_named():
    arguments = inputs((2, 8, 5, 4))
    with pytest.raises(ValueError, match=r"bias must have shape \(D\)"):
        short_conv(**(arguments | {"bias": arguments["bias"][:-1]}))
    with pytest.raises(ValueError, match="activation"):
        short_conv(**arguments, activation="relu")
