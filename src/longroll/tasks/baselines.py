"""Ways to read a prompt that need no training: what a repair has to beat.

Each makes a `Reading` for `answer`. They are for inference, on any recurrent model: forget all but a window;
hold the state or the attention in the range of training (`longroll.measure.holds`); read the text in chunks
and answer from one of them (OPRM).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from longroll.data import ByteTokenizer
from longroll.errors import LongrollError
from longroll.measure.holds import STRIDE, Clip, Decay, check_hold, make_hold, state_limits
from longroll.model import RecurrentLM
from longroll.state import StateKey
from longroll.tasks._task import TRAINING, Sample, random_of
from longroll.tasks.evaluate import Row
from longroll.tasks.generate import Prefilled, Reading, prefill, prefill_samples

READINGS = ("plain", "reset", "decay", "clip", "chunk", "rescan", "window", "window+first")


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
    hold = Decay(per_token, after=after, stride=stride)

    def reading(lm: RecurrentLM, samples: Sequence[Sample]) -> list[Prefilled]:
        return prefill(lm, [sample.prompt for sample in samples], stops=stride, watch=hold)

    return reading


def held(name: str, window: int, *, stride: int) -> Reading:
    """Read under `rescan`, `window` or `window+first` of `longroll.measure.holds`.

    Args:
        name: the name of the hold.
        window: tokens it works over.
        stride: tokens between two looks at the state.
    """

    def reading(lm: RecurrentLM, samples: Sequence[Sample]) -> list[Prefilled]:
        prompts = sorted((sample.prompt for sample in samples), key=len, reverse=True)
        longest = len(prompts[0])
        # the rows that go on are always the first (`prefill`), so that those that ended are never read
        tokens = np.stack([np.resize(prompt, longest) for prompt in prompts]).astype(np.int64)
        hold = make_hold(name, lm, torch.from_numpy(tokens), window, stride=stride)
        return prefill(lm, [sample.prompt for sample in samples], stops=stride, watch=hold)

    return reading


def clipped(limits: dict[StateKey, torch.Tensor], *, stride: int = STRIDE) -> Reading:
    """Scale a head's state down to its limit (from `state_limits`) whenever its norm is above."""

    def reading(lm: RecurrentLM, samples: Sequence[Sample]) -> list[Prefilled]:
        return prefill(lm, [sample.prompt for sample in samples], stops=stride, watch=Clip(limits))

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


def make_reading(
    reading: str, lm: RecurrentLM, *, window: int | None, rows: Sequence[Row], length: int
) -> Reading:
    """Return a reading by its name on the command line.

    Args:
        reading: one of `READINGS`.
        lm: the model.
        window: tokens it works over; T is the natural choice.
        rows: rows of the grid that it is for: "clip" takes its limits from the beginnings of such prompts.
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
    check_hold(reading, lm)
    if reading == "decay":
        return decayed(1 - 1 / window, after=window)
    if reading in ("rescan", "window", "window+first"):
        return held(reading, window, stride=min(STRIDE, max(1, window // 4)))
    drawn = (rows[0].task.sample(length, rng=random_of(TRAINING, number)) for number in range(16))
    prompts = [sample.prompt[:window] for sample in drawn]
    shortest = min(map(len, prompts))
    tokens = np.stack([prompt[:shortest] for prompt in prompts]).astype(np.int64)
    return clipped(state_limits(lm, torch.from_numpy(tokens)))
