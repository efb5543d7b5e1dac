"""Train models that break past their training length on books, and repair them in many ways under one budget.

    python recipes/repair.py --prepare shared/data --tokens tokens          # once: 16 cores a minute
    python recipes/repair.py mamba2-22m --tokens tokens --work work --output repair.json
    python recipes/repair.py --table repair.json

A model of `repair_models.PLANS` is trained from scratch, measured (`repair_measure.py`), and repaired by each
arm of its screen (`repair_arms.py`), each from the same weights, on as many tokens of the same books. One
row in eight holds a span of 32 tokens twice, in training and in repair, so that there is a memory to measure.
Choices are made on 8 books kept aside (`development`), figures on the 13 valid books.

Results are merged into --output after each arm. A run that ends goes on where it stopped: the base's weights
and each finished arm lie in --work. Several processes may work on one model: each arm is taken by one. With
--until no arm is begun that would not end in as many seconds.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import math
import shutil
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from repair_arms import SCREENS, Arm, arm_of, at_zero, design
from repair_measure import Measures
from repair_models import PLANS, Plan
from repair_table import draw, summary, table
from repair_text import Books, Feed, prepare
from safetensors.torch import load_file, save_file
from torch import Tensor

from longroll import RecurrentLM
from longroll.data import Corpus
from longroll.errors import LongrollError
from longroll.interventions import Intervention
from longroll.measure.held_out import HeldOut
from longroll.results import provenance, write_json
from longroll.state import RecurrentState
from longroll.training import PosttrainOptions, by_recipe, posttrain
from longroll.training.graphs import StepGraph
from longroll.training.lora import with_lora
from longroll.training.loss import hidden_loss
from longroll.training.weights import DECAYS, projects

BEGAN = time.time()
COPIED = 1 / 8  # share of rows with a span twice
FIGURES = (
    "none", "sp", "tbptt", "sp zero=0.1 speed=30", "tbptt zero=0.1 speed=30",
    "tbptt zero=0.1 speed=30 rate=0.001 train=scales", "default",
)  # fmt: skip
"""Arms measured in depth."""
GATES = ("gk_proj.0.weight", "gk_proj.1.weight")
"""Matrices from which an input sets the decays."""
VOCABULARY = 16_384
LORA = 16


class Steps:
    """Training steps of one model: as a CUDA graph where the plan and the device allow."""

    def __init__(self, lm: RecurrentLM, plan: Plan) -> None:
        self.lm, self.cuda = lm, lm.device.type == "cuda"
        self.graphs = plan.graphs and self.cuda
        self.reference: RecurrentLM | None = None
        self._made: dict[Any, Any] = {}

    def forget(self) -> None:
        """Drop the graph and its memory."""
        self._made.clear()
        if self.cuda:
            torch.cuda.empty_cache()

    def __call__(
        self, ids: Tensor, targets: Tensor, state: RecurrentState | None, arm: Arm, zero: Tensor
    ) -> tuple[Tensor, RecurrentState]:
        """Loss and final state of a step, gradients added to the parameters.

        Args:
            ids: (B, T).
            targets: (B, T), -100 where there is no loss.
            state: the first state.
            arm: `keep` and `train` of it.
            zero: (B,), rows that start from the zero state.
        """
        if not self.graphs:
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.cuda):
                loss, final = self._loss(ids, targets, state, None, zero, arm.keep)
            loss.backward()
            return loss.detach(), final.detach()
        key = (arm.train, arm.keep, ids.shape)
        if key not in self._made:
            self.forget()
            self._made[key] = _Graph(self, arm.keep, zero)
        graph = self._made[key]
        graph.zero.copy_(zero)
        try:
            return graph(ids.contiguous(), targets.contiguous(), state)
        except LongrollError as error:  # which a step after the first cannot raise
            print(f"plain steps: {error}", flush=True)
            self.graphs = False
            self.forget()
            self.lm.model.zero_grad()
            return self(ids, targets, state, arm, zero)

    def _loss(
        self, ids: Tensor, targets: Tensor, state: Any, items: Any, zero: Tensor, keep: float
    ) -> tuple[Tensor, RecurrentState]:
        hidden, final = self.lm(ids, state, logits=False)
        loss = hidden_loss(self.lm, hidden, targets, items)
        if keep and self.reference is not None:  # rows that start from zero are as a user reads them
            with torch.no_grad():
                base = self.reference.head(self.reference(ids, logits=False)[0]).log_softmax(-1)
            divergence = (base.exp() * (base - self.lm.head(hidden).log_softmax(-1))).sum(-1).mean(1)
            loss = loss + keep * (divergence * zero).sum() / zero.sum().clamp_min(1)
        return loss, final


class _Graph(StepGraph):
    """A graph of `Steps._loss`."""

    def __init__(self, steps: Steps, keep: float, zero: Tensor) -> None:
        super().__init__(steps.lm, dtype=torch.bfloat16)
        self.steps, self.keep, self.zero = steps, keep, zero.clone()

    def _step(self) -> tuple[Tensor, RecurrentState]:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            initial = RecurrentState(self._stacks.split(self._initial))
            loss, final = self.steps._loss(
                self._ids, self._targets, initial, self._num_items, self.zero, self.keep
            )
        loss.backward()
        return loss.detach(), final.detach()


def train(
    steps: Steps,
    feed: Feed,
    arm: Arm,
    intervention: Intervention | None,
    *,
    count: int,
    weight_decay: float = 0.0,
    floor: float = 0.0,
    warm: float = 0.05,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train by AdamW, clipped at norm 1; the rate rises over `warm` of the steps and falls to `floor`."""
    model, began = steps.lm.model.train(), time.time()
    matrices, groups = projects(model), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = (name.endswith(DECAYS), weight_decay if name in matrices else 0.0)
            groups.setdefault(kind, []).append(parameter)
    peaks = [arm.rate * (arm.speed if decays else 1.0) for decays, _ in groups]
    optimizer = torch.optim.AdamW(
        [{"params": some, "weight_decay": decay} for (_, decay), some in groups.items()],
        betas=(0.9, 0.95),
        fused=steps.cuda,
    )
    trained = [p for some in groups.values() for p in some]
    late, counted = torch.zeros((), device=steps.lm.device), 0
    nowhere = torch.zeros(len(feed.stay), dtype=torch.bool, device=steps.lm.device)
    for step in range(count):
        share = min(1.0, (step + 1) / max(1, warm * count))
        share *= floor + (1 - floor) * (0.5 + 0.5 * math.cos(math.pi * step / count))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        tokens, starts = feed.next()
        ids, targets = tokens[:, :-1], tokens[:, 1:]
        state = intervention and intervention.initial_state({"input_ids": ids, "starts": starts})
        zero = nowhere if not (arm.keep or arm.skip) else at_zero(state, len(ids), ids.device)
        if arm.skip:
            targets = targets.clone()
            targets[:, : arm.skip].masked_fill_(~zero[:, None], -100)
        loss, final = steps(ids, targets, state or None, arm, zero)
        if intervention is not None:
            intervention.observe(final)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= 0.9 * count:
            late, counted = late + loss, counted + 1
        if say is not None and (step + 1) % 250 == 0:
            say(f"step {step + 1} of {count}, loss {loss.item():.3f}, {time.time() - began:.0f} s")
    return {
        "steps": count,
        "tokens": count * feed.length * len(feed.stay),
        "last_loss": (late / max(1, counted)).item(),
        "train_seconds": round(time.time() - began, 1),
    }


class Run:
    """One model: its base and its arms."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options, self.plan = name, options, PLANS[name]
        self.folder = options.work / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = torch.device(options.device)
        torch.manual_seed(0)
        model = self.plan.build(self.plan, VOCABULARY)
        model.config.train_length = self.plan.length
        self.lm = RecurrentLM(model.to(self.device), name=name)
        self.steps = Steps(self.lm, self.plan)
        sides = [Books.load(options.tokens / f"{side}.xz") for side in ("extra", "train")]
        ends = sides[0].offsets[-1] + sides[1].offsets[1:]
        offsets = np.concatenate([sides[0].offsets, ends])
        self.books = Books(np.concatenate([side.ids for side in sides]), offsets)
        self.measures = Measures(self.plan, options.tokens, self.device, share=options.share)

    def say(self, words: str) -> None:
        """Print a line with the time since the script began."""
        print(f"{time.time() - BEGAN:6.0f} s {self.name}: {words}", flush=True)

    def base(self) -> None:
        """Train from scratch, or read the weights that were trained."""
        path = self.folder / "base.safetensors"
        with _taken(self.folder / "base.lock", wait=True):
            if path.exists():
                self.lm.model.load_state_dict(load_file(path, device=str(self.device)), strict=False)
            else:
                self._train_base(path)
        self.weights = {name: p.detach().clone() for name, p in self.lm.model.named_parameters()}

    def _train_base(self, path: Path) -> None:
        plan, model = self.plan, self.lm.model
        self.say(f"{model.num_parameters() / 1e6:.1f}M parameters, {len(self.books.ids) / 1e6:.1f}M tokens")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.endswith(plan.frozen) if plan.frozen else True)
        stay = np.ones(plan.rows, dtype=np.int64)
        feed = Feed(self.books, plan.length, stay, copied=COPIED, device=self.device)
        count = max(1, round(self.options.scale * plan.tokens * 1e6 / plan.rows / plan.length))
        arm = Arm(rate=plan.rate, rows=plan.rows, steps=count)
        how = {"count": count, "weight_decay": 0.1, "floor": 0.1, "warm": 0.03, "say": self.say}
        told = train(self.steps, feed, arm, None, **how)
        self.steps.forget()
        found = {"parameters": model.num_parameters(), **told, **self._measure(deep=True)}
        self._save(path)
        self._keep("base", {"plan": _plain(plan), **found})

    def arm(self, arm: Arm) -> None:
        """Repair the base by one arm, measure, and write what was found."""
        model = self.lm.model
        self._restore()
        if arm.kind.startswith("default"):
            told = self._by_default(arm)
            self._keep(arm.name, {"arm": asdict(arm), **told, **self._measure(deep=arm.name in FIGURES)})
            self._keep_weights(arm.name)
            return
        if arm.keep and self.steps.reference is None:
            self.steps.reference = RecurrentLM(copy.deepcopy(model).eval().requires_grad_(False))
        lm, adapted = self.lm, None
        if arm.train == "lora":
            adapted = with_lora(model, LORA)
            lm = RecurrentLM(adapted, name=self.name)
        matrices = projects(model)
        for name, parameter in model.named_parameters():
            decays = name.endswith(DECAYS)
            norms = decays or "norm" in name or name.endswith((".D", "layernorm.weight"))
            chosen = {"all": True, "decays": decays, "norms": norms, "lora": decays or "lora_" in name}
            chosen["scales"] = name not in matrices
            chosen["gates"] = chosen["scales"] or name.endswith(GATES)
            parameter.requires_grad_(chosen[arm.train])
        steps = self.steps
        if adapted is not None:
            steps = Steps(lm, self.plan)
        stay, depth = arm.places()
        feed = Feed(
            self.books, self.plan.length, stay, depth, copied=COPIED, seed=1000 + arm.seed, device=self.device
        )
        count = max(2, round(arm.steps * self.options.share))
        told = train(steps, feed, arm, arm.intervention(), count=count)
        found = told | self._measure(lm, deep=arm.name in FIGURES)
        if adapted is not None:
            adapted.unload()
            steps.forget()
        self._keep(arm.name, {"arm": asdict(arm), **found})
        self._keep_weights(arm.name)

    def _by_default(self, arm: Arm) -> dict[str, Any]:
        """Train as `longroll posttrain` without a flag but --force, in bf16 on a GPU."""
        T, began, cuda = self.plan.length, time.time(), self.device.type == "cuda"
        self.steps.forget()
        self.lm.model.requires_grad_(True)
        held = HeldOut.from_corpus(_corpus(self.measures.aside), T)
        assert held is not None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=cuda):
            look = held.read(self.lm.eval())
        steps = max(2, round(500 * self.options.share))
        given: dict[str, Any] = {} if arm.speed == Arm.speed else {"decay_speed": arm.speed}
        given |= {} if arm.rate == Arm.rate else {"learning_rate": arm.rate}
        options = PosttrainOptions(length=T, steps=steps, bf16=cuda, seed=arm.seed, **given)
        asked = "sp" if arm.kind == "default-sp" else None
        books = _corpus(self.books if not arm.windows else self.books.cut(arm.windows * T))
        prepared = by_recipe(self.lm, books, options, intervention=asked)
        folder = self.folder / f"{arm.name}.model"
        posttrain(self.lm, books, prepared.intervention, prepared.options, folder)
        shutil.rmtree(folder)
        return {
            "look": look.to_json(),
            "sentence": prepared.sentence,
            "steps": steps,
            "tokens": prepared.options.tokens,
            "train_seconds": round(time.time() - began, 1),
        }

    def _save(self, path: Path) -> None:
        weights = {name: p.detach().contiguous() for name, p in self.lm.model.named_parameters()}
        save_file(weights, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)

    def _keep_weights(self, label: str) -> None:
        if label in self.options.weights:
            self._save(self.folder / f"{label}.safetensors")

    def _restore(self) -> None:
        with torch.no_grad():
            for name, parameter in self.lm.model.named_parameters():
                parameter.copy_(self.weights[name])
                parameter.grad = None

    def _measure(self, lm: RecurrentLM | None = None, *, deep: bool) -> dict[str, Any]:
        lm, began = lm or self.lm, time.time()
        found = {"development": self.measures.development(lm), **self.measures.losses(lm)}
        found["memory"] = self.measures.memory(lm)
        if deep:
            found["depth"] = self.measures.depth(lm)
        found["measure_seconds"] = round(time.time() - began, 1)
        shown = {b // self.plan.length: round(float(np.mean(v)), 3) for (_, b), v in
                 zip(found["octaves"], found["by_octave"], strict=True)}  # fmt: skip
        self.say(f"in range {np.mean(found['in_range']):.3f}, to T: {shown}")
        return found

    def _keep(self, label: str, found: dict[str, Any]) -> None:
        made = provenance(self.lm, seed=found.get("arm", {}).get("seed", 0), seconds=time.time() - BEGAN)
        found = {"model": self.name, "label": label, **found, "provenance": made}
        write_json(self.folder / f"{label}.json", found)
        collect(self.options.work, self.options.output)

    def all(self, arms: list[Arm]) -> None:
        """The base and the arms, as long as there is time."""
        self.base()
        found, longest = json.loads((self.folder / "base.json").read_text()), 0.0
        damage = float(np.mean(found["read_on"]) - np.mean(found["read_fresh"]))
        if damage < self.options.broken:
            self.say(f"holds: {damage:.3f} nats above a fresh start")
            return
        for arm in arms:
            if (self.folder / f"{arm.name}.json").exists():
                continue
            if time.time() - BEGAN + longest > self.options.until:
                self.say("no time for another arm")
                return
            with _taken(self.folder / f"{arm.name}.lock") as mine:
                if mine and not (self.folder / f"{arm.name}.json").exists():
                    began = time.time()
                    self.say(arm.name)
                    try:
                        self.arm(arm)
                    except (LongrollError, RuntimeError):
                        traceback.print_exc()  # the other arms are worth having
                    longest = max(longest, time.time() - began)
        self.say("done")


@contextmanager
def _taken(path: Path, *, wait: bool = False):  # type: ignore[no-untyped-def]
    """Hold a lock that ends with the process; yields whether it was free."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def collect(work: Path, output: Path) -> None:
    """Merge the results of all arms into one file: model -> label -> result."""
    with _taken(work / "collect.lock", wait=True):
        found: dict[str, dict[str, Any]] = {}
        for name in PLANS:
            for path in sorted((work / name).glob("*.json")):
                found.setdefault(name, {})[path.stem] = compact(json.loads(path.read_text()))
        write_json(output, {"kind": "repair", "models": found})


def compact(value: Any) -> Any:
    """Drop what figures do not draw, and digits that no measure has."""
    if isinstance(value, dict):
        dropped = {"std_heads", "rank_heads", "norm", "max", "rank", "conv", "low", "high"}
        return {key: compact(item) for key, item in value.items() if key not in dropped}
    if isinstance(value, list):
        return [compact(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _corpus(books: Books) -> Corpus:
    return Corpus(books.ids.astype(np.int32), books.offsets, 4 * len(books.ids))


def _plain(plan: Plan) -> dict[str, Any]:
    return {key: value for key, value in asdict(plan).items() if key != "build"}


def main() -> None:
    """Prepare, run or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*PLANS, []], help="one after another")
    parser.add_argument("--prepare", type=Path, metavar="DATA", help="tokenise the books of a folder")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the tables of a result file")
    parser.add_argument("--summary", type=Path, metavar="JSON", help="write the figures of --table, too")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="draw the results of --table, too")
    parser.add_argument("--tokens", type=Path, help="the folder of the token ids")
    parser.add_argument("--work", type=Path, help="weights and arms, to go on from")
    parser.add_argument("--output", type=Path, help="the result file")
    parser.add_argument("--arm", action="append", metavar="NAME", help="these arms in place of the screen")
    parser.add_argument("--screen", choices=SCREENS, help="in place of the model's")
    parser.add_argument("--weights", action="append", default=[], metavar="ARM",
                        help="keep the weights of these arms, for repair_lm_eval.py")  # fmt: skip
    parser.add_argument("--broken", type=float, default=-math.inf, metavar="NATS",
                        help="repair no model that is less above a fresh start at 64 T")  # fmt: skip
    parser.add_argument("--until", type=float, default=math.inf, help="begin no arm that would end later")
    parser.add_argument("--scale", type=float, default=1.0, help="of the base's tokens")
    parser.add_argument("--share", type=float, default=1.0, help="of steps and measured rows, to try it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.prepare:
        prepare(options.prepare, options.tokens, vocabulary=VOCABULARY)
    for name in options.models:
        arms = [arm_of(text) for text in options.arm] if options.arm else None
        arms = arms or design(options.screen or PLANS[name].screen)
        Run(name, options).all(arms)
    if options.table:
        found = json.loads(options.table.read_text())
        print(table(found))
        if options.summary:
            write_json(options.summary, compact(summary(found)))
        for path in draw(found, options.figures) if options.figures else []:
            print(path)


if __name__ == "__main__":
    main()
