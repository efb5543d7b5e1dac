"""Memory of training and of reading: the arithmetic of docs/scaling.md, in bytes of one process."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from longroll.model import RecurrentLM
from longroll.sizes import GIB as GIB
from longroll.sizes import check_bytes
from longroll.state import Part, RecurrentState

MOMENTS = 2
"""Numbers that AdamW keeps for each trained one, in the precision in which it is held."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one process in a training step."""

    weights: int
    """All parameters, in the precision in which they are held; 1/N of them under FSDP2 of N processes."""
    gradients: int
    """Those of the trained parameters; 1/N of them under FSDP2."""
    optimizer: int
    """AdamW's moments of the trained parameters; 1/N of them under FSDP2."""
    gathered: int
    """Whole layers that exist at a time under FSDP2: two, the embedding and the head."""
    states: int
    """The states that an intervention keeps for the rows of this process; never divided."""
    activations: int
    """What backward reads; never divided."""
    logits: int
    """The logits of a micro-batch, or of the pieces of it that exist at a time."""

    @property
    def total(self) -> int:
        """The sum of all."""
        return sum(getattr(self, field.name) for field in fields(self))


def training_memory(
    model: nn.Module,
    *,
    rows: int,
    length: int,
    state: int,
    activations: float,
    logits: float = 0.0,
    shards: int = 1,
) -> TrainingMemory:
    """Return the bytes that one process takes in a training step.

    Args:
        model: with its adapters, in the precision in which it is trained; its weights may be on `meta`.
        rows: the rows of a micro-batch of one process.
        length: T, tokens of a row.
        state: bytes of the state of a row.
        activations: bytes that backward reads of a token, as `activation_bytes` measures them.
        logits: bytes of a token's logits; 0 where the loss is made in pieces.
        shards: processes that FSDP2 spreads the weights over; 1: none are spread (one process, DDP).
    """
    everything, trained = parameter_bytes(model), parameter_bytes(model, trained=True)
    gathered = gathered_bytes(model) if shards > 1 else 0
    return TrainingMemory(
        weights=everything // shards,
        gradients=trained // shards,
        optimizer=MOMENTS * trained // shards,
        gathered=gathered,
        states=rows * state,
        activations=int(rows * length * activations),
        logits=int(rows * length * logits),
    )


def gathered_bytes(model: nn.Module) -> int:
    """Return the bytes of whole layers that exist at a time under FSDP2: two, the embedding and the head."""
    return 2 * max(_layer_bytes(model), default=0) + sum(map(parameter_bytes, _ends(model)))


def parameter_bytes(model: nn.Module, *, trained: bool = False) -> int:
    """Return the bytes of all parameters, or of those that are trained; tied ones count once."""
    found = (p for p in model.parameters() if p.requires_grad or not trained)
    return sum(p.numel() * p.element_size() for p in found)


def state_bytes(state: RecurrentState, *parts: Part) -> int:
    """Return the bytes of a state, or of some of its parts."""
    kept = state.part(*parts) if parts else state
    return sum(t.numel() * t.element_size() for t in kept.values())


@torch.no_grad()
def cache_bytes(lm: RecurrentLM, tokens: int, rows: int = 1) -> tuple[int, int]:
    """Return the bytes that `rows` texts leave behind: of the state, and of keys and values.

    The state takes the same at any length; keys and values grow with `tokens`, up to the window of layers
    that have one. Both are taken from two short texts.
    """
    short, long = (_read(lm, length) for length in (2, 4))
    state = rows * state_bytes(long, "recurrent", "conv")
    kept = state_bytes(short, "attention")
    slope = (state_bytes(long, "attention") - kept) // 2
    return state, rows * (kept + slope * (tokens - 2))


def activation_bytes(lm: RecurrentLM, length: int = 64) -> float:
    """Return the bytes that backward reads of each token, counted at two lengths up to `length`.

    The model reads random tokens in the precision in which it is, without autocast; parameters are not
    counted, the head's logits neither.
    """
    counts = [_saved_bytes(lm, tokens) for tokens in (length // 2, length)]
    return (counts[1] - counts[0]) / (length - length // 2)


def memory_of(device: torch.device) -> int:
    """Return the bytes of a GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_micro_batch(lm: RecurrentLM, rows: int, length: int, device: torch.device | None = None) -> None:
    """Refuse a micro-batch whose tokens, hidden states and states alone exceed the memory of the device.

    Raises:
        LongrollError: with the bytes of both.
    """
    least = rows * (length * (8 + lm.width * 2) + state_bytes(lm.zero_state(1)))
    mend = "take fewer rows (`batch_size`), and more `accumulation`"
    check_bytes(f"`batch_size` {rows} x `length` {length}", least, mend, held=memory_of(device or lm.device))


def _read(lm: RecurrentLM, tokens: int) -> RecurrentState:
    ids = torch.zeros(1, tokens, dtype=torch.long, device=lm.device)
    state: RecurrentState = lm(ids, logits=False)[1]
    return state


def _saved_bytes(lm: RecurrentLM, tokens: int) -> int:
    """Return the bytes of the tensors that a forward keeps for backward, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(lm.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = lm(ids.to(lm.device), logits=False)  # held, so that no storage is counted for another
    del kept
    return sum(seen.values())


def _layer_bytes(model: nn.Module) -> Iterable[int]:
    """Return the bytes of each module that FSDP2 shards by itself: the layers, by transformers' names of
    them.
    """
    names = getattr(model, "_no_split_modules", None) or ()
    return [parameter_bytes(m) for m in model.modules() if type(m).__name__ in names]


def _ends(model: nn.Module) -> list[nn.Module]:
    """Return the embedding and the head; one where they are tied."""
    found = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    if found[0] is not None and found[1] is not None and found[0].weight is found[1].weight:
        return found[:1]
    return [module for module in found if module is not None]
