import pytest
import test_matrix_states
import test_selective_scan
import test_short_conv
import test_ssd
import torch
from agreement import assert_close, run

from longroll.ops._backend import SWITCH

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CASES = {
    "selective_scan": (test_selective_scan, (2, 1200, 40, 16), {"dt_softplus": True}),
    "ssd": (test_ssd, (2, 1200, 2, 4, 16, 32), {"dt_softplus": True}),
    "short_conv": (test_short_conv, (2, 1200, 40, 4), {"activation": "silu"}),
} | {name: (op, (2, 600, 2, 16, 32), {}) for name, op in test_matrix_states.OPS.items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_gpu_gives_the_numbers_of_the_cpu(name, dtype, kernels, monkeypatch):
    module, size, options = CASES[name]
    arguments = module.inputs(size)

    def on_gpu(**a):
        y, state = module.fast(**{k: v.cuda() if torch.is_tensor(v) else v for k, v in a.items()})
        assert y.is_cuda and state.is_cuda
        return y.cpu(), state.cpu()

    monkeypatch.setenv(SWITCH, kernels)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert_close(
        run(on_gpu, arguments, options, dtype=dtype), run(module.fast, arguments, options), tolerance
    )
