"""Read long sequences in chunks, carrying the state: the loop under every measure."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import Tensor, nn

from longroll.dry_run import Sizes, dry_model, dry_run, forward_bytes, sizes_of
from longroll.errors import LongrollError, first_line
from longroll.memory import memory_of
from longroll.model import RecurrentLM
from longroll.sizes import check_bytes
from longroll.state import RecurrentState

logger = logging.getLogger("longroll")

LOGITS = {"cpu": 2**24, "cuda": 2**25}
"""Numbers of logits that exist at once, by device; with the softmax they take 10 bytes each in bfloat16."""
LEAST = {"cpu": 1, "cuda": 512}
"""Tokens whose logits exist at once whatever they take, by device: fewer keep no GPU busy."""

_CPU_TOKENS, _GPU_TOKENS = 4096, 65_536  # 2-4k keep a CPU busiest; more gained nothing on an H200
_GPU_TOKENS_WITH_KEYS = 16_384  # attention's work space is that of a few layers more
_LONG = 2**18  # tokens of all rows, from which keys and values may outweigh the model
_BESIDE_KEYS = 1 / 12  # share of keys and values that activations take where these outweigh the model
_STATE_BYTES = 2**28  # of states that are read together, where the memory of the loss allows no more
_TOKEN_BYTES = 256  # of activations that exist at once, for each number of d_model: a bound


def chunk_tokens(lm: RecurrentLM) -> int:
    """Return tokens of one forward, all rows together, that keep the device busy and fit into its memory.

    Where a bound does not tell that they fit, the plan does: a dry run, made once for each model.
    """
    most, bound = most_tokens(lm), _TOKEN_BYTES * lm.width
    if most <= _CPU_TOKENS or most * bound <= (free := free_bytes(lm.device)) // 4:
        return most
    return tokens_within(most, free, planned_bytes(lm) or bound)


def most_tokens(lm: RecurrentLM) -> int:
    """Return tokens of one forward above which a device gains nothing, memory left aside."""
    if lm.device.type != "cuda":
        return _CPU_TOKENS
    if not lm.has_attention:
        return _GPU_TOKENS
    return _GPU_TOKENS_WITH_KEYS if lm.family.in_blocks(lm.model) else _CPU_TOKENS


def tokens_within(most: int, free: float, each: float) -> int:
    """Return how many tokens, at most `most`, a forward reads at a time; no fewer than a CPU reads.

    Args:
        most: as many as keep the device busy.
        free: bytes of memory beside the weights, of which half are left to keys, values and logits.
        each: bytes that a forward takes for each of its tokens.
    """
    while most > _CPU_TOKENS and most * each > free / 2:
        most //= 2
    return most


def tokens_beside(tokens: int, each: float, keys: float, weights: float) -> int:
    """Return how many tokens, at most `tokens`, a forward reads at a time beside keys and values.

    Where these outweigh the weights, activations take a small part of them; no fewer than a CPU reads.

    Args:
        tokens: as many as keep the device busy and fit.
        each: bytes that a forward takes for each of its tokens.
        keys: bytes of keys and values at the end of the reading.
        weights: bytes of the model.
    """
    while tokens > _CPU_TOKENS and keys > weights and tokens * each > keys * _BESIDE_KEYS:
        tokens //= 2
    return tokens


def planned_bytes(lm: RecurrentLM) -> float | None:
    """Return the bytes that a forward takes for each of its tokens, by a dry run; None where none can run."""
    model = lm.model
    if model not in _PLANNED:
        try:
            _PLANNED[model] = None if lm.wrapped else forward_bytes(model.config, model.dtype, lm.device)
        except Exception as error:
            logger.debug("no plan of a forward: %s", first_line(error))
            _PLANNED[model] = None
    return _PLANNED[model]


def _planned_sizes(lm: RecurrentLM) -> Sizes | None:
    """Return the bytes of weights, keys and values by a dry run; None where none can run."""
    model = lm.model
    if model not in _SIZES:
        try:
            with dry_run():
                dry = dry_model(model.config, dtype=model.dtype, int8=lm.int8)
                _SIZES[model] = sizes_of(dry)
        except Exception as error:
            logger.debug("no plan of keys and values: %s", first_line(error))
            _SIZES[model] = None
    return _SIZES[model]


_PLANNED: WeakKeyDictionary[nn.Module, float | None] = WeakKeyDictionary()
_SIZES: WeakKeyDictionary[nn.Module, Sizes | None] = WeakKeyDictionary()


def default_chunk(lm: RecurrentLM, rows: int, length: int = 0) -> int:
    """Return how many tokens of each of `rows` texts a reading takes at a time where nobody says.

    Args:
        lm: the model.
        rows: how many texts.
        length: tokens of a text; long ones of a hybrid leave keys and values that outweigh the model.
    """
    tokens = chunk_tokens(lm)
    if tokens > _CPU_TOKENS and lm.has_attention and rows * length >= _LONG:
        each, sizes = planned_bytes(lm), _planned_sizes(lm)
        if each is not None and sizes is not None:
            tokens = tokens_beside(tokens, each, rows * sizes.keys_and_values(length), sizes.weights)
    return max(64, tokens // rows)


def rows_at_once(lm: RecurrentLM, tokens: int, most: int) -> int:
    """Return how many rows, at most `most`, a reading takes together within about the memory of the loss.

    Args:
        lm: the model.
        tokens: tokens of a row in one forward.
        most: how many rows there are.
    """
    row = sum(t.nbytes for t in lm.zero_state(1).values())
    room = max(_STATE_BYTES, chunk_tokens(lm) * lm.width * _TOKEN_BYTES // 16)
    states = room // max(1, 3 * row)  # initial, held and final
    return max(1, min(most, chunk_tokens(lm) // tokens, states))


def free_bytes(device: torch.device) -> int:
    """Return memory of a GPU that PyTorch can still hand out, or the main memory that is available."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class Chunk(NamedTuple):
    """Hidden states of positions [start, start + T) and the state after them."""

    start: int
    hidden: Tensor
    state: RecurrentState


@torch.no_grad()
def roll_out(
    lm: RecurrentLM,
    input_ids: Tensor,
    *,
    chunk_size: int | None = None,
    stops: Iterable[int] = (),
    state: RecurrentState | None = None,
    first: int = 0,
) -> Iterator[Chunk]:
    """Read `input_ids` (B, L) from `state` (default: zero) in constant memory.

    Args:
        lm: the model.
        input_ids: on any device; moved to the model's at once, so that no chunk waits for its tokens.
        chunk_size: tokens of a row in one forward; default: `default_chunk`.
        stops: positions after which a chunk must end, so that the state there can be seen.
        state: the initial state.
        first: position of the first token that is read; `state` is the state before it.

    Raises:
        LongrollError: for tokens outside the vocabulary, and for a `chunk_size` below 1.
    """
    rows, length = input_ids.shape
    check_ids(lm, input_ids)
    if chunk_size is not None and chunk_size < 1:
        raise LongrollError(f"`chunk_size` {chunk_size}: a chunk has at least one token.")
    input_ids = input_ids.to(lm.device)
    chunk_size = chunk_size or default_chunk(lm, rows, length)
    # chunks start at multiples of chunk_size whatever the stops, so that these change nothing else
    cuts = sorted({*range(0, length, chunk_size), *(stop for stop in stops if 0 < stop < length), length})
    cuts = [cut for cut in cuts if cut >= first]
    for start, stop in pairwise(cuts):
        hidden, state = lm(input_ids[:, start:stop], state, logits=False)
        yield Chunk(start, hidden, state)
        del hidden  # else two chunks exist while the next is computed


def check_rows(lm: RecurrentLM, rows: int, length: int, chunk_size: int | None) -> None:
    """Refuse rows whose states, before and after a chunk, and last hidden states exceed the memory.

    Raises:
        LongrollError: with the rows, and the bytes of both.
    """
    tokens = min(chunk_size or default_chunk(lm, rows, length), length)
    row = 2 * sum(t.nbytes for t in lm.zero_state(1).values()) if lm.family.recurrent else 0
    row += tokens * lm.width * lm.model.dtype.itemsize
    what = f"`tokens.shape[0]` {rows} of which {tokens} tokens are read at a time"
    check_bytes(what, rows * row, "read fewer", held=memory_of(lm.device))


def check_ids(lm: RecurrentLM, input_ids: Tensor) -> None:
    """Raise a LongrollError for tokens that the model has no embedding for."""
    from longroll.data import check_vocabulary

    if input_ids.numel():
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0:
            raise LongrollError(f"tokens outside the vocabulary of the model: id {low} is negative.")
        check_vocabulary(high, lm.vocab_size)
