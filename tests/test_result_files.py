"""Every published result file: its name, what made it, and nothing of the machine it was made on."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from longroll.results import read_result

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from file_result import hardware_of, name_of, provenances, without_machine  # noqa: E402

FILES = sorted(f for place in ("benchmarks", "recipes") for f in (ROOT / place / "results").glob("*.json"))
NAME = re.compile(r"[a-z0-9.]+(-[a-z0-9.]+)*_(cpu|[a-z0-9]+(-x\d+)?)_\d{4}-\d\d-\d\d\.json")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_result_file_says_what_made_it(file):
    assert NAME.fullmatch(file.name), "benchmark_hardware_date.json (benchmarks/file_result.py)"
    data = json.loads(file.read_text())
    assert data == without_machine(data), "it holds a path of a machine"
    made = [*provenances(data)]
    assert made, "it holds no provenance"
    dates = set()
    for one in made:
        dates.add(one["date"][:10])
        assert one["versions"]["torch"] and one["device"]
        # what an old file lacks is said in its note
        assert (one["seconds"] or 0) > 0 or "duration" in one["note"]
        if one["command"] is None:
            assert "script is not kept" in one["note"]
            continue
        command = shlex.split(one["command"])
        script = command[1:2] if command[0] in ("python", "torchrun") else command[:1]
        assert script[0] in ("longroll", "-m") or (ROOT / script[0]).is_file() or "not kept" in one["note"]
    assert file.stem.rpartition("_")[2] in dates


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parent.parent.name == "benchmarks"], ids=lambda f: f.stem
)
def test_a_benchmark_opens_as_a_result(file):
    assert read_result(file).to_json()["provenance"]


def test_a_result_is_cleaned_and_named():
    made = {
        "command": "python a.py --json /root/out/a.json --text /tmp/data/books/train",
        "date": "2026-11-26T17:20:50",
    }
    made |= {"device": "NVIDIA H100 80GB HBM3"}
    data = without_machine({"provenance": made, "rows": [{"path": "/work/x"}]})
    assert data["provenance"]["command"] == "python a.py --json a.json --text books/train"
    assert data["rows"] == [{"path": "x"}]
    assert without_machine("1/2 and home/x, https://a.b/tmp/c") == "1/2 and home/x, https://a.b/tmp/c"
    assert name_of(data, "loss", None) == "loss_h100_2026-11-26.json"
    assert name_of(data, "loss", "h100-x4") == "loss_h100-x4_2026-11-26.json"
    assert hardware_of("AMD EPYC, 2 cores") == hardware_of("Intel(R) Xeon(R) Processor, 16 cores") == "cpu"
    with pytest.raises(SystemExit):
        name_of({}, "loss", None)
