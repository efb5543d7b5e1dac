"""Tables of the results of recipes/repair.py, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longroll.measure.bootstrap import bootstrap_mean
from longroll.report import write_figures

Result = dict[str, Any]


class Model:
    """Results of one model: the base, the control, and what an arm costs and gains against them.

    The control is plain steps at the learning rate that reads the books kept aside best in range.
    """

    def __init__(self, found: dict[str, Result]) -> None:
        self.found = found
        self.base = found["base"]
        self.T = self.base["plan"]["length"]
        plain = [r for r in found.values() if r.get("arm", {}).get("kind") == "none" and _standard(r["arm"])]
        self.control = min(plain, key=lambda r: r["development"]["in_range"], default=self.base)

    def price(self, result: Result) -> tuple[float, float, float]:
        """Loss in range above the control's, in percent of it, and its 95 % interval over books."""
        ours, theirs = (torch.tensor(r["in_range"], dtype=torch.float64) for r in (result, self.control))
        return _interval(100 * (ours - theirs) / theirs.mean())

    def gap(self, result: Result) -> tuple[float, float, float]:
        """Loss over the octave to 64 T above the lowest octave of base or control in [T, 4 T), over texts."""
        octaves = [tuple(pair) for pair in result["octaves"]]
        far = octaves.index((result["at"] * self.T // 2, result["at"] * self.T))
        near = [
            torch.tensor(r["by_octave"][i], dtype=torch.float64)
            for r in (self.base, self.control)
            for i in (1, 2)
        ]
        lowest = min(near, key=lambda losses: losses.mean().item())
        return _interval(torch.tensor(result["by_octave"][far], dtype=torch.float64) - lowest)

    def difficulty(self) -> float:
        """What the text of the octave to 64 T adds to every gap, in nats.

        The lower of base and control on it, read from a fresh start T to 4 T earlier, above the lowest octave
        of `gap`.
        """
        fresh = min(_mean(r["read_fresh"]) for r in (self.base, self.control))
        return fresh - min(_mean(r["by_octave"][i]) for r in (self.base, self.control) for i in (1, 2))

    def excess(self, result: Result) -> tuple[float, float, float]:
        """The same tokens before 64 T: read on by the arm, above a fresh start of base or control."""
        fresh = [torch.tensor(r["read_fresh"], dtype=torch.float64) for r in (self.base, self.control)]
        lowest = min(fresh, key=lambda losses: losses.mean().item())
        return _interval(torch.tensor(result["read_on"], dtype=torch.float64) - lowest)

    def score(self, result: Result) -> float:
        """What arms are chosen by: in range and beyond, on the books kept aside, summed."""
        return result["development"]["in_range"] + result["development"]["beyond"]

    def arms(self) -> list[Result]:
        """The arms, the best score first."""
        return sorted((r for label, r in self.found.items() if label != "base"), key=self.score)


DRAWN = {
    "base": "base",
    "none": "none: plain steps",
    "random": "Random Noise",
    "fitted": "Fitted Noise",
    "sp": "State Passing",
    "tbptt": "TBPTT",
    "default": "default recipe",
    "default-sp": "State Passing, zero .1",
    "tbptt zero=0.1 speed=30 rate=0.001 train=norms": "TBPTT, norms and decays",
}
"""Arms that the figures show, with their labels."""


def draw(found: Result, folder: Path) -> list[Path]:
    """Draw loss, remembrance and state std of each model by position, laid out as in the paper."""
    made = []
    for name, results in found["models"].items():
        if "base" not in results:
            continue
        runs = [_run(results[arm], label, results["base"]) for arm, label in DRAWN.items() if arm in results]
        for path in write_figures(runs, folder / name, "svg", y="nats"):
            made.append(path)
    return made


def _run(result: Result, label: str, base: Result) -> Result:
    """A result as the report reads it."""
    stops, depth = result["curve"]["stop"], result.get("depth", {})
    starts = [0, *stops[:-1]]
    curve = {"start": starts, "stop": stops, "loss": result["curve"]["loss"]}
    curve["position"] = [((a + 1) * b) ** 0.5 for a, b in zip(starts, stops, strict=True)]
    run = {"label": label, "verdict": "", "train_length": base["plan"]["length"], "curve": curve}
    return run | {
        key: depth[of] for key, of in (("states", "state"), ("remembrance", "remembrance")) if of in depth
    }


def summary(found: Result) -> Result:
    """The figures of the tables: price (%), gap and loss above a fresh start (nats), with 95 % intervals."""
    models: Result = {}
    over_seeds: Result = {}
    for name, results in found["models"].items():
        if "base" not in results:
            continue
        model = Model(results)
        over_seeds[name] = compared(model)
        models[name] = {
            arm: {
                "in_range": _mean(result["in_range"]),
                "price_percent": model.price(result),
                "gap": model.gap(result),
                "above_fresh_start": model.excess(result),
                "read_on": _mean(result["read_on"]),
                "read_fresh": _mean(result["read_fresh"]),
                "octaves": [
                    [b // model.T, _mean(v)]
                    for (_, b), v in zip(result["octaves"], result["by_octave"], strict=True)
                ],
                "recall_gain": {d: _mean(cell["gain"]) for d, cell in result["memory"]["recall"].items()},
                "cloze": result["memory"]["cloze"],
                "control": result is model.control,
                **_state(result, model.T),
            }
            for arm, result in results.items()
        }
    bases = [results["base"] for results in found["models"].values() if "base" in results]
    return {
        "kind": "repair-summary",
        "models": models,
        "over_seeds": over_seeds,
        "provenance": bases[0]["provenance"],
    }


def _state(result: Result, length: int) -> Result:
    """Growth of the std of states from T to the end, and remembrance of the first half of 32 T."""
    depth = result.get("depth")
    if depth is None:
        return {}
    positions, layers = depth["state"]["position"], depth["state"]["layers"]
    stds = [_mean([layer["std"][i] for layer in layers]) for i in (positions.index(length), -1)]
    found = {"std_growth": stds[1] / stds[0]}
    if "remembrance" in depth:
        kept = depth["remembrance"]
        half = min(range(len(kept["starts"])), key=lambda i: abs(kept["starts"][i] - kept["ends"][-1] // 2))
        found["remembrance_of_half"] = kept["mean"][half][-1]
    return found


def table(found: Result) -> str:
    """All arms of all models of a result file, the best first."""
    parts = []
    for name, results in found["models"].items():
        if "base" not in results:
            continue
        model = Model(results)
        base, device = model.base, model.base["provenance"]["device"]
        parts.append(
            f"### {name}: {base['parameters'] / 1e6:.1f}M parameters, T = {model.T}, "
            f"{base['tokens'] / 1e6:.0f}M tokens, {device}\n"
        )
        parts.append(arms_table(model))
    return "\n".join(parts)


def arms_table(model: Model, arms: Sequence[str] | None = None) -> str:
    """A table of some arms in their order; None: of all, the best first."""
    T, octaves = model.T, model.base["octaves"]
    chosen = [model.found[arm] for arm in arms] if arms else [model.base, *model.arms()]
    shown = [i for i, (_, b) in enumerate(octaves) if b // T in (2, 8, 64, 256)]
    heads = [
        "arm", "in range", "price, %", *(f"to {octaves[i][1] // T} T" for i in shown),
        f"above a fresh start at {model.base['at']} T", "recall at .5, 4, 16 T", "cloze",
    ]  # fmt: skip
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for result in chosen:
        means = [torch.tensor(result["by_octave"][i]).double().mean().item() for i in shown]
        recall = [_mean(result["memory"]["recall"][d]["gain"]) for d in ("0.5", "4", "16")]
        lines.append([
            result["label"] + (" (control)" if result is model.control else ""),
            f"{_mean(result['in_range']):.3f}",
            _with_interval(model.price(result), 2),
            *(f"{mean:.3f}" for mean in means),
            _with_interval(model.excess(result), 3),
            ", ".join(f"{gain:.2f}" for gain in recall),
            f"{result['memory']['cloze']:.3f}",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def grid_table(
    model: Model, corner: str, rows: Mapping[str, Sequence[str | None]], heads: Sequence[str]
) -> str:
    """A table of price (%) and loss above a fresh start (nats) of arms in a grid.

    Args:
        model: holds the arms.
        corner: what the rows are.
        rows: the arms of each row by its label; None where none was run.
        heads: of the columns.
    """
    lines = [[corner, *heads], ["---", *["---:"] * len(heads)]]
    for label, arms in rows.items():
        cells = []
        for arm in arms:
            found = None if arm is None else model.found[arm]
            cells.append(
                "" if found is None else f"{model.price(found)[0]:+.2f}, {model.excess(found)[0]:+.3f}"
            )
        lines.append([label, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


COMPARED = {
    "base": "before",
    "none": "plain steps",
    "default": "default recipe",
    "default speed=100": "the same: TBPTT, decays x 100",
    "default rate=0.003": "the same: TBPTT, at 3e-3",
    "default windows=4": "documents of 4 T: State Passing, decays x 30",
    "default speed=100 windows=4": "documents of 4 T: State Passing, decays x 100",
    "default rate=0.003 windows=4": "documents of 4 T: State Passing, decays x 30, at 3e-3",
    "tbptt zero=0.1 speed=30 rate=0.001 train=gates rows=16": "TBPTT, the matrices of the decays too",
    "tbptt zero=0.1 speed=30 rate=0.001 train=scales rows=16 windows=4": "documents of 4 T: TBPTT",
    "default-sp": "`--intervention sp`, zero .1",
    "tbptt zero=0.1 speed=30 rate=0.001 train=scales": "the same of 32 rows: TBPTT",
    "sp zero=0.1 speed=30 rate=0.001 train=scales": "the same of 32 rows: State Passing",
    "tbptt zero=0.1 speed=30 rate=0.001 train=scales keep=1": "TBPTT, KL",
    "tbptt-depths speed=30 rate=0.001 train=scales": "TBPTT, ladder",
    "tbptt-depths speed=30 rate=0.001 train=scales keep=1": "TBPTT, ladder, KL",
    "tbptt-depths speed=30 keep=1": "TBPTT, ladder, KL, all weights",
    "tbptt zero=0.1 speed=30 rate=0.0001": "TBPTT, all weights",
    "sp": "State Passing, the paper's",
    "tbptt": "TBPTT, the paper's",
    "fitted": "Fitted Noise",
    "random": "Random Noise",
}
"""Arms that are compared over models, by their first seed; `none` is the control."""


def compared(model: Model) -> Result:
    """The arms of `COMPARED` that a model has: runs, and mean, least and most over them of each figure."""
    found = {}
    for arm in COMPARED:
        runs = [model.control] if arm == "none" else _seeds(model, arm)
        if runs:
            figures = {
                "in_range": [_mean(r["in_range"]) for r in runs],
                "price_percent": [model.price(r)[0] for r in runs],
                "price": [_mean(r["in_range"]) - _mean(model.control["in_range"]) for r in runs],
                "above_fresh_start": [model.excess(r)[0] for r in runs],
                "gap": [model.gap(r)[0] for r in runs],
            }
            spread = {name: [_mean(v), min(v), max(v)] for name, v in figures.items()}
            found[arm] = {"runs": len(runs), **spread}
    return found


def compared_table(models: Mapping[str, Model], arms: Sequence[str] = tuple(COMPARED)) -> str:
    """A table of the mean over seeds, the least and the most, of some arms of some models.

    Args:
        models: by the name that is shown.
        arms: keys of `COMPARED`; an arm that a model lacks is left out.
    """
    heads = ["model", "arm", "runs", "in range", "price, %", "above a fresh start at 64 T", "gap at 64 T"]
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    forms = {"in_range": ".3f", "price_percent": "+.2f", "above_fresh_start": "+.3f", "gap": "+.3f"}
    for name, model in models.items():
        for arm, figures in compared(model).items():
            if arm in arms:
                cells = [_over_seeds(figures[key], form, figures["runs"]) for key, form in forms.items()]
                lines.append([name, COMPARED[arm], str(figures["runs"]), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def aim_table(models: Mapping[str, Model], arm: str = "default") -> str:
    """A table of the gap at 64 T of an arm, the mean over its seeds, and what the text alone makes of it."""
    heads = ["model", "gap at 64 T", "the share of the text", "above a fresh start at 64 T", "price, %"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for name, model in models.items():
        runs = _seeds(model, arm)
        if runs:
            gap, excess, price = (
                _mean([figure(r)[0] for r in runs]) for figure in (model.gap, model.excess, model.price)
            )
            lines.append(
                [name, f"{gap:+.3f}", f"{model.difficulty():+.3f}", f"{excess:+.3f}", f"{price:+.2f}"]
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def scores_table(models: Mapping[str, Mapping[str, Result]], names: Mapping[str, str], control: str) -> str:
    """A table of lm-eval's scores by recipes/repair_lm_eval.py; the accuracies also against the control's.

    Args:
        models: arm -> result, by the name that is shown.
        names: the arms that are shown, and how.
        control: the arm that others are compared with, on the same items: a 95 % interval over BLiMP's sets,
            and over passages.
    """
    heads = [
        "model", "arm", "BLiMP, %", "against plain steps", "last word, %", "against plain steps",
        "its perplexity", "WikiText-2 by paragraph", "by article",
    ]  # fmt: skip
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    for name, arms in models.items():
        for arm, label in names.items():
            if arm in arms:
                figures = arms[arm]["figures"]
                differences = (
                    _differences(arms[arm]["tasks"], arms[control]["tasks"]) if control in arms else []
                )
                shown = ["" if arm == control else _with_interval(one, 2) for one in differences] or ["", ""]
                lines.append([
                    name, label, f"{100 * figures['blimp']:.2f}", shown[0],
                    f"{100 * figures['lambada_books']:.2f}", shown[1],
                    f"{figures['lambada_books_perplexity']:.1f}",
                    f"{figures['wikitext_paragraphs']:.1f}", f"{figures['wikitext_articles']:.1f}",
                ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _differences(ours: Result, theirs: Result) -> list[tuple[float, float, float]]:
    """Accuracy above another model's, in percent points: BLiMP over its sets, last words over passages."""
    sets = [name for name in ours if name.startswith("blimp_")]
    grammar = torch.tensor([ours[name]["acc"] - theirs[name]["acc"] for name in sets], dtype=torch.float64)
    right = [torch.tensor([int(c) for c in task["lambada_books"]["right"]]) for task in (ours, theirs)]
    return [_interval(100 * grammar), _interval(100.0 * (right[0] - right[1]))]


def _seeds(model: Model, arm: str) -> list[Result]:
    names = (arm, *(f"{arm} seed={seed}" for seed in (1, 2))) if arm != "base" else (arm,)
    return [model.found[name] for name in names if name in model.found]


def _over_seeds(figures: Sequence[float], form: str, runs: int) -> str:
    mean, least, most = (format(value, form) for value in figures)
    return mean if runs == 1 else f"{mean} [{least}, {most}]"


def _standard(arm: Result) -> bool:
    return (arm["steps"], arm["rows"], arm["seed"], arm["train"], arm["keep"]) == (500, 32, 0, "all", 0)


def _interval(values: Tensor) -> tuple[float, float, float]:
    mean, low, high = bootstrap_mean(values[:, None].double())
    return mean.item(), low.item(), high.item()


def _with_interval(values: tuple[float, float, float], digits: int) -> str:
    mean, low, high = (f"{value:+.{digits}f}" for value in values)
    return f"{mean} [{low}, {high}]"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
