"""Training steps as one CUDA graph: a small model on a fast GPU waits for Python otherwise."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import torch
from torch import Tensor

from longroll.errors import LongrollError, first_line
from longroll.model import RecurrentLM
from longroll.stacks import Stacks
from longroll.state import RecurrentState
from longroll.training._reduction import Reduction
from longroll.training.loss import loss_and_state

_WARM_UP = 3  # steps that compile kernels and settle the libraries' work spaces


def check_device(device: torch.device) -> None:
    """Refuse CUDA graphs elsewhere.

    Raises:
        LongrollError: for another device than a GPU.
    """
    if device.type != "cuda":
        raise LongrollError("CUDA graphs (`cuda_graphs`) need the model on a CUDA device.")


class StepGraph:
    """Forward, loss and backward of `lm`, captured at the first call and replayed by the others.

    Gradients are added to the parameters' `.grad` as by `backward`; the final state is off the graph of
    autograd, as interventions want it. A recurrence reads an explicit zero state for None.

    Args:
        lm: a model on a CUDA device, in training mode. Attention starts each step without keys and values, as
            under every intervention, so that its shapes are fixed.
        dtype: autocast to it; None computes in the weights' precision.
        states: False for steps that all start from zero and whose final states nobody wants: these are
            captured without either.
        pool: `torch.cuda.graph_pool_handle()` of graphs that take turns and share their memory.
        exchange: sum gradients over all ranks within the graph, which all ranks capture and replay together.

    Raises:
        LongrollError: for a model on another device; when called with a state that it was made without, or
            for a model whose step waits for the GPU, as routers of experts do.
    """

    def __init__(
        self, lm: RecurrentLM, *, dtype: torch.dtype | None = None, states: bool = True, pool: Any = None,
        exchange: bool = False,
    ) -> None:  # fmt: skip
        check_device(lm.device)
        self.lm, self.dtype, self.states, self.pool = lm, dtype, states, pool
        self.exchange = exchange
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self, input_ids: Tensor) -> None:
        """Capture the step for batches of the shape of `input_ids` (B, T), unless one is captured."""
        if self._graph is not None:
            return
        earlier = [p.grad for p in self._parameters()]
        self._clear()
        with torch.cuda.device(self.lm.device):
            self._graph = self._capture(input_ids)
        for parameter, gradient in zip(self._parameters(), earlier, strict=True):
            parameter.grad = gradient

    def fits(self, input_ids: Tensor) -> bool:
        """Return whether a batch (B, T) has the shape that was captured; any does before."""
        return self._graph is None or input_ids.shape == self._ids.shape

    def __call__(
        self,
        input_ids: Tensor,
        targets: Tensor,
        state: RecurrentState | None = None,
        num_items: Tensor | int | None = None,
    ) -> tuple[Tensor, RecurrentState]:
        """Run a step.

        Args:
            input_ids: (B, T), of one shape in all calls.
            targets: (B, T), the token after each input; -100 is ignored.
            state: the initial state; None is the zero state.
            num_items: what the summed loss is divided by; default: the tokens that count.

        Returns:
            The loss, a scalar, and the final state; an empty one without `states`.
        """
        if state and not self.states:
            raise LongrollError("These steps were captured without states: StepGraph(states=True) takes one.")
        with torch.cuda.device(self.lm.device):
            return self._run(input_ids, targets, state, num_items)

    def _run(
        self, input_ids: Tensor, targets: Tensor, state: RecurrentState | None, num_items: Tensor | int | None
    ) -> tuple[Tensor, RecurrentState]:
        num_items = (targets != -100).sum().clamp_min(1) if num_items is None else num_items
        self.capture(input_ids)
        assert self._graph is not None
        earlier = [None if p.grad is None else p.grad.clone() for p in self._parameters()]
        self._ids.copy_(input_ids)
        self._targets.copy_(targets)
        self._num_items.copy_(num_items) if isinstance(num_items, Tensor) else self._num_items.fill_(
            num_items
        )
        full = RecurrentState({**self._zero, **(state or {})})  # an intervention may leave parts at zero
        self._stacks.copy(full, out=self._initial)
        self._graph.replay()
        for parameter, gradient, before in zip(self._parameters(), self._gradients, earlier, strict=True):
            parameter.grad = gradient
            if before is not None:
                gradient.add_(before)
        seen = 0 if self._forgets else (0 if state is None else state.seen) + input_ids.shape[1]
        # the next replay overwrites the graph's own
        final = self._stacks.copy(self._final, out=[torch.empty_like(stack) for stack in self._initial])
        return self._loss.clone(), RecurrentState(self._stacks.split(final), seen=seen)

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.lm.model.parameters() if p.requires_grad]

    def _capture(self, input_ids: Tensor) -> torch.cuda.CUDAGraph:
        self._zero = self.lm.zero_state(len(input_ids)) if self.states else RecurrentState({})
        self._stacks = Stacks(self._zero.alike())  # a graph copies each of its inputs by itself
        self._initial = self._stacks.copy(self._zero)
        self._ids, self._targets = input_ids.clone(), input_ids.clone()
        self._num_items = torch.ones((), device=input_ids.device)
        gc.collect()  # a dead graph of autograd ties the parameters to the stream that it was made on
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._step()
                self._clear()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:  # data may load in other threads
            with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
                self._loss, final = self._step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise LongrollError(
                f"A step of {self.lm.name} cannot be one CUDA graph: leave out `cuda_graphs` "
                f"({first_line(error)})"
            ) from error
        self._final = final.part("recurrent", "conv")
        self._forgets = self._final.keys() != final.keys()  # keys and values, which no new text goes on from
        self._gradients: list[Tensor] = [p.grad for p in self._parameters()]  # type: ignore[misc]
        return graph

    def _clear(self) -> None:
        for parameter in self._parameters():
            parameter.grad = None

    def _step(self) -> tuple[Tensor, RecurrentState]:
        with torch.autocast("cuda", self.dtype, enabled=self.dtype is not None, cache_enabled=False):
            initial = RecurrentState(self._stacks.split(self._initial))
            loss, final = loss_and_state(self.lm, self._ids, self._targets, initial, self._num_items)
        with Reduction(self._parameters()) if self.exchange else contextlib.nullcontext():
            loss.backward()
        return loss.detach(), final.detach() if self.states else self._zero
