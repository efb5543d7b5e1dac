"""Files damaged at random, by a seed: cut short, bytes changed, JSON with other values or less of them."""

import json
import random
from typing import Any

ODD = [None, True, -1, 10**9, 1e400, "", "x" * 5000, "\x00", "{{", [], {}, [[]], {"a": {"b": []}}, 3.5, "1"]
"""Values of the wrong kind or size."""


def damaged(data: bytes, seed: int) -> bytes:
    """A damaged copy of a file's bytes; another one for each seed."""
    rng = random.Random(seed)
    kind = rng.choice(["cut", "bytes", "value", "value", "drop"])
    if kind == "cut":
        return data[: rng.randrange(len(data) + 1)]
    if kind == "bytes":
        changed = bytearray(data)
        for _ in range(rng.choice([1, 3, 30])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    try:
        held = json.loads(data)
    except ValueError:
        lines = data.split(b"\n")
        rng.shuffle(lines)
        return b"\n".join(lines[: rng.randrange(len(lines) + 1)])
    places = list(_places(held))
    for _ in range(rng.choice([1, 1, 4])):
        holder, key = rng.choice(places)
        try:
            if kind == "value":
                holder[key] = rng.choice(ODD)
            else:
                del holder[key]
        except (KeyError, IndexError):
            continue  # gone with an earlier change
    return json.dumps(held).encode()


def _places(held: Any):
    """Every place of a nest of lists and objects: its holder and key."""
    pairs = held.items() if isinstance(held, dict) else enumerate(held) if isinstance(held, list) else ()
    for key, value in list(pairs):
        yield held, key
        if not isinstance(value, list) or len(value) < 50:
            yield from _places(value)
