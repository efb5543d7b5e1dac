"""Runs as `longroll diagnose --json` writes them, shaped as in the paper: a base that breaks, repairs."""

from typing import Any

import numpy as np

LEVELS = {
    "in_range": (64, 128),
    "2x": (224, 288),
    "8x": (960, 1088),
    "64x": (7936, 8448),
    "far": (8192, 16384),
}
# label: loss in range, how much of the base's damage is left, growth of the state
KINDS = {
    "base": (1.12, 1.0, 0.34),
    "none": (1.13, 0.93, 0.32),
    "random noise": (1.30, 0.28, 0.1),
    "fitted noise": (1.32, 0.05, 0.03),
    "state passing": (1.35, 0.045, 0.02),
    "tbptt": (1.34, 0.04, 0.0),
}

BREAKS = "Breaks at t ~ 212 and explodes: at 8k-16k it is 2.71 nats above a fresh start."
ADVICE = "Repair it by State Passing. 500 steps of 16 x 128 tokens take about 3 minutes on this device."
HOLDS = (
    "Holds to 16k: reading on never costs more than a fresh start. "
    "Leave it alone: a repair would only cost loss in range."
)


def run(
    label: str = "base", /, *, seed: int = 0, layers: int = 3, heads: int = 4, **changes: Any
) -> dict[str, Any]:
    """Make one run; `changes` replace its fields."""
    level, damage, growth = KINDS.get(label, KINDS["state passing"])
    rng = np.random.default_rng(seed + sum(map(ord, label)))
    cuts = np.unique(np.round(2.0 ** np.arange(0, 14.01, 0.25)).astype(int))
    start, stop = np.concatenate([[0], cuts[:-1]]), cuts
    middle = (start + stop - 1) / 2
    loss = _loss(middle, level, damage) + rng.normal(0, 0.012, len(middle))
    width = 0.02 + 0.05 * (loss - level).clip(0)
    curve = {
        "position": middle,
        "start": start,
        "stop": stop,
        "loss": loss,
        "low": loss - width,
        "high": loss + width,
    }
    levels = {name: float(np.mean(_loss(np.arange(*span), level, damage))) for name, span in LEVELS.items()}
    broken = damage > 0.5
    result = {
        "kind": "diagnosis",
        "label": label,
        "model": f"/models/mamba2-tiny-{label.replace(' ', '-')}",
        "architecture": "mamba2",
        "parameters": 440_000,
        "train_length": 128,
        "sequences": 16,
        "max_position": 16384,
        "bytes_per_token": 1.0,
        "curve": {name: values.tolist() for name, values in curve.items()},
        "levels": levels,
        "edge": 212 if broken else None,
        "severity": levels["far"] - levels["in_range"],
        "verdict": "explodes" if broken else "healthy",
        "sentence": BREAKS if broken else HOLDS,
        "excess": _excess(level, damage, rng),
        "advice": {"intervention": "sp", "sentence": ADVICE} if broken else {"sentence": ""},
        "states": _states(growth, layers, heads),
        "remembrance": _remembrance(broken, rng),
        "coverage": _coverage(damage, layers, heads, rng),
        "tasks": {"passkey": _passkey(damage)},
        "provenance": {
            "command": f"longroll diagnose /models/mamba2-tiny-{label.replace(' ', '-')} --train-length 128 "
            "--max-position 16k --sequences 16 --json base.json",
            "versions": {"longroll": "0.1.0", "torch": "2.9.0", "transformers": "5.22.0"},
            "seed": 0,
            "device": "cpu (AMD EPYC 9554, 2 threads)",
            "threads": 2,
            "date": "2026-03-02T10:20:30Z",
            "seconds": 12.3,
        },
    }
    return {**result, **changes}


def runs(*names: str) -> list[dict[str, Any]]:
    """Make several runs by label."""
    return [run(name) for name in names]


def _loss(t: np.ndarray, level: float, damage: float) -> np.ndarray:
    cold = 1.9 * np.exp(-t / 9)
    past = 3.2 / (1 + (1600 / np.maximum(t, 1)) ** 1.1) - 3.2 / (1 + (1600 / 100) ** 1.1)
    return level + cold + damage * np.maximum(past, 0) + 0.1 * np.exp(-t / 60)


def _excess(level: float, damage: float, rng: np.random.Generator) -> dict[str, Any]:
    t = np.unique(np.round(2.0 ** np.arange(7.17, 14.01, 1 / 6)).astype(int))
    mean = _loss(t, level, damage) - level - 0.08 + rng.normal(0, 0.012, len(t))
    found = {"position": t, "mean": mean, "low": mean - 0.03, "high": mean + 0.03}
    return {name: values.tolist() for name, values in found.items()}


def _states(growth: float, layers: int, heads: int) -> dict[str, Any]:
    t = np.round(2.0 ** np.arange(3, 14.1, 0.5))
    out = []
    for layer in range(layers):
        std = (
            (0.4 + 0.2 * layer % 1.1)
            * (1 - np.exp(-t / 60))
            * (1 + growth * (1 + layer % 3) * np.log2(1 + t / 200))
        )
        each = [(std * (0.8 + 0.1 * h)).tolist() for h in range(heads)]
        out.append({"layer": layer, "kind": "mamba2", "heads": heads, "std": std.tolist(), "std_heads": each,
                    "norm": (8 * std).tolist(), "max": (5 * std).tolist()})  # fmt: skip
    return {"position": t.astype(int).tolist(), "layers": out}


def _remembrance(broken: bool, rng: np.random.Generator) -> dict[str, Any]:
    ends = [512, 2048, 8192]
    starts = [0, 1, 4, 16, 64, 128, 256, 512, 1024, 2048, 3072, 4096, 6144, 7168, 7680, 7936, 8064, 8128]
    rows = []
    for s in starts:
        row: list[float | None] = []
        for e in ends:
            near = 0.45 * np.exp(-(e - s) / 70)
            jump = 0.55 * (1 - np.exp(-s / (0.04 * e))) * min(e / 8192, 1) ** 0.5 if broken else 0.02 * s / e
            row.append(None if s >= e else 0.0 if s == 0 else float(min(jump + near, 0.95)))
        rows.append(row)
    low = [[None if v is None else 0.93 * v for v in row] for row in rows]
    high = [[None if v is None else 1.05 * v for v in row] for row in rows]
    return {"starts": starts, "ends": ends, "distance": "tv", "mean": rows, "low": low, "high": high}


def _coverage(damage: float, layers: int, heads: int, rng: np.random.Generator) -> dict[str, Any]:
    shift = damage * rng.gamma(1.5, 1.2, (layers, heads)) + rng.normal(0, 0.15, (layers, heads))
    causal = [
        {"what": f"layer {i % layers} head {i % heads}", "recovered": v}
        for i, v in enumerate((0.41, 0.22, 0.05))
    ]
    return {
        "layers": list(range(layers)),
        "map": shift.tolist(),
        "significant": (np.abs(shift) > 1).tolist(),
        "causal": causal if damage > 0.5 else [],
    }


def _passkey(damage: float) -> dict[str, Any]:
    lengths, depths = [128, 256, 512, 1024, 2048, 4096, 8192], [0.1, 0.5, 0.9]
    reach = 500 if damage > 0.5 else 2200
    values = [[float(np.round(1 / (1 + (n / reach / (0.6 + d)) ** 4), 2)) for d in depths] for n in lengths]
    return {"lengths": lengths, "depths": depths, "accuracy": values}
