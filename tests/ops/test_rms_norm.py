"""The norm that `families/_norms.py` takes over: which modules, and that nothing changes without a kernel."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import Mamba2RMSNorm, MambaRMSNormGated
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from longroll.families import _norms


def inputs(size, seed=0):
    B, T, D, _ = size
    torch.manual_seed(seed)
    shapes = {"x": (B, T, D), "weight": (D,), "gate": (B, T, D)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def reference(x, weight, eps, gate, size):
    h = x if gate is None else x * F.silu(gate)
    groups = h.unflatten(-1, (-1, size))
    unit = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    return weight * unit.flatten(-2), x.new_zeros(())


@pytest.mark.parametrize(
    ("module", "known"),
    [
        (Mamba2RMSNorm(8), True),
        (LlamaRMSNorm(8), True),
        (MambaRMSNormGated(8, 4), True),
        (Qwen3NextRMSNorm(8), False),  # multiplies by 1 + weight
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_modules_that_compute_it_are_given_the_kernel(module, known):
    model = torch.nn.ModuleList([module])
    _norms.fuse_norms(model)
    _norms.fuse_norms(model)
    assert ("forward" in vars(module)) == known


@pytest.mark.parametrize("name", ["Mamba2", "Bamba", "Zamba2"])
def test_the_formula_is_that_of_the_modules(name):
    modeling = importlib.import_module(f"transformers.models.{name.lower()}.modeling_{name.lower()}")
    module = getattr(modeling, "MambaRMSNormGated" if name == "Mamba2" else f"{name}RMSNormGated")(12, 4)
    arguments = {k: v.float() for k, v in inputs((2, 5, 12, 4)).items()}
    module.weight.data = arguments["weight"]
    expected, _ = reference(**arguments, eps=module.variance_epsilon, size=4)
    torch.testing.assert_close(module(arguments["x"], arguments["gate"]), expected)
