"""Training steps without Trainer: for many small models on one GPU, whose time is Python's otherwise."""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import get_cosine_schedule_with_warmup

from longroll import RecurrentLM
from longroll.errors import LongrollError
from longroll.interventions import Intervention
from longroll.training.graphs import StepGraph
from longroll.training.loss import loss_and_state

EVERY = 10
"""Steps between two looks at the loss, which wait for the GPU."""
Batch = dict[str, torch.Tensor]


def fit(
    lm: RecurrentLM,
    batch_of: Callable[[int], Batch],
    intervention: Intervention | None,
    *,
    steps: int,
    learning_rate: float,
    learned: float = 0.0,
    warm: int = 0,
    cuda_graphs: bool = True,
) -> dict[str, Any]:
    """Train as `longroll.posttrain` does by default, in float32; return what came of it.

    That is AdamW without weight decay, gradients clipped to a norm of 1, a warm-up over 5 % of the steps, a
    cosine to 0.

    Args:
        lm: the model.
        batch_of: gives the batch of a step, `input_ids`, `shift_labels` (B, T) and `starts` (B,), on the
            model's device.
        intervention: chooses the initial states; None is the zero state.
        steps: at most.
        learning_rate: the largest.
        learned: ends training below this loss, in nats, the mean of `EVERY` steps.
        warm: steps before which training does not end so, such as those of a curriculum.
        cuda_graphs: replay forward and backward as one CUDA graph, on a GPU.
    """
    began = time.perf_counter()
    parameters = [p for p in lm.model.parameters() if p.requires_grad]
    on_gpu = lm.device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=on_gpu)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.05 * steps), steps)
    lm.model.train()
    run: Any = None
    if on_gpu and cuda_graphs:
        run = StepGraph(lm, states=intervention is not None)
        try:
            run.capture(batch_of(0)["input_ids"])
        except LongrollError as error:
            print("without a graph:", error, flush=True)
            run = None
    losses: list[list[float]] = []
    total = torch.zeros((), device=lm.device)
    step = 0
    while step < steps:
        batch = batch_of(step)
        state = intervention.initial_state(batch) if intervention else None
        ids, targets = batch["input_ids"], batch["shift_labels"]
        if run is not None:
            loss, final = run(ids, targets, state)
        else:
            loss, final = loss_and_state(lm, ids, targets, state)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if intervention:
            intervention.observe(final)
        total += loss.detach()
        step += 1
        if step % EVERY == 0:
            losses.append([step, round(total.item() / EVERY, 4)])
            total.zero_()
            if (step >= warm and losses[-1][1] < learned) or losses[-1][1] != losses[-1][1]:
                break
    return {
        "steps": step,
        "batch_size": len(ids),
        "learning_rate": learning_rate,
        "graph": run is not None,
        "train_seconds": round(time.perf_counter() - began, 1),
        "losses": [*losses[:: max(1, len(losses) // 20)], *losses[-1:]],
    }
