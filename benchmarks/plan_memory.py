"""The plan of memory (`longroll plan`) against what PyTorch allocates, of readings and of training.

    python benchmarks/plan_memory.py --json plan_memory.json
    python benchmarks/plan_memory.py --tiny --device cpu      # checks the script; peaks by the ledger

Models are those of big.py, with random weights. `ratio` is planned over measured; the aim is .9 to 1.1.
"""

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from big import Bench, posttrain

import longroll
from longroll.dry_run import Ledger
from longroll.measure.roll_out import chunk_tokens
from longroll.results import BenchmarkResult, provenance
from longroll.training.plan import Outline, Setting

AIM = 0.1
READINGS = {
    "read mamba2-370m": ("mamba2-370m", 4, 16_384),
    "read bamba-1b": ("bamba-1b", 4, 16_384),
    "read mamba2-2.7b": ("mamba2-2.7b", 1, 32_768),
}
TRAINING: dict[str, tuple[str, dict[str, Any]]] = {
    "train mamba2-370m": ("mamba2-370m", {"rows": 4, "length": 2048}),
    "train mamba2-370m, checkpointing": (
        "mamba2-370m", {"rows": 4, "length": 2048, "gradient_checkpointing": True},
    ),
    "train bamba-1b, LoRA": ("bamba-1b", {"rows": 2, "length": 4096, "lora_rank": 16}),
    "train bamba-1b, LoRA, int8": ("bamba-1b", {"rows": 2, "length": 4096, "lora_rank": 16, "int8": True}),
    "train mamba-370m": ("mamba-370m", {"rows": 2, "length": 2048}),
}  # fmt: skip


def read(bench: Bench, shape: str, rows: int, length: int) -> dict[str, Any]:
    """The loss of texts."""
    length = bench.size(length, 512)
    lm = bench.model(shape)
    tokens = bench.tokens(lm, rows, length)
    chunk = max(64, chunk_tokens(lm) // rows)
    outline = Outline(lm.model.config, lm.model.dtype, lm.device)
    began = time.perf_counter()
    planned = outline.reading(rows, length, chunk)
    seconds = time.perf_counter() - began
    if bench.cuda:
        longroll.position_loss(lm, tokens[:, : length // 8 + 1])  # compiles
        bench.start()
        longroll.position_loss(lm, tokens)
        measured = torch.cuda.max_memory_allocated()
    else:
        bench.free()
        with Ledger() as ledger:
            lm = bench.model(shape)
            before = ledger.start()
            longroll.position_loss(lm, tokens, chunk_size=chunk)
            measured = ledger.peak - before + outline.sizes.weights
    bench.free()
    return row(planned.total, measured, vars(planned), seconds)


def train(bench: Bench, shape: str, options: dict[str, Any]) -> dict[str, Any]:
    """Steps of State Passing."""
    setting = Setting(
        rows=options["rows"],
        length=bench.size(options["length"], 64),
        lora_rank=options.get("lora_rank", 0),
        gradient_checkpointing=options.get("gradient_checkpointing", False),
        autocast=bench.cuda,
        int8=options.get("int8", False),
    )
    outline = Outline(bench.config(shape), torch.bfloat16 if bench.cuda else torch.float32, bench.device)
    began = time.perf_counter()
    planned = outline.training(setting)
    seconds = time.perf_counter() - began
    if bench.cuda:
        found = posttrain(bench, shape, steps=4, cuda_graphs=False, **options)
        measured = round(found["peak_gib"] * 2**30)
    else:  # the moments come after the first step: the second one has the peak
        with Ledger() as ledger:
            bench.free()
            posttrain(bench, shape, steps=4, cuda_graphs=False, **options)
            measured = ledger.peak
    gc.collect()
    return row(planned.total, measured, vars(planned), seconds)


def row(planned: int, measured: int, parts: dict[str, int], seconds: float) -> dict[str, Any]:
    """One comparison."""
    return {
        "planned_gib": planned / 2**30,
        "measured_gib": measured / 2**30,
        "ratio": planned / measured,
        "met": abs(planned / measured - 1) <= AIM,
        "parts_gib": {name: size / 2**30 for name, size in parts.items()},
        "planning_seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and short texts")
    parser.add_argument("--only", nargs="+", choices=[*READINGS, *TRAINING])
    parser.add_argument("--json", help="write the results here, after every case")
    options = parser.parse_args()
    began = time.perf_counter()
    table: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(torch.device(options.device), options.tiny, 1, Path(folder), None)
        for name in options.only or [*READINGS, *TRAINING]:
            try:
                table[name] = (
                    read(bench, *READINGS[name]) if name in READINGS else train(bench, *TRAINING[name])
                )
            except Exception as error:  # one case that does not run here must not end the table
                table[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
                bench.free()
            print(f"{name:34} {table[name].get('error') or said(table[name])}", flush=True)
            if options.json:
                made = provenance(seed=0, seconds=time.perf_counter() - began, device=options.device)
                result = {"what": "plan_memory", "options": vars(options), "rows": table, "provenance": made}
                BenchmarkResult.from_json(result).write(options.json)


def said(found: dict[str, Any]) -> str:
    """A row in one line."""
    return (
        f"planned {found['planned_gib']:.3g}, measured {found['measured_gib']:.3g} GiB, ratio "
        f"{found['ratio']:.3f}; planned in {found['planning_seconds']:.1f} s"
    )


if __name__ == "__main__":
    main()
