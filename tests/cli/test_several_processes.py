"""Measuring commands under torchrun: one process speaks and writes, and one that fails ends the others."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FAILING = str(Path(__file__).parent / "failing.py")
MEASURE = ("--length", "512", "--sequences", "5", "--json")


def run(*command, processes=2):
    several = ("-m", "torch.distributed.run", f"--nproc-per-node={processes}")
    several += ("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")
    launched = [sys.executable, *(several if processes > 1 else ()), *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(launched, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize("command", [("diagnose",), ("evaluate", "loss")], ids="-".join)
def test_one_process_prints_and_writes_what_one_alone_does(command, tmp_path):
    results = []
    for processes in (1, 2):
        file = tmp_path / f"{processes}.json"
        ran = run("-m", "longroll", *command, "specimen", *MEASURE, file, processes=processes)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.count("verdict" if command == ("diagnose",) else "positions") == 1
        results.append(json.loads(file.read_text()))
    one, two = results
    assert one.get("verdict") == two.get("verdict") and one.get("sentence") == two.get("sentence")
    assert two["curve"]["loss"] == pytest.approx(one["curve"]["loss"], rel=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.json", "2.json"]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("how", ["error", "bug", "kill"])
def test_a_process_that_fails_ends_the_others_and_is_named(how, which, tmp_path):
    began = time.monotonic()
    ran = run(FAILING, how, which, "diagnose", "specimen", *MEASURE, tmp_path / "found.json")
    assert ran.returncode != 0 and time.monotonic() - began < 120
    cause = ran.stderr[ran.stderr.index("Root Cause") :]
    assert f"rank      : {which}" in cause, ran.stderr
    said = {
        "error": "longroll: the moon is full.",
        "bug": "ValueError: a fault of the code",
        "kill": "SIGKILL",
    }
    assert said[how] in ran.stderr
    assert (tmp_path / "found.json.kept" / f"reading-{1 - which}-of-2.piece").is_file()
    assert not (tmp_path / "found.json").exists()
