"""Repair both sides of small hybrids: interventions and RoPE scaling, alone and together, to 64 T.

    python recipes/hybrid_repair.py --workers 16 --output hybrid-repair

Each of three shapes is trained from scratch at T (`hybrids.train`), diagnosed, and trained on under every
combination of an intervention and a RoPE scaling (none for Granite's attention, which has no positions) for
equal tokens. The rows named `reading` are the base, not trained on: its positions scaled, or attention kept
to a window of T. OUTPUT/SHAPE.json is the base's diagnosis, OUTPUT/hybrid_repair.json the table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import hybrids
import timed
import torch
from blame import read_bytes

from longroll import StatePassing, diagnose, load
from longroll.data import Corpus, Windows, long_sequences
from longroll.families._rope import RopeScaling, scaled_rope
from longroll.measure import position_loss
from longroll.measure._attention_readings import Window
from longroll.measure._position_loss import PositionLoss, token_losses
from longroll.measure.bootstrap import bootstrap_mean
from longroll.measure.excess_loss import excess_loss
from longroll.results import provenance, write_json

TIMES = 64
"""Positions measured, in training lengths."""


def combinations(shape: str, factor: int) -> list[tuple[str, str | None]]:
    """Interventions (`base`, `reading`, `none`, `sp`) with what is done to attention."""
    scalings = [] if shape == "granite" else [f"{kind}:{factor}" for kind in ("linear", "ntk", "yarn")]
    rows: list[tuple[str, str | None]] = [("base", None), ("none", None), ("sp", None), ("reading", "window")]
    rows += [("reading", scaling) for scaling in scalings]
    return rows + [(name, scaling) for scaling in scalings for name in ("none", "sp")]


def train_base(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train a shape at T from the zero state, save it and diagnose it."""
    ids, valid = _data
    lm = hybrids.build(
        shape, size=options.size, length=options.length, slow=options.slow, seed=options.seed,
        rates=tuple(options.rates),
    ).to(options.device)  # fmt: skip
    trained = hybrids.train(
        lm, ids, (), length=options.length, pieces=1, steps=options.steps, batch=options.batch,
        learning_rate=3e-3, seed=options.seed, seconds=options.seconds,
    )  # fmt: skip
    lm.model.save_pretrained(options.output / shape / "base")
    tokens = _texts(valid, options)
    found = diagnose(load(options.output / shape / "base", device=options.device), tokens, label="base")
    write_json(options.output / f"{shape}.json", found.to_json())
    print(shape, trained, found.sentence, found.advice, flush=True)
    return trained


def measure(shape: str, name: str, attention: str | None, options: argparse.Namespace) -> dict[str, Any]:
    """Repair the base, or read it otherwise, and measure its loss to 64 T."""
    began = time.perf_counter()
    ids, valid = _data
    lm = load(options.output / shape / "base", device=options.device)
    length, scaling = options.length, attention if attention != "window" else None
    if name in ("none", "sp"):
        corpus = Corpus(ids.numpy(), torch.tensor([0, len(ids)]).numpy(), len(ids))
        intervention = StatePassing(zero_probability=0.1, seed=options.seed) if name == "sp" else None
        rows = Windows(corpus, length, seed=options.seed + 1, num_items=16 * options.repair_steps)
        folder = options.output / shape / f"{name}-{(attention or 'plain').replace(':', '-')}"
        timed.train(
            lm, rows, intervention, folder, seconds=None, steps=options.repair_steps, length=length,
            batch_size=16, learning_rate=1e-3, decay_speed=30.0, seed=options.seed, rope_scaling=scaling,
        )  # fmt: skip
        lm = load(folder, device=options.device)  # as it was saved
    tokens = _texts(valid, options)
    with (
        scaled_rope(lm.model, RopeScaling.parse(scaling), length)
        if name == "reading" and scaling
        else nullcontext()
    ):
        losses = _windowed(lm, tokens, length) if attention == "window" else position_loss(lm, tokens)
    ends, excess = excess_loss(lm, tokens, losses, length)
    far = [i for i, end in enumerate(ends) if end > tokens.shape[1] // 2]
    above = [t.item() for t in bootstrap_mean(excess[:, far].mean(dim=1, keepdim=True))]
    edges = [0, *(length << k for k in range(TIMES.bit_length()))]
    octaves = [
        [a, b, *(t.item() for t in bootstrap_mean(losses.losses[:, a:b].mean(dim=1, keepdim=True)))]
        for a, b in pairwise(edges)
    ]
    result = {
        "shape": shape, "intervention": name, "attention": attention, "octaves": octaves,
        "above_fresh_start_far": above, "seconds": time.perf_counter() - began,
    }  # fmt: skip
    print(shape, name, attention, [round(row[2], 3) for row in octaves], flush=True)
    return result


@torch.no_grad()
def _windowed(lm: Any, tokens: torch.Tensor, length: int) -> PositionLoss:
    """Loss read in pieces of T / 4, attention kept to the last T keys."""
    stride = length // 4
    hold, state, losses = Window(length - stride), None, []
    tokens = tokens.to(lm.device)
    for start in range(0, tokens.shape[1] - 1, stride):
        ids = tokens[:, start : start + stride + 1]
        hidden, state = lm(ids[:, :-1], state if state is None else hold(start, state), logits=False)
        losses.append(token_losses(lm, hidden, ids[:, 1:]).cpu())
    return PositionLoss(torch.cat(losses, dim=1))


def _texts(valid: Corpus, options: argparse.Namespace) -> torch.Tensor:
    return long_sequences(valid, TIMES * options.length, options.texts, seed=options.seed)


def _begin(options: argparse.Namespace) -> None:
    global _data, _options
    torch.set_num_threads(1)
    _options, _data = options, read_bytes(options.text, options.validation)


def _base(shape: str) -> dict[str, Any]:
    return train_base(shape, _options)


def _row(job: tuple[str, str, str | None]) -> dict[str, Any]:
    return measure(*job, _options)


def main() -> None:
    """Train the bases, then all repairs, several at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--validation", help="other texts; default: some of --text")
    parser.add_argument("--shapes", nargs="+", choices=hybrids.SHAPES, default=list(hybrids.SHAPES))
    parser.add_argument("--size", type=int, default=128, help="d_model")
    parser.add_argument("--length", type=int, default=128, help="T")
    parser.add_argument("--slow", type=float, default=0.5, help="share of heads slow to forget")
    parser.add_argument(
        "--rates", type=float, nargs=2, default=hybrids.SLOW, help="decay rates of slow heads lie between"
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=1e9, help="of training a base, at most")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repair-steps", type=int, default=300)
    parser.add_argument("--factor", type=int, default=TIMES, help="of the RoPE scaling")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(options.workers, _begin, (options,)) as pool:
        trained = dict(zip(options.shapes, pool.map(_base, options.shapes, chunksize=1), strict=True))
        jobs = [(shape, *row) for shape in options.shapes for row in combinations(shape, options.factor)]
        rows = []
        for row in pool.imap_unordered(_row, jobs):
            rows.append(row)
            lm = load(options.output / options.shapes[0] / "base", device=options.device)
            made = provenance(lm, seed=options.seed, seconds=time.perf_counter() - began)
            settings = {name: value for name, value in vars(options).items() if name != "output"}
            table = {"settings": settings, "bases": trained, "rows": rows, "provenance": made}
            write_json(options.output / "hybrid_repair.json", table)


if __name__ == "__main__":
    main()
