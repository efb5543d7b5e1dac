import functools

import pytest
import test_matrix_states
import test_rms_norm
import test_selective_scan
import test_short_conv
import test_ssd
import torch
from agreement import assert_close, drop, run

from longroll.conformance import laws
from longroll.conformance.tiny import VOCAB, build
from longroll.model import RecurrentLM
from longroll.ops._backend import SWITCH
from longroll.training.loss import loss_and_state, next_token_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CASES = {
    "selective_scan": (test_selective_scan, (2, 1200, 40, 16), {"dt_softplus": True}),
    "selective_scan of whole spans": (test_selective_scan, (2, 640, 64, 16), {"dt_softplus": True}),
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_kernels_run_on_the_gpu_of_their_inputs(name):
    """Forward and backward on the second GPU while the first is the current one."""
    ids = torch.randint(VOCAB, (2, 301), generator=torch.Generator().manual_seed(0))

    def gradients(device):
        found = laws.gradients(RecurrentLM(build(name).to(device)).train(), ids.to(device), [100, 1, 199])
        weights = {key: gradient.cpu() for key, gradient in found.weights.items()}
        return laws.Gradients(found.loss.cpu(), weights, found.embeddings.cpu())

    assert laws.gradient_gap(gradients("cuda:1"), gradients("cpu")).size < 1e-4


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_on_a_gpu_is_the_formula(gated, dtype):
    from longroll.ops.gpu.rms_norm import rms_norm

    def on_gpu(**a):
        on = {k: v.cuda() if torch.is_tensor(v) else v for k, v in a.items()}
        return rms_norm(**on).cpu(), torch.zeros(())

    arguments = drop((gated,), test_rms_norm.inputs((2, 700, 512, 0)), ("gate",))
    arguments = {k: None if v is None else v.to(dtype).double() for k, v in arguments.items()}
    options = {"eps": 1e-5, "size": 128}
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    expected = run(test_rms_norm.reference, arguments, options)
    assert_close(run(on_gpu, arguments, options, dtype=dtype), expected, tolerance)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("selective_scan", (40, 16)),
        ("ssd", (2, 4, 16, 32)),
        ("ssd", (2, 3, 32, 64)),
        ("ssd", (1, 8, 64, 128)),
        ("ssd", (1, 2, 64, 16)),
        ("ssd", (1, 2, 128, 64)),
        ("ssd", (1, 4, 128, 128)),
        ("ssd", (1, 8, 64, 256)),
        ("ssd", (1, 2, 128, 256)),
        ("short_conv", (40, 4)),
    ],
)
@pytest.mark.parametrize("time", [1, 63, 130, 1201])
def test_bfloat16_kernels_stay_near_the_oracle(name, sizes, time, monkeypatch):
    """Inputs rounded to bf16, states of large norm and gradients of them in float32.

    Where a sum cancels, as in the gradient of A, rounding the output's gradient alone already costs more.
    """
    module, _, options = CASES[name]
    arguments = module.inputs((2, time, *sizes))
    state = 30 * arguments.pop("initial_state")
    arguments = {k: v.bfloat16().double() for k, v in arguments.items()}
    arguments["initial_state"] = state.float().double()

    def on_gpu(initial_state, **a):
        low = {k: v.bfloat16().cuda() for k, v in a.items()}
        y, final = module.fast(**low, **options, initial_state=initial_state.cuda())
        return y.cpu().float(), final.cpu()

    def oracle(**a):
        return module.fast(**a, **options)

    exact = run(oracle, arguments)

    def errors(kernels):
        monkeypatch.setenv(SWITCH, kernels)
        found = run(on_gpu, arguments, dtype=torch.float32)
        return {k: (found[k].double() - v).norm() / v.norm().clamp_min(1e-6) for k, v in exact.items()}

    rounded = errors("torch")
    for key, error in errors("triton").items():
        assert error < max(2e-2, 5 * rounded[key]), f"{key}: {error:.1e}, in PyTorch {rounded[key]:.1e}"


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_gradient_has_the_same_bits_twice(name, monkeypatch):
    """Mamba-2's kernels always; Mamba-1's under torch.use_deterministic_algorithms."""
    monkeypatch.setenv(SWITCH, "triton")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    lm = RecurrentLM(build(name).cuda())
    ids = torch.randint(VOCAB, (4, 700), generator=torch.Generator().manual_seed(0)).cuda()
    found = []
    torch.use_deterministic_algorithms(name == "mamba")
    try:
        for _ in range(3):
            lm.zero_grad()
            lm(ids)[0].logsumexp(-1).sum().backward()
            found.append([p.grad.clone() for p in lm.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_small_steps_keep_their_digits():
    """Softplus far below zero, where 1 + exp would lose them: slow channels are what is at stake."""
    raw = torch.tensor([-3.4, -3.6, -7, -9.2, -12, -16.7], dtype=torch.float64).expand(1, 8, -1)
    x, A, B = torch.ones_like(raw), -torch.ones(6, 1, dtype=torch.float64), torch.ones(1, 8, 1)
    arguments = {"x": x, "dt": raw, "A": A, "B": B, "C": B, "dt_softplus": True, "output_final_state": True}
    exact = test_selective_scan.selective_scan(**arguments)
    low = {k: v.float().cuda() if torch.is_tensor(v) else v for k, v in arguments.items()}
    for found, expected in zip(test_selective_scan.selective_scan(**low), exact, strict=True):
        torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-5, atol=0)


def test_a_precompiled_call_compiles_nothing(monkeypatch):
    from triton import knobs

    from longroll.ops._precompile import precompile
    from longroll.ops.gpu.selective_scan import selective_scan

    call = functools.partial(selective_scan, dt_softplus=True)
    arguments = test_selective_scan.inputs((2, 100, 40, 5))  # an order that no other test compiles
    low = {k: v.float().cuda().requires_grad_() for k, v in arguments.items()}
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **k: compiled.append(k["fn"].name))
    precompile(call, low)
    assert len(compiled) >= 5
    compiled.clear()
    y, state = call(**low)
    torch.autograd.grad((y, state), list(low.values()), (y, state))
    assert not compiled
    expected = test_selective_scan.selective_scan(**arguments, dt_softplus=True, output_final_state=True)
    for found, exact in zip((y, state), expected, strict=True):
        assert (found.double().cpu() - exact).norm() < 1e-5 * exact.norm()


def test_a_mamba2_block_at_once_is_the_block(monkeypatch):
    ids = torch.randint(VOCAB, (2, 1301), generator=torch.Generator().manual_seed(0)).cuda()
    lm = RecurrentLM(build("mamba2").cuda()).train()
    monkeypatch.setenv(SWITCH, "torch")
    expected = laws.gradients(lm, ids, [1300])
    monkeypatch.setenv(SWITCH, "triton")
    for lengths in ([1300], [1, 2, 1296, 1]):
        assert laws.gradient_gap(laws.gradients(lm, ids, lengths), expected).size < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_on_a_gpu_is_pytorchs(dtype):
    logits = (10 * torch.randn(300, 50288, device="cuda")).to(dtype)
    targets = torch.randint(50288, (300,), device="cuda")
    targets[7] = -100
    found, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = next_token_loss(found[None] * 1, targets[None])
    expected = torch.nn.functional.cross_entropy(exact, targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    assert (found.grad.double() - exact.grad).norm() < (
        1e-5 if dtype == torch.float32 else 4e-3
    ) * exact.grad.norm()


@pytest.mark.parametrize("bf16", [False, True])
def test_a_loss_in_pieces_is_the_whole_on_a_gpu(bf16, monkeypatch):
    ids = torch.randint(VOCAB, (2, 301), generator=torch.Generator().manual_seed(0)).cuda()
    losses, gradients = [], []
    for tokens_at_once in (10_000, 70):
        lm = RecurrentLM(build("mamba2").cuda()).train()
        monkeypatch.setattr("longroll.training.loss.LOGITS", tokens_at_once * lm.vocab_size)
        monkeypatch.setattr("longroll.training.loss._WIDTHS", 0)
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            loss, _ = loss_and_state(lm, ids[:, :-1], ids[:, 1:])
        loss.backward()
        losses.append(loss.detach())
        gradients.append({k: p.grad for k, p in lm.model.named_parameters()})
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for key, whole in gradients[0].items():
        error = (gradients[1][key] - whole).norm() / whole.norm()
        assert error < (2e-2 if bf16 else 1e-5), f"{key}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [8, 20, 64, 128, 256])
@pytest.mark.parametrize("groups", [1, 4])
def test_block_attention_is_attention_to_all_blocks(groups, size, dtype):
    from longroll.ops._block_attention import block_attention

    generator = torch.Generator().manual_seed(size)

    def draw(heads: int, time: int) -> torch.Tensor:
        return torch.randn(2, time, heads, size, generator=generator).transpose(1, 2).cuda().to(dtype)

    q, k, v = draw(2 * groups, 70), draw(2, 70), draw(2, 70)
    past = [(draw(2, n), draw(2, n)) for n in (130, 1, 64)]
    found = block_attention(q, k, v, past)
    keys, values = (torch.cat([*(pair[i] for pair in past), new], 2) for i, new in enumerate((k, v)))
    keys, values = (t.double().repeat_interleave(groups, 1) for t in (keys, values))
    scores = q.double() @ keys.mT * size**-0.5
    later = torch.ones_like(scores, dtype=torch.bool).triu(1 + keys.shape[2] - q.shape[2])
    expected = scores.masked_fill(later, float("-inf")).softmax(-1) @ values
    limit = {torch.float64: 1e-12, torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert found.dtype == dtype
    assert (found.double() - expected).norm() / expected.norm() < limit


def test_a_linear_layer_sums_its_weights_gradient_in_float32():
    from longroll.ops.gpu.linear import linear

    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(3, 700, n, generator=generator).bfloat16() for n in (96, 160))
    weight, bias = (torch.randn(*shape, generator=generator) for shape in ((160, 96), (160,)))
    exact = [t.double().requires_grad_() for t in (x, weight.bfloat16(), bias.bfloat16())]
    expected = torch.autograd.grad(torch.nn.functional.linear(*exact), exact, dy.double())
    leaves = [t.cuda().requires_grad_() for t in (x.float(), weight, bias)]
    y = linear(*leaves, torch.bfloat16)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y, leaves, dy.cuda())
    for one, other, tolerance in zip(found, expected, (5e-3, 1e-5, 5e-3), strict=True):
        assert one.dtype == torch.float32
        assert (one.cpu().double() - other).norm() < tolerance * other.norm()


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_blocks_on_a_gpu_under_autocast_are_near_float64(name, monkeypatch):
    """All that is fused in training, beside PyTorch in the same precision."""
    ids = torch.randint(VOCAB, (2, 200), generator=torch.Generator().manual_seed(0))

    def gradients(kernels, dtype=None):
        monkeypatch.setenv(SWITCH, kernels)
        lm = RecurrentLM(build(name).to(dtype) if dtype else build(name).cuda()).train()
        batch = ids.to(lm.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype is None):
            loss_and_state(lm, batch[:, :-1], batch[:, 1:])[0].backward()
        return torch.cat([p.grad.flatten().double().cpu() for p in lm.parameters()])

    exact = gradients("torch", torch.float64)
    errors = [((gradients(kind) - exact).norm() / exact.norm()).item() for kind in ("triton", "torch")]
    assert errors[0] < max(1.5 * errors[1], 1e-2), errors


@pytest.mark.parametrize("sizes", [(1, 8, 64, 128), (2, 2, 32, 64)])
@pytest.mark.parametrize("time", [63, 130])
def test_float16_states_beyond_its_range(sizes, time, monkeypatch):
    """Products in tf32."""
    arguments = test_ssd.inputs((2, time, *sizes))
    arguments = {k: v.half().double() for k, v in arguments.items() if k != "z"}
    arguments["initial_state"] *= 1e6
    exact = test_ssd.fast(**arguments, dt_softplus=True)
    half = {k: v.float().cuda() for k, v in arguments.items()}
    half |= {name: half[name].half() for name in ("dt", "B", "C")}
    monkeypatch.setenv(SWITCH, "triton")
    for one, other in zip(test_ssd.fast(**half, dt_softplus=True), exact, strict=True):
        assert (one.cpu().double() - other).norm() < 2e-3 * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("T", "D", "W"), [(1, 7, 4), (61, 300, 4), (62, 256, 2), (1000, 2304, 4)])
@pytest.mark.parametrize("past", [True, False])
def test_the_convolution_on_a_gpu_is_that_in_float64(dtype, T, D, W, past):
    """A slice of a wider matrix, as the input projection gives it; its gradient goes into another slice."""
    from longroll.ops.gpu import short_conv

    generator = torch.Generator().manual_seed(T)
    wide, dy = (torch.randn(2, T, n, generator=generator).to(dtype) for n in (D + 11, D))
    weight, bias, before = (
        torch.randn(shape, generator=generator) for shape in ((D, W), (D,), (2, W - 1, D))
    )
    a = {"x": wide[..., 5:-6], "weight": weight, "bias": bias, "past": before if past else None}
    exact = {k: None if v is None else v.double().requires_grad_() for k, v in a.items()}
    start = before.double() * 0 if exact["past"] is None else exact["past"]
    y = torch.nn.functional.silu(
        torch.nn.functional.conv1d(
            torch.cat([start, exact["x"]], 1).mT, exact["weight"][:, None], exact["bias"], groups=D
        )
    ).mT
    leaves = [t for t in exact.values() if t is not None]
    expected = [y, *torch.autograd.grad(y, leaves, dy.double())]
    on_gpu = {k: None if v is None else v.cuda() for k, v in (a | {"x": wide}).items()}
    on_gpu["x"], dwide = on_gpu["x"][..., 5:-6], torch.zeros_like(on_gpu["x"])
    arguments = (*on_gpu.values(), True)
    found = [short_conv.forward(*arguments)]
    dweight, dbias, dpast = short_conv.backward(dy.cuda(), *arguments, dwide[..., 5:-6])
    found += [t for t in (dwide[..., 5:-6], dweight, dbias, dpast) if t is not None]
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        rounded = {torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(dtype) if i < 2 else None
        assert (one.cpu().double() - other).norm() < (rounded or 1e-5) * other.norm()
    assert not dwide[..., :5].any() and not dwide[..., -6:].any()
