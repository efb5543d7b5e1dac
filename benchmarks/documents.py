"""What it costs to honour masks: training steps on full, padded and packed batches, in turns.

    python benchmarks/documents.py --json documents_cpu.json
    python benchmarks/documents.py --device cuda --json documents_gpu.json

Every row is forward, loss and backward from a state, with AdamW left out, on one batch of the same shape. The
rows take turns, and a row's ratio is the median over turns of its time to that of `no mask` in the same turn.
`no mask` reads every token, padding as text: the price of a batch whose mask is ignored. A quarter of the
padded batches' tokens is padding; rows of the packed batch hold documents of log-normal lengths. On a CPU the
time is that of the process on one thread, which other processes change little; on a GPU it is the wall clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

import longroll
from longroll.conformance.laws import random_state
from longroll.conformance.tiny import from_config
from longroll.results import BenchmarkResult, provenance
from longroll.training.loss import loss_and_state

_SMALL = {"vocab_size": 512, "num_hidden_layers": 2, "hidden_size": 256}
_MAMBA2_370M = {
    "hidden_size": 1024,
    "num_hidden_layers": 48,
    "num_heads": 32,
    "state_size": 128,
    "n_groups": 1,
}
CPU: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "mamba": ("mamba", _SMALL, 8, 256),
    "mamba2": ("mamba2", _SMALL | {"num_heads": 8, "head_dim": 64, "state_size": 64, "n_groups": 1}, 8, 256),
    "gla": ("gla", _SMALL | {"num_heads": 4}, 8, 256),
    "gated_deltanet": ("gated_deltanet", _SMALL | {"head_dim": 64, "num_heads": 3}, 8, 256),
    "rwkv7": ("rwkv7", _SMALL | {"head_dim": 64}, 8, 256),
}
GPU: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "mamba-130m": ("mamba", {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50280}, 8, 2048),
    "mamba2-370m": ("mamba2", _MAMBA2_370M | {"n_groups": 1, "head_dim": 64, "vocab_size": 50288}, 4, 2048),
    "gla-340m": ("gla", {"hidden_size": 1024, "num_hidden_layers": 24, "vocab_size": 32000}, 8, 2048),
    "gated_deltanet-340m": (
        "gated_deltanet",
        {"hidden_size": 1024, "num_hidden_layers": 21, "num_heads": 6, "head_dim": 128, "vocab_size": 32000},
        8,
        2048,
    ),
}
"""Name -> `model_type`, config, rows and tokens a row."""


def batches(rows: int, time: int, device: str) -> dict[str, dict[str, Tensor]]:
    """The arguments by which the model reads each kind of batch."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(time // 2, time, rows).long()  # a quarter of all tokens is padding
    right = torch.arange(time) < lengths[:, None]
    starts = torch.zeros(rows, time, dtype=torch.bool)
    for row in starts:
        at = 0
        while at < time:
            row[at] = True
            at += max(8, int((torch.randn((), generator=generator) * 0.8).exp() * time / 8))
    ways = {
        "no mask": {},
        "mask of ones": {"attention_mask": torch.ones(rows, time, dtype=torch.long)},
        "padded right": {"attention_mask": right.long()},
        "padded left": {"attention_mask": right.flip(1).long()},
        "packed": {"starts": starts},
    }
    return {name: {k: v.to(device) for k, v in way.items()} for name, way in ways.items()}


def measure(name: str, device: str, turns: int) -> list[dict[str, Any]]:
    """One row a kind of batch."""
    model_type, config, rows, tokens = (GPU if device == "cuda" else CPU)[name]
    torch.manual_seed(0)
    lm = longroll.RecurrentLM(from_config(model_type, config).to(device)).train()
    ids = torch.randint(lm.vocab_size, (rows, tokens), device=device)
    targets = ids.roll(-1, 1)
    state = random_state(lm, rows).part("recurrent", "conv")
    ways = batches(rows, tokens, device)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(turns + 2):
        for way, given in ways.items():
            lm.zero_grad(set_to_none=True)
            seconds = _timed(lambda given=given: _step(lm, ids, targets, state, given, device), device)
            if turn > 1:
                times[way].append(seconds)
    found = []
    for way, values in times.items():
        ratios = [a / b for a, b in zip(values, times["no mask"], strict=True)]
        row = {"model": name, "batch": way, "rows": rows, "tokens": tokens}
        row |= {"ms": 1e3 * statistics.median(values), "ratio": statistics.median(ratios)}
        found.append(row | {"spread": [min(ratios), max(ratios)]})
        print(f"{name:20s} {way:14s} {row['ms']:9.1f} ms  {row['ratio']:.3f}")
    return found


def _step(lm, ids, targets, state, given, device) -> None:
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        loss, _ = loss_and_state(lm, ids, targets, state, **given)
    loss.backward()


def _timed(step, device: str) -> float:
    if device == "cpu":
        began = time.process_time()
        step()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    began = time.perf_counter()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    found = []
    for name in arguments.models or (GPU if arguments.device == "cuda" else CPU):
        found += measure(name, arguments.device, arguments.turns)
    made = provenance(seed=0, seconds=time.perf_counter() - began, device=arguments.device)
    if arguments.json:
        result = {"what": "documents", "rows": found, "provenance": made}
        BenchmarkResult.from_json(result).write(arguments.json)


if __name__ == "__main__":
    main()
