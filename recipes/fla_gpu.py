"""Hold longroll on fla's kernels to float64, to fla's own classes and to the laws, on a GPU; and time it.

Four kinds of job, each in a process of its own, so that one that crashes ends no other and Triton compiles on
all cores; timing waits until all else is done. fla's kernels take one configuration each, as in the library
(`longroll/ops/fla_kernels.py`).

- `op`: outputs, final state and all gradients, also of the initial state and through the final one, against
  the float64 oracle, which gets the same rounded inputs. Errors are root mean squares over the expected ones,
  as in fla's own tests, which ask for 0.002 to 0.015 in 16 bits. `float32` is with IEEE products, `tf32` as
  Triton multiplies by default.
- `parity`: logits of our six classes against fla's, of the same checkpoint, in one piece and in three.
- `laws`: the laws of the state on tiny models of all families, in float32; on fla's kernels in bfloat16 too;
  and whether their checkpoints open, in float32, bfloat16 and tf32.
- `speed`: tokens a second, forward and backward, of our ops on fla's kernels and in PyTorch.

    PYTHONPATH=src:tests/families/fla_models python recipes/fla_gpu.py --output fla_gpu.json

`--device cpu` tries what can run there: our PyTorch ops against the oracle, and small timings.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

OPS = ("kda", "gated_delta_rule", "gla", "rwkv7", "delta_rule", "rwkv6", "retention")
LIMITS = {
    # (outputs and final state, gradients), root mean square
    "float64": (1e-9, 1e-9),  # ours, on a CPU
    "float32": (1e-3, 2e-3),  # IEEE products; the delta rules solve triangular systems in tf32: 2^-11
    "tf32": (3e-3, 6e-3),  # 2^-11 a product, and a few in a row
    "bfloat16": (
        1e-2,
        2e-2,
    ),  # 2^-9 a rounding: of inputs to each product and of what is stored between kernels
}
# (B, T, H, K, V): one step, several chunks of 64, sizes that are no powers of two
SHAPES = ((2, 1, 2, 64, 32), (2, 130, 2, 64, 32), (1, 63, 3, 48, 96))
SLOWEST = -0.6065306597126334  # decay of RWKV-7
TIMED = (4, 2048, 8, 128, 128)
TYPES = ("gla", "delta_net", "gated_deltanet", "retnet", "rwkv6", "rwkv7")


def inputs(op: str, size: tuple[int, ...], device: str, seed: int = 0) -> dict:
    """Random arguments of an op in float64, such as its models make them."""
    import torch
    import torch.nn.functional as F

    B, T, H, K, V = size
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    keys = normal(B, T, H, K), normal(B, T, H, K)
    v, state = normal(B, T, H, V), normal(B, H, K, V)
    unit = F.normalize(keys[1], dim=-1)
    decays = F.logsigmoid(normal(B, T, H, K) + 2)
    beta = normal(B, T, H).sigmoid()
    made: dict = {
        "gla": {"q": keys[0], "k": keys[1], "v": v, "g": decays},
        "retention": {"q": keys[0], "k": keys[1], "v": v},
        "rwkv6": {"r": keys[0], "k": keys[1], "v": v, "w": decays, "u": normal(H, K)},
        "rwkv7": {
            "r": keys[0],
            "w": SLOWEST * (normal(B, T, H, K) - 1).sigmoid(),
            "k": keys[1],
            "v": v,
            "a": -unit,
            "b": unit * normal(B, T, H, K).sigmoid(),
        },
        "delta_rule": {"q": keys[0], "k": unit, "v": v, "beta": beta},
        "gated_delta_rule": {"q": keys[0], "k": unit, "v": v, "g": decays[..., 0], "beta": beta},
        "kda": {"q": keys[0], "k": unit, "v": v, "g": decays, "beta": beta},
    }[op]
    return {name: t.to(device) for name, t in (made | {"initial_state": state}).items()}


def run_op(function, arguments: dict, **options: Any) -> dict:
    """Outputs, final state and gradients under a random linear loss of both."""
    import torch

    leaves = {name: t.detach().clone().requires_grad_() for name, t in arguments.items()}
    o, state = function(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    loss = 0.0
    for t in (o, state):
        loss = (
            loss
            + (t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)).sum()
        )
    loss.backward()
    return {"o": o.detach(), "state": state.detach()} | {f"d{name}": t.grad for name, t in leaves.items()}


def apart(actual, expected) -> float:
    """Root mean square of the difference over that of what is expected; infinite for NaN."""
    from longroll.conformance.laws import spread

    return spread(actual.cpu(), expected.cpu(), "").size


def job_op(op: str, precision: str, device: str) -> dict[str, Any]:
    """Our op against its float64 oracle."""
    import torch

    from longroll import ops
    from longroll.ops import reference
    from longroll.ops._backend import choose

    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    dtype = getattr(torch, "float32" if precision == "tf32" else precision)
    chosen = choose(op, torch.device(device), dtype, SHAPES[0][3:])
    if device == "cuda" and chosen.kernel is None:
        return {"skipped": chosen.reason}
    found: dict[str, Any] = {"path": chosen.reason, "errors": {}}
    limits = LIMITS[precision]
    for seed, size in enumerate(SHAPES):
        kept = ("initial_state", "g", "w", "u") if dtype == torch.bfloat16 else ()
        rounded = {
            n: t.to(torch.float32 if n in kept else dtype) for n, t in inputs(op, size, device, seed).items()
        }
        bound = {"lower_bound": SLOWEST} if op == "rwkv7" else {}
        for options in ({}, bound) if bound else ({},):
            actual = run_op(getattr(ops, op), rounded, output_final_state=True, **options)
            exact = {name: t.double().cpu() for name, t in rounded.items()}
            expected = run_op(getattr(reference, f"{op}_reference"), exact)
            errors = {name: apart(actual[name], expected[name]) for name in expected}
            case = "x".join(map(str, size)) + (", bounded" if options else "")
            found["errors"][case] = errors
            for name, error in errors.items():
                if not error <= limits[name.startswith("d")]:
                    found.setdefault("problems", []).append(f"{case}: {name} off by {error:.1e}")
            print(json.dumps(found), flush=True)  # should the next shape take too long
    return found


def job_parity(model_type: str, precision: str, device: str) -> dict[str, Any]:
    """Logits of our class against fla's, both on this device, in one piece and in three.

    In 16 bits the two round in different places: each is held to our logits in float32 on a CPU.
    """
    import tempfile

    import fla_parity as parity
    import torch

    import longroll
    from longroll.ops.fla_kernels import make_ready

    if device == "cpu":
        parity.replace_kernels()
    else:
        make_ready()
    config = parity.cases(model_type)[0]  # the smallest: each costs a compilation of every kernel
    dtype = getattr(torch, precision)
    theirs = parity.planted(model_type, config).to(dtype).float()
    tokens = parity.text(config["vocab_size"], 150)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        theirs.save_pretrained(folder)
        exact, _ = longroll.load(folder, device="cpu", dtype=torch.float32)(tokens)
        ours = longroll.load(folder, device=device, dtype=dtype)
        theirs, tokens = theirs.to(device, dtype), tokens.to(device)
        cache, state, pieces, own = None, None, [], []
        for piece in tokens.split([70, 1, 79], dim=1):
            output = theirs(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
            logits, state = ours(piece, state)
            own.append(logits)
        full = ours(tokens)[0], theirs(tokens, use_cache=True).logits
    chunked = torch.cat(own, dim=1), torch.cat(pieces, dim=1)
    errors = {"ours to fla's": apart(*full), "ours to fla's, chunked": apart(*chunked)}
    for name, pair in (("", full), (", chunked", chunked)):
        errors[f"ours to exact{name}"], errors[f"fla's to exact{name}"] = (apart(t, exact) for t in pair)
    problems = []
    for name in ("", ", chunked"):
        limit = LIMITS["float32"][0] if precision == "float32" else 1.5 * errors[f"fla's to exact{name}"]
        if not errors[f"ours to exact{name}"] <= limit:
            problems.append(f"ours{name} off by more than {limit:.1e}")
        if not errors[f"ours to fla's{name}"] <= 2 * limit:
            problems.append(f"ours{name} and fla's more than {2 * limit:.1e} apart")
    return {"errors": errors, "problems": problems}


def job_laws(model_type: str, _: str, device: str) -> dict[str, Any]:
    """A row of the table of families."""
    from longroll.conformance.table import cells, tabulate

    row = tabulate([model_type], device=device)[0]
    print(" | ".join(cells(row)), file=sys.stderr)
    for how in ("float32", "bfloat16", "tf32"):
        print(json.dumps(row, default=str), flush=True)  # should the next take too long
        row.setdefault("opens", {})[how] = found = opened(model_type, how, device)
        if found != "yes":
            row["problems"].append(f"{model_type} in {how}: {found}")
    return row


def opened(model_type: str, how: str, device: str) -> str:
    """Whether tiny checkpoints of a family open and pass their self-check; in tf32 as a user allows it."""
    import tempfile

    import torch

    import longroll
    from longroll.conformance.tiny import CONFIGS, ON_GPU, build

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if how == "tf32" else before)
    dtype = "bfloat16" if how == "bfloat16" else "float32"
    try:
        for name, (kind, _) in (CONFIGS | ON_GPU).items():
            if kind == model_type:
                with tempfile.TemporaryDirectory() as folder:
                    build(name).save_pretrained(folder)
                    longroll.load(folder, device=device, dtype=dtype)
    except longroll.LongrollError as error:
        return str(error)
    finally:
        torch.set_float32_matmul_precision(before)
    return "yes"


def job_speed(what: str, _: str, device: str) -> dict[str, Any]:
    """Tokens a second, forward and backward, of all ops; of one op only its first step, which compiles."""
    if what != "all":
        return timed(what, device, steps=0)
    found: dict[str, Any] = {}
    for op in OPS:
        try:
            found[op] = timed(op, device, steps=20)
        except Exception as error:
            traceback.print_exc()
            found.setdefault("problems", []).append(f"{op}: {error}")
    return found


def timed(op: str, device: str, steps: int) -> dict[str, Any]:
    """The first step of an op, and the median of several."""
    import torch

    from longroll import ops
    from longroll.ops._backend import SWITCH

    size = TIMED if device == "cuda" else (1, 64, 2, 32, 32)
    kept = ("initial_state", "g", "w", "u")
    arguments = {
        name: t.to(torch.float32 if name in kept else torch.bfloat16).requires_grad_()
        for name, t in inputs(op, size, device).items()
    }
    options = {"lower_bound": SLOWEST} if op == "rwkv7" else {}

    def seconds(times: int) -> list[float]:
        taken = []
        for _ in range(times):
            start = time.perf_counter()
            o, state = getattr(ops, op)(**arguments, output_final_state=True, **options)
            ones = torch.ones_like(o), torch.ones_like(state)
            torch.autograd.grad((o, state), list(arguments.values()), ones)
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        return taken

    found: dict[str, Any] = {}
    for name in ("fla", "torch"):
        os.environ[SWITCH] = name
        found[f"{name}_first_ms"] = seconds(1)[0] * 1e3
        if steps:
            seconds(2)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            found[f"{name}_ms"] = ms = (
                statistics.median(seconds(steps if name == "fla" else steps // 4)) * 1e3
            )
            found[f"{name}_tokens_per_s"] = size[0] * size[1] / ms * 1e3
            if device == "cuda":
                found[f"{name}_peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
    if steps:
        found["ratio"] = found["torch_ms"] / found["fla_ms"]
    return found


JOBS = {"op": job_op, "parity": job_parity, "laws": job_laws, "speed": job_speed}


def jobs(device: str) -> list[list[str]]:
    """Jobs by wave: `kind:what:precision`; the waves run one after another, the jobs of one side by side."""
    if device == "cpu":
        return [[f"op:{op}:float64" for op in OPS], ["speed:all:-"]]
    from longroll.conformance.tiny import CONFIGS, ON_GPU

    ops = [f"op:{op}:{precision}" for precision in ("bfloat16", "float32") for op in OPS]
    families = dict.fromkeys(model_type for model_type, _ in (ON_GPU | CONFIGS).values())
    laws = [f"laws:{name}:-" for name in families]
    parity = [f"parity:{name}:float32" for name in TYPES if name != "delta_net"]  # whose kernel takes none
    parity += [f"parity:{name}:bfloat16" for name in TYPES]
    compiled = [f"speed:{op}:-" for op in OPS]
    tf32 = [f"op:{op}:tf32" for op in OPS]
    return [ops + laws + compiled + parity + tf32, ["speed:all:-"]]


def start(job: str, device: str, limit: float) -> dict[str, Any]:
    """Run a job in a process of its own; its last line of output is its result."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    environment["TORCHDYNAMO_DISABLE"] = "1"  # fla compiles small activations
    if job.endswith(":float32"):
        environment["TRITON_F32_DEFAULT"] = "ieee"
    began = time.perf_counter()
    command = [sys.executable, __file__, "--job", job, "--device", device]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
        result = json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else None
        log = done.stderr
    except subprocess.TimeoutExpired as error:
        lines = (error.stdout or b"").decode().strip().splitlines()
        result, log = None, f"over {limit:.0f} s\n" + (error.stderr or b"").decode(errors="replace")
        if lines:
            result = json.loads(lines[-1]) | {"unfinished": f"over {limit:.0f} s"}
    if result is None:
        result = {"problems": ["failed"], "log": log[-4000:]}
    return result | {"seconds": round(time.perf_counter() - began, 1)}


def shown(job: str, result: dict[str, Any]) -> str:
    """One line, and the log of a job that failed."""
    kind = job.split(":")[0]
    line = f"{job:36} {result['seconds']:6.1f} s  "
    if "log" in result:
        return f"{line}FAILED\n{result['log']}"
    if "skipped" in result:
        return line + "skipped: " + result["skipped"]
    if kind == "op":
        names = next(iter(result["errors"].values()))
        worst = {n: max(errors[n] for errors in result["errors"].values()) for n in names}
        line += f"{result['path']}: " + " ".join(f"{n} {error:.0e}" for n, error in worst.items())
        line += f" ({result['unfinished']})" if "unfinished" in result else ""
    elif kind == "parity":
        line += " ".join(f"{n} {error:.1e}" for n, error in result["errors"].items())
    elif kind == "laws":
        gaps = [k for k in result if k.endswith("_gap")]
        line += " ".join(f"{k[:-4]} {result[k]['size']:.0e}" for k in gaps) + f" ({result['gpu']})"
    else:
        rows = {op: row for op, row in result.items() if op in OPS} or {"": result}
        for op, row in rows.items():
            line += f"\n    {op:18}" if op else ""
            line += " ".join(
                f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float) and k != "seconds"
            )
    return line + "".join(f"\n    ! {problem}" for problem in result.get("problems", []))


def main() -> None:
    """Run the jobs; the exit status says whether all are within their limits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=Path("fla_gpu.json"))
    parser.add_argument("--only", help="jobs that start with this, comma separated: op:gla,speed")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--limit", type=float, default=110, help="seconds a job")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        kind, what, how = options.job.split(":")
        try:
            result = JOBS[kind](what, how, options.device)
        except Exception:
            traceback.print_exc()
            raise SystemExit(1) from None
        print(json.dumps(result, default=str))
        return
    from longroll.results import provenance, write_json

    began, results = time.perf_counter(), {}
    wanted = tuple(options.only.split(",")) if options.only else ("",)
    for wave in jobs(options.device):
        kept = [job for job in wave if job.startswith(wanted)]

        def one(job: str) -> None:
            results[job] = start(job, options.device, options.limit)
            print(shown(job, results[job]), flush=True)
            seconds = time.perf_counter() - began
            made = provenance(seed=0, seconds=seconds, device=options.device)
            write_json(options.output, {"jobs": results, "provenance": made})

        with ThreadPoolExecutor(options.workers) as pool:
            list(pool.map(one, kept))
    bad = [job for job, result in results.items() if result.get("problems")]
    print(
        f"{len(results)} jobs, {time.perf_counter() - began:.0f} s; not within their limits: {bad or 'none'}"
    )
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
