"""A launcher (torchrun, accelerate launch) that is killed: its processes end as it would have ended them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

_NAMES = ("torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate")
_EVERY = 0.5  # seconds between two looks
_GRACE = 30.0  # seconds from SIGTERM to SIGKILL, as torchrun's

_watching = False


def end_with_launcher() -> None:
    """End this process when the launcher that started it has ended without ending it, as by SIGKILL.

    SIGTERM comes first, so that training saves a checkpoint; SIGKILL follows after 30 seconds. A process that
    no launcher started is left alone.
    """
    global _watching
    if _watching or (found := _launcher()) is None:
        return
    _watching = True
    threading.Thread(target=_watch, args=(found,), name="launcher", daemon=True).start()


def _launcher() -> psutil.Process | None:
    """Return the process that launched this one, as the environment says that one did."""
    elastic = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun's, and accelerate's for several processes
    if not elastic and not any(name.startswith("ACCELERATE_") for name in os.environ):
        return None
    with contextlib.suppress(psutil.Error):
        above: list[psutil.Process] = psutil.Process().parents()
        for process in above:
            with contextlib.suppress(psutil.Error):
                if any(Path(word).name.removesuffix(".exe") in _NAMES for word in process.cmdline()):
                    return process
        return above[0] if elastic and above else None
    return None


def _watch(launcher: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        while launcher.is_running() and launcher.status() != psutil.STATUS_ZOMBIE:
            time.sleep(_EVERY)
    with contextlib.suppress(OSError):
        sys.stderr.write(f"Process {os.getpid()} ends: process {launcher.pid}, which launched it, is gone.\n")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os.kill(os.getpid(), signal.SIGKILL)
