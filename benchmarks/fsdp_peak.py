"""Peak memory of steps under FSDP2, and what lives at the peak, by the line that made it.

    torchrun --nproc-per-node 2 benchmarks/fsdp_peak.py --json fsdp_peak.json
    torchrun --nproc-per-node 2 benchmarks/fsdp_peak.py --shape toy --device cpu   # checks the script

All weights of a Mamba-2 of random weights, bfloat16, State Passing. `before` takes all logits at once and
has autocast keep its copies of the weights, as longroll did until 26 November.
"""

from __future__ import annotations

import argparse
import collections
import gc
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ranks_gpu
import torch
from transformers import TrainerCallback

from longroll.interventions import StatePassing
from longroll.memory import GIB
from longroll.results import BenchmarkResult, provenance

STEPS = 5
CHECKED, PLAIN = 2, 4
"""Steps that are looked into: the one that checks that the state reaches the loss, and a later one."""
KNOWN = ("longroll", "fsdp", "transformers", "torch/optim", "amp")
"""Whose lines name an allocation."""


def line_of(frames: list[dict[str, Any]]) -> str:
    """Return the innermost lines of the known libraries that made an allocation."""
    known = [f for f in frames if any(part in f["filename"] for part in KNOWN)]
    return " < ".join(f"{Path(f['filename']).name}:{f['line']}:{f['name']}" for f in (known or frames)[:3])


def at_peak(base: int) -> dict[str, Any]:
    """Replay the allocations of a step that began with `base` bytes to its peak; add up what lives there."""
    trace = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    signs = {"alloc": 1, "free_completed": -1}
    total, most, last = base, base, 0
    for number, event in enumerate(trace):
        total += signs.get(event["action"], 0) * event["size"]
        if total > most:
            most, last = total, number
    live: dict[int, dict[str, Any]] = {}
    for event in trace[: last + 1]:
        if event["action"] == "alloc":
            live[event["addr"]] = event
        elif event["action"] == "free_completed":
            live.pop(event["addr"], None)
    sizes: collections.Counter[str] = collections.Counter()
    for event in live.values():
        sizes[line_of(event.get("frames", []))] += event["size"]
    parts = {name: round(size / GIB, 3) for name, size in sizes.most_common(24)}
    return {"begins_at_gib": base / GIB, "peak_gib": most / GIB, "parts_gib": parts}


class Watch(TrainerCallback):
    """Notes the peak of each step."""

    def __init__(self, cuda: bool, first: bool) -> None:
        self.cuda, self.first = cuda, first
        self.steps: list[dict[str, Any]] = []
        self.parts: dict[str, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count from here."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
            if self.first and state.global_step + 1 in (CHECKED, PLAIN):
                torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python")
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the peak."""
        if self.cuda:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / GIB if self.cuda else None
        seconds = round(time.perf_counter() - self.began, 3)
        self.steps.append({"step": state.global_step, "seconds": seconds, "peak_gib": peak})
        if self.cuda and self.first and state.global_step in (CHECKED, PLAIN):
            self.parts[f"step {state.global_step}"] = at_peak(self.base)
            torch.cuda.memory._record_memory_history(None)


def measure(options: argparse.Namespace, *, before: bool) -> dict[str, Any]:
    """Train a few steps and return what they took."""
    cuda, rank = options.device == "cuda", int(os.environ["RANK"])
    device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    model = ranks_gpu.model_of(options.shape, device)
    parameters = sum(p.numel() for p in model.parameters())
    trainer = ranks_gpu.trainer_of(model, options, STEPS, options.rows, options.length, fsdp=True)
    trainer.intervention = StatePassing()
    if before:
        trainer._only_forwards = lambda _: False
        trainer.accelerator.autocast_handler = None
    watch = Watch(cuda, rank == 0)
    trainer.add_callback(watch)
    trainer.train()
    peak = max(step["peak_gib"] or 0 for step in watch.steps)
    return {
        "name": "before" if before else "now", "parameters": parameters, "rows": options.rows,
        "length": options.length, "ranks": int(os.environ["WORLD_SIZE"]),
        "peak_gib": peak, "steps": watch.steps, "at_peak": watch.parts,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=ranks_gpu.SHAPES, default="2.7b")
    parser.add_argument("--rows", type=int, default=4, help="of each process")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    began, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as place:
        options.place = Path(place)
        for before in (False, True):
            rows.append(measure(options, before=before))
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()
            if os.environ["RANK"] == "0":
                print(rows[-1]["name"], rows[-1]["peak_gib"], rows[-1]["steps"], flush=True)
                if options.json:
                    made = provenance(seed=0, seconds=time.perf_counter() - began, device=options.device)
                    found = {"what": "fsdp_peak", "rows": rows, "provenance": made}
                    BenchmarkResult.from_json(found).write(options.json)
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort an interpreter that ends in order


if __name__ == "__main__":
    main()
