"""Whether the dtype fails, and not the state: activations near float16's limit, losses that are not finite.

float16 holds no number above 65,504. A model that overflows there gives NaN from some position on, which
looks like a state that explodes, and no intervention on states corrects it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from longroll import ranks
from longroll.measure._position_loss import PositionLoss, position_loss
from longroll.measure.roll_out import free_bytes
from longroll.model import RecurrentLM

LIMIT = torch.finfo(torch.float16).max
NEAR = 0.25
"""Share of `LIMIT` from which activations are said to come near it: other texts may give larger ones."""
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Precision:
    """Effect of the dtype of the weights on a roll-out."""

    dtype: str
    largest: float | None = None
    """The largest activation of a float16 model; infinite where one overflowed; None for another dtype."""
    where: str | None = None
    """The module that took or gave it."""
    not_finite_from: int | None = None
    """The first position at which a loss is not finite."""
    finite_in_float32: bool | None = None
    """Whether float32 weights read past that position with finite losses; None where this was not tried."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for results."""
        return asdict(self)

    @property
    def blamed(self) -> bool:
        """Whether the dtype is why the loss is not finite."""
        return self.finite_in_float32 is True

    @property
    def suspect(self) -> bool:
        """Whether the dtype is, or may be, why the loss is not finite."""
        half = self.dtype in ("float16", "bfloat16")
        return half and self.not_finite_from is not None and self.finite_in_float32 is not False

    @property
    def sentence(self) -> str | None:
        """The finding in words; None where there is nothing to say."""
        place = f" in {self.where}" if self.where else ""
        if self.not_finite_from is not None:
            if self.finite_in_float32 is None:
                return None
            at = f"The loss is not finite from position {self.not_finite_from} on in {self.dtype}"
            if not self.finite_in_float32:
                return f"{at}, nor in float32."
            over = f": {self.dtype} overflows{place}" if self.largest == math.inf else ""
            return f"{at}, and finite in float32{over}."
        if self.largest is None or self.largest < NEAR * LIMIT:
            return None
        where = "near" if self.largest <= LIMIT else "past"
        held = "" if self.largest <= LIMIT else ", held in float32 here"
        return (
            f"Activations reach {self.largest:,.0f}{place}, {where} float16's limit of {LIMIT:,.0f}{held}: "
            "read this model in bfloat16 or float32."
        )


class Float16Watch:
    """Notes the largest number that each module of a float16 model takes or gives, while it is entered.

    Nothing is noted for other models. Numbers in float32 count too: what reaches a norm may pass the limit
    here, and overflow in other code for the same model.
    """

    def __init__(self, lm: RecurrentLM) -> None:
        self.modules = {name: module for name, module in lm.model.named_modules() if name}
        self.active = any(p.dtype == torch.float16 for p in lm.model.parameters())
        self._largest: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Float16Watch:
        if self.active:
            self._hooks = [
                module.register_forward_hook(self._hook(name)) for name, module in self.modules.items()
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Any:
        def note(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            for tensor in (*inputs, *(output if isinstance(output, tuple) else (output,))):
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                    largest = torch.linalg.vector_norm(tensor.detach(), ord=math.inf).float()
                    before = self._largest.get(name)
                    self._largest[name] = largest if before is None else torch.maximum(before, largest)

        return note

    def state_dict(self) -> dict[str, Any]:
        """Return what was noted so far."""
        return dict(self._largest)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was noted before."""
        self._largest = dict(state)

    def over_ranks(self) -> None:
        """Take the largest numbers of all ranks for those noted here; every rank must call this."""
        for noted in ranks.gather(self._largest):
            for name, largest in noted.items():
                here = self._largest.get(name, largest)
                self._largest[name] = torch.maximum(here, largest.to(here))

    def largest(self) -> tuple[float | None, str | None]:
        """Return the largest activation and its module; of several that overflowed, the first to run."""
        largest = {name: t.item() for name, t in self._largest.items()}
        for name, value in largest.items():
            if not math.isfinite(value):
                return math.inf, name
        if not largest:
            return None, None
        most = max(largest, key=lambda name: largest[name])
        return largest[most], most


def check_precision(
    lm: RecurrentLM, tokens: Tensor, carried: PositionLoss, watch: Float16Watch, train_length: int
) -> Precision:
    """Say what the dtype of the weights did to a roll-out; where it is not finite, read on in float32.

    Args:
        lm: the model.
        tokens: (B, L + 1).
        carried: their losses.
        watch: what was noted while they were measured.
        train_length: T; the float32 check reads at least as much past the first loss that is not finite.
    """
    half = {p.dtype for p in lm.model.parameters() if p.dtype in _HALF}
    dtype = half.pop() if half else next(lm.model.parameters()).dtype
    name = str(dtype).removeprefix("torch.")
    finite = carried.losses.isfinite()
    if finite.all():
        return Precision(name, *watch.largest())
    first = int((~finite).any(dim=0).nonzero()[0])
    finite_there = None
    if dtype in _HALF:
        row = int((~finite[:, first]).nonzero()[0])
        stop = max(2 * first, first + train_length)
        finite_there = _finite_in_float32(lm, tokens[row : row + 1, : stop + 1])
    return Precision(name, *watch.largest(), first, finite_there)


def _finite_in_float32(lm: RecurrentLM, tokens: Tensor) -> bool | None:
    """Return whether all losses of `tokens` are finite with float32 weights; None where memory is too
    short.
    """
    need = 4 * sum(p.numel() for p in lm.model.parameters())
    room = free_bytes(lm.device)
    if room < 1.25 * need:
        return None
    with suppress(torch.OutOfMemoryError), in_float32(lm):
        return bool(position_loss(lm, tokens).losses.isfinite().all())
    return None


@contextmanager
def in_float32(lm: RecurrentLM) -> Iterator[None]:
    """Give `lm` float32 weights for a while, and then the very tensors that it had."""
    tensors = [t for t in chain(lm.model.parameters(), lm.model.buffers()) if t.dtype in _HALF]
    kept = [t.data for t in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in zip(tensors, kept, strict=True):
            tensor.data = data
