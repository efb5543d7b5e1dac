"""See a loss, a state or a gradient that is not finite at its step, before the optimizer moves."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from longroll import ranks
from longroll.errors import LongrollError
from longroll.interventions import Intervention
from longroll.state import RecurrentState, StateKey
from longroll.training._batch import IGNORED
from longroll.training.sharding import local

OnNotFinite = Literal["stop", "drop"]
"""What a run does at a step whose loss, state or gradient is not finite."""

IN_A_ROW = 5
"""Steps that are not finite one after another, from which a run stops although it drops states."""

logger = logging.getLogger("longroll")


class Guard:
    """Watches one run on all its ranks.

    The result stays on the device and is reduced over the ranks there. On a CPU it is read before the
    optimizer moves. On a GPU nothing waits for it: the fused optimizers skip the step by themselves
    (`found_inf`, as under a gradient scaler), and the host reads it a step later; other optimizers wait.

    A run that drops states skips such a step on all ranks, forgets the states that are not finite, and goes
    on. Where the loss or the gradient of a rank is not finite and all its states are, the rank forgets all of
    them: which one is at fault cannot be told.

    The same reduction agrees on a stop that was asked of one rank (`longroll.training.stop`).

    Args:
        on_not_finite: stop the run, or drop states.

    Raises:
        LongrollError: for another `on_not_finite`.
    """

    def __init__(self, on_not_finite: OnNotFinite = "stop") -> None:
        if on_not_finite not in get_args(OnNotFinite):
            raise LongrollError(
                f"`on_not_finite` {on_not_finite!r} is none of {', '.join(get_args(OnNotFinite))}."
            )
        self.drops = on_not_finite == "drop"
        self.stop = False
        """Whether a rank was asked to stop, as all ranks know it."""
        self.dropped: list[dict[str, Any]] = []
        """The steps that were skipped, until somebody takes them: `not_finite_step`, `not_finite`,
        `states_dropped`."""
        self._in_a_row = 0
        self._sizes: list[RecurrentState] = []  # of the states of this step
        self._losses: list[Tensor] = []  # of this step, whether they are finite; where states are dropped
        self._last_loss: Tensor | None = None
        self._pending: tuple[int, Tensor, Any, list[RecurrentState], Tensor] | None = None

    def see(self, final_state: RecurrentState) -> None:
        """Note the largest number of each layer and head of a micro-batch's final state."""
        kept = final_state.part("recurrent", "conv").detach()
        self._sizes.append(kept.map_stacked(_sizes))

    def see_loss(self, loss: Tensor) -> Tensor:
        """Note the loss of a micro-batch.

        Returns:
            What is logged of it: where states are dropped, a loss that is not finite is the one before it.
        """
        if not self.drops:
            return loss
        finite = loss.detach().isfinite()
        self._losses.append(finite)
        before = torch.zeros_like(loss) if self._last_loss is None else self._last_loss
        self._last_loss = torch.where(finite, loss.detach(), before)
        return self._last_loss

    def before_step(
        self,
        optimizer: Any,
        step: int,
        loss: Tensor,
        gradient: Tensor | float,
        *,
        stop: bool,
        scaled: bool,
        intervention: Intervention | None = None,
    ) -> None:
        """Decide on a step whose gradients are ready.

        Args:
            optimizer: torch's, about to move.
            step: its number, from 1.
            loss: summed since it was last logged.
            gradient: its norm, of all ranks.
            stop: whether this rank was asked to stop.
            scaled: whether a gradient scaler looks after infinite gradients, which it expects now and then.
            intervention: forgets its states where states are dropped.

        Raises:
            LongrollError: on every rank, naming the step, and the layer and head of the state.
        """
        device = loss.device
        states = _all_finite([t for sizes in self._sizes for t in sizes.values()], device)
        losses = _all_finite([loss.detach().float()], device)
        if self.drops:
            losses = torch.stack([losses, *self._losses]).all()
        norm = torch.tensor(True, device=device)
        if not scaled:
            norm = torch.as_tensor(gradient, device=device).detach().float().isfinite().all()
        finite = torch.stack([states & losses & norm, torch.tensor(not stop).to(device, non_blocking=True)])
        flags = torch.cat([finite, (states & losses)[None]]).logical_not().float()
        if not ranks.alone():
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        self.settle()
        sizes, self._sizes, self._losses = self._sizes, [], []
        forgotten = torch.zeros((), device=device)
        if self.drops and intervention is not None:
            # of this rank: its loss alone is at fault, or nothing that a rank saw but the gradient
            unknown = (~losses & states) | ((flags[0] > 0) & (flags[2] == 0))
            forgotten = intervention.forget(flags[0] > 0, unknown)
        if device.type != "cuda":
            self._pending = step, flags, None, sizes, forgotten
            self._settle_for(optimizer)
            return
        host = torch.empty(4, pin_memory=True)
        host.copy_(torch.cat([flags, forgotten.float()[None]]), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending = step, host[:3], event, sizes, host[3]
        if not scaled and getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale, optimizer.found_inf = None, flags[0]
        else:
            self._settle_for(optimizer)

    def _settle_for(self, optimizer: Any) -> None:
        if self.settle():
            _skip_a_step(optimizer)

    def settle(self) -> bool:
        """Read what the last step saw; return whether it was not finite, and states were dropped.

        Raises:
            LongrollError: as `before_step`.
        """
        if self._pending is None:
            return False
        step, flags, event, sizes, forgotten = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        bad, stop, _ = flags.tolist()
        self.stop = self.stop or bool(stop)
        if not bad:
            self._in_a_row = 0
            return False
        found = ranks.gather((_first_bad(sizes), int(forgotten)))
        where = next((place for place, _ in found if place), "the loss or its gradient")
        rows = sum(count for _, count in found)
        self._in_a_row += 1
        if not self.drops:
            raise self._error(
                f"Step {step}: {where} is not finite, and the optimizer did not move. Lower `learning_rate`, "
                "or drop the states by `on_not_finite`. The last whole checkpoint is kept."
            )
        if self._in_a_row >= IN_A_ROW:
            raise self._error(
                f"Step {step}: {where} is not finite, as in the {IN_A_ROW - 1} steps before, though their "
                "states were dropped. Lower `learning_rate`. The last whole checkpoint is kept."
            )
        self.dropped.append({"not_finite_step": step, "not_finite": where, "states_dropped": rows})
        if ranks.rank() == 0:
            logger.warning(
                "Step %d: %s is not finite. The optimizer did not move, and the states of %d rows start "
                "from zero.",
                step, where, rows,
            )  # fmt: skip
        return True

    def _error(self, message: str) -> LongrollError:
        error = LongrollError(message)
        error.told = ranks.rank() > 0
        return error


def _all_finite(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Return whether all numbers are finite, ()."""
    seen = [t.to(device).isfinite().all() for t in tensors]
    return torch.stack(seen).all() if seen else torch.tensor(True, device=device)


def _skip_a_step(optimizer: Any) -> None:
    """Let the next call of the optimizer's `step` move nothing."""
    step = optimizer.step

    def skip(*_: Any, **__: Any) -> None:
        optimizer.step = step

    optimizer.step = skip


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


def check_loss(loss: float, targets: Tensor) -> None:
    """Refuse to save finite weights whose loss is not, as after a step that was far too large.

    Args:
        loss: nats, of a batch of this rank.
        targets: targets of the batch; a batch without any has no loss.

    Raises:
        LongrollError: on every rank, where the loss of one is not finite.
    """
    mine = math.isfinite(loss) or not (targets != IGNORED).any()
    if not all(ranks.gather(mine)):
        error = LongrollError(
            "The loss with the trained weights is not finite, and they are not saved: lower `learning_rate`, "
            "and name another `output`."
        )
        error.told = ranks.rank() > 0
        raise error


def _sizes(stack: Tensor) -> Tensor:
    """Return the largest absolute number (K, H) of a stack (K, B, H, ...), or NaN."""
    axes = [axis for axis in range(1, stack.ndim) if axis != 2]
    sizes: Tensor = torch.linalg.vector_norm(stack, ord=torch.inf, dim=axes)
    return sizes


def _first_bad(sizes: list[RecurrentState]) -> str | None:
    for state in sizes:
        for key, heads in sorted(
            state.items(), key=lambda item: (item[0].layer, item[0].part != "recurrent")
        ):
            bad = heads.isfinite().logical_not().nonzero()
            if len(bad):
                return _place(key, int(bad[0]))
    return None


def _place(key: StateKey, head: int) -> str:
    part = "state" if key.part == "recurrent" else f"{key.part} state"
    return f"the {part} of layer {key.layer}, head {head}"
