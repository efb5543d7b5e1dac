"""`longroll diagnose`: where a model breaks, by how much, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longroll.cli import _options as o
from longroll.cli._flags import in_flags

if TYPE_CHECKING:
    from torch import Tensor

    from longroll.data import DocumentLengths, Tokenizer
    from longroll.model import RecurrentLM
    from longroll.results import DiagnosisResult


def diagnose(
    model: o.Model,
    text: o.Text = "stdlib",
    text_column: o.TextColumn = None,
    tokenizer: o.TokenizerName = None,
    bos: o.Bos = None,
    train_length: o.TrainLength = None,
    length: o.Length = 16_384,
    sequences: o.Sequences = 16,
    concatenate: o.Concatenate = False,
    chunk_size: o.ChunkSize = None,
    explain: Annotated[
        bool, typer.Option(help="Measure the causes as well, which takes about three times as long.")
    ] = True,
    long: Annotated[
        bool,
        typer.Option(
            help="Read texts up to --length; --no-long forecasts the loss there from texts of T tokens."
        ),
    ] = True,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Result file of the model before its repair, to print the change of the loss in range."
        ),
    ] = None,
    control: Annotated[
        Path | None,
        typer.Option(
            help="Result file of a model after as many steps from zero states, to print the change "
            "against it."
        ),
    ] = None,
    card: Annotated[
        bool,
        typer.Option(
            "--card", help="Write the verdicts into the model card, README.md in the folder of the model."
        ),
    ] = False,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = False,
    plugin: o.PluginName = None,
    seed: o.Seed = 0,
    label: Annotated[
        str | None, typer.Option(help="Name of the run. Default: the intervention of posttrain, else base.")
    ] = None,
    json: o.Json = None,
    output: o.Output = None,
) -> None:
    """Measure the loss at every position up to --length: whether, where and why a model breaks."""
    from longroll.cli._console import console, levels_table, out
    from longroll.files import is_stream, write_whole
    from longroll.measure.roll_out import default_chunk
    from longroll.ranks import join, rank, wait
    from longroll.report import write_report
    from longroll.report.export import slug
    from longroll.training.card import with_diagnosis
    from longroll.training.plan import reading_line

    if not long:
        given = {"against": against, "control": control, "card": card, "output": output}
        _refuse_for_forecast(given | {"chunk_size": chunk_size})
    card_file = _card_of(model) if card else None
    before, plain = (path and _read(path) for path in (against, control))
    lm = o.open_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, plugin=plugin)
    train_length = o.find_train_length(lm, train_length)
    own_tokenizer = o.open_tokenizer(lm, model, tokenizer, bos=bos, trust_remote_code=trust_remote_code)
    tokens, bytes_per_token = o.read_sequences(
        text,
        own_tokenizer,
        length=length if long else train_length,
        sequences=sequences,
        column=text_column,
        concatenate=concatenate,
        seed=seed,
    )
    if not long:
        run_forecast(lm, tokens, train_length, length, label=label, seed=seed, json=json)
        return

    documents = documents_to_train_on(text, own_tokenizer, text_column, train_length)
    join()
    if lm.flags is not None:  # the repair that is advised reads the same text
        lm.flags += o.text_flags(text, text_column, tokenizer, bos)
    named = slug(label or Path(model).name) or "diagnosis"
    kept = o.kept_beside(json, output and output / f"{named}.json")

    def write(result: DiagnosisResult, *, early: bool = False) -> DiagnosisResult:
        """Write the result to its files; as far as it is known (`early`), not into a stream."""
        prefix_ids = list(own_tokenizer.prefix_ids)
        result = result.changed(tokenizer=own_tokenizer.name, prefix_ids=prefix_ids)
        own = output and output / f"{slug(result.label or '') or 'diagnosis'}.json"
        for path in (json, own):
            if path and not (early and is_stream(path)):
                result.write(path)
        return result

    def tell(found: DiagnosisResult) -> None:
        """Print the result, and write it into the card and the report."""
        runs = [run for run in (before, plain, found) if run]
        out.print(levels_table(runs))
        for line in findings(found):
            out.print(line, soft_wrap=True)
        if card_file:
            text_of_card = card_file.read_text(encoding="utf-8", errors="surrogateescape")
            told = with_diagnosis(text_of_card, runs).encode("utf-8", errors="surrogateescape")
            write_whole(card_file, told)
        if output:
            write_report(runs, output / "report.html")

    chunk = chunk_size or default_chunk(lm, len(tokens), length)
    planned = reading_line(lm, len(tokens), length, chunk) if rank() == 0 else None
    if planned is not None:
        console.print(planned, highlight=False, soft_wrap=True)
    found = run_diagnosis(
        lm,
        tokens,
        label=label,
        train_length=train_length,
        bytes_per_token=bytes_per_token,
        chunk_size=chunk_size,
        explain=explain,
        against=before,
        control=plain,
        seed=seed,
        save=lambda diagnosis: write(diagnosis.result(), early=True),
        documents=documents,
        dealt=True,
        kept=kept,
    )
    if rank() == 0:
        tell(write(found))
    wait()
    kept.remove()


def documents_to_train_on(
    text: str, tokenizer: Tokenizer, column: str | None, train_length: int
) -> DocumentLengths | None:
    """Return the lengths that the advised repair chooses its intervention by; None for text without a
    training split.
    """
    from longroll.errors import LongrollError
    from longroll.measure.advice import BATCH_SIZE

    try:
        return o.count_documents(text, tokenizer, column=column, length=train_length, rows=BATCH_SIZE)
    except LongrollError:
        return None


def _card_of(model: str) -> Path:
    """Return the model card in a folder that `posttrain` wrote, or beside BlinkDL's file there."""
    from longroll.errors import LongrollError
    from longroll.files import check_writable

    place = Path(model)
    card = (place if place.is_dir() else place.parent) / "README.md"
    if not place.exists() or not card.is_file():
        raise LongrollError(
            f"`card`: {model} is not a folder with a README.md: name one that posttrain wrote."
        )
    return check_writable(card)


def _read(path: Path) -> DiagnosisResult:
    from longroll.errors import LongrollError
    from longroll.results import DiagnosisResult, read_results

    otherwise = f"is no diagnosis: make one with `longroll diagnose MODEL --json {path}`."
    runs = read_results(path, DiagnosisResult, otherwise=otherwise)
    if len(runs) > 1:
        raise LongrollError(f"{path} holds {len(runs)} diagnoses: give a file of one.")
    return runs[0]


def _refuse_for_forecast(options: dict[str, Any]) -> None:
    """Refuse options that a forecast does not read."""
    from longroll.errors import LongrollError

    for name, value in options.items():
        if value:
            raise LongrollError(f"`{name}` needs long texts to be read: leave it out, or --no-long.")


def run_forecast(
    lm: RecurrentLM,
    tokens: Tensor,
    train_length: int,
    length: int,
    *,
    label: str | None,
    seed: int,
    json: Path | None,
) -> None:
    """Forecast the break of a model from texts of T tokens, print it, and write it to `json`."""
    import time

    from longroll.cli._console import out
    from longroll.cli._progress import progress
    from longroll.errors import LongrollError
    from longroll.measure import forecast
    from longroll.measure._forecast import readings_of
    from longroll.ranks import rank
    from longroll.results import ForecastResult, provenance

    if length <= train_length:
        raise LongrollError(f"`length` {length} does not go past `train_length` {train_length}: give more.")
    if rank() > 0:
        return  # not dealt: rank 0 reads
    began, times = time.perf_counter(), max(1, length // train_length)
    with progress("forecasting", total=readings_of(times)) as advance:
        found = forecast(lm, tokens, train_length, times=times, seed=seed, progress=advance)
    if json:
        ForecastResult.from_json(
            found.to_json()
            | {
                "label": label,
                "model": lm.name,
                "sequences": len(tokens),
                "provenance": provenance(lm, seed=seed, seconds=time.perf_counter() - began),
            }
        ).write(json)
    out.print(found.sentence, soft_wrap=True)


def run_diagnosis(lm: RecurrentLM, tokens: Tensor, *, label: str | None, **options: Any) -> DiagnosisResult:
    """Return `longroll.diagnose` with a progress bar; its result."""
    from longroll.cli._progress import stages
    from longroll.measure import diagnose

    with stages(label or lm.name) as advance:
        return diagnose(lm, tokens, label=label, progress=advance, **options).result()


FLAGS = {"length": "--length", "explain": "--explain", "reading": "evaluate --reading"}
"""Flags in place of the Python arguments that an advice names."""


def findings(found: DiagnosisResult) -> list[str]:
    """Return what a diagnosis says in words: the verdict, the heads that do the damage, what to do, and
    how.
    """
    lines = [found.sentence, found.coverage and found.coverage.causal_sentence]
    if found.blame:
        lines.append(found.blame.sentence)
    if found.advice:
        lines += [found.advice.sentence, found.advice.command and f"  {found.advice.command}"]
    return [in_flags(line, FLAGS) for line in lines if line]
