"""`longroll diagnose`: where a model breaks, and how badly."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longroll.cli import _options as o

if TYPE_CHECKING:
    from torch import Tensor

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
        bool, typer.Option(help="Look for the causes too: about three times the work.")
    ] = True,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = False,
    plugin: o.PluginName = None,
    seed: o.Seed = 0,
    label: str = "base",
    json: o.Json = None,
    output: o.Output = None,
) -> None:
    """Measure a model at every position up to --length and say whether, and where, it breaks."""
    from longroll.cli._console import levels_table, out
    from longroll.report import write_report
    from longroll.report.export import slug

    lm = o.open_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, plugin=plugin)
    own_tokenizer = o.open_tokenizer(lm, model, tokenizer, bos=bos, trust_remote_code=trust_remote_code)
    tokens, bytes_per_token = o.read_sequences(
        text,
        own_tokenizer,
        length=length,
        sequences=sequences,
        column=text_column,
        concatenate=concatenate,
        seed=seed,
    )
    found = run_diagnosis(
        lm,
        tokens,
        label=label,
        train_length=train_length,
        bytes_per_token=bytes_per_token,
        chunk_size=chunk_size,
        explain=explain,
        seed=seed,
    )
    found = replace(found, tokenizer=own_tokenizer.name, prefix_ids=list(own_tokenizer.prefix_ids))
    out.print(levels_table([found]))
    for line in findings(found):
        out.print(line, soft_wrap=True)
    if json:
        found.write(json)
    if output:
        found.write(output / f"{slug(label) or 'diagnosis'}.json")
        write_report([found], output / "report.html")


def run_diagnosis(lm: RecurrentLM, tokens: Tensor, *, label: str, **options: Any) -> DiagnosisResult:
    """`longroll.diagnose` with a progress bar; its result."""
    from longroll.cli._console import stages
    from longroll.measure import diagnose

    with stages(label) as advance:
        return diagnose(lm, tokens, label=label, progress=advance, **options).result()


def findings(found: DiagnosisResult) -> list[str]:
    """What a diagnosis says in words: the verdict, the heads that do the damage, what to do, and how."""
    lines = [found.sentence, found.coverage and found.coverage.causal_sentence]
    if found.advice:
        lines += [found.advice.sentence, found.advice.command and f"  {found.advice.command}"]
    return [line for line in lines if line]
