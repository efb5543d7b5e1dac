"""Mamba's scan and Mamba-2's SSD on a GPU, forward and backward, against mamba-ssm's and fla's kernels.

    python benchmarks/gpu_ops.py --json gpu_ops.json

bf16, the shapes of the 130m Mamba (8 x 2048) and the 370m Mamba-2 (4 x 2048). Ours start from a state, take
gradients through the final one and give that of the initial one; mamba-ssm's scan can do none of that and is
timed without. They take turns at `triton.testing.do_bench`: medians of turns, and their spread.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import peers
import torch
import torch.nn.functional as F
from triton.testing import do_bench

from longroll.ops.gpu.selective_scan import selective_scan
from longroll.ops.gpu.ssd import ssd
from longroll.results import BenchmarkResult, provenance

TURNS = 7


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()


def scans() -> dict[str, tuple[Callable, list[torch.Tensor]]]:
    """Name -> (forward, its leaves)."""
    B, T, D, N = 8, 2048, 1536, 16
    x, dt, z = (draw(B, T, D) for _ in range(3))
    b, c = (draw(B, T, N) for _ in range(2))
    A = (-torch.rand(D, N, device="cuda") * 8).requires_grad_()
    skip, bias = draw(D, dtype=torch.float32), draw(D, dtype=torch.float32)
    state = draw(B, D, N, dtype=torch.float32)
    leaves = [x, dt, A, b, c, skip, z, bias]
    ways: dict[str, tuple[Callable, list[torch.Tensor]]] = {
        "longroll, with states": (
            lambda: selective_scan(x, dt, A, b, c, skip, z, bias, True, state),
            [*leaves, state],
        )
    }
    if "mamba-ssm" in peers.available():
        fn = peers.module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
        rows = [t.detach().transpose(1, 2).contiguous().requires_grad_() for t in (x, dt, b, c, z)]
        rx, rdt, rb, rc, rz = rows
        ways["mamba-ssm (CUDA), no state"] = (
            lambda: (fn(rx, rdt, A, rb, rc, skip, rz, bias, delta_softplus=True),),
            [*rows, A, skip, bias],
        )
    return ways


def ssds() -> dict[str, tuple[Callable, list[torch.Tensor]]]:
    """Name -> (forward, its leaves)."""
    B, T, H, P, N = 4, 2048, 32, 64, 128
    x, dt = draw(B, T, H, P), draw(B, T, H)
    b, c = draw(B, T, 1, N), draw(B, T, 1, N)
    A = (-torch.rand(H, device="cuda") * 8 - 1).requires_grad_()
    skip, bias = draw(H, dtype=torch.float32), (draw(H, dtype=torch.float32).detach() - 4).requires_grad_()
    state = draw(B, H, P, N, dtype=torch.float32)
    leaves = [x, dt, A, b, c, skip, bias, state]
    ways: dict[str, tuple[Callable, list[torch.Tensor]]] = {
        "longroll, with states": (lambda: ssd(x, dt, A, b, c, skip, None, bias, True, state), leaves)
    }
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
    options = parser.parse_args()
    torch.manual_seed(0)
    began, table = time.perf_counter(), {}
    for op, ways in (("selective_scan", scans), ("ssd", ssds)):
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
        if options.json:
            made = provenance(seed=0, seconds=time.perf_counter() - began, device="cuda")
            result = {"what": "gpu_ops", "ops": table, "provenance": made}
            BenchmarkResult.from_json(result).write(options.json)


if __name__ == "__main__":
    main()
