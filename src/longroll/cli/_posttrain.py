"""`longroll posttrain`: repair a model by training from non-zero initial states."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longroll.cli import _options as o
from longroll.cli import _tasks as t
from longroll.cli._flags import in_flags, running, unread

if TYPE_CHECKING:
    from longroll.measure.held_out import HeldOutData


class Choice(StrEnum):
    """The interventions by their short names; `none` is the control."""

    sp = "sp"
    tbptt = "tbptt"
    fitted = "fitted"
    random = "random"
    none = "none"


class RecipeName(StrEnum):
    """The recipes; `paper` has State Passing, no zero rows, and one learning rate for all."""

    longroll = "longroll"
    paper = "paper"


class Weights(StrEnum):
    """How trained weights are held."""

    float32 = "float32"
    bf16 = "bf16"


class Trainable(StrEnum):
    """Which parameters are trained."""

    all = "all"
    scales = "scales"
    decays = "decays"


class Format(StrEnum):
    """Whose names and files the model is saved in."""

    transformers = "transformers"
    original = "original"


class OnNotFinite(StrEnum):
    """What becomes of a step whose loss, state or gradient is not finite."""

    stop = "stop"
    drop = "drop"


class ReportTo(StrEnum):
    """The loggers of HF Trainer that can be asked for."""

    none = "none"
    tensorboard = "tensorboard"
    wandb = "wandb"
    mlflow = "mlflow"


class TaskName(StrEnum):
    """The tasks one can train on."""

    passkey = "passkey"
    niah = "niah"
    copying = "copying"
    babilong = "babilong"
    variables = "variables"
    recall = "recall"
    tracking = "tracking"


NO_GAIN = 3
"""Status of --until-healthy without a better checkpoint within --price."""
READ_BY_TASK: dict[str, set[str | None]] = {
    "text": {None, "babilong"},
    "haystack": {"passkey"},
    "instruction": {"passkey"},
    "facts": {"babilong"},
    "qa": {"babilong"},
    "windows": {"passkey", "niah", "babilong", "variables", "recall"},
    "groups": {"tracking"},
    "pairs": {"recall"},
}
"""The tasks that read a flag; None is training on text. `text_column` is refused with any task."""
READ_BY_INTERVENTION: dict[str, set[str | None]] = {
    "zero_probability": {"sp", "tbptt", "fitted", "random"},
    "conv": {"sp", "tbptt", "fitted", "random"},
    "noise_std": {"random"},
    "momentum": {"fitted"},
}
"""The interventions that read a flag."""


def posttrain(
    context: typer.Context,
    model: o.Model,
    output: Annotated[Path, typer.Option(help="Folder for the repaired model.", callback=o.folder_to_write)],
    intervention: Annotated[
        Choice | None,
        typer.Option(
            help="Initial state of the training sequences; none is the control. Default: chosen by "
            "--recipe for the text."
        ),
    ] = None,
    recipe: Annotated[
        RecipeName,
        typer.Option(
            help="Defaults of --intervention, --zero-probability, --decay-speed, --learning-rate and "
            "--trainable; paper: State Passing, 0, 1, 5e-4 and all."
        ),
    ] = RecipeName.longroll,
    text: o.Text = "stdlib",
    text_column: o.TextColumn = None,
    tokenizer: o.TokenizerName = None,
    bos: o.Bos = None,
    task: Annotated[
        TaskName | None,
        typer.Option(help="Train on a task instead of --text, with the loss on the answers. Default: none."),
    ] = None,
    haystack: t.HaystackText = "noise",
    instruction: t.Instruction = True,
    facts: Annotated[
        str | None, typer.Option(help="Files of bAbI, for --task babilong; --text gives the books.")
    ] = None,
    qa: t.Kinds = "qa1,qa2,qa3,qa4,qa5",
    groups: t.Groups = "parity,z5,s3,s5",
    pairs: Annotated[int, typer.Option(help="Keys in a sample of --task recall.", min=1, max=64)] = 8,
    windows: Annotated[int, typer.Option(help="Rows over which a sample of a task continues.", min=1)] = 1,
    train_length: o.TrainLength = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 500,
    batch_size: Annotated[int, typer.Option(help="Sequences in a micro-batch, on each process.")] = 16,
    accumulation: Annotated[int, typer.Option(help="Micro-batches in a step.")] = 1,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate of AdamW. Default: from --recipe.")
    ] = None,
    decay_speed: Annotated[
        float | None,
        typer.Option(
            help="Learning rate of the decays (A_log, dt_bias) as a multiple of --learning-rate. "
            "Default: from --recipe."
        ),
    ] = None,
    schedule: Annotated[
        str, typer.Option(help="Learning-rate schedule, by its name in transformers.")
    ] = "cosine",
    warmup: Annotated[
        float, typer.Option(help="Share of the steps in which the learning rate rises, 0 to 1.")
    ] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of AdamW, on matrices only.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient; larger ones are scaled.")] = 1.0,
    zero_probability: Annotated[
        float | None,
        typer.Option(
            help="Probability that a row starts from the zero state, 0 to 1. Default: from --recipe."
        ),
    ] = None,
    conv: Annotated[
        bool | None, typer.Option(help="Set the convolution states too. Default: yes, except for random.")
    ] = None,
    noise_std: Annotated[float, typer.Option(help="Standard deviation of Random Noise.")] = 1.0,
    momentum: Annotated[
        float, typer.Option(help="Weight of the past in the moments of Fitted Noise, 0 to below 1.")
    ] = 0.9,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same bits each time on a GPU, somewhat slower.")
    ] = False,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Shard the weights over the processes of torchrun (FSDP2).")
    ] = False,
    fsdp_config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON file of transformers' fsdp_config, for --fsdp.")
    ] = None,
    rope_scaling: Annotated[
        str | None,
        typer.Option(
            metavar="KIND:FACTOR",
            help="Scaling of the rotary positions of attention: linear, ntk or yarn, and a factor, such "
            "as yarn:4. Default: none.",
        ),
    ] = None,
    lora_rank: Annotated[
        int,
        typer.Option(
            help="Rank of LoRA adapters, which are trained and merged; 0 trains the weights themselves."
        ),
    ] = 0,
    trainable: Annotated[
        Trainable | None,
        typer.Option(
            help="Parameters that are trained; scales are all except matrices. Default: from --recipe."
        ),
    ] = None,
    bf16: Annotated[
        bool | None,
        typer.Option(
            help="Autocast to bfloat16. Default: yes on a GPU for a checkpoint in 16 bits, else no."
        ),
    ] = None,
    weights: Annotated[
        Weights,
        typer.Option(help="Dtype of the trained weights; bf16 halves their memory and loses small updates."),
    ] = Weights.float32,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Recompute activations in backward: less memory, about a third more time.",
        ),
    ] = False,
    cuda_graphs: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graphs/--no-cuda-graphs",
            help="Replay each step as one CUDA graph. Default: Mamba and Mamba-2 on a GPU.",
            show_default=False,
        ),
    ] = None,
    report_to: Annotated[
        ReportTo, typer.Option(help="Logger besides the terminal; tensorboard writes into runs in --output.")
    ] = ReportTo.none,
    format: Annotated[
        Format,
        typer.Option(
            help="Layout of the saved model; original is the layout of state-spaces or BlinkDL in which "
            "the model came."
        ),
    ] = Format.transformers,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="REPO_ID", help="Repository of the hub to which --output is uploaded. Default: none."
        ),
    ] = None,
    on_not_finite: Annotated[
        OnNotFinite,
        typer.Option(
            help="At a step with a loss, state or gradient that is not finite: stop, or drop the "
            "carried states and skip the step."
        ),
    ] = OnNotFinite.stop,
    force: Annotated[
        bool, typer.Option("--force", help="Train a model even if it holds past its training length.")
    ] = False,
    until_healthy: Annotated[
        bool,
        typer.Option(
            "--until-healthy",
            help="Measure held-out data during the run, keep the best checkpoint within --price, and end the "
            f"run when no further gain is expected. Status {NO_GAIN}: no checkpoint is better.",
        ),
    ] = False,
    price: Annotated[
        float, typer.Option(help="Rise of the loss in range, in nats, that --until-healthy accepts.")
    ] = 0.05,
    measure_steps: Annotated[
        int, typer.Option(help="Steps between two measurements of --until-healthy.", min=1)
    ] = 50,
    save_steps: Annotated[int, typer.Option(help="Steps between two checkpoints to resume from.")] = 100,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run from its last whole checkpoint.")
    ] = False,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = False,
    plugin: o.PluginName = None,
    seed: o.Seed = 0,
    json: o.Json = None,
) -> None:
    """Post-train a model from non-zero initial states."""
    import time

    from longroll.cli._console import console, out
    from longroll.errors import LongrollError
    from longroll.interventions.recipes import NON_STATIONARY, recipe_of
    from longroll.ranks import rank, world_size
    from longroll.results import PosttrainResult, provenance
    from longroll.training import Declined, NoGain, PosttrainOptions, by_recipe
    from longroll.training.hub import check_push, push
    from longroll.training.identity import settings_of
    from longroll.training.options import check_sizes
    from longroll.training.output import goes_on
    from longroll.training.plan import setting_of, training_line
    from longroll.training.refusals import check_settings
    from longroll.training.until_healthy import look_in

    asked = recipe_of(recipe)
    check_read(context, *([intervention] if intervention else [asked.long, asked.short, NON_STATIONARY]))
    for left_out in unread(context, "task", task, READ_BY_TASK):
        console.print(f"Warning: {left_out}: it is left out.", style="yellow", soft_wrap=True)
    if not until_healthy and (idle := given(context, price=price, measure_steps=measure_steps)):
        flag = next(iter(idle)).replace("_", "-")
        raise LongrollError(f"--{flag} is read with --until-healthy alone: add it, or leave --{flag} out.")
    if task in ("copying", "tracking") and intervention == "tbptt":
        instead = "sp" if task == "copying" else NON_STATIONARY
        raise LongrollError(
            f"--intervention tbptt: --task {task.value} has no text that goes on from row to row: use "
            f"--intervention {instead}."
        )
    if push_to_hub is not None:
        check_push(push_to_hub, output, resume=resume)
    if fsdp and device is None:
        device = "cpu"  # whole, and no GPU need hold all of it
    lm = o.open_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, plugin=plugin)
    length = o.find_train_length(lm, train_length)
    options = PosttrainOptions(
        length=length,
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        learning_rate=learning_rate,
        decay_speed=decay_speed,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        bf16=bf16,
        weights=weights.value,
        gradient_checkpointing=gradient_checkpointing,
        cuda_graphs=cuda_graphs,
        deterministic=deterministic,
        fsdp=fsdp,
        fsdp_config=None if fsdp_config is None else read_settings(fsdp_config),
        rope_scaling=rope_scaling,
        lora_rank=lora_rank,
        trainable=None if trainable is None else trainable.value,
        save_steps=save_steps,
        report_to=report_to.value,
        format=format.value,
        on_not_finite=on_not_finite.value,
        seed=seed,
        until_healthy=until_healthy,
        price=price,
        measure_steps=measure_steps,
    )
    check_settings(lm, options, intervenes=intervention != Choice.none)
    check_sizes(lm, options)
    if task is not None and text_column is not None:
        raise LongrollError(f"--text-column {text_column}: --task {task.value} reads no rows of text.")
    tok = o.open_tokenizer(lm, model, tokenizer, bos=bos, trust_remote_code=trust_remote_code)
    data: Any
    if task is None:
        most = options.tokens * world_size() + 1
        data = o.read_training_text(text, tok, column=text_column, max_tokens=most, seed=seed)
    else:
        data = t.training_rows(
            task, tok, options, haystack=haystack, instruction=instruction,
            facts=facts, books=text, kinds=qa, windows=windows, groups=groups, pairs=pairs,
        )  # fmt: skip
    own = given(context, conv=conv, noise_std=noise_std, momentum=momentum)
    if "noise_std" in own:
        own["std"] = own.pop("noise_std")
    counted = None
    if task is None and intervention is None and asked.long != asked.short:
        rows = batch_size * world_size()
        counted = o.count_documents(text, tok, column=text_column, length=length, rows=rows)
    prepared = by_recipe(
        lm,
        data,
        options,
        recipe=recipe.value,
        intervention=None if intervention is None else intervention.value,
        zero_probability=zero_probability,
        documents=counted,
        **own,
    )
    check_read(context, prepared.name)
    options = prepared.options
    if task is not None:
        t.warn_of(task, data, prepared.name, hybrid=lm.has_attention)
    held_out: HeldOutData | None = None
    unseen = not goes_on(output, resume) and not force and task is None and prepared.name != "none"
    if unseen and fsdp:
        console.print("Not looked whether the model breaks: with --fsdp no process holds it whole.")
        unseen = False
    if until_healthy or unseen:
        missing = ""
        if task is None:
            held_out, missing = o.read_held_out(text, tok, column=text_column, length=length, seed=seed)
        else:
            held_out = t.held_out_rows(
                task, tok, options, haystack=haystack, instruction=instruction, facts=facts, books=text,
                kinds=qa,
                pairs=pairs,
            )  # fmt: skip
        if held_out is None and until_healthy:
            raise LongrollError(f"`until_healthy`: {missing}: give more, or longer, text.")
        if held_out is None:
            console.print(f"Not looked whether the model breaks: {missing}.", highlight=False, soft_wrap=True)
    planned = training_line(lm, setting_of(lm, options), options.tokens) if rank() == 0 else None
    lines = [line for line in (prepared.sentence, planned) if line]
    began = time.perf_counter()

    def finish(log: list[dict[str, Any]], **more: Any) -> None:
        if json:
            PosttrainResult.from_json(
                {
                    "model": lm.name,
                    "output": str(output),
                    "intervention": prepared.name,
                    "recipe": recipe.value,
                    "task": task,
                    "options": vars(options) | settings_of(prepared.intervention),
                    "processes": world_size(),
                    "log": [entry for entry in log if "look" not in entry],
                    "not_finite_steps": len(skipped_in(log)),
                    "look": look_in(log),
                    "provenance": provenance(lm, seed=seed, seconds=time.perf_counter() - began),
                    **more,
                }
            ).write(json)

    def tell(sentence: str) -> None:
        """Print a sentence; what is to be done stands after what a look saw, and before all others."""
        looked = bool(lines) and unseen and held_out is not None
        for line in [sentence, *lines] if looked else [*lines, sentence]:
            console.print(in_flags(line, running), markup=False, highlight=False, soft_wrap=True)
        lines.clear()

    try:
        log, seconds = run_posttrain(
            lm,
            data,
            prepared.intervention,
            options,
            output,
            tokenizer=tok,
            resume=resume,
            held_out=held_out,
            force=not unseen,
            tell=tell,
            finish=finish,
        )
    except Declined as declined:
        said = in_flags(str(declined), running)
        if rank() == 0:
            out.print(said, markup=False, highlight=False, soft_wrap=True)
            reading = declined.reading
            finish(declined.log, declined=said, look=reading.to_json() if reading else look_in(declined.log))
        if isinstance(declined, NoGain):
            raise typer.Exit(NO_GAIN) from None
        return
    tokens = options.tokens * world_size()
    rate = "" if resume or until_healthy else f" ({tokens / seconds:,.0f} tokens/s)"
    if rank() == 0:
        if log and "loss_saved" in log[-1]:
            trained, saved, kept = (log[-1][key] for key in ("loss_trained", "loss_saved", "saved_dtype"))
            out.print(f"First batch from zero: {trained:.4f} nats as trained, {saved:.4f} as saved ({kept}).")
        losses = [entry["loss"] for entry in log if "loss" in entry]
        learnt = f", loss {losses[0]:.3f} -> {losses[-1]:.3f}" if losses else ""
        if skipped := skipped_in(log):
            rows = sum(entry["states_dropped"] for entry in skipped)
            out.print(
                f"{len(skipped)} steps were not finite and are skipped; the states of {rows} rows dropped."
            )
        done = log[-1]["step"] if log else options.steps
        out.print(f"{done} steps in {seconds:.0f} s{rate}{learnt}: {output}")
        if push_to_hub is not None:
            out.print(push(output, push_to_hub))


def skipped_in(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries of steps that were not finite and at which states were dropped."""
    return [entry for entry in log if "not_finite_step" in entry]


def read_settings(file: Path) -> dict[str, Any]:
    """Read the settings of a JSON file by their names."""
    from longroll.errors import LongrollError
    from longroll.results import read_json

    found = read_json(file)
    if not isinstance(found, dict):
        raise LongrollError(
            f'`fsdp_config` {file} is no object of settings: {{"reshard_after_forward": true}}.'
        )
    return found


def check_read(context: typer.Context, *interventions: str) -> None:
    """Refuse flags that none of some interventions reads.

    Raises:
        LongrollError: naming the flag.
    """
    from longroll.errors import LongrollError

    wrong = [unread(context, "intervention", name, READ_BY_INTERVENTION) for name in interventions]
    if all(wrong):
        raise LongrollError(f"{wrong[0][0]}: leave it out.")


def given(context: typer.Context, **values: Any) -> dict[str, Any]:
    """Return those of some values whose flags are on the command line."""
    sources = {name: context.get_parameter_source(name) for name in values}
    return {name: value for name, value in values.items() if getattr(sources[name], "name", "") != "DEFAULT"}


def run_posttrain(lm, corpus, intervention, options, output, **more: Any):
    """Run `longroll.posttrain` with a progress bar; return the result and the seconds that it took."""
    import time

    from longroll.cli._progress import progress, training_progress
    from longroll.interventions.recipes import NAMES
    from longroll.training import posttrain

    began = time.perf_counter()
    name = "zero states" if intervention is None else type(intervention).__name__
    if isinstance(intervention, str):
        name = NAMES.get(intervention, f"states of recipe {intervention}")
    with progress(f"training from {name}", total=options.steps) as advance:
        callbacks = [training_progress(advance, tokens=options.tokens // options.steps)]
        log = posttrain(lm, corpus, intervention, options, output, callbacks=callbacks, **more)
    return log, time.perf_counter() - began
