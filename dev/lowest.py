"""Print the lower bounds of pyproject.toml as pins, a constraints file for pip.

    python dev/lowest.py lora > lowest.txt && pip install -c lowest.txt ".[lora]"

The arguments are the extras to include. `make test-lowest` installs these versions and runs tests with them.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def lowest(extras: list[str]) -> list[str]:
    """Return one `name==version` for each dependency, its lower bound.

    Raises:
        SystemExit: a dependency states no lower bound, or an extra is unknown.
    """
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    wanted = [*project["dependencies"]]
    for extra in extras:
        if extra not in project["optional-dependencies"]:
            raise SystemExit(f"{extra}: pyproject.toml has no such extra.")
        wanted += project["optional-dependencies"][extra]
    pins = []
    for requirement in wanted:
        found = re.fullmatch(r"([A-Za-z0-9_.-]+)(?:\[[^]]*\])?>=([0-9.]+)", requirement)
        if found is None:
            raise SystemExit(f"{requirement}: write it as name>=version.")
        pins.append(f"{found[1]}=={found[2]}")
    return pins


if __name__ == "__main__":
    print("\n".join(lowest(sys.argv[1:])))
