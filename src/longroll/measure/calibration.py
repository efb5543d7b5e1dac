"""Longer memory without training: one scale for each layer or head on the decay, found by reading long texts.

A recurrence h_t = exp(A dt_t) h_{t-1} + dt_t B_t x_t forgets at the rate A dt. A model whose states leave
their range past T keeps more than it learned to read. A scale on A (Lu et al. 2025, "Mamba Modulation", arXiv
2509.19633) or on dt (Azizi et al. 2025, "MambaExtend", ICLR) moves the states back. Here the scales are found
by a coordinate search on the loss of long texts, forward passes only: first one for all, then each by itself.
They are kept where other texts read better by them, by more than these texts scatter.

Both are weights of an ordinary checkpoint. A is scaled in `A_log`. A scale s on dt is one on A and on the
input, so that the state is s times as large. Where C is a linear map of the scan's input (Mamba-1), its rows
are scaled by s. Where a norm follows, which a common scale does not get past (Mamba-2), D is divided by s.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from longroll.errors import LongrollError
from longroll.measure._position_loss import position_loss
from longroll.measure.bootstrap import bootstrap_mean
from longroll.model import RecurrentLM

What = Literal["A", "dt"]
Unit = Literal["layer", "head"]
COMMON = (-1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
"""Logarithms (base 2) of the scales that are tried for all units together, beside 0."""
WORTH = 0.01
"""Nats: scales that gain less are not kept."""
_STEPS = (1.0, 0.5)  # by which a unit's logarithm is then moved, in turn


@dataclass(frozen=True)
class Gain:
    """Nats by which texts read better with the scales, a mean over the octaves of positions.

    Texts whose loss was not finite and is now are counted instead.
    """

    mean: float
    low: float
    """Lower end of its 95 % interval over texts."""
    high: float
    """Upper end."""
    texts: int
    held_out: bool
    """Whether the scales were chosen by other texts."""
    made_finite: int = 0
    """Texts whose loss is finite by the scales alone, less those where the scales undo it."""

    @property
    def counts(self) -> bool:
        """Whether it is worth a scale, beyond its interval."""
        if self.made_finite:
            return self.made_finite > 0
        return self.low > 0 and self.mean >= WORTH

    def __str__(self) -> str:
        texts = f"{self.texts} {'held-out' if self.held_out else 'of these'} texts"
        if self.made_finite:
            return f"make the loss of {self.made_finite} of {texts} finite"
        return f"gain {self.mean:.3f} nats ({self.low:.3f} to {self.high:.3f}) on {texts}"


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
    gain: Gain | None = None
    """Gain of the scales; None where all are 1."""

    @property
    def scaled(self) -> bool:
        """Whether the model was scaled: a scale differs from 1, and the gain is worth it."""
        found = any(scale != 1 for some in self.scales.values() for scale in some)
        return found and (self.gain is None or self.gain.counts)

    @property
    def sentence(self) -> str:
        """The finding in words."""
        scales = [scale for some in self.scales.values() for scale in some]
        start, stop = self.octaves[-1]
        read = f"{self.passes} readings of {self.tokens // self.passes:,} tokens"
        found = f"scales of {self.what} from {min(scales):.3g} to {max(scales):.3g}"
        if not self.scaled and self.gain is not None:
            return f"{read}: {found} {self.gain}, which is not worth it: the model is as it was."
        if not self.scaled:
            return (
                f"{read}: no scale of {self.what} reads these texts of {stop} tokens better, so the model is "
                "as it was."
            )
        gained = "" if self.gain is None else f" They {self.gain}."
        return (
            f"{read}: {found}; at {start}-{stop} {self.before[-1]:.3f} -> {self.after[-1]:.3f} nats, in "
            f"range {self.before[0]:.3f} -> {self.after[0]:.3f}.{gained}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain data for results."""
        return {
            **vars(self),
            "octaves": [list(octave) for octave in self.octaves],
            "gain": self.gain and vars(self.gain),
            "scaled": self.scaled,
            "sentence": self.sentence,
        }


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
    held_out: Tensor | None = None,
    seed: int = 0,
) -> Calibration:
    """Scale the decays of `lm` in place so that long texts read best.

    The objective is the mean over [0, T), [T, 2 T), [2 T, 4 T), ... of the loss there, so that the range of
    training counts as much as each octave past it. The model is left as it was where the scales gain less
    than `WORTH` nats of it, or no more than texts scatter.

    Args:
        lm: the model; changed in place.
        tokens: (B, L + 1), texts of the training side, L above T.
        train_length: T; default: what the model's config says.
        what: scale A, or the step dt.
        unit: one scale for each layer, or one for each head.
        sweeps: times that every unit is moved by a factor of 2 and of the root of 2.
        chunk_size: tokens of a row in one forward.
        progress: called with how many readings are done.
        held_out: (B', L' + 1), L' above T: texts by which the gain is measured, so that scales fitted to
            `tokens` do not count; default: `tokens` themselves.
        seed: random seed of the bootstrap.

    Raises:
        LongrollError: for a model without decay rates `A_log`, for `unit` head where they are of channels
            (Mamba-1), for `what` dt where no weight can express it, for texts no longer than T, and for a
            loss that is not finite whatever the scales.
    """
    train_length, _ = lm.find_train_length(train_length)
    for name, some in {"tokens": tokens, "held_out": held_out}.items():
        if some is not None and some.shape[1] - 1 <= train_length:
            raise LongrollError(
                f"{some.shape[1] - 1} positions do not go past `train_length` {train_length}: raise "
                f"`{name}.shape[1]`."
            )
    decays = _decays(lm, what, unit)
    search = _Search(lm, tokens, decays, train_length, chunk_size, progress)
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
    after, passes, gain = search.losses, search.passes, None
    if any(decay.exponents.any() for decay in decays):
        if held_out is None:
            gain = _gain(before, after, held_out=False, seed=seed)
        else:
            other = _Search(lm, held_out, decays, train_length, chunk_size, None)
            with _unscaled(decays):
                gain = _gain(other.read(), other.losses, held_out=True, seed=seed)
        if not gain.counts:
            for decay in decays:
                decay.exponents.zero_()
                decay.write()
    return Calibration(
        what, unit, scales, search.octaves, before.mean(dim=0).tolist(), after.mean(dim=0).tolist(),
        passes, passes * tokens[:, 1:].numel(), gain,
    )  # fmt: skip


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
        train_length: int,
        chunk_size: int | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.lm, self.tokens, self.decays = lm, tokens, decays
        self.chunk_size, self.progress, self.passes = chunk_size, progress, 0
        edges, length = [0, train_length], tokens.shape[1] - 1
        while edges[-1] < length:
            edges.append(min(2 * edges[-1], length))
        self.octaves = list(pairwise(edges))
        self.losses = self.read()  # (B, octaves)
        self.best = _mean(self.losses)

    def try_(self, moves: dict[tuple[int, int], float], *, absolute: bool = False) -> bool:
        """Move exponents (or set them), and keep them there if the loss falls."""
        before = [decay.exponents.clone() for decay in self.decays]
        for (i, j), move in moves.items():
            self.decays[i].exponents[j] = move if absolute else before[i][j] + move
        self._write()
        losses = self.read()
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

    def read(self) -> Tensor:
        """Return the loss of each text by octaves, (B, octaves) float64."""
        found = position_loss(self.lm, self.tokens, chunk_size=self.chunk_size).losses.double()
        self.passes += 1
        if self.progress is not None:
            self.progress(self.passes)
        return torch.stack([found[:, start:stop].mean(dim=1) for start, stop in self.octaves], dim=1)


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


@contextlib.contextmanager
def _unscaled(decays: Sequence[_Decay]) -> Iterator[None]:
    """Give a model its weights back for the length of a with block."""
    kept = [decay.exponents.clone() for decay in decays]
    try:
        for decay in decays:
            decay.exponents.zero_()
            decay.write()
        yield
    finally:
        for decay, exponents in zip(decays, kept, strict=True):
            decay.exponents.copy_(exponents)
            decay.write()


def _gain(before: Tensor, after: Tensor, *, held_out: bool, seed: int) -> Gain:
    """Return the gain from losses by octaves, (B, octaves) each."""
    finite = [losses.isfinite().all(dim=1) for losses in (before, after)]
    made = int(finite[1].sum() - finite[0].sum())
    both = finite[0] & finite[1]
    found = (before - after).mean(dim=1, keepdim=True)[both]
    mean, low, high = (
        (end.item() for end in bootstrap_mean(found, seed=seed)) if len(found) else (math.nan,) * 3
    )
    return Gain(mean, low, high, len(before), held_out, made)


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


def _mean(losses: Tensor) -> float:
    mean = losses.mean().item()
    return mean if math.isfinite(mean) else math.inf
