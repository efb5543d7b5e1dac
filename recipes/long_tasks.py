"""Passkey or BABILong at a short T, by every initial state, evaluated far past it (the paper's section 4).

    python recipes/long_tasks.py --task passkey --text books-train --output passkey
    python recipes/long_tasks.py --task babilong --text books-train --facts babi --output babilong

NOT YET RUN at its own size, which is for a GPU; `--small` (a minute of one CPU core) only shows that all of
it goes through. Books are read from a folder (shared/data/SOURCES.md names the ones meant), facts from
bAbI's files. A byte-level Mamba-2 with slowly forgetting heads (recipes/specimen.py says why) learns the
books at T, then the task by plain steps, Fitted Noise, State Passing and, where samples can go on, TBPTT;
also plain steps at 4 T with a quarter of the rows, for equal compute. Everything is evaluated on books not
read in training, as `longroll evaluate` does; the plainly trained model also by the readings of
`longroll.tasks.baselines`. Results: OUTPUT/{label}.json, to be put side by side by
`longroll evaluate compare OUTPUT/*.json --output FIGURES`.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from longroll.data import ByteTokenizer, Corpus, read_documents
from longroll.interventions import TBPTT, FittedNoise, Intervention, StatePassing
from longroll.model import RecurrentLM, load
from longroll.results import write_json
from longroll.tasks import BABILong, Passkey, Row, Task, TaskRows, TextHaystack, evaluate_grid, read_stories
from longroll.tasks.babilong import QAS
from longroll.tasks.baselines import READINGS, make_reading
from longroll.tasks.evaluate import fingerprint, task_result
from longroll.training import PosttrainOptions, posttrain

WORDS = ByteTokenizer()
LENGTHS = {"passkey": 256, "babilong": 2048}  # T: most stories of qa1, qa2, qa4 and qa5 fit into 2k bytes
FULL = {"hidden": 256, "layers": 4, "tokens": 65_536, "text_steps": 6000, "task_steps": 3000}
SMALL = {"hidden": 32, "layers": 1, "tokens": 8192, "text_steps": 5, "task_steps": 5}
DEPTHS = (0.1, 0.5, 0.9)
SLOW = (0.001, 0.05)  # decay rates A of heads that can hardly forget


def build(size: dict, seed: int) -> Mamba2ForCausalLM:
    """A fresh byte-level model; half of the heads of each layer forget slowly, and keep doing so."""
    torch.manual_seed(seed)
    heads = 2 * size["hidden"] // 32
    config = Mamba2Config(
        vocab_size=256,
        hidden_size=size["hidden"],
        num_hidden_layers=size["layers"],
        state_size=128 if size["hidden"] > 100 else 16,
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
    for name, weight in model.named_parameters():
        if name.endswith("A_log"):
            slow = torch.tensor(random.uniform(*SLOW, size=heads // 2)).log()
            weight.data[: heads // 2] = slow.to(weight)
            weight.requires_grad_(False)
    return model


def make_tasks(options: argparse.Namespace, *, train: bool) -> list[Task]:
    """The task over the books of one side: one for passkey, five for BABILong."""
    split = "train" if train else "validation"
    books = list(read_documents(options.text, split=split))
    if options.task == "passkey":
        haystack = TextHaystack(Corpus.from_texts(books, WORDS), "books")
        return [Passkey(WORDS, haystack=haystack, instruction=False)]
    side = "train" if train else "test"
    return [BABILong(WORDS, qa, read_stories(options.facts, qa, side), books, few_shot=False) for qa in QAS]


def evaluate(
    lm: RecurrentLM, label: str, reading: str, lengths: list[int], options: argparse.Namespace
) -> None:
    """Measure a grid and write it."""
    began = time.perf_counter()
    tasks = make_tasks(options, train=False)
    rows = [Row(depth, tasks[0], depth) for depth in DEPTHS]
    if options.task == "babilong":
        rows = [Row(qa, task) for qa, task in zip(QAS, tasks, strict=True)]
    length = options.size["length"]
    settings = {
        "weights": fingerprint(lm),
        "samples": options.samples,
        "seed": options.seed,
        "reading": reading,
    }
    cells = evaluate_grid(
        lm,
        rows,
        lengths,
        samples=options.samples,
        batch_size=32,
        seed=options.seed,
        reading=make_reading(reading, lm, window=length, rows=rows, length=lengths[-1]),
    )
    result = task_result(
        lm,
        cells,
        rows,
        lengths,
        label=label,
        train_length=length,
        settings=settings | tasks[0].settings(),
        seed=options.seed,
        seconds=time.perf_counter() - began,
    )
    write_json(options.output / f"{label.replace(' ', '-').replace(',', '')}.json", result)
    print(label, result["tasks"][options.task]["accuracy"], flush=True)


def train_text(options: argparse.Namespace) -> Path:
    """The base: a language model of the books."""
    size, folder = options.size, options.output / "base"
    corpus = Corpus.from_texts(read_documents(options.text, split="train"), WORDS)
    lm = RecurrentLM(build(size, options.seed).to(options.device), name="base")
    steps = PosttrainOptions(
        length=size["length"],
        steps=size["text_steps"],
        batch_size=size["tokens"] // size["length"],
        learning_rate=2e-3,
        weight_decay=0.1,
        bf16=options.device.startswith("cuda"),
        save_steps=10**9,
        seed=options.seed,
    )
    posttrain(lm, corpus, None, steps, folder)
    return folder


def train_task(
    base: Path, label: str, intervention: Intervention | None, options: argparse.Namespace, *, longer: int = 1
) -> RecurrentLM:
    """The task, from the base; `longer` trains at so many times T with as many tokens a step."""
    size = options.size
    lm = load(base, device=options.device)
    steps = PosttrainOptions(
        length=longer * size["length"],
        steps=size["task_steps"],
        batch_size=max(1, size["tokens"] // size["length"] // longer),
        learning_rate=5e-4,
        bf16=options.device.startswith("cuda"),
        save_steps=10**9,
        seed=options.seed,
    )
    rows = TaskRows(
        make_tasks(options, train=True),
        steps.length,
        steps.steps * steps.batch_size,
        lanes=steps.batch_size,
        windows=4 if isinstance(intervention, TBPTT) else 1,
        seed=options.seed,
    )
    posttrain(lm, rows, intervention, steps, options.output / label.replace(" ", "-"))
    return lm


def main() -> None:
    """Train the base, train the task in every way, evaluate all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--task", choices=["passkey", "babilong"], required=True)
    parser.add_argument("--text", required=True, help="books: a folder")
    parser.add_argument("--facts", type=Path, help="bAbI's files")
    parser.add_argument("--small", action="store_true", help="only to see it run")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--furthest", type=int, default=128, help="times T")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.task == "babilong" and options.facts is None:
        parser.error("--task babilong needs --facts")
    options.size = (SMALL if options.small else FULL) | {"length": LENGTHS[options.task]}
    first = options.size["length"]
    lengths = [first << octave for octave in range(options.furthest.bit_length())]

    base = train_text(options)
    evaluate(load(base, device=options.device), "base", "plain", lengths, options)
    seed = options.seed
    ways: dict[str, Intervention | None] = {
        "plain": None,
        "fitted noise": FittedNoise(zero_probability=0.1, seed=seed),
        "state passing": StatePassing(zero_probability=0.1, seed=seed),
    }
    if options.task == "babilong":
        ways["tbptt"] = TBPTT(zero_probability=0.1, seed=seed)
    for label, intervention in ways.items():
        lm = train_task(base, label, intervention, options)
        for reading in READINGS if label == "plain" else ["plain"]:
            name = label if reading == "plain" else f"{label}, {reading}"
            evaluate(lm, name, reading, lengths, options)
    evaluate(
        train_task(base, "plain at 4 T", None, options, longer=4), "plain at 4 T", "plain", lengths, options
    )


if __name__ == "__main__":
    main()
