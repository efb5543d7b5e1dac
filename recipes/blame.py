"""Plant damage in the states, the attention, both or neither of small hybrids, and see what is blamed.

    python recipes/blame.py --planted weights --kinds state attention both --seeds 20 --output blame
    python recipes/blame.py --seeds 20 --workers 14 --output blame

`--planted weights` (minutes on a CPU) takes a random Bamba-shaped model. Its sound twin writes the texts.
Attention goes wrong past T where the twin reads with an attention window of T tokens and the same weights
then read all keys; a state does where heads of a layer are set to forget nothing.

`--planted training` (for a GPU) plants a side by training it short: what is carried from piece to piece of a
row (`hybrids.train`) is trained to 16 T, the longest position measured, and what is not carried to T. `sound`
carries both, and no side is to be named. How strongly a state breaks depends on how slowly heads forget: a
pilot of one model of each other kind tries every SLOW with every RATES on a seed of its own, and the setting
with most models told apart, then with the largest least part of `both`, is taken for all seeds.

OUTPUT/blame.json holds what was found of every model, and is whole after each.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from itertools import product
from pathlib import Path
from typing import Any

import hybrids
import numpy as np
import timed
import torch

from longroll import RecurrentLM
from longroll.conformance import tiny
from longroll.data import ByteTokenizer, Corpus, long_sequences, read_documents
from longroll.measure import coverage, position_loss
from longroll.measure._attention_readings import Window
from longroll.measure._blame import split_blame
from longroll.results import provenance, read_json, write_json

CARRIED = {
    "attention": ("recurrent", "conv"), "state": ("attention",), "both": (),
    "sound": ("recurrent", "conv", "attention"),
}  # fmt: skip
"""What the damage is planted in, and the parts of the state that training carries."""
EXPECTED = {
    "attention": ("attention",), "state": ("state",), "both": ("both",), "sound": (None, "neither"),
}  # fmt: skip
RATES = [(0.001, 0.1), (0.0003, 0.03), (0.0001, 0.01)]
PILOT_SEED = 1000
Setting = tuple[float, float, float]
"""Share of heads slow to forget, and the rates of their decay."""


def read_bytes(source: str, validation: str | None) -> tuple[torch.Tensor, Corpus]:
    """Bytes to train on, and texts of the other side."""
    if validation is None:
        train, valid = (
            Corpus.from_source(source, ByteTokenizer(), split=split, max_tokens=20_000_000, seed=0)
            for split in ("train", "validation")
        )
    else:
        train, valid = (
            Corpus.from_texts(read_documents(folder, split="all"), ByteTokenizer(), max_tokens=20_000_000)
            for folder in (source, validation)
        )
    return torch.from_numpy(train.ids.astype(np.uint8)), valid


def plant(kind: str, seed: int) -> tuple[RecurrentLM, torch.Tensor, int]:
    """A model with faults planted in its weights, texts of its sound twin, and T."""
    length, longest, rows = 16, 192, 8
    attention, state = kind in ("attention", "both"), kind in ("state", "both")
    lm = RecurrentLM(tiny.build("bamba", seed), name=f"bamba, {kind}")
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.mul_(8)  # so that a text has a likely next token
        for name, weight in lm.model.named_parameters():
            if "self_attn.o_proj" in name:
                weight.mul_(6 if attention else 1)
            if "self_attn.q_proj" in name:
                weight.mul_(3 if attention else 1)
    texts = write_texts(lm, Window(length - 1) if attention else Window(longest), rows, longest, seed)
    if state:
        mixer = lm.model.model.layers[2].mamba
        with torch.no_grad():
            mixer.A_log[:], mixer.dt_bias[:] = -14.0, 0.0
    return lm, texts, length


@torch.no_grad()
def write_texts(lm: RecurrentLM, hold: Window, rows: int, length: int, seed: int) -> torch.Tensor:
    """Texts (rows, length + 1) that a model writes, reading under a hold."""
    generator = torch.Generator().manual_seed(seed)
    token = torch.randint(tiny.VOCAB, (rows, 1), generator=generator)
    text, state = [token], None
    for position in range(length):
        logits, state = lm(token, state if state is None else hold(position, state))
        token = torch.multinomial(logits[:, -1].softmax(-1), 1, generator=generator)
        text.append(token)
    return torch.cat(text, dim=1)


def try_planted(kind: str, seed: int, setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Plant faults in weights, and split the blame."""
    began = time.perf_counter()
    lm, tokens, length = plant(kind, seed)
    found = split_blame(lm, tokens, coverage(lm, tokens, length), length, seed=seed)
    print(kind, seed, found.verdict, found.sentence, f"{time.perf_counter() - began:.0f} s", flush=True)
    return {
        "planted": kind, "seed": seed, "right": found.verdict in EXPECTED[kind], "blame": found.to_json(),
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def try_one(kind: str, seed: int, setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Train a model, read it, and split the blame."""
    began = time.perf_counter()
    ids, valid = _data
    length, pieces = options.length, options.pieces
    lm = hybrids.build(
        options.shape, size=options.size, length=length, slow=setting[0], seed=seed,
        rates=setting[1:],
    ).to(options.device)  # fmt: skip
    trained = hybrids.train(
        lm, ids, CARRIED[kind], length=length, pieces=pieces if CARRIED[kind] else 1, steps=options.steps,
        batch=options.batch, learning_rate=options.learning_rate, seed=seed,
    )  # fmt: skip
    tokens = long_sequences(valid, pieces * length, options.texts, seed=seed)
    carried = position_loss(lm, tokens)
    found = split_blame(lm, tokens, coverage(lm, tokens, length), length, carried=carried, seed=seed)
    octaves = {f"{a}-{b}": carried.between(a, b) for a, b in _octaves(length, pieces * length)}
    result = {
        "planted": kind, "seed": seed, "setting": setting, "right": found.verdict in EXPECTED[kind],
        "training": trained,
        "loss": octaves, "blame": found.to_json(), "seconds": time.perf_counter() - began,
    }  # fmt: skip
    print(kind, seed, setting, found.verdict, found.sentence, f"{result['seconds']:.0f} s", flush=True)
    return result


def _octaves(length: int, longest: int) -> list[tuple[int, int]]:
    ends = [length << k for k in range(20) if length << k <= longest]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def rates(text: str) -> tuple[float, float]:
    """LOW,HIGH."""
    low, high = map(float, text.split(","))
    return low, high


def _worth(pilot: list[dict[str, Any]], setting: Setting) -> tuple[int, float]:
    """How many models of a setting are told apart, and the least part of a side of `both`."""
    models = [model for model in pilot if tuple(model["setting"]) == setting]
    parts = [part["recovered"] for m in models if m["planted"] == "both" for part in m["blame"]["parts"]] or [
        -1.0
    ]
    return sum(model["right"] for model in models), min(parts)


_data: tuple[torch.Tensor, Corpus]
_options: argparse.Namespace


def _begin(options: argparse.Namespace) -> None:
    global _data, _options
    torch.set_num_threads(1)
    _options = options
    if options.planted == "training":
        _data = read_bytes(options.text, options.validation)


def _job(job: tuple[str, int, Setting]) -> dict[str, Any] | None:
    make = try_planted if _options.planted == "weights" else try_one
    return timed.attempt(make, *job, _options)


def main() -> None:
    """Train and diagnose all of them, several at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--planted", choices=["weights", "training"], default="training")
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--validation", help="other texts; default: some of --text")
    parser.add_argument("--kinds", nargs="+", choices=CARRIED, default=list(CARRIED))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="seed")
    parser.add_argument("--shape", choices=hybrids.SHAPES, default="bamba")
    parser.add_argument("--size", type=int, default=64, help="d_model")
    parser.add_argument("--length", type=int, default=64, help="T")
    parser.add_argument("--pieces", type=int, default=16, help="of a row, and times T that are measured")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--slow", type=float, nargs="+", default=[1.0, 0.5], help="share of slow heads")
    parser.add_argument(
        "--rates", type=rates, nargs="+", default=RATES, help="LOW,HIGH of their decay; several: a pilot"
    )
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", type=Path, help="an earlier blame.json, whose models are kept")
    parser.add_argument("--pilot", type=Path, help="an earlier blame.json, of which the pilot alone is kept")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    settings = [(slow, *rate) for slow, rate in product(options.slow, options.rates)]
    lm = hybrids.build(options.shape, size=options.size, length=options.length, slow=1.0, seed=0)
    lm = lm.to(options.device)
    written = {
        name: value for name, value in vars(options).items() if name not in ("output", "resume", "pilot")
    }
    whole: dict[str, Any] = {"right": {}, "settings": written, "pilot": [], "models": []}
    if options.resume:
        before = read_json(options.resume)
        whole |= {name: before[name] for name in ("right", "pilot", "models")}
        whole["earlier"] = [*before.get("earlier", []), before["provenance"]]
        settings = [tuple(whole["models"][0]["setting"])]
    elif options.pilot:
        before = read_json(options.pilot)
        whole |= {"pilot": before["pilot"], "earlier": [*before.get("earlier", []), before["provenance"]]}
        settings = [max(settings, key=lambda setting: _worth(whole["pilot"], setting))]

    def save() -> None:
        whole["provenance"] = provenance(lm, seed=options.first, seconds=time.perf_counter() - began)
        write_json(options.output / "blame.json", whole)

    with multiprocessing.get_context("spawn").Pool(options.workers, _begin, (options,)) as pool:
        if options.planted == "training" and len(settings) > 1:
            kinds = [kind for kind in options.kinds if kind != "sound"]
            pilots = [(kind, PILOT_SEED, setting) for setting, kind in product(settings, kinds)]
            for result in filter(None, pool.imap_unordered(_job, pilots)):
                whole["pilot"].append(result)
                save()
            settings = [max(settings, key=lambda setting: _worth(whole["pilot"], setting))]
            print("chosen", settings[0], flush=True)
        seeds = range(options.first, options.first + options.seeds)
        done = {(model["planted"], model["seed"]) for model in whole["models"]}
        cells = [(kind, seed) for seed, kind in product(seeds, options.kinds)]
        jobs = [(*cell, settings[0]) for cell in cells if cell not in done]
        for result in filter(None, pool.imap_unordered(_job, jobs)):
            whole["models"] = sorted([*whole["models"], result], key=lambda r: (r["planted"], r["seed"]))
            for kind in options.kinds:
                some = [r["right"] for r in whole["models"] if r["planted"] == kind]
                whole["right"][kind] = f"{sum(some)} of {len(some)}"
            save()
    print(whole["right"], flush=True)


if __name__ == "__main__":
    main()
