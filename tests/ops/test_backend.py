import pytest
import torch

from longroll.ops import _backend
from longroll.ops._backend import SWITCH, Choice, choose

CUDA = torch.device("cuda")
CPU_ONLY = Choice(None, "no GPU")


@pytest.fixture
def installed(monkeypatch):
    """A machine with Triton and fla, and the environment of a fresh shell."""
    monkeypatch.setattr(_backend, "_installed", lambda package: True)
    monkeypatch.setattr(_backend, "affected", lambda: False)
    for variable in (SWITCH, "TRITON_F32_DEFAULT"):
        monkeypatch.delenv(variable, raising=False)


FLA = [op for op, module in _backend.KERNELS.items() if module == _backend.FLA]


@pytest.mark.parametrize("op", FLA)
def test_flas_kernels_run_in_16_bits(op, installed):
    choice = choose(op, CUDA, torch.bfloat16, (64, 128))
    assert choice.kernel is not None and choice.kernel.__name__ == op
    assert choice.reason == "fla's kernel"


@pytest.mark.parametrize(
    ("op", "device", "dtype", "sizes", "reason"),
    [
        ("gla", "cpu", torch.bfloat16, (64, 64), "no GPU"),
        ("gla", "cuda", torch.float64, (64, 64), "float32"),
        ("gla", "cuda", torch.float32, (64, 64), "tf32"),
        ("delta_rule", "cuda", torch.float32, (64, 64), "no float32"),
        ("retention", "cuda", torch.bfloat16, (8, 64), "at least 16"),
        ("retention", "cuda", torch.bfloat16, (64, 33), "even"),
        ("rwkv7", "cuda", torch.bfloat16, (512, 64), "at most 256"),
        ("linear_scan", "cuda", torch.float32, (), "no kernel"),
    ],
)
def test_a_slower_path_says_why(op, device, dtype, sizes, reason, installed):
    choice = choose(op, torch.device(device), dtype, sizes)
    assert choice.kernel is None
    assert choice.reason.startswith("chunked PyTorch: ") and reason in choice.reason


def test_float32_where_it_is_exact_or_need_not_be(installed, monkeypatch):
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
    assert choose("gla", CUDA, torch.float32, (64, 64)).kernel is not None
    monkeypatch.delenv("TRITON_F32_DEFAULT")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert choose("gla", CUDA, torch.float32, (64, 64)).kernel is not None


@pytest.mark.parametrize("op", FLA)
def test_no_gradient_where_it_would_be_wrong(op, installed, monkeypatch):
    monkeypatch.setattr(_backend, "affected", lambda: True)
    assert choose(op, CUDA, torch.bfloat16, (64, 64)).kernel is not None
    choice = choose(op, CUDA, torch.bfloat16, (64, 64), gradient=True)
    assert (choice.kernel is None) == (op in _backend.WRONG_GRADIENTS)
    assert choice.kernel is not None or "wrong on Hopper" in choice.reason


def test_a_gradient_is_expected_where_autograd_records(monkeypatch):
    expected = []
    monkeypatch.setattr(_backend, "choose", lambda *_, gradient: expected.append(gradient) or CPU_ONLY)
    plain, leaf = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 16, requires_grad=True)
    for inputs in ((plain, plain, None), (leaf, plain, None), (plain, plain, leaf)):
        _backend.kernel_for("delta_rule", *inputs)
    with torch.no_grad():
        _backend.kernel_for("delta_rule", leaf, leaf)
    assert expected == [False, True, True, False]


@pytest.mark.parametrize("op", _backend.KERNELS)
def test_the_switch_keeps_everything_in_pytorch(op, installed, monkeypatch):
    monkeypatch.setenv(SWITCH, "torch")
    assert choose(op, CUDA, torch.bfloat16, (64, 64)) == (None, f"chunked PyTorch: {SWITCH}=torch")


def test_what_is_not_installed_is_named(installed, monkeypatch):
    monkeypatch.setattr(_backend, "_installed", lambda package: package != "fla")
    assert choose("gla", CUDA, torch.bfloat16, (64, 64)).reason == "chunked PyTorch: fla is not installed"
