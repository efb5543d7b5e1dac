"""State tracking: the product of group elements read one by one, which no window of the last ones can tell.

Construction: word problems of a group, one element for each token, the label of each being the product of all
so far (Merrill, Petty & Sabharwal 2024, "The Illusion of State in State-Space Models", arXiv 2404.08819;
parity, cyclic groups and swaps: Grazzi et al. 2024, arXiv 2411.12537). Elements are IID uniform. A model that
is trained on short words and tracks long ones has learned the group, not a shortcut (Liu et al. 2022, arXiv
2210.10749).

Two scores, for neither of which a product is ever shown. `tagged`: what the model says after each of the last
elements, as the source trains and scores it. `free`: what it says when it is asked, by `=`, at the end.
"""

from __future__ import annotations

import functools
import re
import string
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from longroll.data import Tokenizer
from longroll.data.lanes import IGNORED
from longroll.data.windows import Item
from longroll.errors import LongrollError
from longroll.tasks._task import TRAINING, Sample, Task, own_tokens, random_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

START, ASK = "^", "="
LARGEST = 120
"""Elements of the largest group, S5."""
GROUPS = ("parity", "z5", "s3", "s5")
"""Groups that are tried, unless it is said otherwise."""
TAGGED = 32
"""Elements at the end of a text whose products are scored."""
ASKED = 1 / 16
"""Share of the tokens of a training row that ask."""


@functools.cache
def product_table(group: str) -> np.ndarray:
    """Return multiplication table (n, n) of `parity`, `zN` (cyclic), `sN` (N <= 5, also as `sN-swaps`) or
    `aN`; 0 is the identity.

    Raises:
        LongrollError: for another name, and groups of more than 120 elements.
    """
    match = re.fullmatch(r"([zsa])(\d+)", "z2" if group == "parity" else _whole(group))
    kind, size = (match[1], int(match[2])) if match else ("", 0)
    if kind == "z" and 2 <= size <= LARGEST:
        index = np.arange(size)
        return (index[:, None] + index) % size
    if kind in ("s", "a") and 3 <= size <= 5:
        elements = [p for p in permutations(range(size)) if kind == "s" or _even(p)]
        place = {element: i for i, element in enumerate(elements)}
        return np.array([[place[tuple(q[i] for i in p)] for q in elements] for p in elements])
    raise LongrollError(
        f"`groups` {group}: give parity, z2 to z{LARGEST}, s3 to s5, s3-swaps to s5-swaps, a3 to a5."
    )


@functools.cache
def drawn_elements(group: str) -> np.ndarray:
    """Return the elements that words of a group are drawn from: all, or those of `sN-swaps` that move at most
    two of the N points (Grazzi et al. 2024), whose products reach the whole group.

    Raises:
        LongrollError: as `product_table`.
    """
    table = product_table(group)
    if _whole(group) == group:
        return np.arange(len(table))
    points = int(_whole(group)[1:])
    moved = [sum(i != j for i, j in enumerate(p)) for p in permutations(range(points))]
    return np.flatnonzero(np.array(moved) <= 2)


def _whole(group: str) -> str:
    """Return the name of the group whose swaps make the words."""
    return group.removesuffix("-swaps") if re.fullmatch(r"s\d+-swaps", group) else group


def _even(permutation: tuple[int, ...]) -> bool:
    pairs = [(i, j) for j in range(len(permutation)) for i in range(j)]
    return sum(permutation[i] > permutation[j] for i, j in pairs) % 2 == 0


def names(elements: int) -> list[str]:
    """Return what elements are called: letters where there are enough, numbers else."""
    return list(string.ascii_lowercase[:elements]) if elements <= 26 else [str(i) for i in range(elements)]


class StateTracking(Task):
    """The word problem of a group; the length counts elements. Depth means nothing here.

    Args:
        tokenizer: the tokenizer of the model, with a token for every element.
        group: see `product_table`.

    Raises:
        LongrollError: for an unknown group, and a tokenizer without such tokens.
    """

    name = "tracking"
    metric = "tagged"
    unit = "elements"
    forced = True
    stationary = False

    def __init__(self, tokenizer: Tokenizer, group: str = "s5") -> None:
        super().__init__(tokenizer, new_tokens=1)
        self.group, self.table, self.drawn = group, product_table(group), drawn_elements(group)
        called = names(len(self.table))
        mend = (
            "take a smaller group (`groups`), or the tokenizer that longroll.tasks.tracking_tokenizer makes"
        )
        *elements, self.start, self.ask_id = own_tokens(
            tokenizer, [*called, START, ASK], task="tracking", what="element", mend=mend
        ).tolist()
        self.elements = np.array(elements, dtype=np.int32)

    def products(self, drawn: np.ndarray) -> np.ndarray:
        """Return the product of the first t elements, for every t, (T,)."""
        state, products = 0, np.empty_like(drawn)
        table = self.table.tolist()
        for t, element in enumerate(drawn.tolist()):
            state = table[state][element]
            products[t] = state
        return products

    def sample(self, length: int, *, depth: float | None = None, rng: np.random.Generator) -> Sample:
        """Draw `length` elements; the last are fed as the answer, so that the model is heard after each."""
        if length < 1:
            raise LongrollError(f"length {length} (`length`): a word has at least one element.")
        drawn = self.drawn[rng.integers(len(self.drawn), size=length)]
        right = self.elements[self.products(drawn)]
        told = min(length, TAGGED)
        ids = np.concatenate([self.opening, [self.start], self.elements[drawn], [self.ask_id]]).astype(
            np.int32
        )
        first = len(ids) - told
        target = [*right[-told:].tolist(), int(right[-1])]
        answer = np.concatenate([ids[first:], right[-1:]])
        context = (len(self.opening) + 1, first)
        return Sample(ids[:first], answer, " ".join(map(str, target)), context, prefix=self.prefix)

    def score(
        self, sample: Sample, written: np.ndarray, forced: np.ndarray | None = None
    ) -> dict[str, float]:
        """Share of products told right after the last elements, and whether the one asked for is."""
        assert forced is not None
        right = np.array(sample.target.split(), dtype=np.int64)
        same = forced == right
        return {"tagged": float(same[:-1].mean()), "free": float(same[-1])}

    def settings(self) -> dict[str, Any]:
        """With the group."""
        return super().settings() | {"tagged": TAGGED}

    @property
    def chance(self) -> float:
        """One in as many as the group has elements."""
        return 1 / len(self.table)

    @property
    def stop_id(self) -> int | None:
        """Nothing ends one token."""
        return None


class TrackingRows(Dataset[Item]):
    """Training rows: a word, each element labelled by the product so far, which is asked for too.

    Row i is drawn by (seed, i), from the tasks in turn. Items as those of `longroll.data.Windows`.

    Args:
        tasks: the tasks to draw from.
        length: T, tokens of a row.
        rows: how many.
        seed: random seed of everything drawn.
    """

    def __init__(self, tasks: list[StateTracking], length: int, rows: int, *, seed: int = 0) -> None:
        self.tasks, self.length, self.rows, self.seed = tasks, length, rows, seed

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Item:
        number = range(self.rows)[index]
        rng, task = random_of(TRAINING, self.seed, number), self.tasks[number % len(self.tasks)]
        drawn = task.drawn[rng.integers(len(task.drawn), size=self.length - 1)]
        asked = rng.random(self.length - 1) < ASKED
        products = task.products(np.where(asked, 0, drawn))  # asking multiplies by the identity
        ids = np.where(asked, task.ask_id, task.elements[drawn])
        labels = np.concatenate([[IGNORED], task.elements[products]]).astype(np.int64)
        ids = np.concatenate([[task.start], ids]).astype(np.int64)
        tensors = {"input_ids": torch.from_numpy(ids), "shift_labels": torch.from_numpy(labels)}
        return tensors | {"starts": torch.tensor(True)}


def tracking_tokenizer() -> PreTrainedTokenizerFast:
    """Return letters, numbers to 119 and two marks as a transformers tokenizer, to be saved with a model."""
    from tokenizers import Tokenizer as Tokens
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*string.ascii_lowercase, *map(str, range(LARGEST)), START, ASK, "*"]
    tokens = Tokens(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="*"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="*")
