from types import SimpleNamespace

import pytest
import torch

from longroll.ops import _backend
from longroll.ops._backend import SWITCH, choose

CUDA = torch.device("cuda")


@pytest.fixture
def installed(monkeypatch):
    """A machine with Triton and fla, and the environment of a fresh shell."""
    monkeypatch.setattr(_backend, "_installed", lambda package: True)
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
        ("delta_rule", "cuda", torch.float32, (64, 64), "tf32"),
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


@pytest.mark.parametrize("op", ["ssd", "mamba2"])
@pytest.mark.parametrize(
    ("dtype", "sizes", "room", "reason"),
    [
        (torch.bfloat16, (128, 64), 99 << 10, None),
        (torch.bfloat16, (256, 64), 227 << 10, None),
        (torch.bfloat16, (256, 64), 99 << 10, "99 are there"),  # an RTX 4090, an L4
        (torch.float32, (64, 64), 227 << 10, None),
        (torch.float32, (128, 64), 227 << 10, "compile"),
    ],
    ids=str,
)
def test_heads_that_a_gpu_has_no_room_for_run_in_pytorch(op, dtype, sizes, room, reason, monkeypatch):
    monkeypatch.setattr(_backend, "_installed", lambda package: True)
    gpu = SimpleNamespace(shared_memory_per_block_optin=room)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    refusal = _backend._refusal(op, CUDA, dtype, sizes)
    assert refusal is None if reason is None else reason in refusal


@pytest.mark.parametrize(
    ("op", "room", "reason"),
    [("ssd", 227, None), ("ssd", 163, "want 176 KiB"), ("mamba2", 227, "float16 holds no state")],
)
def test_float16_takes_the_room_of_float32(op, room, reason, monkeypatch):
    monkeypatch.setattr(_backend, "_installed", lambda package: True)
    gpu = SimpleNamespace(shared_memory_per_block_optin=room << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    refusal = _backend._refusal(op, CUDA, torch.float16, (64, 128))
    assert refusal is None if reason is None else reason in refusal
    monkeypatch.setattr(_backend, "TF32_FOR_FLOAT16", False)
    assert "float16 holds no state" in str(_backend._refusal(op, CUDA, torch.float16, (64, 128)))


def test_a_gpu_that_does_not_say_what_a_block_may_opt_in_to(monkeypatch):
    monkeypatch.setattr(_backend, "_installed", lambda package: True)
    gpu = SimpleNamespace(shared_memory_per_block=64 << 10)  # AMD's
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert "64" in str(_backend._refusal("ssd", CUDA, torch.bfloat16, (64, 128)))


def test_tf32_by_pytorchs_newer_switch(installed):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert choose("gla", CUDA, torch.float32, (64, 64)).kernel is not None
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_a_kernel_runs_on_the_device_of_its_inputs(monkeypatch):
    entered = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "device", Device)
    second = torch.device("cuda", 1)
    run = _backend._on(second, lambda x, *, y: (x, y, list(entered)))
    assert run(1, y=2) == (1, 2, [second]) and entered == [second, None]


def test_float32_where_it_is_exact_or_need_not_be(installed, monkeypatch):
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
    assert choose("gla", CUDA, torch.float32, (64, 64)).kernel is not None
    monkeypatch.delenv("TRITON_F32_DEFAULT")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert choose("gla", CUDA, torch.float32, (64, 64)).kernel is not None


@pytest.mark.parametrize("op", _backend.KERNELS)
def test_the_switch_keeps_everything_in_pytorch(op, installed, monkeypatch):
    monkeypatch.setenv(SWITCH, "torch")
    assert choose(op, CUDA, torch.bfloat16, (64, 64)) == (None, f"chunked PyTorch: {SWITCH}=torch")


def test_what_is_not_installed_is_named(installed, monkeypatch):
    monkeypatch.setattr(_backend, "_installed", lambda package: package != "fla")
    assert choose("gla", CUDA, torch.bfloat16, (64, 64)).reason == "chunked PyTorch: fla is not installed"
