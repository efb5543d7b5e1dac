"""A check inside each run: the state reaches what the model gives, or the run stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longroll.errors import LongrollError
from longroll.families._family import is_sharded
from longroll.state import RecurrentState

_KNOWN = ("transformers", "torch", "longroll", "fla", "peft", "accelerate", "trl")

Read = Callable[[RecurrentState], Tensor]
"""Reads a part of a batch from a state and gives the hidden states (B, T, D) that the loss is made of."""


class LiveCheck:
    """Makes sure, once a run, that the initial state reaches the hidden states that the loss is made of.

    At the first state that is not zero on some rank, a part of the batch is read from another state and from
    this one, with the same random numbers. All ranks stop if on one of them no gradient reaches that state,
    or if both states give the same hidden states. Neither the gradients of parameters nor the random state
    change. FSDP's modules are compared without the gradient, which their hooks would take for that of a step.

    Args:
        model: the model, for the message.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.done = False

    def due(self, state: RecurrentState | None) -> bool:
        """Return whether a batch that starts from `state` would be checked; all ranks ask together."""
        if self.done or state is None or not torch.is_grad_enabled():
            return False
        return _any_rank(_is_nonzero(state))

    def check(self, read: Read, state: RecurrentState) -> None:
        """Check that `state`, which is due, reaches what `read` gives.

        Raises:
            LongrollError: when it does not.
        """
        self.done = True
        device = next(iter(state.values())).device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            fault, other = self._probe(read, state)
        with torch.random.fork_rng(devices=devices), torch.set_grad_enabled(not is_sharded(self.model)):
            if fault is None and torch.equal(read(state).detach(), other):
                fault = "another state gives the same hidden states"
        if _any_rank(fault is not None, device):
            self.stop(fault or "seen on another rank")

    def stop(self, fault: str) -> NoReturn:
        """Stop the run.

        Raises:
            LongrollError: always; it names the likely wrapper.
        """
        raise LongrollError(
            f"The initial state does not reach the loss: {fault}. {self._suspect()} Remove it, or train with "
            "intervention=None."
        )

    def _probe(self, read: Read, state: RecurrentState) -> tuple[str | None, Tensor]:
        """Return what is wrong with the gradient into another state, and the hidden states that it gives."""
        leaves = {
            key: (t.detach() + 1).requires_grad_() for key, t in state.items() if key.part == "recurrent"
        }
        other = RecurrentState({**state, **leaves}, seen=state.seen)
        if is_sharded(self.model):
            with torch.no_grad():  # a graph that no backward frees would double the memory of the step
                return None, read(other)
        hidden = read(other)
        if not hidden.requires_grad:
            return "no gradient reaches it", hidden
        weights = torch.arange(hidden.shape[-1], device=hidden.device).cos()  # a norm would undo equal ones
        found = torch.autograd.grad(
            (hidden.float() * weights).sum(), list(leaves.values()), allow_unused=True
        )
        lost = sorted({key.layer for key, g in zip(leaves, found, strict=True) if g is None})
        if lost:
            return f"no gradient reaches that of layer {', '.join(map(str, lost))}", hidden.detach()
        nonzero = any(bool(g.count_nonzero()) for g in found if g is not None)
        return None if nonzero else "its gradient is zero", hidden.detach()

    def _suspect(self) -> str:
        """Return the likely wrapper."""
        for name, module in self.model.named_modules():
            where = f"{type(module).__name__} ({name or 'the model'})"
            if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
                return f"torch.compile around {where} is likely to drop it."
            if _foreign(vars(module).get("forward")):
                return f"The replaced forward of {where} is likely to drop it."
            if any(map(_foreign, (*module._forward_pre_hooks.values(), *module._forward_hooks.values()))):
                return f"A forward hook on {where} is likely to drop it."
            if _foreign(type(module)):
                return f"{where}, of {type(module).__module__}, is likely to drop it."
        return f"The forward of {type(self.model).__name__} drops it."


def _foreign(function: Any) -> bool:
    """Return whether a class or function comes from outside the libraries whose forwards are known."""
    home = getattr(getattr(function, "func", function), "__module__", None) or ""
    return home.partition(".")[0] not in _KNOWN and function is not None


def _is_nonzero(state: RecurrentState) -> bool:
    return any(bool(t.any()) for key, t in state.items() if key.part == "recurrent")


def _any_rank(flag: bool, device: torch.device | None = None) -> bool:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return flag
    if device is None:
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    found = torch.tensor(float(flag), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)
