"""Programmatic dependent launch: on Hopper, a kernel's programs are in place before the last kernel ends.

Each kernel begins by `begin`: it waits for what kernels before it wrote, and lets the next one come.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

OVERLAPS = False
"""Whether kernels are launched so."""

_KNOWN = (
    torch.version.cuda is not None
    and not triton.knobs.runtime.interpret
    and hasattr(tl.extra.cuda, "gdc_wait")
    and hasattr(tl, "target_info")
)

if _KNOWN:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
    from triton.language.target_info import cuda_capability_geq

    @triton.jit
    def begin():
        """Wait for the kernels before; both instructions do nothing in an ordinary launch."""
        if cuda_capability_geq(9, 0):
            gdc_wait()
            gdc_launch_dependents()

else:

    @triton.jit
    def begin():
        """Wait for the kernels before, which an ordinary launch does."""


def overlap(device: torch.device) -> dict[str, bool]:
    """Return the launch's options on a device."""
    return {"launch_pdl": True} if OVERLAPS and _KNOWN and _is_hopper(device) else {}


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
