"""Gradients summed over all ranks while backward goes on: DDP's buckets, without DDP, within a CUDA graph.

DDP ties the parameters to the stream on which it was made, and wants its own forward before each backward.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 25 << 20
"""Bytes of gradients that are exchanged at once, as in DDP."""


class Reduction:
    """Within it, backward leaves sums over all ranks in `.grad`, which are views of the buckets.

    Each parameter gets one gradient within it. All ranks run the same backward, which gives their buckets one
    order.

    Args:
        parameters: whose gradients are exchanged.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._waiting: list[nn.Parameter] = []
        self._sent: list[tuple[dist.Work | None, Tensor, list[nn.Parameter]]] = []

    def __enter__(self) -> None:
        self._hooks = [p.register_post_accumulate_grad_hook(self._take) for p in self.parameters]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if kind is None and self._waiting:
            self._send()
        for work, flat, parameters in self._sent:
            if kind is None and work is not None:
                work.wait()
                views = torch._utils._unflatten_dense_tensors(flat, [p.grad for p in parameters])
                for parameter, view in zip(parameters, views, strict=True):
                    parameter.grad = view
        self._waiting, self._sent = [], []

    def _take(self, parameter: Tensor) -> None:
        self._waiting.append(parameter)  # type: ignore[arg-type]
        if sum(p.grad.nbytes for p in self._waiting if p.grad is not None) >= BUCKET:
            self._send()

    def _send(self) -> None:
        parameters, self._waiting = self._waiting, []
        flat = torch._utils._flatten_dense_tensors([p.grad for p in parameters])
        self._sent.append((dist.all_reduce(flat, async_op=True), flat, parameters))
