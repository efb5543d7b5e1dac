"""Ways to read past T in which attention cannot leave its training range, or the recurrent states cannot.

A text is read in pieces, and before each piece a hold replaces a part of the state that it starts from.
Attention leaves its range in two ways: it sees more than T keys, and keys farther away than T positions.

- `window` keeps the last keys only, so that no query sees more than T;
- `window+first` keeps the first tokens too, at the positions before the window (StreamingLLM, Xiao et al.
  2023, arXiv 2309.17453);
- `clipped` keeps all keys, those farther away at the distance T (ReRoPE, Su 2023);
- `linear`, `ntk`, `yarn` scale the rotary positions of the whole text (`families/_rope.py`).

Recurrent states are held by the range of their norms in training (`norms`), or they are read again from zero
over the last tokens (`rescan`), so that they are states of training by construction.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longroll.families._rope import rope_frequencies, turn_keys
from longroll.heads import head_norms, scale_heads
from longroll.measure._coverage import Coverage
from longroll.model import RecurrentLM
from longroll.state import RecurrentState, StateKey

Hold = Callable[[int, RecurrentState], RecurrentState]
"""Given how many tokens were read and the state after them, returns the state that reading goes on from."""

FIRST = 4
"""First tokens that `window+first` keeps (StreamingLLM's number)."""
_KEYS, _VALUES, _OTHER = 0, 1, 3  # slots of the part `attention`; 2 chooses keys, 3 and above are no keys
_PROBES = 8  # tokens that are read at two positions
_SHIFT = 5  # positions: any will do to see how keys turn


class Positions:
    """How the attention of a model takes positions, found by reading single tokens at two of them.

    Without earlier tokens attention returns the token's own value wherever it stands, so that the keys of
    every layer at position 10 are those at position 5, turned. Position 0 is not read: RecurrentGemma's
    recurrence takes its input there at another scale.
    """

    def __init__(self, lm: RecurrentLM) -> None:
        self.frequencies = rope_frequencies(lm.model)
        """Radians a position of each pair; None where keys are not turned, or in another way."""
        self.windows = True
        """Whether keys can be dropped."""
        self.kind = "none"
        """`none`, `rotary`, or `other`: positions that this module cannot change."""
        count = min(_PROBES, lm.vocab_size)  # the embedding of one token may be zero: a padding token's is
        tokens = torch.linspace(0, lm.vocab_size - 1, count, device=lm.device).long()[:, None]
        with torch.no_grad():
            _, here = lm(tokens, RecurrentState({}, seen=_SHIFT), logits=False)
            _, there = lm(tokens, RecurrentState({}, seen=2 * _SHIFT), logits=False)
        for key in here:
            if key.part != "attention" or key.slot >= _OTHER:
                continue
            one, other = here[key], there[key]
            self.windows &= one.ndim == 4 and key.slot in (_KEYS, _VALUES)
            if torch.equal(one, other):
                continue
            known = key.slot == _KEYS and self.frequencies is not None
            known = known and one.shape[-1] >= 2 * len(self.frequencies)  # type: ignore[arg-type]
            tolerance = 16 * torch.finfo(one.dtype).eps * one.abs().max().item()
            if known and (turn_keys(one, _SHIFT, self.frequencies) - other).abs().max() <= tolerance:  # type: ignore[arg-type]
                self.kind = "rotary" if self.kind == "none" else self.kind
            else:
                self.kind = "other"
        if self.kind != "rotary":
            self.frequencies = None


class Window:
    """Keep the last `keep` keys, and the `first` ones of the text at the positions before them."""

    def __init__(self, keep: int, first: int = 0, frequencies: Tensor | None = None) -> None:
        self.keep, self.first, self.frequencies = keep, first, frequencies
        self._first: dict[StateKey, Tensor] = {}

    def __call__(self, position: int, state: RecurrentState) -> RecurrentState:
        """Return the state without the keys and values that lie farther back."""
        held: dict[StateKey, Tensor] = {}
        for key, tensor in _keys_and_values(state):
            size = tensor.shape[-2]
            if size <= self.keep:
                continue
            if key not in self._first:  # a layer with a window of its own no longer has them
                self._first[key] = tensor[..., : self.first if size == position else 0, :]
            first = self._first[key][: len(tensor)]  # of the rows that go on
            last = tensor[..., size - self.keep + first.shape[-2] :, :]
            if key.slot == _KEYS and self.frequencies is not None:
                first = turn_keys(first, position - self.keep, self.frequencies)
            held[key] = torch.cat([first, last], dim=-2)
        return state.changed(held)


class Clipped:
    """Keep all keys, those more than `keep` positions back as if they stood there."""

    def __init__(self, keep: int, frequencies: Tensor) -> None:
        self.keep, self.frequencies = keep, frequencies
        self._keys: dict[StateKey, Tensor] = {}

    def __call__(self, position: int, state: RecurrentState) -> RecurrentState:
        """Return the state with its far keys turned to the farthest position of training."""
        held: dict[StateKey, Tensor] = {}
        for key, tensor in _keys_and_values(state):
            if tensor.shape[-2] < position:  # a layer with a window of its own
                continue
            if key.slot == _VALUES:
                held[key] = tensor  # in as many pieces as the keys: one
                continue
            if key in self._keys:  # those before are turned in `tensor`
                past = self._keys[key]
                tensor = torch.cat([past, tensor[..., past.shape[-2] :, :]], dim=-2)
            self._keys[key] = tensor
            at = torch.arange(position, device=tensor.device)
            held[key] = turn_keys(tensor, (position - self.keep - at).clamp_min(0), self.frequencies)
        return state.changed(held)


class Norms:
    """Scale the norm of every head that has left its training range to the nearest end of it."""

    def __init__(self, coverage: Coverage) -> None:
        self.ranges = {layer.key: (layer.norm_low, layer.norm_high) for layer in coverage.layers}

    def __call__(self, position: int, state: RecurrentState) -> RecurrentState:
        """Return the state in range."""
        held: dict[StateKey, Tensor] = {}
        for key, (low, high) in self.ranges.items():
            norm = head_norms(state[key])
            factor = norm.clamp(low.to(norm), high.to(norm)) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
            held[key] = scale_heads(state[key], factor.to(state[key]))
        return state.changed(held)


class Rescan:
    """Read the last `span` tokens again from zero, for the recurrent states.

    Args:
        lm: the model.
        tokens: (B, L), the text; a state of fewer rows is that of the first ones.
        span: how many.
        attention: keep all keys; else those of the last tokens only.
    """

    def __init__(self, lm: RecurrentLM, tokens: Tensor, span: int, *, attention: bool = True) -> None:
        self.lm, self.tokens, self.span, self.attention = lm, tokens, span, attention

    @torch.no_grad()
    def __call__(self, position: int, state: RecurrentState) -> RecurrentState:
        """Return the state with recurrent states that have read `span` tokens."""
        some = self.tokens[: state.batch_size, max(0, position - self.span) : position].to(self.lm.device)
        fresh: RecurrentState
        _, fresh = self.lm(some, logits=False)
        if not self.attention:
            return fresh
        return state.changed(fresh.part("recurrent", "conv"))


def both(*holds: Hold) -> Hold:
    """Return one hold after the other."""

    def hold(position: int, state: RecurrentState) -> RecurrentState:
        for one in holds:
            state = one(position, state)
        return state

    return hold


def _keys_and_values(state: RecurrentState) -> list[tuple[StateKey, Tensor]]:
    keys = [key for key in state if key.part == "attention" and key.slot in (_KEYS, _VALUES)]
    return [(key, state[key]) for key in keys]
