"""Try the tests on a seeded sample of mutants: mutmut changes a line at a time, and some test must notice.

    make mutants                                     # 300 mutants; minutes on 16 cores, an hour on 2
    python dev/mutants.py --sample 20 --only "longroll.interventions.*"

[tool.mutmut] in pyproject.toml says what is mutated and which tests are tried. The summary names every
survivor with its change; dev/mutants.md explains them. A smaller sample of one seed is part of a larger one.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import random
import subprocess
import sys
from pathlib import Path

MUTMUT = [sys.executable, "-m", "mutmut"]
FOLDER = Path("mutants")
_FAILED, _NO_TESTS = (1, 3), 33  # pytest's exit codes for failures, mutmut's for code that no test calls
_TIMED_OUT = (-24, 24, 36, 152, 255)  # a test that hangs notices, too
_FIRST = "longroll.interventions._base.x_fit_rows__mutmut_1"  # one that a few quick tests call


def outcomes() -> dict[str, int | None]:
    """Exit code of the tests of every mutant; None where it was not tried."""
    found: dict[str, int | None] = {}
    for file in sorted(FOLDER.rglob("*.meta")):
        found |= json.loads(file.read_text())["exit_code_by_key"]
    return found


def main() -> int:
    """Sample, run, summarise; the exit status is 1 where a mutant survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=300, help="Mutants to try.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the sample.")
    parser.add_argument("--only", default="*", help="Pattern of the names to sample from.")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="Mutants at once.")
    parser.add_argument("--json", type=Path, help="File for the summary.")
    arguments = parser.parse_args()
    run = [*MUTMUT, "run", "--max-children", str(arguments.processes)]
    # with the first mutant mutmut makes all of them and learns which test calls what
    subprocess.run([*run, _FIRST], check=True)
    names = [name for name in sorted(outcomes()) if fnmatch.fnmatch(name, arguments.only)]
    shuffled = random.Random(arguments.seed).sample(names, len(names))
    sample = sorted(shuffled[: arguments.sample])
    subprocess.run([*run, *sample], check=True)
    codes = outcomes()
    survivors = {name: codes[name] for name in sample if codes[name] not in _FAILED + _TIMED_OUT}
    changes = {}
    for name, code in survivors.items():
        shown = subprocess.run([*MUTMUT, "show", name], capture_output=True, text=True, check=False).stdout
        lines = [line for line in shown.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
        changes[name] = {"exit_code": code, "called": code != _NO_TESTS, "change": lines}
        print(name, "" if code == 0 else f"(exit code {code})", *lines, sep="\n  ")
    summary = {
        "seed": arguments.seed,
        "mutants": len(names),
        "tried": len(sample),
        "killed": len(sample) - len(survivors),
        "timed_out": sum(codes[name] in _TIMED_OUT for name in sample),
        "survivors": changes,
    }
    print(f"{summary['killed']} of {len(sample)} mutants killed; {len(survivors)} survive")
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=1) + "\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
