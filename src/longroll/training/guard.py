"""See a loss, a state or a gradient that is not finite at its step, before the optimizer moves."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longroll import ranks
from longroll.errors import LongrollError
from longroll.state import RecurrentState, StateKey
from longroll.training.sharding import local


class Guard:
    """Watches one run on all its ranks.

    What is seen stays on the device and is reduced over the ranks there. On a CPU it is read before the
    optimizer moves. On a GPU nothing waits for it: the fused optimizers skip the step by themselves
    (`found_inf`, as under a gradient scaler), and the host reads it a step later; other optimizers wait.

    The same reduction agrees on a stop that was asked of one rank (`longroll.training.stop`).
    """

    def __init__(self) -> None:
        self.stop = False
        """Whether a rank was asked to stop, as all ranks know it."""
        self._sizes: list[RecurrentState] = []  # of the states of this step
        self._pending: tuple[int, Tensor, Any, list[RecurrentState]] | None = None

    def see(self, final_state: RecurrentState) -> None:
        """Note the largest number of each layer and head of a micro-batch's final state."""
        kept = final_state.part("recurrent", "conv").detach()
        self._sizes.append(kept.map_stacked(_sizes))

    def before_step(
        self, optimizer: Any, step: int, loss: Tensor, gradient: Tensor | float, *, stop: bool, scaled: bool
    ) -> None:
        """Decide on a step whose gradients are ready.

        Args:
            optimizer: torch's, about to move.
            step: its number, from 1.
            loss: summed since it was last logged.
            gradient: its norm, of all ranks.
            stop: whether this rank was asked to stop.
            scaled: whether a gradient scaler looks after infinite gradients, which it expects now and then.

        Raises:
            LongrollError: on every rank, naming the step, and the layer and head of the state.
        """
        device = loss.device
        seen = [loss.detach().float(), *(t.flatten() for sizes in self._sizes for t in sizes.values())]
        if not scaled:
            seen.append(torch.as_tensor(gradient, device=device).detach().float())
        bad = torch.stack([t.isfinite().all() for t in seen]).all().logical_not()
        flags = torch.stack([bad, torch.tensor(stop).to(device, non_blocking=True)]).float()
        if not ranks.alone():
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        self.settle()
        sizes, self._sizes = self._sizes, []
        if device.type != "cuda":
            self._pending = step, flags, None, sizes
            self.settle()
            return
        host = torch.empty(2, pin_memory=True)
        host.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending = step, host, event, sizes
        if not scaled and getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale, optimizer.found_inf = None, flags[0]
        else:
            self.settle()

    def settle(self) -> None:
        """Read what the last step saw.

        Raises:
            LongrollError: as `before_step`.
        """
        if self._pending is None:
            return
        step, flags, event, sizes = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        bad, stop = flags.tolist()
        self.stop = self.stop or bool(stop)
        if not bad:
            return
        found = ranks.gather(_first_bad(sizes))
        where = next((one for one in found if one), "the loss or its gradient")
        error = LongrollError(
            f"Step {step}: {where} is not finite, and the optimizer did not move. Lower `learning_rate`. "
            "The last whole checkpoint is kept."
        )
        error.told = ranks.rank() > 0
        raise error


def check_weights(model: torch.nn.Module) -> None:
    """Refuse to save weights that are not finite.

    Raises:
        LongrollError: on every rank, where a rank holds one.
    """
    named = [(name, local(p.detach())) for name, p in model.named_parameters() if p.is_floating_point()]
    bad = [(~p.isfinite()).any() for _, p in named]
    mine = next((name for (name, _), one in zip(named, bad, strict=True) if one), None) if bad else None
    found = next((name for name in ranks.gather(mine) if name), None)
    if found is not None:
        error = LongrollError(
            f"The weights {found} are not finite and are not saved: lower `learning_rate`. The last whole "
            "checkpoint is kept."
        )
        error.told = ranks.rank() > 0
        raise error


def _sizes(stack: Tensor) -> Tensor:
    """The largest absolute number (K, H) of a stack (K, B, H, ...), or NaN."""
    axes = [axis for axis in range(1, stack.ndim) if axis != 2]
    sizes: Tensor = torch.linalg.vector_norm(stack, ord=torch.inf, dim=axes)
    return sizes


def _first_bad(sizes: list[RecurrentState]) -> str | None:
    for state in sizes:
        for key, heads in state.items():
            bad = heads.isfinite().logical_not().nonzero()
            if len(bad):
                return _place(key, int(bad[0]))
    return None


def _place(key: StateKey, head: int) -> str:
    part = "state" if key.part == "recurrent" else f"{key.part} state"
    return f"the {part} of layer {key.layer}, head {head}"
