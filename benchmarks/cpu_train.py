"""Train and run Mamba on a CPU: transformers' own path against longroll's, side by side in one run.

Random weights in transformers' classes (hidden 768, 2 layers, vocabulary 64), batch 1, float32. Every
measurement has its own process, so that its peak memory is its own; the two sides take turns, so that a busy
machine slows both. Prints a table and, with --json, writes the values with what is needed to read them.

    OMP_WAIT_POLICY=ACTIVE python benchmarks/cpu_train.py --json cpu_train.json   # an idle machine, 5 minutes
    python benchmarks/cpu_train.py --quick                 # 1 minute, small T
    python benchmarks/cpu_train.py --threads 1             # on a machine that others use: see cpu_seconds
    python benchmarks/cpu_train.py --profile --json profile.json      # where longroll's steps go, one thread

With several threads on a busy machine every operation waits for the slowest thread, and the wall clock says
little. With one thread, processor time (which the table then shows) does not depend on that.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

# Threads that sleep while they wait: with the default, which spins, a machine that others use measured 2 to
# 10 times slower on either side; threads that spin suit an idle one. What the caller has set stays.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}


class Case(NamedTuple):
    """One measurement: a `side` ("transformers", "longroll") at `work` ("train", "forward")."""

    model: str
    work: str
    time: int
    side: str
    repeats: int
    warmup: int = 1


def cases(quick: bool) -> list[Case]:
    def pair(model, work, time, repeats=5):
        return [Case(model, work, time, side, repeats) for side in ("transformers", "longroll")]

    if quick:
        return [
            Case("mamba", "train", 128, "transformers", 2, 0),
            Case("mamba", "train", 128, "longroll", 5),
            *pair("mamba", "forward", 512, 3),
            *pair("mamba2", "train", 512, 3),
        ]
    return [
        Case("mamba", "train", 512, "transformers", 1, 0),  # quadratic: 35 s a step
        *(Case("mamba", "train", T, "longroll", max(3, 4096 // T)) for T in (512, 1024, 2048, 4096, 8192)),
        *pair("mamba", "forward", 512),
        *pair("mamba", "forward", 2048),
        *pair("mamba2", "train", 2048),
        *pair("mamba2", "forward", 2048),
    ]


def build(model: str):
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "num_hidden_layers": 2, "vocab_size": 64}
    if model == "mamba":
        return MambaForCausalLM(MambaConfig(**sizes))
    return Mamba2ForCausalLM(Mamba2Config(**sizes, num_heads=24, head_dim=64, state_size=128, n_groups=1))


def memory(field: str) -> float:
    """MiB of this process, VmRSS now or VmHWM at most since the last reset; 0 where /proc is absent."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0.0
    return int(re.search(rf"{field}:\s+(\d+)", status)[1]) / 1024


def measure(case: Case, threads: int | None) -> dict:
    """Run one case in this process: seconds of each repetition and the peak above the loaded model."""
    import torch
    import transformers

    if threads:
        torch.set_num_threads(threads)

    transformers.logging.set_verbosity_error()
    model = build(case.model)
    if case.side == "longroll":
        from longroll import RecurrentLM

        lm = RecurrentLM(model)  # the weights are transformers' own, the path is longroll's
    tokens = torch.randint(0, 64, (1, case.time))
    targets = torch.randint(0, 64, (case.time,))

    def logits():
        return lm(tokens)[0] if case.side == "longroll" else model(tokens, use_cache=False).logits

    def step():
        if case.work == "forward":
            with torch.no_grad():
                return logits()
        model.zero_grad()
        return torch.nn.functional.cross_entropy(logits()[0], targets).backward()

    model.train(case.work == "train")
    loaded = memory("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except OSError:
        print("no /proc/self/clear_refs: the peak includes loading", file=sys.stderr)
    seconds, cpu_seconds = [], []
    for i in range(case.warmup + case.repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        step()
        if i >= case.warmup:
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mib": memory("VmHWM") - loaded,
        "threads": torch.get_num_threads(),
    }


KINDS = {
    "matrix products": ("mm", "bmm", "addmm", "baddbmm", "linear", "mkldnn::_linear_pointwise"),
    "exponentials": (
        "exp",
        "exp2",
        "softplus",
        "sigmoid",
        "silu",
        "log1p",
        "softplus_backward",
        "silu_backward",
    ),
    "copies": ("copy_", "clone", "contiguous", "cat", "stack", "fill_", "zero_"),
    "sums": ("sum", "cumsum", "logsumexp"),
}
"""Kinds of operation, and the names of PyTorch's that are of a kind; the others are elementwise."""


def profile(case: Case, steps: int = 2) -> dict:
    """Where the processor time of a training step goes, and how it compares with what the machine can do."""
    import torch

    torch.set_num_threads(1)  # the profiler's clock is the wall's: of one thread it tells most
    from longroll import RecurrentLM

    lm = RecurrentLM(build(case.model)).train()
    tokens, targets = torch.randint(0, 64, (1, case.time)), torch.randint(0, 64, (case.time,))

    def step() -> None:
        lm.zero_grad()
        torch.nn.functional.cross_entropy(lm(tokens)[0][0], targets).backward()

    step()
    began = time.process_time()
    for _ in range(steps):
        step()
    whole = (time.process_time() - began) / steps
    cpu = [torch.profiler.ProfilerActivity.CPU]
    # the profiler counts PyTorch's products, and not oneDNN's
    with (
        torch.backends.mkldnn.flags(enabled=False),
        torch.profiler.profile(activities=cpu, with_flops=True) as counted,
    ):
        step()
    with torch.profiler.profile(activities=cpu) as run:
        for _ in range(steps):
            step()
    found = {e.key: e for e in run.key_averages() if e.self_cpu_time_total > 0}
    total = sum(e.self_cpu_time_total for e in found.values())
    rows = [
        {
            "operation": name,
            "kind": _kind(name),
            "calls": e.count / steps,
            "ms": e.self_cpu_time_total / steps / 1000,
            "share": e.self_cpu_time_total / total,
        }
        for name, e in sorted(found.items(), key=lambda pair: -pair[1].self_cpu_time_total)
    ]
    kinds: dict[str, float] = {}
    for row in rows:
        kinds[row["kind"]] = kinds.get(row["kind"], 0) + row["share"]
    flops = sum(e.flops for e in counted.key_averages() if _kind(e.key) == "matrix products")
    machine = _machine(case.time)
    least = flops / machine["product_flops_per_second"]
    return {
        **case._asdict(),
        "cpu_seconds": whole,
        "tokens_per_cpu_second": case.time / whole,
        "kinds": kinds,
        "flops": flops,
        "machine": machine,
        "products_at_their_best_seconds": least,
        "bound": f"{least / whole:.0%} of a step is what its matrix products take at this machine's best; "
        + ", ".join(f"{kind} {share:.0%}" for kind, share in sorted(kinds.items(), key=lambda k: -k[1])),
        "operations": rows[:40],
    }


def _kind(name: str) -> str:
    plain = name.removeprefix("aten::").rstrip("_")
    for kind, names in KINDS.items():
        if plain in names or f"{plain}_" in names:
            return kind
    return "elementwise" if name.startswith("aten::") else "Python and autograd"


def _machine(tokens: int) -> dict[str, float]:
    """Best of ten: flops of a product of a step's largest shape, and bytes of a copy, in a second."""
    import torch

    a, b = torch.randn(tokens, 768), torch.randn(768, 3072)
    x = torch.randn(1 << 24)
    y = torch.empty_like(x)

    def best(call) -> float:
        seconds = []
        for _ in range(10):
            start = time.process_time()
            call()
            seconds.append(time.process_time() - start)
        return min(seconds)

    from longroll.ops._linear import is_faster, linear

    weight = b.t().contiguous()
    seconds = best(lambda: torch.mm(a, b))
    if is_faster(a, weight):
        seconds = min(seconds, best(lambda: linear(a, weight)))
    return {
        "product_flops_per_second": 2 * tokens * 768 * 3072 / seconds,
        "copy_bytes_per_second": 8 * x.numel() / best(lambda: y.copy_(x)),
    }


def measure_apart(case: Case, threads: int | None) -> dict:
    """Run one case in a fresh process."""
    command = [sys.executable, __file__, "--case", json.dumps(case._asdict())]
    command += ["--threads", str(threads)] if threads else []
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT)
    return json.loads(done.stdout.splitlines()[-1])


def summarize(case: Case, runs: list[dict]) -> dict:
    seconds, cpu_seconds = ([s for run in runs for s in run[key]] for key in ("seconds", "cpu_seconds"))
    median = statistics.median(cpu_seconds if runs[0]["threads"] == 1 else seconds)
    return {
        **case._asdict(),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "median_seconds": median,
        "tokens_per_second": case.time / median,
        "peak_mib": statistics.median(run["peak_mib"] for run in runs),
    }


def table(rows: list[dict]) -> str:
    """One line a case; longroll's carries the ratios to transformers' on the same work."""
    lines = [
        f"{'model':8}{'work':9}{'T':>6}  {'side':14}{'tokens/s':>10}{'peak MiB':>10}{'speed':>9}{'memory':>8}"
    ]
    peers = {(r["model"], r["work"], r["time"]): r for r in rows if r["side"] == "transformers"}
    for r in rows:
        peer = peers.get((r["model"], r["work"], r["time"]))
        ratios = ""
        if r["side"] == "longroll" and peer:
            r["speed_ratio"] = r["tokens_per_second"] / peer["tokens_per_second"]
            r["memory_ratio"] = r["peak_mib"] / peer["peak_mib"] if peer["peak_mib"] else None
            ratios = f"{r['speed_ratio']:8.1f}x{r['memory_ratio'] or float('nan'):8.2f}"
        lines.append(
            f"{r['model']:8}{r['work']:9}{r['time']:6}  {r['side']:14}"
            f"{r['tokens_per_second']:10.0f}{r['peak_mib']:10.0f}{ratios}"
        )
    return "\n".join(lines)


def write_profiles(file: Path | None) -> None:
    """Profile Mamba at T = 512 and Mamba-2 at T = 2048; print what bounds them."""
    from longroll.results import BenchmarkResult, provenance

    began, rows = time.perf_counter(), []
    for case in (Case("mamba", "train", 512, "longroll", 1), Case("mamba2", "train", 2048, "longroll", 1)):
        rows.append(profile(case))
        print(
            f"{case.model} {case.time}: {rows[-1]['tokens_per_cpu_second']:.0f} tokens/s. {rows[-1]['bound']}"
        )
        for row in rows[-1]["operations"][:12]:
            print(f"  {row['share']:6.1%} {row['ms']:8.2f} ms {row['calls']:8.0f} x {row['operation']}")
    if file is not None:
        made = provenance(seed=0, seconds=time.perf_counter() - began) | {"threads": 1, "dtype": "float32"}
        clock = "processor time, on a machine that others used; shares are the profiler's wall clock"
        result = {"what": "train-profile", "rows": rows, "clock": clock, "provenance": made}
        BenchmarkResult.from_json(result).write(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the values to this file")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter cases")
    parser.add_argument("--rounds", type=int, default=2, help="how often to go through all cases (default 2)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--only", default="", help="only cases whose 'model work side' contains this")
    parser.add_argument("--profile", action="store_true", help="profile longroll's training steps instead")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(Case(**json.loads(options.case)), options.threads)))
        return

    if options.profile:
        write_profiles(options.json)
        return
    began = time.perf_counter()
    chosen = [c for c in cases(options.quick) if options.only in f"{c.model} {c.work} {c.side}"]
    runs: dict[Case, list[dict]] = {case: [] for case in chosen}
    for turn in range(1 if options.quick else options.rounds):
        for case in chosen:
            if turn and not case.warmup:
                continue  # half a minute a step: once is enough
            runs[case].append(measure_apart(case, options.threads))
            print(f"{case.model} {case.work} {case.time} {case.side}: done", file=sys.stderr)
    rows = [summarize(case, done) for case, done in runs.items()]
    print(table(rows))
    if options.json:
        from longroll.results import provenance

        result = {
            "kind": "benchmark",
            "schema_version": 1,
            "what": "train",
            "provenance": {
                **provenance(seed=0, seconds=time.perf_counter() - began),
                "threads": next(iter(runs.values()))[0]["threads"],
                "dtype": "float32",
            },
            "rows": rows,
            "clock": "processor time" if options.threads == 1 else "wall",
            "omp_wait_policy": ENVIRONMENT["OMP_WAIT_POLICY"],
            "batch": 1,
            "model": "hidden 768, 2 layers, vocabulary 64, random weights",
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
