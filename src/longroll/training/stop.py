"""SIGINT and SIGTERM end a run between two steps, with a checkpoint."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from longroll import ranks

_asked = 0


def asked() -> int:
    """Return the signal that asked this process to stop; 0: none did."""
    return _asked


@contextmanager
def stops_between_steps() -> Iterator[None]:
    """Have SIGINT and SIGTERM wait for the end of the step; a second SIGINT does not wait.

    An exception from a signal may come up anywhere, in a destructor too, where Python drops it and trains on.
    A second SIGTERM is the launcher's copy of the first. Outside the main thread, which alone may handle
    signals, nothing is changed.
    """
    global _asked

    def ask(number: int, _: Any) -> None:
        global _asked
        if _asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not _asked and ranks.rank() == 0:
            with suppress(OSError):  # nobody may read any more
                sys.stderr.write("stopping after this step; interrupt again to stop at once\n")
        _asked = number

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked = 0
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked = 0
