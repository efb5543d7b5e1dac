"""The repair: a few hundred steps in which only the initial state is new."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainerState, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME

from longroll import ranks
from longroll.checkpoint import Checkpoint
from longroll.data import (
    ChatCorpus,
    ChatLanes,
    ChatWindows,
    Corpus,
    Lanes,
    Tokenizer,
    Windows,
    check_vocabulary,
)
from longroll.data.windows import Item
from longroll.errors import LongrollError
from longroll.families._rope import RopeScaling, scale_rope
from longroll.families.int8 import restore
from longroll.files import Lock
from longroll.history import record
from longroll.interventions import TBPTT, Intervention, intervention_of
from longroll.interventions.recipes import RECIPES
from longroll.launcher import end_with_launcher
from longroll.measure.held_out import HeldOutData, Reading
from longroll.model import RecurrentLM
from longroll.training import checkpoints, sharding
from longroll.training.card import model_card
from longroll.training.faults import faults_are_said
from longroll.training.guard import check_loss, check_weights
from longroll.training.identity import check_same_everywhere, check_same_run, describe_run, settings_of
from longroll.training.lora import with_lora
from longroll.training.options import (
    PosttrainOptions,
    autocasts,
    check_sizes,
    settled,
    trainer_arguments,
    trains_on,
)
from longroll.training.output import FOLDER, begin, goes_on, is_done, left_as_found
from longroll.training.recipe import by_recipe
from longroll.training.refusals import check_settings
from longroll.training.saving import (
    batch_loss,
    check_original,
    opened_as,
    reread,
    save_checkpoint,
    save_original,
)
from longroll.training.stop import asked, stops_between_steps
from longroll.training.trainer import InitialStateTrainer
from longroll.training.until_healthy import Look, Tell, UntilHealthy, keep_best, look
from longroll.training.weights import (
    in_16_bits,
    train_only,
    trained_parameters,
    widen,
)

logger = logging.getLogger("longroll")


def posttrain(
    lm: RecurrentLM,
    corpus: Corpus | Dataset[Item],
    intervention: Intervention | str | None,
    options: PosttrainOptions,
    output: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    resume: bool = False,
    callbacks: list[TrainerCallback] | None = None,
    held_out: HeldOutData | None = None,
    force: bool = False,
    tell: Tell = logger.info,
    finish: Callable[[list[dict[str, Any]]], object] | None = None,
) -> list[dict[str, Any]]:
    """Post-train `lm` in place and save it to `output`, by default as an ordinary HF checkpoint.

    Under torchrun or accelerate launch N processes train together, each on its own rows: `batch_size` rows on
    each of them are N times `batch_size` rows on one.

    By `fsdp`, or accelerate's setting, each process holds a shard of the weights; `lm` may lie on the CPU and
    its shards on the GPUs. Afterwards `lm` is the trained model on rank 0 only, on the CPU: open `output`.

    A model in 8 bits (`load(..., dtype="int8")`) trains adapters, which are merged into the weights before
    8 bits. Afterwards `lm` holds these on the CPU.

    Args:
        lm: the model.
        corpus: tokenised training text or conversations; or rows of a task (`longroll.tasks`), read in their
            order.
        intervention: an intervention; "longroll" or "paper": what this recipe takes for the text, with its
            settings (`longroll.training.by_recipe`); a short name ("sp", "tbptt", "fitted", "random"): that
            intervention as the paper has it; None or "none": the plain control.
        options: how.
        output: the folder; what is needed to resume lies in `output`/checkpoints until the run is done.
        tokenizer: saved beside the model.
        resume: go on from the last whole checkpoint there, if there is one, by the same options.
        callbacks: callbacks for HF Trainer.
        held_out: data that training does not read (`longroll.training.HeldOut.from_corpus`). A model that
            holds on them is declined; `until_healthy` measures them.
        force: train a model even if it holds.
        tell: called with what is seen of `held_out` and with what is trained, a sentence at a time.
        finish: called on rank 0 with the log when the model is saved, before the run can no longer be
            resumed: a run that is killed in it is finished by `resume`.

    Returns:
        Trainer's log, an entry every 10 steps or sooner; empty for a run that was killed when all was done.

    Raises:
        LongrollError: for text that does not fit the model, a `format` that the model did not come in, an
            output that holds another model or cannot be written, too little text, a run resumed with another
            model, text or other options, a full disk, a loss that is not finite, and a `rope_scaling` of a
            model whose attention reads no RoPE config.
        Declined: for a model that holds on `held_out`.
        NoGain: where no checkpoint is better within `price`; `lm` then has the weights of the last step.
    """
    end_with_launcher()
    if sharding.asked():
        options = replace(options, fsdp=True)
    if options.fsdp:
        if lm.int8:
            raise LongrollError("`dtype` int8 does not go with `fsdp`, which shards weights: leave one out.")
        sharding.check_launch()
    if isinstance(intervention, str) and intervention in RECIPES:
        prepared = by_recipe(lm, corpus, options, recipe=intervention)
        intervention, options = prepared.intervention, prepared.options
    intervention = intervention_of(intervention)
    options = settled(options)
    output = Path(output)
    source = lm.checkpoint or Checkpoint(Path(), lm.model.dtype)
    check_settings(lm, options, intervenes=intervention is not None)
    if options.format == "original":
        check_original(source)
    place = opened_as(output, source, options.format)
    folder = output / FOLDER
    ranks.join_training(trains_on(lm, options))
    arguments = trainer_arguments(lm, options, folder)
    chosen = {"intervention": getattr(intervention, "name", "none")} | settings_of(intervention)
    check_same_everywhere(vars(options) | chosen | {"resume": resume})
    lock = Lock(folder)
    if ranks.on_first(lambda: is_done(output, place, resume, lock)):
        return []
    resumes = ranks.on_first(lambda: goes_on(output, resume))
    if options.until_healthy and held_out is None:
        raise LongrollError("`until_healthy` needs `held_out`: text that training does not read.")
    check_sizes(lm, options, arguments.device)
    if isinstance(corpus, Corpus):
        check_vocabulary(corpus.max_id, lm.vocab_size, tokenizer=corpus.tokenizer)
    data = _rows_of(corpus, intervention, options) if isinstance(corpus, Corpus) else corpus
    seen, narrow = None, autocasts(lm, options) or any(map(in_16_bits, lm.parameters()))
    if held_out is not None and intervention is not None and not (force or resumes or options.fsdp):
        seen = look(lm, held_out, tell)
    if options.rope_scaling is not None:
        scale_rope(lm.model, RopeScaling.parse(options.rope_scaling), options.length)
    watched = held_out if options.until_healthy else None
    started = describe_run(lm, corpus, options, intervention, ranks.world_size(), held_out=watched)
    # in 16 bits the look read in another precision than training has
    before = None if narrow or options.rope_scaling is not None else seen
    check_same_everywhere({name: started[name] for name in ("text", "tokenizer", "data", "held_out")})
    if resumes:
        ranks.on_first(lambda: check_same_run(checkpoints.described_by(folder), started))
    kept: dict[str, Any] = {}
    with (
        _given_back(lm) as adapters,
        left_as_found(output, lock),
        faults_are_said(output, lm, options),
        _same_bits(options.deterministic),
    ):
        set_seed(options.seed)  # of the adapters
        model: Any = lm.adapted or with_lora(lm.model, options.lora_rank)
        adapted, replaced = model is not lm.model, "forward" in vars(model)
        adapters += [model] if adapted and lm.adapted is None else []
        train_only(model, options.trainable or "all")
        tell(trained_parameters(model, options.trainable or "all"))
        if options.bf16 is False:
            widen(model)
        trainer = InitialStateTrainer(
            model,
            arguments,
            intervention=intervention,
            decay_speed=options.decay_speed,  # type: ignore[arg-type]
            cuda_graphs=options.cuda_graphs,
            weights=options.weights,
            on_not_finite=options.on_not_finite,
            train_dataset=data,
            callbacks=[*([Look(seen)] if seen else []), *(callbacks or [])],
        )
        empty = sharding.skeleton(model) if trainer.is_fsdp_enabled else None
        trainer.remove_callback(PrinterCallback)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):  # its default lies in the checkpoints, which go
                callback.logging_dir = callback.logging_dir or str(output / "runs")
        ranks.on_first(lambda: begin(output, place, started, resume, lock))
        with stops_between_steps():
            _train(trainer, options, watched, tell, resumes, before)
        if watched is not None:
            kept = keep_best(trainer, options.price, tell)
        check_weights(model)
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # else `lm` goes on in bfloat16
        if not replaced:  # accelerate leaves the forward of the class there, without its decorators
            vars(model).pop("forward", None)
        lm.eval()
        batch = next(iter(trainer.get_train_dataloader()))
        mixed = options.weights == "bf16"  # which only autocast reads
        with trainer.accelerator.autocast() if mixed else contextlib.nullcontext():
            trained = batch_loss(trainer.lm, batch) if empty is None else trainer.loss_from_zero(batch)
        check_loss(trained, batch["shift_labels"])
        if empty is not None:
            found = sharding.whole(empty, trainer.model)
            model = model if found is None else found
        was_int8 = lm.int8
        if was_int8:
            restore(model)
            model.to("cpu")  # where these weights are
        if empty is None or trainer.is_world_process_zero():
            lm.model = model.merge_and_unload() if adapted else model
            lm.adapted = None
        if trainer.is_world_process_zero():
            lm.model.config.train_length = options.length  # so that the next diagnosis knows it
            started["arguments"] |= kept
            record(lm.model.config, started["arguments"])
            with checkpoints.aside(output) as partial:
                if options.format == "original":
                    save_original(lm.model, partial, source)
                else:
                    save_checkpoint(lm.model, partial, source)
                layout = source.layout if options.format == "original" else "transformers"
                (partial / "README.md").write_text(model_card(lm, started, layout), encoding="utf-8")
                if tokenizer is not None:
                    tokenizer.save(partial)
            if not lm.own:  # which only its plug-in opens
                dtype = source.dtype or lm.model.dtype
                losses = reread(place, arguments.device, dtype, batch, trained, in_int8=was_int8)
                trainer.state.log_history[-1].update(losses)
            if mixed:
                lm.model.to(torch.bfloat16)  # type: ignore[arg-type]
            trainer.state.log_history[-1].update(kept)
            if finish is not None:
                finish(list(trainer.state.log_history))
            lock.release()  # a network file system keeps a file that is open
            checkpoints.remove(folder)
    trainer.accelerator.wait_for_everyone()  # a launcher ends the rank that saves when another fails at exit
    return list(trainer.state.log_history)


@contextlib.contextmanager
def _given_back(lm: RecurrentLM) -> Iterator[list[Any]]:
    """Have a run, however it ends, leave the parameters of `lm` trainable that were so before.

    Yields a list for the model that the run put adapters into, which come out where the run ends early.
    """
    trainable = {name for name, p in lm.model.named_parameters() if p.requires_grad}
    adapters: list[Any] = []
    try:
        yield adapters
    except BaseException:
        for model in adapters:
            model.unload()
        raise
    finally:
        for name, parameter in lm.model.named_parameters():
            if name in trainable and not parameter.requires_grad:
                parameter.requires_grad_()


def _rows_of(corpus: Corpus, intervention: Intervention | None, options: PosttrainOptions) -> Dataset[Item]:
    """Return rows of text, in the order in which they are read."""
    steps, rows = options.steps * options.accumulation, options.batch_size * ranks.world_size()
    chat = isinstance(corpus, ChatCorpus)
    if not isinstance(intervention, TBPTT):
        windows: Any = ChatWindows if chat else Windows
        texts: Dataset[Item] = windows(corpus, options.length, seed=options.seed, num_items=steps * rows)
        return texts
    if corpus.tokens < rows * options.length:
        raise LongrollError(
            f"{rows} rows of {options.length} tokens want {rows * options.length} tokens of text, and "
            f"there are {corpus.tokens}: give more text, or a smaller `batch_size`."
        )
    lanes: Any = ChatLanes if chat else Lanes
    dealt: Dataset[Item] = lanes(corpus, options.length, rows, steps=steps, seed=options.seed)
    return dealt


def _train(
    trainer: InitialStateTrainer,
    options: PosttrainOptions,
    held_out: HeldOutData | None,
    tell: Tell,
    resumes: bool,
    before: Reading | None,
) -> None:
    """Train to the end, or as far as held-out data call for; raise what a signal would have."""
    watch = None
    if held_out is not None:
        every, price = options.measure_steps, options.price
        watch = UntilHealthy(trainer, held_out, price=price, every=every, tell=tell, before=before)
        trainer.add_callback(watch)
        newest = ranks.on_first(lambda: checkpoints.newest_whole(Path(trainer.args.output_dir or "")))
        if resumes and newest is not None:
            trainer.state = TrainerState.load_from_json(str(newest / TRAINER_STATE_NAME))
            if watch.decision().stop:  # it was killed after its last step
                trainer._load_from_checkpoint(str(newest))
                return
    trainer.train(resume_from_checkpoint=resumes)
    ended = watch is not None and watch.decision().stop is not None
    if trainer._guard.stop and trainer.state.global_step < options.steps and not ended:
        if asked() in (0, signal.SIGINT):  # 0: another rank was asked
            raise KeyboardInterrupt
        raise SystemExit(128 + asked())


@contextlib.contextmanager
def _same_bits(wanted: bool) -> Iterator[None]:
    """Have every operation that can add in one order do so; others warn."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
