"""What `diagnose` costs beside the loss of the same texts: tokens read, forwards, seconds, memory.

    python benchmarks/diagnose_cost.py --json diagnose_cost.json
    python benchmarks/diagnose_cost.py --shape bamba-9.8b --device cuda --length 16384 --train-length 2048

Models of many heads, whose decays are set so slow that they break, on random tokens of few words (big.py).
The two readings that a diagnosis needs are the loss and the restarts that it is compared with. Aims: without
causes at most 1.5 times the two readings, with causes at most 12 times the loss, memory at most 1.3 times
the loss's. On a CPU memory is that of tensors, by a ledger in passes of their own; on a GPU PyTorch's.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from big import SHAPES, Bench, _break
from transformers import AutoConfig, AutoModelForCausalLM

import longroll
from longroll.dry_run import Ledger
from longroll.measure.excess_loss import excess_loss
from longroll.results import BenchmarkResult, provenance

AIMS = {"readings": 1.5, "loss": 12.0, "memory": 1.3}
_COMMON = {
    "vocab_size": 64, "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "mamba_n_heads": 128, "mamba_d_head": 4, "mamba_d_state": 8, "mamba_expand": 2,
    "mamba_n_groups": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "many-heads": ("bamba", _COMMON | {"num_hidden_layers": 16, "attn_layer_indices": []}),
    "many-heads-hybrid": ("bamba", _COMMON | {"num_hidden_layers": 10, "attn_layer_indices": [3, 7]}),
}
"""Model types and configs: thousands of heads of few numbers each."""


def model_of(name: str, bench: Bench) -> longroll.RecurrentLM:
    """Random weights of a shape of big.py, or of one of `MODELS`."""
    if name in SHAPES:
        return bench.model(name)
    torch.manual_seed(0)
    model_type, entries = MODELS[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **entries))
    return longroll.RecurrentLM(model.to(bench.device, bench.dtype).eval(), name=name)


class Counted:
    """Tokens and forwards of a model while it is entered, seconds, and the peak of memory."""

    def __init__(self, lm: longroll.RecurrentLM, bench: Bench) -> None:
        self.lm, self.bench, self.tokens, self.forwards = lm, bench, 0, 0

    def run(self, call: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
        """Run once for time and counts; on a CPU again for memory."""

        def note(_module: Any, inputs: tuple[Any, ...]) -> None:
            self.tokens += inputs[0].numel()
            self.forwards += 1

        self.tokens = self.forwards = 0
        handle = self.lm.register_forward_pre_hook(note)
        self.bench.start()
        began = time.perf_counter()
        found = call()
        self.bench.wait()
        seconds = time.perf_counter() - began
        handle.remove()
        counts = {"tokens": self.tokens, "forwards": self.forwards, "seconds": seconds}
        if self.bench.cuda:
            return found, counts | {"peak_bytes": torch.cuda.max_memory_allocated()}
        with Ledger() as ledger:
            before = ledger.start()
            call()
        weights = sum(p.nbytes for p in self.lm.parameters())
        return found, counts | {"peak_bytes": weights + ledger.peak - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=[*MODELS, *SHAPES], default=list(MODELS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--train-length", type=int, default=256)
    parser.add_argument("--tiny", action="store_true", help="tiny models in the place of big.py's shapes")
    parser.add_argument("--json", help="write the results here, after every model")
    options = parser.parse_args()
    started = time.perf_counter()
    table: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(torch.device(options.device), options.tiny, 1, Path(folder), None)
        for name in options.shape:
            table[name] = cost(model_of(name, bench), bench, options)
            bench.free()
            print(f"{name}: {said(table[name])}", flush=True)
            if options.json:
                made = provenance(seed=0, seconds=time.perf_counter() - started, device=options.device)
                result = {
                    "what": "diagnose_cost",
                    "options": vars(options),
                    "rows": table,
                    "provenance": made,
                }
                BenchmarkResult.from_json(result).write(options.json)


def cost(lm: longroll.RecurrentLM, bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """The loss, the restarts, and the two diagnoses of one model."""
    trained = options.train_length
    words = min(16, lm.vocab_size)
    tokens = bench.tokens(lm, options.rows, options.length, words=words)
    _break(lm, tokens, trained)
    counted = Counted(lm, bench)
    longroll.position_loss(lm, tokens[:, : options.length // 4 + 1])  # compiles
    carried, loss = counted.run(lambda: longroll.position_loss(lm, tokens))
    _, restarts = counted.run(lambda: excess_loss(lm, tokens, carried, trained))
    stages: dict[str, float] = {}

    def progress(stage: str, *_: Any) -> None:
        stages.setdefault(stage, time.perf_counter())

    def diagnose(explain: bool) -> longroll.Diagnosis:
        return longroll.diagnose(lm, tokens, train_length=trained, explain=explain, progress=progress)

    brief, without = counted.run(lambda: diagnose(False))
    stages.clear()
    full, causes = counted.run(lambda: diagnose(True))
    readings = loss["seconds"] + restarts["seconds"]
    read = loss["tokens"] + restarts["tokens"]
    ratios = {
        "tokens_without_causes_over_readings": without["tokens"] / read,
        "seconds_without_causes_over_readings": without["seconds"] / readings,
        "tokens_with_causes_over_loss": causes["tokens"] / loss["tokens"],
        "seconds_with_causes_over_loss": causes["seconds"] / loss["seconds"],
        "memory_over_loss": max(without["peak_bytes"], causes["peak_bytes"]) / loss["peak_bytes"],
    }
    section = full.to_json().get("coverage") or {}
    return {
        "heads": sum(layer.heads for layer in lm.layers),
        "loss": loss,
        "restarts": restarts,
        "without_causes": without,
        "with_causes": causes,
        "ratios": ratios,
        "aims": AIMS,
        "verdict": brief.verdict,
        "severity": brief.severity,
        "causes": section.get("causal_sentence"),
        "trials": len(section.get("causal") or []),
    }


def said(found: dict[str, Any]) -> str:
    """A model in one line."""
    ratios = ", ".join(f"{name} {value:.2f}" for name, value in found["ratios"].items())
    return f"{found['heads']} heads, {found['verdict']}, loss {found['loss']['seconds']:.2f} s; {ratios}"


if __name__ == "__main__":
    main()
