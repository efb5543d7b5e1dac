"""What a launcher says in the environment is believed, or refused in one line."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longroll import LongrollError, cli, meeting, ranks
from longroll.launcher import place


@pytest.mark.parametrize(
    "given",
    [
        {"WORLD_SIZE": "2"},
        {"RANK": "1"},
        {"WORLD_SIZE": "abc"},
        {"WORLD_SIZE": "0"},
        {"WORLD_SIZE": "-3"},
        {"RANK": "\x1b[31m"},
        {"WORLD_SIZE": "2", "RANK": "5", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"},
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "29500"},
    ],
    ids=range(9),
)
def test_an_environment_that_no_launcher_makes_is_refused(given, monkeypatch, capfd):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    ended = []  # several processes end by os._exit
    monkeypatch.setattr(os, "_exit", lambda code: ended.append(code))
    monkeypatch.setattr(sys, "argv", ["longroll", "doctor"])
    try:
        cli.main()
    except SystemExit as end:
        ended.append(end.code)
    said = capfd.readouterr().err
    assert ended == [2] and said.count("\n") == 1 and "start by torchrun" in said and "\x1b" not in said


def test_a_launcher_is_believed(monkeypatch):
    launched = {"WORLD_SIZE": "3", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert place() == (2, 3)
    for name in launched:
        monkeypatch.delenv(name)
    assert place() == (0, 1)


JOINS = {"measure": ranks.join, "train": lambda: ranks.join_training(torch.device("cpu"))}


def launched(monkeypatch, rank, port, size=2, host="localhost", **more):
    """Set what a launcher sets, and wait for seconds only."""
    given = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": host, "MASTER_PORT": port, **more}
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))
    for name, seconds in (("PATIENCE", 1.0), ("NAME_PATIENCE", 1.0), ("SAID_AFTER", 0.2)):
        monkeypatch.setattr(meeting, name, seconds)


def free_port():
    with socket.create_server(("localhost", 0)) as found:
        return found.getsockname()[1]


@pytest.mark.parametrize("join", JOINS)
def test_a_port_in_use_is_one_line(join, monkeypatch):
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        launched(monkeypatch, 0, port)
        with pytest.raises(LongrollError, match=f"cannot meet at MASTER_ADDR localhost, MASTER_PORT {port}"):
            JOINS[join]()


@pytest.mark.parametrize("join", JOINS)
def test_a_process_says_whom_it_waits_for_and_ends(join, monkeypatch, caplog, capfd):
    launched(monkeypatch, 0, free_port(), size=3)
    with pytest.raises(LongrollError, match=r"within 1 s rank 1, rank 2 did not come.*WORLD_SIZE 3"):
        JOINS[join]()
    (record,) = caplog.records
    assert "Rank 0 of 3 waits at MASTER_ADDR localhost" in record.message
    assert record.message.endswith("for rank 1, rank 2 (0 s of 1).")
    capfd.readouterr()  # another test may have left a handler that writes there
    launched(monkeypatch, 1, free_port())
    with pytest.raises(LongrollError, match=r"rank 0 does not answer in 1 s \(Connection refused\)"):
        JOINS[join]()
    said = capfd.readouterr().err  # its warnings are hushed
    assert said.count("\n") == 1 and "longroll: Rank 1 of 2 waits for rank 0 at MASTER_ADDR localhost" in said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_host_that_is_not_known_is_named(rank, monkeypatch, caplog, capfd):
    launched(monkeypatch, rank, free_port(), host="nowhere.invalid")
    with pytest.raises(
        LongrollError, match=r"MASTER_ADDR nowhere\.invalid.*Give the launcher another address"
    ):
        ranks.join()
    assert "waits for the address of nowhere.invalid" in caplog.text + capfd.readouterr().err


def test_processes_that_come_late_meet(monkeypatch):
    port = free_port()
    launched(monkeypatch, 0, port)
    monkeypatch.setattr(meeting, "PATIENCE", 100.0)
    code = "from longroll.meeting import meet; meet().set('told', 'by rank 1')"
    with subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"RANK": "1"}) as other:
        assert meeting.meet().get("told") == b"by rank 1"
        assert other.wait(60) == 0


def test_a_restart_does_not_read_what_dead_processes_left(monkeypatch):
    """torchrun serves one store for all attempts."""
    port = free_port()
    serves = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    launched(monkeypatch, 0, port, size=1, TORCHELASTIC_USE_AGENT_STORE="True")
    stores = []
    for attempt in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        stores.append(meeting.meet())
        stores[-1].set(f"address {attempt}", "here")
    assert stores[1].check(["address 1"]) and not stores[1].check(["address 0"])
    assert serves.check(["attempt_0/address 0", "attempt_1/address 1"])


RESTARTED = """
import os, signal, sys
from transformers import TrainerCallback
sys.path[:0] = [sys.argv[2], sys.argv[3]]
from longroll import RecurrentLM, ranks
from longroll.conformance.tiny import build
from longroll.training import PosttrainOptions, posttrain
from ranked import corpus_of

class Killed(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if (state.global_step, os.environ["TORCHELASTIC_RESTART_COUNT"], ranks.rank()) == (2, "0", 0):
            os.kill(os.getpid(), signal.SIGKILL)

options = PosttrainOptions(length=8, steps=4, batch_size=2, learning_rate=1e-3, save_steps=1)
told = {"resume": True, "callbacks": [Killed()]}
posttrain(RecurrentLM(build("mamba2")), corpus_of(), "sp", options, sys.argv[1], **told)
"""


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_process_died(tmp_path):
    (tmp_path / "run.py").write_text(RESTARTED)
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    command += [tmp_path / "run.py", tmp_path / "out", tests, tests / "training"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/model.safetensors").is_file() and not (tmp_path / "out/checkpoints").exists()
