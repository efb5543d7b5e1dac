"""What the processes of test_ranks.py run: `torchrun ranked.py RUNS`, each run a call of `posttrain`."""

import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback, TrainingArguments

from longroll import InitialStateTrainer, LongrollError, RecurrentLM, diagnose, ranks
from longroll.conformance.tiny import VOCAB, build
from longroll.data import ByteTokenizer, Corpus, Windows
from longroll.interventions import INTERVENTIONS
from longroll.tasks import Copying, Row, evaluate_grid
from longroll.training import HeldOut, PosttrainOptions, posttrain
from longroll.training.sharding import local

SIZES = (70, 9, 33, 50, 21, 8, 40, 61, 300, 120)


def corpus_of(sizes=SIZES, seed=0) -> Corpus:
    ids = np.random.default_rng(seed).integers(0, VOCAB, sum(sizes)).astype(np.int32)
    return Corpus(ids, np.cumsum([0, *sizes]).astype(np.int64), len(ids))


class Abandoned(Exception):
    """Ends a run in the midst, as if every rank had been killed."""


class Killed(TrainerCallback):
    """Ends a run at the beginning of a step: `rank` by SIGKILL; None: every rank abandons it.

    `rank` "launcher": rank 0 kills the launcher, which can end none of them.
    """

    def __init__(self, step: int, rank: int | str | None) -> None:
        self.step, self.rank = step, rank

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            if self.rank is None:
                raise Abandoned
            if ranks.rank() == self.rank:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.rank == "launcher" and ranks.rank() == 0:
                os.kill(os.getppid(), signal.SIGKILL)
        if self.rank == "launcher" and state.global_step >= self.step:
            time.sleep(0.2)


class Poisoned(TrainerCallback):
    """Spoils what an intervention carries at the beginning of a step: a row of all ranks', or moments."""

    def __init__(self, intervention, step: int, row: int) -> None:
        self.intervention, self.step, self.row = intervention, step, row

    def on_step_begin(self, args, state, control, **_):
        if state.global_step != self.step:
            return
        if self.intervention.name == "fitted":
            self.intervention.moments = self.intervention.moments.map(lambda t: t / 0)
        elif self.intervention.name != "random":
            row = self.row - ranks.rank() * self.intervention.passed.batch_size
            spoilt = self.intervention.passed.map(torch.clone)
            if 0 <= row < spoilt.batch_size:
                for tensor in spoilt.values():
                    tensor[row] = torch.inf
            self.intervention.passed = spoilt


class Spoiled(TrainerCallback):
    """Puts NaN into a weight of the last rank before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, model, **_):
        if state.global_step == self.step and ranks.rank() == ranks.world_size() - 1:
            with torch.no_grad():
                local(next(model.parameters())).view(-1)[0] = torch.nan


def run(
    kind, output, *, options, resume=False, kill=None, kill_rank=None, spoil=None,
    family="mamba2", dtype="float32", config=None, poison=None,
):  # fmt: skip
    """Post-train a tiny model; the result is `output`, or an interrupted run in it."""
    lm = RecurrentLM(build(family, 0, getattr(torch, dtype), **(config or {})))
    if options.get("cuda_graphs") is not None:
        lm.model.to(torch.device("cuda", int(os.environ["LOCAL_RANK"])))
    makes = {"zero_probability": 0.3, "seed": 3}
    intervention = None if kind == "none" else INTERVENTIONS[kind](**makes)
    callbacks = [] if kill is None else [Killed(kill, kill_rank)]
    held_out = HeldOut.from_corpus(corpus_of(seed=1), options["length"])
    callbacks += [Poisoned(intervention, *poison)] if poison else []
    callbacks += [] if spoil is None else [Spoiled(spoil)]
    log = posttrain(
        lm,
        corpus_of(),
        intervention,
        PosttrainOptions(**options),
        output,
        resume=resume,
        callbacks=callbacks,
        held_out=held_out if options.get("until_healthy") else None,
        force=True,
        finish=lambda log: Path(output, "log.json").write_text(json.dumps(log)),
    )
    return lm, log


def train(output, *, family, batch_size, arguments):
    """Train by InitialStateTrainer with evaluation inside, and save by `save_model`."""
    rows = Windows(corpus_of(), 8, num_items=4 * 4)
    trainer = InitialStateTrainer(
        build(family, 0, torch.float32),
        TrainingArguments(
            output, max_steps=4, per_device_train_batch_size=batch_size, use_cpu=True, report_to="none",
            per_device_eval_batch_size=batch_size, eval_strategy="steps", eval_steps=2, save_steps=2,
            logging_steps=1, learning_rate=1e-3, max_grad_norm=0.5, weight_decay=0.1, **arguments,
        ),
        intervention="sp",
        train_dataset=rows,
        eval_dataset=Windows(corpus_of(seed=1), 8, num_items=8),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(output)
    moments = [t for s in trainer.optimizer.state.values() for t in s.values() if t.ndim]
    held = {"weights": trainer.model.parameters(), "optimizer": moments}
    sizes = {name: sum(local(t).nbytes for t in tensors) for name, tensors in held.items()}
    Path(f"{output}.bytes.{ranks.rank()}").write_text(json.dumps(sizes))
    if ranks.rank() == 0:
        Path(output, "log.json").write_text(json.dumps(trainer.state.log_history))


def measure(output):
    """Measure a small grid, its samples dealt to the ranks; the cells without their times."""
    lm = RecurrentLM(build("mamba2", 0, vocab_size=256)).eval()
    rows = [Row(None, Copying(ByteTokenizer()))]
    cells = evaluate_grid(lm, rows, [4, 6], samples=5, batch_size=4, dealt=not ranks.alone())
    for cell in cells:
        cell.pop("seconds")
    write(output, cells)


def explain(explained, texts=5):
    """Diagnose a model with a head that hardly forgets, its texts, trials and starts dealt to the ranks."""
    lm, generator = RecurrentLM(build("mamba2", 0, torch.float64)).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.mul_(3)  # a text has a likely next token
        text, state = [torch.randint(VOCAB, (texts, 1), generator=generator)], None
        for _ in range(80):
            logits, state = lm(text[-1], state)
            text.append(torch.multinomial(logits[:, -1].softmax(-1), 1, generator=generator))
        mixer = lm.model.backbone.layers[1].mixer
        mixer.A_log[2], mixer.dt_bias[2] = -14.0, 0.0
    tokens = torch.cat(text, dim=1)
    write(explained, diagnose(lm, tokens, train_length=16, dealt=True).to_json())


def write(output, data):
    """A file for each rank."""
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{output}.{ranks.rank()}").write_text(json.dumps(data))


if __name__ == "__main__":
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(60, repeat=True)  # tells where a run stands that does not end
    for one in json.loads(sys.argv[1]):
        print(f"rank {ranks.rank()}, {time.process_time():.1f} s of CPU: {one}", file=sys.stderr, flush=True)
        try:
            works = {"kind": run, "explained": explain, "arguments": train}
            next((work for key, work in works.items() if key in one), measure)(**one)
        except Abandoned:
            continue
        except LongrollError as error:
            Path(f"{one['output']}.{ranks.rank()}").write_text(str(error))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort an interpreter that ends in order (torch 2.13)
