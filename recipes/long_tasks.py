"""Passkey or BABILong at a short T, by every initial state, evaluated far past it (the paper's section 4).

    python recipes/long_tasks.py --task passkey --text books/train --validation books/valid --output passkey
    python recipes/long_tasks.py --task babilong --text books/train --validation books/valid \
        --facts babi --output babilong

Books are read from folders (shared/data/SOURCES.md names the ones meant), facts from bAbI's files. `base` is
a Mamba-2 that learns text and task together at T from the zero state, some of its heads slow to forget
(recipes/specimen.py says why). It is then trained on in the same way by plain steps (the control), Fitted
Noise, State Passing and, where samples can go on, TBPTT; `longer` is plain steps at 4 T, as many tokens a
step. Everything is evaluated on books and facts not read in training, as `longroll evaluate` does; `readings`
evaluates the base by the readings of `longroll.tasks.baselines`.

passkey: bytes, T = 256, running text as haystack, loss on all tokens. babilong: a BPE of 4096 tokens made
from books and facts, T = 256 (870 bytes), stories of at most 200 tokens: longer prompts differ in noise
alone. Loss on answers, and on one row of text in 32.

Run on one H200 beside 20 other processes, --seconds 190 for `base` and about 300 for what follows it (which
waits for it; `longer`: 110); `readings` on a CPU. What came of it: recipes/README.md, "Long tasks".

`--only NAME ...` runs some of them, each in its own process, say: they wait for each other's files.
`--seconds` ends training by the clock, counted from the start of the script. Results: OUTPUT/{label}.json, to
be put side by side by `longroll evaluate compare OUTPUT/*.json --output FIGURES`.
"""

import timed  # isort: skip  (its clock starts first)

import argparse
import time
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, PreTrainedTokenizerFast

from longroll.data import ByteTokenizer, Corpus, HFTokenizer, Windows, long_sequences, read_documents
from longroll.interventions import TBPTT, FittedNoise, StatePassing
from longroll.measure import position_loss
from longroll.model import RecurrentLM, load
from longroll.tasks import BABILong, Passkey, Row, Task, TaskRows, TextHaystack, evaluate_grid, read_stories
from longroll.tasks.babilong import QAS
from longroll.tasks.baselines import make_reading
from longroll.tasks.evaluate import fingerprint, task_result

FULL = {
    "length": 256, "hidden": 256, "layers": 4, "state": 128, "batch": {"passkey": 64, "babilong": 96},
    "kept": {"passkey": 160_000, "babilong": 80_000}, "base_steps": 6000, "steps": 1500, "vocabulary": 4096,
    "books": 10_000_000, "story": 200,
}  # fmt: skip
SMALL = FULL | {
    "hidden": 32, "layers": 1, "state": 16, "batch": {"passkey": 8, "babilong": 32}, "vocabulary": 512,
    "kept": {"passkey": 64, "babilong": 64}, "base_steps": 10, "steps": 5, "books": 300_000, "story": 150,
}  # fmt: skip
DEPTHS = (0.1, 0.5, 0.9)
SLOW = (0.001, 0.05)  # decay rates A of heads that can hardly forget
WAYS = {"plain": None, "fitted": FittedNoise, "sp": StatePassing, "tbptt": TBPTT}
LABELS = {"fitted": "fitted noise", "longer": "trained at 4 T"}
PIECES = 4  # of a sample of TBPTT
LONGER = 4  # times T, in rows of `longer`
TEXT_EVERY = {"passkey": 8, "babilong": 32}


class CachedTokenizer(HFTokenizer):
    """Calls the Rust tokenizer without transformers' wrapping, and remembers short texts."""

    def __init__(self, folder: Path) -> None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        encode = tokenizer.backend_tokenizer.encode
        self._encode = lru_cache(500_000)(lambda text: np.array(encode(text).ids, dtype=np.int32))
        super().__init__(tokenizer, "books and facts, BPE")

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, (T,) int32; the array is shared."""
        return self._encode(text)


def make_tokenizer(options: argparse.Namespace) -> None:
    """Train a byte-level BPE on some of the books and of the facts, and save it."""
    from tokenizers import Tokenizer as Tokens
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokens = Tokens(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    texts = [text[: options.size["books"] // 50] for text in read_text(options, train=True)]
    for qa in QAS:
        stories = read_stories(options.facts, qa, "train")[:300]
        texts += [" ".join([*story.facts, story.question, f"{story.answer}."]) for story in stories]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=options.size["vocabulary"], initial_alphabet=alphabet, show_progress=False
    )
    tokens.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(options.output / "words")


def read_text(options: argparse.Namespace, *, train: bool) -> list[str]:
    """The books of one side."""
    if options.validation:
        return list(read_documents(options.text if train else options.validation, split="all"))
    return list(read_documents(options.text, split="train" if train else "validation"))


def build(size: dict, vocabulary: int, slow: str, seed: int) -> Mamba2ForCausalLM:
    """A fresh model; half of the heads of each layer forget slowly and keep doing so, or all at first."""
    torch.manual_seed(seed)
    heads = 2 * size["hidden"] // 32
    config = Mamba2Config(
        vocab_size=vocabulary,
        hidden_size=size["hidden"],
        num_hidden_layers=size["layers"],
        state_size=size["state"],
        head_dim=32,
        num_heads=heads,
        n_groups=1,
        chunk_size=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = Mamba2ForCausalLM(config)
    random = np.random.default_rng(seed)
    some = heads // 2 if slow == "half" else heads
    for name, weight in model.named_parameters():
        if name.endswith("A_log"):
            weight.data[:some] = torch.tensor(random.uniform(*SLOW, size=some)).log().to(weight)
            weight.requires_grad_(slow == "all")
    return model


def freeze(lm: RecurrentLM, slow: str) -> None:
    """What `build` froze, in a model that was loaded."""
    for name, weight in lm.model.named_parameters():
        weight.requires_grad_(slow == "all" or not name.endswith("A_log"))


class Data:
    """Tokenizer, books and tasks of both sides."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.size = options, options.size
        self.words: ByteTokenizer | HFTokenizer = ByteTokenizer()
        if options.task == "babilong":
            timed.wait_for(options.output / "words" / "tokenizer_config.json")
            self.words = CachedTokenizer(options.output / "words")
        self.valid = read_text(options, train=False)

    def tasks(self, books: list[str], *, train: bool) -> list[Task]:
        """One task for passkey, five for BABILong."""
        if self.options.task == "passkey":
            haystack = TextHaystack(Corpus.from_texts(books, self.words), "books")
            return [Passkey(self.words, haystack=haystack, instruction=False)]
        tasks: list[Task] = []
        for qa in QAS:
            stories = read_stories(self.options.facts, qa, "train" if train else "test")
            stories = [story for story in stories if self._tokens(story) <= self.size["story"]]
            tasks.append(BABILong(self.words, qa, stories, books, few_shot=False))
        return tasks

    def _tokens(self, story) -> int:
        texts = [*story.facts, story.question]
        return sum(len(self.words.encode(f" {text}")) for text in texts)

    def rows(
        self, *, steps: int, longer: int = 1, windows: int = 1, answers_only: bool | None = None
    ) -> timed.StoredRows:
        """Rows to train on, made before training."""
        options, kind = self.options, self.options.task
        length, lanes = longer * self.size["length"], self.size["batch"][kind] // longer
        books = read_text(options, train=True)
        tasks = self.tasks(books, train=True)
        if answers_only is None:
            answers_only = kind == "babilong"
        rows = TaskRows(
            tasks,
            length,
            steps * lanes,
            lanes=lanes,
            windows=windows,
            seed=options.seed,
            answers_only=answers_only,
        )
        kept = self.size["kept"][kind]
        text = Windows(
            Corpus.from_texts(books, self.words, max_tokens=5_000_000),
            length,
            seed=options.seed,
            num_items=kept,
        )
        mixed = timed.MixedRows(rows, text, every=TEXT_EVERY[kind])
        return timed.StoredRows(mixed, kept, lanes=lanes, workers=options.workers)


def train_base(data: Data, options: argparse.Namespace) -> dict:
    """Text and task from scratch, from the zero state."""
    size, kind = options.size, options.task
    steps = size["base_steps"]
    rows = data.rows(steps=timed.MANY)
    first = data.rows(steps=timed.MANY, answers_only=False) if kind == "babilong" else None
    vocabulary = data.words.vocab_size
    lm = RecurrentLM(build(size, vocabulary, options.slow, options.seed).to(options.device), name="base")
    how = {"length": size["length"], "batch_size": size["batch"][kind], "learning_rate": 2e-3}
    how |= {"weight_decay": 0.1, "seed": options.seed}
    told = {}
    if first is not None:  # the language first: text, facts and answers alike
        seconds = options.seconds and time.time() - timed.BEGAN + 0.3 * (
            options.seconds - (time.time() - timed.BEGAN)
        )
        folder = options.output / "language"
        told["language"] = timed.train(lm, first, None, folder, seconds=seconds, steps=steps // 3, **how)
    folder = options.output / "base-being-written"
    told["base"] = timed.train(lm, rows, None, folder, seconds=options.seconds, steps=steps, **how)
    folder.rename(options.output / "base")
    return told


def train_on(name: str, data: Data, options: argparse.Namespace) -> tuple[RecurrentLM, dict]:
    """The base, trained on under an intervention."""
    size, kind = options.size, options.task
    longer = LONGER if name == "longer" else 1
    windows = PIECES if name == "tbptt" else 1
    rows = data.rows(steps=timed.MANY, longer=longer, windows=windows)
    timed.wait_for(options.output / "base" / "config.json")
    time.sleep(0.5)
    lm = load(options.output / "base", device=options.device)
    freeze(lm, options.slow)
    way = WAYS.get(name)
    intervention = way and way(zero_probability=0.1, seed=options.seed)
    told = timed.train(
        lm,
        rows,
        intervention,
        options.output / f"{name}-being-written",
        seconds=options.seconds,
        steps=size["steps"],
        length=longer * size["length"],
        batch_size=size["batch"][kind] // longer,
        learning_rate=options.learning_rate,
        decay_speed=options.decay_speed,
        seed=options.seed,
    )
    (options.output / f"{name}-being-written").rename(options.output / name)
    return lm, told


def text_loss(lm: RecurrentLM, data: Data, longest: int) -> dict[str, float]:
    """Nats a token on books, by octaves of positions, from the zero state."""
    # the longest book alone has half a million tokens
    corpus = Corpus.from_texts([text[: 8 * longest] for text in data.valid], data.words)
    tokens = long_sequences(corpus, longest, 8, seed=0)
    loss = position_loss(lm, tokens)
    ends = [0, *(data.size["length"] << k for k in range(20) if data.size["length"] << k <= longest)]
    return {f"{a}-{b}": round(loss.between(a, b), 4) for a, b in pairwise(ends)}


def evaluate(
    lm: RecurrentLM,
    label: str,
    data: Data,
    told: dict,
    options: argparse.Namespace,
    *,
    reading: str = "plain",
) -> None:
    """Measure the grid length by length; the file is whole after each."""
    began = time.perf_counter()
    tasks = data.tasks(data.valid, train=False)
    rows = [Row(depth, tasks[0], depth) for depth in DEPTHS]
    if options.task == "babilong":
        rows = [Row(qa, task) for qa, task in zip(QAS, tasks, strict=True)]
    length = options.size["length"]
    lengths = [length << octave for octave in range(options.furthest.bit_length())]
    name = label if reading == "plain" else f"{label}, {reading}"
    settings = tasks[0].settings() | {
        "weights": fingerprint(lm),
        "samples": options.samples,
        "seed": options.seed,
        "reading": reading,
        "slow": options.slow,
        "training": told,
    }
    if reading == "plain":
        settings["text_loss"] = text_loss(lm, data, min(lengths[-1], 16_384))
    how = make_reading(reading, lm, window=length, rows=rows, length=lengths[-1])
    cells: list = []
    for column in range(1, len(lengths) + 1):
        cells = evaluate_grid(
            lm,
            rows,
            lengths[:column],
            samples=options.samples,
            batch_size=options.samples,
            seed=options.seed,
            reading=how,
            finished=cells,
        )
        result = task_result(
            lm,
            cells,
            rows,
            lengths[:column],
            label=LABELS.get(name, name),
            train_length=length * (LONGER if label == "longer" else 1),
            settings=settings,
            seed=options.seed,
            seconds=time.perf_counter() - began,
        )
        result.write(options.output / f"{name.replace(', ', '-')}.json")
    assert result.tasks is not None
    print(name, result.tasks[options.task].accuracy, round(time.perf_counter() - began, 1), flush=True)


def main() -> None:
    """Train and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--task", choices=["passkey", "babilong"], required=True)
    parser.add_argument("--text", required=True, help="books: a folder")
    parser.add_argument("--validation", help="other books; default: some of --text")
    parser.add_argument("--facts", type=Path, help="bAbI's files")
    parser.add_argument("--small", action="store_true", help="only to see it run")
    everything = ["base", "plain", "fitted", "sp", "tbptt", "longer", "readings"]
    parser.add_argument("--only", nargs="+", choices=everything, default=everything)
    parser.add_argument("--seconds", type=float, help="of training and what goes before it, each of --only")
    parser.add_argument("--slow", choices=["half", "all"], default="half", help="heads slow to forget")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="after the base")
    parser.add_argument("--decay-speed", type=float, default=1.0, help="after the base")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--furthest", type=int, default=128, help="times T")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that make rows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.task == "babilong" and options.facts is None:
        parser.error("--task babilong needs --facts")
    options.size = SMALL if options.small else FULL
    options.output.mkdir(parents=True, exist_ok=True)
    if options.task == "babilong" and "base" in options.only:
        make_tokenizer(options)
    data = Data(options)
    for name in options.only:
        if name == "base":
            told = train_base(data, options)
            evaluate(load(options.output / "base", device=options.device), "base", data, told, options)
        elif name == "readings":
            timed.wait_for(options.output / "base" / "config.json")
            lm = load(options.output / "base", device=options.device)
            for reading in ("reset", "decay", "clip", "chunk"):
                evaluate(lm, "base", data, {}, options, reading=reading)
        elif name != "tbptt" or options.task == "babilong":
            lm, told = train_on(name, data, options)
            evaluate(lm, name, data, told, options)


if __name__ == "__main__":
    main()
