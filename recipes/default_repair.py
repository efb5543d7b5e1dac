"""Repair the specimen by the default recipe, by others, and from documents of other lengths.

    python recipes/default_repair.py --work work --output default-repair.json     # 2 CPU cores an hour

Each way of `WAYS` is one process of one thread: `posttrain` as a user calls it, then the losses of 16
held-out texts of 128 T. `documents` cut the training text into documents of so many windows of T, for TBPTT
and for State Passing: the recipe's rule needs to know from which length on TBPTT is the better one
(`longroll.interventions.recipes.WINDOWS`). A way that --work holds already is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import longroll
from longroll.data import ByteTokenizer, Corpus, long_sequences
from longroll.measure import position_loss
from longroll.measure.excess_loss import excess_loss
from longroll.measure.judge import judge
from longroll.results import BenchmarkResult, provenance, write_json
from longroll.training import PosttrainOptions, by_recipe, posttrain

LENGTH, TEXTS = 16_384, 16
WAYS: dict[str, dict[str, Any]] = {
    "before": {},
    "plain steps": {"intervention": "none"},
    "default": {},
    "default, State Passing": {"intervention": "sp"},
    "paper's recipe": {"recipe": "paper"},
    "paper's TBPTT": {"recipe": "paper", "intervention": "tbptt"},
    "default, 200 steps": {"steps": 200},
    "plain steps, 200 steps": {"intervention": "none", "steps": 200},
    **{
        f"{name}, documents of {windows} windows": {"intervention": name, "windows": windows}
        for windows in (32, 16, 8, 4, 2, 1)
        for name in ("tbptt", "sp")
    },
    **{
        f"{name}, documents of {windows} windows, seed {seed}": {
            "intervention": name,
            "windows": windows,
            "seed": seed,
        }
        for windows in (8, 4, 2)
        for seed in (1, 2)
        for name in ("tbptt", "sp")
    },
    **{
        f"State Passing, zero probability {zero}": {"intervention": "sp", "zero_probability": zero}
        for zero in (0.25, 0.5)
    },
}
"""Arguments of `by_recipe`; `steps`; `windows` of a document."""


def cut(corpus: Corpus, size: int) -> Corpus:
    """Documents of `size` tokens each, in a shuffled order; what is left of a document is left out."""
    pieces = [
        corpus.document(index)[at : at + size]
        for index in range(corpus.documents)
        for at in range(0, len(corpus.document(index)) - size + 1, size)
    ]
    order = np.random.default_rng(0).permutation(len(pieces))
    ids = np.concatenate([pieces[index] for index in order])
    return Corpus(ids, np.arange(len(pieces) + 1) * size, len(ids))


def repair(
    name: str, folder: Path, *, seed: int = 0, steps: int = 500, windows: int | None = None, **how: Any
) -> dict[str, Any]:
    """Train by one way, and read the held-out texts."""
    began, lm = time.perf_counter(), longroll.load("specimen", device="cpu")
    assert lm.train_length is not None
    told: dict[str, Any] = {}
    if name != "before":
        options = PosttrainOptions(length=lm.train_length, steps=steps, seed=seed)
        most = options.tokens * (2 if windows else 1) + 1
        corpus = Corpus.from_source("stdlib", ByteTokenizer(), max_tokens=most, seed=0)
        if windows:
            corpus = cut(corpus, windows * lm.train_length + 1)
        prepared = by_recipe(lm, corpus, options, **how)
        trained = time.perf_counter()
        posttrain(lm, corpus, prepared.intervention, prepared.options, folder / "model")
        told = {"sentence": prepared.sentence, "train_seconds": time.perf_counter() - trained}
    texts = Corpus.from_source("stdlib", ByteTokenizer(), split="validation")
    tokens = long_sequences(texts, LENGTH, TEXTS)
    carried = position_loss(lm, tokens)
    ends, excess = excess_loss(lm, tokens, carried, lm.train_length)
    judged = judge(carried, ends, excess, lm.train_length)
    stops = [stop for stop in (2**i for i in range(7, 15)) if stop <= LENGTH]
    octaves = {str(stop): carried.between(stop // 2, stop) for stop in stops}
    return {
        **told,
        "in_range": carried.between(0, lm.train_length),
        "octaves": octaves,
        "far": carried.between(LENGTH // 2, LENGTH),
        "above_fresh": judged.severity,
        "verdict": judged.verdict,
        "suffers": judged.suffers,
        "provenance": provenance(lm, seed=seed, seconds=time.perf_counter() - began),
    }


def main() -> None:
    """Run the ways, each in its own process, and write their results together."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), help="Names of WAYS.")
    parser.add_argument("--one", choices=WAYS, help="Run this way here.")
    asked = parser.parse_args()
    folder = lambda name: asked.work / name.replace(" ", "-").replace(",", "").replace("'", "")  # noqa: E731
    if asked.one:
        write_json(folder(asked.one) / "result.json", repair(asked.one, folder(asked.one), **WAYS[asked.one]))
        return

    def run(name: str) -> None:
        if not (folder(name) / "result.json").is_file():
            command = [sys.executable, __file__, "--work", str(asked.work), "--one", name]
            folder(name).mkdir(parents=True, exist_ok=True)
            with (folder(name) / "log.txt").open("w") as log:
                subprocess.run(command, stdout=log, stderr=log)

    began = time.perf_counter()
    with ThreadPoolExecutor(asked.processes) as pool:
        list(pool.map(run, asked.ways))
    files = {name: folder(name) / "result.json" for name in WAYS}
    found = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    for name, way in found.items():
        print(f"{name:40} in range {way['in_range']:.3f}, far {way['far']:.3f}, {way['verdict']}")
    if asked.output:
        made = provenance(seed=0, seconds=time.perf_counter() - began)
        data = {"what": "default repair of the specimen", "ways": found, "provenance": made}
        BenchmarkResult.from_json(data).write(asked.output)


if __name__ == "__main__":
    main()
