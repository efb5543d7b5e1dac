"""Kill post-training runs at random, resume them, and compare the final weights with an undisturbed run's.

Each trial draws a configuration (intervention, LoRA, accumulation, bfloat16, task, 1, 2 or 4 processes over
gloo) and kills the run by SIGKILL up to three times: all processes after a random time, or one process at a
random step, or one at a random file operation of a save or of the clean-up. A trial is exact if the weights
are bit-identical to those of the same configuration undisturbed, the log is the same, and so is the ledger:
after each start every process reads, from the step of a checkpoint on, what the undisturbed one read there.

    python benchmarks/kill_resume.py --trials 150 --json kill_resume.json

The processes are forked from one that has imported torch, so a trial takes seconds on two cores.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from longroll.conformance.tiny import VOCAB, build
from longroll.data import ByteTokenizer, Corpus
from longroll.interventions import INTERVENTIONS
from longroll.model import RecurrentLM
from longroll.results import BenchmarkResult, provenance
from longroll.tasks import Copying, CopyRows
from longroll.training import InitialStateTrainer, PosttrainOptions, posttrain

STEPS, LENGTH, ROWS = 8, 16, 4
PATIENCE = 30.0  # seconds that a process may live on after another was killed
KILLS = 3  # of a trial at most; the run after the last is left alone


def corpus() -> Corpus:
    sizes = np.random.default_rng(0).integers(8, 200, 40)
    ids = np.random.default_rng(1).integers(0, VOCAB, sizes.sum()).astype(np.int32)
    return Corpus(ids, np.cumsum([0, *sizes]).astype(np.int64), len(ids))


class Kill(TrainerCallback):
    """SIGKILL at a step: before it, before the optimizer moves, or after it."""

    def __init__(self, step: int, phase: str) -> None:
        setattr(self, phase, self._kill)
        self.step = step

    def _kill(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_at_operation(last: int) -> None:
    """SIGKILL at the `last`-th operation on files from now on."""
    count = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count >= last:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for owner, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (Path, "rename"), (torch, "save")):
        setattr(owner, name, counted(getattr(owner, name)))


class Ledger(InitialStateTrainer):
    """Notes the rows of every micro-batch."""

    file = Path()

    def training_step(self, model, inputs, *args, **kwargs):
        """Trainer's own."""
        digest = hashlib.sha256(inputs["input_ids"].cpu().numpy().tobytes()).hexdigest()[:12]
        with self.file.open("a") as file:
            file.write(f"{self.state.global_step} {digest}\n")
        return super().training_step(model, inputs, *args, **kwargs)


def work(config: dict, output: Path, ledger: Path, kill: dict | None) -> None:
    """One process of a run."""
    from longroll.training import _posttrain

    torch.set_num_threads(1)
    Ledger.file, _posttrain.InitialStateTrainer = ledger, Ledger
    kind, rows = config["kind"], ROWS // config["processes"]
    lm = RecurrentLM(build("mamba2", 0, vocab_size=256 if config["task"] else VOCAB))
    length = 64 if config["task"] else LENGTH
    micro_batches = STEPS * config["accumulation"]
    data = corpus()
    if config["task"]:
        data = CopyRows(Copying(ByteTokenizer()), micro_batches * ROWS, context=length, longest=20)
    callbacks = []
    if kill and kill["how"] == "step":
        callbacks = [Kill(kill["step"], kill["phase"])]
    elif kill and kill["how"] == "file":
        kill_at_operation(kill["operation"])
    options = PosttrainOptions(
        length,
        steps=STEPS,
        batch_size=rows,
        learning_rate=1e-2,
        save_steps=2,
        accumulation=config["accumulation"],
        bf16=config["bf16"],
        lora_rank=config["lora"],
    )
    posttrain(
        lm,
        data,
        None if kind == "none" else INTERVENTIONS[kind](zero_probability=0.3),
        options,
        output,
        resume=output.exists(),
        callbacks=callbacks,
        finish=lambda log: (output / "log.json").write_text(json.dumps(log)),
    )


def start(config: dict, output: Path, ledgers: Path, attempt: int, kill: dict | None) -> list[int]:
    """Fork the processes of a run; their ids."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    children = []
    for rank in range(config["processes"]):
        child = os.fork()
        if child:
            children.append(child)
            continue
        log = os.open(ledgers / f"{attempt}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        if config["processes"] > 1:
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank)}
            os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(config["processes"])}
        try:
            mine = kill if kill and kill.get("rank") == rank else None
            work(config, output, ledgers / f"{attempt}.{rank}", mine)
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
            status = 1
        sys.stderr.flush()
        os._exit(status)
    return children


def finish(children: list[int], seconds: float | None) -> tuple[bool, float]:
    """Wait for the processes, or kill all after `seconds`; whether all ended well, and the longest wait."""
    began, first, left, good, late = time.monotonic(), None, set(children), True, 0.0
    while left:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.remove(child)
                good &= status == 0
                first = first or (time.monotonic() if status else None)
                late = max(late, time.monotonic() - first) if first else late
        now = time.monotonic()
        if (seconds is not None and now - began > seconds) or (first and now - first > PATIENCE):
            for child in left:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return good, late


def ledger_of(file: Path) -> dict[int, list[str]]:
    """What a process read at each step."""
    found: dict[int, list[str]] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        step, _, digest = line.partition(" ")
        if len(digest) == 12:
            found.setdefault(int(step), []).append(digest)
    return found


def ledgers_agree(folder: Path, undisturbed: Path, attempts: int, processes: int) -> bool:
    """Whether each start read on from a saved step what the undisturbed run read there, to the last step."""
    for rank in range(processes):
        expected, reached = ledger_of(undisturbed / f"0.{rank}"), set()
        for attempt in range(attempts):
            read = ledger_of(folder / f"{attempt}.{rank}")
            steps = sorted(read)
            if steps and (steps != list(range(steps[0], steps[-1] + 1)) or steps[0] % 2):
                return False
            last = steps[-1] if steps else None
            for step, rows in read.items():
                whole = step == last or len(rows) == len(expected[step])
                if rows != expected[step][: len(rows)] or not whole:
                    return False
            reached |= set(steps)
        if reached != set(expected):
            return False
    return True


def draw_config(random_: random.Random) -> dict:
    task = random_.random() < 0.15
    kinds = ["none", "sp", "fitted", "random"] + ([] if task else ["tbptt"])
    return {
        "kind": random_.choice(kinds),
        "processes": random_.choice([1, 1, 2, 2, 4]),
        "accumulation": random_.choice([1, 2]),
        "bf16": random_.random() < 0.3,
        "lora": 2 if random_.random() < 0.3 else 0,
        "task": task,
    }


def draw_kill(random_: random.Random, config: dict, duration: float) -> dict:
    rank = random_.randrange(config["processes"])
    how = random_.choice(["time", "step", "file", "file"])
    if how == "time":
        return {"how": how, "seconds": random_.uniform(0.2, 1) * duration}
    if how == "step":
        phase = random_.choice(["on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_save"])
        return {"how": how, "rank": rank, "step": random_.randrange(1, STEPS), "phase": phase}
    return {"how": how, "rank": random_.choice([0, rank]), "operation": random_.randrange(1, 90)}


def weights(output: Path) -> dict:
    return load_file(output / "model.safetensors")


def losses(output: Path) -> list[dict]:
    kept = ("loss", "grad_norm", "learning_rate", "step")
    log = json.loads((output / "log.json").read_text())
    return [{key: entry[key] for key in kept} for entry in log if "loss" in entry]


def run_trial(number: int, root: Path, seed: int, references: dict) -> dict:
    """Kill, resume and compare one run."""
    random_ = random.Random(f"{seed} {number}")
    config = draw_config(random_)
    key = json.dumps(config)
    if key not in references:
        folder = root / f"reference-{len(references)}"
        folder.mkdir()
        began = time.monotonic()
        good, _ = finish(start(config, folder / "out", folder, 0, None), None)
        if not good:
            raise SystemExit(f"undisturbed {key} failed: see {folder}/0.0.log")
        references[key] = folder, time.monotonic() - began
    reference, duration = references[key]
    folder = root / f"trial-{number}"
    folder.mkdir()
    output, kills, attempt, longest = folder / "out", [], 0, 0.0
    while True:
        kill = draw_kill(random_, config, duration) if len(kills) < KILLS else None
        children = start(config, output, folder, attempt, kill)
        good, late = finish(children, kill.get("seconds") if kill else None)
        attempt, longest = attempt + 1, max(longest, late)
        if good or "already holds a model" in (folder / f"{attempt - 1}.0.log").read_text():
            break
        kills.append(kill)
        if len(kills) > KILLS:
            break
    found = {"trial": number, **config, "kills": kills, "seconds_to_end": round(longest, 1)}
    try:
        one, other = weights(output), weights(reference / "out")
        found["weights"] = one.keys() == other.keys() and all(one[n].equal(other[n]) for n in other)
        found["log"] = losses(output) == losses(reference / "out")
    except (OSError, ValueError):
        found["weights"] = found["log"] = False
    found["ledger"] = ledgers_agree(folder, reference, attempt, config["processes"])
    found["exact"] = found["weights"] and found["log"] and found["ledger"]
    if found["exact"]:
        shutil.rmtree(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    root, began = Path(tempfile.mkdtemp(prefix="kill_resume_")), time.perf_counter()
    references: dict = {}
    trials = []
    for number in range(options.trials):
        trials.append(run_trial(number, root, options.seed, references))
        one = trials[-1]
        print(json.dumps(one), flush=True)
        result = {
            "what": "runs killed at random and resumed",
            "kills": sum(len(trial["kills"]) for trial in trials),
            "exact": sum(trial["exact"] for trial in trials),
            "trials": trials,
            "provenance": provenance(seed=options.seed, seconds=time.perf_counter() - began),
        }
        if options.json:
            BenchmarkResult.from_json(result).write(options.json)
    print(f"{result['exact']} of {len(trials)} trials exact, {result['kills']} kills; folders: {root}")
    raise SystemExit(result["exact"] != len(trials))


if __name__ == "__main__":
    main()
