"""What many tests need: tiny random models (`longroll.conformance.tiny`), random tokens, and comparisons."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from longroll.conformance.tiny import CONFIGS as EVERY
from longroll.conformance.tiny import VOCAB, build
from longroll.model import RecurrentLM
from longroll.state import RecurrentState

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # also for the processes that tests start
torch.set_num_threads(1)  # a pytest worker is one of several

RECURRENT = ["mamba", "falcon_mamba", "mamba2", "mamba2_groups"]
"""What a test runs on that needs a state, and to which one family is like another."""
CONTROLS = ["gpt2", "llama", "qwen2", "qwen3", "gpt_neox"]
CONFIGS = RECURRENT + CONTROLS


def lm_of(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> RecurrentLM:
    """A tiny model, opened by longroll."""
    return RecurrentLM(build(name, seed, dtype, **config))


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random ids (rows, length)."""
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Largest difference, relative to the largest number expected."""
    difference = ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
    assert difference <= tolerance, f"{what}: {difference:.1e} > {tolerance:.0e}"


def assert_same_state(actual: RecurrentState, expected: RecurrentState, tolerance: float = 0.0) -> None:
    """The same keys, `seen` and, within the tolerance, numbers; 0: bit for bit."""
    assert actual.keys() == expected.keys()
    assert actual.seen == expected.seen
    for key in expected:
        if tolerance:
            assert_close(actual[key], expected[key], tolerance, str(key))
        else:
            assert torch.equal(actual[key], expected[key]), str(key)


def assert_same_numbers(found: Any, expected: Any, where: str = "") -> None:
    """The same plain data: numbers to seven digits, effective ranks, which hold fewer, to six.

    The seven digits of a ratio are an absolute error of its logarithm.
    """
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name, value in expected.items():
            assert_same_numbers(found[name], value, f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_same_numbers(found[i], value, f"{where}[{i}]")
    elif isinstance(expected, float):
        relative, absolute = 1e-6 if "rank" in where else 1e-7, 1e-7 if ".log_" in where else 1e-9
        assert found == pytest.approx(expected, rel=relative, abs=absolute), where
    else:
        assert found == expected, where


__all__ = [
    "CONFIGS",
    "CONTROLS",
    "EVERY",
    "RECURRENT",
    "VOCAB",
    "assert_close",
    "assert_same_numbers",
    "assert_same_state",
    "build",
    "lm_of",
    "tokens",
]
