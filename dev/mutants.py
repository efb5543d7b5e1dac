"""Try the tests on a seeded sample of mutants: mutmut changes a line at a time, and some test must notice.

    make mutants                                     # 300 mutants; minutes on 16 cores, an hour on 2
    python dev/mutants.py --sample 20 --only "longroll.interventions.*"

What is mutated, and which tests are tried, stands in pyproject.toml under [tool.mutmut]. The summary names
every survivor with its change; dev/mutants.md explains those that no test can kill.
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
_KILLED, _NO_TESTS = (1, 3), 33  # pytest's exit codes for failures, mutmut's for code that no test calls


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
    parser.add_argument("--json", type=Path, help="File for the summary.")
    arguments = parser.parse_args()
    processes = str(os.cpu_count() or 1)
    # a name that no mutant has: mutmut then makes all mutants and learns which test calls what
    subprocess.run([*MUTMUT, "run", "--max-children", processes, "longroll.none"], check=False)
    names = [name for name in sorted(outcomes()) if fnmatch.fnmatch(name, arguments.only)]
    sample = sorted(random.Random(arguments.seed).sample(names, min(arguments.sample, len(names))))
    subprocess.run([*MUTMUT, "run", "--max-children", processes, *sample], check=False)
    codes = outcomes()
    survivors = {name: codes[name] for name in sample if codes[name] not in _KILLED}
    changes = {}
    for name, code in survivors.items():
        shown = subprocess.run([*MUTMUT, "show", name], capture_output=True, text=True, check=False).stdout
        lines = [line for line in shown.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
        changes[name] = {"exit_code": code, "called": code != _NO_TESTS, "change": lines}
        print(name, "" if code == 0 else f"(exit code {code})", *lines, sep="\n  ")
    summary = {
        "mutants": len(names),
        "tried": len(sample),
        "killed": len(sample) - len(survivors),
        "survivors": changes,
    }
    print(f"{summary['killed']} of {len(sample)} mutants killed; {len(survivors)} survive")
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=1) + "\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
