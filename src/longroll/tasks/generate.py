"""Read prompts of any length through the state, then write from it; many at once although lengths differ.

Nothing is padded: a padding token would be read into the state. Rows go on together until the shortest ends,
its state is set aside, the rest go on. Then all states stand side by side again and the model writes
greedily. States with a KV part cannot stand side by side at different positions: rows of the same length
write together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longroll.errors import LongrollError
from longroll.measure.roll_out import roll_out
from longroll.model import RecurrentLM
from longroll.state import RecurrentState
from longroll.tasks._task import Sample


class Prefilled(NamedTuple):
    """Prompts that were read: which, the last hidden state of each (B, d_model), and the states after
    them."""

    rows: list[int]
    hidden: Tensor
    state: RecurrentState


Reading = Callable[[RecurrentLM, Sequence[Sample]], list[Prefilled]]
"""A way to read prompts; `longroll.tasks.baselines` has others than `prefill_samples`."""


class Answers(NamedTuple):
    """What a model made of one sample."""

    written: np.ndarray
    """Greedy tokens, up to and without the stop."""
    forced: np.ndarray | None
    """Its argmax at each place of the right answer, given the right tokens before, (A,)."""


def prefill(
    lm: RecurrentLM,
    prompts: Sequence[np.ndarray],
    *,
    state: RecurrentState | None = None,
    chunk_size: int | None = None,
    stops: int | None = None,
    watch: Callable[[int, RecurrentState], RecurrentState] | None = None,
) -> list[Prefilled]:
    """Read prompts of token ids, each (T,), T >= 1, in memory that does not grow with T (but for KV).

    Args:
        lm: the model.
        prompts: may differ in length.
        state: the state all of them start from, one row; None: zero.
        chunk_size: tokens of a row in one forward.
        stops: call `watch` every so many tokens.
        watch: given how many tokens were read and the state of the rows still going; gives the state to go
            on from.

    Returns:
        Groups of rows that can write together; each prompt is in one of them.

    Raises:
        LongrollError: for an empty prompt and for tokens outside the vocabulary.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    if not lengths.all():
        raise LongrollError("A prompt has no tokens: there is nothing to write from.")
    order = np.argsort(-lengths, kind="stable")  # longest first: the rows that go on are always the first
    ends = sorted({*lengths.tolist(), *(range(stops, int(lengths.max()), stops) if stops else ())})
    if state is not None:
        state = state.rows([0] * len(prompts))
    done: list[Prefilled] = []
    for start, stop in pairwise([0, *ends]):
        going = order[: int((lengths >= stop).sum())]
        ids = torch.from_numpy(np.stack([prompts[row][start:stop] for row in going]).astype(np.int64))
        state = None if state is None else state.rows(slice(0, len(going)))
        for chunk in roll_out(lm, ids, chunk_size=chunk_size, state=state):
            hidden, state = chunk.hidden[:, -1], chunk.state
        assert state is not None
        if watch is not None and stops and stop % stops == 0:
            state = watch(stop, state)
        finished = int((lengths == stop).sum())
        if finished:
            last = slice(len(going) - finished, len(going))
            done.append(Prefilled(order[last].tolist(), hidden[last], state.rows(last)))
    return done if any(key.part == "attention" for key in done[0].state) else [_side_by_side(done)]


def _side_by_side(reads: list[Prefilled]) -> Prefilled:
    """Return one group of several whose states do not depend on the position."""
    states = [read.state for read in reads]
    joined = {key: torch.cat([state[key] for state in states]) for key in states[0]}
    rows = [row for read in reads for row in read.rows]
    return Prefilled(
        rows, torch.cat([read.hidden for read in reads]), RecurrentState(joined, seen=states[0].seen)
    )


def prefill_samples(lm: RecurrentLM, samples: Sequence[Sample]) -> list[Prefilled]:
    """Return the ordinary way: every prompt from its beginning, the state carried all along."""
    return prefill(lm, [sample.prompt for sample in samples])


@torch.no_grad()
def greedy_decode(
    lm: RecurrentLM, read: Prefilled, new_tokens: int, *, stop: Callable[[np.ndarray], bool] | None = None
) -> np.ndarray:
    """Return the greedy continuation of each row, (B, new_tokens), or fewer once `stop` holds for each."""
    hidden, state, stopped = read.hidden, read.state, np.zeros(len(read.rows), dtype=bool)
    written: list[Tensor] = []
    while len(written) < new_tokens:
        token = lm.head(hidden).argmax(dim=-1)
        written.append(token.cpu())
        if stop is not None:
            ids = torch.stack(written, dim=1).numpy()
            stopped |= [done or stop(row) for done, row in zip(stopped, ids, strict=True)]
        if stopped.all() or len(written) == new_tokens:
            break
        output, state = lm(token[:, None], state, logits=False)
        hidden = output[:, -1]
    return torch.stack(written, dim=1).numpy()


@torch.no_grad()
def teacher_forced(lm: RecurrentLM, read: Prefilled, answers: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the argmax at each place of the right answers, given the right tokens before."""
    longest = max(map(len, answers))
    # filled up at the end: the states after it are not used
    ids = np.stack([np.resize(answer, longest) for answer in answers]).astype(np.int64)
    hidden = read.hidden[:, None]
    if longest > 1:
        output, _ = lm(torch.from_numpy(ids[:, :-1]).to(lm.device), read.state, logits=False)
        hidden = torch.cat([hidden, output], dim=1)
    best = lm.head(hidden).argmax(dim=-1).cpu().numpy()
    return [row[: len(answer)] for row, answer in zip(best, answers, strict=True)]


def answer(
    lm: RecurrentLM,
    samples: Sequence[Sample],
    *,
    new_tokens: int | None = None,
    stop_id: int | None = None,
    forced: bool = False,
    reading: Reading = prefill_samples,
) -> list[Answers]:
    """Read the prompts of `samples`, let the model write; the answers come in their order.

    Args:
        lm: the model.
        samples: samples of one task; lengths may differ.
        new_tokens: what each may write; None: as many tokens as its answer has.
        stop_id: the token that ends an answer; it is cut off.
        forced: also feed the right answer and note the argmax.
        reading: how prompts are read.
    """
    answers: dict[int, Answers] = {}
    for read in reading(lm, samples):
        right = [samples[row].answer for row in read.rows]
        tokens = new_tokens or max(map(len, right))
        written = greedy_decode(lm, read, tokens, stop=lambda ids: bool(ids[-1] == stop_id))
        argmax = teacher_forced(lm, read, right) if forced else [None] * len(right)
        for row, ids, best in zip(read.rows, written, argmax, strict=True):
            end = ids.tolist().index(stop_id) if stop_id in ids else len(ids)
            answers[row] = Answers(ids[:end], best)
    return [answers[row] for row in range(len(samples))]
