"""`longroll plan`: what a model needs, before it is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from longroll.cli import _options as o

if TYPE_CHECKING:
    from longroll.training.plan import Memory


def plan(
    model: o.Model,
    train_length: o.TrainLength = None,
    length: o.Length = 16_384,
    sequences: o.Sequences = 16,
    chunk_size: o.ChunkSize = None,
    batch_size: Annotated[int, typer.Option(help="Sequences of a micro-batch of training.", min=1)] = 16,
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 500,
    accumulation: Annotated[int, typer.Option(help="Micro-batches a step.", min=1)] = 1,
    lora_rank: Annotated[
        int, typer.Option(help="Train LoRA adapters; 0: all weights.", min=0, max=65_536)
    ] = 0,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Shard the weights over --gpus.")] = False,
    gpus: Annotated[
        int | None,
        typer.Option(help="Devices of the run. Default: 1, or all for --device auto.", min=1, max=65_536),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="GiB of one device, or a size such as 80GB. Default: those of the device here."),
    ] = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = None,
) -> None:
    """Say how much memory and time reading and training a model take, from its config alone."""
    import time

    import torch
    from rich.table import Table

    from longroll.cli._console import hush_libraries, out
    from longroll.cli._flags import in_flags
    from longroll.errors import LongrollError
    from longroll.memory import GIB, memory_of
    from longroll.outline import outline
    from longroll.results import PlanResult, provenance
    from longroll.sizes import ROOM, check_bytes, check_tokens
    from longroll.training.plan import Outline, Setting, in_words, settings_for

    hush_libraries()
    began = time.perf_counter()
    spread = device == "auto"
    gpus = gpus or (max(1, torch.cuda.device_count()) if spread else 1)
    config, weights_dtype, place = outline(
        model, device=None if spread else device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    if fsdp and gpus == 1:
        raise LongrollError("--fsdp shards the weights over several GPUs: give --gpus.")
    trained = train_length or _train_length(config) or 2048
    int8 = dtype == "int8"
    if int8 and fsdp:
        raise LongrollError("--dtype int8 does not go with --fsdp, which shards weights: leave one out.")
    held = memory_of(place) if memory is None else _bytes(memory)
    subject = Outline(config, weights_dtype, place, int8=int8, held=held)
    room = ROOM * held
    token = 8 + 2 * getattr(config.get_text_config(), "hidden_size", 0)  # its id, one layer's hidden state
    micro_batch = f"`batch_size` {batch_size} x `train_length` {trained}"
    check_bytes(micro_batch, batch_size * trained * token, "take fewer or shorter rows", held=held)
    if chunk_size is not None:
        piece = sequences * min(chunk_size, length) * token
        check_bytes(f"`sequences` {sequences} x `chunk_size` {chunk_size}", piece, "take less", held=held)
    run = f"`steps` {steps} x `accumulation` {accumulation} x {micro_batch}"
    check_tokens(run, steps * accumulation * batch_size * trained, "ask for fewer")
    check_tokens(f"`sequences` {sequences} x `length` {length}", sequences * length, "ask for fewer")
    layers_over = gpus if spread else 1
    chunk = chunk_size or subject.chunk(sequences, length, room, layers_over)
    reading = subject.reading(sequences, length, chunk, layers_over)
    speed = subject.tokens_per_second()
    asked = Setting(
        rows=batch_size, length=trained, lora_rank=lora_rank or 16 * int8,
        gradient_checkpointing=gradient_checkpointing, shards=gpus if fsdp else 1, replicas=gpus,
        autocast=place.type == "cuda", accumulates=accumulation > 1, int8=int8,
    )  # fmt: skip
    name = "reading" if layers_over == 1 else f"reading over {layers_over}"
    rows = [_row(name, name, f"{sequences} x {length:,}", reading, speed, room)]
    settings = settings_for(asked, gpus, int8=subject.takes_int8) if subject.recurrent else []
    for setting in settings:
        each = subject.tokens_per_second(setting)
        what = f"{batch_size} x {trained:,}"
        flags = in_flags(setting.arguments, _FLAGS)
        rows.append(_row(setting.name, flags, what, subject.training(setting), each * gpus, room))
    sizes = subject.sizes
    kept = sizes.keys_and_values(length) / 2**20
    precision = "int8" if int8 else str(weights_dtype).removeprefix("torch.")
    out.print(
        f"{model}: {sizes.parameters:,} parameters, {sizes.weights / GIB:.3g} GiB in {precision}. "
        f"A text leaves {sizes.state / 2**20:.3g} MiB of state, and "
        f"{kept:.3g} MiB of keys and values after {length:,} tokens.",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    if getattr(config, "quantization_config", None):
        out.print("Quantized weights are planned as longroll reads them: dequantized.", highlight=False)
    if memory is not None and device is None and place.type == "cpu":
        out.print(
            f"No GPU is here: the plan is that of PyTorch's operations in {precision} on this CPU. The "
            "kernels of a GPU, in bfloat16, take less memory and time.",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
    table = Table(title=f"GiB at the peak, of {held / GIB:.3g} GiB a device", title_justify="left", padding=0)
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(row["name"].replace("checkpointing", "ckpt."), overflow="fold")
    for name in _PARTS:
        table.add_row(_LABELS.get(name, name), *(_gib(row["memory"][name]) for row in rows))
    table.add_section()
    table.add_row("total", *(_gib(row["total"]) for row in rows))
    table.add_row("fits", *("yes" if row["fits"] else "no" for row in rows))
    table.add_row("tokens", *(row["tokens"] for row in rows))
    table.add_row("tokens/s", *(_speed(row["tokens_per_second"]) for row in rows))
    out.print(table)
    tokens = steps * accumulation * batch_size * trained * gpus
    first = next((row for row in rows[1:] if row["fits"]), None)
    read = in_words(sequences * length / speed)
    if not settings:
        said = f"{model} has no recurrent layer, so `longroll posttrain` refuses it; a reading takes {read}."
    elif first is None:
        said = f"No setting fits at {batch_size} rows: take fewer (`--batch-size`), or more GPUs."
    else:
        said = (
            f"{steps} steps of {accumulation} x {batch_size} x {trained:,} tokens take "
            f"{in_words(tokens / first['tokens_per_second'])} by {first['setting']}; a reading takes {read}."
        )
    out.print(said, soft_wrap=True, highlight=False)
    if json:
        PlanResult.from_json(
            {
                "model": model,
                "parameters": sizes.parameters,
                "device_bytes": held,
                "train_length": trained,
                "length": length,
                "sequences": sequences,
                "chunk_size": chunk,
                "state_bytes": sizes.state,
                "keys_and_values_bytes": sizes.keys_and_values(length),
                "operations": sizes.operations,
                "rows": rows,
                "sentence": said,
                "provenance": provenance(seed=0, seconds=time.perf_counter() - began, device=place),
            }
        ).write(json)


_PARTS = ("weights", "gradients", "optimizer", "activations", "states", "keys_and_values", "logits")

_FLAGS = {
    name: f"--{name.replace('_', '-')}"
    for name in ("lora_rank", "trainable", "dtype", "gradient_checkpointing", "fsdp")
}
"""Flags of `longroll posttrain` by argument."""

_LABELS = {"keys_and_values": "KV"}


def _gib(size: int) -> str:
    """Return bytes in GiB, in few characters."""
    from longroll.memory import GIB

    found = size / GIB
    return f"{found:.3g}" if found >= 0.005 or not size else "<0.01"


def _speed(tokens: float) -> str:
    """Return tokens a second, slow ones in two digits."""
    return f"{tokens:,.0f}" if tokens >= 10 else f"{tokens:.2g}"


def _row(name: str, setting: str, tokens: str, memory: Memory, speed: float, room: float) -> dict[str, Any]:
    return {
        "name": name,
        "setting": setting,
        "tokens": tokens,
        "memory": {name: getattr(memory, name) for name in _PARTS},
        "total": memory.total,
        "fits": memory.total <= room,
        "tokens_per_second": speed,
    }


def _train_length(config: Any) -> int | None:
    stated = (getattr(config, name, None) for name in ("train_length", "context_length"))
    return next((length for length in stated if isinstance(length, int) and length > 0), None)


_UNITS = {"": 2**30, "G": 2**30, "GIB": 2**30, "GB": 10**9, "M": 2**20, "MIB": 2**20, "MB": 10**6, "T": 2**40,
          "TIB": 2**40, "TB": 10**12}  # fmt: skip
_LEAST, _MOST = 2**20, 2**50


def _bytes(text: str) -> int:
    """Return the bytes of a size: a number of GiB, or one with its unit."""
    import re

    from longroll.errors import LongrollError

    parts = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(parts[2].upper()) if parts else None
    size = int(float(parts[1]) * unit) if parts and unit and len(parts[1]) < 20 else 0
    if not _LEAST <= size <= _MOST:
        raise LongrollError(f"--memory {text} is no size of a device: give GiB, such as 80, or 80GB.")
    return size
