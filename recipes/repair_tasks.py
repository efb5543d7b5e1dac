"""Passkey or BABILong on a model that recipes/repair.py trained: finetuned at T by every initial state.

    python recipes/repair_tasks.py mamba2-103m --task passkey --tokens tokens --work work --output results

Mirrors the paper's section 4: the base is finetuned on the task at T from zero states (the control), Fitted
Noise, State Passing and TBPTT, whose samples are of 4 T, each for as many steps, and evaluated from T to
128 T on books that it did not read. The haystack of passkey is running text, with the loss on all tokens;
BABILong has its loss on answers and on one row of text in 8. Writes OUTPUT/TASK-ARM.json, which `longroll
evaluate compare` puts side by side. The base's weights lie in --work, where repair.py left them; this waits
for them.
"""

from __future__ import annotations

import argparse
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import timed
import torch
from repair import VOCABULARY
from repair_models import PLANS
from repair_text import Books
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from longroll.data import Corpus, HFTokenizer, Windows
from longroll.interventions import TBPTT, FittedNoise, StatePassing
from longroll.interventions.recipes import RECIPES, Settings
from longroll.model import RecurrentLM
from longroll.tasks import BABILong, Passkey, Row, Task, TaskRows, TextHaystack, evaluate_grid, read_stories
from longroll.tasks.babilong import QAS
from longroll.tasks.evaluate import fingerprint, task_result

ARMS = {"plain": None, "fitted": FittedNoise, "sp": StatePassing, "tbptt": TBPTT}
DEPTHS = (0.1, 0.5, 0.9)
PIECES = 4  # of a sample of TBPTT
TEXT_EVERY = 8
STORY = 150  # tokens of a story at most: longer prompts differ in noise alone
KEPT = 64_000  # rows that are made


class Tokens(HFTokenizer):
    """Remembers the ids of short texts."""

    def __init__(self, path: Path) -> None:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
        encode = tokenizer.backend_tokenizer.encode
        self._encode = lru_cache(500_000)(lambda text: np.array(encode(text).ids, dtype=np.int32))
        super().__init__(tokenizer, "books, BPE")

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, (T,) int32; the array is shared."""
        return self._encode(text)


class Data:
    """The task on books to train on and on books to evaluate on."""

    def __init__(self, options: argparse.Namespace, length: int) -> None:
        self.options, self.length = options, length
        self.words = Tokens(options.tokens / "tokenizer.json")
        self.books = {"train": Books.load(options.tokens / "train.xz")}
        self.books["valid"] = Books.load(options.tokens / "valid.xz")

    def corpus(self, side: str, most: int) -> Corpus:
        """The first `most` tokens of each of some books."""
        books = self.books[side]
        pieces = [books.book(i)[:most].astype(np.int32) for i in range(min(16, books.count))]
        sizes = sum(map(len, pieces))
        return Corpus(np.concatenate(pieces), np.cumsum([0, *map(len, pieces)]), 4 * sizes)

    def tasks(self, side: str) -> list[Task]:
        """One task for passkey, five for BABILong."""
        corpus = self.corpus(side, 200_000)
        if self.options.task == "passkey":
            return [Passkey(self.words, haystack=TextHaystack(corpus, "books"), instruction=False)]
        decode = self.words.tokenizer.decode
        books = [decode(corpus.document(i)[:80_000]) for i in range(corpus.documents)]
        tasks: list[Task] = []
        for qa in QAS:
            stories = read_stories(self.options.facts, qa, "train" if side == "train" else "test")
            stories = [story for story in stories if self._tokens(story) <= STORY]
            tasks.append(BABILong(self.words, qa, stories, books, few_shot=False))
        return tasks

    def _tokens(self, story) -> int:  # type: ignore[no-untyped-def]
        return sum(len(self.words.encode(f" {text}")) for text in [*story.facts, story.question])

    def rows(self, windows: int) -> timed.StoredRows:
        """Rows to train on, made by several processes before training."""
        options, kept = self.options, min(KEPT, self.options.steps * self.options.rows)
        rows = TaskRows(
            self.tasks("train"), self.length, options.steps * options.rows, lanes=options.rows,
            windows=windows, seed=0, answers_only=options.task == "babilong",
        )  # fmt: skip
        text = Windows(self.corpus("train", 200_000), self.length, seed=0, num_items=kept)
        mixed = timed.MixedRows(rows, text, every=TEXT_EVERY)
        return timed.StoredRows(mixed, kept, lanes=options.rows, workers=options.workers)


def finetune(arm: str, data: Data, weights: Path, options: argparse.Namespace) -> tuple[RecurrentLM, dict]:
    """The base, finetuned on the task under an arm."""
    plan, way = PLANS[options.model], ARMS[arm]
    how = RECIPES["longroll"].task.get(arm, Settings(zero_probability=0.1))
    rows = data.rows(PIECES if arm == "tbptt" else 1)
    timed.wait_for(weights)
    model = plan.build(plan, VOCABULARY)
    model.load_state_dict(load_file(weights), strict=False)
    lm = RecurrentLM(model.to(options.device), name=options.model)
    folder = options.work / "tasks" / f"{options.task}-{arm}"
    told = timed.train(
        lm, rows, way and way(zero_probability=how.zero_probability), folder, seconds=None,
        steps=options.steps, length=plan.length, batch_size=options.rows, learning_rate=options.learning_rate,
        decay_speed=how.decay_speed, cuda_graphs=lm.device.type == "cuda" and plan.graphs,
    )  # fmt: skip
    return lm, told


def evaluate(lm: RecurrentLM, arm: str, data: Data, told: dict, options: argparse.Namespace) -> None:
    """Measure the grid length by length; the file is whole after each."""
    began, tasks = time.perf_counter(), data.tasks("valid")
    rows = [Row(depth, tasks[0], depth) for depth in DEPTHS]
    if options.task == "babilong":
        rows = [Row(qa, task) for qa, task in zip(QAS, tasks, strict=True)]
    lengths = [data.length << octave for octave in range(options.furthest.bit_length())]
    settings = {"weights": fingerprint(lm), "samples": options.samples, "seed": 0, "training": told}
    cells: list = []
    for column in range(1, len(lengths) + 1):
        cells = evaluate_grid(
            lm, rows, lengths[:column], samples=options.samples, batch_size=options.samples, seed=0,
            finished=cells,
        )  # fmt: skip
        result = task_result(
            lm, cells, rows, lengths[:column], label="fitted noise" if arm == "fitted" else arm,
            train_length=data.length, settings=tasks[0].settings() | settings, seed=0,
            seconds=time.perf_counter() - began,
        )  # fmt: skip
        result.write(options.output / f"{options.task}-{arm}.json")
    assert result.tasks is not None
    print(arm, result.tasks[options.task].accuracy, round(time.perf_counter() - began, 1), flush=True)


def main() -> None:
    """Finetune and evaluate each arm whose file is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", choices=PLANS)
    parser.add_argument("--task", choices=["passkey", "babilong"], required=True)
    parser.add_argument("--arm", action="append", choices=ARMS, help="default: all")
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--facts", type=Path, help="bAbI's files")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--furthest", type=int, default=128, help="times T")
    parser.add_argument("--workers", type=int, default=1, help="processes that make rows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.task == "babilong" and options.facts is None:
        parser.error("--task babilong needs --facts")
    weights = options.work / options.model / "base.safetensors"
    options.output.mkdir(parents=True, exist_ok=True)
    data = Data(options, PLANS[options.model].length)
    for arm in options.arm or ARMS:
        if not (options.output / f"{options.task}-{arm}.json").exists():
            lm, told = finetune(arm, data, weights, options)
            evaluate(lm, arm, data, told, options)


if __name__ == "__main__":
    main()
