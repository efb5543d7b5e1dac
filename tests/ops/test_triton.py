"""The Triton kernels against the oracles, in its interpreter (tests/conftest.py): `pip install triton`."""

import math
import sys
from types import SimpleNamespace

import pytest
import test_rms_norm
import test_selective_scan
import test_short_conv
import test_ssd
import torch
from agreement import assert_close, drop, run

from longroll.conformance.tiny import VOCAB, build
from longroll.model import RecurrentLM
from longroll.ops import short_conv
from longroll.ops.reference import selective_scan_reference, ssd_reference

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda.py runs them on the GPU itself")


def scan(**arguments):
    from longroll.ops.gpu.selective_scan import selective_scan

    return selective_scan(**arguments)


def scan_of(*arguments):
    return scan(**dict(zip(("x", "dt", "A", "B", "C"), arguments, strict=True)), dt_softplus=True)


def ssd(**arguments):
    from longroll.ops.gpu.ssd import ssd

    return ssd(**arguments)


@pytest.mark.parametrize(
    ("size", "keep", "softplus"),
    [
        ((2, 70, 5, 3), (True,) * 4, True),
        ((1, 100, 6, 16), (True,) * 4, True),
        ((2, 33, 4, 8), (False,) * 4, False),
        ((1, 1, 3, 4), (True, False, True, True), True),
        ((2, 129, 33, 5), (False, True, False, True), True),
        ((1, 64, 9, 1), (True, True, False, False), False),
        ((1, 128, 32, 2), (True,) * 4, True),  # whole spans and blocks of channels: no masks
    ],
)
def test_scan_agrees_with_the_oracle(size, keep, softplus):
    arguments, options = drawn(test_selective_scan, size, keep, softplus)
    found = run(scan, arguments, options, dtype=torch.float32)
    assert_close(found, run(selective_scan_reference, arguments, options), 3e-6)


@pytest.mark.parametrize("size", [(2, 70, 5, 3), (2, 129, 33, 5)])
def test_a_deterministic_scan_agrees_with_the_oracle(size):
    """Each program adds to sums of its own."""
    arguments, options = drawn(test_selective_scan, size, (True,) * 4, True)
    torch.use_deterministic_algorithms(True)
    try:
        found = run(scan, arguments, options, dtype=torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(found, run(selective_scan_reference, arguments, options), 3e-6)


def test_scan_keeps_the_digits_of_small_steps():
    raw = torch.tensor([-3.4, -3.6, -7, -9.2, -12, -16.7], dtype=torch.float64).expand(1, 8, -1)
    ones = torch.ones(1, 8, 1, dtype=torch.float64)
    arguments = (torch.ones_like(raw), raw, -torch.ones(6, 1, dtype=torch.float64), ones, ones)
    exact = selective_scan_reference(*arguments, dt_softplus=True)
    for found, expected in zip(scan_of(*(t.float() for t in arguments)), exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_scan_goes_back_part_by_part(monkeypatch):
    from longroll.ops.gpu import selective_scan as kernels

    arguments, options = drawn(test_selective_scan, (2, 200, 3, 4), (True,) * 4, True)
    expected = run(selective_scan_reference, arguments, options)
    monkeypatch.setattr(kernels, "ROOM", 2 * kernels.SPAN // kernels.TILE * 2 * 3 * 4)  # of two spans
    assert_close(run(scan, arguments, options, dtype=torch.float32), expected, 3e-6)


@pytest.mark.parametrize(
    ("size", "keep", "softplus", "limit"),
    [
        ((2, 70, 1, 2, 5, 3), (True,) * 4, True, (0.0, float("inf"))),
        ((1, 130, 2, 2, 16, 8), (True,) * 4, True, (0.2, 1.1)),
        ((1, 1, 1, 1, 3, 4), (True, False, True, True), True, (0.0, float("inf"))),
        ((2, 64, 3, 1, 4, 17), (False,) * 4, False, (0.0, float("inf"))),
        ((1, 200, 1, 3, 20, 33), (False, True, False, True), True, (0.0, float("inf"))),
        ((1, 128, 1, 2, 16, 32), (True,) * 4, True, (0.0, float("inf"))),  # blocks and chunks come out even
    ],
)
def test_ssd_agrees_with_the_oracle(size, keep, softplus, limit):
    arguments, options = drawn(test_ssd, size, keep, softplus)
    options["dt_limit"] = limit
    found = run(ssd, arguments, options, dtype=torch.float32)
    # decays are differences of running sums of up to 64 dt A, in float32
    assert_close(found, run(ssd_reference, arguments, options), 1e-4)


@pytest.mark.parametrize("size", [(2, 70, 1, 2, 5, 33), (1, 3, 1, 2, 20, 50)])
def test_ssd_takes_wide_states_in_parts(size, monkeypatch):
    """As it does heads of 128 x 256."""
    from longroll.ops.gpu import ssd as kernels

    monkeypatch.setattr(kernels, "WIDEST_AT_ONCE", 16 * 16)
    arguments, options = drawn(test_ssd, size, (True,) * 4, True)
    found = run(ssd, arguments, options, dtype=torch.float32)
    assert_close(found, run(ssd_reference, arguments, options), 1e-4)


@pytest.mark.parametrize(
    ("size", "limit"),
    [((1, 130, 2, 1, 20, 70), (0.2, 1.1)), ((1, 128, 2, 2, 16, 32), (0.0, float("inf")))],
)
def test_ssd_as_in_heads_of_64_in_16_bits(size, limit, monkeypatch):
    """The sums over states are made beside the gradients of B and C, and two chunks are walked at once."""
    from longroll.ops.gpu import ssd as kernels

    made = kernels._Call.__init__

    def of_64(call, *arguments, **options):
        made(call, *arguments, **options)
        call.of_64 = True

    monkeypatch.setattr(kernels._Call, "__init__", of_64)
    arguments, options = drawn(test_ssd, size, (True,) * 4, True)
    options["dt_limit"] = limit
    found = run(ssd, arguments, options, dtype=torch.float32)
    assert_close(found, run(ssd_reference, arguments, options), 1e-4)


def test_ssd_takes_float16_from_which_x_was_widened():
    """Products in tf32: as many digits as float16, and states beyond its range."""
    arguments, options = drawn(test_ssd, (1, 70, 2, 2, 5, 17), (True, False, True, True), True)
    arguments = {k: None if v is None else v.half().double() for k, v in arguments.items()}

    def half(**a):
        y, state = ssd(**a | {name: a[name].half() for name in ("dt", "B", "C")})
        assert y.dtype == torch.float32
        return y, state

    found = run(half, arguments, options, dtype=torch.float32)
    assert_close(found, run(ssd_reference, arguments, options), 3e-3)
    arguments["initial_state"] *= 1e4
    exact = ssd_reference(**arguments, **options)
    wide = half(**{k: None if v is None else v.float() for k, v in arguments.items()}, **options)
    for one, other in zip(wide, exact, strict=True):
        assert (one.double() - other).norm() < 1e-3 * other.norm()


def test_ssd_with_a_skip_weight_for_each_channel():
    arguments, options = drawn(test_ssd, (2, 70, 1, 2, 5, 3), (True,) * 4, True)
    arguments["D"] = torch.randn(2, 5, dtype=torch.float64)
    found = run(ssd, arguments, options, dtype=torch.float32)
    assert_close(found, run(ssd_reference, arguments, options), 1e-4)


@pytest.mark.parametrize(
    ("size", "keep", "activation"),
    [
        ((2, 130, 70, 4), (True, True), "silu"),
        ((1, 1, 5, 3), (False, True), "silu"),
        ((2, 64, 64, 4), (True, False), None),
        ((2, 3, 9, 4), (True, True), "silu"),
        ((1, 66, 3, 2), (False, False), None),
    ],
)
def test_conv_agrees_with_pytorch(size, keep, activation, monkeypatch):
    from longroll.ops.gpu import short_conv as kernels

    arguments = drop(keep, test_short_conv.inputs(size), ("bias", "initial_state"))
    options = {"activation": activation, "output_final_state": True}
    expected = run(short_conv, arguments, options)
    choice = SimpleNamespace(kernel=kernels.short_conv)
    module = sys.modules["longroll.ops._short_conv"]  # the package shows the function of that name
    monkeypatch.setattr(module, "choose", lambda *_: choice)
    assert_close(run(short_conv, arguments, options, dtype=torch.float32), expected, 3e-6)


@pytest.mark.parametrize(
    ("size", "gated"), [((3, 50, 48, 48), True), ((2, 7, 40, 20), True), ((1, 1100, 33, 33), False)]
)
def test_norm_agrees_with_transformers(size, gated):
    from longroll.ops.gpu.rms_norm import rms_norm

    def kernel(**arguments):
        return rms_norm(**arguments), torch.zeros(())

    arguments = drop((gated,), test_rms_norm.inputs(size), ("gate",))
    options = {"eps": 1e-5, "size": size[-1]}
    expected = run(test_rms_norm.reference, arguments, options)
    assert_close(run(kernel, arguments, options, dtype=torch.float32), expected, 3e-6)


@pytest.mark.parametrize(
    ("limit", "keep"), [((0.0, float("inf")), True), ([0.0, float("inf")], False), ((0.05, 0.3), True)]
)
def test_a_mamba2_block_at_once_is_the_block(limit, keep, monkeypatch):
    from longroll.conformance import laws
    from longroll.families import _mixers
    from longroll.ops.gpu.mamba2 import mamba2

    monkeypatch.setattr(_mixers, "_room", lambda *_: math.inf if keep else 0.0)
    lm = RecurrentLM(build("mamba2")).train()
    for block in lm.model.modules():
        if hasattr(block, "time_step_limit"):
            block.time_step_limit = limit
    ids = torch.randint(VOCAB, (2, 76), generator=torch.Generator().manual_seed(0))
    expected = laws.gradients(lm, ids, [75])
    monkeypatch.setattr(_mixers, "choose", lambda *_: SimpleNamespace(kernel=mamba2))
    for lengths in ([75], [1, 2, 71, 1]):
        assert laws.gradient_gap(laws.gradients(lm, ids, lengths), expected).size < 1e-4


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_residual_added_by_the_next_norm_is_the_block(name, monkeypatch):
    from longroll.conformance import laws
    from longroll.families import _norms
    from longroll.ops.gpu import rms_norm

    lm = RecurrentLM(build(name)).train()
    ids = torch.randint(VOCAB, (2, 76), generator=torch.Generator().manual_seed(0))
    expected = laws.gradients(lm, ids, [75])
    added = []

    def of_sum(x, add, *rest):
        added.append(add is not None)
        return rms_norm.rms_norm_of_sum(x, add, *rest)

    def choose(op, *_):
        return SimpleNamespace(kernel=of_sum if op == "rms_norm_of_sum" else rms_norm.rms_norm)

    monkeypatch.setattr(_norms, "choose", choose)
    assert laws.gradient_gap(laws.gradients(lm, ids, [1, 74]), expected).size < 1e-4
    assert set(added) == {True, False}  # the first block's norm has nothing to add


@pytest.mark.parametrize("between", ["again", "changed"])
def test_the_norm_that_a_block_made_for_the_next_is_used_only_where_it_holds(between, monkeypatch):
    """Where checkpointing by another library runs a block again, and where the residual is changed."""
    from torch.utils.checkpoint import checkpoint

    from longroll.conformance import laws
    from longroll.families import _norms
    from longroll.ops.gpu import rms_norm

    lm = RecurrentLM(build("mamba")).train()
    ids = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    first, last = lm.model.backbone.layers[0], lm.model.backbone.layers[-1]
    run, rerun = first.forward, last.forward
    if between == "changed":
        monkeypatch.setattr(first, "forward", lambda *a, **k: run(*a, **k).add_(1.0))
    else:
        monkeypatch.setattr(last, "forward", lambda *a, **k: checkpoint(rerun, *a, use_reentrant=False, **k))
    expected = laws.gradients(lm, ids, [8])
    monkeypatch.setattr(_norms, "choose", lambda op, *_: SimpleNamespace(kernel=getattr(rms_norm, op)))
    assert laws.gradient_gap(laws.gradients(lm, ids, [8]), expected).size < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(7, 11), (3, 9001)])
def test_cross_entropy_is_pytorchs(dtype, rows, vocabulary):
    from longroll.ops.gpu.cross_entropy import cross_entropy

    generator = torch.Generator().manual_seed(0)
    numbers = (20 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[1] = -100
    found, exact = numbers.clone().requires_grad_(), numbers.double().requires_grad_()
    loss, expected = (
        cross_entropy(found * 1, targets),
        torch.nn.functional.cross_entropy(exact, targets, reduction="sum"),
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (loss / 3).backward()
    (expected / 3).backward()
    torch.testing.assert_close(
        found.grad, exact.grad.to(dtype), rtol=1e-5 if dtype == torch.float32 else 2e-3, atol=1e-6
    )
    targets[0] = vocabulary
    assert cross_entropy(numbers, targets).isnan()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy(numbers.clone().requires_grad_().tanh(), targets).backward()


@pytest.mark.parametrize("cut", [(slice(None), slice(-1, None)), (slice(1), slice(None, None, 2))])
def test_the_loss_takes_targets_of_any_strides(cut, monkeypatch):
    from longroll.ops.gpu.cross_entropy import cross_entropy
    from longroll.training import loss

    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(9, (3, 8), generator=generator)[cut]
    logits = torch.randn(*targets.shape, 9, generator=generator).requires_grad_()
    expected = loss.next_token_loss(logits.detach(), targets)
    monkeypatch.setattr(loss, "choose", lambda *_: SimpleNamespace(kernel=cross_entropy))
    torch.testing.assert_close(loss.next_token_loss(logits * 1, targets), expected)


def drawn(module, size, keep, softplus):
    """Random arguments with states of large norm."""
    arguments = drop(keep, module.inputs(size), module.OPTIONAL)
    if arguments["initial_state"] is not None:
        arguments["initial_state"] = 100 * arguments["initial_state"]
    if not softplus:  # the ops are only defined for dt >= 0
        arguments |= {k: v.abs() for k, v in arguments.items() if k in ("dt", "dt_bias") and v is not None}
    return arguments, {"dt_softplus": softplus}


@pytest.mark.parametrize(
    ("op", "module", "size"),
    [(scan, test_selective_scan, (2, 40, 5, 4)), (ssd, test_ssd, (2, 40, 1, 2, 4, 3))],
    ids=["selective_scan", "ssd"],
)
def test_reads_inputs_of_any_strides(op, module, size):
    arguments = {k: v.float() for k, v in module.inputs(size).items()}
    strided = {
        k: v.transpose(1, 2).contiguous().transpose(1, 2) if v.dim() > 2 else torch.stack([v, v], -1)[..., 0]
        for k, v in arguments.items()
    }
    for one, two in zip(*(op(**a, dt_softplus=True) for a in (arguments, strided)), strict=True):
        torch.testing.assert_close(one, two)
