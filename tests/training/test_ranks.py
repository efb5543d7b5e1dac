"""Law 8: N ranks are one process with N times the batch; killed and resumed, they are never killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from ranked import Abandoned, explain, measure, run
from safetensors.torch import load_file

from longroll import LongrollError
from longroll.interventions import INTERVENTIONS
from zoo import assert_same_numbers

KINDS = ["none", *INTERVENTIONS]
CARRY = ["sp", "tbptt", "fitted"]
BASE = {"length": 8, "steps": 6, "learning_rate": 1e-2, "save_steps": 2, "accumulation": 2, "batch_size": 2}
ALONE = BASE | {"batch_size": 4}
SECONDS = 20  # in which a rank ends after another died; the launcher's own limit is 30


def torchrun(runs: list[dict], processes: int = 2, seconds: int = 240) -> subprocess.CompletedProcess:
    """Run them one after another on so many processes; say where they stand if they do not end."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(here / "ranked.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        return subprocess.run(
            [*command, json.dumps(runs)], capture_output=True, text=True, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired as late:
        said = late.stderr if isinstance(late.stderr, str) else (late.stderr or b"").decode(errors="replace")
        pytest.fail(f"{len(runs)} runs did not end in {seconds} s:\n{said}")


def spec(root: Path, name: str, kind: str, **more) -> dict:
    return {"kind": kind, "output": str(root / name / kind), "options": BASE, **more}


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((output / "log.json").read_text()) if "loss" in entry]


def assert_same_weights(found: Path, expected: Path, tolerance: float) -> None:
    one, other = (load_file(folder / "model.safetensors") for folder in (found, expected))
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


def assert_same_result(found: Path, expected: Path, tolerance: float) -> None:
    assert_same_weights(found, expected, tolerance)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-6)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Each intervention on two ranks: undisturbed, and ended in the midst; the last one by SIGKILL."""
    root = tmp_path_factory.mktemp("ranks")
    ends = [spec(root, "killed", kind, kill=3 + i % 3) for i, kind in enumerate(KINDS)]
    ends[-1]["kill_rank"] = 1
    began = time.monotonic()
    never = [spec(root, "two", kind) for kind in KINDS]
    spoilt = {"options": BASE | {"on_not_finite": "drop"}, "poison": [3, 2]}
    never += [spec(root, "spoilt-two", kind) | spoilt for kind in CARRY]
    measures = [{"output": str(root / "cells" / "two")}, {"explained": str(root / "diagnosis" / "two")}]
    died = torchrun([*never, *measures, *ends])
    assert died.returncode != 0 and "Signal 9 (SIGKILL)" in died.stderr, died.stderr
    assert time.monotonic() - began < 200
    shutil.copytree(root / "killed", root / "moved")
    for kind in KINDS:
        with pytest.raises(Abandoned):
            run(kind, str(root / "grown" / kind), options=ALONE, kill=3)
    again = [spec(root, name, kind, resume=True) for name in ("killed", "grown") for kind in KINDS]
    resumed = torchrun(again)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.count("started on 1 process and goes on on 2: its 4 rows") == len(KINDS)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one_of_twice_the_batch(kind, root):
    run(kind, str(root / "one" / kind), options=ALONE)
    assert_same_result(root / "two" / kind, root / "one" / kind, 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_ended_in_the_midst_and_resumed_is_undisturbed(kind, root):
    assert_same_result(root / "killed" / kind, root / "two" / kind, 0.0)


@pytest.mark.parametrize("kind", CARRY)
def test_a_state_that_is_dropped_on_one_rank_is_dropped_in_one_process(kind, root):
    """Every rank skips the step; row 2 is the first of rank 1."""
    spoilt = {"options": ALONE | {"on_not_finite": "drop"}, "poison": [3, 2]}
    run(**spec(root, "spoilt-one", kind) | spoilt)
    assert_same_weights(root / "spoilt-two" / kind, root / "spoilt-one" / kind, 2e-6)
    one, two = (losses(root / name / kind) for name in ("spoilt-one", "spoilt-two"))
    del one[3], two[3]  # of the skipped step, in which each rank logs what was finite of its own
    assert two == pytest.approx(one, rel=1e-6)
    one, two = (
        [
            entry
            for entry in json.loads((root / name / kind / "log.json").read_text())
            if "not_finite" in entry
        ]
        for name in ("spoilt-one", "spoilt-two")
    )
    assert one == two and [entry["not_finite_step"] for entry in one] == [4]
    assert one[0]["states_dropped"] == (kind == "sp")  # of tbptt, the row begins a document in this step


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_graphs_on_two_gpus_are_the_steps_of_ddp(tmp_path):
    kinds = {"plain": False, "graphs": True}
    few = BASE | {"steps": 3, "save_steps": 3}
    runs = [spec(tmp_path, k, "sp", options=few | {"cuda_graphs": graphs}) for k, graphs in kinds.items()]
    done = torchrun(runs, seconds=130)
    assert done.returncode == 0, done.stderr
    found, expected = (tmp_path / kind / "sp" for kind in ("graphs", "plain"))
    assert_same_weights(found, expected, 1e-3)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_rank_ends_the_others_and_the_run_resumes(kind, rank, root, tmp_path):
    began = time.monotonic()
    died = torchrun([spec(tmp_path, "killed", kind, kill=5, kill_rank=rank)])
    assert died.returncode != 0 and f"rank      : {rank}" in died.stderr
    assert time.monotonic() - began < 60 + SECONDS
    assert torchrun([spec(tmp_path, "killed", kind, resume=True)]).returncode == 0
    assert_same_result(tmp_path / "killed" / kind, root / "two" / kind, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_one_process_goes_on_on_two(kind, root):
    assert_same_result(root / "grown" / kind, root / "two" / kind, 2e-6)


def test_processes_of_a_killed_launcher_save_and_end(tmp_path):
    """Each notices by itself, finishes its step and saves."""
    long = {"options": BASE | {"steps": 200, "save_steps": 1000}}
    lost = torchrun([spec(tmp_path, "lost", "sp", kill=4, kill_rank="launcher") | long])
    assert lost.returncode == -signal.SIGKILL
    began = time.monotonic()
    while workers := [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info["cmdline"])]:
        assert time.monotonic() - began < SECONDS, workers
        time.sleep(0.1)
    (saved,) = (tmp_path / "lost" / "sp" / "checkpoints").glob("checkpoint-*")
    assert 4 < int(saved.name.removeprefix("checkpoint-")) < 200 and (saved / "manifest.json").is_file()


@pytest.mark.slow
def test_a_run_of_four_processes_goes_on_on_two_and_not_on_three(root, tmp_path):
    four = {"options": BASE | {"batch_size": 1}}
    assert (
        torchrun([spec(tmp_path, "moved", kind, kill=3) | four for kind in KINDS], processes=4).returncode
        == 0
    )
    torchrun([spec(tmp_path, "moved", "sp", resume=True)], processes=3)
    refused = [(tmp_path / "moved" / f"sp.{rank}").read_text() for rank in range(3)]
    assert all("start 1, 2, 4 processes with `batch_size` 4 over their number" in said for said in refused)
    assert torchrun([spec(tmp_path, "moved", kind, resume=True) for kind in KINDS]).returncode == 0
    for kind in KINDS:
        assert_same_result(tmp_path / "moved" / kind, root / "two" / kind, 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_on_another_number_of_processes(kind, root, caplog):
    """From two to one: refused with other rows, dealt anew with the same."""
    moved = spec(root, "moved", kind, resume=True)
    with pytest.raises(
        LongrollError, match=r"2 processes, 4 rows together.* on 1 process, 2 rows: give `batch_size` 4"
    ):
        run(**moved)
    run(**(moved | {"options": ALONE}))
    assert "its 4 rows and their states are dealt again" in caplog.text
    assert_same_result(root / "moved" / kind, root / "two" / kind, 2e-6)


def test_two_ranks_measure_what_one_does(root):
    measure(root / "cells" / "one")
    one, *two = ((root / "cells" / name).read_text() for name in ("one.0", "two.0", "two.1"))
    assert two == [one, one] and len(json.loads(one)) == 2


def test_two_ranks_diagnose_what_one_does(root):
    """In float64, but for losses and the states' effective ranks, which hold fewer digits."""
    explain(root / "diagnosis" / "one")
    one, *two = (json.loads((root / "diagnosis" / name).read_text()) for name in ("one.0", "two.0", "two.1"))
    assert one["verdict"] != "healthy" and len(one["coverage"]["causal"]) >= 3
    for found in (one, *two):
        del found["provenance"], found["advice"]
    for found in two:
        assert_same_numbers(found, one)
