"""Make each fault that a run can meet; note what the user sees and what survives: the table of docs/runs.md.

    python benchmarks/faults.py --json faults.json
    python benchmarks/faults.py --kinds damage --json faults.json    # these anew; others stay as they were

The faults are real: signals, a full file system (a small tmpfs where the user may mount one, else a limit on
the size of files), a limit on the memory of the process, files cut and bits flipped. Each command is
`longroll` itself in a process of its own, forked from one that has imported torch; processes of several ranks
are started by torchrun. After each fault the command runs again with `--resume`, and the weights are compared
bit by bit with those of the undisturbed run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LENGTH, STEPS = 128, 6
SECONDS = 120
BEFORE_STEP = "longroll.training.guard:Guard.before_step"
Arm = Callable[[], None]


@dataclass
class Ran:
    """How a command ended."""

    status: str
    lines: list[str]
    """What it printed that is neither progress nor result."""


@dataclass
class Fault:
    """A row of the table."""

    name: str
    how: str
    ran: Ran
    survives: str
    again: str
    bits: bool | None = None
    """Whether the weights at the end are those of the undisturbed run; None: there is no such end."""

    def row(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return {
            "fault": self.name,
            "made_by": self.how,
            "status": self.ran.status,
            "sees": self.ran.lines,
            "survives": self.survives,
            "again": self.again,
            "bit_identical": self.bits,
        }


# ---- commands, in processes of their own


def at(place: str, call: int, act: Callable[[], None], when: Callable[..., bool] = lambda *_: True) -> Arm:
    """Do something when the function at `module:name` is called for the `call`-th time."""

    def arm() -> None:
        module, _, path = place.partition(":")
        owner: Any = importlib.import_module(module)
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        function, calls = getattr(owner, name), iter(range(1, 10**6))

        def counted(*args: Any, **kwargs: Any) -> Any:
            if when(*args) and next(calls) == call:
                act()
            return function(*args, **kwargs)

        setattr(owner, name, counted)

    return arm


def signalled(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def run(*argv: object, arm: Arm | None = None, work: Callable[[], None] | None = None) -> Ran:
    """Run `longroll` with these arguments, or `work`, in a forked process."""
    from longroll import cli

    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            sys.argv = ["longroll", *map(str, argv)]
            status = 1
            try:
                if arm:
                    arm()
                (work or cli.main)()
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(bool(end.code))
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
        deadline, status = time.monotonic() + SECONDS, None
        while status is None:
            done, code = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if done else None
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                raise SystemExit(f"longroll {argv} hangs")
            time.sleep(0.01)
        said.seek(0)
        return Ran(named(status), told(said.read()))


def torchrun(processes: int, *argv: object, kill: int | str | None = None) -> Ran:
    """Run `longroll` on several processes; rank `kill`, or the "launcher", is ended by SIGKILL in step 4."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(Path(__file__).resolve())]
    environment = os.environ | {"FAULTS_KILL": "" if kill is None else str(kill), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run(
        [*command, "--child", *map(str, argv)], capture_output=True, text=True, env=environment
    )
    lines = told(
        re.split(r"^[EW]\d{4} ", done.stderr, maxsplit=1, flags=re.MULTILINE)[0]
    )  # torchrun's begin so
    if kill == "launcher":
        lines = [re.sub(r"Process \d+ ends", "Process 12345 ends", line) for line in lines]
    elif kill is not None:
        lines = [line for line in done.stderr.splitlines() if line.startswith("longroll:")]
        dead = re.search(
            r"rank +: (\d+).*?Signal 9 \(SIGKILL\)", done.stderr.partition("Root Cause")[2], re.S
        )
        lines += [f"torchrun: rank {dead[1]}, Signal 9 (SIGKILL)"] if dead else []
        if time.monotonic() - began > 90:
            lines += ["(the others did not end)"]
    return Ran(named(done.returncode), lines)


def named(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else str(status)


def told(text: str) -> list[str]:
    """The lines that are neither progress nor result nor a library's."""
    lines = [line.strip() for line in text.splitlines()]
    noise = re.compile(
        r"^$|^T = |^Recipe |^Trains |^Plan: |^training |^[{\d.]+.*tokens/s|^First batch|^\d+ steps in"
        r"|Warning: |^{'|^\[(W|rank)|^W\d{4}|━|passkey|\|"
    )
    return [line for line in lines if not noise.search(line)]


# ---- what is run


@dataclass
class Place:
    """Models, texts, and the undisturbed run."""

    root: Path
    count: int = 0
    whole: dict[str, Any] = field(default_factory=dict)

    def prepare(self) -> None:
        """Make them."""
        from longroll.conformance.tiny import build

        for seed in (0, 1):
            model = build("mamba2", seed, vocab_size=256)
            model.config.train_length = LENGTH
            model.save_pretrained(self.root / f"model{seed}")
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        letters = Tokenizer(models.WordLevel({chr(32 + i): i for i in range(95)}, unk_token=" "))
        letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        PreTrainedTokenizerFast(tokenizer_object=letters, unk_token=" ").save_pretrained(
            self.root / "letters"
        )
        for name, start in (("text", 0), ("other", 5)):
            words = " ".join(f"{(n * n + start) % 9973} is a number." for n in range(start, 3000))
            (self.root / f"{name}.txt").write_text(words)
        done = run(*self.posttrain("undisturbed"))
        if done.status != "0":
            raise SystemExit(f"the undisturbed run failed: {done}")
        self.whole = weights(self.root / "undisturbed")

    def posttrain(
        self, name: str, *more: object, model: str = "model0", text: str = "text.txt"
    ) -> list[object]:
        """Return the command of a run, with other options than its own."""
        given = dict(zip(more[::2], more[1::2], strict=True)) if len(more) > 1 else {}
        options = {
            "--text": self.root / text,
            "--tokenizer": "bytes",
            "--output": self.root / name,
            "--steps": STEPS,
            "--batch-size": 2,
            "--save-steps": 2,
            "--device": "cpu",
            "--intervention": "sp",
            "--json": self.root / f"{name}.json",
        } | given
        return [
            "posttrain",
            self.root / model,
            "--force",
            *(part for pair in options.items() for part in pair),
        ]

    def new(self) -> str:
        """Return the name of another run."""
        self.count += 1
        return f"run{self.count}"

    def kept(self, name: str) -> str:
        """What a run has left."""
        from longroll.training.checkpoints import any_in, newest_whole

        output = self.root / name
        if (output / "config.json").is_file() and not (output / "checkpoints").exists():
            return "the result"
        newest = newest_whole(output / "checkpoints") if any_in(output / "checkpoints") else None
        return newest.name if newest else "nothing"

    def clean(self, lines: list[str]) -> list[str]:
        """Lines without the names of temporary folders."""
        return [line.replace(f"{self.root}/", "").replace(str(self.root), "") for line in lines]

    def resumed(self, name: str, *more: object) -> tuple[Ran, bool]:
        """Resume a run; whether it ends in the undisturbed weights."""
        again = run(*self.posttrain(name, *more), "--resume")
        output = self.root / name
        same = again.status == "0" and (output / "model.safetensors").is_file() and self.same(output)
        return again, same

    def same(self, output: Path) -> bool:
        """Whether a result has the weights of the undisturbed run."""
        found = weights(output)
        return found.keys() == self.whole.keys() and all(found[n].equal(t) for n, t in self.whole.items())


def weights(output: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(output / "model.safetensors")


def say(ran: Ran, same: bool | None) -> str:
    """What came of the second run."""
    if ran.status != "0":
        return "refused"
    return "the same weights, bit for bit" if same else "other weights" if same is False else "goes on"


# ---- the faults


def ended(place: Place) -> Iterator[Fault]:
    """Runs that a signal ends."""
    kill = signalled(signal.SIGKILL)

    def removal(name: str) -> Callable[..., bool]:
        """Whether a folder that is there, of this name, is being removed."""
        return lambda path, *_: str(path).endswith(f".removed-{name}") and Path(path).exists()

    moments = {
        "SIGKILL in a step": ("before the optimizer moves, step 4", at(BEFORE_STEP, 4, kill)),
        "SIGKILL in a save": ("while checkpoint-4 is written", at("torch:save", 7, kill)),
        "SIGKILL between a save and its commit": (
            "before the manifest of checkpoint-4 is written",
            at("longroll.training.checkpoints:write_whole", 2, kill),
        ),
        "SIGKILL while old checkpoints are removed": (
            "while checkpoint-2 is removed",
            at("shutil:rmtree", 1, kill, removal("checkpoint-2")),
        ),
        "SIGKILL while the result is saved": (
            "before the result is moved to its place",
            at("longroll.training._posttrain:model_card", 1, kill),
        ),
        "SIGKILL in the clean-up": (
            "after the result is saved, while the checkpoints are removed",
            at("shutil:rmtree", 1, kill, removal("checkpoints")),
        ),
        "SIGTERM": ("to the process, in step 3", at(BEFORE_STEP, 3, signalled(signal.SIGTERM))),
        "Ctrl-C": ("SIGINT to the process, in step 3", at(BEFORE_STEP, 3, signalled(signal.SIGINT))),
    }
    for fault, (how, arm) in moments.items():
        name = place.new()
        ran = run(*place.posttrain(name), arm=arm)
        kept = place.kept(name)
        again, same = place.resumed(name)
        written = (place.root / f"{name}.json").is_file()
        yield Fault(fault, how, ran, kept, say(again, same) + ("" if written else "; no --json"), same)


def evaluations(place: Place) -> Iterator[Fault]:
    kill = signalled(signal.SIGKILL)
    file = place.root / "passkey.json"
    grid = ["evaluate", "passkey", place.root / "model0", "--tokenizer", "bytes", "--lengths", "320,384,448"]
    grid += ["--depths", "0.5", "--samples", "4", "--device", "cpu"]
    whole = run(*grid, "--json", place.root / "whole.json")
    ran = run(*grid, "--json", file, arm=at("longroll.tasks.run:TaskResult.write", 3, kill))
    cells = json.loads(file.read_text())["cells"]
    again = run(*grid, "--json", file)
    one, other = (json.loads(path.read_text())["cells"] for path in (file, place.root / "whole.json"))
    same = [without(cell, "seconds") for cell in one] == [without(cell, "seconds") for cell in other]
    kept = f"{len(cells)} of {len(other)} cells"
    end = (
        "the other cells; the same result"
        if same and again.status == whole.status == "0"
        else "another result"
    )
    yield Fault("SIGKILL in evaluate passkey", "before the third cell is written", ran, kept, end, None)

    file = place.root / "diagnosis.json"
    base = ["diagnose", place.root / "model0", "--tokenizer", "bytes", "--text", place.root / "text.txt"]
    base += ["--length", "256", "--sequences", "4", "--device", "cpu", "--json", file]
    ran = run(*base, arm=at("longroll.measure.kept:Kept.write", 3, kill))
    kept = sorted(part.stem for part in (place.root / "diagnosis.json.kept").glob("*.piece"))
    again = run(*base)
    whole_file = place.root / "diagnosis-whole.json"
    run(*base[:-1], whole_file)
    one, other = (json.loads(path.read_text()) for path in (file, whole_file))
    same = all(one[key] == other[key] for key in other if key != "provenance")
    end = "the other stages; the same result" if same and again.status == "0" else "another result"
    stages = f"{len(kept)} finished stages"
    yield Fault("SIGKILL in diagnose", "before the third stage is kept", ran, stages, end, None)

    name = place.new()
    ran = run(work=lambda: own_trainer(place, name, kill=True))
    folder = place.root / name
    from longroll.training.checkpoints import newest_whole

    newest = newest_whole(folder)
    run(work=lambda: own_trainer(place, name, resume=True))
    never = place.new()
    run(work=lambda: own_trainer(place, never))
    one, other = weights(folder / "checkpoint-6"), weights(place.root / never / "checkpoint-6")
    same = all(one[n].equal(t) for n, t in other.items())
    yield Fault(
        "SIGKILL in an evaluation", "InitialStateTrainer, in the evaluation after step 4", ran,
        newest.name if newest else "nothing", say(Ran("0", []), same), same,
    )  # fmt: skip


def without(cell: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in cell.items() if name != key}


def own_trainer(place: Place, name: str, *, kill: bool = False, resume: bool = False) -> None:
    """Train through Python with evaluation inside."""
    import torch
    from transformers import TrainingArguments

    import longroll
    from longroll.data import Corpus, Windows

    ids = torch.arange(2000).pow(2).remainder(251).numpy().astype("int32")
    data = Windows(Corpus(ids, [0, len(ids)], 251), LENGTH, num_items=STEPS * 2)
    arguments = TrainingArguments(
        str(place.root / name), max_steps=STEPS, per_device_train_batch_size=2, eval_strategy="steps",
        eval_steps=2, save_steps=2, use_cpu=True, report_to="none", learning_rate=1e-3, disable_tqdm=True,
    )  # fmt: skip
    trainer = longroll.InitialStateTrainer(
        place.root / "model0", arguments, intervention="sp", train_dataset=data, eval_dataset=data
    )
    if kill:
        trainer.prediction_step = at_call(trainer.prediction_step, 4)
    trainer.train(resume_from_checkpoint=resume)


def at_call(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    calls = iter(range(1, 10**6))

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return counted


def ranks_die(place: Place) -> Iterator[Fault]:
    for rank in (0, 1):
        name = place.new()
        argv = place.posttrain(name, "--batch-size", 1)
        ran = torchrun(2, *argv, kill=rank)
        kept = place.kept(name)
        again = torchrun(2, *argv, "--resume")
        same = again.status == "0" and close(place, name)
        end = "the weights of one process, to 2e-6" if same else say(again, same)
        yield Fault(f"rank {rank} of 2 dies", "SIGKILL in step 4, torchrun over gloo", ran, kept, end, None)
    name = place.new()
    argv = place.posttrain(name, "--batch-size", 1)
    ran = torchrun(2, *argv, kill="launcher")
    kept = place.kept(name)
    again = torchrun(2, *argv, "--resume")
    same = again.status == "0" and close(place, name)
    end = "the weights of one process, to 2e-6" if same else say(again, same)
    yield Fault("torchrun dies", "SIGKILL to torchrun, in step 4 of 2 processes", ran, kept, end, None)
    name = place.new()
    run(
        *place.posttrain(name),
        arm=at(BEFORE_STEP, 4, signalled(signal.SIGKILL)),
    )
    kept = place.kept(name)
    refused = torchrun(2, *place.posttrain(name), "--resume")
    yield Fault(
        "another number of processes", "1, then 2 of the same --batch-size", refused, kept, "refused", None
    )
    ran = torchrun(2, *place.posttrain(name, "--batch-size", 1), "--resume")
    end = (
        "the weights of one process, to 2e-6" if ran.status == "0" and close(place, name) else say(ran, False)
    )
    yield Fault("another number of processes", "1, then 2 of half the --batch-size", ran, kept, end, None)


def close(place: Place, name: str) -> bool:
    found = weights(place.root / name)
    return all(bool((found[n] - t).abs().max() <= 2e-6 * (1 + t.abs().max())) for n, t in place.whole.items())


def no_room(place: Place) -> Iterator[Fault]:
    """A full disk: as many bytes as the first checkpoint and a half take."""
    name = place.new()
    probe = place.new()
    run(
        *place.posttrain(probe),
        arm=at(BEFORE_STEP, 3, signalled(signal.SIGKILL)),
    )
    size = sum(file.stat().st_size for file in (place.root / probe).rglob("*") if file.is_file())
    output = place.root / name
    output.mkdir()
    mounted = mount(output, int(1.5 * size))
    try:
        if mounted:
            ran, how = run(*place.posttrain(name)), "a tmpfs that holds one checkpoint and a half"
            kept = place.kept(name)
            subprocess.run(["mount", "-o", "remount,size=64m", str(output)], check=True)
            again, same = place.resumed(name)
            yield Fault("disk full", how, ran, kept, f"with room: {say(again, same)}", same)
    finally:
        if mounted:
            subprocess.run(["umount", str(output)], check=True)
    for what, share in (("optimizer.pt", 0.9), ("model.safetensors", 0.5)):
        name = place.new()
        biggest = max(file.stat().st_size for file in (place.root / probe).rglob("*") if file.is_file())

        def limit(most: int = int(share * biggest)) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

        first = at(BEFORE_STEP, 3, limit)
        ran = run(*place.posttrain(name), arm=first)
        kept = place.kept(name)
        again, same = place.resumed(name)
        how = f"a limit on the size of files, {share:g} of {what}, from step 3 on"
        yield Fault("disk full", how, ran, kept, f"with room: {say(again, same)}", same)
    small = place.root / "small"
    small.mkdir()
    if mount(small, 4096):
        try:
            (small / "filler").write_bytes(b"x" * 4096)
            argv = ["evaluate", "loss", place.root / "model0", "--tokenizer", "bytes", "--device", "cpu"]
            argv += ["--text", place.root / "text.txt", "--length", "64", "--sequences", "1"]
            ran = run(*argv, "--json", small / "loss.json")
            how, kept = "evaluate loss --json on a full tmpfs", sorted(file.name for file in small.iterdir())
            left = "no part of a result" if "loss.json" not in kept else "a part of a result"
            yield Fault("disk full", how, ran, left, "-", None)
        finally:
            subprocess.run(["umount", str(small)], check=True)


def mount(folder: Path, size: int) -> bool:
    """Mount a small file system in memory; False where the user may not."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    return shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0


def no_memory(place: Place) -> Iterator[Fault]:
    name = place.new()

    def limit() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))

    ran = run(
        *place.posttrain(name, "--batch-size", 512, "--train-length", 512),
        arm=at("longroll.training.guard:Guard.__init__", 1, limit),
    )
    kept = place.kept(name)
    yield Fault(
        "too little memory", "a limit of 64 MiB more on the process (RLIMIT_AS)", ran, kept, "-", None
    )


def damage(place: Place) -> Iterator[Fault]:
    """Checkpoints that are damaged between two runs."""
    kill = at(BEFORE_STEP, 6, signalled(signal.SIGKILL))

    def cut(file: Path) -> None:
        os.truncate(file, file.stat().st_size // 2)

    def flip(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    def flip_all(checkpoint: Path) -> None:
        for file in checkpoint.parent.glob("checkpoint-*/optimizer.pt"):  # `checkpoint` is checkpoint-4/.
            flip(file)

    cases: dict[str, tuple[str, str, Callable[[Path], None]]] = {
        "a torn checkpoint": ("cut in half", "model.safetensors", cut),
        "a flipped bit": ("one bit", "optimizer.pt", flip),
        "a flipped bit in the states": ("one bit", "intervention_0.pt", flip),
        "no optimizer": ("removed", "optimizer.pt", Path.unlink),
        "no manifest": ("removed", "manifest.json", Path.unlink),
        "a damaged description of the run": ("cut in half", "../run.json", cut),
        "every checkpoint damaged": ("one bit in each checkpoint", ".", flip_all),
    }
    for fault, (how, file, harm) in cases.items():
        name = place.new()
        run(*place.posttrain(name), arm=kill)
        harm(place.root / name / "checkpoints" / "checkpoint-4" / file)
        of = "of the run" if "run.json" in file else "of checkpoint-4"
        how = f"{Path(file).name} {of}: {how}" if file != "." else how
        again, same = place.resumed(name)
        newest = "checkpoint-4" if "description" in fault else "checkpoint-2"
        newest = "nothing: the run starts from the beginning" if "every" in fault else newest
        yield Fault(fault, how, again, newest, say(again, same), same)


def another_run(place: Place) -> Iterator[Fault]:
    """A run that goes on as another one."""
    kill = at(BEFORE_STEP, 4, signalled(signal.SIGKILL))
    name = place.new()
    run(*place.posttrain(name), arm=kill)
    cases: dict[str, tuple[str, list[object]]] = {
        "another model": ("weights of another seed", place.posttrain(name, model="model1")),
        "another text": ("another file", place.posttrain(name, text="other.txt")),
        "another tokenizer": (
            "letters, not bytes",
            place.posttrain(name, "--tokenizer", place.root / "letters"),
        ),
        "another option": ("--learning-rate 2e-4", place.posttrain(name, "--learning-rate", "2e-4")),
        "another intervention": ("--intervention fitted", place.posttrain(name, "--intervention", "fitted")),
        "another task": (
            "--task copying",
            place.posttrain(name, "--task", "copying"),
        ),
    }
    for fault, (how, argv) in cases.items():
        ran = run(*argv, "--resume")
        yield Fault(f"{fault} on --resume", how, ran, place.kept(name), say(ran, None), None)
    ran = run(*place.posttrain(name))
    yield Fault("no --resume", "the command again", ran, place.kept(name), say(ran, None), None)
    name = place.new()
    run(*place.posttrain(name), arm=with_other_versions(kill))
    kept = place.kept(name)
    ran, same = place.resumed(name)
    how = "the run was started with torch 2.0.0 and transformers 5.0.0"
    yield Fault("other versions", how, ran, kept, say(ran, same), same)


def with_other_versions(then: Arm) -> Arm:
    """Have a run note that other versions began it."""

    def arm() -> None:
        from longroll.training import identity

        before = identity.package_versions() | {"torch": "2.0.0", "transformers": "5.0.0"}
        identity.package_versions = lambda: before
        then()

    return arm


def not_finite(place: Place) -> Iterator[Fault]:
    name = place.new()
    ran = run(
        *place.posttrain(
            name, "--learning-rate", "1e30", "--schedule", "constant", "--warmup", "0", "--save-steps", 1
        )
    )
    yield Fault("a loss that is not finite", "--learning-rate 1e30", ran, place.kept(name), "-", None)


KINDS = (ended, evaluations, ranks_die, no_room, no_memory, damage, another_run, not_finite)


def main() -> None:
    if "--child" in sys.argv:
        child()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=[kind.__name__ for kind in KINDS], help="default: all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import torch

    import longroll.training  # noqa: F401  (before the forks)
    from longroll.results import BenchmarkResult, provenance

    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    began, rows = time.perf_counter(), {}
    before = 0.0
    if options.json and options.json.is_file():  # other kinds of an earlier run stay
        held = json.loads(options.json.read_text())
        rows, before = {row["kind"]: [] for row in held["rows"]}, held["provenance"]["seconds"]
        for row in held["rows"]:
            rows[row["kind"]].append(row)
    place = Place(Path(tempfile.mkdtemp(prefix="faults_")))
    place.prepare()
    for kind in KINDS:
        if options.kinds and kind.__name__ not in options.kinds:
            continue
        rows[kind.__name__] = []
        for fault in kind(place):
            fault.ran.lines = place.clean(fault.ran.lines)
            rows[kind.__name__].append({"kind": kind.__name__, **fault.row()})
            print(json.dumps(rows[kind.__name__][-1]), flush=True)
    if options.json:
        made = provenance(seed=0, seconds=before + time.perf_counter() - began)
        ordered = [row for kind in KINDS for row in rows.get(kind.__name__, ())]
        BenchmarkResult.from_json({"what": "faults", "rows": ordered, "provenance": made}).write(options.json)
    shutil.rmtree(place.root, ignore_errors=True)


def child() -> None:
    """One rank under torchrun."""
    import torch

    from longroll import cli

    torch.set_num_threads(1)
    if os.environ["FAULTS_KILL"] == os.environ["RANK"]:
        at(BEFORE_STEP, 4, signalled(signal.SIGKILL))()
    if os.environ["FAULTS_KILL"] == "launcher":  # and wait until that is seen

        def end_launcher() -> None:
            if os.environ["RANK"] == "0":
                os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(2)

        at(BEFORE_STEP, 4, end_launcher)()
    sys.argv = ["longroll", *sys.argv[sys.argv.index("--child") + 1 :]]
    cli.main()


if __name__ == "__main__":
    main()
