"""State Passing and its rivals side by side: readings, calibrations, and training at equal tokens.

    python recipes/rivals.py --base specimen --batch 16 --steps 100 --calibrated 4 --output rivals  # CPU
    python recipes/rivals.py --base passkey-mamba2 --workers 12 --seeds 0 1 2 --output rivals  # GPU
    python recipes/rivals.py --base passkey-bamba  --workers 12 --seeds 0 1 2 --output rivals
    python recipes/rivals.py --base recall-mamba2  --workers 12 --seeds 0 1 2 --output rivals

`specimen` is the model inside the package, measured by loss only.
`passkey-*` is a byte model that learns text and passkeys at T = 256 from the zero state, `recall-*` learns
multi-query associative recall of 1 to PAIRS keys at T = 128; half of their
recurrent heads forget slowly, and the decay rates of the base are not trained. Every way gets the base's
weights:

- `reset`, `rescan`, `decay`, `clip`, `window`, `chunk`: the base, read otherwise;
- `A-layer`, `A-head`, `dt-layer`: scales of the decays that `longroll calibrate` finds on texts of 16 T;
- `none`, `fitted`, `sp`, `tbptt`: trained on at T by that initial state (learning rate 5e-4, of the specimen
  1e-3; decays x 30); `longer`: plain steps at 4 T, all with as many tokens; of a hybrid also `none+linear`
  and `sp+linear`, whose rotary positions are scaled, too.

OUTPUT/BASE.json: loss by octaves of positions and accuracy at T to 64 T of every seed, with intervals, tokens
and seconds, and mean, least and largest over seeds.
"""

import timed  # isort: skip  (its clock starts first)

import argparse
import multiprocessing
import statistics
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import pairwise
from pathlib import Path
from typing import Any

import hybrids
import numpy as np
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from longroll import TBPTT, FittedNoise, RecurrentLM, StatePassing, load
from longroll.data import ByteTokenizer, Corpus, HFTokenizer, Windows, long_sequences, read_documents
from longroll.errors import LongrollError
from longroll.measure import position_loss
from longroll.measure.bootstrap import bootstrap_mean
from longroll.measure.calibration import calibrate
from longroll.measure.holds import HOLDS, loss_under
from longroll.results import provenance, write_json
from longroll.tasks import Passkey, Recall, Row, TaskRows, TextHaystack, evaluate_grid, recall_tokenizer
from longroll.tasks._task import TRAINING, random_of
from longroll.tasks.baselines import make_reading

BASES = ("specimen", "passkey-mamba2", "passkey-bamba", "recall-mamba2", "recall-bamba")
TIMES = 64
"""Positions measured, in training lengths."""
TRAINED = {"none": None, "fitted": FittedNoise, "sp": StatePassing, "tbptt": TBPTT, "longer": None}
SCALED = {"none+linear": "none", "sp+linear": "sp"}
"""Ways of a hybrid: its rotary positions are scaled, too."""
READ = ("clip", "chunk", "decay", "reset", "window", "rescan")
CALIBRATED = {"A-layer": ("A", "layer"), "A-head": ("A", "head"), "dt-layer": ("dt", "layer")}
DEPTHS = (0.1, 0.5, 0.9)
LONGER = 4
EVERY = {"passkey": 8, "recall": 32}
"""One row of so many is text, or of recall one of whose tokens all are learned."""
SLOW = (0.001, 0.05)


class Base:
    """Tokenizer, text and task of a base."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.kind, _, self.shape = options.base.partition("-")
        self.length = options.length or (256 if self.kind == "passkey" else 128)
        if self.kind == "recall":
            self.tokenizer: Any = HFTokenizer(recall_tokenizer(), "recall")
            self.task: Any = Recall(self.tokenizer, options.pairs)
            return
        self.tokenizer = ByteTokenizer()
        sides = []
        for side, folder in (("train", options.text), ("validation", options.validation or options.text)):
            split = "all" if options.validation else side
            sides.append(
                Corpus.from_texts(read_documents(folder, split=split), self.tokenizer, max_tokens=20_000_000)
            )
        self.train, self.valid = sides
        self.task = None
        if self.kind == "passkey":
            self.task = Passkey(self.tokenizer, haystack=TextHaystack(self.valid, "text"), instruction=False)

    def build(self) -> RecurrentLM:
        """A fresh model, half of whose recurrent heads forget slowly."""
        options = self.options
        torch.manual_seed(options.seed)
        if self.shape == "bamba":
            lm = hybrids.build(
                "bamba", size=options.size, length=self.length, slow=0.5, seed=options.seed, rates=SLOW,
                vocabulary=self.tokenizer.vocab_size,
            )  # fmt: skip
        else:
            heads = 2 * options.size // 32
            config = Mamba2Config(
                vocab_size=self.tokenizer.vocab_size, hidden_size=options.size,
                num_hidden_layers=options.layers, state_size=options.state, head_dim=32, num_heads=heads,
                n_groups=1, chunk_size=64, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
                pad_token_id=None,
            )  # fmt: skip
            config.train_length = self.length
            model = Mamba2ForCausalLM(config)
            random = np.random.default_rng(options.seed)
            for name, weight in model.named_parameters():
                if name.endswith("A_log"):
                    drawn = torch.tensor(random.uniform(*SLOW, size=heads // 2))
                    weight.data[: heads // 2] = drawn.log().to(weight)
            lm = RecurrentLM(model, name=options.base)
        return freeze(lm).to(options.device)

    def rows(self, *, steps: int, longer: int = 1, windows: int = 1, seed: int = 0, makers: int = 1) -> Any:
        """Rows of the task, and one of EVERY of text; of recall, the one whose tokens are all learned."""
        if self.kind == "specimen":
            return self.train
        length, lanes = longer * self.length, self.options.batch // longer
        every = EVERY[self.kind]
        if self.kind == "passkey":
            tasks = [Passkey(self.tokenizer, haystack=TextHaystack(self.train, "text"), instruction=False)]
            text: Any = Windows(self.train, length, seed=seed, num_items=steps * lanes // every + 1)
        else:  # few pairs are learned first
            tasks = [Recall(self.tokenizer, pairs) for pairs in (1, self.options.pairs, 2)]
            text = TaskRows(
                tasks, length, steps * lanes // every + 1, lanes=max(lanes // every, windows),
                windows=windows, seed=seed + 500, answers_only=False,
            )  # fmt: skip
        rows = TaskRows(
            tasks, length, steps * lanes, lanes=lanes, windows=windows, seed=seed,
            answers_only=self.kind == "recall",
        )  # fmt: skip
        mixed = timed.MixedRows(rows, text, every=every)
        kept = min(self.options.kept or steps * lanes, steps * lanes)
        return timed.StoredRows(mixed, kept, lanes=lanes, workers=makers)

    def texts(self, longest: int, rows: int, *, train: bool) -> torch.Tensor:
        """Long texts, (rows, longest + 1): of the corpus, or prompts of recall with their answers."""
        if self.kind != "recall":
            return long_sequences(self.train if train else self.valid, longest, rows, seed=0)
        stream = TRAINING if train else TRAINING + 1
        drawn = [self.task.sample(longest + 1, rng=random_of(stream, 99, i)).tokens for i in range(rows)]
        return torch.from_numpy(np.stack(drawn).astype(np.int64))


def freeze(lm: RecurrentLM) -> RecurrentLM:
    """Decay rates are not trained."""
    for name, weight in lm.model.named_parameters():
        weight.requires_grad_(not name.endswith("A_log"))
    return lm


def train_base(base: Base, options: argparse.Namespace) -> dict[str, Any]:
    """From scratch at T, from the zero state; the specimen is there."""
    if base.kind == "specimen":
        return {"steps": 0}
    by_clock = options.seconds is not None
    rows = base.rows(
        steps=timed.MANY if by_clock else options.base_steps, seed=1000 * options.seed, makers=options.makers
    )
    how = {"length": base.length, "batch_size": options.batch, "weight_decay": 0.1}
    how |= {"learning_rate": options.learning_rate, "cuda_graphs": options.cuda_graphs}
    return timed.train(
        base.build(), rows, None, options.output / options.base / "base", seconds=options.seconds,
        steps=options.base_steps, seed=options.seed, **how,
    )  # fmt: skip


def open_base(options: argparse.Namespace) -> RecurrentLM:
    """The base as it was saved."""
    folder = "specimen" if options.base == "specimen" else options.output / options.base / "base"
    return load(folder, device=options.device)


def try_way(way: str, base: Base, options: argparse.Namespace) -> dict[str, Any] | None:
    """Make one way of the base and measure it; None where the base does not have it."""
    began = time.perf_counter()
    lm = open_base(options)
    told: dict[str, Any] = {"tokens": 0}
    if way in CALIBRATED:
        what, unit = CALIBRATED[way]
        texts = base.texts(16 * base.length, options.calibrated, train=True)
        found = calibrate(lm, texts, train_length=base.length, what=what, unit=unit)
        told = {"tokens": found.tokens, "calibration": found.to_json()}
    elif way in TRAINED or way in SCALED:
        longer, windows = (LONGER if way == "longer" else 1), (LONGER if way == "tbptt" else 1)
        chosen = TRAINED[SCALED.get(way, way)]
        how = {"learning_rate": 1e-3 if base.kind == "specimen" else 5e-4, "decay_speed": 30.0}
        how |= {"rope_scaling": f"linear:{options.times}"} if way in SCALED else {}
        how |= {"cuda_graphs": options.cuda_graphs}
        training = timed.train(
            lm, base.rows(steps=options.steps, longer=longer, windows=windows,
                      seed=1000 * options.seed + 1),
            chosen and chosen(zero_probability=0.1, seed=options.seed), options.output / options.base / way,
            seconds=None, steps=options.steps, length=longer * base.length,
            batch_size=options.batch // longer, **how, seed=options.seed,
        )  # fmt: skip
        told = {"tokens": options.steps * options.batch * base.length, "training": training}
    try:
        result = {"way": way, **told, **measure(way, lm, base, options)}
    except LongrollError as refused:
        print(options.base, way, refused, flush=True)
        return None
    result["seconds"] = time.perf_counter() - began
    accuracy = [[c["length"], c["scores"][base.task.metric]["mean"]] for c in result.get("cells", [])]
    print(options.base, way, result.get("octaves"), accuracy, flush=True)
    return result


def measure(way: str, lm: RecurrentLM, base: Base, options: argparse.Namespace) -> dict[str, Any]:
    """Loss by octaves on text, and the accuracy on the task, to 64 T."""
    result: dict[str, Any] = {}
    reading = way if way in READ else "plain"
    longest = options.times * base.length
    if reading != "chunk":
        tokens = base.texts(longest, options.texts, train=False)
        losses = (
            loss_under(way, lm, tokens, base.length) if way in HOLDS else position_loss(lm, tokens)
        ).losses
        edges = [0, *(base.length << k for k in range(options.times.bit_length()))]
        result["octaves"] = [
            [a, b, *(round(t.item(), 4) for t in bootstrap_mean(losses[:, a:b].mean(dim=1, keepdim=True)))]
            for a, b in pairwise(edges)
        ]
    if base.task is None:
        if reading == "chunk":
            raise LongrollError("`reading` chunk answers questions: it has no loss.")
        return result
    rows = (
        [Row(depth, base.task, depth) for depth in DEPTHS]
        if base.kind == "passkey"
        else [Row(None, base.task)]
    )
    lengths = [times * base.length for times in (1, 4, 16, 64) if times <= options.times]
    how = make_reading(reading, lm, window=base.length, rows=rows, length=lengths[-1])
    result["cells"] = evaluate_grid(
        lm, rows, lengths, samples=options.samples, batch_size=options.samples, reading=how
    )
    for cell in result["cells"]:
        cell.pop("examples")
    return result


def summary(ways: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean, least and largest over seeds of each loss and each accuracy, in the order of ways."""
    rows = []
    for name in dict.fromkeys(way["way"] for way in ways):
        some = [way for way in ways if way["way"] == name]
        row: dict[str, Any] = {"way": name, "seeds": sorted(way["seed"] for way in some)}
        if "octaves" in some[0]:
            columns = zip(*(way["octaves"] for way in some), strict=True)
            row["octaves"] = [[*found[0][:2], *_spread([one[2] for one in found])] for found in columns]
        if "cells" in some[0]:
            scores: dict[int, list[float]] = {}
            for way in some:
                for length, mean in accuracy(way["cells"]).items():
                    scores.setdefault(length, []).append(mean)
            row["accuracy"] = [[length, *_spread(found)] for length, found in scores.items()]
        rows.append(row)
    return rows


def accuracy(cells: list[dict[str, Any]]) -> dict[int, float]:
    """Return the mean of the first score over the rows of the grid, by length."""
    scores: dict[int, list[float]] = {}
    for cell in cells:
        (score, *_) = cell["scores"].values()
        scores.setdefault(cell["length"], []).append(score["mean"])
    return {length: statistics.mean(some) for length, some in scores.items()}


def _spread(values: list[float]) -> list[float]:
    return [round(value, 4) for value in (statistics.mean(values), min(values), max(values))]


def _begin(options: argparse.Namespace) -> None:
    global _base
    torch.set_num_threads(1)
    _base = Base(options)


def _train(options: argparse.Namespace) -> dict[str, Any] | None:
    _base.options = options
    return timed.attempt(train_base, _base, options)


def _way(way: str, options: argparse.Namespace) -> dict[str, Any] | None:
    _base.options = options
    return timed.attempt(try_way, way, _base, options)


def main() -> None:
    """Train the base of each seed, then every way of it, several at a time; the file is whole after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", choices=BASES, default=BASES[0])
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--validation", help="other texts; default: some of --text")
    parser.add_argument("--ways", nargs="+", help="default: all that the base has")
    parser.add_argument("--size", type=int, default=256, help="d_model")
    parser.add_argument("--layers", type=int, default=4, help="of Mamba-2")
    parser.add_argument("--state", type=int, default=128, help="numbers of a channel's state")
    parser.add_argument("--length", type=int, help="T")
    parser.add_argument("--pairs", type=int, default=8, help="of recall")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--base-steps", type=int, default=6000)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of training the base")
    parser.add_argument("--cuda-graphs", action="store_true", default=None, help="of a hybrid's steps, too")
    parser.add_argument("--seconds", type=float, help="of training the base, from the start of the script")
    parser.add_argument("--steps", type=int, default=300, help="of training on")
    parser.add_argument("--calibrated", type=int, default=8, help="texts that scales are found on")
    parser.add_argument("--kept", type=int, help="read so many rows again and again; default: no row twice")
    parser.add_argument("--makers", type=int, default=1, help="processes that make the rows of the base")
    parser.add_argument("--times", type=int, default=TIMES, help="longest text, in training lengths")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.seconds is not None and not options.kept:
        parser.error("--seconds trains for an unknown number of steps: give --kept, or --base-steps instead")
    scaled = SCALED if options.base.endswith("bamba") else {}
    options.ways = options.ways or ["base", *TRAINED, *scaled, *CALIBRATED, *READ]
    bases: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    made = provenance(seed=options.seeds[0], seconds=0.0, device=options.device)
    with ProcessPoolExecutor(options.workers, context, _begin, (options,)) as pool:
        of_seed = {seed: argparse.Namespace(**vars(options), seed=seed) for seed in options.seeds}
        waiting: dict[Future[Any], tuple[int, str | None]] = {}
        left: list[tuple[int, int]] = []  # ways and seeds: all seeds of a way come before the next way
        for seed, own in of_seed.items():
            own.output = options.output / str(seed)
            (own.output / options.base).mkdir(parents=True, exist_ok=True)
            waiting[pool.submit(_train, own)] = (seed, None)
        while waiting or left:
            while left and len(waiting) < options.workers:
                place, seed = left.pop(0)
                name = options.ways[place]
                waiting[pool.submit(_way, name, of_seed[seed])] = (seed, name)
            for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                seed, way = waiting.pop(done)
                found = done.result()
                if found is None:
                    continue
                if way is None:
                    bases[str(seed)] = found
                    left = sorted(left + [(place, seed) for place in range(len(options.ways))])
                    continue
                rows.append({"seed": seed, **found})
                rows.sort(key=lambda row: (options.ways.index(row["way"]), row["seed"]))
                made["seconds"] = round(time.time() - timed.BEGAN, 1)
                table = {"settings": settings, "summary": summary(rows), "bases": bases, "ways": rows}
                write_json(options.output / f"{options.base}.json", table | {"provenance": made})


if __name__ == "__main__":
    main()
