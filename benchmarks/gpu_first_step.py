"""The first training step on a machine where nothing is compiled: seconds until it is done, by family.

    python benchmarks/gpu_first_step.py --json gpu_first_step.json
    python benchmarks/gpu_first_step.py --device cpu --families mamba2   # checks the script

Two layers with heads as in released models, random weights, bf16 by autocast, 4 x 2048 tokens from a state,
forward and backward. Each family in a process of its own with an empty Triton cache; the clock starts with
the step. The second step shows what of it was compiling.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch

import longroll
from longroll.conformance import laws
from longroll.conformance.tiny import from_config
from longroll.results import BenchmarkResult, provenance
from longroll.training.loss import loss_and_state

COMMON = {"vocab_size": 32_000, "hidden_size": 1024, "num_hidden_layers": 2, "pad_token_id": 0}
_LINEAR = {"layer_types": ["linear_attention"] * 2}
_FEW_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 1024}
FAMILIES: dict[str, dict[str, Any]] = {
    "mamba": {},
    "mamba2": {"num_heads": 32, "head_dim": 64, "state_size": 128, "n_groups": 1},
    "gla": {"num_heads": 4},
    "retnet": {"num_heads": 4},
    "rwkv6": {"num_heads": 4},
    "rwkv7": {"head_dim": 64},
    "delta_net": {"num_heads": 8},
    "gated_deltanet": {"num_heads": 4, "head_dim": 256},
    "qwen3_next": _LINEAR | _FEW_EXPERTS,
    "kimi_linear": _LINEAR | _FEW_EXPERTS,
}


def steps(family: str, device: str) -> dict[str, float]:
    """Seconds of the first two steps of a model."""
    torch.manual_seed(0)
    with torch.device(device):
        lm = longroll.RecurrentLM(from_config(family, COMMON | FAMILIES[family])).train()
    ids = torch.randint(lm.vocab_size, (4, 2049) if device == "cuda" else (1, 65)).to(device)
    state = laws.random_state(lm, len(ids), scale=0.1)
    taken = []
    for _ in range(2):
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            loss, _ = loss_and_state(lm, ids[:, :-1], ids[:, 1:], state)
        loss.backward()
        loss.item()  # waits
        taken.append(time.perf_counter() - began)
    return {"first_step_seconds": taken[0], "second_step_seconds": taken[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(steps(options.child, options.device)))
        return
    began, rows = time.perf_counter(), []
    for family in options.families:
        with tempfile.TemporaryDirectory() as cache:
            done = subprocess.run(
                [sys.executable, __file__, "--child", family, "--device", options.device],
                env=os.environ | {"TRITON_CACHE_DIR": cache},
                capture_output=True,
                text=True,
            )
        if done.returncode:  # a family that fails must not hide the others
            print(f"{family}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}", flush=True)
            continue
        row = {"family": family, **json.loads(done.stdout.strip().splitlines()[-1])}
        rows.append(row)
        first, second = row["first_step_seconds"], row["second_step_seconds"]
        print(f"{family:16} first step {first:6.1f} s, second {second * 1e3:7.1f} ms", flush=True)
        if options.json:
            made = provenance(seed=0, seconds=time.perf_counter() - began, device=options.device)
            result = {"what": "gpu_first_step", "rows": rows, "provenance": made}
            BenchmarkResult.from_json(result).write(options.json)


if __name__ == "__main__":
    main()
