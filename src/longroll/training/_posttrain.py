"""The repair: a few hundred steps in which only the initial state is new."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SchedulerType

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
from longroll.families._rope import RopeScaling, check_scalable, scale_rope
from longroll.files import try_folder
from longroll.history import record
from longroll.interventions import TBPTT, Intervention, intervention_of
from longroll.interventions.recipes import RECIPES, Settings
from longroll.measure.advice import WORTH_SAVING
from longroll.measure.held_out import HeldOutData
from longroll.memory import check_micro_batch
from longroll.model import RecurrentLM
from longroll.results import write_json
from longroll.training import checkpoints, sharding
from longroll.training.card import model_card
from longroll.training.guard import Guard, OnNotFinite, check_weights
from longroll.training.identity import check_same_run, describe_run
from longroll.training.plan import fitting_line
from longroll.training.recipe import by_recipe
from longroll.training.saving import (
    FORMATS,
    batch_loss,
    check_original,
    opened_as,
    reread,
    save_checkpoint,
    save_original,
)
from longroll.training.stop import asked, stops_between_steps
from longroll.training.trainer import InitialStateTrainer
from longroll.training.until_healthy import Tell, UntilHealthy, keep_best, look
from longroll.training.weights import TRAINABLE, WEIGHTS, has_bf16, in_16_bits, train_only, widen

logger = logging.getLogger("longroll")

REPORTERS = ("none", "tensorboard", "wandb", "mlflow")
_STARTED = "run.json"
_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"
_FULL = ("No space left", "File too large", "Disk quota", "PytorchStreamWriter failed", "unexpected pos")

_READ_BARE = ["dt_proj", "out_proj", "x_proj.2"]
"""Projections whose weights the mixers of Mamba and RWKV-6 or their kernels read past any adapter."""


@dataclass(frozen=True)
class PosttrainOptions:
    """How to post-train. The paper gives 500 steps at the original length and leaves the rest open."""

    length: int
    """T, tokens of a sequence: the length the model was trained at."""
    steps: int = 500
    """Optimizer steps."""
    batch_size: int = 16
    """Rows of a micro-batch."""
    accumulation: int = 1
    """Micro-batches a step."""
    learning_rate: float | None = None
    """Peak of the schedule; None: the recipe's, 5e-4 without a recipe."""
    decay_speed: float | None = None
    """Learning rate of the decays (`A_log`, `dt_bias`) as a multiple of the others'; None: the recipe's, 1
    without a recipe."""
    schedule: str = "cosine"
    """transformers' name of the learning-rate schedule after the warm-up."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW's."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    bf16: bool | None = None
    """Autocast to bfloat16. None: where the model is in 16 bits, on a GPU that has bfloat16."""
    weights: str = "float32"
    """How trained weights are held: `float32`, or `bf16`, which loses small updates and saves memory."""
    gradient_checkpointing: bool = False
    """Trade compute for memory."""
    cuda_graphs: bool | None = None
    """Replay a step as one CUDA graph; None: where it is known to be right (`InitialStateTrainer`)."""
    deterministic: bool = False
    """Have a GPU give the same bits each time (`torch.use_deterministic_algorithms`), somewhat slower."""
    fsdp: bool = False
    """Shard weights, gradients and the optimizer's moments over the processes of a launcher (FSDP2)."""
    fsdp_config: dict[str, Any] | None = None
    """Settings of FSDP2: transformers' `fsdp_config`, of which `longroll.training._arguments` has a table."""
    lora_rank: int = 0
    """Train LoRA adapters of this rank on the linear layers and merge them; 0: train the weights."""
    trainable: str | None = None
    """Which parameters are trained: `all`; `scales`, all but the matrices; `decays`. None: the recipe's, all
    without a recipe."""
    save_steps: int = 100
    """A checkpoint to resume from every so many steps."""
    report_to: str = "none"
    """Where Trainer sends its log too: tensorboard (`output`/runs), wandb, mlflow; none."""
    rope_scaling: str | None = None
    """Scale the rotary positions of attention: `linear:F`, `ntk:F` or `yarn:F`, F above 1."""
    format: str = "transformers"
    """Whose layout is written: `transformers`, or `original` for state-spaces or BlinkDL."""
    seed: int = 0
    """Seed of the data order."""
    recipe: str | None = None
    """The recipe that the run was prepared by (`longroll.training.by_recipe`)."""
    on_not_finite: OnNotFinite = "stop"
    """At a step whose loss, state or gradient is not finite: `stop`, or `drop` the carried states at fault,
    skip the step, and go on."""
    until_healthy: bool = False
    """Measure held-out data as the run goes, keep the best checkpoint, end when nothing is left to gain."""
    price: float = WORTH_SAVING
    """Nats in range that the checkpoint kept by `until_healthy` may cost against the model before."""
    measure_steps: int = 50
    """Steps between two measures of `until_healthy`."""

    def __post_init__(self) -> None:
        for name in ("length", "steps", "batch_size", "accumulation", "save_steps", "measure_steps"):
            if getattr(self, name) < 1:
                raise LongrollError(f"`{name}` {getattr(self, name)} must be at least 1.")
        for name in ("weight_decay", "clip", "lora_rank", "price"):
            if not 0 <= getattr(self, name) < math.inf:
                raise LongrollError(f"`{name}` {getattr(self, name)} must be 0 or above.")
        for name in ("learning_rate", "decay_speed"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise LongrollError(f"`{name}` {getattr(self, name)} must be above 0.")
        if self.schedule not in list(SchedulerType):
            known = ", ".join(SchedulerType)
            raise LongrollError(f"`schedule` {self.schedule} is not one transformers knows: {known}.")
        if self.weights not in WEIGHTS:
            raise LongrollError(f"`weights` {self.weights} is not one of {', '.join(WEIGHTS)}.")
        if self.trainable is not None and self.trainable not in TRAINABLE:
            raise LongrollError(f"`trainable` {self.trainable} is not one of {', '.join(TRAINABLE)}.")
        if self.trainable not in (None, "all") and self.lora_rank:
            raise LongrollError(
                f"`trainable` {self.trainable} does not go with `lora_rank`: leave one of them out."
            )
        if self.weights == "bf16" and (self.lora_rank or self.bf16 is False):
            raise LongrollError("`weights` bf16 goes neither with `lora_rank` nor without autocast (`bf16`).")
        Guard(self.on_not_finite)  # refuses others
        if self.format not in FORMATS:
            raise LongrollError(f"`format` {self.format} is not one of {', '.join(FORMATS)}.")
        if self.rope_scaling is not None:
            RopeScaling.parse(self.rope_scaling)
        _check_reporter(self.report_to)
        if self.fsdp_config is not None and not self.fsdp:
            raise LongrollError("`fsdp_config` has no effect without `fsdp`: give both, or neither.")
        if self.fsdp and self.weights == "bf16":
            raise LongrollError(
                "`weights` bf16 does not go with `fsdp`, which wants weights of one precision: leave one out."
            )
        if self.tokens >= 2**62:
            raise LongrollError(
                "`steps` x `accumulation` x `batch_size` x `length` is more than can be counted: "
                f"{self.tokens:,} tokens."
            )
        if not 0 <= self.warmup <= 1:
            raise LongrollError(f"`warmup` {self.warmup} is a share of the steps: 0 to 1.")

    @property
    def tokens(self) -> int:
        """Tokens that each process reads."""
        return self.steps * self.accumulation * self.batch_size * self.length


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
        tell: called with what is seen of `held_out`, a sentence at a time.
        finish: called on rank 0 with the log when the model is saved, before the run can no longer be
            resumed: a run that is killed in it is finished by `resume`.

    Returns:
        Trainer's log, an entry every 10 steps or sooner; empty for a run that was killed when all was done.

    Raises:
        LongrollError: for text that does not fit the model, a `format` that the model did not come in, an
            output that holds another model or cannot be written, too little text, a run resumed with another
            model, text or other options, a full disk, a loss that is not finite, and a `rope_scaling` of a
            model whose attention reads no RoPE config.
        Declined: for a model that holds on `held_out`, and where no checkpoint is better within `price`.
    """
    _check_adapters(lm, options)
    if sharding.asked():
        options = replace(options, fsdp=True)
    if options.fsdp:
        sharding.check_launch()
    if isinstance(intervention, str) and intervention in RECIPES:
        prepared = by_recipe(lm, corpus, options, recipe=intervention)
        intervention, options = prepared.intervention, prepared.options
    intervention = intervention_of(intervention)
    options = _settled(options)
    output = Path(output)
    source = lm.checkpoint or Checkpoint(Path(), lm.model.dtype)
    if options.rope_scaling is not None:
        check_scalable(lm.model)
    if options.format == "original":
        check_original(source)
    place = opened_as(output, source, options.format)
    folder = output / "checkpoints"
    arguments = _arguments(lm, options, folder)  # the processes meet here
    if ranks.on_first(lambda: _is_done(output, place, resume)):
        return []
    goes_on = ranks.on_first(lambda: resume and checkpoints.any_in(folder))
    _check_held_out(held_out, options)
    check_micro_batch(lm, options.batch_size, options.length, arguments.device)
    if held_out is not None and intervention is not None and not (force or goes_on or options.fsdp):
        look(lm, held_out, tell)
    if isinstance(corpus, Corpus):
        check_vocabulary(corpus.max_id, lm.vocab_size, tokenizer=corpus.tokenizer)
    data = _rows_of(corpus, intervention, options) if isinstance(corpus, Corpus) else corpus
    if options.rope_scaling is not None:
        scale_rope(lm.model, RopeScaling.parse(options.rope_scaling), options.length)
    watched = held_out if options.until_healthy else None
    started = describe_run(lm, corpus, options, intervention, ranks.world_size(), held_out=watched)
    ranks.on_first(lambda: _start(folder, started, resume))
    set_seed(options.seed)  # of the adapters
    model: Any = lm.adapted or _with_lora(lm.model, options.lora_rank)
    adapted = model is not lm.model
    frozen = train_only(model, options.trainable or "all")
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
        callbacks=callbacks,
    )
    empty = sharding.skeleton(model) if trainer.is_fsdp_enabled else None
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):  # its default lies in the checkpoints, which go
            callback.logging_dir = callback.logging_dir or str(output / "runs")
    kept: dict[str, Any] = {}
    with _faults_are_said(output, lm, options), _same_bits(options.deterministic):
        with stops_between_steps():
            _train(trainer, options, watched, tell, goes_on)
        if watched is not None:
            kept = keep_best(trainer, options.price, tell)
        for parameter in frozen:
            parameter.requires_grad_()
        check_weights(model)
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # else `lm` goes on in bfloat16
        lm.eval()
        batch = next(iter(trainer.get_train_dataloader()))
        mixed = options.weights == "bf16"  # which only autocast reads
        with trainer.accelerator.autocast() if mixed else contextlib.nullcontext():
            trained = batch_loss(trainer.lm, batch) if empty is None else trainer.loss_from_zero(batch)
        if empty is not None:
            found = sharding.whole(empty, trainer.model)
            model = model if found is None else found
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
                losses = reread(place, arguments.device, dtype, batch, trained)
                trainer.state.log_history[-1].update(losses)
            if mixed:
                lm.model.to(torch.bfloat16)  # type: ignore[arg-type]
            trainer.state.log_history[-1].update(kept)
            if finish is not None:
                finish(list(trainer.state.log_history))
            checkpoints.remove(folder)
    trainer.accelerator.wait_for_everyone()  # a launcher ends the rank that saves when another fails at exit
    return list(trainer.state.log_history)


def _settled(options: PosttrainOptions) -> PosttrainOptions:
    """Return the options with what no recipe has set."""
    plain = Settings()
    rate = plain.learning_rate if options.learning_rate is None else options.learning_rate
    speed = plain.decay_speed if options.decay_speed is None else options.decay_speed
    return replace(
        options, learning_rate=rate, decay_speed=speed, trainable=options.trainable or plain.trainable
    )


def _arguments(lm: RecurrentLM, options: PosttrainOptions, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,  # type: ignore[arg-type]
        lr_scheduler_type=options.schedule,
        warmup_steps=round(options.warmup * options.steps),
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip,
        bf16=_autocasts(lm, options),
        gradient_checkpointing=options.gradient_checkpointing,
        use_cpu=_trains_on(lm, options).type == "cpu",
        fsdp=options.fsdp or None,  # type: ignore[arg-type]
        fsdp_config=options.fsdp_config,
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=2,
        logging_steps=max(1, min(10, options.steps // 10)),
        logging_first_step=True,
        logging_nan_inf_filter=False,  # the guard must see them
        report_to=options.report_to,
        disable_tqdm=True,
        seed=options.seed,
        train_sampling_strategy="sequential",
        dataloader_drop_last=True,
    )


def _check_adapters(lm: RecurrentLM, options: PosttrainOptions) -> None:
    if getattr(lm.model, "_hf_peft_config_loaded", False) and lm.adapted is None:
        raise LongrollError(
            "The model holds adapters that transformers put there, which would be saved without it: open "
            "their folder with longroll.load, or wrap the model with peft."
        )
    if lm.adapted is not None and options.lora_rank:
        raise LongrollError("`lora_rank`: the model has adapters already; leave it out, or merge them first.")


def _trains_on(lm: RecurrentLM, options: PosttrainOptions) -> torch.device:
    """Return where the weights are trained: shards of a model on the CPU go to the GPUs."""
    return torch.device("cuda") if options.fsdp and torch.cuda.is_available() else lm.device


def _autocasts(lm: RecurrentLM, options: PosttrainOptions) -> bool:
    if options.bf16 is None:
        return has_bf16(_trains_on(lm, options)) and any(in_16_bits(p) for p in lm.model.parameters())
    return options.bf16


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


def _check_reporter(name: str) -> None:
    if name not in REPORTERS:
        raise LongrollError(f"`report_to` {name} is not one of {', '.join(REPORTERS)}.")
    if name != "none" and find_spec(name) is None:
        raise LongrollError(f"`report_to` {name} needs a package that is not here: pip install {name}.")


def _with_lora(model: Any, rank: int) -> Any:
    if not rank:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise LongrollError("`lora_rank` needs peft: pip install 'longroll[lora]'.") from None
    linear = {name: id(m.weight) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    uses = Counter(linear.values())
    shared = [name for name, weight in linear.items() if uses[weight] > 1]  # would merge once for each use
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=_READ_BARE + shared
    )
    return get_peft_model(model, config)


def _is_done(output: Path, place: Path, resume: bool) -> bool:
    """Check that the run may begin, or go on; True where all that is left of it is to clean up."""
    folder = output / "checkpoints"
    interrupted, removing = folder.exists(), checkpoints.removal_of(folder).exists()
    if resume and removing and not interrupted:
        checkpoints.clear_partial(output)
        return True
    if ((output / "config.json").exists() or place.is_file()) and not (resume and interrupted):
        raise LongrollError(f"`output` {output} already holds a model: name another folder, or remove it.")
    if interrupted and not resume:
        raise LongrollError(
            f"`output` {output} holds an interrupted run: go on with it by `resume`, or name another folder."
        )
    try:
        try_folder(output)
    except OSError as error:
        raise LongrollError(f"`output` {output} cannot be written: {error.strerror}.") from None
    checkpoints.clear_partial(output)
    return False


def _start(folder: Path, started: dict[str, Any], resume: bool) -> None:
    """Note what the run is, or check that it is the one that goes on."""
    file = folder / _STARTED
    if resume and file.is_file():
        check_same_run(file, started)
    else:
        write_json(file, started)


def _check_held_out(held_out: HeldOutData | None, options: PosttrainOptions) -> None:
    if not options.until_healthy:
        return
    if held_out is None:
        raise LongrollError("`until_healthy` needs `held_out`: text that training does not read.")
    if options.fsdp:
        raise LongrollError(
            "`until_healthy` does not go with `fsdp`, whose weights are not whole on any rank."
        )


def _train(
    trainer: InitialStateTrainer,
    options: PosttrainOptions,
    held_out: HeldOutData | None,
    tell: Tell,
    goes_on: bool,
) -> None:
    """Train to the end, or as far as held-out data call for; raise what a signal would have."""
    watch = None
    if held_out is not None:
        watch = UntilHealthy(trainer, held_out, price=options.price, every=options.measure_steps, tell=tell)
        trainer.add_callback(watch)
        newest = ranks.on_first(lambda: checkpoints.newest_whole(Path(trainer.args.output_dir or "")))
        if goes_on and newest is not None:
            trainer.state = TrainerState.load_from_json(str(newest / TRAINER_STATE_NAME))
            if watch.decision().stop:  # it was killed after its last step
                trainer._load_from_checkpoint(str(newest))
                return
    trainer.train(resume_from_checkpoint=goes_on)
    ended = watch is not None and watch.decision().stop is not None
    if trainer.state.global_step < options.steps and not ended:  # a signal stopped it
        if asked() == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt


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


@contextlib.contextmanager
def _faults_are_said(output: Path, lm: RecurrentLM, options: PosttrainOptions) -> Iterator[None]:
    """One line for a full disk, too little memory, and another process that died."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or _NO_MEMORY in str(error):
            raise LongrollError(_what_would_fit(options) + fitting_line(lm, options)) from error
        if lost := ranks.loss_of_another(error):
            raise LongrollError(f"{lost} Go on by `resume`.") from error
        if not any(sign in str(error) for sign in _FULL):
            raise
        raise LongrollError(
            f"`output` {output} cannot be written to: {error}. Make room and go on by `resume`, where a "
            "checkpoint was written."
        ) from error


def _what_would_fit(options: PosttrainOptions) -> str:
    tokens = f"{options.batch_size} x {options.length} tokens"
    mends = []
    if options.batch_size > 1:
        half = options.batch_size // 2
        mends.append(f"`batch_size` {half} with `accumulation` {options.accumulation * 2}")
    if not options.gradient_checkpointing:
        mends.append("`gradient_checkpointing`")
    if not options.lora_rank:
        mends.append("`lora_rank` 16, which trains fewer weights")
    return f"Out of memory in a micro-batch of {tokens}: take {', or '.join(mends) or 'a smaller model'}."
