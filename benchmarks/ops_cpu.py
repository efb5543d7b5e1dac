"""The recurrences with a (K, V) state against a loop over tokens and transformers' fallback, on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/ops_cpu.py --json ops_cpu.json

Ways take turns within a round; medians over the rounds count, and ratios are those of one run. `loop`: the
recurrence as written, a step at a time, in float32 (our oracle). `transformers`: Qwen3-Next's
`torch_chunk_gated_delta_rule` and Kimi-Linear's `chunk_kimi_delta_attention`, what a CPU user gets there.
`ours`: the op.
Backward is from both outputs.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from longroll import ops
from longroll.ops import reference
from longroll.results import provenance, write_json

SIZES = {"one long row": (1, 1024, 8, 64, 64), "many short rows": (8, 128, 4, 32, 32)}  # B, T, H, K, V
NAMES = ("gla", "retention", "rwkv6", "rwkv7", "delta_rule", "gated_delta_rule", "kda")
Way = Callable[..., tuple[Tensor, Tensor]]


def inputs(name: str, size: tuple[int, ...]) -> dict[str, Tensor]:
    B, T, H, K, V = size
    torch.manual_seed(0)
    q, k, v = torch.randn(B, T, H, K), F.normalize(torch.randn(B, T, H, K), dim=-1), torch.randn(B, T, H, V)
    decay, beta = F.logsigmoid(torch.randn(B, T, H, K) + 3), torch.rand(B, T, H)
    others = {
        "gla": {"q": q, "k": k, "g": decay},
        "retention": {"q": q, "k": k},
        "rwkv6": {"r": q, "k": k, "w": decay, "u": torch.randn(H, K)},
        "rwkv7": {"r": q, "w": decay, "k": k, "a": -k, "b": k * beta[..., None]},
        "delta_rule": {"q": q, "k": k, "beta": beta},
        "gated_delta_rule": {"q": q, "k": k, "g": decay[..., 0].contiguous(), "beta": beta},
        "kda": {"q": q, "k": k, "g": decay, "beta": beta},
    }
    return {**others[name], "v": v, "initial_state": torch.randn(B, H, K, V)}


FALLBACKS = {"gated_delta_rule": torch_chunk_gated_delta_rule, "kda": chunk_kimi_delta_attention}


def ways_of(name: str) -> dict[str, Way]:
    op = getattr(ops, name)
    ways: dict[str, Way] = {
        "ours": lambda **a: op(**a, output_final_state=True),
        "loop": getattr(reference, f"{name}_reference"),
    }
    if name in FALLBACKS:
        ways["transformers"] = lambda **a: FALLBACKS[name](
            a.pop("q"), a.pop("k"), a.pop("v"), **a, output_final_state=True
        )
    return ways


def forward(way: Way, arguments: dict[str, Tensor]) -> float:
    with torch.no_grad():
        start = time.perf_counter()
        way(**arguments)
        return time.perf_counter() - start


def forward_and_backward(way: Way, arguments: dict[str, Tensor]) -> float:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in arguments.items()}
    start = time.perf_counter()
    outputs = way(**leaves)
    torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(o) for o in outputs])
    return time.perf_counter() - start


def measure(name: str, size: tuple[int, ...], rounds: int) -> dict:
    ways, arguments = ways_of(name), inputs(name, size)
    exact, _ = ways["loop"](**{k: t.double() for k, t in arguments.items()})
    result: dict = {"largest_difference": {w: difference(way, arguments, exact) for w, way in ways.items()}}
    for task in (forward, forward_and_backward):
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for i in range(rounds + 1):
            for label, way in ways.items():
                taken = task(way, arguments)
                if i > 0:  # the first round warms up
                    seconds[label].append(taken)
        medians = {label: statistics.median(times) for label, times in seconds.items()}
        ratios = {label: medians[label] / medians["ours"] for label in medians if label != "ours"}
        result[task.__name__] = {"seconds": seconds, "medians": medians, "times_ours": ratios}
    return result


def difference(way: Way, arguments: dict[str, Tensor], exact: Tensor) -> float:
    """Largest error of the outputs against the loop in float64, as a part of the largest output."""
    o, _ = way(**arguments)
    return ((o - exact).abs().max() / exact.abs().max()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--note", help="kept with the result: what else ran on the machine, for one")
    parser.add_argument("--json")
    options = parser.parse_args()
    began, results = time.perf_counter(), []
    for label, size in SIZES.items():
        print(f"{label}: B, T, H, K, V = {size}; milliseconds, and how many times ours")
        for name in NAMES:
            found = measure(name, size, options.rounds)
            results.append({"op": name, "size": dict(zip("BTHKV", size, strict=True)), **found})
            for task in ("forward", "forward_and_backward"):
                medians, ratios = found[task]["medians"], found[task]["times_ours"]
                others = ", ".join(
                    f"{way} {1e3 * medians[way]:.1f} ({ratio:.1f})" for way, ratio in ratios.items()
                )
                print(f"  {name:17} {task:21} ours {1e3 * medians['ours']:6.1f}, {others}")
    if options.json:
        result = {"kind": "benchmark", "what": "ops_cpu", "note": options.note, "results": results}
        source = provenance(seed=0, seconds=time.perf_counter() - began)
        write_json(options.json, result | {"provenance": source})


if __name__ == "__main__":
    main()
