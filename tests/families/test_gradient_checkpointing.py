"""Under gradient checkpointing every layer runs again in backward, whatever replaces its forward."""

from types import SimpleNamespace

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from longroll import RecurrentLM
from longroll.conformance import tiny
from longroll.families import _norms

IDS = torch.randint(tiny.VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))


def norm_of_sum(x, add, weight, eps, size, dtype):
    """What the kernel of a GPU computes (ops/gpu/rms_norm.py)."""
    total = x if add is None else x + add.to(x.dtype)
    return (weight * total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)).to(dtype), total


def norm(x, weight, eps, gate, size, dtype):
    """The same without a sum."""
    x = x if gate is None else x * torch.nn.functional.silu(gate)
    x = x.unflatten(-1, (-1, size))
    return (weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).flatten(-2)).to(dtype)


KERNELS = {"rms_norm": norm, "rms_norm_of_sum": norm_of_sum}


def gradients_and_runs(lm: RecurrentLM, *, checkpointing: bool) -> tuple[list[torch.Tensor], list[int]]:
    """Gradients of a loss, and how often each part of each layer ran."""
    state = lm.train().zero_state(len(IDS)) if lm.family.recurrent else None
    if checkpointing:
        lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    parts = [
        part
        for layer in lm.model.modules()
        if isinstance(layer, GradientCheckpointingLayer)
        for part in layer.children()
    ]
    runs = [0] * len(parts)
    for place, part in enumerate(parts):
        run = part.forward

        def counted(*arguments, place=place, run=run, **named):
            runs[place] += 1
            return run(*arguments, **named)

        part.forward = counted
    logits, _ = lm(IDS, state)
    logits.float().square().mean().backward()
    return [p.grad for p in lm.parameters() if p.grad is not None], runs


@pytest.mark.parametrize("kernels", [False, True], ids=["PyTorch", "fused norms"])
@pytest.mark.parametrize("name", ["mamba", "mamba2", "bamba", "falcon_h1", "qwen3_next", "gla", "minimax"])
@pytest.mark.filterwarnings("ignore")
def test_layers_run_twice_and_gradients_stay(name, kernels, monkeypatch):
    expected, once = gradients_and_runs(RecurrentLM(tiny.build(name)), checkpointing=False)
    if kernels:
        chosen = {op: SimpleNamespace(kernel=kernel) for op, kernel in KERNELS.items()}
        monkeypatch.setattr(_norms, "choose", lambda op, *_: chosen[op])
    found, twice = gradients_and_runs(RecurrentLM(tiny.build(name)), checkpointing=True)
    assert sum(once) > 0 and twice == [2 * runs for runs in once]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
