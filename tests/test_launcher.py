"""What a launcher says in the environment is believed, or refused in one line."""

import os
import socket
import sys

import pytest

from longroll import LongrollError, cli, ranks
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


def test_processes_that_cannot_meet_say_why(monkeypatch):
    with socket.create_server(("localhost", 0)) as taken:
        port = str(taken.getsockname()[1])
        for name, value in (
            ("RANK", "0"),
            ("WORLD_SIZE", "2"),
            ("MASTER_ADDR", "localhost"),
            ("MASTER_PORT", port),
        ):
            monkeypatch.setenv(name, value)
        with pytest.raises(LongrollError, match=f"cannot meet at MASTER_ADDR localhost, MASTER_PORT {port}"):
            ranks.join()
