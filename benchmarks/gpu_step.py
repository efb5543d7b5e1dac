"""A training step of the 370M Mamba-2 on a GPU: where its time goes, and what each change to it is worth.

    python benchmarks/gpu_step.py profile --json profile.json     # of the step as a CUDA graph, by kernel
    python benchmarks/gpu_step.py kernels --json kernels.json     # kernels alone, in other tiles
    python benchmarks/gpu_step.py steps --json steps.json         # steps with the changes, taking turns
    python benchmarks/gpu_step.py steps --tiles kernels.json      # and with the fastest tiles
    torchrun --nproc-per-node 4 benchmarks/gpu_step.py ranks --json ranks.json

State Passing, 4 x 2048 tokens, autocast to bfloat16, AdamW, as the row `step` of `big.py`. Variants are
settings of modules. The graphs of all variants take turns on one model, the first two from the beginning. At
the end each computes the gradients of a short row: `apart` is their distance from those in float32, in root
mean square. The results are written after each variant.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from big import PEAK, Bench, weights
from gpu_ops import both_ways, replayed, ssd_inputs
from kernel_classes import by_class

import longroll
from longroll.ops._backend import SWITCH
from longroll.results import BenchmarkResult, provenance
from longroll.training.graphs import StepGraph
from longroll.training.loss import loss_and_state

OPS = "longroll.ops.gpu"
SSD, CONV, NORM = f"{OPS}.ssd", f"{OPS}.short_conv", f"{OPS}.rms_norm"
MIXERS, NORMS = "longroll.families._mixers", "longroll.families._norms"

Settings = dict[str, Any]
"""`module:attribute` -> value; a dict is put into the dict that is there."""

BEFORE: Settings = {f"{MIXERS}:KEPT": 0.0, f"{MIXERS}:LINEAR": False, f"{NORMS}:ADDS": False}
KEPT: Settings = {f"{MIXERS}:KEPT": 1 / 4}
SUMS: Settings = {f"{NORMS}:ADDS": True}
LINEAR: Settings = {f"{MIXERS}:LINEAR": True}
ALL: Settings = {**KEPT, **SUMS, **LINEAR}
STEPS: dict[str, Settings] = {
    "before": {},
    "all": ALL,
    "all, nothing kept": {**SUMS, **LINEAR},
    "states and convolutions kept": KEPT,
    "residual added by the next norm": SUMS,
    "weights' gradients in float32": LINEAR,
}
"""The first has none of the changes that can be left out, the second all."""


SSDS: dict[str, Settings] = {
    "as it is": {},
    "of_x: early loads": {f"{SSD}:OF_X_64": {"EARLY": True}},
    "of_x: 2 heads in 2 stages": {f"{SSD}:OF_X": {"HEADS": 2, "num_stages": 2}},
    "walk: 4 stages": {f"{SSD}:WALK_64": {"num_stages": 4}},
    "walk: 1 chunk of 128 columns, 8 warps": {f"{SSD}:WALK_64": {"AT_ONCE": 1, "N": 128, "num_warps": 8}},
    "walk: 1 chunk of 128 columns, 8 warps, 4 stages": {
        f"{SSD}:WALK_64": {"AT_ONCE": 1, "N": 128, "num_warps": 8, "num_stages": 4}
    },
    "of_b_and_c: 2 stages": {f"{SSD}:OF_B_AND_C": {"num_stages": 2}},
    "outputs: 32 heads": {f"{SSD}:OUTPUTS": {"HEADS": 32}},
}
"""Kernel, colon, what is other. `best` takes the fastest of each kernel."""
CONVS: dict[str, Settings] = {
    f"{name.lower()}: {steps} steps, {channels} channels, {warps} warps": {
        f"{CONV}:{name}": {"STEPS": steps, "CHANNELS": channels, "num_warps": warps},
        f"{CONV}:CHANNELS": channels,
    }
    for name in ("FORWARD", "BACKWARD")
    for steps in (16, 32, 64, 128)
    for channels, warps in ((256, 2), (256, 4))
}
NORM_TILES: dict[str, Settings] = {
    f"{programs} programs": {f"{NORM}:_PROGRAMS": {"plain": programs, "gated": programs}}
    for programs in (132, 264, 512, 1024)
}


@contextlib.contextmanager
def settings(given: Settings) -> Iterator[None]:
    """Put settings into modules, and back."""
    before = {}
    for key, value in {**BEFORE, **given}.items():
        name, attribute = key.split(":")
        module = importlib.import_module(name)
        before[key] = module, attribute, getattr(module, attribute)
        old = before[key][2]
        setattr(module, attribute, old | value if isinstance(value, dict) else value)
    try:
        yield
    finally:
        for module, attribute, old in before.values():
            setattr(module, attribute, old)


class Steps:
    """The model, its optimizer and a graph of each variant, which share their memory."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.length = bench.size(2048, 64)
        self.lm = bench.model("mamba2-370m", torch.float32).train()
        self.ids = bench.tokens(self.lm, 4, self.length).to(bench.device)
        self.optimizer = torch.optim.AdamW(self.lm.parameters(), lr=1e-4, fused=bench.cuda)
        self.passing = longroll.StatePassing()
        self.pool = torch.cuda.graph_pool_handle() if bench.cuda else None

    def graph(self, given: Settings) -> StepGraph:
        """Capture a variant's step."""
        with settings(given):
            graph = StepGraph(self.lm, dtype=torch.bfloat16, pool=self.pool)
            graph.capture(self.ids[:, :-1])
        return graph

    def gradients(self, given: Settings, kernels: str = "triton", *, low: bool = True) -> torch.Tensor:
        """Gradients of all weights, one after another, of a short row from a state that is not zero.

        Under autocast to bfloat16 if `low`, else in float32.
        """
        ids = self.ids[:1, : self.length // 4 + 1]
        generator = torch.Generator(self.bench.device).manual_seed(3)
        zero = self.lm.zero_state(1)
        state = type(zero)(
            {
                key: torch.randn(t.shape, generator=generator, device=t.device, dtype=t.dtype)
                for key, t in zero.items()
            }
        )
        os.environ[SWITCH] = kernels
        with settings(given), torch.autocast("cuda", torch.bfloat16, enabled=low):
            loss_and_state(self.lm, ids[:, :-1], ids[:, 1:], state)[0].backward()
        os.environ[SWITCH] = "triton"
        found = torch.cat([p.grad.flatten() for p in self.lm.parameters() if p.grad is not None])
        self.optimizer.zero_grad()
        return found

    def run(self, graph: StepGraph) -> None:
        """A step of State Passing."""
        state = self.passing.initial_state({"input_ids": self.ids})
        _, final = graph(self.ids[:, :-1], self.ids[:, 1:], state)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.passing.observe(final)


def profile(bench: Bench, given: Settings) -> dict[str, Any]:
    """Milliseconds of a step by class of kernel and by kernel."""
    steps = Steps(bench)
    graph = steps.graph(given)
    for _ in range(3):
        steps.run(graph)
    calls = 4
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        steps.run(graph)
    torch.cuda.synchronize()
    wall = (time.perf_counter() - began) / calls * 1000
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CPU, kind.CUDA]) as profiler:
        for _ in range(calls):
            steps.run(graph)
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("Optimizer."):
            kernels.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1000)
    table = [
        {"kernel": name[:160], "calls": len(ms) / calls, "ms": sum(ms) / calls}
        for name, ms in kernels.items()
    ]
    table.sort(key=lambda row: -row["ms"])
    classes = by_class(table)
    bench.free()
    return {"step_ms": wall, "gpu_ms": sum(classes.values()), "classes": classes, "kernels": table[:60]}


def kernels(only: Iterable[str], write: Callable[[dict[str, Any]], None]) -> dict[str, dict[str, Any]]:
    """Milliseconds of SSD, convolution and norms in other tiles, each as a CUDA graph."""
    table: dict[str, dict[str, Any]] = {}
    for what, variants in (("ssd", SSDS), ("conv", CONVS), ("norm", NORM_TILES)):
        if what not in only:
            continue
        calls = {"ssd": _ssd_calls, "conv": _conv_calls, "norm": _norm_calls}[what]()
        exact: dict[str, list[torch.Tensor]] = {}
        for name, given in variants.items():
            row: dict[str, Any] = {}
            for call, (run, results) in calls.items():
                if what == "conv" and call not in name:
                    continue
                try:
                    with settings(given):
                        found = [t.detach().double() for t in results()]
                        exact.setdefault(call, found)
                        pairs = zip(found, exact[call], strict=True)
                        row[call] = {"ms": replayed(run)}
                        row[call]["apart"] = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
                except Exception as error:  # too little shared memory, say
                    first = (str(error).splitlines() or [""])[0]
                    row[call] = {"error": f"{type(error).__name__}: {first[:200]}"}
            table[f"{what}, {name}"] = row
            print(f"{what:5} {name:45} {row}", flush=True)
            write(table)
    return table


def best(rows: dict[str, dict[str, Any]]) -> Settings:
    """Return the settings of the fastest variant of each kernel of the SSD, of results of `kernels`."""
    found: dict[str, tuple[float, Settings]] = {}
    usual = rows.get("ssd, as it is", {}).get("forward_backward", {}).get("ms", 0.0)
    for name, given in SSDS.items():
        row = rows.get(f"ssd, {name}", {})
        if "ms" in row.get("forward_backward", {}) and row["forward_backward"]["apart"] < 1e-2:
            kernel, ms = name.split(":")[0], row["forward_backward"]["ms"]
            if ms < min(0.99 * usual, found.get(kernel, (ms + 1, {}))[0]):
                found[kernel] = ms, given
    return {key: value for _, given in found.values() for key, value in given.items()}


def _rows(file: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a result file; none where it was not written."""
    path = Path(file)
    return json.loads(path.read_text())["rows"] if path.exists() else {}


def _ssd_calls() -> dict[str, tuple[Any, Any]]:
    forward, leaves = ssd_inputs((4, 2048, 32, 64, 128))

    def results() -> list[torch.Tensor]:
        outputs = forward()
        return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])]

    return {
        "forward": (torch.no_grad()(forward), lambda: torch.no_grad()(forward)()),
        "forward_backward": (both_ways(forward, leaves), results),
    }


def _conv_calls() -> dict[str, tuple[Any, Any]]:
    from longroll.ops.gpu import short_conv

    wide = torch.randn(4, 2048, 4384, device="cuda", dtype=torch.bfloat16)
    x, dx = wide[..., 2048:4352], torch.empty_like(wide)[..., 2048:4352]
    weight, bias = torch.randn(2304, 4, device="cuda"), torch.randn(2304, device="cuda")
    past, dy = torch.randn(4, 3, 2304, device="cuda"), torch.randn_like(x).contiguous()

    def forward() -> Any:
        return short_conv.forward(x, weight, bias, past, True)

    def backward() -> Any:
        return short_conv.backward(dy, x, weight, bias, past, True, dx)

    return {
        "forward": (forward, lambda: [forward()]),
        "backward": (backward, lambda: [*backward(), dx.clone()]),
    }


def _norm_calls() -> dict[str, tuple[Any, Any]]:
    from longroll.ops.gpu import rms_norm

    found = {}
    wide = torch.randn(4, 2048, 4384, device="cuda", dtype=torch.bfloat16)
    for name, size, gate, dtype in (
        ("gated", 2048, wide[..., :2048], torch.bfloat16),
        ("plain", 1024, None, torch.float32),
    ):
        x = torch.randn(4, 2048, size, device="cuda", dtype=dtype)
        weight, dy = torch.ones(size, device="cuda"), torch.randn_like(x).bfloat16()
        rstd = rms_norm.forward(x, weight, gate, 1e-5, size, torch.bfloat16)[1]
        dgate = None if gate is None else torch.empty_like(wide)[..., :2048]

        def backward(x=x, weight=weight, gate=gate, rstd=rstd, dy=dy, dgate=dgate) -> Any:
            return rms_norm.backward(dy, x, weight, gate, rstd, dgate)

        found[name] = backward, backward
    return found


def _tried(call: Callable[[], None]) -> dict[str, Any]:
    """Call, and return what went wrong."""
    try:
        call()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}
    return {}


def steps(
    bench: Bench, names: Iterable[str], turns: int, seconds: float, write: Callable[[dict[str, Any]], None]
) -> dict[str, dict[str, Any]]:
    """Milliseconds of a step with each variant: medians over turns of ten steps.

    The first two variants are captured and timed by turns, then one further variant after another by turns
    with the second one, as long as the last one's seconds are left; `write` gets the rows. Distances of
    gradients come last: a backward in another stream would spoil later captures.
    """
    began = time.perf_counter()
    made = Steps(bench)
    rows: dict[str, dict[str, Any]] = {}
    graphs: dict[str, StepGraph] = {}
    tokens = 4 * made.length
    parameters = weights(made.lm)["parameters"]
    peak = PEAK.get(torch.cuda.get_device_name())

    def left() -> float:
        return seconds - (time.perf_counter() - began)

    def capture(name: str) -> None:
        since = time.perf_counter()
        torch.cuda.reset_peak_memory_stats()
        rows[name] = _tried(lambda: graphs.update({name: made.graph(STEPS[name])}))
        rows[name] |= {"capture_seconds": time.perf_counter() - since, "ms": []}
        rows[name]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30

    def turn(name: str, steps: int = 10) -> float:
        torch.cuda.synchronize()
        since = time.perf_counter()
        for _ in range(steps):
            made.run(graphs[name])
        torch.cuda.synchronize()
        return (time.perf_counter() - since) / steps * 1000

    def measure(*captured: str) -> None:
        captured = tuple(name for name in captured if name in graphs)
        for name in captured:
            turn(name, 3)
        for _ in range(turns):
            for name in captured:
                rows[name]["ms"].append(turn(name))
        for name in captured:
            row = rows[name]
            row["median_ms"] = statistics.median(row["ms"])
            row["tokens_per_second"] = tokens / row["median_ms"] * 1000
            row["mfu"] = 6 * parameters * row["tokens_per_second"] / peak if peak else None
            each = f"{row['tokens_per_second']:9,.0f} tokens/s {row['mfu']}"
            print(f"{name:35} {row['median_ms']:7.2f} ms {each}", flush=True)
        write(rows)

    first, *others = names
    second, *others = others or [first]
    for name in dict.fromkeys((first, second)):
        capture(name)
    measure(*dict.fromkeys((first, second)))
    needed = 0.0
    for name in others:
        if left() < needed:
            print(f"{name}: {left():.0f} s are left", flush=True)
            break
        since = time.perf_counter()
        capture(name)
        measure(second, name)
        needed = 1.5 * (time.perf_counter() - since)
    if left() < needed:
        return rows
    exact = made.gradients({}, "torch", low=False)
    usual = ((made.gradients({}, "torch") - exact).norm() / exact.norm()).item()
    print(f"PyTorch in bfloat16: {usual:.4f} apart from float32", flush=True)
    for name in graphs:
        if left() < 0:
            break
        rows[name]["apart_in_pytorch"] = usual
        found: list[torch.Tensor] = []
        rows[name] |= _tried(lambda name=name, found=found: found.append(made.gradients(STEPS[name])))
        if found:
            rows[name]["apart"] = ((found[0] - exact).norm() / exact.norm()).item()
        print(f"{name:35} {rows[name].get('apart')} apart", flush=True)
        write(rows)
    return rows


def ranks(bench: Bench, seconds: float, write: Callable[[dict[str, Any]], None]) -> dict[str, dict[str, Any]]:
    """A step on all ranks, each with rows of its own: without and with sums of the gradients in the graph.

    `apart`: the sums beside those of the gradients that the first graph leaves, in root mean square.
    """
    began = time.perf_counter()
    made = Steps(bench)
    world, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator(bench.device).manual_seed(rank)
    made.ids = torch.randint(made.lm.vocab_size, made.ids.shape, generator=generator, device=bench.device)
    parameters, peak = weights(made.lm)["parameters"], PEAK.get(torch.cuda.get_device_name())
    graphs, found, rows = {}, {}, dict[str, dict[str, Any]]()
    for name, exchange in (("alone", False), ("sums in the graph", True)):
        since = time.perf_counter()
        with settings(ALL):
            graphs[name] = StepGraph(made.lm, dtype=torch.bfloat16, pool=made.pool, exchange=exchange)
            graphs[name].capture(made.ids[:, :-1])
        rows[name] = {"ranks": world, "capture_seconds": time.perf_counter() - since, "ms": []}
        graphs[name](made.ids[:, :-1], made.ids[:, 1:])
        found[name] = torch.cat([p.grad.flatten() for p in made.lm.parameters() if p.grad is not None])
        made.optimizer.zero_grad()
    dist.all_reduce(found["alone"])
    distance = (found["sums in the graph"] - found["alone"]).norm() / found["alone"].norm()
    rows["sums in the graph"]["apart"] = distance.item()
    del found
    for turn in range(100):
        for name, graph in graphs.items():
            dist.barrier()
            torch.cuda.synchronize()
            since = time.perf_counter()
            for _ in range(10):
                made.run(graph)
            torch.cuda.synchronize()
            if turn:
                rows[name]["ms"].append((time.perf_counter() - since) * 100)
                row = rows[name]
                row["median_ms"] = statistics.median(row["ms"])
                row["tokens_per_second"] = 4 * world * made.length / row["median_ms"] * 1000
                row["mfu"] = 6 * parameters * row["tokens_per_second"] / world / peak if peak else None
        if turn:
            shared, alone = rows["sums in the graph"], rows["alone"]
            shared["of_linear"] = alone["median_ms"] / shared["median_ms"]
            if rank == 0:
                write(rows)
        late = torch.tensor(int(time.perf_counter() - began > seconds or turn == 8), device=bench.device)
        dist.broadcast(late, 0)
        if late.item():
            break
    if rank == 0:
        for name, row in rows.items():
            print(name, {k: v for k, v in row.items() if k != "ms"}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["profile", "kernels", "steps", "ranks"])
    parser.add_argument("--only", nargs="+", help="variants of steps; or ssd, conv and norm; default: all")
    parser.add_argument("--variant", default="before", choices=STEPS, help="whose profile")
    parser.add_argument("--tiles", help="results of kernels: a variant with the fastest of each comes third")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=600, help="capture no further variant after these")
    parser.add_argument("--tiny", action="store_true", help="a tiny model")
    parser.add_argument("--json", help="write the results here")
    options = parser.parse_args()
    began = time.perf_counter()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    if options.what == "ranks":
        dist.init_process_group("nccl", device_id=device)
    bench = Bench(device, options.tiny, 1, None, None)  # type: ignore[arg-type]

    def write(rows: dict[str, Any]) -> None:
        if options.json:
            made = provenance(seed=0, seconds=time.perf_counter() - began, device="cuda")
            result = {"what": f"gpu_step_{options.what}", "options": vars(options), "rows": rows}
            BenchmarkResult.from_json(result | {"provenance": made}).write(options.json)

    torch.manual_seed(0)
    if options.what == "profile":
        tiles = best(_rows(options.tiles)) if options.tiles else {}
        found: dict[str, Any] = {options.variant: profile(bench, {**STEPS[options.variant], **tiles})}
        print(found[options.variant]["step_ms"], found[options.variant]["classes"])
    elif options.what == "kernels":
        found = kernels(options.only or ("ssd", "conv", "norm"), write)
    elif options.what == "ranks":
        found = ranks(bench, options.seconds, write)
        dist.destroy_process_group()
        return
    else:
        if options.tiles:
            STEPS["all, best tiles"] = {**ALL, **best(_rows(options.tiles))}
        first = ["before", "all", *(["all, best tiles"] if options.tiles else [])]
        found = steps(
            bench, options.only or dict.fromkeys([*first, *STEPS]), options.turns, options.seconds, write
        )
    write(found)


if __name__ == "__main__":
    main()
