"""One call that says whether a model holds past its training length, where it breaks, why, and what to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from longroll import ranks
from longroll.data import DocumentLengths
from longroll.errors import LongrollError
from longroll.history import history
from longroll.interventions.recipes import NAMES
from longroll.measure._blame import Blame, Share
from longroll.measure._position_loss import PositionLoss, position_loss
from longroll.measure.advice import (
    NO_STATE,
    advise,
    after_repair,
    not_split,
    of_ablation,
    of_blame,
    of_dtype,
    of_sound,
)
from longroll.measure.compare import check_comparable, compare, text_losses
from longroll.measure.excess_loss import excess_loss
from longroll.measure.explain import (
    Progress,
    StateWatch,
    explain_blame,
    explain_coverage,
    explain_remembrance,
    stage,
)
from longroll.measure.judge import Verdict, judge
from longroll.measure.kept import Kept
from longroll.measure.precision import Float16Watch, check_precision
from longroll.measure.stationarity import end_drift
from longroll.model import RecurrentLM
from longroll.results import DiagnosisResult, provenance


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; `to_json` is what reports are drawn from."""

    verdict: Verdict
    edge: int | None
    """Where the loss first exceeds its level in range, and a fresh start's, beyond the intervals; or None."""
    severity: float
    """Nats above a fresh start over the last octave of positions."""
    levels: dict[str, float | None]
    """Mean loss in nats: `in_range` over [0, T); `2x`, `8x`, `64x` over the octave up to there; `far`."""
    sentence: str
    advice: str
    """What to do: an intervention, with its reasons and its price, or to leave the model alone."""
    details: dict[str, Any] = field(repr=False)

    def result(self) -> DiagnosisResult:
        """Return the diagnosis as reports read it; numbers that are not finite become null."""
        data = {
            **self.details,
            "levels": self.levels,
            "edge": self.edge,
            "severity": self.severity,
            "verdict": self.verdict,
            "sentence": self.sentence,
        }
        return DiagnosisResult.from_json(data, source="diagnosis")

    def to_json(self) -> dict[str, Any]:
        """Return plain data; numbers that are not finite become null."""
        return self.result().to_json()


def diagnose(
    lm: RecurrentLM,
    tokens: Tensor,
    *,
    train_length: int | None = None,
    label: str | None = None,
    bytes_per_token: float | None = None,
    chunk_size: int | None = None,
    explain: bool = True,
    against: Diagnosis | DiagnosisResult | Mapping[str, Any] | None = None,
    control: Diagnosis | DiagnosisResult | Mapping[str, Any] | None = None,
    seed: int = 0,
    save: Callable[[Diagnosis], object] | None = None,
    progress: Progress | None = None,
    documents: DocumentLengths | None = None,
    dealt: bool = False,
    kept: Kept | None = None,
) -> Diagnosis:
    """Roll a model out over `tokens` and say how it does past its training length.

    A model breaks where its loss is above its level in range and also above that of the same model restarted
    within its training length on the same tokens (`excess_loss`), so that a text whose later parts
    are harder is not taken for a fault. A repair that bought its level by a worse loss in range shows against
    the model before (`against`) and against plain steps (`control`).

    Args:
        lm: the model.
        tokens: (B, L + 1), L above the training length and at least 4 sequences; 8 or more to tell which
            heads have left their range.
        train_length: T; default: what the model's config says.
        label: what to call this run in a report; default: the intervention that the config tells of
            (`longroll.history`), "calibrated" after a calibration, else "base".
        bytes_per_token: bytes of text for each token, for bits per byte.
        chunk_size: tokens of a row in one forward.
        explain: measure remembrance too, which states left their range, and which of them do the damage:
            about three times the work.
        against: a diagnosis of the model before a repair, or its JSON: the sentence names the price.
        control: a diagnosis of a model that took plain steps from zero states.
        seed: random seed of the bootstrap, the permutations and the noise that states are compared with.
        save: called on rank 0 with the diagnosis as far as the losses tell it, before causes are looked for.
        progress: see `Progress`.
        documents: lengths of the documents that a repair would train on, from which the advice names the
            intervention.
        dealt: deal texts, trials and starts to the ranks, each of which must call this and gets the
            diagnosis. It differs from that of one process by rounding.
        kept: where what is done is kept until the caller removes it (`Kept.remove`); the diagnosis goes on
            from what is there.

    Raises:
        LongrollError: for an unknown training length, too few sequences, or too short ones, for another
            run of another training length or tokenizer, and where `kept` holds something else.
    """
    with ranks.together(dealt):
        return _diagnose(
            lm,
            tokens,
            train_length=train_length,
            label=label,
            bytes_per_token=bytes_per_token,
            chunk_size=chunk_size,
            explain=explain,
            against=against,
            control=control,
            seed=seed,
            save=save,
            progress=progress,
            documents=documents,
            kept=kept or Kept(),
        )


def _diagnose(
    lm: RecurrentLM,
    tokens: Tensor,
    *,
    train_length: int | None,
    label: str | None,
    bytes_per_token: float | None,
    chunk_size: int | None,
    explain: bool,
    against: Diagnosis | DiagnosisResult | Mapping[str, Any] | None,
    control: Diagnosis | DiagnosisResult | Mapping[str, Any] | None,
    seed: int,
    save: Callable[[Diagnosis], object] | None,
    progress: Progress | None,
    documents: DocumentLengths | None,
    kept: Kept,
) -> Diagnosis:
    """Return `diagnose` among the ranks that work on it."""
    began = time.perf_counter()
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    train_length, _ = lm.find_train_length(train_length)
    if length <= train_length:
        raise LongrollError(
            f"{length} positions do not go past `train_length` {train_length}: raise `tokens.shape[1]`."
        )
    if rows < 4:
        raise LongrollError(
            f"{rows} sequences are too few for an interval: give at least 4 (`tokens.shape[0]`)."
        )
    trained = [run["intervention"] for run in history(lm.model.config)]
    scaled = history(lm.model.config, "calibrate")
    details: dict[str, Any] = {
        "label": label or (trained[-1] if trained else "calibrated" if scaled else "base"),
        "model": lm.name,
        "architecture": lm.family.architecture(lm.model),
        "parameters": sum(p.numel() for p in lm.parameters()),
        "intervention": trained[-1] if trained else None,
        "train_length": train_length,
        "sequences": rows,
        "max_position": length,
        "bytes_per_token": bytes_per_token,
    }
    others = {"against": against, "control": control}
    runs = {name: _result(run, f"`{name}`") for name, run in others.items() if run is not None}
    for name, run in runs.items():
        check_comparable(run, train_length, bytes_per_token, f"`{name}`")
    mine = ranks.share(rows)
    watch = None
    if lm.family.recurrent:
        watch = StateWatch(lm, length, train_length, seed=seed, first=mine.start, compares=explain)
    kept.begin(lm, tokens, train_length=train_length, chunk_size=chunk_size, seed=seed, explain=explain)
    rolled = time.perf_counter()
    with Float16Watch(lm) as activations:
        kept.held = [activations, *([watch] if watch else [])]
        carried = position_loss(
            lm,
            tokens,
            chunk_size=chunk_size,
            stops=watch.stops if watch else (),
            watch=watch,
            progress=stage(progress, "reading on", length),
            dealt=True,
            kept=kept,
        )
    seconds = time.perf_counter() - rolled + kept.spent
    speed = max(ranks.gather((mine.stop - mine.start) * length / seconds))
    activations.over_ranks()
    if watch is not None:
        watch.over_ranks()
    told = stage(progress, "restarting")
    ends, excess = restarted = kept.once(
        "excess", lambda: excess_loss(lm, tokens, carried, train_length, progress=told, dealt=True)
    )
    judged = judge(carried, ends, excess, train_length, seed=seed)
    levels = _levels(carried, train_length)
    details |= {
        "curve": carried.curve(),
        "excess": {
            "position": ends,
            "mean": judged.mean.tolist(),
            "low": judged.low.tolist(),
            "high": judged.high.tolist(),
        },
        "texts": text_losses(tokens, carried, train_length),
        "states": watch and watch.statistics.statistics().to_json(),
    }
    diagnosis = Diagnosis(judged.verdict, judged.edge, judged.severity, levels, "", "", details)
    comparisons = {name: compare(diagnosis.result(), run, seed=seed) for name, run in runs.items()}
    details["comparisons"] = {name: comparison.to_json() for name, comparison in comparisons.items()}
    prices = ", ".join(comparison.price for comparison in comparisons.values())
    sentence = judged.sentence(prices)
    made = provenance(lm, seed=seed, seconds=time.perf_counter() - began)
    diagnosis = replace(diagnosis, sentence=sentence, details=details | {"provenance": made})
    if save is not None and ranks.rank() == 0:
        save(diagnosis)
    precision = ranks.on_first(lambda: check_precision(lm, tokens, carried, activations, train_length))
    details["precision"] = precision.to_json()
    breaks = judged.edge is not None
    suffers = ranks.on_first(lambda: judged.suffers)
    advice = NO_STATE if suffers else of_sound(length, train_length)
    if watch is not None:
        iid = ranks.on_first(watch.iid)
        drift = end_drift(tokens, max(16, train_length // 8), seed=seed)
        if suffers:
            advice = advise(
                lm.name if lm.flags is not None else None,
                train_length,
                flags=lm.flags or (),
                documents=documents,
                breaks=breaks,
                iid=iid,
                ends=drift,
                tokens_per_second=speed,
                severity=judged.severity,
            )
        details |= {"iid": iid.to_json(), "stationarity": drift.to_json()}
        if explain:
            seen = watch
            details["coverage"] = kept.once(
                "coverage",
                lambda: explain_coverage(
                    lm, tokens, carried, seen, train_length,
                    healthy=not suffers, restarted=restarted, progress=progress,
                ),
            )  # fmt: skip
            held = details["coverage"].get("causal") or []
            advice = of_ablation(advice, next((row for row in held if row["what"] == "all heads"), None))
            blame = None
            if suffers:
                blame = kept.once(
                    "blame",
                    lambda: explain_blame(
                        lm, tokens, carried, seen, train_length,
                        seed=seed, restarted=restarted, progress=progress,
                    ),
                    kinds=(Blame, Share),
                )  # fmt: skip
            if blame is not None:
                details["blame"] = blame.to_json()
                opened = lm.name if lm.flags is not None else None
                advice = of_blame(advice, blame, opened, train_length, lm.flags or (), length=length)
        if suffers and watch.has_attention and "blame" not in details:
            advice = not_split(advice, train_length)
    if explain:
        details["remembrance"] = kept.once(
            "remembrance", lambda: explain_remembrance(lm, tokens, progress=progress)
        )
    repair = next((name for name in reversed(trained) if name != "none"), None)
    if precision.suspect:
        advice = of_dtype(lm.name, precision.dtype, told=precision.blamed)
    elif not suffers and (repair or runs):
        price = comparisons.get("control") or comparisons.get("against")
        advice = after_repair(lm.name, repair, price, _rival(levels["far"], length, runs.get("against")))
    elif breaks and repair:
        advice = replace(
            advice, sentence=f"It still breaks after {NAMES.get(repair, repair)}. {advice.sentence}"
        )
    details["advice"] = advice.to_json()
    details["provenance"] = provenance(lm, seed=seed, seconds=time.perf_counter() - began)
    if precision.sentence:
        sentence = f"{sentence} {precision.sentence}"
    return Diagnosis(judged.verdict, judged.edge, judged.severity, levels, sentence, advice.sentence, details)


def _result(run: Diagnosis | DiagnosisResult | Mapping[str, Any], source: str) -> DiagnosisResult:
    if isinstance(run, Diagnosis):
        return run.result()
    return run if isinstance(run, DiagnosisResult) else DiagnosisResult.from_json(run, source=source)


def _rival(far: float | None, length: int, before: DiagnosisResult | None) -> float | None:
    """Return nats by which a fresh start of the model before a repair reads lower than a far loss."""
    if far is None or before is None or before.max_position != length or before.severity is None:
        return None
    return far - (before.level("far") - before.severity)


def _levels(carried: PositionLoss, train_length: int) -> dict[str, float | None]:
    length = carried.losses.shape[1]
    levels: dict[str, float | None] = {"in_range": carried.between(0, train_length)}
    for times in (2, 8, 64):
        stop = times * train_length
        levels[f"{times}x"] = carried.between(stop // 2, stop) if stop <= length else None
    levels["far"] = carried.between(length // 2, length)
    return levels
