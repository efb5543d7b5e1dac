"""No op takes a tensor of a dtype that its arithmetic would change: complex, integer, bool."""

import pytest
import test_matrix_states
import test_selective_scan
import test_short_conv
import test_ssd
import torch

from longroll import ops

OPS = {name: (op.fast, op.inputs((1, 4, 2, 3, 4))) for name, op in test_matrix_states.OPS.items()}
OPS |= {
    "ssd": (ops.ssd, test_ssd.inputs((1, 4, 1, 2, 3, 4))),
    "selective_scan": (ops.selective_scan, test_selective_scan.inputs((1, 4, 3, 4))),
    "short_conv": (ops.short_conv, test_short_conv.inputs((1, 4, 3, 2))),
}
CASES = [(name, argument) for name, (_, arguments) in OPS.items() for argument in arguments]


@pytest.mark.parametrize(("op", "argument"), [*CASES, ("retention", "g_gamma")])
def test_inputs_that_are_not_real_floats_are_named(op, argument):
    run, arguments = OPS[op]
    given = arguments.get(argument, torch.zeros(2))
    for dtype in (torch.complex64, torch.complex128, torch.int64, torch.bool):
        with pytest.raises(ValueError, match=rf"^{argument} must be real and of a floating-point dtype"):
            run(**(arguments | {argument: given.to(dtype)}))
