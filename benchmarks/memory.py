"""The arithmetic of docs/scaling.md against memory that was measured on GPUs.

    python benchmarks/memory.py --json memory.json

Each case is a run of a result file; its shape is built without numbers, and its parts are counted.
`activations` are what Mamba-2's blocks keep for backward in bfloat16, bytes of a token and layer: the
residual stream in float32, the inputs of both projections, what the first gives, and the recurrence's output.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from ranks_gpu import SHAPES, model_of

from longroll.memory import GIB, MOMENTS, gathered_bytes, parameter_bytes
from longroll.results import BenchmarkResult, provenance

RESULTS = Path(__file__).parent / "results"
FILE = "ranks_h200-x4_2026-11-26"
PIECES = 1 << 30
"""Bytes of logits in bfloat16 that exist at a time (`longroll.training.loss`)."""


def mamba2_activations(width: int, layers: int, state: int = 128, head: int = 64) -> int:
    """Bytes that backward reads of a token."""
    inner, heads = 2 * width, 2 * width // head
    residual, projected = 4 * width, 2 * (2 * inner + 2 * state + heads)
    return layers * (residual + 2 * width + projected + 2 * inner + 2 * inner)


def mamba2_state(width: int, layers: int, state: int = 128) -> int:
    """Bytes of a row's state: recurrent and conv, float32."""
    inner = 2 * width
    return layers * 4 * (inner * state + 3 * (inner + 2 * state))


CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "370M, 16 rows, one GPU": (FILE, ("parts", "ddp 1", "peak_gib"), {"shape": "370m", "rows": 16}),
    "370M, 16 rows, four GPUs, DDP": (
        FILE,
        ("parts", "ddp 4", "peak_gib"),
        {"shape": "370m", "rows": 16, "buckets": True},
    ),
    "2.7B, 6 rows, four GPUs, FSDP2": (
        FILE,
        ("parts", "fsdp", "peak_gib"),
        {"shape": "2.7b", "rows": 6, "shards": 4},
    ),
}
"""Case -> the file, where in it the peak stands, and the shape."""


def arithmetic(
    shape: str, rows: int, *, shards: int = 1, buckets: bool = False, length: int = 2048
) -> dict[str, float]:
    """Gibibytes of each part, and their sum."""
    model = model_of(shape, "meta")
    width, layers = SHAPES[shape]
    matrices = 2 * sum(p.numel() for p in model.parameters())
    held = parameter_bytes(model) // shards
    parts = {"weights": held, "gradients": held, "optimizer": MOMENTS * held}
    parts["gathered"] = gathered_bytes(model) if shards > 1 else 0
    parts["states"] = rows * mamba2_state(width, layers)
    parts["activations"] = rows * length * mamba2_activations(width, layers)
    parts["logits"] = PIECES
    parts["copies in bfloat16"] = matrices
    parts["buckets of DDP"] = parts["gradients"] if buckets else 0
    found = {name: size / GIB for name, size in parts.items()}
    return found | {"total": sum(found.values())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    began, rows = time.perf_counter(), []
    for case, (file, place, shape) in CASES.items():
        measured: Any = json.loads((RESULTS / f"{file}.json").read_text())
        for key in place:
            measured = measured[key]
        held = arithmetic(**shape)
        rows.append({"case": case, "file": file, "arithmetic_gib": held, "measured_gib": measured})
        ratio = held["total"] / measured
        print(f"{case}: {held['total']:.1f} GiB by arithmetic, {measured:.1f} measured, {ratio:.2f}", held)
    if options.json:
        made = provenance(seed=0, seconds=time.perf_counter() - began)
        BenchmarkResult.from_json({"what": "memory", "rows": rows, "provenance": made}).write(options.json)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
