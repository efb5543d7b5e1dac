"""What a measurement has done so far, on the disk: one that was killed goes on from there.

A long measurement is done in pieces: each stage is one, and a long reading is kept every minute, with its
state. A piece is a file, written whole (`longroll.files`) and read only if its checksum holds.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from longroll import ranks
from longroll.errors import LongrollError
from longroll.files import delete, write_whole
from longroll.model import RecurrentLM
from longroll.results import (
    check_settings,
    fingerprint,
    fingerprint_of_arrays,
    package_versions,
    read_json,
    same_form,
    warn_of_changes,
    write_json,
)
from longroll.state import RecurrentState

T = TypeVar("T")

_SETTINGS = "pieces.json"
_PIECE = ".piece"
_EVERY = 60.0  # seconds between two pieces of one reading
_PRICE = 20  # times as long as it takes to write a piece, the reading goes on before the next

logger = logging.getLogger("longroll")


class Holds(Protocol):
    """What notes things as a reading goes on, and can go on with what it noted before."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain data."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""


class Kept:
    """The pieces of one measurement, in a folder; without a folder nothing is kept.

    Args:
        folder: made when something is kept, and removed by `remove`, once the result is saved.
        every: seconds from a piece of a reading to the next, or more where pieces are slow to write; 0: keep
            every chunk.
    """

    def __init__(self, folder: Path | None = None, *, every: float = _EVERY) -> None:
        self.folder, self.every = folder, every
        self._of = ""  # which settings pieces must be of
        self._settings: dict[str, Any] = {}
        self._device, self._spread = torch.device("cpu"), False
        self._began = self._last = time.monotonic()
        self._price = 0.0
        self.held: list[Holds] = []
        """What a piece of a reading holds besides its losses."""
        self.spent = 0.0
        """Seconds that a reading took before it was killed."""

    def begin(self, lm: RecurrentLM, tokens: Tensor, **settings: Any) -> None:
        """Say what is measured; every rank that works on it must call this.

        Args:
            lm: the model.
            tokens: the texts.
            **settings: what else has to be the same for pieces to be used.

        Raises:
            LongrollError: on every rank, where the folder holds pieces of something else.
        """
        if self.folder is None:
            return
        about = {"sequences": len(tokens), "length": tokens.shape[1] - 1, **settings}
        about |= {"text": fingerprint_of_arrays([tokens.cpu()]), "weights": fingerprint(lm)}
        self._of = _digest(about)
        self._device, self._spread = lm.device, len({p.device for p in lm.parameters()}) > 1
        now = {"settings": about, "of": self._of, "versions": package_versions(), "device": lm.device.type}
        size = ranks.world_size()
        ranks.on_first(lambda: self._check(now, size))
        self._settings = now
        self._last = time.monotonic()

    def _check(self, now: Mapping[str, Any], size: int) -> None:
        """Clear away what cannot be used, and say so; `size` is the number of ranks."""
        assert self.folder is not None
        file = self.folder / _SETTINGS
        self._clear(whole=False)
        if file.is_file() and any(self.folder.glob(f"*{_PIECE}")):
            try:
                before = read_json(file)
                if not same_form(before, now) or _digest(before["settings"]) != before["of"]:
                    raise ValueError
            except (LongrollError, ValueError):
                logger.warning("%s is damaged: what was measured before is measured again.", file)
            else:
                check_settings(self.folder, before["settings"], now["settings"])
                warn_of_changes(before, now)
                begun = {path.stem.split("-")[-1] for path in self.folder.glob(f"reading-*{_PIECE}")}
                for other in begun - {str(size)}:
                    logger.warning("A reading of %s processes is kept, and starts again on %d.", other, size)
                return
        self._clear(whole=True)  # pieces of which nothing is known
        delete(file)

    def read(self, name: str, kinds: Sequence[type] = ()) -> Any:
        """Return a piece; None where there is none, or, with a warning, where it is damaged.

        Args:
            name: the name of the piece.
            kinds: classes of what it holds, but tensors and plain data.
        """
        if self.folder is None or not os.path.lexists(file := self._file(name)):
            return None
        try:
            if not file.is_file():  # a pipe would wait
                raise ValueError
            digest, _, packed = file.read_bytes().partition(b"\n")
            if hashlib.sha256(packed).hexdigest().encode() != digest:
                raise ValueError
            with torch.serialization.safe_globals(list(kinds)):
                piece = torch.load(io.BytesIO(packed), map_location=self._place, weights_only=True)
            if piece["of"] == self._of:
                return piece["data"]
        except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, UnpicklingError):
            pass
        logger.warning("%s is damaged or of another measurement: its piece is measured again.", file)
        delete(file)
        return None

    def write(self, name: str, data: Any) -> None:
        """Keep a piece: tensors, plain data, and what `read` is told of."""
        if self.folder is None:
            return
        began, packed = time.monotonic(), io.BytesIO()
        torch.save({"of": self._of, "data": data}, packed)
        held = packed.getbuffer()
        if not (self.folder / _SETTINGS).is_file():  # a measurement that is refused leaves nothing
            write_json(self.folder / _SETTINGS, self._settings)
        write_whole(self._file(name), hashlib.sha256(held).hexdigest().encode() + b"\n" + held)
        self._last = time.monotonic()
        self._price = self._last - began

    def once(self, name: str, measure: Callable[[], T], kinds: Sequence[type] = ()) -> T:
        """Return what `measure` returns, or returned before; every rank that works on it must call this."""
        found: T | None = ranks.on_first(lambda: self.read(name, kinds))
        if found is None:
            found = measure()
            if ranks.rank() == 0:
                self.write(name, found)
        return found

    def go_on(self, losses: Tensor) -> tuple[int, RecurrentState | None]:
        """Go on with the reading of this rank: fill in the losses (B, L) that are kept.

        Returns:
            The position that it goes on from, and the state there; 0 and None where nothing is kept.
        """
        self._began, self.spent = time.monotonic(), 0.0
        begun = self.read(self._reading())
        if begun is None:
            return 0, None
        self.spent = begun["seconds"]
        losses[:, : begun["position"]] = begun["losses"]
        for one, noted in zip(self.held, begun["held"], strict=True):
            one.load_state_dict(noted)
        places = begun["places"] if self._spread else {}
        tensors = {name: t.to(places.get(name, self._device)) for name, t in begun["state"].items()}
        return begun["position"], RecurrentState.from_named(tensors, seen=begun["seen"])

    def note(self, position: int, state: RecurrentState, losses: Tensor) -> None:
        """Keep the reading of this rank at a position, if it is time to, or its end."""
        pause = max(self.every, _PRICE * self._price) if self.every else 0.0
        ended = position == losses.shape[1]
        if self.folder is None or not (ended or time.monotonic() - self._last >= pause):
            return
        tensors, places = {}, {}
        for key, tensor in () if ended else state.items():  # one after another: keys and values are large
            tensors[str(key)], places[str(key)] = tensor.cpu(), str(tensor.device)
        piece = {
            "position": position,
            "state": tensors,
            "places": places,
            "seen": state.seen,
            "losses": losses[:, :position].cpu(),
            "held": [one.state_dict() for one in self.held],
            "seconds": self.spent + time.monotonic() - self._began,
        }
        self.write(self._reading(), piece)

    def remove(self) -> None:
        """Remove all pieces: the result is saved."""
        if self.folder is not None:
            (self.folder / _SETTINGS).unlink(missing_ok=True)  # first: pieces without it are no one's
            self._clear(whole=True)
            with suppress(OSError):  # it holds something else
                self.folder.rmdir()

    def _clear(self, *, whole: bool) -> None:
        """Remove what a killed process left half written; `whole`: pieces, too."""
        assert self.folder is not None
        for pattern in (f".*{_PIECE}.*", f".{_SETTINGS}.*", *((f"*{_PIECE}",) if whole else ())):
            for path in self.folder.glob(pattern):
                delete(path)

    def _reading(self) -> str:
        return f"reading-{ranks.rank()}-of-{ranks.world_size()}"

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}{_PIECE}"

    def _place(self, storage: Any, location: str) -> Any:
        """Bring what was on a GPU to that of the model, or to its own if the model is on several."""
        if location == "cpu" or self._device.type == "cpu":
            return storage
        return None if self._spread else storage.to(device=self._device)


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
