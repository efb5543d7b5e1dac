"""The staggered remembrance map against K separate forwards: wall time and agreement.

    python benchmarks/remembrance.py --json remembrance.json
    python benchmarks/remembrance.py --shape mamba2-370m --device cuda

Three ways, rounds alternating, the smallest time counts; all keep the last hidden states only.
`forwards`: K forwards of T tokens, the unit in which the cost is stated. `suffixes`: K forwards of x[t:T],
one piece each, as a careful user would write them; these hold as many tokens as the map, so against them
only batching tells, which is little on a CPU. `staggered`: ours.
"""

import argparse
import time

import torch
from gpu_train import SHAPES

import longroll
from longroll.measure.distances import head_distance
from longroll.measure.remembrance import remembrance_map
from longroll.model import RecurrentLM
from longroll.results import BenchmarkResult, provenance

TARGET = 0.6


def model_of(name: str, shape: str | None, device: str) -> RecurrentLM:
    if shape is None:
        return longroll.load(name, device=device)
    config, kind, sizes = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(device):
        model = kind(config(**sizes)).to(torch.bfloat16)
    return RecurrentLM(model, name=f"random weights of the shape of {shape} in bfloat16").eval()


@torch.no_grad()
def separately(lm: RecurrentLM, tokens: torch.Tensor, starts: list[int]) -> torch.Tensor:
    last = [lm(tokens[:, start:].to(lm.device), logits=False)[0][:, -1] for start in starts]
    return head_distance(lm, last[0], torch.stack(last), "tv").mean(dim=1)


@torch.no_grad()
def forwards(lm: RecurrentLM, tokens: torch.Tensor, starts: list[int]) -> torch.Tensor:
    for _ in starts:
        lm(tokens.to(lm.device), logits=False)
    return torch.zeros(len(starts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="specimen")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--starts", type=int, default=16)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    options = parser.parse_args()
    began = time.perf_counter()
    lm = model_of(options.model, options.shape, options.device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(lm.vocab_size, (options.rows, options.length), generator=generator)
    starts = [i * options.length // options.starts for i in range(options.starts)]
    ways = {
        "forwards": lambda: forwards(lm, tokens, starts),
        "suffixes": lambda: separately(lm, tokens, starts),
        "staggered": lambda: remembrance_map(lm, tokens, starts).mean[:, 0],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for _ in range(options.rounds):
        for name, way in ways.items():
            if lm.device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            found[name] = way().cpu().double()
            if lm.device.type == "cuda":  # `forwards` returns nothing that waits
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    best = {name: min(times) for name, times in seconds.items()}
    ratio = best["staggered"] / best["forwards"]
    result = {
        "kind": "benchmark",
        "what": "remembrance",
        "model": lm.name,
        "length": options.length,
        "starts": options.starts,
        "rows": options.rows,
        "seconds": seconds,
        "ratio": ratio,
        "ratio_suffixes": best["staggered"] / best["suffixes"],
        "target": TARGET,
        "met": ratio <= TARGET,
        "largest_difference": (found["staggered"] - found["suffixes"]).abs().max().item(),
        "provenance": provenance(lm, seed=0, seconds=time.perf_counter() - began),
    }
    if options.json:
        BenchmarkResult.from_json(result).write(options.json)
    print(
        f"{lm.name}: {options.starts} starts, T = {options.length}, {options.rows} row(s): staggered "
        f"{best['staggered']:.2f} s; {ratio:.2f} of {options.starts} forwards (target {TARGET}), "
        f"{result['ratio_suffixes']:.2f} of the suffixes one by one; largest difference "
        f"{result['largest_difference']:.1e}"
    )


if __name__ == "__main__":
    main()
