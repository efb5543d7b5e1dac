"""Faults on a GPU: steps that are not finite, with fused AdamW and CUDA graphs, and measurements that go on.

    python benchmarks/faults_gpu.py --json faults_gpu.json     # a minute of one GPU

- `drop`: `--on-not-finite drop` skips the step whose carried state was spoilt, and goes on.
- `drop without a fault is stop`: both choices train the same weights where every step is finite.
- `stop`: `--on-not-finite stop` ends the run, naming step, layer and head.
- `kept`: a reading and a diagnosis that were ended and go on give the numbers of undisturbed ones.

Rows are written as they come. A row that fails holds its error.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from longroll import RecurrentLM, diagnose, position_loss
from longroll.conformance.tiny import VOCAB, build
from longroll.errors import LongrollError
from longroll.interventions import INTERVENTIONS
from longroll.measure import Kept
from longroll.results import BenchmarkResult, provenance
from longroll.training import PosttrainOptions, posttrain

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "training"))
from ranked import Poisoned, corpus_of

STEPS, SPOILT = 6, 3


class Died(Exception):
    """Ends a measurement."""


class Weights(TrainerCallback):
    """Keeps the weights of before each step."""

    def __init__(self) -> None:
        self.seen: dict[int, list[torch.Tensor]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Keep them."""
        self.seen[state.global_step] = [p.detach().clone() for p in model.parameters()]


def train(device: str, kind: str, graphs: bool, choice: Any, *, spoilt: bool) -> tuple[Weights, Any, Any]:
    """Train a tiny Mamba-2; row 1 of what is carried is spoilt before step 3."""
    lm = RecurrentLM(build("mamba2", 0).to(device))
    carried, weights = INTERVENTIONS[kind](seed=3), Weights()
    callbacks = [weights, *([Poisoned(carried, SPOILT, 1)] if spoilt else [])]
    options = PosttrainOptions(
        8, steps=STEPS, batch_size=2, learning_rate=1e-2, save_steps=2, cuda_graphs=graphs,
        on_not_finite=choice,
    )  # fmt: skip
    output = tempfile.mkdtemp() + "/out"
    return weights, posttrain(lm, corpus_of(), carried, options, output, callbacks=callbacks), lm


def drop(device: str, kind: str, graphs: bool) -> dict[str, Any]:
    weights, log, lm = train(device, kind, graphs, "drop", spoilt=True)
    entries = [entry for entry in log if "not_finite" in entry]
    before, after, later = (weights.seen[step] for step in (SPOILT, SPOILT + 1, SPOILT + 2))
    return {
        "steps": [entry["not_finite_step"] for entry in entries],
        "states_dropped": [entry["states_dropped"] for entry in entries],
        "skipped": all(map(torch.equal, before, after)),
        "goes_on": not all(map(torch.equal, after, later)),
        "finite": all(p.isfinite().all().item() for p in lm.parameters()),
    }


def without_fault(device: str, graphs: bool) -> dict[str, Any]:
    stop, dropped = (
        list(train(device, "sp", graphs, choice, spoilt=False)[2].parameters()) for choice in ("stop", "drop")
    )
    return {"largest": max((x - y).abs().max().item() for x, y in zip(stop, dropped, strict=True))}


def stop(device: str, graphs: bool) -> dict[str, Any]:
    try:
        train(device, "sp", graphs, "stop", spoilt=True)
    except LongrollError as error:
        return {"said": str(error)}
    raise AssertionError("the run was not stopped")


def kept_loss(device: str, name: str) -> dict[str, Any]:
    lm = RecurrentLM(build(name, 0).to(device)).eval()
    tokens = torch.randint(VOCAB, (5, 97), generator=torch.Generator().manual_seed(0))
    whole = position_loss(lm, tokens, chunk_size=8).losses
    folder = Path(tempfile.mkdtemp()) / "kept"

    def die(position: int) -> None:
        if position >= 48:
            raise Died

    for progress in (die, None):
        kept = Kept(folder, every=0.0)
        kept.begin(lm, tokens)
        try:
            found = position_loss(lm, tokens, chunk_size=8, kept=kept, progress=progress).losses
        except Died:
            continue
    return {"same": found.equal(whole)}


def kept_diagnosis(device: str, name: str) -> dict[str, Any]:
    lm = RecurrentLM(build(name, 0).to(device)).eval()
    tokens = torch.randint(VOCAB, (5, 97), generator=torch.Generator().manual_seed(0))
    plain = diagnose(lm, tokens, train_length=16, chunk_size=8).to_json()
    folder = Path(tempfile.mkdtemp()) / "kept"

    def first(stage: str, done: int, total: int) -> None:
        if stage == "reading on" and done >= 60:
            raise Died

    def second(stage: str, done: int, total: int) -> None:
        if stage == "forgetting the past":
            raise Died

    for progress in (first, second, None):
        try:
            kept = Kept(folder, every=0.0)
            again = diagnose(
                lm, tokens, train_length=16, chunk_size=8, kept=kept, progress=progress
            ).to_json()
        except Died:
            continue
    for found in (plain, again):  # which hold seconds
        del found["provenance"], found["advice"]
    return {"same": plain == again, "differ": [key for key in plain if plain[key] != again.get(key)]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    began, rows = time.perf_counter(), []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ways = (True, False) if device == "cuda" else (False,)

    def note(what: str, work: Callable[..., dict[str, Any]], **given: Any) -> None:
        try:
            found = work(device, **given)
        except Exception as error:  # one row must not end the others
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        rows.append({"what": what, **given, **found})
        print(json.dumps(rows[-1]), flush=True)
        if options.json:
            made = provenance(seed=0, seconds=time.perf_counter() - began, device=device)
            result = {"what": "faults_gpu", "rows": rows, "provenance": made}
            BenchmarkResult.from_json(result).write(options.json)

    def cases(graphs: bool) -> None:
        for kind in ("sp", "tbptt", "fitted"):
            note("drop", drop, kind=kind, graphs=graphs)
        note("drop without a fault is stop", without_fault, graphs=graphs)
        note("stop", stop, graphs=graphs)

    for graphs in ways[:1]:
        cases(graphs)
    for name in ("mamba2", "granitemoehybrid"):
        note("kept loss", kept_loss, name=name)
        note("kept diagnosis", kept_diagnosis, name=name)
    for graphs in ways[1:]:
        cases(graphs)


if __name__ == "__main__":
    main()
