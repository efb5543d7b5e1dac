"""Longer memory without training: one scale for each layer or head on the decay, found by reading long texts.

A recurrence h_t = exp(A dt_t) h_{t-1} + dt_t B_t x_t forgets at the rate A dt. A model whose states leave
their range past T keeps more than it learned to read. A scale on A (Lu et al. 2025, "Mamba Modulation", arXiv
2509.19633) or on dt (Azizi et al. 2025, "MambaExtend", ICLR) moves the states back. Here the scales are found
by a coordinate search on the loss of long texts, forward passes only: first one for all, then each by itself.

Both are weights of an ordinary checkpoint. A is scaled in `A_log`. A scale s on dt is one on A and on the
input, so that the state is s times as large. Where C is a linear map of the scan's input (Mamba-1), its rows
are scaled by s. Where a norm follows, which a common scale does not get past (Mamba-2), D is divided by s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from longroll.errors import LongrollError
from longroll.measure._position_loss import position_loss
from longroll.model import RecurrentLM

What = Literal["A", "dt"]
Unit = Literal["layer", "head"]
COMMON = (-1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
"""Logarithms (base 2) of the scales that are tried for all units together, beside 0."""
_STEPS = (1.0, 0.5)  # by which a unit's logarithm is then moved, in turn


@dataclass(frozen=True)
class Calibration:
    """The scales that were found, and the loss by octaves of positions before and after."""

    what: What
    unit: Unit
    scales: dict[str, list[float]]
    """By the name of the mixer: one scale, or one a head."""
    octaves: list[tuple[int, int]]
    """Positions [start, stop) that each loss is a mean over."""
    before: list[float]
    """Nats."""
    after: list[float]
    """Nats."""
    passes: int
    """Readings of all texts."""
    tokens: int
    """Tokens read by all of them."""

    @property
    def scaled(self) -> bool:
        """Whether any scale differs from 1."""
        return any(scale != 1 for some in self.scales.values() for scale in some)

    @property
    def sentence(self) -> str:
        """The finding in words."""
        scales = [scale for some in self.scales.values() for scale in some]
        start, stop = self.octaves[-1]
        if not self.scaled:
            return (
                f"{self.passes} readings of {self.tokens // self.passes:,} tokens: no scale of {self.what} "
                f"reads these texts of {stop} tokens better, so the model is as it was."
            )
        return (
            f"{self.passes} readings of {self.tokens // self.passes:,} tokens: scales of {self.what} from "
            f"{min(scales):.3g} to {max(scales):.3g}; at {start}-{stop} {self.before[-1]:.3f} -> "
            f"{self.after[-1]:.3f} nats, in range {self.before[0]:.3f} -> {self.after[0]:.3f}."
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain data for results."""
        return {**vars(self), "octaves": [list(octave) for octave in self.octaves], "sentence": self.sentence}


@torch.no_grad()
def calibrate(
    lm: RecurrentLM,
    tokens: Tensor,
    *,
    train_length: int | None = None,
    what: What = "A",
    unit: Unit = "layer",
    sweeps: int = 1,
    chunk_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Calibration:
    """Scale the decays of `lm` in place so that long texts read best.

    The objective is the mean over [0, T), [T, 2 T), [2 T, 4 T), ... of the loss there, so that the range of
    training counts as much as each octave past it.

    Args:
        lm: the model; changed in place.
        tokens: (B, L + 1), texts of the training side, L above T.
        train_length: T; default: what the model's config says.
        what: scale A, or the step dt.
        unit: one scale for each layer, or one for each head.
        sweeps: times that every unit is moved by a factor of 2 and of the root of 2.
        chunk_size: tokens of a row in one forward.
        progress: called with how many readings are done.

    Raises:
        LongrollError: for a model without decay rates `A_log`, for `unit` head where they are of channels
            (Mamba-1), for `what` dt where no weight can express it, for texts no longer than T, and for a
            loss that is not finite whatever the scales.
    """
    train_length, _ = lm.find_train_length(train_length)
    length = tokens.shape[1] - 1
    if length <= train_length:
        raise LongrollError(
            f"{length} positions do not go past `train_length` {train_length}: raise `tokens.shape[1]`."
        )
    decays = _decays(lm, what, unit)
    edges = [0, train_length]
    while edges[-1] < length:
        edges.append(min(2 * edges[-1], length))
    search = _Search(lm, tokens, decays, list(pairwise(edges)), chunk_size, progress)
    units = [(i, j) for i, decay in enumerate(decays) for j in range(decay.exponents.numel())]
    before = search.losses
    for exponent in COMMON:
        search.try_(dict.fromkeys(units, exponent), absolute=True)
    for _ in range(sweeps):
        moved = [search.try_({one: step}) or search.try_({one: -step}) for step in _STEPS for one in units]
        if not any(moved):
            break  # further sweeps would try the same scales
    if not math.isfinite(search.best):
        raise LongrollError(f"{lm.name}: the loss of these texts is not finite at any scale of {what}.")
    scales = {decay.name: [2.0**exponent for exponent in decay.exponents.tolist()] for decay in decays}
    return Calibration(
        what,
        unit,
        scales,
        search.octaves,
        before,
        search.losses,
        search.passes,
        search.passes * tokens[:, 1:].numel(),
    )


def readings_of(lm: RecurrentLM, what: What, unit: Unit, sweeps: int) -> int:
    """Return the most readings of all texts that `calibrate` takes; raises what it raises for the model."""
    units = sum(decay.exponents.numel() for decay in _decays(lm, what, unit))
    return 1 + len(COMMON) + 2 * len(_STEPS) * sweeps * units


class _Search:
    """Keeps the best exponents: the model always has them between two tries."""

    def __init__(
        self,
        lm: RecurrentLM,
        tokens: Tensor,
        decays: Sequence[_Decay],
        octaves: list[tuple[int, int]],
        chunk_size: int | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.lm, self.tokens, self.decays, self.octaves = lm, tokens, decays, octaves
        self.chunk_size, self.progress, self.passes = chunk_size, progress, 0
        self.losses = self._read()
        self.best = _mean(self.losses)

    def try_(self, moves: dict[tuple[int, int], float], *, absolute: bool = False) -> bool:
        """Move exponents (or set them), and keep them there if the loss falls."""
        before = [decay.exponents.clone() for decay in self.decays]
        for (i, j), move in moves.items():
            self.decays[i].exponents[j] = move if absolute else before[i][j] + move
        self._write()
        losses = self._read()
        if _mean(losses) < self.best:
            self.losses, self.best = losses, _mean(losses)
            return True
        for decay, exponents in zip(self.decays, before, strict=True):
            decay.exponents.copy_(exponents)
        self._write()
        return False

    def _write(self) -> None:
        for decay in self.decays:
            decay.write()

    def _read(self) -> list[float]:
        found = position_loss(self.lm, self.tokens, chunk_size=self.chunk_size)
        self.passes += 1
        if self.progress is not None:
            self.progress(self.passes)
        return [found.between(start, stop) for start, stop in self.octaves]


class _Decay:
    """The decay rates of one mixer: its weights as they were, and the exponents to scale them by."""

    def __init__(self, name: str, mixer: Any, what: What, units: int) -> None:
        self.name, self.rates = name, mixer.A_log
        self.exponents = torch.zeros(units, dtype=torch.float64)
        self._rates = mixer.A_log.data.clone()
        self._scaled = [
            (w, w.clone(), power) for w, power in (_scaled_weights(mixer) if what == "dt" else [])
        ]

    def write(self) -> None:
        """Set the weights to what the exponents say."""
        exponents = self.exponents.to(self._rates.device)
        moved = exponents.view(self._rates.shape) if exponents.numel() == self._rates.numel() else exponents
        self.rates.data.copy_(self._rates.double() + math.log(2) * moved)
        for weight, value, power in self._scaled:
            weight.copy_(value.double() * 2.0 ** (power * exponents))


def _decays(lm: RecurrentLM, what: What, unit: Unit) -> list[_Decay]:
    name = lm.model.config.model_type
    if lm.int8:
        raise LongrollError(f"`dtype` int8: {lm.name} is calibrated in plain weights: leave it out.")
    mixers = [
        (n, m) for n, m in lm.model.named_modules() if isinstance(getattr(m, "A_log", None), nn.Parameter)
    ]
    if not mixers:
        raise LongrollError(f"{name} has no decay rates (`A_log`) that weights could scale.")
    if unit == "head" and (what == "dt" or any(_channels(mixer) for _, mixer in mixers)):
        why = (
            "a norm over all heads follows"
            if what == "dt"
            else "its decay rates are of channels, not of heads"
        )
        raise LongrollError(f"`unit` head: {name} takes one scale of {what} a layer, since {why}.")
    return [
        _Decay(found, mixer, what, mixer.A_log.numel() if unit == "head" else 1) for found, mixer in mixers
    ]


def _channels(mixer: Any) -> bool:
    """Return whether decay rates are (channels, N), as Mamba-1's, or (scans, channels, N), as Zamba's."""
    shape: torch.Size = mixer.A_log.shape
    return sum(size > 1 for size in shape) > 1


def _scaled_weights(mixer: Any) -> list[tuple[Tensor, float]]:
    """Return the weights that take a power of a scale of dt, beside `A_log`.

    Raises:
        LongrollError: where no weight expresses it.
    """
    projection, norm, norm_of_c = (getattr(mixer, name, None) for name in ("x_proj", "norm", "c_layernorm"))
    of_c = getattr(norm_of_c, "weight", None)
    if isinstance(of_c, nn.Parameter):  # Jamba
        return [(of_c.data, 1.0)]
    if _channels(mixer) and isinstance(projection, nn.Linear) and norm_of_c is None:
        return [(projection.weight.data[-mixer.A_log.shape[-1] :], 1.0)]  # the rows that give C
    if isinstance(getattr(mixer, "D", None), nn.Parameter) and getattr(norm, "weight", None) is not None:
        return [(mixer.D.data, -1.0)]
    raise LongrollError(
        f"`what` dt: no weight of {type(mixer).__name__} expresses a scale of its steps: scale A."
    )


def _mean(losses: list[float]) -> float:
    mean = sum(losses) / len(losses)
    return mean if math.isfinite(mean) else math.inf
