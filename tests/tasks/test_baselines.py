"""Baselines: what each leaves of the past."""

import numpy as np
import pytest
import torch

import zoo
from longroll.conformance.tiny import CONFIGS
from longroll.errors import LongrollError
from longroll.families import FAMILIES as EVERY_FAMILY
from longroll.heads import has_heads, head_norms
from longroll.measure._attention_readings import Positions
from longroll.tasks import Sample, Task
from longroll.tasks.baselines import (
    READINGS,
    best_chunk,
    clipped,
    decayed,
    last_window,
    make_reading,
    state_limits,
)
from longroll.tasks.evaluate import Row
from longroll.tasks.generate import prefill_samples

FAMILIES = ["mamba", "mamba2", "rwkv"]
KINDS = {EVERY_FAMILY[model_type].kind: name for name, (model_type, _) in CONFIGS.items()}
"""A tiny model of each kind of layer."""


def sample(seed: int, head: int = 5, context: int = 300, tail: int = 6) -> Sample:
    prompt = np.random.default_rng(seed).integers(zoo.VOCAB, size=head + context + tail, dtype=np.int32)
    return Sample(prompt, prompt[:1], "", (head, head + context))


def alone(lm, ids: np.ndarray):
    hidden, state = lm(torch.from_numpy(ids.astype(np.int64))[None], logits=False)
    return hidden[:, -1], state


@pytest.mark.parametrize("name", FAMILIES)
def test_a_window_is_all_that_is_read(name):
    lm, given = zoo.lm_of(name, dtype=torch.float64), [sample(0), sample(1, context=10)]
    (read,) = last_window(50)(lm, given)
    for row, hidden in zip(read.rows, read.hidden, strict=True):
        zoo.assert_close(hidden, alone(lm, given[row].prompt[-50:])[0][0], 1e-10)


@pytest.mark.parametrize("name", FAMILIES)
def test_decay_of_one_changes_nothing_and_of_zero_forgets(name):
    lm, given = zoo.lm_of(name, dtype=torch.float64), [sample(0)]
    (plain,), (same,) = prefill_samples(lm, given), decayed(1.0, after=0)(lm, given)
    zoo.assert_same_state(same.state, plain.state, 1e-10)
    length = len(given[0].prompt)
    (gone,) = decayed(0.0, after=0, stride=length - 20)(lm, given)
    _, before = alone(lm, given[0].prompt[: length - 20])
    forgotten = {key: torch.zeros_like(t) if key.part == "recurrent" else t for key, t in before.items()}
    _, expected = lm(
        torch.from_numpy(given[0].prompt[None, -20:].astype(np.int64)),
        type(before)(forgotten, seen=before.seen),
    )
    zoo.assert_same_state(gone.state, expected, 1e-10)


@pytest.mark.parametrize("name", [*FAMILIES, "recurrent_gemma"])
def test_clipping_keeps_every_head_within_its_limit(name):
    lm, given = zoo.lm_of(name), [sample(0, context=501)]
    limits = state_limits(lm, zoo.tokens(4, 64), stride=16)
    low = {key: 0.3 * limit for key, limit in limits.items()}
    (read,) = clipped(low, stride=512)(lm, given)  # the last look is at the end of the prompt
    for key, tensor in read.state.part("recurrent").items():
        norms = head_norms(tensor)
        assert (norms <= low[key] * (1 + 1e-5)).all()
        assert (norms > low[key] * (1 - 1e-5)).any()  # some were clipped
    (plain,) = prefill_samples(lm, given)
    loose = {key: limit * 1e6 for key, limit in limits.items()}
    zoo.assert_same_state(clipped(loose, stride=100)(lm, given)[0].state, plain.state, 1e-4)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_the_surest_chunk_answers(tokens):
    lm, given = zoo.lm_of("mamba2", dtype=torch.float64), [sample(seed) for seed in range(3)]
    for read in best_chunk(75, tokens=tokens)(lm, given):
        (row,) = read.rows
        head, context, tail = np.split(given[row].prompt, given[row].context)
        chunks = [np.concatenate([head, context[at : at + 64], tail]) for at in range(0, len(context), 64)]
        entropies = []
        for chunk in chunks:
            entropies.append(0.0)
            for _ in range(tokens):
                odds = torch.distributions.Categorical(logits=lm.head(alone(lm, chunk)[0])[0])
                entropies[-1] += odds.entropy().item()
                chunk = np.append(chunk, odds.logits.argmax().numpy())
        zoo.assert_close(read.hidden, alone(lm, chunks[np.argmin(entropies)])[0], 1e-10)


def test_a_chunk_has_to_have_room():
    with pytest.raises(LongrollError, match="`window`"):
        best_chunk(11)(zoo.lm_of("mamba2"), [sample(0)])


class Drawn(Task):
    """Random tokens of a tiny vocabulary."""

    name = "drawn"

    def __init__(self):
        self.tokenizer = None

    def sample(self, length, *, depth=None, rng):
        prompt = rng.integers(zoo.VOCAB, size=length, dtype=np.int32)
        return Sample(prompt, prompt[:1], "", (3, length - 3))


RECURRENT = sorted(kind for kind in KINDS if kind not in ("attention", "conv"))


@pytest.mark.parametrize("kind", RECURRENT)
def test_every_reading_reads_every_kind_of_state(kind):
    lm, given = zoo.lm_of(KINDS[kind]), [sample(0, context=150), sample(1, context=20)]
    plain = {row: read for read in prefill_samples(lm, given) for row in read.rows}
    for name in READINGS:
        held = Positions(lm) if lm.has_attention else None
        moved = held is not None and held.windows and (name == "window" or held.kind != "other")
        if name in ("window", "window+first") and not moved:
            with pytest.raises(LongrollError, match=r"no attention whose keys|cannot be moved"):
                make_reading(name, lm, window=32, rows=[Row(None, Drawn())], length=96)
            continue
        reading = make_reading(name, lm, window=32, rows=[Row(None, Drawn())], length=96)
        found = {row: read for read in reading(lm, given) for row in read.rows}
        assert found.keys() == plain.keys()
        for read in found.values():
            assert read.hidden.isfinite().all()
            assert read.state.keys() == plain[0].state.keys()
            for key, tensor in read.state.part("recurrent", "conv").items():
                assert tensor.isfinite().all() and tensor.shape[1:] == plain[0].state[key].shape[1:]


@pytest.mark.parametrize("kind", RECURRENT)
def test_limits_are_of_the_heads_that_the_ablation_holds(kind):
    lm = zoo.lm_of(KINDS[kind])
    for key, limit in state_limits(lm, zoo.tokens(3, 40), stride=16).items():
        tensor = lm.zero_state(1)[key]
        assert limit.shape == (1, tensor.shape[1] if has_heads(tensor) else 1)
