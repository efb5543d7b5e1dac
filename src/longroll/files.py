"""Write a file whole or not at all."""

import errno
import os
import re
import shutil
import socket
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from longroll.errors import LongrollError


def write_whole(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write to a temporary name in the same folder, then rename: a reader never sees half a file.

    A symbolic link stays a link, and the file that it points to is replaced. A stream (`is_stream`) is
    written into, never replaced.

    Raises:
        LongrollError: where `path` cannot be written.
    """
    target = Path(path)
    try:
        if is_stream(target):
            number = descriptor(target)
            with open(target if number is None else os.dup(number), "wb") as stream:
                stream.write(data)
        else:
            _replace(Path(os.path.realpath(target)), data)
    except OSError as error:
        raise _unwritable(target, error) from error
    return target


def _replace(place: Path, data: bytes) -> None:
    """Write beside `place` and rename; an earlier file's permissions stay."""
    place.parent.mkdir(parents=True, exist_ok=True)
    mask = os.umask(0)
    os.umask(mask)
    mode = place.stat().st_mode & 0o777 if place.exists() else 0o666 & ~mask  # mkstemp makes the file private
    handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, place)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


class Lock:
    """Keeps a folder for one process at a time, until this object or the process ends, however it ends.

    File systems and platforms without locks of records (POSIX) keep nothing. Processes that this one starts
    do not inherit the lock.

    Args:
        folder: must be there when the lock is taken.
    """

    FILE = ".lock"
    """Name of the file that is locked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: TextIO | None = None

    @property
    def held(self) -> bool:
        """Whether this object has the lock."""
        return self._held is not None

    def take(self) -> None:
        """Take the lock, if this object has not.

        Raises:
            LongrollError: where another process has it.
        """
        if self._held is not None:
            return
        try:
            import fcntl

            file = open(self.folder / self.FILE, "a+", encoding="utf-8")  # noqa: SIM115  (held open)
        except (ImportError, OSError):  # Windows; a folder that cannot be written, which is said elsewhere
            return
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                file.close()
                return
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise LongrollError(
                f"{self.folder} is in use by {owner}: wait until it ends, or name another folder."
            ) from None
        self._held = file
        with suppress(OSError):  # a full disk
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()

    def release(self) -> None:
        """Give the lock back, if this object has it."""
        if self._held is not None:
            self._held.close()
            self._held = None


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Return whether bytes go into `path` one after the other: a device, a pipe, a socket, an open
    descriptor.
    """
    special = os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))
    return special or descriptor(path) is not None


def descriptor(path: str | os.PathLike[str]) -> int | None:
    """Return the open file of this process that `path` leads to: 1 for /dev/stdout, 3 for /dev/fd/3; or
    None.
    """
    name = os.path.abspath(path)
    for _ in range(40):  # as many links as Linux follows
        if found := re.fullmatch(rf"/(?:dev|proc/(?:self|{os.getpid()}))/fd/(\d+)", name):
            return int(found[1])
        if not os.path.islink(name):
            return None
        name = os.path.abspath(os.path.join(os.path.dirname(name), os.readlink(name)))
    return None


def _unwritable(path: Path, error: OSError) -> LongrollError:
    reason = error.strerror or type(error).__name__
    return LongrollError(f"Cannot write {path}: {reason}. Name another place.")


def delete(path: Path) -> None:
    """Remove a file, a folder with all it holds, or a link and not what it points to; what is busy stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def check_writable(path: Path, *, folder: bool = False) -> Path:
    """Find out before the work that its result cannot be written.

    Raises:
        LongrollError: where `path` (a file, or a folder) cannot be made.
    """
    if path.is_dir() and not folder:
        raise LongrollError(f"Cannot write {path}: it is a folder. Name a file.")
    if folder and path.exists() and not path.is_dir():
        raise LongrollError(f"Cannot write into {path}: it is a file. Name a folder.")
    try:
        if folder or not is_stream(path):
            try_folder(path if folder else Path(os.path.realpath(path)).parent)
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def try_folder(folder: Path) -> None:
    """Raise OSError where a folder, or a file in it, cannot be made; neither is made."""
    tempfile.TemporaryFile(dir=existing(folder)).close()


def existing(path: Path) -> Path:
    """Return `path`, or the lowest folder above it that exists; raises OSError for a path that cannot be."""
    place = Path(os.path.realpath(path))  # the target of a link, which may not exist yet
    while True:
        try:
            place.stat()
            return place
        except FileNotFoundError:
            place = place.parent


def remove_empty(folder: Path, stays: Path) -> None:
    """Remove a folder and those above it that are empty, below `stays`, which `existing` returned."""
    place = Path(os.path.realpath(folder))
    while place != stays and stays in place.parents:
        try:
            place.rmdir()
        except FileNotFoundError:
            pass
        except OSError:  # it holds something
            return
        place = place.parent
