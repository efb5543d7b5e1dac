"""SIGINT, SIGTERM and SIGHUP end a run between two steps, with a checkpoint."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from longroll import ranks

_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
_HEARD = [signal.SIGINT, signal.SIGTERM, *([_HANGUP] if _HANGUP else [])]

_asked = 0


def asked() -> int:
    """Return the signal that asked this process to stop; 0: none did."""
    return _asked


@contextmanager
def stops_between_steps() -> Iterator[None]:
    """Have SIGINT, SIGTERM and SIGHUP wait for the end of the step; a second SIGINT does not wait.

    An exception from a signal may come up anywhere, in a destructor too, where Python drops it and trains on.
    A second SIGTERM is the launcher's copy of the first. SIGHUP says that the terminal is gone: what the
    process prints is dropped from then on. Signals that the process was started to ignore, as by nohup, are
    ignored. Outside the main thread, which alone may handle signals, nothing is changed.
    """
    global _asked

    def ask(number: int, _: Any) -> None:
        global _asked
        if _asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == _HANGUP:
            _drop_terminal()
        if not _asked and ranks.rank() == 0:
            with suppress(OSError):  # nobody may read any more
                sys.stderr.write("stopping after this step; interrupt again to stop at once\n")
        _asked = number

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked = 0
    heard = [number for number in _HEARD if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked = 0


def _drop_terminal() -> None:
    """Drop standard output and error where they are a terminal: writing to one that is gone fails."""
    with suppress(OSError), open(os.devnull, "w") as nowhere:
        for number in (1, 2):
            if stat.S_ISCHR(os.fstat(number).st_mode):
                os.dup2(nowhere.fileno(), number)
