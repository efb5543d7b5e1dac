"""The Triton kernel against the oracle, in Triton's interpreter (tests/conftest.py): `pip install triton`."""

import pytest
import torch
from agreement import assert_close, drop, run
from test_selective_scan import OPTIONAL, inputs, with_positive_steps

from longroll.ops.reference import selective_scan_reference

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda.py runs it on the GPU itself")


@pytest.fixture(scope="module")
def kernel():
    from longroll.ops.triton.selective_scan import selective_scan

    return selective_scan


@pytest.mark.parametrize(
    ("size", "keep", "softplus", "splits"),
    [
        ((2, 70, 5, 3), (True,) * 4, True, 1),
        ((1, 100, 6, 16), (True,) * 4, True, 2),
        ((2, 33, 4, 8), (False,) * 4, False, 1),
        ((1, 1, 3, 4), (True, False, True, True), True, 5),
        ((2, 129, 7, 5), (False, True, False, True), True, 3),
        ((1, 64, 9, 1), (True, True, False, False), False, 2),
    ],
)
def test_agrees_with_the_oracle(kernel, size, keep, softplus, splits):
    arguments = with_positive_steps(drop(keep, inputs(size), OPTIONAL), softplus)
    if arguments["initial_state"] is not None:
        arguments["initial_state"] *= 100  # states of large norm
    options = {"dt_softplus": softplus}
    found = run(kernel, arguments, options | {"splits": splits}, dtype=torch.float32)
    assert_close(found, run(selective_scan_reference, arguments, options), 3e-6)


def test_reads_transposed_inputs_as_mixers_hand_them(kernel):
    arguments = {k: v.float() for k, v in inputs((2, 40, 5, 4)).items()}
    strided = {k: v.mT.contiguous().mT if v.dim() == 3 else v for k, v in arguments.items()}
    for one, two in zip(*(kernel(**a, dt_softplus=True) for a in (arguments, strided)), strict=True):
        torch.testing.assert_close(one, two)
