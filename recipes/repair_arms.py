"""Arms of recipes/repair.py: what is varied, and the designs that vary it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longroll.interventions import TBPTT, FittedNoise, Intervention, RandomNoise, StatePassing
from longroll.interventions._base import Batch
from longroll.state import RecurrentState

DEPTHS = 9  # of the ladder: a row is read on 1, 2, 4 ... 256 windows
KINDS = (
    *("none", "random", "fitted", "sp", "tbptt", "sp-depths", "tbptt-depths", "mixed"),
    *("default", "default-sp"),
)


@dataclass(frozen=True)
class Arm:
    """One repair. The kinds beyond the library's interventions:

    - sp-depths: a row's state is of other texts, and starts anew every 1, 2, 4 ... 256 windows, by row:
      states of all depths, evenly in their logarithm, and 22 % zero states.
    - tbptt-depths: the same depths; the row's text goes to another place where the state starts anew.
    - mixed: the first half of the rows is TBPTT, the second half State Passing.
    - default, default-sp: `longroll posttrain` by its default recipe, without and with `--intervention sp`,
      which had a tenth of zero rows when results/repair-default_h200_2026-11-26.json was made, and decays
      at 30 times the rate until results/repair-short_h200_2026-11-27.json;
      its own batch, 16 rows, and no row that holds a span twice; of what is below, the seed counts, `speed`
      and `rate` where they are not those below, and `windows`, of which the documents of the text are made.
    """

    kind: str = "none"
    zero: float = 0.0
    """Zero probability."""
    speed: float = 1.0
    """Learning rate of the decays, as a multiple."""
    rate: float = 3e-4
    """Learning rate."""
    skip: int = 0
    """First tokens of a row without a loss, where the row does not start from zero."""
    train: str = "all"
    """Parameters: all, scales (all but matrices), gates (scales, and the matrices that make GLA's decays),
    norms (and decays, D), decays, lora (16, and decays)."""
    keep: float = 0.0
    """Weight of KL(base || model) on the rows that start from zero."""
    steps: int = 500
    rows: int = 32
    windows: int = 0
    """Of T in a document, which then ends, for TBPTT and the default recipe; 0: whole books."""
    seed: int = 0

    @property
    def name(self) -> str:
        """The kind, and what differs from the defaults above."""
        other = [f for f in fields(self) if f.name != "kind" and getattr(self, f.name) != f.default]
        return " ".join([self.kind, *(f"{f.name}={_short(getattr(self, f.name))}" for f in other)])

    def places(self) -> tuple[np.ndarray, np.ndarray | None]:
        """`stay` and `depth` of `repair_text.Feed`."""
        row = np.arange(self.rows)
        ladder = 2 ** (row % DEPTHS)
        if self.kind == "tbptt":
            return np.full_like(row, self.windows), None
        if self.kind == "tbptt-depths":
            return ladder, None
        if self.kind == "mixed":
            return np.where(row < self.rows // 2, 0, 1), None
        return np.ones_like(row), ladder if self.kind == "sp-depths" else None

    def intervention(self) -> Intervention | None:
        """What chooses the first state."""
        options: dict[str, Any] = {"zero_probability": self.zero, "seed": self.seed}
        if self.kind == "none":
            return None
        if self.kind == "random":
            return RandomNoise(0.1, **options)
        if self.kind == "mixed":
            return Mixed(**options)
        kinds: dict[str, type[Intervention]] = {"fitted": FittedNoise, "sp": StatePassing}
        return kinds.get(self.kind, TBPTT)(**options)


class Mixed(Intervention):
    """TBPTT for the first half of the rows, State Passing for the others."""

    name = "mixed"

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.halves = (TBPTT(**options), StatePassing(**options))

    def initial_state(self, batch: Batch) -> RecurrentState | None:
        """The states of both halves, one below the other."""
        rows = len(batch["input_ids"])  # type: ignore[call-overload]
        parts = (slice(0, rows // 2), slice(rows // 2, rows))
        pieces = [{name: value[part] for name, value in batch.items()} for part in parts]  # type: ignore[union-attr]
        states = [half.initial_state(piece) for half, piece in zip(self.halves, pieces, strict=True)]
        if states[0] is None or states[1] is None:
            return None
        return RecurrentState({key: torch.cat([t, states[1][key]]) for key, t in states[0].items()})

    def observe(self, final_state: RecurrentState) -> None:
        """Hand each half its own."""
        rows = final_state.batch_size
        self.halves[0].observe(final_state.rows(slice(0, rows // 2)))
        self.halves[1].observe(final_state.rows(slice(rows // 2, rows)))


def at_zero(state: RecurrentState | None, rows: int, device: torch.device) -> Tensor:
    """Which rows start from the zero state, (B,) bool."""
    if state is None or not state:
        return torch.ones(rows, dtype=torch.bool, device=device)
    largest = [t.flatten(1).abs().amax(1) for key, t in state.items() if key.part == "recurrent"]
    return torch.stack(largest).amax(0) == 0


RATES = (1e-4, 3e-4, 1e-3)
TREATED = (Arm("sp", zero=0.1), Arm("tbptt", zero=0.1))
FAST = tuple(replace(arm, speed=30.0) for arm in TREATED)


def few() -> Iterator[Arm]:
    """The paper's interventions, and the two best of earlier runs: for the figures."""
    yield Arm("none")
    yield from (Arm(kind) for kind in ("sp", "tbptt", "fitted", "random"))
    yield from FAST


def short() -> Iterator[Arm]:
    """Every kind, an equal search of the learning rate, the best options together."""
    yield from few()
    for arm in (Arm("none"), *FAST):
        yield from (replace(arm, rate=rate) for rate in RATES if rate != arm.rate)
    yield from TREATED
    yield Arm("tbptt", speed=30)
    yield from (Arm(kind, speed=30) for kind in ("tbptt-depths", "sp-depths"))
    yield Arm("mixed", zero=0.1, speed=30)
    yield Arm("tbptt", zero=0.25, speed=30)
    yield Arm("tbptt", zero=0.25, speed=30, keep=1)
    yield Arm("tbptt-depths", speed=30, keep=1)
    yield Arm("none", speed=30)
    for seed in (1, 2):
        yield from (replace(arm, seed=seed) for arm in (Arm("none"), *FAST, Arm("tbptt-depths", speed=30)))


def full() -> Iterator[Arm]:
    """The screen: each factor in turn around State Passing and TBPTT."""
    yield from short()
    for arm in (Arm("sp"), Arm("tbptt"), Arm("fitted"), Arm("random"), *TREATED):  # the learning rate
        yield from (replace(arm, rate=rate) for rate in RATES)
    for zero in (0.0, 0.25, 0.5):  # the share of zero rows, at both speeds
        yield from (replace(arm, zero=zero) for arm in (*FAST, *TREATED))
    for train in ("decays", "norms", "lora"):
        yield from (replace(arm, train=train) for arm in FAST)
        yield from (replace(arm, train=train, rate=1e-3) for arm in FAST)
    yield from (replace(arm, skip=skip) for skip in (8, 32) for arm in FAST)
    yield from (replace(arm, keep=keep) for keep in (0.3, 3) for arm in FAST)
    yield from (replace(arm, speed=speed) for speed in (10, 100) for arm in FAST)
    yield from (replace(arm, steps=steps) for steps in (125, 250, 1000) for arm in (Arm("none"), *FAST))
    yield from (replace(arm, rows=16) for arm in (Arm("none"), *FAST))
    yield from (replace(arm, rate=rate) for rate in RATES for arm in (Arm("tbptt-depths", speed=30),))


def last() -> Iterator[Arm]:
    """The default recipe, what it trains, a ladder of depths and KL, each on what it trains and on all."""
    best = [replace(arm, rate=1e-3, train="scales") for arm in (FAST[1], FAST[0])]
    ladder = Arm("tbptt-depths", speed=30, rate=1e-3, train="scales")
    yield Arm("none", rate=1e-4)
    yield Arm("default")
    yield best[0]
    yield replace(ladder, keep=1)
    yield Arm("none")
    yield best[1]
    yield Arm("tbptt-depths", speed=30, keep=1)
    yield ladder
    yield Arm("none", rate=1e-3)
    yield replace(best[0], keep=1)
    yield replace(FAST[1], rate=1e-3, train="norms")
    yield Arm("default", seed=1)
    yield replace(ladder, keep=1, seed=1)
    yield Arm("default-sp")
    yield replace(FAST[1], rate=1e-4)
    yield replace(FAST[1], rate=1e-3, train="decays")
    yield replace(best[0], seed=1)
    yield Arm("default", seed=2)
    yield replace(ladder, keep=1, seed=2)
    yield Arm("sp-depths", speed=30, rate=1e-3, train="scales")
    yield replace(best[0], rate=3e-3)
    yield replace(best[0], rate=3e-4)
    yield replace(best[0], seed=2)
    yield Arm("none", rate=1e-3, train="scales")
    yield replace(best[1], keep=1)
    yield from (Arm(kind) for kind in ("sp", "tbptt", "fitted", "random"))
    yield replace(best[0], zero=0.25)
    yield replace(best[1], zero=0.25)
    yield from (replace(best[0], steps=steps) for steps in (125, 250, 1000))
    yield from (replace(best[0], speed=speed) for speed in (10, 100))
    yield from (replace(best[1], seed=seed) for seed in (1, 2))
    yield replace(ladder, keep=3)
    yield replace(FAST[1], keep=3)
    yield replace(FAST[0], rate=1e-4)
    yield replace(best[0], zero=0.0)
    yield from (Arm(kind, zero=0.1, speed=30, rate=1e-3, train="scales") for kind in ("mixed", "fitted"))


def brief() -> Iterator[Arm]:
    """The default recipe, its price in plain steps, and the paper's two."""
    yield Arm("none", rate=1e-4)
    yield from (Arm("default"), Arm("none"), Arm("default-sp"), Arm("none", rate=1e-3))
    yield Arm("tbptt-depths", speed=30, rate=1e-3, train="scales", keep=1)
    yield from (Arm("default", seed=1), Arm("sp"), Arm("default", seed=2), Arm("tbptt"))


def rules() -> Iterator[Arm]:
    """What the default recipe's rules rest on: the share of zero rows, and how long a document must be."""
    best = {"rows": 16, "rate": 1e-3, "speed": 30.0, "train": "scales"}
    yield Arm("none", rate=1e-4)
    yield from (Arm("sp", zero=zero, **best) for zero in (0.5, 0.25, 0.1))
    yield from (Arm("tbptt", zero=0.1, windows=windows, **best) for windows in (2, 4, 8))
    yield from (Arm("sp", zero=0.5, seed=1, **best), Arm("tbptt", zero=0.1, windows=2, seed=1, **best))
    yield from (Arm("tbptt", zero=0.1, **best), Arm("tbptt", zero=0.1, windows=16, **best))
    yield from (Arm("sp", zero=0.75, **best), Arm("sp", zero=0.25, seed=1, **best))
    yield from (Arm("tbptt", zero=0.1, windows=4, seed=1, **best), Arm("tbptt", zero=0.0, **best))
    yield from (Arm("tbptt", zero=0.1, windows=8, seed=1, **best), Arm("sp", zero=0.5, seed=2, **best))


def brief_text() -> Iterator[Arm]:
    """The default recipe on documents of 4 T, where it takes State Passing, and what might be better."""
    best = Arm("sp", zero=0.5, rows=16, rate=1e-3, speed=30, train="scales")
    short = Arm("default", windows=4)
    yield from (Arm("none", rate=1e-4), Arm("default"), short, Arm("default", speed=100))
    yield from (replace(short, speed=100), replace(short, seed=1), Arm("default", speed=100, seed=1))
    yield replace(best, steps=1000)
    yield from (replace(short, seed=2), replace(short, speed=100, seed=1), replace(short, rate=3e-3))
    yield Arm("tbptt", zero=0.1, windows=4, rows=16, rate=1e-3, speed=30, train="scales")
    yield from (replace(best, keep=1), Arm("default", rate=3e-3), Arm("default", speed=100, seed=2))
    yield from (replace(best, zero=0.75), replace(best, rows=32))
    yield from (Arm("default", seed=1), replace(short, speed=100, seed=2))
    yield Arm("sp-depths", rows=16, rate=1e-3, speed=30, train="scales")
    yield from (Arm("none"), Arm("none", rate=1e-3))


def gates() -> Iterator[Arm]:
    """What GLA needs beyond the default recipe."""
    best = Arm("tbptt", zero=0.1, rows=16, rate=1e-3, speed=30, train="gates")
    yield from (Arm("none", rate=1e-4), Arm("default"), Arm("none", rate=1e-3), best)
    yield from (Arm("default", speed=100), Arm("default", rate=3e-3), replace(best, speed=100))
    yield from (replace(best, train="scales", steps=1000), Arm("default", windows=4, speed=100))
    yield from (Arm("default", seed=1), Arm("default", speed=100, seed=1), replace(best, seed=1))
    yield from (Arm("none"), replace(best, train="all", rate=3e-4), Arm("default", windows=4))


SCREENS = {"few": few, "short": short, "full": full, "last": last, "brief": brief, "rules": rules,
           "short-documents": brief_text, "gates": gates}  # fmt: skip


def design(name: str) -> list[Arm]:
    """The arms of a screen, each once."""
    return list(dict.fromkeys(SCREENS[name]()))


def arm_of(text: str) -> Arm:
    """The arm of a name, as `Arm.name` gives it: `tbptt zero=0.1 speed=30`."""
    kind, *options = text.split()
    if kind not in KINDS:
        raise SystemExit(f"--arm {text!r}: {kind} is none of {', '.join(KINDS)}.")
    types = {f.name: type(f.default) for f in fields(Arm)}
    try:
        return Arm(kind, **{key: types[key](value) for key, value in (o.split("=") for o in options)})
    except (KeyError, ValueError):
        raise SystemExit(f"--arm {text!r}: options are {', '.join(list(types)[1:])}, as zero=0.1.") from None


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
