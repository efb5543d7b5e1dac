import pytest
import torch
from agreement import assert_close, drop, few, run, with_state
from hypothesis import example, given
from hypothesis import strategies as st

from longroll.ops import ssd
from longroll.ops.reference import ssd_reference

fast = with_state(ssd)
OPTIONAL = ("D", "z", "dt_bias", "initial_state")
# batch, time, groups, heads a group, head width, state width
sizes = st.tuples(
    st.integers(1, 3),
    st.integers(1, 150),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 5),
)
chunk_sizes = st.sampled_from([None, 1, 7, 16, 64])
flags = st.tuples(*[st.booleans()] * 4)


def inputs(size, seed=0):
    B, T, G, R, P, N = size
    H = G * R
    torch.manual_seed(seed)
    shapes = {"x": (B, T, H, P), "dt": (B, T, H), "A": (H,), "B": (B, T, G, N), "C": (B, T, G, N)}
    shapes |= {"D": (H,), "z": (B, T, H, P), "dt_bias": (H,), "initial_state": (B, H, P, N)}
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return tensors | {"A": -tensors["A"].exp()}


def chunked(size):
    return lambda **arguments: fast(**arguments, chunk_size=size)


@given(
    size=sizes,
    chunk=chunk_sizes,
    keep=flags,
    softplus=st.booleans(),
    limited=st.booleans(),
    seed=st.integers(0, 99),
)
@example(size=(1, 1, 1, 1, 1, 1), chunk=None, keep=(True,) * 4, softplus=True, limited=False, seed=0)
@example(size=(2, 700, 2, 2, 3, 4), chunk=None, keep=(True,) * 4, softplus=True, limited=False, seed=0)
@example(size=(2, 129, 1, 2, 3, 4), chunk=None, keep=(False,) * 4, softplus=True, limited=False, seed=0)
@few
def test_agrees_with_the_oracle_in_float64(size, chunk, keep, softplus, limited, seed):
    arguments = drop(keep, inputs(size, seed), OPTIONAL)
    options = {"dt_softplus": softplus, "dt_limit": (0.2, 1.1) if limited else (0.0, float("inf"))}
    assert_close(run(chunked(chunk), arguments, options), run(ssd_reference, arguments, options), 1e-11)


@given(size=sizes, chunk=chunk_sizes, keep=flags, seed=st.integers(0, 99))
@few
def test_agrees_with_the_oracle_in_float32(size, chunk, keep, seed):
    arguments = drop(keep, inputs(size, seed), OPTIONAL)
    options = {"dt_softplus": True}
    found = run(chunked(chunk), arguments, options, dtype=torch.float32)
    assert_close(found, run(ssd_reference, arguments, options), 2e-5)


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


@given(size=sizes, chunk=chunk_sizes)
@few
def test_no_state_is_the_zero_state(size, chunk):
    arguments = {k: v.float() for k, v in inputs(size).items()}
    zero = torch.zeros_like(arguments.pop("initial_state"))
    for want in (True, False):
        options = {"dt_softplus": True, "chunk_size": chunk, "output_final_state": want}
        none, zeros = ssd(**arguments, **options), ssd(**arguments, **options, initial_state=zero)
        pairs = zip(none, zeros, strict=True) if want else [(none, zeros)]
        assert all(torch.equal(a, b) for a, b in pairs)


@given(size=sizes)
@few
def test_batch_rows_are_independent(size):
    arguments = inputs(size)
    order = torch.randperm(size[0])
    permuted = {k: v if k in ("A", "D", "dt_bias") else v[order] for k, v in arguments.items()}
    y, state = fast(**arguments, dt_softplus=True)
    y_permuted, state_permuted = fast(**permuted, dt_softplus=True)
    torch.testing.assert_close(y[order], y_permuted, rtol=0, atol=1e-12)
    torch.testing.assert_close(state[order], state_permuted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dt", "A"), [(0.0, 1.0), (1e-8, 1e-8), (50.0, 1e4), (1e4, 1e4), (1e-6, 1e6)])
def test_extreme_decays_stay_finite_and_right(dt, A):
    arguments = inputs((2, 150, 1, 4, 3, 5)) | {"dt_bias": None}
    arguments |= {
        "dt": arguments["dt"].abs() * dt,
        "A": arguments["A"] * A,
        "initial_state": 1e3 * arguments["initial_state"],
    }
    found = run(fast, arguments, dtype=torch.float32)
    # The oracle gets the float32 numbers: at these rates their rounding alone moves the decays.
    rounded = {k: None if v is None else v.float() for k, v in arguments.items()}
    assert_close(found, run(ssd_reference, rounded), 1e-4)


def test_a_reset_early_in_a_chunk_costs_later_steps_no_digits():
    arguments = inputs((1, 64, 1, 2, 3, 5)) | {"dt_bias": None, "initial_state": None}
    dt = torch.full_like(arguments["dt"], 1e-3)
    dt[:, 0] = 1e5
    arguments |= {"dt": dt, "A": torch.tensor([-1.0, -3.0], dtype=torch.float64)}
    rounded = {k: None if v is None else v.float() for k, v in arguments.items()}
    found, _ = fast(**rounded)
    expected, _ = ssd_reference(**{k: None if v is None else v.double() for k, v in rounded.items()})
    assert ((found - expected).abs().amax((0, 2, 3)) <= 1e-6 * expected.abs().amax((0, 2, 3))).all()


def test_the_fast_path_without_gradients_gives_the_same_numbers():
    arguments = {k: v.float() for k, v in inputs((2, 150, 1, 2, 3, 4)).items()}
    expected = fast(**{k: v.clone().requires_grad_() for k, v in arguments.items()}, dt_softplus=True)
    with torch.no_grad():
        found = fast(**arguments, dt_softplus=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_and_autocast(dtype):
    arguments = {k: v.to(dtype) for k, v in inputs((2, 150, 1, 2, 3, 4)).items()}
    leaves = {k: v.clone().requires_grad_() for k, v in arguments.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y, state = fast(**leaves, dt_softplus=True)
        (y.float().sum() + state.sum()).backward()
    exact, state_exact = ssd_reference(**{k: v.double() for k, v in arguments.items()}, dt_softplus=True)
    assert y.dtype == dtype and state.dtype == torch.float32
    assert all(leaf.grad.dtype == dtype and leaf.grad.isfinite().all() for leaf in leaves.values())
    torch.testing.assert_close(state.double(), state_exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("time", [5, 300])
@pytest.mark.parametrize("given_state", [True, False])
def test_a_loss_on_one_of_the_outputs_alone(time, given_state):
    arguments = inputs((2, time, 2, 2, 3, 4))
    if not given_state:
        del arguments["initial_state"]
    leaves = {k: v.requires_grad_() for k, v in arguments.items()}
    found, expected = fast(**leaves, dt_softplus=True), ssd_reference(**leaves, dt_softplus=True)
    for a, b in zip(found, expected, strict=True):
        gradients = torch.autograd.grad(
            a.square().sum(), list(leaves.values()), retain_graph=True, allow_unused=True
        )
        exact = torch.autograd.grad(
            b.square().sum(), list(leaves.values()), retain_graph=True, allow_unused=True
        )
        for leaf, p, q in zip(leaves.values(), gradients, exact, strict=True):
            torch.testing.assert_close(
                torch.zeros_like(leaf) if p is None else p, torch.zeros_like(leaf) if q is None else q
            )


@pytest.mark.parametrize("keep", [(True,) * 4, (True, False, False, False)])
def test_a_skip_weight_for_each_channel(keep):
    size = (2, 150, 2, 2, 3, 4)
    arguments = drop(keep, inputs(size), OPTIONAL) | {"D": torch.randn(4, 3, dtype=torch.float64)}
    assert_close(run(fast, arguments), run(ssd_reference, arguments), 1e-11)


@pytest.mark.parametrize("dt", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("share", [0.1, 1.0])  # of steps that are large
def test_gradients_at_large_steps_are_as_exact_as_the_oracles_in_float32(dt, share):
    for seed in range(3):
        arguments = inputs((2, 200, 2, 2, 4, 8), seed) | {"dt_bias": None}
        large = torch.rand_like(arguments["dt"]) < share
        arguments["dt"] = torch.rand_like(arguments["dt"]) * torch.where(large, dt, 0.01)
        arguments = {k: None if v is None else v.float() for k, v in arguments.items()}
        exact = run(ssd_reference, arguments)
        plain, found = (run(op, arguments, dtype=torch.float32) for op in (ssd_reference, fast))
        for name, value in exact.items():
            error, allowed = ((r[name].double() - value).abs().max() for r in (found, plain))
            assert error <= 2 * allowed + 1e-6 * value.abs().max(), name


def test_misfits_are_named():
    arguments = inputs((2, 8, 2, 2, 3, 4))
    with pytest.raises(ValueError, match=r"initial_state must have shape \(B, H, P, N\)"):
        ssd(**(arguments | {"initial_state": arguments["initial_state"].mT}))
    with pytest.raises(ValueError, match="G dividing H"):
        ssd(**(arguments | {"B": arguments["B"].repeat(1, 1, 2, 1)[:, :, :3]}))
    with pytest.raises(ValueError, match=r"D must have shape \(H, P\)"):
        ssd(**(arguments | {"D": arguments["D"].unsqueeze(1)}))
    with pytest.raises(ValueError, match="chunk_size"):
        ssd(**arguments, chunk_size=0)
