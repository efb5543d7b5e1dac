"""Remake the tables of Markdown pages from result files.

    python benchmarks/tables.py            # write the tables into the pages
    python benchmarks/tables.py --check    # fail if a page differs from its result files

A page holds `<!-- table: NAME -->`, the table, and `<!-- /table -->`. TABLES maps each name to a function.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from kernel_classes import by_class

from longroll.tasks.state_tracking import product_table

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "recipes"))
GLOBS = ("README.md", "docs/**/*.md", "benchmarks/*.md", "recipes/*.md")
REGION = re.compile(r"(<!-- table: ([\w.-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
WAYS = {
    "zero": "zero state",
    "sp": "State Passing",
    "tbptt": "TBPTT",
    "fitted": "Fitted Noise",
    "random": "Random Noise",
}
ENDINGS = {
    "time": "SIGKILL to all, at a time",
    "term": "SIGTERM to all, at a time",
    "launcher": "SIGKILL to torchrun",
    "step": "SIGKILL to one, at a step",
    "report": "SIGKILL to one, at a report of progress",
    "within": "SIGKILL to one, at a file operation or a forward",
}
"""How `kill_resume.py` ends runs, in words."""

SEEDS = "-seeds_h200_2026-11-27"
BIG = "_h200_2026-11-26"
REAL_SIZES = {
    "loss": "loss, 9.8B hybrid, 1 x 131,072",
    "diagnose": "`diagnose --no-explain`, 9.8B hybrid, 4 x 16,384",
    "diagnose-causes": "`diagnose`, 9.8B hybrid, 4 x 16,384",
    "lora": "LoRA 16, 9.8B hybrid, 2 x 4,096",
    "lora-int8": "the same, weights in 8 bits",
    "all-weights": "all weights, 2.7B Mamba-2, 4 x 2,048",
    "all-weights-graphs": "the same as a CUDA graph, 3 x 2,048",
    "all-weights-accumulated": "the same without a graph, 4 micro-batches of 3 x 2,048",
    "million": "loss, 1.1B hybrid, 1 x 1,048,576",
    "nemotron-h-loss": "loss, Nemotron-H of 8B, 1 x 65,536",
    "nemotron-h-lora": "LoRA 16, Nemotron-H of 8B, 2 x 4,096",
    "falcon-h1-loss": "loss, Falcon-H1 of 7.6B, 1 x 65,536",
    "falcon-h1-lora": "LoRA 16, Falcon-H1 of 7.6B, 2 x 4,096",
    "qwen3-next-loss": "loss, Qwen3-Next of 6B, 1 x 65,536",
    "qwen3-next-lora": "LoRA 16, Qwen3-Next of 6B, 2 x 4,096",
    "two-gpus": "loss, 29.8B hybrid over two GPUs, 1 x 131,072",
}
"""Row of big.py -> what it is."""

OPS = ("gla", "rwkv6", "rwkv7", "retention", "delta_rule", "gated_delta_rule", "kda")


@cache
def result(name: str) -> Any:
    """Return a result file of benchmarks/results, or of recipes/results, by its name without the suffix."""
    (file,) = (f for f in ROOT.glob(f"*/results/{name}.json"))
    return json.loads(file.read_text())


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is left-aligned, the others right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def digits(number: float, significant: int = 3) -> str:
    """Return a number with so many significant digits, and thousands separators."""
    if number == 0:
        return "0"
    rounded = float(f"{number:.{significant - 1}e}")
    places = significant - 1 - int(f"{rounded:e}".split("e")[1])
    return f"{rounded:,.{max(0, places)}f}"


def tiny(number: float) -> str:
    """Return an error: 3.0e-3."""
    return "0" if number == 0 else re.sub(r"e-0?", "e-", f"{number:.1e}")


def repaired(model: str, arms: Sequence[str] | None = None) -> str:
    """Return arms of one model of recipes/repair.py; None: all, the best first."""
    from repair_table import Model, arms_table

    return arms_table(Model(result(REPAIR)["models"][model]), arms)


def repair_default() -> str:
    """Return the default recipe beside plain steps and the paper's, on each model that was repaired."""
    return _over_models(DEFAULTS, ["base", "none", "default", "default-sp", "sp", "tbptt"])


def repair_ladder() -> str:
    """Return the default recipe with a ladder of depths and KL to the base."""
    best = "tbptt{} zero=0.1 speed=30 rate=0.001 train=scales{}"
    ladder = ["tbptt-depths speed=30 rate=0.001 train=scales", "tbptt-depths speed=30 keep=1"]
    arms = [best.format("", ""), best.format("", " keep=1"), ladder[0], f"{ladder[0]} keep=1", ladder[1]]
    chosen = ("mamba2-22m", "mamba2-103m-30m", "granite-33m-slow", "gla-36m", "mamba2-22m-holds")
    return _over_models({name: label for name, label in DEFAULTS.items() if name in chosen}, arms)


def _over_models(names: Mapping[str, str], arms: Sequence[str], file: str = "") -> str:
    from repair_table import Model, compared_table

    found = result(file or REPAIR_DEFAULT)["models"]
    return compared_table({label: Model(found[name]) for name, label in names.items() if name in found}, arms)


def repair_short() -> str:
    """Return the default recipe on documents of 4 T, and with faster decays, beside plain steps."""
    arms = ["base", "none", "default", "default speed=100", "default rate=0.003", "default windows=4"]
    arms += [f"default {how} windows=4" for how in ("speed=100", "rate=0.003")]
    arms += [f"tbptt zero=0.1 speed=30 rate=0.001 train={what}" for what in
             ("gates rows=16", "scales rows=16 windows=4")]  # fmt: skip
    return _over_models(DEFAULTS | {"gla-36m-bias": "GLA 36M, biases free"}, arms, REPAIR_SHORT)


def repair_scores() -> str:
    """Return lm-eval's scores before and after the default recipe and plain steps."""
    from repair_table import scores_table

    names = {"base": "before", "none rate=0.0001": "plain steps", "default": "default recipe"}
    names["default windows=4"] = "documents of 4 T: State Passing, decays x 30"
    models = result(SCORES)["models"]
    return scores_table(
        {DEFAULTS[name]: models[name] for name in DEFAULTS if name in models}, names, "none rate=0.0001"
    )


def tasks_at_size() -> str:
    """Return passkey and BABILong at 103M parameters, the mean over depths and questions, by length."""
    runs, rows = result(LONG_TASKS)["runs"], []
    names = {"plain": "plain steps", "fitted": "Fitted Noise", "sp": "State Passing", "tbptt": "TBPTT"}
    longest = 0
    for task in ("passkey", "babilong"):
        for arm, label in names.items():
            run = runs.get(f"{task}-{arm}")
            if run:
                means = [statistics.mean(cells) for cells in run["tasks"][task]["accuracy"]]
                longest = max(longest, len(means))
                rows.append(
                    [f"{'BABILong' if task == 'babilong' else task}, {label}", *(f"{m:.2f}" for m in means)]
                )
    heads = ["", "T", *(f"{2**i} T" for i in range(1, longest))]
    return markdown(heads, [row + [""] * (len(heads) - len(row)) for row in rows])


def repair_aim() -> str:
    """Return the gap of the default recipe on each model, and what the text alone makes of it."""
    from repair_table import Model, aim_table

    found = result(REPAIR_DEFAULT)["models"]
    return aim_table({label: Model(found[name]) for name, label in DEFAULTS.items()})


def repair_settings() -> str:
    """Return the default recipe on 32 rows with one setting changed."""
    from repair_table import Model, arms_table

    best = "tbptt zero=0.1 speed=30{} train={}"
    arms = [best.format(" rate=0.001", what) for what in ("scales", "norms", "decays")]
    arms += [best.format(rate, "scales") for rate in ("", " rate=0.003")]
    arms += [f"tbptt zero=0.1 speed={speed} rate=0.001 train=scales" for speed in (10, 100)]
    arms += [f"{arms[0]} steps={steps}" for steps in (125, 250, 1000)]
    arms += ["tbptt zero=0.25 speed=30 rate=0.001 train=scales"]
    arms += [f"sp zero={zero} speed=30 rate=0.001 train=scales" for zero in (0.1, 0.25)]
    return arms_table(Model(result(REPAIR_DEFAULT)["models"]["mamba2-22m"]), arms)


def repair_documents() -> str:
    """Return TBPTT and State Passing on documents of so many windows, on the specimen."""
    ways, rows = result("default-repair_cpu_2026-11-26")["ways"], []
    for windows in (32, 16, 8, 4, 2, 1):
        cells = [str(windows)]
        for name in ("tbptt", "sp"):
            way = ways[f"{name}, documents of {windows} windows"]
            cells += [f"{way['in_range']:.3f}", f"{way['far']:.3f}", f"{way['above_fresh']:+.3f}"]
        rows.append(cells)
    heads = [
        f"{name}, {of}" for name in ("TBPTT", "State Passing") for of in ("in range", "8k to 16k", "above")
    ]
    return markdown(["windows of T in a document", *heads], rows)


def repair_rates() -> str:
    """Return each intervention at three learning rates."""
    from repair_table import Model, grid_table

    kinds = {"none": "none", "random": "Random Noise", "fitted": "Fitted Noise", "sp": "State Passing"}
    kinds |= {"tbptt": "TBPTT", "sp zero=0.1": "State Passing, zero .1", "tbptt zero=0.1": "TBPTT, zero .1"}
    kinds |= {f"{kind} zero=0.1 speed=30": f"{name}, zero .1, decays x 30" for kind, name in FAST.items()}
    rows = {name: [f"{arm} rate=0.0001", arm, f"{arm} rate=0.001"] for arm, name in kinds.items()}
    return grid_table(Model(result(REPAIR)["models"]["mamba2-22m"]), "", rows, ["1e-4", "3e-4", "1e-3"])


def repair_zero() -> str:
    """Return State Passing and TBPTT by the share of zero rows, at two speeds of the decays."""
    from repair_table import Model, grid_table

    rows = {}
    for kind, name in FAST.items():
        for speed in ("", " speed=30"):
            zeros = ["", " zero=0.1", " zero=0.25", " zero=0.5"]
            rows[f"{name}, decays x {30 if speed else 1}"] = [f"{kind}{zero}{speed}" for zero in zeros]
    heads = ["zero rows 0", ".1", ".25", ".5"]
    return grid_table(Model(result(REPAIR)["models"]["mamba2-22m"]), "", rows, heads)


def repair_trained() -> str:
    """Return State Passing and TBPTT by the parameters that are trained."""
    from repair_table import Model, grid_table

    found, rows = result(REPAIR)["models"]["mamba2-22m"], {}
    what = {"": "all", " train=lora": "LoRA of rank 16, decays", " train=norms": "norms, D, decays"}
    for part, label in (what | {" train=decays": "decays"}).items():
        arms = [f"{kind} zero=0.1 speed=30{rate}{part}" for kind in FAST for rate in ("", " rate=0.001")]
        rows[label] = [arm if arm in found else None for arm in arms]
    heads = [f"{name}, {rate}" for name in FAST.values() for rate in ("3e-4", "1e-3")]
    return grid_table(Model(found), "parameters trained", rows, heads)


def training(name: str, reference: str) -> str:
    """Return the training steps of one file: time, tokens/s, memory, MFU, overhead over the zero state."""
    data = result(name)
    options, rows = data["options"], data["rows"]
    tokens, speeds = options["batch"] * options["length"], {r["row"]: r["tokens_per_second"] for r in rows}
    names = {"triton": "longroll", "graphs": "longroll, CUDA graphs"}
    lines = []
    for row in rows:
        side, _, way = row["row"].partition(" ")
        label = f"{names[side]}, {WAYS[way]}" if way else row["row"]
        turns = [1e3 * seconds for seconds in row["seconds"][-options["turns"] :]]
        lines.append([
            label,
            digits(1e3 * tokens / row["tokens_per_second"], 4),
            f"{digits(min(turns), 4)} to {digits(max(turns), 4)}",
            digits(row["tokens_per_second"]),
            f"{row['tokens_per_second'] / speeds[reference]:.2f}",
            f"{row['peak_gib']:.1f}",
            f"{row['reserved_gib']:.1f}",
            f"{row['mfu']:.3f}",
            f"{100 * row['overhead']:+.2f} %" if way and way != "zero" else "",
        ])  # fmt: skip
    head = ["", "median step (ms)", "range over turns (ms)", "tokens/s", f"speed relative to {reference}"]
    return markdown([*head, "peak GiB", "reserved GiB", "MFU", "time over zero state"], lines)


def graphs(names: Sequence[tuple[str, str]]) -> str:
    """Return the overhead of each intervention over a CUDA graph that was captured without states."""
    lines = []
    for name, label in names:
        data = result(name)
        tokens = data["options"]["batch"] * data["options"]["length"]
        rows = {row["row"].removeprefix("graphs "): row for row in data["rows"]}
        base = 1e3 * tokens / rows["zero"]["tokens_per_second"]
        over = [f"{100 * rows[way]['overhead']:+.2f} %" for way in WAYS if way != "zero"]
        lines.append([label, *over, digits(base, 3)])
    return markdown(["", *list(WAYS.values())[1:], "step without states (ms)"], lines)


def loss() -> str:
    """Return time and memory of the loss with its gradients."""
    rows = result("loss_h100_2026-11-25")["rows"]
    sides = {
        "pytorch": "PyTorch",
        "fla": "fla",
        "liger": "Liger-Kernel",
        "longroll": "longroll",
        "longroll, whole": "longroll, in one piece",
    }
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    found = {(row["shape"], row["row"]): f"{digits(row['ms'])} ms, {row['peak_gib']:.2f} GiB" for row in rows}
    lines = [[shape.replace("x", " x "), *[found[shape, side] for side in sides]] for shape in shapes]
    return markdown(["tokens x width x vocabulary", *sides.values()], lines)


def ops(names: Sequence[tuple[str, str]]) -> str:
    """Return our kernels against mamba-ssm's."""
    lines = []
    for name, device in names:
        for op, sides in result(name)["ops"].items():
            for side, row in sides.items():
                spread = row.get("forward_backward_spread_ms")
                lines.append([
                    f"{op}: {side}",
                    device,
                    digits(row["forward_ms"]),
                    digits(row["forward_backward_ms"], 4),
                    f"{digits(spread[0], 4)} to {digits(spread[1], 4)}" if spread else "",
                    f"{row['peak_gib']:.2f}",
                ])  # fmt: skip
    return markdown(["", "GPU", "forward (ms)", "forward and backward (ms)", "range (ms)", "peak GiB"], lines)


def evaluation(names: Sequence[tuple[str, str]]) -> str:
    """Return time and memory of the loss at every position of one long text."""
    lines = []
    for name, device in names:
        for row in result(name)["rows"]:
            seconds = statistics.median(row["seconds"])
            speed = digits(row["length"] / seconds)
            lines.append([f"{row['length']:,}", device, digits(seconds), speed, f"{row['peak_gib']:.2f}"])
    return markdown(["tokens", "GPU", "seconds", "tokens/s", "peak GiB"], lines)


def memory_on_cpu() -> str:
    """Return time and memory of long texts and prompts on a CPU."""
    lines = []
    names = {
        "evaluation-specimen_cpu_2026-11-24": "loss at every position",
        "lm-eval-memory_cpu_2026-11-24": "lm-eval, one prompt",
    }
    for name, label in names.items():
        for length, row in result(name)["medians"].items():
            lines.append([label, f"{int(length):,}", digits(row["seconds"]), digits(row["peak_mib"])])
    return markdown(["", "tokens", "seconds", "peak MiB"], lines)


def first_step() -> str:
    """Return the seconds of the first training step, kernels compiled side by side and one after another."""
    side: dict[str, list[float]] = {}
    one: dict[str, list[float]] = {}
    for run in result("first-step_h100_2026-11-25")["runs"]:
        into = one if "one after another" in run.get("kernels", "") else side
        for row in run["rows"]:
            into.setdefault(row["family"], []).append(row["first_step_seconds"])
    lines = [
        [family, *[" and ".join(f"{s:.1f}" for s in times.get(family, [])) for times in (side, one)]]
        for family in side
    ]
    return markdown(
        ["family", "compiled side by side (s)", "compiled one after another, another machine (s)"], lines
    )


def documents() -> str:
    """Return the time of a step with masks over that of the same batch without one."""
    files = {
        "documents_h100_2026-11-26": "H100",
        "documents_h200_2026-11-26": "H200",
        "documents_cpu_2026-11-26": "CPU, 1 thread",
    }
    lines = []
    for name, device in files.items():
        rows = result(name)["rows"]
        for model in dict.fromkeys(row["model"] for row in rows):
            found = {row["batch"]: row["ratio"] for row in rows if row["model"] == model}
            kinds = ("mask of ones", "padded right", "padded left", "packed")
            lines.append([model, device, *[f"{found[kind]:.2f}" for kind in kinds]])
    return markdown(["model", "device", "mask of ones", "padded right", "padded left", "packed"], lines)


def cpu_training() -> str:
    """Return Mamba-1 and Mamba-2 on a CPU against transformers' own path."""
    rows = result("train_cpu_2026-11-27")["rows"]
    theirs = {(r["model"], r["work"], r["time"]): r for r in rows if r["side"] == "transformers"}
    lines = []
    for row in rows:
        if row["side"] != "longroll":
            continue
        other = theirs.get((row["model"], row["work"], row["time"]))
        work = "forward and backward" if row["work"] == "train" else "forward"
        speed, room = digits(row["tokens_per_second"]), digits(row["peak_mib"])
        lines.append([
            f"{row['model']}, {work}", f"{row['time']:,}", speed,
            digits(other["tokens_per_second"]) if other else "not run",
            f"{row['tokens_per_second'] / other['tokens_per_second']:.1f}" if other else "",
            room, digits(other["peak_mib"]) if other else "",
        ])  # fmt: skip
    head = ["", "T", "tokens/s", "transformers, tokens/s", "ratio", "peak MiB", "transformers, peak MiB"]
    return markdown(head, lines)


def cpu_ops() -> str:
    """Return the ops on a CPU against a loop over time steps and transformers' functions."""
    lines = []
    for row in result("ops_cpu_2026-11-25")["results"]:
        size = row["size"]
        times = row["forward_and_backward"]
        ratios = times["times_ours"]
        lines.append([
            row["op"],
            f"{size['B']} x {size['T']:,}, {size['H']} heads of {size['K']} x {size['V']}",
            digits(1e3 * times["medians"]["ours"]),
            *[f"{ratios[side]:.1f}" if side in ratios else "" for side in ("loop", "transformers")],
            tiny(row["largest_difference"]["ours"]),
        ])  # fmt: skip
    head = ["op", "shape", "forward and backward (ms)", "loop over steps, relative time"]
    return markdown([*head, "transformers, relative time", "largest difference from float64"], lines)


def precision() -> str:
    """Return the loss of the specimen in three dtypes."""
    data = result("precision_cpu_2026-11-26")
    runs, lines = data["runs"], []
    for i, (start, stop) in enumerate(data["octaves"]):
        apart = [f"{runs[dtype]['difference'][i]:+.4f}" for dtype in ("bfloat16", "float16")]
        lines.append([f"{start:,} - {stop:,}", f"{runs['float32']['loss'][i]:.4f}", *apart])
    return markdown(["positions", "float32, nats", "bfloat16, difference", "float16, difference"], lines)


def damaged() -> str:
    """Return what became of files that were damaged at random."""
    outcomes = result("mutated-files_cpu_2026-11-26")["outcomes"]
    return markdown(
        ["file", "refused in one line", "works"],
        [[k, str(v["refused"]), str(v["works"])] for k, v in outcomes.items()],
    )


def kills() -> str:
    """Return the runs that were killed at random and resumed, by kind of run."""
    data = result("kill-resume_cpu_2026-11-26")
    lines = []
    for processes in sorted({trial["processes"] for trial in data["trials"]}):
        trials = [trial for trial in data["trials"] if trial["processes"] == processes]
        killed = sum(len(trial["kills"]) for trial in trials)
        lines.append(
            [str(processes), str(len(trials)), str(killed), str(sum(trial["exact"] for trial in trials))]
        )
    return markdown(["processes", "runs", "kills", "bit-identical to the undisturbed run"], lines)


def landing(trial: dict[str, Any], phase: str) -> str:
    """Return what an end of a trial fell into."""
    if phase == "start":
        return "the start: imports, the model, the meeting of processes"
    if phase != "evaluation":
        return {"step": "training steps", "save": "a save", "result": "the save of the result"}.get(
            phase, phase
        )
    names = {"loss": "`evaluate loss`", "task": "`evaluate` of a task", "diagnose": "`diagnose`"}
    if trial["what"] in names:
        return names[trial["what"]]
    return f"an evaluation by {'Trainer' if trial['evaluates'] == 'trainer' else '`until_healthy`'}"


def endings() -> str:
    """Return the runs and measurements that were ended at random, by what each end fell into."""
    trials = result("kill-resume-all_cpu_2026-11-26")["trials"]
    ends = [
        (landing(trial, kill["landed"]), processes, ENDINGS[kill["how"]])
        for trial in trials
        for kill, processes in zip(trial["kills"], trial["started_on"], strict=False)
    ]
    lines = []
    for place in sorted({place for place, *_ in ends}):
        here = [end for end in ends if end[0] == place]
        counts = [str(sum(processes == n for _, processes, _ in here)) for n in (1, 2, 4)]
        by = ", ".join(f"{count} {how}" for how, count in Counter(how for *_, how in here).most_common())
        lines.append([place, *counts, by])
    exact = sum(trial["exact"] for trial in trials)
    totals = [str(sum(processes == n for _, processes, _ in ends)) for n in (1, 2, 4)]
    lines.append([f"all: {exact} of {len(trials)} runs exact", *totals, f"{len(ends)} ends"])
    return markdown(["ended in", "1 process", "2 processes", "4 processes", "by"], lines)


def fla_ops() -> str:
    """Return the error of ops on fla's kernels against float64."""
    jobs = result("fla_h200_2026-11-25")["jobs"]
    lines = []
    for op in OPS:
        cells = []
        for dtype in ("bfloat16", "float32", "tf32"):
            errors = jobs.get(f"op:{op}:{dtype}", {}).get("errors")
            if not errors:
                cells.append("not run")
                continue
            out = max(e for shape in errors.values() for key, e in shape.items() if key in ("o", "state"))
            back = max(e for shape in errors.values() for key, e in shape.items() if key.startswith("d"))
            cells.append(f"{tiny(out)} / {tiny(back)}" + (" *" if len(errors) < 3 else ""))
        lines.append([op, *cells])
    return markdown(["op", "bfloat16", "float32", "tf32"], lines)


def fla_laws(names: Sequence[str]) -> str:
    """Return the widest gap of each law by family."""
    lines = []
    for name in names:
        for key, row in result(name)["jobs"].items():
            if key.startswith("laws:") and "state_gap" in row:
                gaps = (row.get(f"{part}_gap") for part in ("reference", "state", "gradient", "bfloat16"))
                path = row["gpu"].split(" or ")[0].split(";")[0]
                lines.append([row["family"], path, *[tiny(gap["size"]) if gap else "" for gap in gaps]])
    return markdown(["family", "GPU path", "logits", "state in and out", "gradient", "bfloat16"], lines)


def fla_parity() -> str:
    """Return logits of the same checkpoint by longroll's modules and by fla's classes."""
    jobs, lines = result("fla_h200_2026-11-25")["jobs"], []
    for key in sorted(
        (k for k in jobs if k.startswith("parity:")), key=lambda k: (k.split(":")[2] != "float32", k)
    ):
        _, family, dtype = key.split(":")
        errors = jobs[key]["errors"]
        pairs = ("ours to fla's", "ours to exact", "fla's to exact")
        lines.append([family, dtype, *[tiny(max(errors[p], errors[f"{p}, chunked"])) for p in pairs]])
    return markdown(["family", "precision", "ours to fla's", "ours to exact", "fla's to exact"], lines)


def fla_speed() -> str:
    """Return fla's kernels against longroll's PyTorch on the same GPU."""
    lines = []
    for op, row in result("fla-speed_h100_2026-11-25")["jobs"]["speed:all:-"].items():
        if isinstance(row, dict):
            peaks = [f"{row[f'{side}_peak_GiB']:.2f}" for side in ("fla", "torch")]
            lines.append(
                [op, digits(row["fla_ms"], 2), digits(row["torch_ms"]), f"{row['ratio']:.1f}", *peaks]
            )
    head = ["op", "fla's kernel (ms)", "PyTorch (ms)", "ratio", "fla's kernel, peak GiB", "PyTorch, peak GiB"]
    return markdown(head, lines)


H200, H100 = "_h200_2026-11-25", "_h100_2026-11-25"
REPAIR = "repair_h100_2026-11-26"
FAST = {"sp": "State Passing", "tbptt": "TBPTT"}
REPAIR_DEFAULT = "repair-default_h200_2026-11-26"
REPAIR_SHORT = "repair-short_h200_2026-11-27"
SCORES = "repair-lm-eval_h200_2026-11-27"
LONG_TASKS = "long-tasks-103m_h200_2026-11-27"
DEFAULTS = {
    "mamba2-22m": "Mamba-2 22M",
    "mamba2-22m-t128": "the same, T = 128",
    "mamba2-22m-n256": "the same, state 256",
    "mamba2-103m-30m": "Mamba-2 103M",
    "granite-33m-slow": "hybrid 33M, T = 128",
    "gla-36m": "GLA 36M",
    "mamba2-22m-holds": "Mamba-2 22M that holds",
}
PAPERS = ["random", "fitted", "sp", "tbptt"]
SOURCES = [
    "sp zero=0.1 speed=30", "sp-depths speed=30", "mixed zero=0.1 speed=30", "tbptt zero=0.1 speed=30",
    "tbptt zero=0.1 speed=30 seed=1", "tbptt zero=0.1 speed=30 seed=2", "tbptt-depths speed=30",
    "tbptt-depths speed=30 seed=1", "tbptt-depths speed=30 seed=2", "tbptt zero=0.25 speed=30 keep=1",
    "tbptt-depths speed=30 keep=1",
]  # fmt: skip


def blame() -> str:
    """Faults planted in the weights of small hybrids: how often they are named, and the part of each side."""
    whole, again = "blame_cpu_2026-11-26", "blame-state_cpu_2026-11-26"
    return _blame([("state", again), ("attention", whole), ("both", whole)])


def blame_trained() -> str:
    """The same for small hybrids, sides of which were trained to T and the others to 16 T."""
    return _blame(
        [(kind, "blame-trained_h200_2026-11-27") for kind in ("state", "attention", "both", "sound")]
    )


def _blame(kinds: Sequence[tuple[str, str]]) -> str:
    rows = []
    for kind, name in kinds:
        data = result(name)
        models = [model for model in data["models"] if model["planted"] == kind]
        damages = [model["blame"]["damage"] for model in models]
        cells = [f"{min(damages):.2f} to {max(damages):.2f}"]
        for side in ("state", "attention"):
            parts = [p["recovered"] for m in models for p in m["blame"]["parts"] if p["what"] == side]
            if not parts:
                cells.append("")
                continue
            low, mean, high = (round(100 * x) for x in (min(parts), statistics.mean(parts), max(parts)))
            cells.append(f"{mean} % ({low} to {high})")
        rows.append([kind, data["right"][kind], *cells])
    return markdown(
        ["planted in", "named", "damage, nats", "part of the state", "part of the attention"], rows
    )


RIVALS = {
    "base": "the specimen, read plainly",
    "decay": "reading: state decays by 1 - 1/T a token",
    "clip": "reading: state clipped to its norms in training",
    "reset": "reading: only the last T tokens",
    "A-head": "calibrated: a scale of A a head",
    "A-layer": "calibrated: a scale of A a layer",
    "dt-layer": "calibrated: a scale of dt a layer",
    "none": "trained from zero states",
    "sp": "trained by State Passing",
    "tbptt": "trained by TBPTT",
    "fitted": "trained by Fitted Noise",
}


def rivals() -> str:
    """Readings, calibrations and training of the specimen: tokens read and the loss by positions."""
    ways = {way["way"]: way for way in result("rivals-specimen_cpu_2026-11-26")["ways"]}
    rows = []
    for name, what in RIVALS.items():
        octaves = {stop: mean for _, stop, mean, *_ in ways[name]["octaves"]}
        levels = [f"{octaves[stop]:.2f}" for stop in (128, 256, 1024, 4096, 8192)]
        rows.append([what, f"{ways[name]['tokens']:,}", *levels])
    return markdown(["", "tokens", "in range", "128-256", "512-1k", "2k-4k", "4k-8k"], rows)


RIVALS_TASKS = {
    "base": "the base, read plainly",
    **{name: RIVALS[name] for name in ("clip", "decay", "reset")},
    "rescan": "reading: states read again from the last T tokens",
    "window": "reading: attention keeps the last T keys",
    "chunk": "reading: the one chunk after which the answer is surest",
    **{name: RIVALS[name] for name in ("A-head", "A-layer", "dt-layer", "none")},
    "longer": "trained from zero states at 4 T",
    **{name: RIVALS[name] for name in ("sp", "tbptt", "fitted")},
    "none+linear": "trained from zero states, positions scaled linearly",
    "sp+linear": "trained by State Passing, positions scaled linearly",
}


def rivals_tasks(name: str, *, loss: bool) -> str:
    """Readings, calibrations and training of the bases of several seeds: loss in range and far out, and
    accuracy; mean, least and largest.
    """
    found = {row["way"]: row for row in result(name)["summary"]}
    rows = []
    for way, what in RIVALS_TASKS.items():
        if way not in found:
            continue
        row = found[way]
        octaves = row.get("octaves")
        ends = [_ranged(*octaves[at][2:]) for at in (0, -1)] if octaves else ["", ""]
        cells = [_ranged(*numbers) for _, *numbers in row["accuracy"]]
        rows.append([what, str(len(row["seeds"])), *(ends if loss else []), *cells])
    head = [*(["in range", "last octave"] if loss else []), "T", "4 T", "16 T", "64 T"]
    return markdown(["", "seeds", *head], rows)


def _ranged(mean: float, least: float, most: float) -> str:
    """Return a mean with its range; without one where all seeds show the same number."""
    low, high = f"{least:.2f}", f"{most:.2f}"
    return f"{mean:.2f}" if low == high else f"{mean:.2f} ({low}-{high})"


MODELS = {"delta_net": "DeltaNet", "rwkv7": "RWKV-7", "mamba2": "Mamba-2", "gla": "GLA"}
SEEDED = 3
"""Seeds of a row of state tracking, at least."""
LEARNED = 0.97
"""Share of the products told at T above which a word problem counts as learned."""
GROUPS = ("parity", "z3", "s3-swaps", "s5-swaps", "s3", "s5")


def _tracked(name: str) -> dict[tuple[str, str], dict[str, list[dict[str, Any]]]]:
    """Return the runs of state tracking by model and group, then by initial state, in the order of MODELS."""
    data = result(name)
    runs: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for family in MODELS:
        for group in GROUPS:
            for run in data["runs"]:
                if (run["family"], run["group"]) == (family, group):
                    runs.setdefault((family, group), {}).setdefault(run["intervention"], []).append(run)
    return runs


def _over_seeds(runs: Sequence[dict[str, Any]], place: int, score: int) -> str:
    values = [run["accuracy"][place][score] for run in runs]
    return _ranged(statistics.mean(values), min(values), max(values))


def tracking_learned(name: str) -> str:
    """Word problems of groups: which bases learn them at T, after how many steps, and how far they hold."""
    rows = []
    for (family, group), ways in _tracked(name).items():
        bases = ways["base"]
        if group == "s3" and bases[0]["training"]["steps"] < 1000:  # ended while most elements were swaps
            continue
        steps = [run["training"]["steps"] for run in bases]
        learned = sum(run["accuracy"][0][1] > LEARNED for run in bases)
        rows.append([
            MODELS[family], group, f"{1 / len(product_table(group)):.3f}", f"{learned} of {len(bases)}",
            f"{statistics.mean(steps):,.0f}",
            *(_over_seeds(bases, place, 2) for place in range(5)),
        ])  # fmt: skip
    columns = ["T", "2 T", "4 T", "16 T", "64 T"]
    return markdown(["model", "group", "chance", "learned", "steps", *columns], rows)


def tracking(name: str, *families: str) -> str:
    """Word problems of groups: accuracy to 64 T by the initial state of more steps, over seeds."""
    ways = {"base": "base", "none": "zero states", "sp": "State Passing", "fitted": "Fitted Noise"}
    ways |= {"tbptt": "TBPTT"}
    rows, times = [], 64
    for (family, group), found in _tracked(name).items():
        for way, what in ways.items():
            some = found.get(way, [])
            if family not in families or len(some) < SEEDED:
                continue
            places = range(len(some[0]["accuracy"]))
            times = 4 ** (len(places) - 2)  # T, 2 T, 4 T, 16 T, 64 T
            cells = [_over_seeds(some, place, 1) for place in places]
            asked = [_over_seeds(some, place, 2) for place in (0, 2, 3)]
            rows.append([MODELS[family], group, what, str(len(some)), *cells, *asked])
    columns = ["T", "2 T", "4 T", "16 T", *(["64 T"] if times == 64 else [])]
    columns += ["asked, T", "asked, 4 T", "asked, 16 T"]
    return markdown(["model", "group", "trained on from", "seeds", *columns], rows)


def predictor() -> str:
    """Concordance of the forecast, of a regression on families held out, and of each measure alone."""
    found = result("predictor_cpu_2026-11-27")["analysis"]
    alone = sorted(found["alone"].items(), key=lambda entry: -entry[1]["concordance"][0])
    rows = [[f"`{name}`", _interval(one["concordance"])] for name, one in alone]
    rows.insert(1, ["ridge regression on the others, families held out", _interval(found["held_out"])])
    return markdown(["forecast by", "concordance"], rows)


def _interval(numbers: Sequence[float]) -> str:
    mean, low, high = numbers
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def hybrid_repair() -> str:
    """Repairs of three small hybrids: loss by positions, and that above a fresh start in the last octave."""
    data = result("hybrid-repair_h100_2026-11-26")
    names = {"bamba": "Bamba", "granite": "Granite 4", "qwen3_next": "Qwen3-Next"}
    done = {"base": "base", "reading": "base, read with", "none": "zero states", "sp": "State Passing"}
    order = list(done)
    rows = []
    for row in sorted(data["rows"], key=lambda r: (r["shape"], order.index(r["intervention"]))):
        attention = {"window": "a window of T", None: ""}.get(row["attention"], row["attention"])
        how = done[row["intervention"]]
        if attention:
            how += f" {attention}" if row["intervention"] == "reading" else f", {attention}"
        octaves = {stop: mean for _, stop, mean, *_ in row["octaves"]}
        mean, low, high = (round(value, 2) + 0.0 for value in row["above_fresh_start_far"])  # no -0.00
        levels = [f"{octaves[stop]:.2f}" for stop in (128, 256, 1024, 4096, 8192)]
        rows.append([names[row["shape"]], how, *levels, f"{mean:.2f} [{low:.2f}, {high:.2f}]"])
    head = ["shape", "", "in range", "128-256", "512-1k", "2k-4k", "4k-8k", "above a fresh start"]
    return markdown(head, rows)


def several_gpus(name: str) -> str:
    """Return training on one GPU and on several, by DDP and FSDP2: speed, MFU, memory, overheads."""
    data = result(name)
    parts, linear = data["parts"], data["of_linear"]
    names = {"fsdp": "FSDP2, 2.7B, all weights", "lora": "FSDP2, 2.7B, LoRA of rank 16"}
    names |= {"settings plain": "DDP, 370M, again", "settings known": "`ddp_find_unused_parameters` False"}
    lines = []
    for part, found in parts.items():
        kind, _, ranks = part.partition(" ")
        for way, row in found.get("rows", {}).items():
            label = names.get(part) or f"{'DDP' if ranks != '1' else 'one process'}, 370M"
            share = f"{linear[ranks]:.3f}" if way == "zero" and kind == "ddp" else ""
            over = f"{100 * row['overhead']:+.1f} %" if kind == "ddp" and way != "zero" else ""
            lines.append([
                f"{label}, {WAYS[way]}",
                str(found["ranks"]),
                f"{found['tokens_a_rank']:,}",
                digits(row["tokens_per_second"], 4),
                share,
                over,
                f"{row['mfu']:.3f}",
                f"{found['peak_gib']:.1f}",
            ])  # fmt: skip
    head = ["", "GPUs", "tokens of each", "tokens/s", "of linear", "time over zero state", "MFU", "peak GiB"]
    return markdown(head, lines)


def memory_by_arithmetic() -> str:
    """Return bytes by arithmetic beside those measured."""
    names = {"weights": "weights", "gradients": "gradients", "optimizer": "AdamW", "gathered": "whole layers"}
    names |= {"states": "states", "activations": "activations", "logits": "logits"}
    names |= {"copies in bfloat16": "copies in bfloat16", "buckets of DDP": "buckets of DDP"}
    lines = []
    for row in result("memory_cpu_2026-11-26")["rows"]:
        held = row["arithmetic_gib"]
        parts = ", ".join(f"{name} {held[key]:.1f}" for key, name in names.items() if held[key])
        lines.append([row["case"], parts, f"{held['total']:.1f}", f"{row['measured_gib']:.1f}"])
    return markdown(["GiB of one process", "parts", "sum", "measured"], lines)


def planned_memory() -> str:
    """Return the memory that `longroll plan` counts beside that which was measured."""
    lines, newest = [], dict[str, dict[str, Any]]()
    for name in ("plan-memory_h200_2026-11-26", "plan-memory_h200_2026-11-27"):
        newest |= result(name)["rows"]
    newest |= result("plan-memory-late_h200_2026-11-27")["rows"]
    for case, row in newest.items():
        if "error" not in row:
            sizes = [f"{row[name]:.1f}" for name in ("planned_gib", "measured_gib")]
            lines.append([case, *sizes, f"{row['ratio']:.2f}"])
    return markdown(["case", "planned, GiB", "measured, GiB", "planned over measured"], lines)


def step_kernels() -> str:
    """Return the time of a step by class of kernel."""
    (row,) = result("step-profile_h200_2026-11-27")["rows"].values()
    classes, total = by_class(row["kernels"]), row["gpu_ms"]
    lines = [[name, f"{ms:.1f}", f"{ms / total:.0%}"] for name, ms in classes.items()]
    return markdown(["kernels", "ms a step", "share"], [*lines, ["all", f"{total:.1f}", ""]])


STEP_SUMS = {
    "all": "as before",
    "all, sums over states with B and C": "sums beside B and C",
    "all, best tiles": "the same, in 168 registers, and two chunks at once: the default",
    "all, AdamW in one pass": "as before, AdamW by another kernel",
    "all, best tiles, AdamW": "the default, AdamW by another kernel",
    "all, kernels overlap": "as before, launches that overlap",
}
"""Variants of `step-sums`, and what they are."""


def step_changes(file: str, names: dict[str, str] | None = None) -> str:
    """Return the time of a step without and with changes, under `names`."""
    lines = []
    rows = result(file)["rows"]
    for name, row in rows.items() if names is None else [(names[key], rows[key]) for key in names]:
        speed = f"{row['tokens_per_second']:,.0f}"
        spread = f"{digits(min(row['ms']), 4)} to {digits(max(row['ms']), 4)}"
        lines.append([name, digits(row["median_ms"], 4), spread, speed, f"{row['mfu']:.3f}"])
    return markdown(["step", "median (ms)", "range (ms)", "tokens/s", "MFU"], lines)


def ssd_graph() -> str:
    """Return the time of the SSD of the 370M Mamba-2 as one CUDA graph."""
    lines = []
    for name, file, row in (
        ("in the evening of 26 November", "ssd-tiles-first_h200_2026-11-26", "ssd, two kernels"),
        ("at night", "ssd-tiles_h200_2026-11-26", "ssd, as it is"),
        ("in the night of 27 November", "ssd-tiles_h200_2026-11-27", "ssd, as it is"),
        (
            "sums beside B and C",
            "ssd-tiles-sums_h200_2026-11-27",
            "ssd, sums: of_x with later loads, 168 registers",
        ),
        (
            "two chunks at once",
            "ssd-tiles-sums_h200_2026-11-27",
            "ssd, walk: 2 chunks, 64 columns, 4 warps",
        ),
    ):
        found = result(file)["rows"][row]
        lines.append([name, *(digits(found[way]["ms"], 3) for way in ("forward", "forward_backward"))])
    return markdown(["SSD", "forward (ms)", "forward and backward (ms)"], lines)


def real_sizes() -> str:
    """Return readings, diagnoses and training of models of 1 to 30 billion parameters."""
    lines = []
    for name, what in REAL_SIZES.items():
        device, row = _real_size(name)
        peak = row["peak_gib"]
        speed = row.get("tokens_per_second")
        mfu = row.get("mfu")
        lines.append([
            what,
            device,
            digits(row["median_seconds"]),
            digits(speed) if speed else "",
            f"{mfu:.3f}" if mfu else "",
            " + ".join(f"{one:.1f}" for one in (peak if isinstance(peak, list) else [peak])),
        ])  # fmt: skip
    return markdown(["", "GPU", "seconds", "tokens/s", "MFU", "peak GiB"], lines)


def _real_size(name: str) -> tuple[str, dict[str, Any]]:
    """Return the GPU and the row of big.py of that name in the newest file that has it without an error."""
    found = []
    for file in (ROOT / "benchmarks/results").glob("big-*.json"):
        data = json.loads(file.read_text())
        if "error" not in data["rows"].get(name, {"error": "not there"}):
            made = data["provenance"]
            found.append((made["date"], made["device"].split()[1], data["rows"][name]))
    _, device, row = max(found, key=lambda one: one[0])
    return device, row


def faults(name: str) -> str:
    """Return what the user sees of each fault, and what survives."""
    lines = []
    for row in result(name)["rows"]:
        sees = "<br>".join(line.replace("|", "\\|").replace("<", "&lt;") for line in row["sees"])
        cells = (
            row["fault"],
            row["made_by"],
            row["status"],
            sees or "nothing",
            row["survives"],
            row["again"],
        )
        lines.append([cell.replace("\n", " ") for cell in cells])
    head = ["fault", "made by", "exit status", "what the user sees", "what survives", "`--resume`, or again"]
    return markdown(head, lines).replace("---:", "---")


TABLES: dict[str, Callable[[], str]] = {
    "faults": partial(faults, "faults_cpu_2026-11-27"),
    "ranks": partial(several_gpus, "ranks_h200-x4_2026-11-26"),
    "memory": memory_by_arithmetic,
    "plan-memory": planned_memory,
    "real-sizes": real_sizes,
    "step-kernels": step_kernels,
    "step-changes": partial(step_changes, "step-changes_h200_2026-11-27"),
    "step-sums": partial(step_changes, "step-sums_h200_2026-11-27", STEP_SUMS),
    "ssd-graph": ssd_graph,
    "train-mamba2-370m": partial(training, f"train-mamba2-370m{H200}", "transformers"),
    "train-mamba-130m": partial(training, f"train-mamba-130m{H200}", "mamba-ssm"),
    "train-mamba-370m": partial(training, f"train-mamba-370m{H200}", "mamba-ssm"),
    "train-mamba2-370m-h100": partial(training, f"train-mamba2-370m{H100}", "mamba-ssm"),
    "train-mamba-130m-h100": partial(training, f"train-mamba-130m{H100}", "mamba-ssm"),
    "train-mamba-370m-h100": partial(training, f"train-mamba-370m{H100}", "mamba-ssm"),
    "graphs": partial(graphs, [
        (f"graphs-mamba2-370m{H200}", "mamba2-370m, 4 rows, H200"),
        (f"train-mamba2-370m{H100}", "mamba2-370m, 4 rows, H100"),
        (f"graphs-mamba2-370m-first{H100}", "mamba2-370m, 4 rows, another H100"),
        (f"graphs-mamba-130m{H200}", "mamba-130m, 8 rows, H200"),
        (f"train-mamba-130m{H100}", "mamba-130m, 8 rows, H100"),
        (f"train-mamba-370m{H100}", "mamba-370m, 4 rows, H100"),
    ]),
    "blame": blame,
    "blame-trained": blame_trained,
    "predictor": predictor,
    "rivals": rivals,
    "rivals-passkey": partial(rivals_tasks, f"rivals-passkey-mamba2{SEEDS}", loss=True),
    "rivals-passkey-hybrid": partial(rivals_tasks, f"rivals-passkey-bamba{SEEDS}", loss=True),
    "rivals-recall": partial(rivals_tasks, f"rivals-recall-mamba2{SEEDS}", loss=False),
    "rivals-recall-hybrid": partial(rivals_tasks, f"rivals-recall-bamba{SEEDS}", loss=False),
    "tracking": partial(tracking, "tracking_h200_2026-11-27", "delta_net"),
    "tracking-cpu": partial(tracking, "tracking-families_cpu_2026-11-27", "rwkv7", "mamba2", "gla"),
    "tracking-learned": partial(tracking_learned, "tracking-curriculum_h200_2026-11-27"),
    "hybrid-repair": hybrid_repair,
    "loss": loss,
    "ops": partial(ops, [("ops-scan_h200_2026-11-27", "H200"), (f"ops{H100}", "H100")]),
    "evaluation": partial(evaluation, [
        (f"evaluation-mamba2-370m{H200}", "H200"),
        (f"evaluation-mamba2-370m{H100}", "H100"),
    ]),
    "memory-cpu": memory_on_cpu,
    "first-step": first_step,
    "documents": documents,
    "train-cpu": cpu_training,
    "ops-cpu": cpu_ops,
    "precision": precision,
    "damaged-files": damaged,
    "kill-resume": kills,
    "kill-resume-all": endings,
    "fla-ops": fla_ops,
    "fla-laws": partial(fla_laws, ["fla_h200_2026-11-25"]),
    "fla-laws-h100": partial(fla_laws, ["fla-laws-all_h100_2026-11-25", "fla-laws-tiles_h100_2026-11-25"]),
    "fla-parity": fla_parity,
    "fla-speed": fla_speed,
    "repair-paper": partial(repaired, "mamba2-22m", ["base", "none rate=0.0001", "none", *PAPERS]),
    "repair-paper-103m": partial(repaired, "mamba2-103m", ["base", "none rate=0.0001", "none", *PAPERS]),
    "repair-rates": repair_rates,
    "repair-default": repair_default,
    "repair-aim": repair_aim,
    "repair-short": repair_short,
    "repair-scores": repair_scores,
    "tasks-at-size": tasks_at_size,
    "repair-ladder": repair_ladder,
    "repair-settings": repair_settings,
    "repair-documents": repair_documents,
    "repair-zero": repair_zero,
    "repair-trained": repair_trained,
    "repair-source": partial(repaired, "mamba2-22m", SOURCES),
    "repair-103m": partial(repaired, "mamba2-103m"),
    "repair-gla": partial(repaired, "gla-36m"),
    "repair-granite": partial(repaired, "granite-33m"),
}  # fmt: skip


def remade(text: str) -> str:
    """Return a page with its tables remade.

    Raises:
        SystemExit: the page names a table that is not in TABLES.
    """

    def table(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise SystemExit(f"{found[2]}: no such table in benchmarks/tables.py.")
        return found[1] + TABLES[found[2]]() + found[3]

    return REGION.sub(table, text)


def main() -> None:
    """Remake or check all pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="Write nothing; fail if a table is out of date.")
    check, stale = parser.parse_args().check, []
    for page in sorted({page for glob in GLOBS for page in ROOT.glob(glob)}):
        text = page.read_text()
        new = remade(text)
        if new != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(new)
    if check and stale:
        raise SystemExit(f"tables are out of date: {', '.join(stale)}. Run python benchmarks/tables.py.")
    print(f"{len(stale)} pages {'differ' if check else 'changed'}.")


if __name__ == "__main__":
    main()
