"""How the processes that a launcher started meet: whom each of them waits for, and for how long."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from longroll.errors import LongrollError, first_line
from longroll.launcher import place

PATIENCE = 600.0
"""Seconds that a process waits for the others, as torchrun does (`join_timeout`)."""
NAME_PATIENCE = 30.0
"""Seconds that a process waits for the name of a host to be known."""
SAID_AFTER, SAID_EVERY = 5.0, 60.0
"""Seconds until a process says that it waits, and until it says it again."""
_PAUSE = 0.2
_ANSWER = timedelta(seconds=60)  # of who serves the port, to the first call
_CALL = timedelta(seconds=300)  # of one call of the store, PyTorch's default

logger = logging.getLogger("longroll")

_store: dist.Store | None = None  # rank 0 serves it as long as this object lives


def meet() -> dist.Store:
    """Return the store by which the processes of this attempt exchange addresses, once all are there.

    torchrun keeps one store for all attempts (`--max-restarts`). The number of the attempt stands before each
    name, so that no process reads the address of one that is dead.

    Raises:
        LongrollError: for a host that is not known, a port in use, and processes that do not come.
    """
    global _store
    number, size = place()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = attempt_of()
    serves = number == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"MASTER_ADDR {host}, MASTER_PORT {port}"
    lost = f"The processes cannot meet at {where}"
    who = f"Rank {number} of {size}"

    def known() -> bool:
        socket.getaddrinfo(host, port)
        return True

    def served() -> bool:
        socket.create_connection((host, port), timeout=SAID_AFTER).close()
        return True

    problem = _wait(known, f"{who} waits for the address of {host}", min(NAME_PATIENCE, PATIENCE))
    if problem is not None:
        raise LongrollError(f"{lost}: {problem}. Give the launcher another address.")
    if not serves:
        problem = _wait(served, f"{who} waits for rank 0 at {where}", PATIENCE)
        if problem is not None:
            raise LongrollError(f"{lost}: rank 0 does not answer in {PATIENCE:g} s ({problem}). Start it.")
    try:
        _store = dist.TCPStore(
            host, port, size, serves, timeout=_ANSWER, wait_for_workers=False, multi_tenant=serves
        )
    except (RuntimeError, ValueError) as error:  # a port in use
        raise LongrollError(f"{lost}: {first_line(error)}. Give the launcher another port.") from error
    _store.set_timeout(_CALL)
    here = dist.PrefixStore(f"longroll/attempt_{attempt}", _store)
    names = [f"rank {one}" for one in range(size)]

    def missing() -> str:
        some = [name for name in names if not here.check([name])]
        return ", ".join(some[:8]) + (", ..." if len(some) > 8 else "")

    try:
        here.set(names[number], "here")
        problem = _wait(
            lambda: here.check(names), lambda: f"{who} waits at {where} for {missing()}", PATIENCE
        )
        late = missing() if problem is not None else ""
    except RuntimeError as error:  # who serves the store has ended
        raise LongrollError(f"{lost}: {first_line(error)}. Start all processes again.") from error
    if late:
        raise LongrollError(
            f"{lost}: within {PATIENCE:g} s {late} did not come. Start as many processes as WORLD_SIZE "
            f"{size} says, each with its RANK."
        )
    return dist.PrefixStore(f"attempt_{attempt}", _store)


def attempt_of() -> int:
    """Return how often torchrun has started the processes again."""
    with contextlib.suppress(ValueError):
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return 0


def _wait(come: Callable[[], bool], what: str | Callable[[], str], patience: float) -> str | None:
    """Wait until `come`, and say so after a while; return what the last problem was if it does not."""
    began = time.monotonic()
    said = began + SAID_AFTER
    while True:
        try:
            if come():
                return None
            problem = "nothing"
        except OSError as error:
            problem = error.strerror or str(error)
        now = time.monotonic()
        if now - began >= patience:
            return problem
        if now >= said:
            told = what if isinstance(what, str) else what()
            _say(f"{told} ({now - began:.0f} s of {patience:g}).")
            said = now + SAID_EVERY
        time.sleep(min(_PAUSE, patience))


def _say(message: str) -> None:
    """Log a line; ranks but the first, whose warnings the command line hushes, print it."""
    if place()[0] == 0:
        logger.warning(message)
        return
    logger.info(message)
    with contextlib.suppress(OSError):
        sys.stderr.write(f"longroll: {message}\n")
