"""Run an op and its oracle on the same numbers and compare outputs, final states and every gradient."""

import torch
from hypothesis import settings

few = settings(max_examples=30, deadline=None, derandomize=True)


def run(op, arguments, options=None, *, dtype=torch.float64, seed=1):
    """Return y, the final state and each argument's gradient under a random linear loss, by name."""
    leaves = {k: None if v is None else v.to(dtype).clone().requires_grad_() for k, v in arguments.items()}
    y, state = op(**leaves, **(options or {}))
    generator = torch.Generator().manual_seed(seed)
    loss = sum((v.double() * torch.randn(v.shape, generator=generator).double()).sum() for v in (y, state))
    loss.backward()
    gradients = {f"d{k}": v.grad for k, v in leaves.items() if v is not None}
    return {"y": y.detach(), "state": state.detach(), **gradients}


def assert_close(found, expected, tolerance):
    """Compare by name: the largest error must be within `tolerance` of the largest number (at least 1)."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].isfinite().all(), name
        error = (found[name].double() - value.double()).abs().max().item()
        scale = max(1.0, value.abs().max().item())
        assert error <= tolerance * scale, f"{name}: error {error:.1e} on a scale of {scale:.1e}"


def with_state(op):
    """Make an op return its final state too, as the oracles always do."""
    return lambda **arguments: op(**arguments, output_final_state=True)


def drop(draw_flags, arguments, names):
    """Set the arguments whose flag is False to None."""
    return arguments | {name: None for name, keep in zip(names, draw_flags, strict=True) if not keep}
