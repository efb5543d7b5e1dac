"""The recurrences against a loop over tokens and transformers' fallback, on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/ops_cpu.py --json ops_cpu.json

Ways take turns within a round; medians over the rounds count, and ratios are those of one run. `loop`: the
recurrence as written, a step at a time, in float32 (our oracle). `transformers`, what a CPU user gets there:
Mamba's `mamba_selective_scan`, which takes no state, Mamba-2's `mamba2_chunk_scan`, Qwen3-Next's
`torch_chunk_gated_delta_rule` and Kimi-Linear's `chunk_kimi_delta_attention`. `ours`: the op. Backward is
from both outputs. Mamba has H V channels of 16 numbers of state, Mamba-2 H heads of V channels and K numbers.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from longroll import ops
from longroll.ops import reference
from longroll.results import BenchmarkResult, provenance

SIZES = {"one long row": (1, 1024, 8, 64, 64), "many short rows": (8, 128, 4, 32, 32)}  # B, T, H, K, V
D_STATE = 16
NAMES = (
    "selective_scan",
    "ssd",
    "gla",
    "retention",
    "rwkv6",
    "rwkv7",
    "delta_rule",
    "gated_delta_rule",
    "kda",
)
Way = Callable[..., tuple[Tensor, Tensor]]


def inputs(name: str, size: tuple[int, ...]) -> dict[str, Tensor]:
    B, T, H, K, V = size
    torch.manual_seed(0)
    if name == "selective_scan":
        b, c = torch.randn(2, B, T, D_STATE)
        rates = -torch.arange(1.0, D_STATE + 1).repeat(H * V, 1)
        return mamba_inputs(torch.randn(B, T, H * V), rates, b, c, torch.randn(B, H * V, D_STATE))
    if name == "ssd":
        b, c = torch.randn(2, B, T, 1, K)
        return mamba_inputs(torch.randn(B, T, H, V), -torch.rand(H) * 8, b, c, torch.randn(B, H, V, K))
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


def mamba_inputs(x: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> dict[str, Tensor]:
    dt = F.softplus(torch.randn(x.shape[:3]) - 4)
    return {"x": x, "dt": dt, "A": A, "B": B, "C": C, "initial_state": state}


def scan_of_transformers(x, dt, A, B, C, initial_state):
    x, dt, B, C = (t.transpose(1, 2) for t in (x, dt, B, C))
    y, state = mamba_selective_scan(x, dt, A, B, C, return_last_state=True)
    return y.mT, state


def chunks_of_transformers(x, dt, A, B, C, initial_state):
    return mamba2_chunk_scan(
        x, dt, A, B, C, 64, initial_states=initial_state, return_final_states=True
    )  # 64 is faster than the 256 of configs


def by_place(function: Callable) -> Way:
    """Give q, k and v by their places: transformers has other names for them."""
    return lambda q, k, v, **others: function(q, k, v, **others, output_final_state=True)


FALLBACKS: dict[str, Way] = {
    "selective_scan": scan_of_transformers,
    "ssd": chunks_of_transformers,
    "gated_delta_rule": by_place(torch_chunk_gated_delta_rule),
    "kda": by_place(chunk_kimi_delta_attention),
}


def ways_of(name: str) -> dict[str, Way]:
    op = getattr(ops, name)
    ways: dict[str, Way] = {
        "ours": lambda **a: op(**a, output_final_state=True),
        "loop": getattr(reference, f"{name}_reference"),
    }
    if name in FALLBACKS:
        ways["transformers"] = FALLBACKS[name]
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
    ones = [torch.ones_like(o) for o in outputs]
    torch.autograd.grad(outputs, list(leaves.values()), ones, allow_unused=True)  # a state may be ignored
    return time.perf_counter() - start


def measure(name: str, size: tuple[int, ...], rounds: int) -> dict:
    ways, arguments = ways_of(name), inputs(name, size)
    exact, _ = ways["loop"](**{k: t.double() for k, t in arguments.items()})
    apart = {w: difference(way, arguments, exact) for w, way in ways.items()}
    if name == "selective_scan":  # transformers' knows no state
        fresh = arguments | {"initial_state": torch.zeros_like(arguments["initial_state"])}
        exact, _ = ways["loop"](**{k: t.double() for k, t in fresh.items()})
        apart["transformers"] = difference(ways["transformers"], fresh, exact)
    result: dict = {"largest_difference": apart}
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
        result = {"what": "ops_cpu", "note": options.note, "results": results}
        source = provenance(seed=0, seconds=time.perf_counter() - began)
        BenchmarkResult.from_json(result | {"provenance": source}).write(options.json)


if __name__ == "__main__":
    main()
