import pytest
import test_matrix_states
import test_rms_norm
import test_selective_scan
import test_short_conv
import test_ssd
import torch
from agreement import assert_close, drop, run

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


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_on_a_gpu_is_the_formula(gated, dtype):
    from longroll.ops.triton.rms_norm import rms_norm

    def on_gpu(**a):
        on = {k: v.cuda() if torch.is_tensor(v) else v for k, v in a.items()}
        return rms_norm(**on).cpu(), torch.zeros(())

    arguments = drop((gated,), test_rms_norm.inputs((2, 700, 512, 0)), ("gate",))
    arguments = {k: None if v is None else v.to(dtype).double() for k, v in arguments.items()}
    options = {"eps": 1e-5, "size": 128}
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    expected = run(test_rms_norm.reference, arguments, options)
    assert_close(run(on_gpu, arguments, options, dtype=dtype), expected, tolerance)


@pytest.mark.parametrize("name", ["selective_scan", "ssd", "short_conv"])
@pytest.mark.parametrize("time", [1, 63, 130, 1201])
def test_bfloat16_kernels_stay_near_the_oracle(name, time, monkeypatch):
    """Inputs rounded to bf16, states of large norm and gradients of them in float32."""
    module, size, options = CASES[name]
    arguments = module.inputs((size[0], time, *size[2:]))
    state = 30 * arguments.pop("initial_state")
    arguments = {k: v.bfloat16().double() for k, v in arguments.items()}
    arguments["initial_state"] = state.float().double()

    def on_gpu(initial_state, **a):
        low = {k: v.bfloat16().cuda() for k, v in a.items()}
        y, final = module.fast(**low, **options, initial_state=initial_state.cuda())
        return y.cpu().float(), final.cpu()

    def oracle(**a):
        return module.fast(**a, **options)

    monkeypatch.setenv(SWITCH, "triton")
    found = run(on_gpu, arguments, dtype=torch.float32)
    for key, value in run(oracle, arguments).items():
        difference = (found[key].double() - value).norm() / value.norm().clamp_min(1e-6)
        assert difference < 2e-2, f"{key}: {difference:.1e}"
