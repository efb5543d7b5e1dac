"""Mamba's scan and Mamba-2's SSD on a GPU, forward and backward, against mamba-ssm's and fla's kernels.

    python benchmarks/gpu_ops.py --json gpu_ops.json
    python benchmarks/gpu_ops.py --variants --json gpu_ops_variants.json    # tiles and warps of the SSD
    python benchmarks/gpu_ops.py --scan-variants --json scan.json           # spans and registers of the scan

bf16, the shapes of the 130m Mamba (8 x 2048) and the 370m Mamba-2 (4 x 2048). Ours start from a state, take
gradients through the final one and give that of the initial one; mamba-ssm's scan can do none of that and is
timed without. They take turns at `triton.testing.do_bench`: medians of turns, and their spread.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import peers
import torch
import torch.nn.functional as F
from triton.testing import do_bench

from longroll.ops.gpu import selective_scan as scan_kernels
from longroll.ops.gpu import ssd as ssd_kernels
from longroll.ops.gpu.selective_scan import selective_scan
from longroll.ops.gpu.ssd import ssd
from longroll.results import BenchmarkResult, provenance

TURNS = 7


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()


def scan_inputs() -> tuple[Callable, list[torch.Tensor]]:
    """Scan forward in the 130m Mamba's shape, and its leaves."""
    B, T, D, N = 8, 2048, 1536, 16
    x, dt, z = (draw(B, T, D) for _ in range(3))
    b, c = (draw(B, T, N) for _ in range(2))
    A = (-torch.rand(D, N, device="cuda") * 8).requires_grad_()
    skip, bias = draw(D, dtype=torch.float32), draw(D, dtype=torch.float32)
    state = draw(B, D, N, dtype=torch.float32)
    leaves = [x, dt, A, b, c, skip, z, bias, state]
    return lambda: selective_scan(x, dt, A, b, c, skip, z, bias, True, state), leaves


def scans() -> dict[str, tuple[Callable, list[torch.Tensor]]]:
    """Name -> (forward, its leaves)."""
    forward, leaves = scan_inputs()
    ways: dict[str, tuple[Callable, list[torch.Tensor]]] = {"longroll, with states": (forward, leaves)}
    if "mamba-ssm" in peers.available():
        fn = peers.module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
        x, dt, A, b, c, skip, z, bias, _ = leaves
        rows = [t.detach().transpose(1, 2).contiguous().requires_grad_() for t in (x, dt, b, c, z)]
        rx, rdt, rb, rc, rz = rows
        ways["mamba-ssm (CUDA), no state"] = (
            lambda: (fn(rx, rdt, A, rb, rc, skip, rz, bias, delta_softplus=True),),
            [*rows, A, skip, bias],
        )
    return ways


SCAN_VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "back: 144 registers": {"REGISTERS": {"maxnreg": 144}},
    "back: 200 registers": {"REGISTERS": {"maxnreg": 200}},
    "spans of 32": {"SPAN": 32},
    "spans of 128": {"SPAN": 128},
}
"""Name -> what is other in `longroll.ops.gpu.selective_scan`."""


HEADS = {
    "mamba2-370m": (4, 2048, 32, 64, 128),
    "bamba-9b": (2, 4096, 128, 64, 128),
    "falcon-h1": (2, 4096, 24, 128, 256),
}
"""Rows, time, heads, width and state of the SSD in released models' shapes."""

_WIDE_CHUNKS = {
    "CHUNK": 128,
    "WALK": {"num_stages": 2},
    "OUTPUTS": {"num_warps": 8, "num_stages": 2},
    "OF_X": {"num_warps": 8},
    "OF_B_AND_C": {"num_warps": 8},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "chunks of 128": _WIDE_CHUNKS,
    "chunks of 128, fewer heads": _WIDE_CHUNKS | {"OF_B_AND_C": {"num_warps": 8, "HEADS": 8}},
    "walk: 128 columns, 8 warps": {"WALK_64": {"N": 128, "num_warps": 8}},
    "walk: 1 chunk": {"WALK_64": {"AT_ONCE": 1}},
    "walk: 4 stages": {"WALK": {"num_stages": 4}},
    "outputs: 4 heads": {"OUTPUTS": {"HEADS": 4}},
    "outputs: 16 heads": {"OUTPUTS": {"HEADS": 16}},
    "outputs: 2 stages": {"OUTPUTS": {"num_stages": 2}},
    "outputs: 8 warps": {"OUTPUTS": {"num_warps": 8}},
    "x: 2 heads": {"OF_X": {"HEADS": 2}},
    "x: 4 heads": {"OF_X": {"HEADS": 4}},
    "x: 2 heads, 2 stages": {"OF_X": {"HEADS": 2, "num_stages": 2}},
    "x: 8 warps": {"OF_X": {"num_warps": 8}},
    "B and C: 16 heads": {"OF_B_AND_C": {"HEADS": 16}},
    "B and C: 8 heads": {"OF_B_AND_C": {"HEADS": 8}},
    "B and C: 3 stages": {"OF_B_AND_C": {"num_stages": 3}},
    "B and C: all columns": {"OF_B_AND_C": {"N": 128, "HEADS": 8}},
    "B and C: 8 warps": {"OF_B_AND_C": {"num_warps": 8}},
    "all: 8 warps": {"OUTPUTS": {"num_warps": 8}, "OF_X": {"num_warps": 8}, "OF_B_AND_C": {"num_warps": 8}},
}
"""Name -> what is other in `longroll.ops.gpu.ssd`."""


def ssd_inputs(size: tuple[int, int, int, int, int]) -> tuple[Callable, list[torch.Tensor]]:
    """SSD forward, and its leaves, in one of `HEADS`."""
    B, T, H, P, N = size
    x, dt = draw(B, T, H, P), draw(B, T, H)
    b, c = draw(B, T, 1, N), draw(B, T, 1, N)
    A = (-torch.rand(H, device="cuda") * 8 - 1).requires_grad_()
    skip, bias = draw(H, dtype=torch.float32), (draw(H, dtype=torch.float32).detach() - 4).requires_grad_()
    state = draw(B, H, P, N, dtype=torch.float32)
    return lambda: ssd(x, dt, A, b, c, skip, None, bias, True, state), [x, dt, A, b, c, skip, bias, state]


def replayed(call: Callable[[], object]) -> float:
    """Milliseconds of a call as a CUDA graph, which waits for no Python: the median of replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return do_bench(graph.replay, warmup=10, rep=40, return_mode="median")


def variants(
    name: str,
    made: tuple[Callable, list[torch.Tensor]],
    kernels: ModuleType,
    kinds: dict[str, dict[str, Any]],
) -> dict[str, dict]:
    """Variant -> milliseconds forward and in both directions, and how far its results are from today's."""
    forward, leaves = made
    today: list[torch.Tensor] = []
    rows: dict[str, dict] = {}

    def results() -> list[torch.Tensor]:
        outputs = forward()
        return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])]

    for kind, changes in kinds.items():
        usual = {key: getattr(kernels, key) for key in changes}
        for key, value in changes.items():
            setattr(kernels, key, usual[key] | value if isinstance(value, dict) else value)
        try:
            found = [t.detach().double() for t in results()]
            today = today or found
            apart = [((a - b).norm() / b.norm()).item() for a, b in zip(found, today, strict=True)]
            rows[kind] = {
                "forward_ms": replayed(torch.no_grad()(forward)),
                "forward_backward_ms": replayed(both_ways(forward, leaves)),
                "apart": max(apart),
            }
        except Exception as error:  # too little shared memory, say
            rows[kind] = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
        for key, value in usual.items():
            setattr(kernels, key, value)
        print(f"{name:12} {kind:28} {rows[kind]}", flush=True)
    return rows


def attention() -> dict[str, dict]:
    """Way -> milliseconds and error of 4096 queries over 65,536 earlier keys."""
    q = draw(1, 32, 4096, 128).detach()
    k, v = (draw(1, 8, 65_536, 128).detach() for _ in range(2))
    wide = [t.repeat_interleave(4, dim=1) for t in (k, v)]
    scale, aten = 128**-0.5, torch.ops.aten
    folded = q.unflatten(1, (8, 4)).flatten(2, 3)
    ways: dict[str, Callable[[], Any]] = {
        "flash": lambda: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, scale=scale),
        "flash, folded": lambda: aten._scaled_dot_product_flash_attention(
            folded, k, v, 0.0, False, scale=scale
        ),
        "cudnn, folded": lambda: aten._scaled_dot_product_cudnn_attention(
            folded, k, v, None, True, 0.0, False, False, scale=scale
        ),
        "cudnn": lambda: aten._scaled_dot_product_cudnn_attention(
            q, *wide, None, True, 0.0, False, False, scale=scale
        ),
        "efficient, folded": lambda: aten._scaled_dot_product_efficient_attention(
            folded, k, v, None, True, 0.0, False, scale=scale
        ),
    }
    some = slice(0, 64)  # queries
    scores = q[:, :, some].float() @ wide[0].float().mT * scale
    exact, norm = scores.softmax(-1) @ wide[1].float(), scores.logsumexp(-1)
    rows: dict[str, dict] = {}
    for name, way in ways.items():
        try:
            out, sums, *_ = way()
            shape = [*sums.shape]
            out, sums = (
                out.reshape(1, 32, 4096, 128)[:, :, some],
                sums.reshape(1, 32, -1)[..., :4096][..., some],
            )
            errors = [((a.float() - b).norm() / b.norm()).item() for a, b in ((out, exact), (sums, norm))]
            ms = do_bench(way, warmup=10, rep=60, return_mode="median")
            flops = 4 * 4096 * 65_536 * 32 * 128 / ms * 1e3
            rows[name] = {"ms": ms, "tflops": flops / 1e12, "errors": errors, "shape_of_sums": shape}
        except Exception as error:  # no such kernel here
            rows[name] = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
        print(f"attention    {name:28} {rows[name]}", flush=True)
    return rows


def ssds() -> dict[str, tuple[Callable, list[torch.Tensor]]]:
    """Name -> (forward, its leaves)."""
    forward, leaves = ssd_inputs(HEADS["mamba2-370m"])
    x, dt, A, b, c, skip, bias, state = leaves
    H = x.shape[2]
    ways: dict[str, tuple[Callable, list[torch.Tensor]]] = {"longroll, with states": (forward, leaves)}
    if "mamba-ssm" in peers.available():
        fn = peers.module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
        for given in (None, state):
            ways[f"mamba-ssm (Triton), {'no state' if given is None else 'with states'}"] = (
                lambda given=given: fn(
                    x, dt, A, b, c, 256, D=skip, dt_bias=bias, dt_softplus=True, initial_states=given,
                    return_final_states=given is not None,
                ),
                leaves if given is not None else leaves[:-1],
            )  # fmt: skip
    if "fla" in peers.available():
        from fla.ops.simple_gla import chunk_simple_gla

        def mapped():
            size = F.softplus(dt.float() + bias)
            q, k = (t.expand(-1, -1, H, -1).contiguous() for t in (c, b))
            v = (x * size[..., None]).to(x.dtype)
            o, final = chunk_simple_gla(
                q, k, v, size * A, scale=1.0, initial_state=state.mT.contiguous(), output_final_state=True
            )
            return o + skip[:, None] * x, final

        ways["fla chunk_simple_gla, with states"] = (mapped, leaves)
    return ways


def both_ways(forward: Callable, leaves: list[torch.Tensor]) -> Callable[[], None]:
    """Forward, then the gradients of all leaves."""

    def both() -> None:
        outputs = forward()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], allow_unused=True)

    return both


def peak_gib(both: Callable[[], None]) -> float:
    """Peak memory above what is there, GiB; the first call compiles."""
    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def measured(op: str, ways: dict[str, tuple[Callable, list[torch.Tensor]]]) -> dict[str, dict]:
    """Name -> medians of turns, their spread, and peak memory; a peer that does not run here has no row."""
    rows: dict[str, dict] = {}
    turns: dict[tuple[str, str], tuple[Callable, int, list[float]]] = {}
    for name, (forward, leaves) in ways.items():
        both = both_ways(forward, leaves)
        try:
            rows[name] = {"peak_gib": peak_gib(both)}
        except Exception as error:
            print(f"{op}, {name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}", flush=True)
            continue
        turns[name, "forward"] = torch.no_grad()(forward), 100, []
        turns[name, "forward_backward"] = both, 200, []
    for _ in range(TURNS):  # the clock of a GPU drifts, for all alike
        for call, rep, ms in turns.values():
            ms.append(do_bench(call, warmup=20, rep=rep, return_mode="median"))
    for (name, what), (_, _, ms) in turns.items():
        rows[name] |= {f"{what}_ms": statistics.median(ms), f"{what}_spread_ms": [min(ms), max(ms)]}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", help="write the results here")
    parser.add_argument(
        "--variants", nargs="*", choices=VARIANTS, help="only the SSD, in other tiles; none: all"
    )
    parser.add_argument(
        "--scan-variants",
        nargs="*",
        choices=SCAN_VARIANTS,
        help="only the scan, in other spans; none: all",
    )
    parser.add_argument("--only", nargs="*", choices=("selective_scan", "ssd"), help="of the comparison")
    options = parser.parse_args()
    torch.manual_seed(0)
    began, table = time.perf_counter(), {}

    def write(what: str) -> None:
        if options.json:
            made = provenance(seed=0, seconds=time.perf_counter() - began, device="cuda")
            BenchmarkResult.from_json({"what": what, "ops": table, "provenance": made}).write(options.json)

    if options.scan_variants is not None:
        kinds = {kind: SCAN_VARIANTS[kind] for kind in options.scan_variants or SCAN_VARIANTS}
        table["mamba-130m"] = variants("mamba-130m", scan_inputs(), scan_kernels, kinds)
        write("gpu_ops_variants")
        return
    if options.variants is not None:
        table["attention"] = attention()
        kinds = {kind: VARIANTS[kind] for kind in options.variants or VARIANTS}
        for name, size in HEADS.items():
            table[name] = variants(name, ssd_inputs(size), ssd_kernels, kinds)
            write("gpu_ops_variants")
        return
    for op, ways in (("selective_scan", scans), ("ssd", ssds)):
        if options.only and op not in options.only:
            continue
        table[op] = measured(op, ways())
        ours = table[op]["longroll, with states"]["forward_backward_ms"]
        for name, row in table[op].items():
            low, high = row["forward_backward_spread_ms"]
            print(
                f"{op:15} {name:36} forward {row['forward_ms']:.3f} ms, with backward "
                f"{row['forward_backward_ms']:.3f} ({low:.3f} to {high:.3f}) ms, {row['peak_gib']:.2f} GiB; "
                f"ours takes {ours / row['forward_backward_ms']:.3f}x its time",
                flush=True,
            )
        write("gpu_ops")


if __name__ == "__main__":
    main()
