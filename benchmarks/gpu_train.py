"""Training steps of full-sized Mamba and Mamba-2 on a GPU: zero state against every intervention, and peers.

    python benchmarks/gpu_train.py --json gpu_train.json             # mamba2-370m, 2048 tokens, bf16
    python benchmarks/gpu_train.py --shape mamba-130m --batch 8
    python benchmarks/gpu_train.py --shape toy --device cpu          # checks the script

Random weights in transformers' classes; AdamW; every row is the same model on the same batches, one row after
the other since few would fit on a GPU together; medians count. `transformers` is its own path from the zero
state, what a user has without longroll. The Triton rows need a GPU (LONGROLL_KERNELS). MFU counts 6 flops a
parameter and token, no recurrence.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

import longroll
from longroll.ops._backend import SWITCH
from longroll.results import provenance, write_json

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

INTERVENTIONS = {
    "zero": None,
    "sp": longroll.StatePassing,
    "tbptt": longroll.TBPTT,
    "fitted": longroll.FittedNoise,
    "random": longroll.RandomNoise,
}


class Row:
    """One line of the table: a model with its optimizer, and how it is stepped."""

    def __init__(self, name: str, model: torch.nn.Module, kernels: str, intervention: str | None) -> None:
        self.name, self.model, self.kernels = name, model, kernels
        self.lm = None if name == "transformers" else longroll.RecurrentLM(model)
        kind = INTERVENTIONS[intervention] if intervention else None
        self.intervention = kind() if kind else None
        cuda = next(model.parameters()).is_cuda
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda)
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peak = 0

    def step(self, ids: torch.Tensor) -> None:
        """One training step on a batch (B, T + 1), timed."""
        device = ids.device
        os.environ[SWITCH] = self.kernels
        _synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            if self.lm is None:
                logits = self.model(ids[:, :-1], use_cache=False).logits
            else:
                batch = {"input_ids": ids[:, :-1], "starts": torch.zeros(len(ids), dtype=torch.bool)}
                state = self.intervention.initial_state(batch) if self.intervention else None
                logits, final = self.lm(ids[:, :-1], state)
                if self.intervention:
                    self.intervention.observe(final)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        _synchronize(device)
        self.seconds.append(time.perf_counter() - began)
        self.losses.append(loss.item())
        if device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def rows(model: torch.nn.Module, device: str, only: str) -> Iterator[Row]:
    """Rows that can run here, each with a copy of the model of its own."""
    kernels = ["torch", *(["triton"] if torch.cuda.is_available() else [])]
    names = [("transformers", "torch", None)]
    names += [(f"{kernel} {name}", kernel, name) for kernel in kernels for name in INTERVENTIONS]
    for name, kernel, intervention in names:
        if only in name:
            yield Row(name, copy.deepcopy(model).to(device), kernel, intervention)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mamba2-370m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", help="write the results here")
    options = parser.parse_args()
    config, kind, sizes = SHAPES[options.shape]
    torch.manual_seed(0)
    model = kind(config(**sizes)).train()
    parameters = sum(p.numel() for p in model.parameters())
    peak = PEAK.get(torch.cuda.get_device_name()) if options.device == "cuda" else None
    shape = (options.warmup + options.steps, options.batch, options.length + 1)
    batches = torch.randint(sizes["vocab_size"], shape, device=options.device)
    table = []
    for row in rows(model, options.device, options.only):
        if options.device == "cuda":
            torch.cuda.empty_cache()
        try:
            for batch in batches:
                row.step(batch)
        except torch.cuda.OutOfMemoryError as error:
            print(f"{row.name}: {str(error).splitlines()[0]}")
            continue
        seconds = statistics.median(row.seconds[options.warmup :])
        rate = options.batch * options.length / seconds
        table.append(
            {
                "row": row.name,
                "tokens_per_second": rate,
                "seconds": row.seconds,
                "mfu": 6 * parameters * rate / peak if peak else None,
                "peak_gib": row.peak / 2**30,
                "first_loss": row.losses[0],
                "first_step_seconds": row.seconds[0],
            }
        )
        ratio = rate / table[0]["tokens_per_second"]
        print(
            f"{row.name:16} {rate:10,.0f} tokens/s {ratio:6.2f}x {row.peak / 2**30:7.1f} GiB "
            f"first loss {row.losses[0]:.4f}, first step {row.seconds[0]:.1f} s",
            flush=True,
        )
        if options.json:
            made = provenance(seed=0, seconds=0.0)
            arguments = vars(options) | {"parameters": parameters}
            write_json(options.json, {"options": arguments, "rows": table, "provenance": made})


if __name__ == "__main__":
    main()
