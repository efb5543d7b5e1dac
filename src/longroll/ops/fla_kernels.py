"""fla's chunked Triton kernels under the signatures of `longroll.ops`.

Always the chunked kernel, however short the text: fla's `fused_recurrent_rwkv6` ignores the gradient of the
final state, and those of rwkv7 and the gated delta rule have none. States go in and come out K-first, in
float32; decays go in as float32; all else in the dtype of the queries.

fla tries up to 60 configurations of each kernel before its first use: minutes for a first training step. Here
each kernel takes the configuration in the middle of its list, unless LONGROLL_AUTOTUNE=1.

Source: github.com/fla-org/flash-linear-attention, 0.6.0.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longroll.ops._precompile import precompile
from longroll.ops.fla_hopper import WARP_GROUP, keep_to_warps, register_if_needed

AUTOTUNE = "LONGROLL_AUTOTUNE"
"""Environment variable: `1` lets fla time its configurations; minutes once for each machine and shape."""

_Result = tuple[Tensor, Tensor | None]

# Large enough to fill tensor cores, small enough for the shared memory of any recent GPU.
_MIDDLE = {"BK": 64, "BV": 64, "BS": 32, "BT": 16, "BD": 32, "B": 2048, "num_warps": 4, "num_stages": 2}
# Products in IEEE float32 run unrolled: in larger tiles a kernel of KDA compiles for minutes. And two warps,
# to which Hopper keeps some, hold no more: KDA's spilled 9 KiB a thread, the walk over heads of 256 22 KiB.
_SMALL = _MIDDLE | {"BK": 32, "BV": 32}
_WIDE = 128  # keys up to which two warps hold 64 columns of a whole state


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> _Result:
    """Run `chunk_gla`; arguments as of `longroll.ops.gla`."""
    from fla.ops.gla import chunk_gla

    return _run(chunk_gla, {"q": q, "k": k, "v": v}, {"g": g}, scale, initial_state, output_final_state)


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_gamma: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> _Result:
    """Run `chunk_simple_gla`; arguments as of `longroll.ops.retention`."""
    from fla.ops.simple_gla import chunk_simple_gla

    timed, wide = {"q": q, "k": k, "v": v}, {"g_gamma": g_gamma}
    return _run(chunk_simple_gla, timed, wide, scale, initial_state, output_final_state)


def rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> _Result:
    """Run `chunk_rwkv6`; arguments as of `longroll.ops.rwkv6`."""
    from fla.ops.rwkv6 import chunk_rwkv6

    timed, wide = {"r": r, "k": k, "v": v}, {"w": w, "u": u}
    return _run(chunk_rwkv6, timed, wide, scale, initial_state, output_final_state)


def rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    lower_bound: float | None = None,
) -> _Result:
    """Run `chunk_rwkv7`; arguments as of `longroll.ops.rwkv7`."""
    from fla.ops.rwkv7 import chunk_rwkv7

    timed = {"r": r, "k": k, "v": v, "a": a, "b": b}
    return _run(
        chunk_rwkv7, timed, {"w": w}, scale, initial_state, output_final_state, lower_bound=lower_bound
    )


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    l2norm: bool,
) -> _Result:
    """Run `chunk_delta_rule`, which takes no float32: then `chunk_gated_delta_rule` without decay.

    Arguments as of `longroll.ops.delta_rule`.
    """
    from fla.ops.delta_rule import chunk_delta_rule

    if q.dtype == torch.float32:
        g = torch.zeros_like(beta)
        return gated_delta_rule(q, k, v, g, beta, scale, initial_state, output_final_state, l2norm)

    timed = {"q": q, "k": k, "v": v, "beta": beta}
    return _run(
        chunk_delta_rule,
        timed,
        {},
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel=l2norm,
    )


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    l2norm: bool,
) -> _Result:
    """Run `chunk_gated_delta_rule`; as `longroll.ops.gated_delta_rule`, with q and k for every head."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return _run(
        chunk_gated_delta_rule,
        {"q": q, "k": k, "v": v},
        {"g": g, "beta": beta},
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel=l2norm,
    )


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    l2norm: bool,
) -> _Result:
    """Run `chunk_kda`; arguments as of `longroll.ops.kda`."""
    from fla.ops.kda import chunk_kda

    return _run(
        chunk_kda,
        {"q": q, "k": k, "v": v, "beta": beta},
        {"g": g},
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel=l2norm,
    )


def _run(
    kernel: Callable[..., Any],
    timed: dict[str, Tensor],
    wide: dict[str, Tensor],
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    **options: Any,
) -> _Result:
    """Call a kernel with `timed` in the dtype of the first of them and `wide` in float32."""
    make_ready()
    dtype = next(iter(timed.values())).dtype
    arguments = {
        **{name: t.to(dtype) for name, t in timed.items()},
        **{name: t.float() for name, t in wide.items()},
        "initial_state": None if initial_state is None else initial_state.float(),
    }
    options |= {"scale": scale, "output_final_state": output_final_state}
    _compile_if_new(kernel, dtype, arguments, options)
    found: _Result = kernel(**arguments, **options)
    return found


_called: set[tuple[Any, ...]] = set()


@torch.compiler.disable
def _compile_if_new(
    kernel: Callable[..., Any], dtype: torch.dtype, arguments: dict[str, Any], options: dict[str, Any]
) -> None:
    """Compile ahead for heads of these shapes; a text of other length may still compile a kernel."""
    given = tuple(
        None if t is None else (t.shape[2:], t.requires_grad and torch.is_grad_enabled())
        for t in arguments.values()
    )
    called = (kernel, dtype, given, *options.items())
    if called not in _called and os.environ.get(AUTOTUNE) != "1":  # whose trials want to run
        _called.add(called)
        precompile(kernel, arguments | options)


@functools.cache
def make_ready() -> None:
    """Prepare fla for this process, whoever calls its kernels: configurations, and what Triton breaks."""
    kernels = tuners()
    keep_to_warps(kernels)
    if os.environ.get(AUTOTUNE) != "1":
        for tuner in kernels:
            _pin(tuner)
    register_if_needed()


def tuners() -> list[Any]:
    """Return the tuners of all of fla's kernels."""
    import fla.models
    import fla.ops  # noqa: F401 (so that all kernels are there)
    from triton.runtime.autotuner import Autotuner

    found: dict[int, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("fla."):
            for kernel in list(vars(module).values()):
                while kernel is not None:  # heuristics are wrapped around the tuner
                    if isinstance(kernel, Autotuner):
                        found[id(kernel)] = kernel
                    kernel = getattr(kernel, "fn", None)
    return list(found.values())


def _pin(tuner: Any) -> None:
    """Run the configuration nearest to the middle that fla allows for the shape and that fits the GPU."""
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import OutOfResources, PTXASError

    orders = [sorted(tuner.configs, key=functools.partial(_distance, m)) for m in (_MIDDLE, _SMALL)]
    two_warps = all(config.num_warps < WARP_GROUP for config in tuner.configs)
    spills = two_warps and tuner.base_fn.__module__.startswith("fla.ops.kda")
    whole_keys = two_warps and all("BK" not in config.kwargs for config in tuner.configs)
    prune, run = tuner.early_config_prune, tuner.run

    def pinned(*args: Any, **kwargs: Any) -> Any:
        named = dict(zip(tuner.arg_names, args))  # noqa: B905
        wide = whole_keys and (named | kwargs).get("K", 0) > _WIDE
        ranked = orders[spills or wide or _unrolls((*args, *kwargs.values()))]
        allowed = ranked if prune is None else prune(ranked, named, **kwargs)
        for config in list(allowed):
            tuner.configs = [config]
            try:
                return run(*args, **kwargs)
            except (OutOfResources, CompileTimeAssertionFailure, PTXASError):
                if config is allowed[-1]:
                    raise
                ranked.remove(config)

    tuner.run = pinned


def _unrolls(arguments: tuple[Any, ...]) -> bool:
    """Return whether a kernel multiplies in IEEE float32: Triton is set so, and no tensor has 16 bits."""
    tensors = (a for a in arguments if isinstance(a, Tensor))
    return os.environ.get("TRITON_F32_DEFAULT") == "ieee" and all(t.dtype.itemsize > 2 for t in tensors)


def _distance(middle: dict[str, int], config: Any) -> float:
    """Return how far a configuration is from `middle`, in doublings."""
    sizes = {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}
    return sum(
        abs(math.log2(sizes[name] / size))
        for name, size in middle.items()
        if isinstance(sizes.get(name), int) and sizes[name] > 0
    )
