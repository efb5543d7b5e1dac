"""Multi-query associative recall: values told once after their keys, asked for all together at the end.

Construction: Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv
2312.04927 (HazyResearch/zoology, data/multiquery_ar.py): N distinct keys with a value each, then the keys
again, each followed by its value; keys and values are tokens of their own. Two things differ, so that the
length says how long a value was kept: all queries stand at the end (there at distances drawn by a power law),
and what lies between is values that no key stands before (there any token).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from longroll.data import Tokenizer
from longroll.errors import LongrollError
from longroll.tasks._task import Sample, Task, own_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORDS = 64
"""Keys of the vocabulary, and values."""


PAIRS = 8
"""Keys of a sample, unless it is said otherwise."""


class Recall(Task):
    """Multi-query associative recall; the length counts tokens. Depth means nothing here.

    Args:
        tokenizer: the tokenizer of the model, with the tokens `k0` to `k63` and `v0` to `v63`.
        pairs: N, keys that are told and asked for, at most 64.

    Raises:
        LongrollError: for another number of pairs, and a tokenizer without such tokens.
    """

    name = "recall"
    metric = "recalled"
    forced = True
    stationary = False

    def __init__(self, tokenizer: Tokenizer, pairs: int = PAIRS) -> None:
        super().__init__(tokenizer, new_tokens=1)
        if not 1 <= pairs <= WORDS:
            raise LongrollError(f"`pairs` {pairs}: give 1 to {WORDS}.")
        self.pairs = pairs
        words = [f"{kind}{i}" for kind in "kv" for i in range(WORDS)]
        mend = "use the tokenizer that longroll.tasks.recall_tokenizer makes"
        found = own_tokens(tokenizer, words, task="recall", what="key and value", mend=mend)
        self.keys, self.values = np.split(found, 2)

    def sample(self, length: int, *, depth: float | None = None, rng: np.random.Generator) -> Sample:
        """Tell the pairs, then noise, then ask for every key; `length` counts all of it."""
        keys, values = rng.permutation(self.keys)[: self.pairs], rng.choice(self.values, size=self.pairs)
        noise = self._room(length, 4 * self.pairs + len(self.opening))
        told = np.stack([keys, values], axis=1).flatten()
        order = rng.permutation(self.pairs)
        asked = np.stack([keys[order], values[order]], axis=1).flatten()
        between = rng.choice(self.values, size=noise)
        prompt = np.concatenate([self.opening, told, between, asked[:1]]).astype(np.int32)
        learned = np.arange(len(asked) - 1) % 2 == 0  # values, not the keys between them
        first = len(self.opening)
        return Sample(
            prompt, asked[1:], "", (first + len(told), len(prompt) - 1), prefix=self.prefix, learned=learned
        )

    def score(
        self, sample: Sample, written: np.ndarray, forced: np.ndarray | None = None
    ) -> dict[str, float]:
        """Share of the values recalled, given the right ones before, and whether the first one is."""
        assert forced is not None
        same = (forced == sample.answer)[::2]
        return {"recalled": float(same.mean()), "first": float(same[0])}

    def settings(self) -> dict[str, Any]:
        """With the size of the vocabulary."""
        return super().settings() | {"words": WORDS}

    @property
    def chance(self) -> float:
        """One in as many values as there are."""
        return 1 / WORDS

    @property
    def stop_id(self) -> int | None:
        """Nothing ends one token."""
        return None


def recall_tokenizer() -> PreTrainedTokenizerFast:
    """Return the keys and values as a transformers tokenizer, to be saved beside a model."""
    from tokenizers import Tokenizer as Tokens
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*(f"k{i}" for i in range(WORDS)), *(f"v{i}" for i in range(WORDS)), "*"]
    tokens = Tokens(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="*"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="*")
