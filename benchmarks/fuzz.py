"""Hostile input to every command, flag and kind of file: no traceback, no hang, one line for what is wrong.

    python benchmarks/fuzz.py --trials 300 --json benchmarks/results/fuzz.json

Each trial is `longroll` itself in a process of its own, forked from one that has imported torch, with a limit
on time and on memory. A trial is good if the command works, or ends with status 2 and one line that begins
with "longroll:"; if nothing that it prints holds a control character; if no code of a pickle ran; and if the
memory it took beyond its parent's stays below a limit. Trials are drawn by a seed: flags of all commands with
hostile values, and files of all kinds damaged (`tests/damage.py`) or made to be too large.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

SECONDS = 90
MEMORY = 6 << 30  # bytes of address space beyond the parent's
TAKEN = 1 << 30  # bytes of memory that a trial may take at its peak

HOSTILE = [
    *(
        "",
        " ",
        "-1",
        "0",
        "1e999",
        "nan",
        "-inf",
        "9" * 30,
        "1" + "0" * 15,
        "0x10",
        "1_0",
        "1.5",
        "16kk",
        "k",
    ),
    *(
        ",",
        "1,,2",
        "3,2,1",
        "None",
        "true",
        "--",
        "-",
        "\u0661\u0662",
        "\U0001f4a5",
        "[bold]x[/bold]",
        "a" * 5000,
    ),
    *("{{7*7}}", "%s%n", "\x1b[31mred\x1b[0m", "a\nb", "a\rb", "tab\there", "\udcff", "$(exit)", "../x/../y"),
    *(".", "/dev/null", "/dev/full", "/proc/self/mem", "/nowhere/at/all", "https://127.0.0.1:1/x", "a/b/c"),
    *("specimen", "cuda", "cuda:99", "meta", "bfloat16", "float8_e4m3fn", "int64", "linear", "cosine"),
    *("original", "passkey", "copying", "file:///nowhere"),
]
"""Values for any flag."""
ABSURD = ["1" + "0" * 9, "1" + "0" * 12, "1" + "0" * 15, "9" * 18, "64M", "1" + "0" * 20]
"""Sizes that no machine has."""
SIZES = {
    "--length", "--lengths", "--sequences", "--chunk-size", "--train-length", "--batch-size",
    "--accumulation",
    "--lora-rank", "--windows", "--window", "--samples", "--few-shot", "--prompts", "--width", "--font-size",
}  # fmt: skip


class Bomb:
    """A pickle that writes a file when it is opened without care."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return (open, (str(self.flag), "w"))


class Ground:
    """What the commands work on: small models, texts, results, an interrupted run, an adapter."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.flag = root / "exploded"
        self.plain = root / "text" / "plain.txt"

    def prepare(self) -> None:
        """Make all of it."""
        from faults import at, run, signalled

        from longroll.conformance.tiny import build
        from longroll.model import RecurrentLM
        from longroll.tasks.recall import recall_tokenizer
        from longroll.training.lora import with_lora

        for name, family in (("model", "mamba2"), ("hybrid", "falcon_h1")):
            model = build(family, 0, vocab_size=256)
            model.config.train_length = 16
            model.save_pretrained(self.root / name)
        (self.root / "text").mkdir()
        words = " ".join(f"{(n * n) % 9973} is a number." for n in range(2000))
        rows = [{"text": words[i : i + 900], "id": i} for i in range(0, 9000, 900)]
        chat = [
            {"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": words[:90]}]}
        ]
        texts = self.root / "text"
        (texts / "plain.txt").write_text(words)
        (texts / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (texts / "rows.json").write_text(json.dumps(rows))
        (texts / "rows.csv").write_text("id,text\n" + "\n".join(f'{r["id"]},"{r["text"]}"' for r in rows))
        (texts / "rows.tsv").write_text("id\ttext\n" + "\n".join(f"{r['id']}\t{r['text']}" for r in rows))
        (texts / "packed.txt.gz").write_bytes(gzip.compress(words.encode()))
        (texts / "chat.jsonl").write_text("\n".join(map(json.dumps, chat * 9)))
        import pandas

        pandas.DataFrame(rows).to_parquet(texts / "rows.parquet")
        kill = at("longroll.training.guard:Guard.before_step", 3, signalled(signal.SIGKILL))
        run(*self.posttrain("run"), "--save-steps", 1, arm=kill)
        assert (self.root / "run" / "checkpoints" / "checkpoint-2" / "manifest.json").is_file()
        for name, argv in (("diagnosis", self.diagnose()), ("task", self.passkey())):
            made = run(*argv, "--json", self.root / f"{name}.json")
            assert made.status == "0", made
        adapted = with_lora(RecurrentLM(build("mamba2", 0, vocab_size=256)).model, 2)
        adapted.peft_config["default"].base_model_name_or_path = str(self.root / "model")
        adapted.save_pretrained(self.root / "adapter")
        (self.root / "babi").mkdir()
        fact = "1 Mary went to the garden.\n2 Where is Mary? \tgarden\t1\n"
        for split in ("train", "test"):
            (self.root / "babi" / f"qa1_x_{split}.txt").write_text(fact * 3)
        recall_tokenizer().save_pretrained(self.root / "keys")
        (self.root / "fsdp.json").write_text(json.dumps({"reshard_after_forward": True, "min_num_params": 0}))
        (self.root / "prompts.json").write_text(json.dumps({"template": "{context} {question}"}))

    def posttrain(self, output: str) -> list[object]:
        """Return a command that trains for three steps."""
        return [
            "posttrain", self.root / "model", "--force", "--text", self.plain, "--tokenizer", "bytes",
            "--intervention", "sp", "--output", self.root / output, "--steps", 3, "--batch-size", 2,
            "--device", "cpu",
        ]  # fmt: skip

    def diagnose(self) -> list[object]:
        """Return a command that diagnoses short texts."""
        return [
            "diagnose", self.root / "model", "--text", self.plain, "--tokenizer", "bytes",
            "--length", 64, "--sequences", 4, "--device", "cpu", "--no-explain",
        ]  # fmt: skip

    def loss(self, text: object) -> list[object]:
        """Return a command that measures the loss of a text."""
        return [
            "evaluate", "loss", self.root / "model", "--text", text, "--tokenizer", "bytes", "--length", 32,
            "--sequences", 1, "--device", "cpu",
        ]  # fmt: skip

    def passkey(self) -> list[object]:
        """Return a command that measures one cell."""
        return [
            "evaluate", "passkey", self.root / "model", "--tokenizer", "bytes", "--lengths", "320",
            "--depths", "0.5", "--samples", 4, "--device", "cpu",
        ]  # fmt: skip


# ---- the trials: each gives a command line, what it works on, and whether a size is absurd


def flags(ground: Ground, copy: Path, random_: random.Random) -> tuple[list[object], str]:
    """A good command line with one to three flags of hostile values."""
    bases = command_lines(ground, copy)
    known = commands()
    names = [*bases, *(name for name in known if name.split()[-1] not in bases)]
    name = random_.choice(names)
    argv = list(bases.get(name, name.split()))
    path = " ".join(part for part in argv[:2] if isinstance(part, str) and not part.startswith("-")) or name
    options = known.get(path) or known.get(path.split()[0]) or known.get(name) or ["--json"]
    told = []
    for _ in range(random_.choice([1, 1, 1, 2, 3])):
        option = random_.choice(options)
        value = random_.choice(ABSURD if option in SIZES and random_.random() < 0.4 else HOSTILE)
        if option == "--steps" and value.isdecimal() and int(value) > 9:
            value = "3"  # a run of so many steps is what was asked for, and takes its time
        value = value.replace("\udcff", os.fsdecode(b"\xff"))
        told.append(f"{option} {value[:40]!r}")
        if option in argv:
            argv[argv.index(option) + 1] = value
        elif option.startswith("-"):
            argv += [option, value]
        else:
            argv.insert(len(path.split()), value)
    return argv, f"{path}: {', '.join(told)}"


def command_lines(ground: Ground, copy: Path) -> dict[str, list[object]]:
    """A good command line of the commands that have one here, by the last word of their names."""
    cells = [ground.root / "model", "--tokenizer", "bytes", "--samples", 4, "--device", "cpu"]
    task = {name: ["evaluate", name, *cells] for name in ("copying", "babilong", "tracking", "recall")}
    plan = ["plan", ground.root / "model", "--train-length", 16, "--device", "cpu"]
    return {
        "posttrain": ground.posttrain(f"{copy.name}/out"),
        "diagnose": ground.diagnose(),
        "loss": ground.loss(ground.plain),
        "passkey": ground.passkey(),
        "niah": ["evaluate", "niah", *ground.passkey()[2:]],
        "variables": ["evaluate", "variables", *cells, "--lengths", "1k"],
        "copying": [*task["copying"], "--lengths", "8"],
        "babilong": [
            *task["babilong"], "--facts", ground.root / "babi", "--qa", "qa1", "--books", "none",
            "--no-few-shot", "--lengths", "1024",
        ],
        "tracking": [*task["tracking"], "--lengths", "16", "--groups", "parity"],
        "recall": [*task["recall"], "--lengths", "256", "--tokenizer", ground.root / "keys"],
        "compare": ["evaluate", "compare", ground.root / "task.json"],
        "report": ["report", ground.root / "diagnosis.json", "--output", copy / "page"],
        "doctor": ["doctor", "--packing", ground.root / "model", "--device", "cpu"],
        "quickstart": ["quickstart", "--length", "1k", "--sequences", "4", "--steps", "1"],
        "calibrate": [
            "calibrate", *ground.diagnose()[1:-1], "--train-length", 16, "--output", copy / "calibrated"
        ],
        "plan": plan,
        "reproduce": ["reproduce", "--models", "130m", "--text", ground.plain, "--plan"],
        "lm-eval": ["lm-eval", "--model", "longroll"],
    }  # fmt: skip


def sizes(ground: Ground, copy: Path, random_: random.Random) -> tuple[list[object], str]:
    """A good command line with one count or size that no machine has, or no life is long enough for."""
    bases = command_lines(ground, copy)
    places = [(name, option) for name, found in counts_of().items() for option in found]
    places.remove(("quickstart", "--sequences"))  # reads as many texts as there are, which takes minutes
    name, option = random_.choice(places)
    if name == "posttrain" and option in ("--pairs", "--windows"):
        bases[name] = [*bases[name], "--task", "recall" if option == "--pairs" else "passkey"]
    value = random_.choice([value for value in ABSURD if value.isdecimal() and int(value) >= 10**12])
    argv = list(bases[name])
    if option in argv:
        argv[argv.index(option) + 1] = value
    else:
        argv += [option, value]
    return argv, f"{name}: {option} {value}"


def counts_of() -> dict[str, list[str]]:
    """The flags of each command that take a whole number, by the last word of its name."""
    import typer.main

    from longroll.cli import app

    found: dict[str, list[str]] = {}

    def walk(command: Any, name: str) -> None:
        for below, one in getattr(command, "commands", {}).items():
            walk(one, below)
        for option in getattr(command, "params", ()):
            whole = getattr(option.type_descriptor.annotation, "__name__", "") == "int"
            if option.opts[0] != "--seed" and (whole or option.metavar in ("LENGTHS", "WIDTH")):
                found.setdefault(name, []).append(option.opts[0])

    walk(typer.main.get_command(app), "")
    return found


def commands() -> dict[str, list[str]]:
    """Every command of the command line with its flags and arguments."""
    import typer.main

    from longroll.cli import app

    found = {}

    def walk(command: Any, path: tuple[str, ...]) -> None:
        if hasattr(command, "commands"):
            for name, below in command.commands.items():
                walk(below, (*path, name))
        else:
            found[" ".join(path)] = [option.opts[0] for option in command.params]

    walk(typer.main.get_command(app), ())
    return found


def model_folder(ground: Ground, copy: Path, random_: random.Random) -> tuple[list[object], str]:
    """A model with a damaged file, or with sizes that no machine has."""
    from damage import damaged

    name = random_.choice(["model", "hybrid"])
    shutil.copytree(ground.root / name, copy / "model")
    file = (
        copy
        / "model"
        / random_.choice(["config.json", "config.json", "model.safetensors", "generation_config.json"])
    )
    if file.name == "config.json" and random_.random() < 0.5:
        config = json.loads(file.read_text())
        key = random_.choice([key for key, value in config.items() if isinstance(value, int)])
        config[key] = int(random_.choice(ABSURD[:-2]))
        file.write_text(json.dumps(config))
        what = f"{key} = {config[key]}"
    else:
        file.write_bytes(damaged(file.read_bytes(), random_.randrange(10**6)))
        what = f"{file.name} damaged"
    uses = [ground.diagnose(), ground.loss(ground.plain), ground.passkey()]
    argv = random_.choice([*uses, ground.posttrain(f"{copy.name}/out")])
    return [copy / "model" if part == ground.root / "model" else part for part in argv], f"{name}: {what}"


def checkpoint(ground: Ground, copy: Path, random_: random.Random) -> tuple[list[object], str]:
    """A checkpoint to resume from with a damaged file, committed again so that its sums hold, or not."""
    from damage import damaged
    from longroll.training.checkpoints import MANIFEST

    shutil.copytree(ground.root / "run", copy / "run")
    folder = copy / "run" / "checkpoints" / "checkpoint-2"
    files = [
        *sorted(file for file in folder.iterdir() if file.is_file()),
        copy / "run" / "checkpoints" / "run.json",
    ]
    file = random_.choice(files)
    whole = file.suffix == ".json" or random_.random() < 0.5
    file.write_bytes(damaged(file.read_bytes(), random_.randrange(10**6)) if whole else bomb(ground))
    again = file.name not in (MANIFEST, "run.json") and random_.random() < 0.8
    seal(folder, again=again)
    return [
        *ground.posttrain(f"{copy.name}/run"),
        "--save-steps",
        1,
        "--resume",
    ], f"{file.name} damaged{', committed' * again}"


def seal(folder: Path, *, again: bool) -> None:
    """Commit a checkpoint that was changed, where `again`."""
    from longroll.training.checkpoints import MANIFEST, _seal

    if again:
        entries = {f.name: _seal(f) for f in sorted(folder.iterdir()) if f.name != MANIFEST}
        (folder / MANIFEST).write_text(json.dumps({"files": entries}))


def result_file(ground: Ground, copy: Path, random_: random.Random) -> tuple[list[object], str]:
    from damage import damaged

    name = random_.choice(["diagnosis", "task"])
    file = copy / "result.json"
    file.write_bytes(damaged((ground.root / f"{name}.json").read_bytes(), random_.randrange(10**6)))
    uses: list[list[object]] = [["report", file, "--output", copy / "page"]]
    if name == "diagnosis":
        uses += [[*ground.diagnose(), "--against", file], [*ground.diagnose(), "--control", file]]
    else:
        uses += [
            [*ground.passkey(), "--json", file],
            ["evaluate", "compare", file, ground.root / "task.json"],
        ]
    return random_.choice(uses), f"{name}.json damaged"


def text_file(ground: Ground, copy: Path, random_: random.Random) -> tuple[list[object], str]:
    from damage import damaged

    whole = random_.choice(sorted((ground.root / "text").iterdir()))
    file = copy / whole.name
    kind = random_.choice(["damaged", "damaged", "empty", "binary", "deep", "one line", "other name"])
    data = whole.read_bytes()
    made = {
        "damaged": lambda: damaged(data, random_.randrange(10**6)),
        "empty": lambda: b"",
        "binary": lambda: random_.randbytes(5000),
        "deep": lambda: b"[" * 100_000,
        "one line": lambda: b'{"text": "' + b"x" * (8 << 20) + b'"}',
        "other name": lambda: data,
    }[kind]()
    if kind == "other name":
        file = copy / random_.choice(
            ["x.parquet", "x.jsonl", "x.csv", "x.txt.gz", "x.zst", "\x1b[31m.txt", "x"]
        )
    file.write_bytes(made)
    column = random_.choice([[], [], ["--text-column", random_.choice(["id", "nothing", "\x1b[2J", "text"])]])
    training = [file if part == ground.plain else part for part in ground.posttrain(f"{copy.name}/out")]
    base = random_.choice([ground.loss(file), training])
    return [*base, *column], f"{whole.name}: {kind}"


def adapter(ground: Ground, copy: Path, random_: random.Random) -> tuple[list[object], str]:
    from damage import damaged

    shutil.copytree(ground.root / "adapter", copy / "adapter")
    file = random_.choice(sorted(file for file in (copy / "adapter").iterdir() if file.is_file()))
    file.write_bytes(damaged(file.read_bytes(), random_.randrange(10**6)))
    argv = ground.loss(ground.plain)
    return [
        copy / "adapter" if part == ground.root / "model" else part for part in argv
    ], f"{file.name} damaged"


def pickled(ground: Ground, copy: Path, random_: random.Random) -> tuple[list[object], str]:
    """A pickle with code in it, in each place where weights may be one."""
    place = random_.choice(
        ["pytorch_model.bin", "RWKV-x070-tiny-ctx4096.pth", "adapter_model.bin", "state-spaces"]
    )
    folder = copy / "model"
    shutil.copytree(ground.root / ("adapter" if "adapter" in place else "model"), folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    if place == "state-spaces":
        (folder / "config.json").write_text(
            json.dumps({"d_model": 16, "n_layer": 1, "vocab_size": 64, "ssm_cfg": {}})
        )
        place = "pytorch_model.bin"
    (folder / place).write_bytes(bomb(ground))
    model = folder / place if place.endswith(".pth") else folder
    argv = random_.choice([ground.loss(ground.plain), ground.posttrain(f"{copy.name}/out")])
    return [model if part == ground.root / "model" else part for part in argv], f"code in {place}"


def settings_file(ground: Ground, copy: Path, random_: random.Random) -> tuple[list[object], str]:
    from damage import damaged

    option, source = random_.choice([("--fsdp-config", "fsdp.json"), ("--prompts", "prompts.json")])
    file = copy / source
    file.write_bytes(damaged((ground.root / source).read_bytes(), random_.randrange(10**6)))
    if option == "--prompts":
        return ["evaluate", "niah", *ground.passkey()[2:], option, file], f"{source} damaged"
    return [*ground.posttrain(f"{copy.name}/out"), "--fsdp", option, file], f"{source} damaged"


def number_in_file(ground: Ground, copy: Path, random_: random.Random) -> tuple[list[object], str]:
    """A JSON file of any kind with one number that is absurd, or no number."""
    model = [copy / "model" if part == ground.root / "model" else part for part in ground.diagnose()]
    loss = [copy / "adapter" if part == ground.root / "model" else part for part in ground.loss(ground.plain)]
    training = [copy / "model" if part == ground.root / "model" else part for part in ground.posttrain("out")]
    fsdp = [*training, "--fsdp", "--fsdp-config", copy / "fsdp.json"]
    resumed = [*ground.posttrain(f"{copy.name}/run"), "--save-steps", 1, "--resume"]
    last = "run/checkpoints/checkpoint-2"
    uses: dict[str, list[list[object]]] = {
        "model/config.json": [model, training],
        "model/generation_config.json": [model],
        "adapter/adapter_config.json": [loss],
        "fsdp.json": [fsdp],
        "run/checkpoints/run.json": [resumed],
        f"{last}/manifest.json": [resumed],
        f"{last}/trainer_state.json": [resumed],
        "diagnosis.json": [
            ["report", copy / "diagnosis.json", "--output", copy / "page", "--figures", copy / "figures"],
            [*ground.diagnose(), "--against", copy / "diagnosis.json"],
        ],
        "task.json": [
            ["report", copy / "task.json", "--output", copy / "page"],
            ["evaluate", "compare", copy / "task.json", "--output", copy / "figures"],
            [*ground.passkey(), "--json", copy / "task.json"],
        ],
    }
    name = random_.choice(list(uses))
    top = name.partition("/")[0]
    if (ground.root / top).is_dir():
        shutil.copytree(ground.root / top, copy / top)
    else:
        shutil.copy(ground.root / top, copy / top)
    file = copy / name
    data = json.loads(file.read_text())
    holder, key = random_.choice(numbers_of(data))
    holder[key] = random_.choice([*map(int, ABSURD[:4]), -1, 0, 10**400, 1e300, math.inf, math.nan])
    file.write_text(json.dumps(data))
    if top == "run":
        seal(copy / last, again=name.endswith("trainer_state.json"))
    return random_.choice(uses[name]), f"{name}: {key} = {str(holder[key])[:30]}"


def numbers_of(data: Any) -> list[tuple[Any, Any]]:
    """Each number within JSON data, as what holds it and its key."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    found = []
    for key, value in pairs:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        found += [(data, key)] if number else numbers_of(value)
    return found


def bomb(ground: Ground) -> bytes:
    """A file as torch.save makes it, whose pickle writes a file."""
    import torch

    if random.random() < 0.5:
        return pickle.dumps(Bomb(ground.flag))
    held = io.BytesIO()
    torch.save({"weight": torch.zeros(2), "x": Bomb(ground.flag)}, held)
    return held.getvalue()


KINDS: dict[str, tuple[Callable[..., tuple[list[object], str]], int]] = {
    "flags": (flags, 10),
    "model": (model_folder, 4),
    "checkpoint": (checkpoint, 4),
    "result": (result_file, 3),
    "text": (text_file, 4),
    "adapter": (adapter, 2),
    "pickle": (pickled, 2),
    "settings": (settings_file, 1),
    "sizes": (sizes, 4),
    "numbers": (number_in_file, 3),
}
"""Kind -> what draws a trial, and how often of 30."""


def limited(argv: list[object], ground: Ground, place: Path) -> dict[str, Any]:
    """Run `longroll` with these arguments in a process of its own, with limits."""
    from longroll import cli

    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
            sys.stdout, sys.stderr = (
                os.fdopen(n, "w", closefd=False, errors="surrogateescape") for n in (1, 2)
            )
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            sys.argv = ["longroll", *map(str, argv)]
            os.chdir(place)  # what is written beside a relative name stays there
            status = 1
            try:
                cli.main()
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(bool(end.code))
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
        began, code, usage = time.monotonic(), None, None
        while code is None:
            done, status, usage = os.wait4(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if done else None
            if code is None and time.monotonic() - began > SECONDS:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                said.seek(0)
                return {"verdict": "hang", "said": said.read().decode(errors="replace")[-2000:]}
            time.sleep(0.005)
        said.seek(0)
        text = said.read().decode(errors="replace")
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the child begins with the parent's pages
    taken = max(0, usage.ru_maxrss - own) * 1024 if usage else 0
    verdict = judge(code, text, taken, ground)
    return {"verdict": verdict, "status": code, "said": text[-2000:], "mib": taken >> 20}


def judge(status: int, text: str, taken: int, ground: Ground) -> str:
    """works, refused, or what is wrong."""
    lines = [line for line in text.splitlines() if line.startswith("longroll: ")]
    if ground.flag.exists():
        ground.flag.unlink()
        return "code of a pickle ran"
    if "Traceback (most recent call last)" in text:
        return "traceback"
    if status < 0:
        return f"died by {signal.Signals(-status).name}"
    if any(ord(character) < 32 and character not in "\n\t\r" for character in text) or "\x7f" in text:
        return "control characters"
    if taken > TAKEN:
        return "took memory"
    if status == 0:
        return "works"
    if status == 2 and len(lines) == 1 and text.rstrip().splitlines()[-1] == lines[0]:
        return "refused"
    return f"status {status} with {len(lines)} lines"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--only", type=int, nargs="+", help="these trials")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["COLUMNS"] = "200"
    import torch

    import longroll.report
    import longroll.tasks
    import longroll.training  # noqa: F401  (before the forks)
    from longroll.results import BenchmarkResult, provenance

    torch.set_num_threads(1)
    root, began = Path(tempfile.mkdtemp(prefix="fuzz_")), time.perf_counter()
    ground = Ground(root)
    ground.prepare()
    kinds = [kind for kind in options.kinds for _ in range(KINDS[kind][1])]
    counts: dict[str, Counter[str]] = {}
    failures = []
    for number in options.only or range(options.seed, options.seed + options.trials):
        random_ = random.Random(number)
        random.seed(number)
        kind = random_.choice(kinds)
        copy = root / f"trial{number}"
        copy.mkdir()
        argv, what = KINDS[kind][0](ground, copy, random_)
        found = limited(argv, ground, copy)
        counts.setdefault(kind, Counter())[found["verdict"]] += 1
        if found["verdict"] not in ("works", "refused") or options.only:
            failures.append({"trial": number, "kind": kind, "what": what, "argv": [*map(str, argv)], **found})
            print(json.dumps(failures[-1]), flush=True)
        shutil.rmtree(copy, ignore_errors=True)
    outcomes = {kind: dict(count) for kind, count in sorted(counts.items())}
    print(json.dumps(outcomes))
    if options.json:
        made = provenance(seed=options.seed, seconds=time.perf_counter() - began)
        result = {"what": "hostile input to every command", "trials": options.trials, "outcomes": outcomes}
        BenchmarkResult.from_json({**result, "failures": failures, "provenance": made}).write(options.json)
    shutil.rmtree(root, ignore_errors=True)
    raise SystemExit(bool(failures and not options.only))


if __name__ == "__main__":
    main()
