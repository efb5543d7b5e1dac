import pytest
import torch
from agreement import assert_close, drop, few, run, with_state
from hypothesis import example, given
from hypothesis import strategies as st

from longroll.ops import selective_scan
from longroll.ops.reference import selective_scan_reference

fast = with_state(selective_scan)
OPTIONAL = ("D", "z", "dt_bias", "initial_state")
sizes = st.tuples(st.integers(1, 3), st.integers(1, 150), st.integers(1, 7), st.integers(1, 5))
flags = st.tuples(*[st.booleans()] * 4)


def inputs(size, seed=0):
    B, T, D, N = size
    torch.manual_seed(seed)
    shapes = {"x": (B, T, D), "dt": (B, T, D), "A": (D, N), "B": (B, T, N), "C": (B, T, N)}
    shapes |= {"D": (D,), "z": (B, T, D), "dt_bias": (D,), "initial_state": (B, D, N)}
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return tensors | {"A": -tensors["A"].exp()}


def with_positive_steps(arguments, softplus):
    # Without softplus the op is only defined for dt >= 0.
    if softplus:
        return arguments
    bias = arguments["dt_bias"]
    return arguments | {"dt": arguments["dt"].abs(), "dt_bias": None if bias is None else bias.abs()}


@given(size=sizes, keep=flags, softplus=st.booleans(), seed=st.integers(0, 99))
@example(size=(1, 1, 1, 1), keep=(True,) * 4, softplus=True, seed=0)
@example(size=(1, 1000, 5, 4), keep=(True,) * 4, softplus=True, seed=0)  # several spans of several blocks
@few
def test_agrees_with_the_oracle_in_float64(size, keep, softplus, seed):
    arguments = with_positive_steps(drop(keep, inputs(size, seed), OPTIONAL), softplus)
    options = {"dt_softplus": softplus}
    assert_close(run(fast, arguments, options), run(selective_scan_reference, arguments, options), 1e-11)


@given(size=sizes, keep=flags, seed=st.integers(0, 99))
@few
def test_agrees_with_the_oracle_in_float32(size, keep, seed):
    arguments = drop(keep, inputs(size, seed), OPTIONAL)
    options = {"dt_softplus": True}
    found = run(fast, arguments, options, dtype=torch.float32)
    assert_close(found, run(selective_scan_reference, arguments, options), 2e-5)


@pytest.mark.parametrize("width", [40, 2000])
def test_spans_of_one_and_of_many_blocks(width):
    arguments = inputs((2, 300 if width == 40 else 40, width, 4))
    options = {"dt_softplus": True}
    assert_close(run(fast, arguments, options), run(selective_scan_reference, arguments, options), 1e-11)


@given(size=sizes, cut=st.floats(0, 1))
@few
def test_two_parts_equal_the_whole(size, cut):
    arguments = inputs(size)
    time = size[1]
    at = min(time - 1, int(cut * time)) or 1
    if at == time:
        return

    def in_two(**a):
        timed = ("x", "dt", "B", "C", "z")
        first = {k: v[:, :at] if k in timed else v for k, v in a.items()}
        rest = {k: v[:, at:] if k in timed else v for k, v in a.items()}
        y, state = fast(**first, dt_softplus=True)
        y_rest, state = fast(**(rest | {"initial_state": state}), dt_softplus=True)
        return torch.cat([y, y_rest], 1), state

    assert_close(run(in_two, arguments), run(fast, arguments, {"dt_softplus": True}), 1e-11)


@given(size=sizes)
@few
def test_no_state_is_the_zero_state(size):
    arguments = {k: v.float() for k, v in inputs(size).items()}
    zero = torch.zeros_like(arguments.pop("initial_state"))
    y, state = fast(**arguments, dt_softplus=True)
    y_zero, state_zero = fast(**arguments, dt_softplus=True, initial_state=zero)
    assert torch.equal(y, y_zero) and torch.equal(state, state_zero)


@given(size=sizes)
@few
def test_batch_rows_are_independent(size):
    arguments = inputs(size)
    order = torch.randperm(size[0])
    permuted = {k: v[order] if v.shape[0] == size[0] and k not in ("A", "D", "dt_bias") else v
                for k, v in arguments.items()}  # fmt: skip
    y, state = fast(**arguments, dt_softplus=True)
    y_permuted, state_permuted = fast(**permuted, dt_softplus=True)
    torch.testing.assert_close(y[order], y_permuted, rtol=0, atol=1e-13)
    torch.testing.assert_close(state[order], state_permuted, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("dt", "A"), [(0.0, 1.0), (1e-8, 1e-8), (50.0, 1e4), (1e4, 1e4), (1e-6, 1e6)])
def test_extreme_decays_stay_finite_and_right(dt, A):
    arguments = inputs((2, 90, 6, 4)) | {"dt_bias": None}
    arguments |= {
        "dt": arguments["dt"].abs() * dt,
        "A": arguments["A"] * A,
        "initial_state": 1e3 * arguments["initial_state"],
    }
    found = run(fast, arguments, dtype=torch.float32)
    assert_close(found, run(selective_scan_reference, arguments), 1e-4)


def test_the_fast_path_without_gradients_gives_the_same_numbers():
    arguments = {k: v.float() for k, v in inputs((2, 70, 5, 4)).items()}
    expected = fast(**{k: v.clone().requires_grad_() for k, v in arguments.items()}, dt_softplus=True)
    with torch.no_grad():
        found = fast(**arguments, dt_softplus=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_and_autocast(dtype):
    arguments = {k: v.to(dtype) for k, v in inputs((2, 70, 5, 4)).items()}
    leaves = {k: v.clone().requires_grad_() for k, v in arguments.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y, state = fast(**leaves, dt_softplus=True)
        (y.float().sum() + state.sum()).backward()
    exact, state_exact = selective_scan_reference(
        **{k: v.double() for k, v in arguments.items()}, dt_softplus=True
    )
    assert y.dtype == dtype and state.dtype == torch.float32
    assert all(leaf.grad.dtype == dtype and leaf.grad.isfinite().all() for leaf in leaves.values())
    torch.testing.assert_close(state.double(), state_exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)


def test_transposed_inputs_and_a_loss_on_the_state_alone():
    arguments = inputs((2, 70, 5, 4))
    leaves = {k: v.mT.contiguous().mT.requires_grad_() if v.dim() == 3 else v.requires_grad_()
              for k, v in arguments.items()}  # fmt: skip
    _, state = fast(**leaves, dt_softplus=True)
    gradients = torch.autograd.grad(state.square().sum(), list(leaves.values()), allow_unused=True)
    _, expected = selective_scan_reference(**leaves, dt_softplus=True)
    exact = torch.autograd.grad(expected.square().sum(), list(leaves.values()), allow_unused=True)
    for name, a, b in zip(leaves, gradients, exact, strict=True):
        torch.testing.assert_close(torch.zeros(1) if a is None else a.sum().view(1),
                                   torch.zeros(1) if b is None else b.sum().view(1),
                                   check_dtype=False, msg=name)  # fmt: skip


def test_misfits_are_named():
    arguments = inputs((2, 8, 5, 4))
    with pytest.raises(ValueError, match=r"B must have shape \(B, T, N\)"):
        selective_scan(**(arguments | {"B": arguments["B"][:, :-1]}))
    with pytest.raises(ValueError, match="T >= 1"):
        selective_scan(**(arguments | {"x": arguments["x"][:, :0]}))
