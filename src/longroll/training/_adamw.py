"""PyTorch's fused AdamW, whose large tensors are moved by a kernel of longroll's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

LARGE = 1 << 18
"""Numbers of a tensor that gets a launch of its own."""


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)`, of the same arguments, state and numbers up to rounding."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options | {"fused": True, "foreach": None})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all parameters, as torch's; return what `closure` does."""
        from longroll.ops.gpu.adamw import adamw, takes

        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        skip: Tensor | None = getattr(self, "found_inf", None)
        scale: Tensor | None = getattr(self, "grad_scale", None)
        for group in self.param_groups:
            lists: list[list[Tensor]] = [[] for _ in range(6)]
            self._init_group(group, *lists)  # type: ignore[no-untyped-call]
            rows = list(zip(*(lists[i] for i in (0, 1, 2, 3, 5)), strict=True))
            ours = scale is None and not (
                group["amsgrad"] or group["maximize"] or torch.is_tensor(group["lr"])
            )
            large = [row for row in rows if ours and row[0].numel() >= LARGE and takes(row)]
            chosen = {id(row[0]) for row in large}
            small = [row for row in rows if id(row[0]) not in chosen]
            beta1, beta2 = group["betas"]
            if small:
                params, grads, means, squares, steps = map(list, zip(*small, strict=True))
                adam(
                    params, grads, means, squares, lists[4], steps, fused=True, amsgrad=group["amsgrad"],
                    beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
                    eps=group["eps"], maximize=group["maximize"], capturable=group["capturable"],
                    differentiable=False, grad_scale=scale, found_inf=skip, decoupled_weight_decay=True,
                )  # fmt: skip
            if not large:
                continue
            steps = [row[4] for row in large]
            torch._foreach_add_(steps, 1)
            if skip is not None:
                torch._foreach_sub_(steps, [skip] * len(steps))
            count = torch.stack(steps).double()
            corrections = torch.stack([1 - beta1**count, (1 - beta2**count).sqrt()], 1).float()
            for row, correction in zip(large, corrections, strict=True):
                adamw(
                    row[:4], correction, skip, lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"],
                    decay=group["weight_decay"],
                )  # fmt: skip
        return loss
