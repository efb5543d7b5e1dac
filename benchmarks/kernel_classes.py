"""Classes of the GPU kernels of a training step, by parts of their names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

CLASSES = {
    "matrix products": ("nvjet", "gemm", "cutlass"),
    "SSD": ("_ssd_",),
    "convolution": ("_conv_",),
    "norms": ("_norm_",),
    "loss": ("_entropy_",),
    "AdamW": ("FusedOptimizer",),
    "copies and fills": ("Memcpy", "Memset", "memset", "FillFunctor", "CatArray"),
    "casts": ("copy_kernel",),
    "additions": ("CUDAFunctor_add",),
    "sums": ("reduce_kernel", "_column_sums"),
    "embedding": ("embedding", "radix", "compute_grad_weight", "sum_and_scatter", "gather"),
}


def class_of(name: str) -> str:
    """Return the class of a kernel."""
    return next((kind for kind, parts in CLASSES.items() if any(part in name for part in parts)), "other")


def by_class(kernels: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return the milliseconds of each class, the longest first; events of the optimizer are no kernels."""
    found: dict[str, float] = {}
    for row in kernels:
        if not row["kernel"].startswith("Optimizer."):
            kind = class_of(row["kernel"])
            found[kind] = found.get(kind, 0.0) + row["ms"]
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))
