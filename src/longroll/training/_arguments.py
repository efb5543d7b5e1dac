"""What becomes of each argument of transformers' Trainer: one table, so that nothing is ignored in silence.

A `tested` field has a test in tests/training with a value that is not its default. A `neutral` field changes
no loss, gradient or state that longroll computes. A `refused` field ends the run before its first step unless
it has its default value; its reason says what to do instead. A field that is not in the table, as one of a
newer transformers, is refused in the same way. The table covers transformers 5.22 to 5.24; 5.22 has no
`activation_checkpointing` and no `activation_checkpointing_kwargs`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from longroll.errors import LongrollError

Verdict = Literal["tested", "neutral", "refused"]


class Row(NamedTuple):
    """What becomes of an argument, and why; for a refused one, what to do instead."""

    verdict: Verdict
    reason: str


def _rows(verdict: Verdict, reason: str, names: str) -> dict[str, Row]:
    return {name: Row(verdict, reason) for name in names.split()}


TRAINING_ARGUMENTS: dict[str, Row] = {
    # ---- what a step computes
    "label_smoothing_factor": Row("tested", "the loss is transformers' LabelSmoother"),
    "neftune_noise_alpha": Row("tested", "a hook on the embedding adds the noise"),
    "bf16": Row("tested", "autocast; the recurrence keeps its state in float32"),
    "fp16": Row("neutral", "autocast and a loss scale, on a GPU only; no test has seen it"),
    "gradient_accumulation_steps": Row("tested", "a state in and a state out for each micro-batch"),
    "average_tokens_across_devices": Row("tested", "the loss is divided by the tokens of all ranks"),
    **_rows("tested", "layers run again in backward, from the same state", "gradient_checkpointing"),
    **_rows("tested", "layers run again in backward, from the same state", "activation_checkpointing"),
    **_rows(
        "tested",
        "use_reentrant=True loses the gradient into the state and is refused; other entries are kept",
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs",
    ),
    **_rows(
        "refused",
        "torch.compile reuses a graph that was traced without a state: train without it, or pass "
        "`cuda_graphs`",
        "torch_compile torch_compile_backend torch_compile_mode",
    ),
    **_rows(
        "refused",
        "Liger-Kernel replaces forwards that carry the state: leave it out; the loss here is fused already",
        "use_liger_kernel liger_kernel_config",
    ),
    "parallelism_config": Row(
        "refused", "a sequence split over ranks has no single initial state: spread rows by DDP or FSDP"
    ),
    "deepspeed": Row("refused", "no run with a state under DeepSpeed has been seen: use DDP or FSDP"),
    "fsdp": Row("tested", "FSDP2 shards weights; states stay with the rows of their process"),
    "fsdp_config": Row("tested", "its keys have a table of their own"),
    "ddp_static_graph": Row(
        "refused", "the first step, which has no state yet, has another graph than the rest: leave it out"
    ),
    "use_cache": Row("neutral", "the state travels in longroll's cache"),
    # ---- which rows a step reads
    "per_device_train_batch_size": Row("tested", "rows that take a state in a micro-batch"),
    "train_sampling_strategy": Row(
        "tested", "ragged rows are padded with a mask; data with lanes are read in order, or refused"
    ),
    "length_column_name": Row("neutral", "names the column that sampling by length reads"),
    "auto_find_batch_size": Row(
        "refused", "a restart with fewer rows would leave states of other rows behind: set the batch size"
    ),
    "dataloader_in_order": Row("refused", "states follow the order of batches: leave it at True"),
    "label_names": Row("refused", "the loss reads `labels` or `shift_labels`: rename the column to labels"),
    "remove_unused_columns": Row(
        "tested", "longroll drops columns itself, with one notice (training/_batch.py)"
    ),
    "accelerator_config": Row("tested", "its fields have a table of their own"),
    **_rows(
        "neutral",
        "how rows are loaded, not which",
        "dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context ignore_data_skip",
    ),
    **_rows("neutral", "how long training is", "num_train_epochs max_steps"),
    **_rows(
        "neutral", "seeds; states are drawn by the intervention's own", "seed data_seed full_determinism"
    ),
    # ---- how weights move
    "weight_decay": Row("tested", "shrinks matrices only"),
    **_rows(
        "neutral",
        "the optimizer and its schedule work on gradients alone",
        "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args adam_beta1 "
        "adam_beta2 "
        "adam_epsilon optim_target_modules max_grad_norm",
    ),
    # ---- where and how fast
    **_rows("neutral", "the device and its arithmetic", "use_cpu tf32 torch_empty_cache_steps local_rank"),
    **_rows(
        "neutral",
        "how ranks talk to each other",
        "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_backend ddp_timeout",
    ),
    "ddp_find_unused_parameters": Row(
        "neutral", "None is True; False adds in another order after a resumed run's first step"
    ),
    # ---- evaluation, which starts from the zero state
    **_rows(
        "neutral",
        "when and over which batches evaluation runs, always from the zero state",
        "eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start "
        "eval_accumulation_steps "
        "eval_do_concat_batches eval_use_gather_object batch_eval_metrics include_for_metrics",
    ),
    **_rows("neutral", "evaluation in another precision, as in Trainer", "bf16_full_eval fp16_full_eval"),
    "prediction_loss_only": Row("neutral", "logits are not kept"),
    # ---- what is said and saved
    **_rows(
        "neutral",
        "logging",
        "logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter "
        "include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project "
        "trackio_space_id trackio_bucket_id trackio_static_space_id skip_memory_metrics debug",
    ),
    **_rows("tested", "a checkpoint also holds the intervention's memory", "save_strategy save_steps"),
    "enable_jit_checkpoint": Row(
        "refused",
        "it saves in the midst of a step, with the states of the next one: use "
        "`longroll.training.stops_between_steps`",
    ),
    "save_only_model": Row(
        "neutral", "such a checkpoint has neither optimizer nor states, and resuming says so"
    ),
    **_rows(
        "neutral",
        "where checkpoints go, and which are kept",
        "output_dir save_on_each_node save_total_limit load_best_model_at_end "
        "metric_for_best_model greater_is_better restore_callback_states_from_checkpoint push_to_hub "
        "hub_token "
        "hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
    ),
    **_rows(
        "neutral", "read by scripts, not by Trainer", "do_train do_eval do_predict resume_from_checkpoint"
    ),
}
"""The fields of `transformers.TrainingArguments`."""

ACCELERATOR_CONFIG: dict[str, Row] = {
    "split_batches": Row("refused", "it divides the rows of a rank: set per_device_train_batch_size instead"),
    "dispatch_batches": Row("neutral", "which process reads the rows"),
    "even_batches": Row("neutral", "fills the last batch of an epoch"),
    "use_seedable_sampler": Row("neutral", "the generator of the order of rows"),
    "non_blocking": Row("neutral", "copies to the device"),
    "gradient_accumulation_kwargs": Row(
        "neutral", "num_steps is gradient_accumulation_steps; the rest is DDP's"
    ),
    "use_configured_state": Row("neutral", "whose settings of processes are taken"),
}
"""The fields of `accelerator_config` (transformers' AcceleratorConfig)."""

FSDP_CONFIG: dict[str, Row] = {
    "version": Row("tested", "2; FSDP1 flattens the weights that states are computed by, and is refused"),
    "reshard_after_forward": Row(
        "tested", "False: weights stay gathered until backward, which takes more memory"
    ),
    "activation_checkpointing": Row("tested", "layers run again in backward, from the same state"),
    "state_dict_type": Row("tested", "how checkpoints to resume from hold the weights"),
    **_rows(
        "tested",
        "which modules are sharded together; by default the layers",
        "auto_wrap_policy transformer_layer_cls_to_wrap min_num_params",
    ),
    "cpu_ram_efficient_loading": Row(
        "neutral", "every process reads and checks the model, then takes the weights of the first"
    ),
    "cpu_offload": Row(
        "refused", "no run with weights on the CPU and states on a GPU has been seen: use more processes"
    ),
    **_rows(
        "refused",
        "PyTorch/XLA has not been seen with states: leave it out",
        "xla xla_fsdp_v2 xla_fsdp_settings xla_fsdp_grad_ckpt",
    ),
    **_rows(
        "refused",
        "a setting of FSDP1, which FSDP2 does not read: leave it out",
        "forward_prefetch backward_prefetch use_orig_params sync_module_states limit_all_gathers",
    ),
}
"""The keys of `fsdp_config`, also with the prefix `fsdp_`; `mixed_precision` and others are unknown."""

TRAINER: dict[str, Row] = {
    "model": Row("tested", "a model, its folder or hub id, peft's wrapper of one, or a RecurrentLM"),
    "args": Row("tested", "its fields have a table of their own"),
    "data_collator": Row("tested", "the keys of its batches are honoured or refused by name"),
    "train_dataset": Row("tested", "rows of token ids; with `lanes` they are read in order"),
    "eval_dataset": Row("tested", "evaluation starts from the zero state"),
    "processing_class": Row("tested", "pads ragged rows with a mask, and is saved beside the model"),
    "model_init": Row("refused", "a state belongs to one model: build the model and pass it as `model`"),
    "compute_loss_func": Row("tested", "called with (outputs, labels, num_items_in_batch)"),
    "compute_metrics": Row("tested", "sees logits and labels in Trainer's own convention"),
    "callbacks": Row("tested", "as in Trainer"),
    "optimizers": Row("neutral", "work on gradients alone"),
    "optimizer_cls_and_kwargs": Row("neutral", "work on gradients alone"),
    "preprocess_logits_for_metrics": Row("tested", "as in Trainer"),
}
"""The arguments of `transformers.Trainer`."""


def check_training_arguments(args: TrainingArguments, owners: Collection[str] = ()) -> None:
    """Refuse what would be ignored or would break the chain of states.

    Args:
        args: the arguments of the run.
        owners: packages whose own fields, in subclasses of TrainingArguments, their trainer reads.

    Raises:
        LongrollError: for a refused or unknown field of `args` or of its `accelerator_config` that does not
            have its default value, and for reentrant checkpointing.
    """
    _check(args, TRAINING_ARGUMENTS, type(args).__name__, owners)
    if isinstance(args.accelerator_config, AcceleratorConfig):
        _check(args.accelerator_config, ACCELERATOR_CONFIG, "accelerator_config")
    if args.fsdp or args.fsdp_config:
        _check_fsdp(args)
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if (getattr(args, name, None) or {}).get("use_reentrant"):
            raise LongrollError(
                f"{name}={{'use_reentrant': True}} loses the gradient into the state: leave use_reentrant "
                "out."
            )


def check_trainer_arguments(arguments: dict[str, Any], host: str) -> None:
    """Refuse arguments of Trainer's constructor that are refused or unknown.

    Args:
        arguments: those that were given, by name; those of a host's own are its own affair.
        host: the class that was called, for the message.

    Raises:
        LongrollError: for a refused or unknown argument that is not None.
    """
    for name in inspect.signature(Trainer.__init__).parameters:
        row = TRAINER.get(name)
        if arguments.get(name) is not None and (row is None or row.verdict == "refused"):
            raise LongrollError(f"{host}({name}=...) cannot be honoured: {_why(row)}.")


def _check(given: Any, table: dict[str, Row], where: str, owners: Collection[str] = ()) -> None:
    found: dict[Row | None, list[str]] = {}
    for field in dataclasses.fields(given):
        row, value = table.get(field.name), getattr(given, field.name)
        if row is None and _package(type(given), field.name) in owners:
            continue
        if (row is None or row.verdict == "refused") and not _is_default(value, field):
            found.setdefault(row, []).append(f"{field.name}={value!r}")
    for row, names in found.items():
        raise LongrollError(f"{where}({', '.join(names)}) cannot be honoured: {_why(row)}.")


def _check_fsdp(args: TrainingArguments) -> None:
    if not args.fsdp:
        raise LongrollError("`fsdp_config` has no effect without `fsdp`: set fsdp=True, or leave it out.")
    settings: Any = args.fsdp_config or {}  # transformers has read a file
    for key, value in settings.items():
        row = FSDP_CONFIG.get(key)
        if row is None or (row.verdict == "refused" and value not in (False, None, {})):
            raise LongrollError(f"`fsdp_config` {key} {value!r} cannot be honoured: {_why(row)}.")
        if key == "version" and int(value) != 2:
            raise LongrollError(f"`fsdp_config` {key} {value!r} cannot be honoured: {_why(row)}.")


def _package(kind: type, field: str) -> str:
    """Return the package of the class that declares a field."""
    owner = next(base for base in reversed(kind.__mro__) if field in vars(base).get("__annotations__", ()))
    return owner.__module__.partition(".")[0]


def _why(row: Row | None) -> str:
    return row.reason if row else "this version of longroll does not know it; leave it out"


def _is_default(value: Any, field: dataclasses.Field[Any]) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        same: bool = value == field.default_factory()
        return same
    empty = not value and not field.default  # None and False, which `__post_init__` may exchange
    return empty or value == field.default or (field.name, value) == ("label_names", ["labels"])
