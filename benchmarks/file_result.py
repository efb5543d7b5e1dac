"""Put a result file into its place: benchmark_hardware_date.json, without paths of the machine that made it.

    python benchmarks/file_result.py /tmp/gpu_loss.json --what loss
    python benchmarks/file_result.py /tmp/long.json --what passkey --folder recipes/results

A result holds its provenance: command, versions, device, date, seconds. The test
`tests/test_result_files.py` checks every published file.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MACHINE = re.compile(
    r"(?<![\w./~-])/(?:tmp|root|work|home|mnt|opt|data)(?:/(?:tmp|out|run|data|heads))*(?=/|\b)/?"
)
"""The beginning of a path that only the machine has that made the result."""


def provenances(data: Any) -> Iterator[dict[str, Any]]:
    """Yield every provenance in a result, the outermost first."""
    if isinstance(data, dict):
        if isinstance(data.get("provenance"), dict):
            yield data["provenance"]
        for value in data.values():
            yield from provenances(value)
    elif isinstance(data, list):
        for value in data:
            yield from provenances(value)


def without_machine(data: Any) -> Any:
    """Return the data with paths such as /tmp/books as relative ones: books."""
    if isinstance(data, dict):
        return {key: without_machine(value) for key, value in data.items()}
    if isinstance(data, list):
        return [without_machine(value) for value in data]
    return MACHINE.sub("", data) if isinstance(data, str) else data


def hardware_of(device: str) -> str:
    """Return the short name of a device: h100, h200, cpu."""
    found = (
        re.search(r"\b([AHBL]\d{2,3}S?|RTX \w+|MI\d+)\b", device)
        if "NVIDIA" in device or "AMD I" in device
        else None
    )
    return found[1].lower().replace(" ", "-") if found else "cpu"


def name_of(data: dict[str, Any], what: str, hardware: str | None) -> str:
    """Return the file name of a result.

    Raises:
        SystemExit: the result holds no provenance with a device and a date.
    """
    made = next(provenances(data), {})
    if not made.get("device") or not made.get("date"):
        raise SystemExit("the result holds no provenance with a device and a date.")
    return f"{what}_{hardware or hardware_of(made['device'])}_{made['date'][:10]}.json"


def main() -> None:
    """Clean and move one file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path)
    parser.add_argument("--what", required=True, help="Name of the benchmark: lower case, with hyphens.")
    parser.add_argument("--hardware", help="For example h100-x4. Default: what the provenance names.")
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args()
    data = without_machine(json.loads(options.result.read_text()))
    if "kind" not in data:
        data = {"kind": "benchmark", "schema_version": 1, "what": options.what, **data}
        data.setdefault("provenance", next(provenances(data), None))
    target = options.folder / name_of(data, options.what, options.hardware)
    target.write_text(json.dumps(data, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()
