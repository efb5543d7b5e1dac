"""Synthetic copying: `$abc|` has to be followed by `abc.`.

Source: sjelassi/transformers_ssm_copy, synthetic_exps/data_utils.py and test_utils.py (Jelassi et al. 2024,
"Repeat After Me"), task "copy": letters IID uniform, strings as long as asked. Scored two ways, both named:
teacher-forced by argmax, as in the source and the paper (string and character accuracy), and by what the
model writes on its own, which is harder.
"""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from longroll.data import Tokenizer
from longroll.data.windows import Item
from longroll.errors import LongrollError
from longroll.tasks._task import TRAINING, Sample, Task, own_tokens, random_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LETTERS = string.ascii_lowercase
VOCABULARY = [*LETTERS, "$", "|", ".", "*"]
"""Ids 0 to 29, in the order of the source; `*` is its padding, unused here."""
CONTEXT = 220
"""Tokens of a training row, in the source and the paper."""


class Copying(Task):
    """The copying task; the length is that of the string, in letters. Depth means nothing here."""

    name = "copying"
    metric = "forced_character"
    unit = "letters"
    forced = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        mend = "use bytes or the tokenizer that recipes/copying.py makes"
        found = own_tokens(tokenizer, [*LETTERS, "."], task="copying", what="letter", mend=mend)
        self.letters, self.stop = found[:-1], int(found[-1])
        self.start, self.middle, self.end = (self.encode(mark) for mark in "$|.")

    def sample(self, length: int, *, depth: float | None = None, rng: np.random.Generator) -> Sample:
        """Return a random string of `length` letters; the prompt has two tokens more, the answer ends with
        `.`.
        """
        if length < 1:
            raise LongrollError(f"length {length} (`length`): a string to copy has at least one letter.")
        drawn = rng.integers(len(LETTERS), size=length)
        letters = self.letters[drawn]
        prompt = np.concatenate([self.opening, self.start, letters, self.middle])
        answer = np.concatenate([letters, self.end])
        target, first = "".join(LETTERS[i] for i in drawn), len(prompt) - length - 1
        return Sample(prompt, answer, target, (first, first + length), prefix=self.prefix)

    def score(
        self, sample: Sample, written: np.ndarray, forced: np.ndarray | None = None
    ) -> dict[str, float]:
        """Return string and character accuracy, teacher-forced and free; the final `.` does not count."""
        right = sample.answer[:-1]
        scores = {}
        for how, ids in (("forced", forced), ("free", written)):
            if ids is not None:
                same = ids[: len(right)] == right[: len(ids)]
                scores[f"{how}_string"] = float(len(same) == len(right) and same.all())
                scores[f"{how}_character"] = float(same.sum() / len(right))
        return scores

    @property
    def stop_id(self) -> int | None:
        """`.` ends a copy."""
        return self.stop


class CopyRows(Dataset[Item]):
    """Training rows as in the source: examples packed until the row is full, loss after `|` only.

    Row i is drawn by (seed, i). An example that does not fit is cut and not learned from. Items as those of
    `longroll.data.Windows`, of `context` - 1 tokens.

    Args:
        task: the task, for its tokens.
        rows: how many.
        context: tokens of a row.
        shortest, longest: letters of a string, both included.
        seed: random seed of everything drawn.

    Raises:
        LongrollError: for strings of which not even one fits.
    """

    def __init__(
        self,
        task: Copying,
        rows: int,
        *,
        context: int = CONTEXT,
        shortest: int = 8,
        longest: int = 50,
        seed: int = 0,
    ) -> None:
        if not 1 <= shortest <= longest or 2 * longest + 3 > context:
            raise LongrollError(
                f"strings of {shortest} to {longest} letters do not fit into rows of {context} tokens: "
                "a copy takes two tokens a letter and three more."
            )
        self.task, self.rows, self.context, self.seed = task, rows, context, seed
        self.shortest, self.longest = shortest, longest

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Item:
        rng = random_of(TRAINING, self.seed, range(self.rows)[index])
        ids = np.empty(0, dtype=np.int64)
        learned = np.empty(0, dtype=bool)
        while len(ids) < self.context:
            example = self.task.sample(int(rng.integers(self.shortest, self.longest + 1)), rng=rng)
            fits = len(ids) + len(example.tokens) <= self.context
            ids = np.concatenate([ids, example.tokens])
            mask = np.arange(len(example.tokens)) >= len(example.prompt)
            learned = np.concatenate([learned, mask & fits])
        ids, learned = ids[: self.context], learned[: self.context]
        labels = np.where(learned[1:], ids[1:], -100)
        tensors = {"input_ids": torch.from_numpy(ids[:-1]), "shift_labels": torch.from_numpy(labels)}
        return tensors | {"starts": torch.tensor(True)}


def copying_tokenizer() -> PreTrainedTokenizerFast:
    """Return the 30 tokens of the source as a transformers tokenizer, to be saved beside a model."""
    from tokenizers import Tokenizer as Tokens
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = Tokens(models.WordLevel({token: id for id, token in enumerate(VOCABULARY)}, unk_token="*"))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokens.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="*")
