"""A launcher (torchrun, accelerate launch) that is killed: its processes end as it would have ended them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import psutil

from longroll.errors import LongrollError

_NAMES = ("torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate")
_EVERY = 0.5  # seconds between two looks
_GRACE = 120.0  # seconds from SIGTERM to SIGKILL: a large checkpoint takes a minute

_watching = False


def place() -> tuple[int, int]:
    """Return the number of this process and how many there are, as a launcher says; 0 and 1 without one.

    Raises:
        LongrollError: for variables of the environment that no launcher sets so.
    """
    named = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ[name] for name in named if os.environ.get(name)}
    with contextlib.suppress(KeyError, ValueError):
        size = int(given.get("WORLD_SIZE", "1"))
        rank = int(given["RANK"] if size > 1 else given.get("RANK", "0"))
        met = size == 1 or ("MASTER_ADDR" in given and 0 < int(given["MASTER_PORT"]) < 2**16)
        if 0 <= rank < size and met:
            return rank, size
    said = ", ".join(f"{name} {given.get(name, 'is not set')}" for name in named)
    raise LongrollError(f"{said}: start by torchrun or accelerate launch, which set them, or unset all.")


def end_with_launcher() -> None:
    """End this process when the launcher that started it has ended without ending it, as by SIGKILL.

    SIGTERM comes first, so that training saves a checkpoint; SIGKILL follows after two minutes. A process
    that no launcher started is left alone.
    """
    global _watching
    elastic = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun's, and accelerate's for several processes
    if _watching or not (elastic or any(name.startswith("ACCELERATE_") for name in os.environ)):
        return
    found = _launcher(elastic)
    if found is not None or (elastic and _store_is_gone()):
        _watching = True
        threading.Thread(target=_watch, args=(found,), name="launcher", daemon=True).start()


def _launcher(elastic: bool) -> psutil.Process | None:
    """Return the process that launched this one: by its command, or a program that calls torch's launcher."""
    above: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        above = psutil.Process().parents()
    commands = [
        (process, [Path(word).name.removesuffix(".exe") for word in _command(process)]) for process in above
    ]
    named = (process for process, words in commands if any(word in _NAMES for word in words))
    programs = (process for process, words in commands if elastic and words and "python" in words[0].lower())
    return next(named, None) or next(programs, None)


def _store_is_gone() -> bool:
    """Return whether nobody serves the store of torchrun, by which its processes meet."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    try:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection(place, timeout=5).close()
    except ConnectionRefusedError:
        return True
    except (OSError, KeyError, ValueError):
        pass
    return False


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        words: list[str] = process.cmdline()
        return words
    return []


def _watch(launcher: psutil.Process | None) -> None:
    """Wait for the end of the launcher; None: it has ended before this process looked."""
    with contextlib.suppress(psutil.NoSuchProcess):
        while launcher and launcher.is_running() and launcher.status() != psutil.STATUS_ZOMBIE:
            time.sleep(_EVERY)
    with contextlib.suppress(OSError):
        sys.stderr.write(f"Process {os.getpid()} ends: the launcher that started it is gone.\n")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os.kill(os.getpid(), signal.SIGKILL)
