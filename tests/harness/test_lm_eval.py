"""lm-evaluation-harness: the scores of its own `hf` model, without truncation and with shared beginnings."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo

pytest.importorskip("lm_eval", reason="pip install 'longroll[lm-eval]'")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from longroll.errors import LongrollError
from longroll.harness import SHARED, LongrollLM
from longroll.measure.roll_out import chunk_tokens

WORDS = ["the", "sea", "was", "calm", "and", "nobody", "knew", "why", "lamps", "go", "out", "before", "dark"]


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny Mamba-2 and a tokenizer of its own, with beginning and end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer, tokens.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>", "<begin>"]
    )
    tokens.train_from_iterator([text(random.Random(0), 2000)], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="<end>", bos_token="<begin>", pad_token="<end>"
    )
    made.save_pretrained(path)
    zoo.build("mamba2", vocab_size=len(made), bos_token_id=1, eos_token_id=0, pad_token_id=0).save_pretrained(
        path
    )
    return str(path)


@pytest.fixture(scope="module")
def ours(folder) -> LongrollLM:
    return LongrollLM(folder, batch_size=7)


@pytest.fixture(scope="module")
def theirs(folder) -> HFLM:
    return HFLM(pretrained=folder, batch_size=1, device="cpu", dtype="float32", max_length=512)


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def close(found: list[float], expected: list[float]) -> None:
    assert len(found) == len(expected) and np.abs(np.subtract(found, expected)).max() <= 1e-4


def test_loglikelihoods_are_those_of_hf(ours, theirs):
    """200 requests: questions with four choices behind shared examples, lone ones, and empty contexts."""
    rng, pairs = random.Random(1), []
    shots = text(rng, 120)
    for number in range(50):
        kind = number % 3
        context = "" if kind == 2 else (f"{shots}\n\n" if kind else "") + text(rng, rng.randint(1, 60))
        pairs += [(context + (" " if number % 7 == 0 and context else ""), f" {text(rng, rng.randint(1, 5))}")
                  for _ in range(4)]  # fmt: skip
    assert len(pairs) == 200
    found = ours.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    expected = theirs.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    close([total for total, _ in found], [total for total, _ in expected])
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_greedy_continuations_are_called_greedy(ours, theirs):
    rng = random.Random(2)
    contexts = [text(rng, 10) for _ in range(4)]
    kwargs = {"until": [], "max_gen_toks": 6}
    best = ours.generate_until(
        instances("generate_until", [(c, dict(kwargs)) for c in contexts]), disable_tqdm=True
    )
    pairs = []
    for context, continuation in zip(contexts, best, strict=True):
        whole = ours.tok_encode(context + continuation)
        if whole[: len(ours.tok_encode(context))] == ours.tok_encode(context):  # else other tokens are scored
            pairs.append((context, continuation))
    found = ours.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    expected = theirs.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    assert pairs and [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_rolling_loglikelihoods_are_those_of_hf(ours, theirs):
    rng = random.Random(3)
    texts = [(text(rng, rng.randint(1, 90)),) for _ in range(12)]
    kind = "loglikelihood_rolling"
    found = ours.loglikelihood_rolling(instances(kind, texts), disable_tqdm=True)
    close(found, theirs.loglikelihood_rolling(instances(kind, texts), disable_tqdm=True))


@pytest.mark.parametrize("until", [["e"], [" the", "\n"], []])
def test_texts_generated_are_those_of_hf(ours, theirs, until):
    rng = random.Random(4)
    prompts = [(text(rng, rng.randint(1, 40)), {"until": list(until), "max_gen_toks": 12}) for _ in range(10)]
    found = ours.generate_until(instances("generate_until", prompts), disable_tqdm=True)
    assert found == theirs.generate_until(instances("generate_until", prompts), disable_tqdm=True)


def test_sampling_is_refused(ours):
    request = instances("generate_until", [("the", {"do_sample": True, "temperature": 1.0})])
    with pytest.raises(LongrollError, match="greedily"):
        ours.generate_until(request, disable_tqdm=True)


class Counted:
    """Counts the tokens that a model reads, and the largest forward."""

    def __init__(self, lm, monkeypatch):
        self.tokens, self.largest, forward = 0, 0, lm.forward

        def counting(ids, *arguments, **options):
            self.tokens += ids.numel()
            self.largest = max(self.largest, ids.numel())
            return forward(ids, *arguments, **options)

        monkeypatch.setattr(lm, "forward", counting)


def test_a_common_beginning_is_read_once(ours, monkeypatch):
    rng = random.Random(5)
    shots, document = text(rng, 300), text(rng, 700)
    pairs = [(f"{shots}\n{text(rng, 5)}", " the sea") for _ in range(30)]
    pairs += [(f"{shots}\n{document} {text(rng, 5)}", " the sea") for _ in range(30)]
    alone = [
        ours.loglikelihood(instances("loglikelihood", [pair]), disable_tqdm=True)[0][0] for pair in pairs
    ]
    counted = Counted(ours.lm, monkeypatch)
    found = ours.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    close([total for total, _ in found], alone)
    once = len(ours.tok_encode(f"{shots}\n{document}"))
    assert once <= counted.tokens <= once + 60 * 40 and once > 2 * SHARED


@pytest.mark.parametrize("where", ["context", "continuation"])
def test_a_long_prompt_is_read_whole_and_in_pieces(ours, where, monkeypatch):
    rng = random.Random(6)
    long, short = text(rng, 9_000), " the sea"
    counted = Counted(ours.lm, monkeypatch)
    if where == "context":
        request = instances("loglikelihood", [(long, short)])
        (found, _) = ours.loglikelihood(request, disable_tqdm=True)[0]
        ids = ours.tok_encode(long + short)
        scored = len(ids) - len(ours.tok_encode(long))
    else:
        found = ours.loglikelihood_rolling(instances("loglikelihood_rolling", [(long,)]), disable_tqdm=True)[
            0
        ]
        ids = [ours.prefix_token_id, *ours.tok_encode(long)]
        scored = len(ids) - 1
    assert counted.tokens == len(ids) - 1 > 9_000 and counted.largest <= chunk_tokens(ours.lm)
    monkeypatch.undo()
    with torch.no_grad():
        logits, _ = ours.lm(torch.tensor([ids[:-1]]))
    losses = logits[0].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[-scored:, 0]
    assert abs(found - losses.double().sum().item()) <= 1e-5 * scored + 1e-4


@pytest.mark.parametrize("where", ["argument", "command line"])
def test_a_plugin_builds_the_model(where, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    plugin = "examples.own_gru:build"
    monkeypatch.setattr(LongrollLM, "plugin", plugin if where == "command line" else None)
    lm = LongrollLM("gru", device="cpu", plugin=plugin if where == "argument" else None)
    (answer,) = lm.loglikelihood([Instance("loglikelihood", {}, ("abc", "d"), 0)])
    ids = torch.tensor([list(b"abc")])
    expected = lm.lm(ids)[0][0, -1].log_softmax(-1)[ord("d")].item()
    assert answer[0] == pytest.approx(expected, abs=1e-5) and lm.tokenizer_name == "bytes"
