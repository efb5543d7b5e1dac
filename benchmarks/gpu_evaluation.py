"""Position-wise loss of a full-sized model from 16k to a million positions on a GPU: time and peak memory.

    python benchmarks/gpu_evaluation.py --json gpu_evaluation.json
    python benchmarks/gpu_evaluation.py --shape toy --device cpu --lengths 1024 4096   # checks the script

Random weights in bf16, random tokens, one sequence; each length three times, medians.
"""

import argparse
import statistics
import time

import torch
from gpu_train import SHAPES

import longroll
from longroll.results import BenchmarkResult, provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mamba2-370m")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16_384, 131_072, 1_048_576])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", help="write the results here")
    options = parser.parse_args()
    started = time.perf_counter()
    config, kind, sizes = SHAPES[options.shape]
    torch.manual_seed(0)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    lm = longroll.RecurrentLM(kind(config(**sizes)).to(options.device, dtype).eval())
    tokens = torch.randint(lm.vocab_size, (1, max(options.lengths) + 1))
    longroll.position_loss(lm, tokens[:, : min(options.lengths) + 1])  # warm up
    cuda = options.device == "cuda"
    rows = []
    for length in options.lengths:
        seconds = []
        for _ in range(options.repeats):
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            longroll.position_loss(lm, tokens[:, : length + 1])
            seconds.append(time.perf_counter() - began)
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
        rows.append({"length": length, "seconds": seconds, "peak_gib": peak})
        median = statistics.median(seconds)
        print(f"{length:>8} {median:8.2f} s {length / median:10,.0f} tokens/s {peak:6.2f} GiB", flush=True)
    first, last = rows[-2:][0], rows[-1]
    times = [statistics.median(row["seconds"]) for row in (first, last)]
    ratios = {"time": times[1] / times[0], "peak_memory": last["peak_gib"] / (first["peak_gib"] or 1)}
    between = f"{last['length']} / {first['length']}"
    print(f"{between}: time {ratios['time']:.2f}, peak memory {ratios['peak_memory']:.3f}")
    if options.json:
        made = provenance(lm, seed=0, seconds=time.perf_counter() - started)
        result = {"options": vars(options), "rows": rows, "ratios": ratios, "provenance": made}
        BenchmarkResult.from_json({"what": "gpu_evaluation", **result}).write(options.json)


if __name__ == "__main__":
    main()
