"""Reading and writing many prompts at once is reading and writing them one by one."""

import numpy as np
import pytest
import torch

import zoo
from longroll.tasks import Sample, answer
from longroll.tasks.generate import prefill

FAMILIES = ["mamba", "mamba2", "mamba2_groups", "gpt2", "llama"]
SHAPES = [[7], [5, 5, 5], [3, 80, 41, 3, 17], [1, 2, 130]]


def prompts(lengths: list[int], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(zoo.VOCAB, size=length, dtype=np.int32) for length in lengths]


def samples(lengths: list[int], seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed + 100)
    answers = [rng.integers(zoo.VOCAB, size=rng.integers(1, 5), dtype=np.int32) for _ in lengths]
    found = zip(prompts(lengths, seed), answers, strict=True)
    return [Sample(prompt, right, "", (0, len(prompt))) for prompt, right in found]


@pytest.mark.parametrize("seed", range(len(SHAPES)))
@pytest.mark.parametrize("name", FAMILIES)
def test_states_are_those_of_each_prompt_alone(name, seed):
    lm, given = zoo.lm_of(name, seed, dtype=torch.float64), prompts(SHAPES[seed], seed)
    reads = prefill(lm, given)
    assert sorted(row for read in reads for row in read.rows) == list(range(len(given)))
    for read in reads:
        for i, row in enumerate(read.rows):
            hidden, state = lm(torch.from_numpy(given[row].astype(np.int64))[None], logits=False)
            zoo.assert_close(read.hidden[i], hidden[0, -1], 1e-10)
            for key, tensor in state.items():
                zoo.assert_close(read.state[key][i], tensor[0], 1e-10, str(key))


@pytest.mark.parametrize("seed", range(len(SHAPES)))
@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_those_of_the_full_forward(name, seed):
    lm, given = zoo.lm_of(name, seed, dtype=torch.float64), samples(SHAPES[seed], seed)
    found = answer(lm, given, new_tokens=6, forced=True)
    for sample, (written, forced) in zip(given, found, strict=True):
        ids = sample.prompt.tolist()
        for _ in range(6):  # no state at all: the whole text again for every token
            logits, _ = lm(torch.tensor([ids]))
            ids.append(int(logits[0, -1].argmax()))
        assert written.tolist() == ids[len(sample.prompt) :]
        logits, _ = lm(torch.from_numpy(sample.tokens.astype(np.int64))[None])
        expected = logits[0, len(sample.prompt) - 1 : -1].argmax(dim=-1)
        assert forced.tolist() == expected.tolist()


@pytest.mark.parametrize("name", zoo.EVERY)
def test_every_family_goes_on_from_states_side_by_side(name):
    """The logits after one more token too: a state that depends on its position would show there."""
    lm, given, more = zoo.lm_of(name), prompts([30, 11, 11], 4), zoo.tokens(3, 1)
    for read in prefill(lm, given):
        logits, _ = lm(more[read.rows], read.state)
        for i, row in enumerate(read.rows):
            whole = torch.cat([torch.from_numpy(given[row].astype(np.int64)), more[row]])
            alone, _ = lm(whole[None])
            zoo.assert_close(logits[i, 0], alone[0, -1], 1e-3)


def test_a_shared_state_is_the_prefix_read_again():
    lm, given = zoo.lm_of("mamba2", dtype=torch.float64), prompts([9, 4], 1)
    prefix = prompts([21], 2)[0]
    _, state = lm(torch.from_numpy(prefix.astype(np.int64))[None])
    (after,) = prefill(lm, given, state=state)
    (whole,) = prefill(lm, [np.concatenate([prefix, rest]) for rest in given])
    assert after.rows == whole.rows
    zoo.assert_close(after.hidden, whole.hidden, 1e-10)


def test_writing_ends_at_the_stop():
    lm, given = zoo.lm_of("mamba2"), samples([12, 30], 3)
    free = [found.written for found in answer(lm, given, new_tokens=8)]
    stop = int(free[0][3])
    for found, ids in zip(answer(lm, given, new_tokens=8, stop_id=stop), free, strict=True):
        end = ids.tolist().index(stop) if stop in ids else len(ids)
        assert found.written.tolist() == ids[:end].tolist()


def test_memory_does_not_grow_with_the_prompt():
    lm, largest = zoo.lm_of("mamba2"), []
    forward = lm.forward
    lm.forward = lambda ids, *args, **more: (largest.append(ids.numel()), forward(ids, *args, **more))[1]
    sizes = set()
    for length in (5_000, 20_000):
        (read,) = prefill(lm, prompts([length, length - 1], 0))
        sizes.add(sum(t.numel() for t in read.state.values()))
    assert max(largest) <= 4096 and len(sizes) == 1
