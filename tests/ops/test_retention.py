"""Retention with decays of the caller's, as MiniMax has them; its laws are in test_matrix_states.py."""

import pytest
import torch
from agreement import assert_close, run

from longroll import ops
from longroll.ops import reference


@pytest.mark.parametrize("time", [1, 63, 64, 200])
def test_any_fixed_decay(time):
    generator = torch.Generator().manual_seed(time)
    sizes = {"q": (2, time, 3, 4), "k": (2, time, 3, 4), "v": (2, time, 3, 5), "initial_state": (2, 3, 4, 5)}
    arguments = {
        name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()
    }
    g_gamma = -torch.rand(3, generator=generator, dtype=torch.float64)

    def fast(**a):
        return ops.retention(**a, scale=1.0, output_final_state=True, g_gamma=g_gamma)

    def oracle(**a):
        return reference.retention_reference(**a, scale=1.0, g_gamma=g_gamma)

    assert_close(run(fast, arguments), run(oracle, arguments), 1e-11)


def test_one_decay_a_head():
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="g_gamma must have shape"):
        ops.retention(q, q, q, g_gamma=torch.zeros(2))
