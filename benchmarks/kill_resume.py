"""Kill runs at random, resume them, and compare what they leave with what an undisturbed run leaves.

A trial draws a configuration. Most train (intervention, LoRA, accumulation, bfloat16, gradient checkpointing,
task, an evaluation by Trainer every third step or by `until_healthy` every second); the others run
`diagnose`, `evaluate loss` or a task. They have 1, 2 or 4 processes over gloo, forked or started by torchrun.
A run is ended up to three times: all processes by SIGKILL or SIGTERM after a random time, torchrun alone by
SIGKILL, or one process by SIGKILL at a random step, forward of an evaluation, report of progress of a
measurement, or file operation of a save, of a clean-up or of the result. A run may go on on another number of
processes. `landed` counts the ends by what the process was in.

A trial is exact if its weights, or the result of its measurement, are bit-identical to those of the same
configuration undisturbed, its log is the same, evaluations included, and its ledger is whole: after each
start, every lane (a row of the batch of all processes) reads the rows of the data set from a saved step on,
none left out and none twice. Where the number of processes changes, weights and losses are compared to 1e-5
instead.

    python benchmarks/kill_resume.py --trials 40 --json kill_resume.json

Forked processes come from one that has imported torch, so that a trial takes seconds on two cores.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from longroll import diagnose, position_loss, ranks
from longroll.conformance.tiny import VOCAB, build
from longroll.data import ByteTokenizer, Corpus, Windows
from longroll.interventions import INTERVENTIONS
from longroll.measure import Kept
from longroll.measure.held_out import HeldOut
from longroll.model import RecurrentLM
from longroll.results import BenchmarkResult, provenance, write_json
from longroll.tasks import Copying, CopyRows, Row, run_task
from longroll.training import Declined, InitialStateTrainer, PosttrainOptions, checkpoints, posttrain

STEPS, LENGTH, ROWS = 8, 16, 4
EVALUATED = 3  # steps from one evaluation to the next, where a run evaluates; a save comes every second step
PATIENCE = 40.0  # seconds that a process may live on after another was killed; torchrun waits for 30
KILLS = 3  # of a trial at most; the run after the last is left alone
TRAINS = "train"


def corpus(seed: int = 1) -> Corpus:
    sizes = np.random.default_rng(0).integers(8, 200, 40)
    ids = np.random.default_rng(seed).integers(0, VOCAB, sizes.sum()).astype(np.int32)
    return Corpus(ids, np.cumsum([0, *sizes]).astype(np.int64), len(ids))


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


class Kill(TrainerCallback):
    """SIGKILL at a step: before it, before the optimizer moves, or after it."""

    def __init__(self, step: int, phase: str) -> None:
        setattr(self, phase, self._kill)
        self.step = step

    def _kill(self, args, state, control, **_):
        if state.global_step == self.step:
            die()


def at_call(last: int, function):
    """The function; its `last`-th call is a SIGKILL before it."""
    count = 0

    def call(*args, **kwargs):
        nonlocal count
        count += 1
        if count >= last:
            die()
        return function(*args, **kwargs)

    return call


class Phase:
    """What this process is in, also in a file that outlives it."""

    file, now = Path(), "start"

    @classmethod
    def enter(cls, name: str) -> str:
        """Begin a phase; what it was before."""
        before, cls.now = cls.now, name
        if name != before:
            cls.file.write_text(name)
        return before

    @classmethod
    def within(cls, name: str, owner: object, function: str) -> None:
        """Have calls of a function be a phase."""
        original = getattr(owner, function)

        def call(*args, **kwargs):
            before = cls.enter(name)
            try:
                return original(*args, **kwargs)
            finally:
                cls.enter(before)

        setattr(owner, function, call)


def kill_within(phase: str | None, last: int) -> None:
    """SIGKILL at the `last`-th operation on files, or forward of an evaluation, of a phase from now on."""
    count = at_call(last, lambda: None)

    def counted(function):
        def call(*args, **kwargs):
            if phase in (None, Phase.now):
                count()
            return function(*args, **kwargs)

        return call

    if phase == "evaluation":
        RecurrentLM.forward = counted(RecurrentLM.forward)
        Ledger.prediction_step = counted(Ledger.prediction_step)
        return

    for owner, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (Path, "rename"), (torch, "save")):
        setattr(owner, name, counted(getattr(owner, name)))


def digest(row: torch.Tensor) -> str:
    return hashlib.sha256(row.cpu().numpy().tobytes()).hexdigest()[:12]


class Ledger(InitialStateTrainer):
    """Notes the rows of every micro-batch, and evaluates."""

    file, evaluates = Path(), ""

    def __init__(self, model, args, **more):
        if self.evaluates == "trainer":
            args.eval_strategy, args.eval_steps = IntervalStrategy.STEPS, EVALUATED
            args.per_device_eval_batch_size = 1
            more["eval_dataset"] = Windows(corpus(), LENGTH, seed=1, num_items=8)
        super().__init__(model, args, **more)

    def training_step(self, model, inputs, *args, **kwargs):
        """Trainer's own."""
        Phase.enter("step")
        with self.file.open("a") as file:
            file.write(f"{self.state.global_step} {','.join(map(digest, inputs['input_ids']))}\n")
        return super().training_step(model, inputs, *args, **kwargs)


def data_of(config: dict, rows: int):
    """What a run reads, and the tokens of a row."""
    if not config["task"]:
        return corpus(), LENGTH
    copying = Copying(ByteTokenizer())
    return CopyRows(copying, STEPS * config["accumulation"] * rows, context=64, longest=20), 64


def options_of(config: dict, rows: int, length: int) -> PosttrainOptions:
    return PosttrainOptions(
        length,
        steps=STEPS,
        batch_size=rows,
        learning_rate=1e-2,
        save_steps=2,
        accumulation=config["accumulation"],
        bf16=config["bf16"],
        lora_rank=config["lora"],
        gradient_checkpointing=config["checkpointing"],
        until_healthy=config["evaluates"] == "healthy",
        measure_steps=2,
        price=1e6,
    )


def intervention_of(config: dict):
    return None if config["kind"] == "none" else INTERVENTIONS[config["kind"]](zero_probability=0.3)


def train(config: dict, output: Path, ledger: Path, kill: dict) -> None:
    from longroll.training import _posttrain

    Ledger.file, Ledger.evaluates, _posttrain.InitialStateTrainer = ledger, config["evaluates"], Ledger
    lm = RecurrentLM(build("mamba2", 0, vocab_size=256 if config["task"] else VOCAB))
    data, length = data_of(config, ROWS)
    Phase.within("save", Ledger, "_save_checkpoint")
    Phase.within("clean-up", checkpoints, "rotate")
    Phase.within("clean-up", checkpoints, "remove")
    Phase.within("result", _posttrain, "save_checkpoint")
    Phase.within("evaluation", Ledger, "evaluate")
    Phase.within("evaluation", HeldOut, "read")
    try:
        posttrain(
            lm,
            data,
            intervention_of(config),
            options_of(config, ROWS // ranks.world_size(), length),
            output,
            resume=output.exists(),
            callbacks=[Kill(kill["step"], kill["at"])] if kill.get("how") == "step" else [],
            held_out=HeldOut.from_corpus(corpus(2), LENGTH) if config["evaluates"] == "healthy" else None,
            force=True,
            finish=lambda log: (output / "log.json").write_text(json.dumps(log)),
        )
    except Declined as declined:  # by `until_healthy`: nothing is saved
        if ranks.rank() == 0:
            (output / "log.json").write_text(json.dumps(declined.log))
            (output / "declined").write_text(str(declined))


def measure(config: dict, output: Path, kill: dict) -> None:
    ranks.join()
    Phase.enter("evaluation")
    report = at_call(kill["report"] if kill.get("how") == "report" else 10**9, lambda *_: None)
    if config["what"] == "task":
        lm = RecurrentLM(build("mamba2", 0, vocab_size=256)).eval()
        rows, file = [Row(None, Copying(ByteTokenizer()))], output / "found.json"
        told = {"samples": 6, "batch_size": 2, "file": file, "progress": report}
        found = run_task(lm, rows, [4, 6, 9, 12], **told).to_json()
        for cell in found["cells"]:
            cell.pop("seconds")
        found.pop("provenance")
        if ranks.rank() == 0:
            write_json(output / "compared.json", found)
        ranks.wait()
        return
    lm, generator = RecurrentLM(build("mamba2", 0)).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.mul_(3)  # a text has a likely next token
        text, state = [torch.randint(VOCAB, (5, 1), generator=generator)], None
        for _ in range(96):
            logits, state = lm(text[-1], state)
            text.append(torch.multinomial(logits[:, -1].softmax(-1), 1, generator=generator))
        mixer = lm.model.backbone.layers[1].mixer  # a head that hardly forgets: a damage to explain
        mixer.A_log[2], mixer.dt_bias[2] = -14.0, 0.0
    tokens = torch.cat(text, dim=1)
    kept = Kept(output / "found.json.kept", every=config["every"])
    told = {"chunk_size": 8, "dealt": True, "kept": kept, "progress": report}
    if config["what"] == "loss":
        kept.begin(lm, tokens)
        found = position_loss(lm, tokens, **told).losses.tolist()
    else:
        found = diagnose(lm, tokens, train_length=16, **told).to_json()
        del found["provenance"], found["advice"]  # which hold seconds
    if ranks.rank() == 0:
        write_json(output / "compared.json", found)
    ranks.wait()
    kept.remove()


def work(config: dict, output: Path, ledger: Path, kill: dict) -> None:
    """One process of a run."""
    torch.set_num_threads(1)
    if config["what"] != TRAINS:
        output.mkdir(exist_ok=True)
    if kill.get("how") == "within":
        kill_within(kill["phase"], kill["call"])
    if config["what"] == TRAINS:
        train(config, output, ledger, kill)
    else:
        measure(config, output, kill)


def as_process(config: dict, output: Path, ledgers: Path, attempt: int, kill: dict | None) -> None:
    """Be a process of a run, by its rank, and end."""
    rank = ranks.rank()
    mine = kill if kill and kill.get("rank") == rank else {}
    Phase.file = ledgers / f"{attempt}.{rank}.phase"
    try:
        work(config, output, ledgers / f"{attempt}.{rank}", mine)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def start(config: dict, output: Path, ledgers: Path, attempt: int, kill: dict | None) -> list[int]:
    """Start the processes of a run; their ids, or that of torchrun."""
    if config["launcher"] == "torchrun":
        run = json.dumps([config, str(output), str(ledgers), attempt, kill])
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={config['processes']}"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", __file__, "--process", run]
        with open(ledgers / f"{attempt}.0.log", "w") as log:
            return [subprocess.Popen(command, stdout=log, stderr=log).pid]
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
        as_process(config, output, ledgers, attempt, kill)
    return children


def end(process: int, number: int) -> None:
    """Send a signal to a process that this one started; SIGKILL to those that it started, too."""
    found = psutil.Process(process)
    several = found.children(recursive=True) if number == signal.SIGKILL else []
    for one in [found, *several]:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(number)


def end_launcher(process: int) -> None:
    """SIGKILL torchrun, and wait for what it started, which must end by itself."""
    found = psutil.Process(process)
    started = found.children(recursive=True)
    found.kill()
    alive = psutil.wait_procs(started, timeout=PATIENCE)[1]
    for one in alive:
        one.kill()
    if alive:
        raise SystemExit(f"{len(alive)} processes of a killed torchrun lived on")


def finish(children: list[int], kill: dict) -> tuple[bool, float]:
    """Wait for the processes, or end all at the time to; whether all ended well, and the longest wait."""
    began, first, left, good, late = time.monotonic(), None, set(children), True, 0.0
    seconds, asked = kill.get("seconds", float("inf")), False
    while left:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.remove(child)
                good &= status == 0
                first = first or (time.monotonic() if status else None)
                late = max(late, time.monotonic() - first) if first else late
        now = time.monotonic()
        if now - began > seconds and not asked:
            asked = True
            for child in left:
                if kill["how"] == "launcher":
                    end_launcher(child)
                else:
                    end(child, signal.SIGTERM if kill["how"] == "term" else signal.SIGKILL)
        if first and now - first > PATIENCE:
            for child in left:
                end(child, signal.SIGKILL)
        time.sleep(0.01)
    return good, late


def ledger_of(folder: Path, attempt: int, processes: int) -> dict[tuple[int, int], list[str | None]]:
    """The rows that a start read, by step and micro-batch: those of all lanes, None where not known."""
    found: dict[tuple[int, int], list[str | None]] = {}
    each = ROWS // processes
    for rank in range(processes):
        file, counts = folder / f"{attempt}.{rank}", {}
        for line in file.read_text().splitlines(keepends=True) if file.exists() else ():
            step, _, rows = line.rstrip("\n").partition(" ")
            if line.endswith("\n"):  # else it was killed in the midst of it
                micro = counts[step] = counts.get(step, -1) + 1
                lanes = found.setdefault((int(step), micro), [None] * ROWS)
                lanes[rank * each : (rank + 1) * each] = rows.split(",")
    return found


def ledgers_agree(folder: Path, reference: Path, config: dict, sizes: list[int], kills: list[dict]) -> bool:
    """Whether each lane read the rows of the data set from a saved step on, at each start, to the last step.

    Args:
        folder: of the ledgers.
        reference: folder of the undisturbed run.
        config: of the trial.
        sizes: how many processes each start had.
        kills: what ended each start but the last; a run that SIGTERM ends saves the step that it is in.
    """
    from longroll.training import _posttrain

    data, length = data_of(config, ROWS)
    if not config["task"]:
        data = _posttrain._rows_of(data, intervention_of(config), options_of(config, ROWS, length))
    micro_batches, read, saved = config["accumulation"], set(), set(range(0, STEPS, 2))
    for attempt, processes in enumerate(sizes):
        ledger = ledger_of(folder, attempt, processes)
        steps = sorted({step for step, _ in ledger})
        if not steps:
            continue
        in_order = steps == list(range(steps[0], steps[-1] + 1))
        if not in_order or steps[0] not in saved or steps[0] > max(read, default=-1) + 1:
            return False
        if attempt < len(kills) and kills[attempt]["how"] in ("term", "launcher"):
            saved.add(steps[-1] + 1)
        for step in steps:
            for micro in range(micro_batches):
                lanes = ledger.get((step, micro), [None] * ROWS)
                first = (step * micro_batches + micro) * ROWS
                for lane, row in enumerate(lanes):
                    if row is None and step < steps[-1]:
                        return False  # left out
                    if row is not None and row != digest(data[first + lane]["input_ids"]):
                        return False
            if (step, micro_batches) in ledger:
                return False  # read twice
        read |= set(steps)
    return read == {step for step, _ in ledger_of(reference, 0, config["processes"])}


def draw_config(random_: random.Random, torchrun: float) -> dict:
    launcher = "torchrun" if random_.random() < torchrun else "fork"
    processes = random_.choice([1, 2, 2, 4] if launcher == "fork" else [1, 2, 2])
    if random_.random() < 0.3:
        what, every = random_.choice(["loss", "diagnose", "task"]), random_.choice([0.0, 0.02])
        return {"what": what, "launcher": launcher, "processes": processes, "every": every}
    task = random_.random() < 0.15
    kinds = ["none", "sp", "fitted", "random"] + ([] if task else ["tbptt"])
    return {
        "what": TRAINS,
        "launcher": launcher,
        "kind": random_.choice(kinds),
        "processes": processes,
        "accumulation": random_.choice([1, 2]),
        "bf16": random_.random() < 0.3,
        "lora": 2 if random_.random() < 0.3 else 0,
        "task": task,
        "checkpointing": random_.random() < 0.2,
        "evaluates": "" if task else random_.choice(["", "trainer", "trainer", "healthy"]),
    }


def draw_kill(random_: random.Random, config: dict, duration: float) -> dict:
    rank = random_.randrange(config["processes"])
    hows = ["time", "within", "report", "report"]
    if config["what"] == TRAINS:
        hows = ["time", "term", "step", "within", "within", "within"]
    if config["launcher"] == "torchrun":
        hows.append("launcher")
    how = random_.choice(hows)
    if how in ("time", "term", "launcher"):
        launched = 8.0 if config["launcher"] == "torchrun" else 0.0  # seconds that its imports take
        return {"how": how, "seconds": launched + random_.uniform(0.2, 1) * duration}
    if how == "step":
        phase = random_.choice(["on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_save"])
        return {"how": how, "rank": rank, "step": random_.randrange(1, STEPS), "at": phase}
    if how == "report":
        most = {"loss": 14, "diagnose": 30, "task": 16}[config["what"]]
        return {"how": how, "rank": rank, "report": random_.randrange(1, most)}
    if config["what"] != TRAINS:
        return {
            "how": how,
            "rank": random_.choice([0, rank]),
            "phase": None,
            "call": random_.randrange(1, 40),
        }
    phase = random_.choice(
        ["save", "clean-up", "result", *(["evaluation"] * 3 if config["evaluates"] else [])]
    )
    most = {"save": 60, "clean-up": 40, "result": 8, "evaluation": 12}[phase]
    if phase in ("clean-up", "result"):
        rank = 0
    elif phase == "save" and rank > 0:
        most = 8
    return {"how": how, "rank": rank, "phase": phase, "call": random_.randrange(1, most)}


def landed(folder: Path, attempt: int, kill: dict) -> str:
    """What a process was in when it was killed, or process 0 when all were ended."""
    file = folder / f"{attempt}.{kill.get('rank', 0)}.phase"
    return file.read_text() if file.exists() else "start"


def place_of(trial: dict, kill: dict) -> str:
    """What the end of a trial is counted as: the phase, and whose evaluation it was."""
    if kill["landed"] != "evaluation":
        return kill["landed"]
    whose = {"trainer": "of Trainer", "healthy": "of until_healthy"}.get(trial.get("evaluates", ""))
    return f"evaluation {whose or trial['what']}"


def weights(output: Path) -> dict:
    return load_file(output / "model.safetensors")


def losses(output: Path) -> list[dict]:
    seen = {"loss", "eval_loss", "held_out_far"}
    kept = (*sorted(seen), "held_out_in_range", "grad_norm", "learning_rate", "step")
    log = json.loads((output / "log.json").read_text())
    return [{key: entry[key] for key in kept if key in entry} for entry in log if seen & {*entry}]


def same(found: Path, reference: Path, config: dict, moved: bool) -> dict[str, bool]:
    """What agrees of a trial and its undisturbed run."""
    try:
        if config["what"] != TRAINS:
            one, other = ((folder / "out" / "compared.json").read_bytes() for folder in (found, reference))
            return {"result": one == other, "cleared": not (found / "out" / "found.json.kept").exists()}
        saved = [not (folder / "out" / "declined").exists() for folder in (found, reference)]
        if not all(saved):
            logs = losses(found / "out"), losses(reference / "out")
            return {"declined": not any(saved), "log": moved or logs[0] == logs[1]}
        one, other = weights(found / "out"), weights(reference / "out")
        logs = losses(found / "out"), losses(reference / "out")
        if not moved:
            equal = one.keys() == other.keys() and all(one[name].equal(other[name]) for name in other)
            return {"weights": equal, "log": logs[0] == logs[1]}
        close = all(torch.allclose(one[name], other[name], rtol=1e-5, atol=1e-5) for name in other)
        pairs = zip(*logs, strict=True)
        agree = all(np.isclose(a[key], b[key], rtol=1e-4) for a, b in pairs for key in b)
        return {"weights": close, "log": agree}
    except (OSError, ValueError, KeyError):
        return {"result": False}


def run_trial(number: int, root: Path, seed: int, torchrun: float, references: dict) -> dict:
    """Kill, resume and compare one run."""
    random_ = random.Random(f"{seed} {number}")
    config = draw_config(random_, torchrun)
    undisturbed = config | {"launcher": "fork", "every": 0.0}
    key = json.dumps(undisturbed)
    if key not in references:
        folder = root / f"reference-{len(references)}"
        folder.mkdir()
        began = time.monotonic()
        good, _ = finish(start(undisturbed, folder / "out", folder, 0, None), {})
        if not good:
            raise SystemExit(f"undisturbed {key} failed: see {folder}/0.0.log")
        references[key] = folder, time.monotonic() - began
    reference, duration = references[key]
    folder = root / f"trial-{number}"
    folder.mkdir()
    kills, sizes, longest, processes = [], [], 0.0, config["processes"]
    moves = config["what"] == TRAINS and not config["bf16"] and random_.random() < 0.25
    while True:
        now = config | {"processes": processes}
        kill = draw_kill(random_, now, duration) if len(kills) < KILLS else {}
        good, late = finish(start(now, folder / "out", folder, len(sizes), kill), kill)
        sizes.append(processes)
        longest = max(longest, late)
        log = (folder / f"{len(sizes) - 1}.0.log").read_text()
        if good or "already holds a model" in log:
            break
        if not kill:
            break  # it failed by itself
        kills.append(kill | {"landed": landed(folder, len(sizes) - 1, kill)})
        if moves:
            processes = random_.choice([n for n in (1, 2, 4) if n != processes])
    moved = len(set(sizes)) > 1
    found = {
        "trial": number,
        **config,
        "started_on": sizes,
        "kills": kills,
        "seconds_to_end": round(longest, 1),
    }
    agree = same(folder, reference, config, moved)
    if config["what"] == TRAINS:
        agree["ledger"] = ledgers_agree(folder, reference, config, sizes, kills)
    found |= agree | {"exact": all(agree.values())}
    if found["exact"]:
        shutil.rmtree(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torchrun", type=float, default=0.2, help="Share of the trials that it starts.")
    parser.add_argument("--process", help=argparse.SUPPRESS)  # what torchrun's processes are told
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.process:
        config, output, ledgers, attempt, kill = json.loads(options.process)
        as_process(config, Path(output), Path(ledgers), attempt, kill)
    root, began = Path(tempfile.mkdtemp(prefix="kill_resume_")), time.perf_counter()
    references: dict = {}
    trials = []
    for number in range(options.trials):
        trials.append(run_trial(number, root, options.seed, options.torchrun, references))
        one = trials[-1]
        print(json.dumps(one), flush=True)
        result = {
            "what": "runs killed at random and resumed",
            "kills": sum(len(trial["kills"]) for trial in trials),
            "exact": sum(trial["exact"] for trial in trials),
            "ended_by": dict(Counter(kill["how"] for trial in trials for kill in trial["kills"])),
            "landed": dict(Counter(place_of(trial, kill) for trial in trials for kill in trial["kills"])),
            "trials": trials,
            "provenance": provenance(seed=options.seed, seconds=time.perf_counter() - began),
        }
        if options.json:
            BenchmarkResult.from_json(result).write(options.json)
    print(f"{result['exact']} of {len(trials)} trials exact, {result['kills']} kills; folders: {root}")
    raise SystemExit(result["exact"] != len(trials))


if __name__ == "__main__":
    main()
