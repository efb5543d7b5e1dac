"""Ways to read a prompt that need no training: what a repair has to beat.

Each makes a `Reading` for `answer`. They are for inference, on any recurrent model: forget all but a window;
weaken or clip the state, so that it stays in the range of training (after thunlp/stuffed-mamba, Chen et al.
2025, who weaken and normalise inside each step; here it happens every `stride` tokens); read the text in
chunks and answer from one of them (OPRM).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from longroll.data import ByteTokenizer
from longroll.errors import LongrollError
from longroll.heads import head_norms, scale_heads
from longroll.measure.roll_out import roll_out
from longroll.model import RecurrentLM
from longroll.state import RecurrentState, StateKey
from longroll.tasks._task import TRAINING, Sample, random_of
from longroll.tasks.evaluate import Row
from longroll.tasks.generate import Prefilled, Reading, prefill, prefill_samples

READINGS = ("plain", "reset", "decay", "clip", "chunk")

STRIDE = 64
"""Tokens between two looks at the state."""


def last_window(window: int) -> Reading:
    """Read only the last `window` tokens, from the zero state: a sliding window, by a reset before it.

    What begins any text (BOS) is read first, and counts.
    """

    def cut(sample: Sample) -> np.ndarray:
        prefix, text = np.split(sample.prompt, [sample.prefix])
        return np.concatenate([prefix, text[-max(1, window - len(prefix)) :]])

    def reading(lm: RecurrentLM, samples: Sequence[Sample]) -> list[Prefilled]:
        return prefill(lm, [cut(sample) for sample in samples])

    return reading


def decayed(per_token: float, *, after: int, stride: int = STRIDE) -> Reading:
    """Multiply the recurrent state by `per_token` for every token read past `after`.

    Args:
        per_token: just below 1: 1 - 1/T forgets over a training length.
        after: tokens that are read as ever.
        stride: tokens between two multiplications.
    """

    def watch(read: int, state: RecurrentState) -> RecurrentState:
        factor = torch.tensor(per_token ** min(stride, max(0, read - after)))
        return _scaled(state, lambda key, tensor: factor)

    def reading(lm: RecurrentLM, samples: Sequence[Sample]) -> list[Prefilled]:
        return prefill(lm, [sample.prompt for sample in samples], stops=stride, watch=watch)

    return reading


def state_limits(
    lm: RecurrentLM, tokens: torch.Tensor, *, stride: int = STRIDE
) -> dict[StateKey, torch.Tensor]:
    """Return the largest norm of each head's state over ordinary text, (1, heads) each (`longroll.heads`).

    Args:
        lm: the model.
        tokens: (B, T), texts as long as those of training.
        stride: tokens between two looks.
    """
    limits: dict[StateKey, torch.Tensor] = {}
    for chunk in roll_out(lm, tokens, chunk_size=stride):
        for key, tensor in chunk.state.part("recurrent").items():
            largest = head_norms(tensor).amax(dim=0, keepdim=True)
            limits[key] = torch.maximum(limits[key], largest) if key in limits else largest
    return limits


def clipped(limits: dict[StateKey, torch.Tensor], *, stride: int = STRIDE) -> Reading:
    """Scale a head's state down to its limit (from `state_limits`) whenever its norm is above."""

    def watch(read: int, state: RecurrentState) -> RecurrentState:
        return _scaled(
            state, lambda key, tensor: (limits[key] / head_norms(tensor).clamp_min(1e-30)).clamp_max(1)
        )

    def reading(lm: RecurrentLM, samples: Sequence[Sample]) -> list[Prefilled]:
        return prefill(lm, [sample.prompt for sample in samples], stops=stride, watch=watch)

    return reading


def best_chunk(window: int, *, tokens: int = 1) -> Reading:
    """Answer from the one chunk of the context after which the model is surest of what it writes.

    Every chunk of the context is read between the instruction and the question, from the zero state, and the
    chunk wins whose next `tokens` tokens, written greedily, have the least entropy in sum.
    Source: OPRM (Ben-Kish et al. 2025, arXiv 2505.07793), assafbk/OPRM, chunk selection "entropy_first_tok",
    without its filter of chunks that answer "Error", which is for models tuned to instructions.

    Args:
        window: tokens of a chunk together with instruction and question, which the source does not count.
        tokens: the source has 1, which tells nothing where all answers begin alike: of bytes the first is a
            space.

    Raises:
        LongrollError: when reading, for a window that instruction and question fill.
    """

    @torch.no_grad()
    def reading(lm: RecurrentLM, samples: Sequence[Sample]) -> list[Prefilled]:
        prompts, owner = [], []
        for row, sample in enumerate(samples):
            start, stop = sample.context
            head, context, tail = np.split(sample.prompt, [start, stop])
            room = window - len(head) - len(tail)
            if room < 1:
                raise LongrollError(
                    f"`window` {window}: instruction and question fill all its tokens: give a longer one."
                )
            for at in range(0, max(1, len(context)), room):
                prompts.append(np.concatenate([head, context[at : at + room], tail]))
                owner.append(row)
        chosen: dict[int, tuple[float, Prefilled]] = {}
        for at in range(0, len(prompts), _TOGETHER):
            for read in prefill(lm, prompts[at : at + _TOGETHER]):
                for i, entropy in enumerate(_entropies(lm, read, tokens)):
                    row = owner[at + read.rows[i]]
                    if row not in chosen or entropy < chosen[row][0]:
                        one = Prefilled([row], read.hidden[i : i + 1], read.state.rows([i]))
                        chosen[row] = (entropy, one)
        return [read for _, read in chosen.values()]

    return reading


def _entropies(lm: RecurrentLM, read: Prefilled, tokens: int) -> list[float]:
    """Return entropy of each row, summed over the first tokens that it would write."""
    hidden, state, total = read.hidden, read.state, torch.zeros(len(read.rows))
    for left in reversed(range(tokens)):
        logits = lm.head(hidden)
        total = total + torch.distributions.Categorical(logits=logits).entropy().to(total)
        if left:
            hidden, state = lm(logits.argmax(-1, keepdim=True), state=state, logits=False)
            hidden = hidden[:, -1]
    return total.tolist()


_TOGETHER = 64  # chunks read at once


def _scaled(
    state: RecurrentState, factor: Callable[[StateKey, torch.Tensor], torch.Tensor]
) -> RecurrentState:
    """Return recurrent tensors times a factor a head, (B, heads) or (); the rest as it is."""
    scaled = {
        key: scale_heads(t, factor(key, t).to(t)) if key.part == "recurrent" else t
        for key, t in state.items()
    }
    return RecurrentState(scaled, seen=state.seen)


def make_reading(
    reading: str, lm: RecurrentLM, *, window: int | None, rows: Sequence[Row], length: int
) -> Reading:
    """Return a reading by its name on the command line.

    Args:
        reading: "plain", "reset", "decay", "clip" or "chunk".
        lm: the model.
        window: tokens it works over; T is the natural choice.
        rows: of the grid that it is for: "clip" takes its limits from the beginnings of such prompts.
        length: the longest of the grid.

    Raises:
        LongrollError: for another reading, without a window, and for a model without recurrent state.
    """
    if reading not in READINGS:
        raise LongrollError(f"`reading` {reading} is not one of {', '.join(READINGS)}.")
    if reading == "plain":
        return prefill_samples
    if window is None:
        raise LongrollError(
            f"`reading` {reading} needs a `window`: the model does not say how long it was trained."
        )
    if reading == "reset":
        return last_window(window)
    if reading == "chunk":
        return best_chunk(window, tokens=2 if isinstance(rows[0].task.tokenizer, ByteTokenizer) else 1)
    if not lm.layers:
        raise LongrollError(f"`reading` {reading}: {lm.name} has no recurrent state.")
    if reading == "decay":
        return decayed(1 - 1 / window, after=window)
    drawn = (rows[0].task.sample(length, rng=random_of(TRAINING, number)) for number in range(16))
    prompts = [sample.prompt[:window] for sample in drawn]
    shortest = min(map(len, prompts))
    tokens = np.stack([prompt[:shortest] for prompt in prompts]).astype(np.int64)
    return clipped(state_limits(lm, torch.from_numpy(tokens)))
