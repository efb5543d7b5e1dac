"""Build the wheel, install it into a clean environment, and run the quickstart outside the checkout.

python dev/check_wheel.py            # a short quickstart, 10 steps
python dev/check_wheel.py --full     # the quickstart as README.md gives it
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHORT = ["--length", "1k", "--sequences", "4", "--steps", "10"]
OPENS = """
import longroll, torch
assert "site-packages" in longroll.__file__, longroll.__file__
logits, state = longroll.load("specimen")(torch.zeros(1, 4, dtype=torch.long))
print(longroll.__version__, tuple(logits.shape), longroll.__file__)
"""


def main() -> None:
    """Build, install and run; any failure ends the script with its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="Run the quickstart with its default options.")
    full = parser.parse_args().full
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def run(*command: str | Path) -> None:
            subprocess.run([*map(str, command)], check=True, cwd=folder, env=environment)

        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder / "dist", ROOT)
        (wheel,) = (folder / "dist").glob("*.whl")
        venv.create(folder / "venv", with_pip=True)
        binaries = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
        run(binaries / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel)
        run(binaries / "python", "-c", OPENS)
        options = [] if full else SHORT
        run(binaries / "longroll", "quickstart", "--output", "out", "--json", "summary.json", *options)
        summary = json.loads((folder / "summary.json").read_text())
        print(
            f"{wheel.name}: quickstart went from {summary['verdict_before']} to {summary['verdict_after']}."
        )


if __name__ == "__main__":
    main()
