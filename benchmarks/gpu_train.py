"""Training steps of full-sized Mamba and Mamba-2 on a GPU: zero state against every intervention, and peers.

    python benchmarks/gpu_train.py --json gpu_train.json             # mamba2-370m, 4 x 2048 tokens, bf16
    python benchmarks/gpu_train.py --shape mamba-130m --batch 8
    python benchmarks/gpu_train.py --shape toy --device cpu          # checks the script

Random weights, the same in every row, on the same batches; AdamW; autocast to bf16; medians. `transformers`,
`mamba-ssm` and `fla` are what users have without longroll, from the zero state; longroll's rows take turns at
one model, so that a drift of the machine falls on all of them: overheads are medians over the turns of a
row's time to that of the zero state's. Within a turn of ten steps nothing waits for the GPU, as in training,
which waits where it logs. The graph of `graphs zero` is captured without states. MFU counts 6 flops a
parameter and token, no recurrence.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import peers
import torch
import torch.nn.functional as F
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

import longroll
from longroll.ops._backend import SWITCH
from longroll.results import BenchmarkResult, provenance
from longroll.training.graphs import StepGraph
from longroll.training.loss import loss_and_state

_MAMBA2 = {"state_size": 128, "head_dim": 64, "n_groups": 1, "expand": 2, "vocab_size": 50288}
SHAPES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "mamba2-370m": (
        Mamba2Config,
        Mamba2ForCausalLM,
        _MAMBA2 | {"hidden_size": 1024, "num_hidden_layers": 48, "num_heads": 32},
    ),
    "mamba2-130m": (
        Mamba2Config,
        Mamba2ForCausalLM,
        _MAMBA2 | {"hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24},
    ),
    "mamba-130m": (
        MambaConfig,
        MambaForCausalLM,
        {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50280},
    ),
    "mamba-370m": (
        MambaConfig,
        MambaForCausalLM,
        {"hidden_size": 1024, "num_hidden_layers": 48, "vocab_size": 50280},
    ),
    "toy": (
        Mamba2Config,
        Mamba2ForCausalLM,
        {
            "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "state_size": 16,
            "n_groups": 1, "vocab_size": 64,
        },
    ),
}  # fmt: skip
PEAK = {"NVIDIA H200": 990e12, "NVIDIA H100 80GB HBM3": 990e12}  # dense bf16, from the data sheets

WARMUP = 1  # turns, after the first step

INTERVENTIONS = {
    "zero": None,
    "sp": longroll.StatePassing,
    "tbptt": longroll.TBPTT,
    "fitted": longroll.FittedNoise,
    "random": longroll.RandomNoise,
}


class Row:
    """A line of the table: one way to start, and the turns it took: seconds a step of each."""

    def __init__(self, name: str, intervention: str | None) -> None:
        self.name = name
        kind = INTERVENTIONS[intervention] if intervention else None
        self.intervention = kind() if kind else None
        self.seconds: list[float] = []
        self.first_loss = float("nan")
        self.peak, self.reserved = 0, 0

    def summary(self, zero: Row, tokens: int, parameters: int, peak: float | None) -> dict:
        """The line; `zero` is the row to compare with, turn by turn."""
        seconds = statistics.median(self.seconds[1 + WARMUP :])
        both = zip(self.seconds[1 + WARMUP :], zero.seconds[1 + WARMUP :], strict=True)
        return {
            "row": self.name,
            "tokens_per_second": tokens / seconds,
            "seconds": self.seconds,
            "mfu": 6 * parameters * tokens / seconds / peak if peak else None,
            "peak_gib": self.peak / 2**30,
            "reserved_gib": self.reserved / 2**30,
            "overhead": statistics.median(own / other for own, other in both) - 1,
            "first_loss": self.first_loss,
            "first_step_seconds": self.seconds[0],
        }


class Bench:
    """A model with its optimizer, and the rows that step it."""

    def __init__(self, model: torch.nn.Module, rows: list[Row], *, own: bool, graphs: bool) -> None:
        self.model, self.rows = model, rows
        self.lm = longroll.RecurrentLM(model) if own else None  # type: ignore[arg-type]
        self.graphs: dict[bool, StepGraph] = {}
        if graphs:  # what starts from zero is captured without states
            pool = torch.cuda.graph_pool_handle()
            for states in (False, True):
                self.graphs[states] = StepGraph(self.lm, dtype=torch.bfloat16, states=states, pool=pool)  # type: ignore[arg-type]
        cuda = next(model.parameters()).is_cuda
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda)

    def turn(self, row: Row, batches: torch.Tensor) -> None:
        """Training steps on batches (K, B, T + 1), timed together."""
        device = batches.device
        _synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for ids in batches:
            loss = self._forward_and_backward(row, ids[:, :-1], ids[:, 1:])
            self.optimizer.step()
            self.optimizer.zero_grad()
        _synchronize(device)
        row.seconds.append((time.perf_counter() - began) / len(batches))
        if len(row.seconds) == 1:
            row.first_loss = loss.item()
        if device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved()
            # a graph's memory is not counted as allocated between its replays
            peak = reserved if self.graphs else torch.cuda.max_memory_allocated()
            row.peak, row.reserved = max(row.peak, peak), max(row.reserved, reserved)

    def _forward_and_backward(self, row: Row, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        state, final = None, None
        if row.intervention:
            # on the model's device, as Trainer puts it; in every batch a document begins, TBPTT's dear case
            starts = torch.arange(len(ids), device=ids.device) == 0
            batch = {"input_ids": ids, "starts": starts}
            state = row.intervention.initial_state(batch)
        if self.graphs:
            loss, final = self.graphs[row.intervention is not None](ids, targets, state)
        else:
            with torch.autocast(ids.device.type, torch.bfloat16):
                if self.lm is None:
                    logits = peers.logits(self.model, ids).float()
                    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
                else:
                    loss, final = loss_and_state(self.lm, ids, targets, state)
            loss.backward()
        if row.intervention:
            row.intervention.observe(final)
        return loss


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def benches(device: str, folders: list[str]) -> Iterator[str]:
    """Names of the implementations that can run here."""
    yield "transformers"
    sys.path += folders
    if device == "cuda":
        yield from peers.available()
    yield "torch"
    if device == "cuda":
        yield from ("triton", "graphs")


def open_bench(name: str, make: Callable[[], torch.nn.Module], device: str) -> Bench:
    """An implementation with its rows."""
    gc.collect()  # the last implementation's memory must not count as this one's
    torch.cuda.empty_cache()
    model, own = make(), name in ("torch", "triton", "graphs")
    if name in ("mamba-ssm", "fla"):
        model = peers.build(name, model)
    rows = [Row(f"{name} {way}", way) for way in INTERVENTIONS] if own else [Row(name, None)]
    os.environ[SWITCH] = name if own else "torch"
    return Bench(model.to(device).train(), rows, own=own, graphs=name == "graphs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mamba2-370m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of a turn; one before the turns compiles")
    parser.add_argument("--only", nargs="+", help="implementations, of those that can run here")
    hidden = (
        "folders of mamba_ssm and its extensions, hidden from the row of transformers, which would use them"
    )
    parser.add_argument("--peers", nargs="+", default=[], help=hidden)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", help="write the results here")
    options = parser.parse_args()
    began = time.perf_counter()
    config, kind, sizes = SHAPES[options.shape]

    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        with torch.device(options.device):
            return kind(config(**sizes))

    parameters = sum(p.numel() for p in make().parameters())
    peak = PEAK.get(torch.cuda.get_device_name()) if options.device == "cuda" else None
    shape = (1 + (WARMUP + options.turns) * options.steps, options.batch, options.length + 1)
    batches = torch.randint(sizes["vocab_size"], shape, device=options.device)
    turns = (batches[:1], *batches[1:].split(options.steps))
    table = []
    for name in benches(options.device, options.peers):
        if options.only and name not in options.only:
            continue
        try:
            rows = run(open_bench(name, make, options.device), turns)
        except Exception as error:  # a peer that does not run here must not end the table
            print(f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}", flush=True)
            continue
        for row in rows:
            line = row.summary(rows[0], options.batch * options.length, parameters, peak)
            table.append(line)
            ratio = line["tokens_per_second"] / table[0]["tokens_per_second"]
            print(
                f"{row.name:18} {line['tokens_per_second']:10,.0f} tokens/s {ratio:6.2f}x"
                f"{line['peak_gib']:8.1f} GiB ({line['reserved_gib']:.1f} reserved)"
                f"  MFU {line['mfu'] or 0:.3f}  {line['overhead']:+7.2%}"
                f"  first loss {row.first_loss:.4f}, first step {row.seconds[0]:.1f} s",
                flush=True,
            )
        if options.json:
            made = provenance(seed=0, seconds=time.perf_counter() - began, device=options.device)
            arguments = vars(options) | {"parameters": parameters}
            result = {"what": "gpu_train", "options": arguments, "rows": table, "provenance": made}
            BenchmarkResult.from_json(result).write(options.json)


def run(bench: Bench, turns: tuple[torch.Tensor, ...]) -> list[Row]:
    """All rows' steps, in turns; the first turn is one step."""
    for batches in turns:
        for row in bench.rows:
            bench.turn(row, batches)
    return bench.rows


if __name__ == "__main__":
    main()
