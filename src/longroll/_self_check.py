"""The self-check of a model: what has to hold before a number of it is worth reading."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longroll.errors import LongrollError
from longroll.state import RecurrentState, StateKey

if TYPE_CHECKING:
    from longroll.model import RecurrentLM

_FLIPPED = 0.2
"""How far a state or half of the tokens' logits may be from what they should be, after experts that flip."""


def check_weights(lm: RecurrentLM) -> None:
    """Raise a LongrollError for weights that are not finite."""
    for name, parameter in lm.model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise LongrollError(f"{lm.name}: {name} holds NaN or infinity; the checkpoint is broken.")


@torch.no_grad()
def check_chunks(lm: RecurrentLM, ids: Tensor) -> None:
    """Raise a LongrollError where `ids` (B, T), T >= 7, read in chunks give other numbers than read at once.

    The chunks are two long ones, one token, and two; the message names the layer.
    """
    full, full_state = lm(ids)
    pieces, state = [], None
    tokens = ids.shape[1]
    half = tokens // 2
    for piece in ids.split([half, tokens - half - 3, 1, 2], dim=1):  # a state lost last shows most
        hidden, state = lm(piece, state, logits=False)
        pieces.append(lm.head(hidden).to(full.device))
    assert state is not None
    limit, flips = _limit(lm), _flips(lm)
    for key in full_state:
        apart = _apart(state[key].flatten(), full_state[key].flatten())
        name = lm.family.state_name(lm.model, key)
        _hold(lm, name, apart, _FLIPPED if flips and key.layer else limit)
    logits = torch.cat(pieces, dim=1)
    if flips:
        _hold(lm, "the logits", _apart(logits, full)[:, half:].median(), _FLIPPED)
    else:
        _hold(lm, "the logits", _apart(logits.flatten(), full.flatten()), limit)


@torch.no_grad()
def check_pure(lm: RecurrentLM, ids: Tensor) -> None:
    """Raise a LongrollError where a forward is not a function of tokens and state alone.

    It writes into the state that it is given, gives other numbers a second time, or starts from something
    else than the zero state where it is given none.
    """
    logits, state = lm(ids)
    before = state.map(Tensor.clone)
    lm(ids[:, :3], state)
    for key in state:
        if not torch.equal(state[key], before[key]):
            name = lm.family.state_name(lm.model, key)
            raise LongrollError(
                f"{lm.name} fails the self-check at {name}: the forward writes in place into the state given "
                "to it. Make a new tensor, since the caller may read the old state again."
            )
    limit = _limit(lm)
    if not _apart(lm(ids)[0].flatten(), logits.flatten()) < limit:
        raise LongrollError(
            f"{lm.name} fails the self-check: the same tokens give other logits a second time. The forward "
            "is random in eval mode, or keeps a state outside the one that it returns."
        )
    if not _apart(lm(ids, lm.zero_state(len(ids)))[0].flatten(), logits.flatten()) < limit:
        raise LongrollError(
            f"{lm.name} fails the self-check: without a state it starts from something else than the zero "
            "state (a learned initial state, say). Add that inside the forward, so that zero stands for it."
        )


def check_gradients(lm: RecurrentLM, ids: Tensor) -> None:
    """Raise a LongrollError where training could not reach the initial state or leave by the final one."""
    with torch.no_grad():
        _, state = lm(ids)
    state = RecurrentState(
        {
            key: t.detach().clone().requires_grad_(t.is_floating_point() and key.part != "attention")
            for key, t in state.items()
        },
        seen=state.seen,
    )
    starts = {key: t for key, t in state.items() if t.requires_grad}
    # cudnn's recurrent layers have no backward in eval mode
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        logits, final = lm(ids[:, :2], state)
        for key in starts:
            if key.part == "recurrent" and not final[key].requires_grad:
                _no_gradient(lm, key, "the final state is detached from the graph")
        ends = [t for t in (logits, *final.values()) if t.requires_grad]
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(t.shape, generator=generator).to(t) for t in ends]
        found = torch.autograd.grad(ends, list(starts.values()), weights, allow_unused=True)
    for key, gradient in zip(starts, found, strict=True):
        # weights that begin at zero may keep a short convolution from what it is given
        if gradient is None or (key.part == "recurrent" and not gradient.ne(0).any()):
            _no_gradient(lm, key, "the gradient does not reach the initial state")


def _no_gradient(lm: RecurrentLM, key: StateKey, what: str) -> None:
    raise LongrollError(
        f"{lm.name} fails the self-check at {lm.family.state_name(lm.model, key)}: {what}. Take detach(), "
        ".data and torch.no_grad() out of the forward: the caller detaches."
    )


def _hold(lm: RecurrentLM, what: str, apart: Tensor, limit: float) -> None:
    difference, dtype = apart.item(), next(lm.model.parameters()).dtype
    if not difference < limit:  # NaN fails too
        mend = (
            "The forward must start from all of the state that it is given, and return all that it needs."
            if lm.own
            else "Update transformers, or report this with the model's config."
        )
        raise LongrollError(
            f"{lm.name} fails the self-check at {what}: a chunked forward differs from the full one by "
            f"{difference:.1e} (relative; limit {limit:.0e}, {dtype}). Its numbers past one chunk would "
            f"be wrong. {mend}"
        )


def _limit(lm: RecurrentLM) -> float:
    """Return how far apart rounding may drive two forwards that should be one."""
    if next(lm.model.parameters()).dtype.itemsize < 4:
        return 5e-2
    return 1e-3 if lm.device.type == "cpu" else 1e-2  # where cudnn and fla take tf32 for float32


def _flips(lm: RecurrentLM) -> bool:
    """Return whether a rounding may send a token to other experts."""
    exact = next(lm.model.parameters()).dtype.itemsize >= 4 and lm.device.type == "cpu"
    return not exact and any("expert" in name for name, _ in lm.model.named_modules())


def _apart(actual: Tensor, expected: Tensor) -> Tensor:
    """Return norm of the difference of (..., D) over that of what is expected, (...)."""
    if not expected.is_floating_point():
        actual, expected = actual.float(), expected.float()
    size = expected.float().norm(dim=-1).clamp_min(1e-6)
    share: Tensor = (actual - expected).float().norm(dim=-1) / size
    return share
