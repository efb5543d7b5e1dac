"""Open files damaged at random: config.json, tokenizers, result JSON, state-spaces and .pth checkpoints.

A damaged file either works, or one `LongrollError` line says what is wrong. Each trial runs in a process of
its own with a limit on time and memory, so that a hang or a crash of a library is seen and counted.

    python benchmarks/mutated_files.py --trials 200 --json mutated_files.json

The files and the damage are those of the tests, by a seed.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = map(str, (TESTS, TESTS / "data", TESTS / "results"))

from test_faulty_files import DIAGNOSIS, SECTIONS, TASK  # noqa: E402
from test_rwkv_tokenizer import vocabulary  # noqa: E402

import longroll  # noqa: E402
from damage import damaged  # noqa: E402
from families import test_original_mamba as state_spaces  # noqa: E402
from families.fla_models import blinkdl  # noqa: E402
from longroll.data import load_tokenizer  # noqa: E402
from longroll.errors import LongrollError  # noqa: E402
from longroll.report import write_report  # noqa: E402
from longroll.results import BenchmarkResult, provenance, read_result  # noqa: E402
from tokenizer_kinds import trained  # noqa: E402
from zoo import build  # noqa: E402

SECONDS = 30
MEMORY = 8 << 30  # bytes of address space beyond what the parent has
MODELS = ("mamba2", "mamba", "jamba", "falcon_h1", "qwen3_next", "recurrent_gemma", "llama")


def configs(folder: Path) -> None:
    for name in MODELS:
        build(name).save_pretrained(folder / name)


def tokenizers(folder: Path) -> None:
    for kind in ("bytes", "sentencepiece", "words"):
        trained(kind, bos="<s>", eos="</s>", add_bos=True).save_pretrained(folder / kind)
    (folder / "rwkv").mkdir()
    vocabulary(folder / "rwkv")


def results(folder: Path) -> None:
    for name, data in (("diagnosis", DIAGNOSIS | SECTIONS), ("task", TASK)):
        (folder / name).mkdir()
        (folder / name / "result.json").write_text(json.dumps(data))


def originals(folder: Path) -> None:
    for kind, ssm in state_spaces.SSM.items():
        (folder / kind).mkdir()
        state_spaces.write(folder / kind, ssm)


def pth_files(folder: Path) -> None:
    for version, weights in (("6", blinkdl.weights_6), ("7", blinkdl.weights_7)):
        (folder / version).mkdir()
        torch.save(weights(blinkdl.Sizes()), folder / version / "RWKV-tiny-ctx4096.pth")


def read_model(folder: Path) -> None:
    file = next(folder.glob("*.pth"), folder)
    lm = longroll.load(file, device="cpu")
    longroll.position_loss(lm, torch.randint(0, min(50, lm.vocab_size), (1, 16)))


def read_tokens(folder: Path) -> None:
    tokenizer = load_tokenizer(model_path=folder, vocab_size=256)
    tokenizer.decode(tokenizer.encode("The sky is blue.\n 123 é 東京"))


def read_report(folder: Path) -> None:
    write_report([read_result(folder / "result.json")], folder / "report.html")


KINDS: dict[str, tuple[Callable, str, Callable]] = {
    "config.json": (configs, "config.json", read_model),
    "tokenizer": (tokenizers, "*", read_tokens),
    "result": (results, "*.json", read_report),
    "state-spaces": (originals, "*", read_model),
    ".pth": (pth_files, "*.pth", read_model),
}
"""Kind -> what writes whole files in folders, which of them are damaged, what reads a folder."""


def limited(work: Callable, folder: Path) -> str:
    """Run in a process of its own: "works", "refused", or what went wrong."""
    report = folder / ".outcome"
    child = os.fork()
    if child == 0:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        try:
            work(folder)
            said = "works"
        except LongrollError as problem:
            said = f"refused: {problem}"
            if "\n" in str(problem):
                said = f"more than one line: {problem}"
        except BaseException as fault:
            said = f"traceback: {fault!r}\n{traceback.format_exc()}"
        report.write_text(said, errors="replace")
        os._exit(0)
    deadline = time.monotonic() + SECONDS
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"hang: more than {SECONDS} s"
        time.sleep(0.002)
    return report.read_text() if report.exists() else "crash: the process died"


def trial(kind: str, wholes: list[Path], seed: int, at: Path) -> str:
    """Damage one file of one folder; what its reader answers."""
    whole, copy = wholes[seed % len(wholes)], at / f"{seed}"
    shutil.copytree(whole, copy)
    victims = sorted(file for file in copy.glob(KINDS[kind][1]) if file.is_file())
    victim = victims[seed // len(wholes) % len(victims)]
    victim.write_bytes(damaged(victim.read_bytes(), seed))
    outcome = limited(KINDS[kind][2], copy)
    if outcome.startswith(("works", "refused")):
        shutil.rmtree(copy)
        return outcome
    return f"{outcome}\n({whole.name}, {victim.name}: {copy})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=200, help="of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    root, began, counts = Path(tempfile.mkdtemp(prefix="mutated_files_")), time.perf_counter(), {}
    for kind in options.kinds:
        (root / kind / "whole").mkdir(parents=True)
        KINDS[kind][0](root / kind / "whole")
        wholes, found = sorted((root / kind / "whole").iterdir()), Counter()
        for seed in range(options.seed, options.seed + options.trials):
            outcome = trial(kind, wholes, seed, root / kind)
            found[outcome.partition(":")[0]] += 1
            if not outcome.startswith(("works", "refused")):
                print(f"{kind} {seed}: {outcome}", flush=True)
        counts[kind] = dict(found)
        print(kind, counts[kind], flush=True)
    result = {
        "what": "files damaged at random",
        "outcomes": counts,
        "provenance": provenance(seed=options.seed, seconds=time.perf_counter() - began),
    }
    if options.json:
        BenchmarkResult.from_json(result).write(options.json)
    raise SystemExit(any(set(found) - {"works", "refused"} for found in counts.values()))


if __name__ == "__main__":
    main()
