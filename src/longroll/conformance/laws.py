"""The laws of the state protocol as measurements: how far a model is from obeying each.

What a law calls one thing is computed in two ways; the `Gap` between them is rounding, or a fault. The tests
draw the cuts and the states that these functions take; `longroll doctor --families` tabulates the gaps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from longroll.families import model_class
from longroll.interventions import Intervention, RandomNoise
from longroll.model import RecurrentLM, load
from longroll.state import RecurrentState

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-6, torch.bfloat16: 3e-2}
"""How wide rounding makes a gap (norms are float32 in any model); ten times that for a gradient."""
TO_FLOAT32 = 1e-1
"""How far a tiny model in bfloat16 may be from itself in float32, in root mean square: twice the widest that
PyTorch's own path shows on a CPU."""
ON_GPU = 2e-4
"""The same in float32 on a GPU, which sums in another order for every shape."""
IN_TF32 = 5e-3
"""The same for fla's delta rules, which solve triangular systems in tf32 whatever they are asked for."""


_Between = Callable[[Tensor, Tensor, str], "Gap"]


class Gap(NamedTuple):
    """How far apart two results are that should be one."""

    size: float
    """Largest difference over the largest number expected, or (`spread`) the root mean squares of both;
    infinite where they cannot be compared."""
    where: str
    """Which of the tensors compared is the furthest apart."""


def _largest(t: Tensor) -> Tensor:
    return t.abs().max()


def _root_mean_square(t: Tensor) -> Tensor:
    return t.square().mean().sqrt()


def gap(actual: Tensor, expected: Tensor, where: str, size_of: Callable[[Tensor], Tensor] = _largest) -> Gap:
    """Return the gap between two tensors; 0 only where they are equal bit for bit, infinity where one has
    NaN.
    """
    if actual.shape != expected.shape:
        return Gap(float("inf"), f"{where}: shapes {tuple(actual.shape)} and {tuple(expected.shape)}")
    if torch.equal(actual, expected):
        return Gap(0.0, where)
    actual, expected = actual.detach().double(), expected.detach().double()
    size = (size_of(actual - expected) / size_of(expected).clamp_min(1e-12)).item()
    return Gap(size if size == size else float("inf"), where)


def spread(actual: Tensor, expected: Tensor, where: str) -> Gap:
    """Return the gap in root mean square, steadier than the largest difference where both are roundings."""
    return gap(actual, expected, where, _root_mean_square)


def widest(gaps: Iterable[Gap]) -> Gap:
    """Return the widest of several gaps."""
    return max(gaps, key=lambda g: g.size, default=Gap(0.0, "nothing"))


def state_gap(actual: RecurrentState, expected: RecurrentState, between: _Between = gap) -> Gap:
    """Return the gap between two states, which must hold the same tensors and have read as many tokens."""
    if actual.keys() != expected.keys() or actual.seen != expected.seen:
        return Gap(float("inf"), f"{actual} is not like {expected}")
    return _named_gap(actual.named(), expected.named(), between)


def _named_gap(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], between: _Between = gap) -> Gap:
    if actual.keys() != expected.keys():
        return Gap(float("inf"), f"only in one of them: {sorted(actual.keys() ^ expected.keys())}")
    return widest(between(actual[name], expected[name], name) for name in expected)


def random_state(lm: RecurrentLM, rows: int, seed: int = 0, scale: float = 1.0) -> RecurrentState:
    """Return Gaussian noise in the shapes of the model's recurrent and conv state."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor) -> Tensor:
        return (torch.randn(like.shape, generator=generator, dtype=torch.float64) * scale).to(like)

    return lm.zero_state(rows).map(draw)


def read(
    lm: RecurrentLM,
    ids: Tensor,
    pieces: Sequence[int],
    state: RecurrentState | None = None,
    *,
    detach: bool = False,
) -> tuple[Tensor, RecurrentState]:
    """Return logits (B, T, V) and the final state of `ids` (B, T), read piece by piece."""
    logits = []
    for piece in ids.split(list(pieces), dim=1):
        if state is not None and detach:
            state = state.detach()
        out, state = lm(piece, state)
        logits.append(out)
    assert state is not None
    return torch.cat(logits, dim=1), state


# ---- law 1


@torch.no_grad()
def chunking(lm: RecurrentLM, ids: Tensor, pieces: Sequence[int], state: RecurrentState | None = None) -> Gap:
    """Any chunking is the full forward, in logits and final state."""
    full, full_state = lm(ids, state)
    chunked, chunked_state = read(lm, ids, pieces, state)
    return widest([gap(chunked, full, "logits"), state_gap(chunked_state, full_state)])


@torch.no_grad()
def rounding(rounded: RecurrentLM, exact: RecurrentLM, ids: Tensor, pieces: Sequence[int]) -> Gap:
    """A model in 16 bits is the one in float32 but for rounding, read at once and in pieces."""
    logits, state = exact(ids)
    found = (read(rounded, ids, cuts) for cuts in ([ids.shape[1]], pieces))
    return widest(
        g for out, final in found for g in (spread(out, logits, "logits"), state_gap(final, state, spread))
    )


# ---- law 2


class Gradients(NamedTuple):
    """Gradients of the mean cross-entropy of a text."""

    loss: Tensor
    weights: dict[str, Tensor]
    embeddings: Tensor
    """Into the input embeddings, (B, T, d_model)."""


def gradients(lm: RecurrentLM, ids: Tensor, pieces: Sequence[int], *, detach: bool = False) -> Gradients:
    """Read `ids` (B, T + 1) piece by piece, and backpropagate through all of them at once."""
    lm.zero_grad(set_to_none=True)
    embedded: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        output = output.detach().requires_grad_()
        embedded.append(output)
        return output

    hook = lm.model.get_input_embeddings().register_forward_hook(keep)
    logits, _ = read(lm, ids[:, :-1], pieces, detach=detach)
    hook.remove()
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    weights = {name: p.grad.clone() for name, p in lm.model.named_parameters() if p.grad is not None}
    return Gradients(loss.detach(), weights, torch.cat([e.grad for e in embedded], dim=1))  # type: ignore[misc]


def gradient_gap(actual: Gradients, expected: Gradients) -> Gap:
    """Return the gap between two gradients, each weight's against its own size."""
    return widest(
        [
            gap(actual.loss, expected.loss, "loss"),
            _named_gap(actual.weights, expected.weights),
            gap(actual.embeddings, expected.embeddings, "input embeddings"),
        ]
    )


def chaining(lm: RecurrentLM, ids: Tensor, pieces: Sequence[int]) -> Gap:
    """Segments chained without detach give the gradient of the full sequence."""
    return gradient_gap(gradients(lm, ids, pieces), gradients(lm, ids, [sum(pieces)]))


def checkpointing(lm: RecurrentLM, ids: Tensor, pieces: Sequence[int]) -> Gap:
    """Gradient checkpointing changes nothing of the gradient through chained segments."""
    lm.train()
    plain = gradients(lm, ids, pieces)
    with _checkpointed(lm):
        recomputed = gradients(lm, ids, pieces)
    return gradient_gap(recomputed, plain)


def unreached(lm: RecurrentLM, ids: Tensor, state: RecurrentState, *, checkpoint: bool = False) -> list[str]:
    """Tensors of an initial state that get no gradient, or that the forward wrote into: there are none."""
    lm.train(checkpoint)
    leaves = state.map(lambda t: t.detach().clone().requires_grad_())
    with _checkpointed(lm, checkpoint):
        logits, final = lm(ids, leaves)
        floating = [t for t in final.values() if t.is_floating_point()]
        (logits.square().mean() + sum(t.square().mean() for t in floating)).backward()
    return [
        str(key)
        for key, leaf in leaves.items()
        if leaf.grad is None or not leaf.grad.abs().max() > 0 or not torch.equal(leaf, state[key])
    ]


class _checkpointed:
    """Gradient checkpointing for the time of a block."""

    def __init__(self, lm: RecurrentLM, wanted: bool = True) -> None:
        self.lm, self.wanted = lm, wanted

    def __enter__(self) -> None:
        if self.wanted:
            self.lm.model.gradient_checkpointing_enable({"use_reentrant": False})

    def __exit__(self, *_: object) -> None:
        if self.wanted:
            self.lm.model.gradient_checkpointing_disable()


# ---- law 3


@torch.no_grad()
def zero_state(lm: RecurrentLM, ids: Tensor) -> Gap:
    """The zero state equals no state, and a missing part equals a zero part."""
    zero = lm.zero_state(len(ids))
    logits, state = lm(ids)
    gaps = []
    for start in (zero, zero.part("recurrent"), RecurrentState({})):
        from_zero, final = lm(ids, start)
        gaps += [gap(from_zero, logits, "logits"), state_gap(final, state)]
    kinds, zero_kinds = (
        {key: (t.shape, t.dtype) for key, t in s.part("recurrent", "conv").items()} for s in (state, zero)
    )
    if kinds != zero_kinds:
        gaps.append(Gap(float("inf"), f"shapes and dtypes: {kinds} and {zero_kinds}"))
    return widest(gaps)


@torch.no_grad()
def permutation(lm: RecurrentLM, ids: Tensor, cut: int, order: Sequence[int]) -> Gap:
    """Permuting batch rows permutes states: `ids` are read to `cut`, and on in another order."""
    order = list(order)
    _, state = lm(ids[:, :cut])
    expected, expected_state = lm(ids[:, cut:], state)
    logits, final = lm(ids[order, cut:], state.rows(order))
    return widest([gap(logits, expected[order], "logits"), state_gap(final, expected_state.rows(order))])


@torch.no_grad()
def saving(lm: RecurrentLM, ids: Tensor, cut: int, folder: Path) -> Gap:
    """A state saved at `cut` and loaded goes on bit for bit."""
    _, state = lm(ids[:, :cut])
    state.save(folder / "state.safetensors")
    loaded = RecurrentState.load(folder / "state.safetensors", device=lm.device)
    again, unsaved = lm(ids[:, cut:], loaded)[0], lm(ids[:, cut:], state)[0]
    return widest([state_gap(loaded, state), gap(again, unsaved, "logits")])


# ---- law 4


def zero_intervention(lm: RecurrentLM, ids: Tensor, *, steps: int = 2) -> Gap:
    """An intervention that always yields the zero state trains bit for bit as none does."""

    def trained(intervention: Intervention | None) -> dict[str, Tensor]:
        pupil = copy.deepcopy(lm).train()
        optimizer = torch.optim.SGD(pupil.parameters(), lr=0.1)
        for _ in range(steps):
            logits, final = pupil(
                ids[:, :-1], None if intervention is None else intervention.initial_state(ids)
            )
            F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            if intervention is not None:
                intervention.observe(final)
        return pupil.model.state_dict()

    return _named_gap(trained(RandomNoise(std=0, conv=True)), trained(None))


# ---- law 6, and that the numbers are the users' model's own


@torch.no_grad()
def round_trip(model: PreTrainedModel, ids: Tensor, folder: Path) -> Gap:
    """A checkpoint opened by longroll and saved again is the same for transformers alone."""
    weights = copy.deepcopy(model.state_dict())
    model.save_pretrained(folder / "in")
    lm = load(folder / "in", device=model.device, dtype=model.dtype)
    logits, _ = lm(ids)
    lm.model.save_pretrained(folder / "out")
    loader: Any = model_class(model.config.model_type) or AutoModelForCausalLM
    again = loader.from_pretrained(folder / "out", dtype=model.dtype)
    again.to(model.device)
    return widest(
        [
            _named_gap(again.state_dict(), weights),
            gap(RecurrentLM(again)(ids)[0], logits, "logits"),
        ]
    )


@torch.no_grad()
def own_logits(model: PreTrainedModel, ids: Tensor) -> Gap:
    """Logits are those of the model without longroll; `head` makes them of hidden states, bit for bit."""
    expected = model(ids, use_cache=False).logits.clone()
    lm = RecurrentLM(model)
    logits, _ = lm(ids)
    hidden, _ = lm(ids, logits=False)
    if not torch.equal(lm.head(hidden), logits):
        return Gap(float("inf"), "head")
    return gap(logits, expected, "logits")
