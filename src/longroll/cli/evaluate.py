"""`longroll evaluate`: one measure at a time."""

from __future__ import annotations

import time

import typer

from longroll.cli import _options as o

app = typer.Typer(no_args_is_help=True, help="One measure at a time.")


@app.command("loss")
def loss(
    model: o.Model,
    text: o.Text = "stdlib",
    text_column: o.TextColumn = None,
    tokenizer: o.TokenizerName = None,
    length: o.Length = 16_384,
    sequences: o.Sequences = 4,
    concatenate: o.Concatenate = False,
    chunk_size: o.ChunkSize = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = False,
    seed: o.Seed = 0,
    json: o.Json = None,
    output: o.Output = None,
) -> None:
    """Loss, perplexity and bits per byte at every position of long texts, in constant memory."""
    import math

    from rich.table import Table

    from longroll.cli._console import out, progress
    from longroll.measure import position_loss
    from longroll.results import provenance, write_json

    lm = o.open_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    words = o.open_tokenizer(lm, model, tokenizer)
    tokens, bytes_per_token = o.read_sequences(
        text,
        words,
        length=length,
        sequences=sequences,
        column=text_column,
        concatenate=concatenate,
        seed=seed,
    )
    began = time.perf_counter()
    with progress("measuring", total=length) as advance:
        found = position_loss(lm, tokens, chunk_size=chunk_size, progress=advance)
    seconds = time.perf_counter() - began
    curve = found.curve(per_octave=1)
    table = Table(title=f"{model}: {tokens.shape[0]} texts, {tokens[:, 1:].numel() / seconds:,.0f} tokens/s")
    for column in ("positions", "loss (nats)", "95 % interval", "perplexity", "bits per byte"):
        table.add_column(column, justify="right")
    for i, mean in enumerate(curve["loss"]):
        table.add_row(
            f"{curve['start'][i]}-{curve['stop'][i]}",
            f"{mean:.4f}",
            f"{curve['low'][i]:.4f} - {curve['high'][i]:.4f}",
            f"{math.exp(mean):.3f}" if mean < 700 else "inf",
            f"{mean / math.log(2) / bytes_per_token:.4f}",
        )
    out.print(table)
    result = {
        "kind": "position_loss",
        "model": lm.name,
        "sequences": tokens.shape[0],
        "max_position": length,
        "bytes_per_token": bytes_per_token,
        "curve": found.curve(),
        "loss": found.mean.tolist(),
        "provenance": provenance(lm, seed=seed, seconds=seconds),
    }
    if json:
        write_json(json, result)
    if output:
        write_json(output / "loss.json", result)
