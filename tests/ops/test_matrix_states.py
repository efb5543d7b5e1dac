"""The laws of the recurrences with a (K, V) state."""

from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_close, run, with_state
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longroll import ops
from longroll.ops import _chunks, reference


class Op(NamedTuple):
    fast: Callable
    oracle: Callable
    inputs: Callable  # (batch, time, heads, K, V), seed -> arguments


def shapes_of(name, size):
    B, T, H, K, V = size
    keys, numbers = (B, T, H, K), (B, T, H)
    shapes = {
        "gla": {"q": keys, "k": keys, "g": keys},
        "retention": {"q": keys, "k": keys},
        "rwkv6": {"r": keys, "k": keys, "w": keys, "u": (H, K)},
        "rwkv7": {"r": keys, "w": keys, "k": keys, "a": keys, "b": keys},
        "delta_rule": {"q": keys, "k": keys, "beta": numbers},
        "gated_delta_rule": {"q": keys, "k": keys, "g": numbers, "beta": numbers},
        "kda": {"q": keys, "k": keys, "g": keys, "beta": numbers},
    }
    return shapes[name] | {"v": (B, T, H, V), "initial_state": (B, H, K, V)}


def inputs_of(name):
    def inputs(size, seed=0):
        generator = torch.Generator().manual_seed(seed)
        arguments = {
            key: torch.randn(shape, generator=generator, dtype=torch.float64)
            for key, shape in shapes_of(name, size).items()
        }
        for decay in {"g", "w"} & arguments.keys():
            arguments[decay] = -arguments[decay].exp()
        if "beta" in arguments:
            arguments |= {"beta": 2 * arguments["beta"].sigmoid(), "k": F.normalize(arguments["k"], dim=-1)}
        if name == "rwkv7":
            erased = F.normalize(arguments["a"], dim=-1)
            arguments |= {"a": -erased, "b": erased * arguments["b"].sigmoid()}
        return arguments

    return inputs


NAMES = ("gla", "retention", "rwkv6", "rwkv7", "delta_rule", "gated_delta_rule", "kda")
OPS = {
    name: Op(with_state(getattr(ops, name)), getattr(reference, f"{name}_reference"), inputs_of(name))
    for name in NAMES
}
DECAYS = {"gla": "g", "rwkv6": "w", "rwkv7": "w", "gated_delta_rule": "g", "kda": "g"}
each_op = pytest.mark.parametrize("op", OPS.values(), ids=NAMES)
few = settings(max_examples=25, deadline=None, derandomize=True)
sizes = st.tuples(
    st.integers(1, 3), st.integers(1, 100), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)
)
seeds = st.integers(0, 99)


def rounded(arguments):
    """The oracle gets the float32 numbers: at strong decays their rounding alone moves the results."""
    return {key: value.float() for key, value in arguments.items()}


@each_op
@given(
    size=sizes,
    with_state=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    span=st.sampled_from([1, _chunks.SPAN]),
    seed=seeds,
)
@example(size=(1, 1, 1, 1, 1), with_state=True, scale=None, span=1, seed=0)
@example(size=(2, 64, 2, 3, 5), with_state=False, scale=None, span=1, seed=0)
@example(size=(2, 333, 1, 4, 300), with_state=True, scale=None, span=_chunks.SPAN, seed=0)
@few
def test_agrees_with_the_oracle_in_float64(op, size, with_state, scale, span, seed):
    arguments, options = op.inputs(size, seed), {} if scale is None else {"scale": scale}
    if not with_state:
        del arguments["initial_state"]
    with mock.patch.object(_chunks, "SPAN", span):
        found = run(op.fast, arguments, options)
    assert_close(found, run(op.oracle, arguments, options), 1e-11)


@each_op
@given(size=sizes, norm=st.sampled_from([1.0, 1e4]), seed=seeds)
@few
def test_agrees_with_the_oracle_in_float32(op, size, norm, seed):
    arguments = op.inputs(size, seed)
    arguments |= {key: norm * arguments[key] for key in ("v", "initial_state")}
    found = run(op.fast, arguments, dtype=torch.float32)
    assert_close(found, run(op.oracle, rounded(arguments)), 5e-6)


@each_op
@given(size=sizes, cut=st.floats(0, 1))
@few
def test_two_parts_equal_the_whole(op, size, cut):
    arguments, time = op.inputs(size), size[1]
    at = min(time - 1, int(cut * time)) or 1
    if at == time:
        return

    def in_two(**a):
        timed = {key for key in a if key not in ("u", "initial_state")}
        first = {key: value[:, :at] if key in timed else value for key, value in a.items()}
        rest = {key: value[:, at:] if key in timed else value for key, value in a.items()}
        o, state = op.fast(**first)
        o_rest, state = op.fast(**(rest | {"initial_state": state}))
        return torch.cat([o, o_rest], 1), state

    assert_close(run(in_two, arguments), run(op.fast, arguments), 1e-11)


@each_op
@given(size=sizes, seed=seeds)
@few
def test_no_state_is_the_zero_state_and_rows_are_independent(op, size, seed):
    arguments = {key: value.float() for key, value in op.inputs(size, seed).items()}
    zero = torch.zeros_like(arguments.pop("initial_state"))
    o, state = op.fast(**arguments)
    o_zero, state_zero = op.fast(**arguments, initial_state=zero)
    assert torch.equal(o, o_zero) and torch.equal(state, state_zero)
    last = {key: value if key == "u" else value[-1:] for key, value in arguments.items()}
    o_last, state_last = op.fast(**last)
    torch.testing.assert_close(o[-1:], o_last, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state[-1:], state_last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DECAYS)
@pytest.mark.parametrize("strength", [0.0, 1e-8, 1e-4, 50.0, 1e4, 1e12])
def test_extreme_decays_stay_finite_and_right(name, strength):
    op, decay = OPS[name], DECAYS[name]
    arguments = op.inputs((2, 90, 2, 5, 3))
    arguments |= {
        decay: arguments[decay] * strength,
        "initial_state": 1e3 * arguments["initial_state"],
    }
    assert_close(run(op.fast, arguments, dtype=torch.float32), run(op.oracle, rounded(arguments)), 5e-6)


@pytest.mark.parametrize("name", DECAYS)
def test_a_reset_early_in_a_chunk_costs_later_steps_no_digits(name):
    op, decay = OPS[name], DECAYS[name]
    arguments = op.inputs((1, 32, 2, 5, 3))
    arguments[decay] = torch.full_like(arguments[decay], -1e-3)
    arguments[decay][:, 3] = -1e5
    found, _ = op.fast(**rounded(arguments))
    expected, _ = op.oracle(**{key: value.float().double() for key, value in arguments.items()})
    assert ((found - expected).abs().amax((0, 2, 3)) <= 5e-6 * expected.abs().amax((0, 2, 3))).all()


@each_op
def test_the_pass_without_gradients_gives_the_same_numbers(op):
    arguments = {key: value.float() for key, value in op.inputs((2, 75, 2, 3, 4)).items()}
    expected = op.fast(**{key: value.clone().requires_grad_() for key, value in arguments.items()})
    with torch.no_grad():
        found = op.fast(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_state_is_returned_when_asked_for(name):
    arguments = OPS[name].inputs((1, 5, 2, 3, 4))
    o, state = getattr(ops, name)(**arguments)
    assert state is None and torch.equal(o, OPS[name].fast(**arguments)[0])


@each_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_and_autocast(op, dtype):
    arguments = {key: value.to(dtype) for key, value in op.inputs((2, 75, 2, 8, 4)).items()}
    leaves = {key: value.clone().requires_grad_() for key, value in arguments.items()}
    with torch.autocast("cpu", torch.bfloat16):
        o, state = op.fast(**leaves)
        (o.float().sum() + state.sum()).backward()
    exact = {key: value.double().requires_grad_() for key, value in arguments.items()}
    o_exact, state_exact = op.oracle(**exact)
    (o_exact.sum() + state_exact.sum()).backward()
    assert o.dtype == dtype and state.dtype == torch.float32
    torch.testing.assert_close(state.double(), state_exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(o.double(), o_exact, rtol=1e-2, atol=1e-2)
    for key, leaf in leaves.items():
        assert leaf.grad.dtype == dtype
        torch.testing.assert_close(leaf.grad.double(), exact[key].grad, rtol=1e-2, atol=1e-2, msg=key)


@each_op
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("given_state", [True, False])
@pytest.mark.parametrize("span", [1, _chunks.SPAN], ids=["spans", "span"])
def test_a_loss_on_one_of_the_outputs_alone(op, which, given_state, span, monkeypatch):
    monkeypatch.setattr(_chunks, "SPAN", span)
    arguments = op.inputs((2, 70, 2, 3, 4))
    if not given_state:
        del arguments["initial_state"]
    leaves = {key: value.requires_grad_() for key, value in arguments.items()}
    gradients = (
        torch.autograd.grad(
            f(**leaves)[which].square().sum(), leaves.values(), allow_unused=True, materialize_grads=True
        )
        for f in (op.fast, op.oracle)
    )
    for key, found, expected in zip(leaves, *gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=key)


@each_op
@pytest.mark.parametrize("span", [1, _chunks.SPAN], ids=["spans", "span"])
def test_any_one_argument_alone_gets_its_gradient(op, span, monkeypatch):
    monkeypatch.setattr(_chunks, "SPAN", span)
    arguments = op.inputs((1, 40, 2, 3, 4))
    expected = run(op.fast, arguments)
    for key in arguments:
        wanted = {k: v.clone().requires_grad_(k == key) for k, v in arguments.items()}
        generator = torch.Generator().manual_seed(1)
        loss = sum((v * torch.randn(v.shape, generator=generator).double()).sum() for v in op.fast(**wanted))
        (gradient,) = torch.autograd.grad(loss, wanted[key])
        torch.testing.assert_close(gradient, expected[f"d{key}"], msg=key)


@each_op
def test_transposed_and_expanded_inputs(op):
    arguments = op.inputs((1, 40, 2, 3, 4))
    expected = run(op.fast, arguments)

    def strided(**a):
        turned = {k: v.transpose(0, -1).contiguous().transpose(0, -1) for k, v in a.items()}
        wide = {k: v if k == "u" else v.expand(2, *v.shape[1:]) for k, v in turned.items()}
        o, state = op.fast(**wide)
        torch.testing.assert_close(o[0], o[1])
        return o[:1], state[:1]

    assert_close(run(strided, arguments), expected, 1e-12)


@each_op
def test_backward_keeps_the_inputs_and_a_few_states(op):
    kept = 0

    def count(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    arguments = {k: v.float().requires_grad_() for k, v in op.inputs((1, 8192, 2, 16, 16)).items()}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        op.fast(**arguments)
    assert kept <= 1.1 * sum(t.numel() for t in arguments.values())


@given(size=sizes, groups=st.integers(1, 3), normalised=st.booleans(), seed=seeds)
@few
def test_the_gated_delta_rule_shares_keys_among_heads_and_makes_them_unit_length(
    size, groups, normalised, seed
):
    op = OPS["gated_delta_rule"]
    B, T, H, K, V = size
    arguments = op.inputs((B, T, H * groups, K, V), seed)
    arguments |= {name: op.inputs(size, seed)[name] * (3.0 if normalised else 1.0) for name in ("q", "k")}
    options = {"use_qk_l2norm_in_kernel": normalised}
    assert_close(run(op.fast, arguments, options), run(op.oracle, arguments, options), 1e-11)


@given(size=sizes, seed=seeds)
@few
def test_the_gated_delta_rule_is_rwkv7_with_one_key(size, seed):
    a = OPS["gated_delta_rule"].inputs(size, seed)

    def as_rwkv7(q, k, v, g, beta, initial_state):
        w, beta = g[..., None].expand_as(k), beta[..., None]
        key = w.exp() * k
        arguments = {"r": q, "w": w, "k": beta * k, "v": v, "a": key, "b": -beta * k}
        return OPS["rwkv7"].fast(**arguments, scale=q.shape[-1] ** -0.5, initial_state=initial_state)

    assert_close(run(as_rwkv7, a), run(OPS["gated_delta_rule"].fast, a), 1e-11)


@each_op
@pytest.mark.parametrize("span", [1, _chunks.SPAN], ids=["spans", "span"])
def test_a_second_backward_is_refused(op, span, monkeypatch):
    monkeypatch.setattr(_chunks, "SPAN", span)
    arguments = {key: value.requires_grad_() for key, value in op.inputs((1, 70, 2, 3, 4)).items()}
    o, _ = op.fast(**arguments)
    (gradient,) = torch.autograd.grad(o.square().sum(), arguments["v"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_misfits_are_named():
    a = OPS["gla"].inputs((2, 8, 2, 3, 4))
    with pytest.raises(ValueError, match=r"g must have shape \(B, T, H, K\)"):
        ops.gla(**(a | {"g": a["g"][..., :1]}))
    with pytest.raises(ValueError, match=r"initial_state must have shape \(B, H, K, V\)"):
        ops.gla(**(a | {"initial_state": a["initial_state"].mT}))
    with pytest.raises(ValueError, match="T >= 1"):
        ops.gla(**{k: v if k == "initial_state" else v[:, :0] for k, v in a.items()})
    a = OPS["rwkv6"].inputs((2, 8, 2, 3, 4))
    with pytest.raises(ValueError, match=r"u must have shape \(H, K\)"):
        ops.rwkv6(**(a | {"u": a["u"].flatten()}))
    a = OPS["gated_delta_rule"].inputs((2, 8, 3, 3, 4))
    with pytest.raises(ValueError, match=r"beta must have shape \(B, T, H\)"):
        ops.gated_delta_rule(**(a | {"beta": a["beta"][:, 1:]}))
    with pytest.raises(ValueError, match="v must have shape"):
        ops.gated_delta_rule(**(a | {"q": a["q"][:, :, :2], "k": a["k"][:, :, :2]}))
