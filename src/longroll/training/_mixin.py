"""The state around the own step of a Trainer: transformers' Trainer, SFTTrainer of TRL, and yours."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from longroll.data import Windows
from longroll.errors import LongrollError
from longroll.families._family import Restart, is_sharded, unwrapped
from longroll.interventions import TBPTT, Intervention, intervention_of
from longroll.launcher import end_with_launcher
from longroll.model import RecurrentLM
from longroll.state import RecurrentState
from longroll.training import checkpoints, sharding, stop
from longroll.training._arguments import check_trainer_arguments, check_training_arguments
from longroll.training._batch import IGNORED, KNOWN, Rows, aligned, read_batch, row_starts
from longroll.training._live_check import LiveCheck
from longroll.training.guard import Guard, OnNotFinite, check_weights
from longroll.training.launch import check_launcher, check_placement
from longroll.training.refusals import check_recurrent
from longroll.training.weights import in_16_bits, projects
from longroll.training.whole import WholeCheckpointsMixin

logger = logging.getLogger("longroll")

_SEVERAL_TEXTS = ("DPO", "GRPO", "RLOO", "KTO", "ORPO", "CPO", "PPO", "Reward", "PRM", "GKD", "Distill")
"""How the names of TRL's trainers begin that read several texts for one loss."""

_WRAPPERS = re.compile(r"\b(_checkpoint_wrapped_module|_orig_mod)\.|^module\.")
_CHECKED = 256  # tokens of a row that the live check reads
_REPLACED = KNOWN | {"past_key_values", "cache_params", "state", "use_cache", "cache_position"}


class InitialStateMixin(WholeCheckpointsMixin):
    """Let a Trainer's sequences start from the state that an intervention chooses; the loss is the host's.

    Put it before the host: `class MyTrainer(InitialStateMixin, SFTTrainer)`, and pass `intervention=` beside
    the host's arguments. The state enters at the model's body, below every wrapper, wherever the host calls
    the model in its `compute_loss`, with whatever arguments. Padding (`attention_mask`) and packed rows
    (`position_ids`, `cu_seq_lens_q`, `seq_idx`, `starts`) are read as in `longroll.RecurrentLM`: the first
    document of a row goes on from the intervention's state, the others start from `restart`. Evaluation
    starts from the zero state. A checkpoint also holds the intervention's memory, one file for each rank.

    The host reads one batch in each step, in one forward. Trainers that read several texts for one loss
    (TRL's DPO, GRPO, RLOO, KTO and reward trainers) are refused: an initial state has no meaning for their
    pairs yet.

    Args:
        *arguments: the host's.
        intervention: an intervention, or its short name ("sp", "tbptt", "fitted", "random", "none"); None
            starts every sequence from the zero state.
        restart: what the documents inside a packed row start from in training, but its first: the "zero"
            state, or the "state" that the intervention chose for the row.
        on_not_finite: at a step whose loss, state or gradient is not finite, "stop", or "drop" the carried
            states at fault, skip the step on all ranks, log it, and go on (`longroll.training.guard`).
        **kwargs: the host's.

    Raises:
        LongrollError: for a class whose host comes first, a refused host or argument
            (`longroll.training._arguments`), a model without recurrent state, lanes that do not fit, TBPTT
            with `restart` "state", and in the first steps for a state that does not reach the loss.
    """

    model: Any
    args: TrainingArguments
    accelerator: Any
    optimizer: Any
    add_callback: Any
    log: Any
    _tr_loss: torch.Tensor
    is_fsdp_enabled: bool
    _passed_on = 0  # states, in this step
    _signature_columns: Any

    def __new__(cls, *arguments: Any, **kwargs: Any) -> Any:
        """Refuse hosts that come first, or that read several texts for one loss."""
        order = cls.__mro__
        host = next(
            (kind for kind in order if issubclass(kind, Trainer) and not issubclass(kind, InitialStateMixin)),
            None,
        )
        if host is None:
            raise LongrollError(
                f"{cls.__name__} has no Trainer: class {cls.__name__}(InitialStateMixin, Trainer)."
            )
        if order.index(host) < order.index(InitialStateMixin):
            raise LongrollError(
                f"{cls.__name__} would take its loss from {host.__name__} without a state: put "
                f"InitialStateMixin first, class {cls.__name__}(InitialStateMixin, {host.__name__})."
            )
        for kind in order:
            if kind.__module__.startswith("trl.") and kind.__name__.startswith(_SEVERAL_TEXTS):
                raise LongrollError(
                    f"{kind.__name__} reads several texts for one loss, for which an initial state has no "
                    "meaning yet: use SFTTrainer or transformers' Trainer."
                )
        return super().__new__(cls)

    def __init__(
        self,
        *arguments: Any,
        intervention: Intervention | str | None = None,
        restart: Restart = "zero",
        on_not_finite: OnNotFinite = "stop",
        **kwargs: Any,
    ) -> None:
        given = dict(zip(("model", "args"), arguments, strict=False)) | kwargs
        check_trainer_arguments(given, type(self).__name__)
        check_launcher()
        end_with_launcher()
        args, model = given.get("args"), given.get("model")
        owners = {kind.__module__.partition(".")[0] for kind in type(self).__mro__} - {
            "transformers",
            "longroll",
        }
        if args is not None:
            check_training_arguments(args, owners)
            if sharding.asked(args):
                sharding.check_launch()
            _checkpoint_without_reentry(args)
        if isinstance(model, torch.nn.Module):
            check_placement(unwrapped(model))
        config = getattr(unwrapped(model), "config", None)
        use_cache = getattr(config, "use_cache", None)
        super().__init__(*arguments, **kwargs)
        check_training_arguments(self.args, owners)
        self._check_accelerator()
        if config is not None:
            config.use_cache = use_cache  # Trainer turns it off, and it would be saved so
            if use_cache is None:
                del config.use_cache  # of its text model's config, say
        self.base: PreTrainedModel = unwrapped(self.model)
        self.lm = RecurrentLM(self.base)
        self.family = self.lm.family
        self.intervention = intervention_of(intervention)
        self.restart = _checked_restart(restart, self.intervention)
        self._projections = projects(self.model)
        self._live_check = LiveCheck(self.base)
        self.on_not_finite = on_not_finite
        self._guard = Guard(on_not_finite)
        self.add_callback(_Stop(self))
        self._check_model()
        self._check_precision()
        self._check_lanes()

    # ---- what cannot be

    def _check_accelerator(self) -> None:
        """Refuse settings of `accelerate launch` under which a state is lost."""
        if self.args.n_gpu > 1:
            raise LongrollError(
                "Several GPUs in one process would share one state: start with `torchrun` or `accelerate "
                "launch`, or make one GPU visible with CUDA_VISIBLE_DEVICES."
            )
        state = self.accelerator.state
        plugin = getattr(state, "dynamo_plugin", None)
        if plugin is not None and getattr(plugin.backend, "value", "NO") not in ("NO", "no"):
            raise LongrollError(
                "ACCELERATE_DYNAMO_BACKEND compiles the model, which drops the state: set it to no."
            )

    def _check_model(self) -> None:
        check_recurrent(self.lm, intervenes=self.intervention is not None)
        for name, module in self.model.named_modules():
            if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
                raise LongrollError(
                    f"{name or type(module).__name__} is compiled by torch.compile, which reuses a graph "
                    "that was traced without a state: pass the model itself."
                )

    def _check_precision(self) -> None:
        """Say what 16 bits do to decays; `weights` of InitialStateTrainer holds these in float32."""
        narrow = {
            str(parameter.dtype).removeprefix("torch.")
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and in_16_bits(parameter) and name not in self._projections
        }
        if narrow:
            logger.warning(
                "%s is trained in %s, which loses small updates: decays (A_log, dt_bias, ...) do not move. "
                "Load the model with dtype=torch.float32, and set bf16=True for autocast.",
                type(self.base).__name__, " and ".join(sorted(narrow)),
            )  # fmt: skip

    def _check_lanes(self) -> None:
        dataset = self.train_dataset  # type: ignore[attr-defined]
        lanes = getattr(dataset, "lanes", None)
        strategy = self.args.train_sampling_strategy
        if _in_order(dataset) and strategy not in ("random", "sequential"):
            raise LongrollError(
                f"train_sampling_strategy={strategy!r} would break the order of {type(dataset).__name__}: "
                "leave it "
                'out, or "sequential".'
            )
        if not isinstance(self.intervention, TBPTT) or dataset is None:
            return
        rows = self.args.per_device_train_batch_size * self.args.world_size
        if lanes != rows:
            raise LongrollError(
                f"TBPTT reads {rows} rows a step (all ranks together) and the data have {lanes} lanes: build "
                f"longroll.data.Lanes(..., lanes={rows})."
            )

    # ---- the step

    def train(self, *arguments: Any, **kwargs: Any) -> Any:
        """Return the host's, with the live check of a new run."""
        self._live_check, self._guard = LiveCheck(self.base), Guard(self.on_not_finite)
        return super().train(*arguments, **kwargs)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], *arguments: Any, **kwargs: Any
    ) -> Any:
        """Return the host's loss, of a model that starts from the intervention's state."""
        rows = read_batch(inputs, strict=False)
        given = {key: value for key, value in _targets_within(inputs).items() if key != "starts"}
        if "shift_labels" in given:
            given.setdefault("labels", given["shift_labels"])  # the model's own loss wants both
        if self.base.base_model is self.base:
            raise LongrollError(
                f"{self.base.name_or_path} gives no loss that {type(self).__name__} could take: train it by "
                "InitialStateTrainer."
            )
        with self._from_state(model, rows, self._choose(model, inputs)) as reading:
            loss = super().compute_loss(model, given, *arguments, **kwargs)  # type: ignore[misc]
        self._observe(model, reading.get("final"))
        return loss

    def training_step(self, *arguments: Any, **kwargs: Any) -> Tensor:
        """Return the host's, which passes one state on.

        Raises:
            LongrollError: for a class whose own `compute_loss` leaves out the one here, or calls it twice.
        """
        self._passed_on = 0
        loss: Tensor = super().training_step(*arguments, **kwargs)  # type: ignore[misc]
        if self.intervention is not None and self._passed_on != 1:
            raise LongrollError(
                f"{type(self).__name__} calls super().compute_loss {self._passed_on} times a step, where a "
                "state enters and is passed on: call it once, or train with intervention=None."
            )
        return self._guard.see_loss(loss)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Return the host's, of the targets that enter its loss."""
        return super()._get_num_items_in_batch(  # type: ignore[misc]
            [_targets_within(batch) for batch in batch_samples], device
        )

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *arguments: Any, **kwargs: Any
    ) -> Any:
        """Return the host's; batches without labels are read as those with labels are."""
        if any(inputs.get(name) is not None for name in ("labels", "shift_labels")):
            return super().prediction_step(model, inputs, *arguments, **kwargs)  # type: ignore[misc]
        blank = {**inputs, "labels": torch.full_like(inputs["input_ids"], IGNORED)}
        logits = super().prediction_step(model, blank, *arguments, **kwargs)[1]  # type: ignore[misc]
        return None, logits, None

    def _choose(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> RecurrentState | None:
        """Return the initial state; evaluation starts from zero and leaves the intervention alone."""
        if self.intervention is None or not model.training:
            return None
        starts = row_starts(inputs)
        return self.intervention.initial_state(inputs if starts is None else {**inputs, "starts": starts})

    def _observe(self, model: torch.nn.Module, final: RecurrentState | None) -> None:
        if self.intervention is None or not model.training:
            return
        if final is None:
            raise LongrollError(
                f"{type(self).__name__} did not call {type(self.base).__name__} for its loss, so no state "
                "can enter it: call the model in compute_loss, or train with intervention=None."
            )
        if not final.part("recurrent"):
            self._live_check.stop("the model gave back no state")
        self._guard.see(final)
        self.intervention.observe(final)
        self._passed_on += 1

    def _read(
        self, model: torch.nn.Module, rows: Rows, state: RecurrentState | None, *, logits: bool = False
    ) -> tuple[Any, RecurrentState]:
        """Return the output of the body (with `logits`: of `model`) on a batch from a state, and the final
        state.
        """
        self._check_state(model, rows, state, logits=logits)
        return self._run(model, rows, state, logits=logits)

    def _run(
        self, model: torch.nn.Module, rows: Rows, state: RecurrentState | None, *, logits: bool
    ) -> tuple[Any, RecurrentState]:
        return self.family.run(
            model if logits else self.base,
            rows.input_ids,
            state,
            attention_mask=rows.attention_mask,
            starts=rows.starts,
            restart=self.restart if self.model.training else "zero",
            logits=logits,
        )

    def _check_state(
        self, model: torch.nn.Module, rows: Rows, state: RecurrentState | None, *, logits: bool = False
    ) -> None:
        """Check, where that is due, that a state reaches the hidden states of one row; of all rows where some
        are padded or packed.
        """
        if state is None or not self._live_check.due(state):
            return
        if rows.attention_mask is None and rows.starts is None:
            rows = rows._replace(input_ids=rows.input_ids[:1, :_CHECKED])
            state = state.rows([0])

        def read(state: RecurrentState) -> Tensor:
            output, _ = self._run(model, rows, state, logits=logits)
            numbers: Tensor = output.logits if logits else output.last_hidden_state
            return numbers

        self._live_check.check(read, state)

    @contextlib.contextmanager
    def _from_state(
        self, model: torch.nn.Module, rows: Rows, state: RecurrentState | None
    ) -> Iterator[dict[str, RecurrentState]]:
        """Have the body of the model read `rows` from `state`, whoever calls it; yield the final state."""
        body = self.base.base_model
        reading: dict[str, RecurrentState] = {}
        original, replaced = body.forward, "forward" in vars(body)
        names = list(inspect.signature(original).parameters)

        def forward(*arguments: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, arguments, strict=False)) | kwargs
            self._check_call(given, rows, reading)
            rest = {key: value for key, value in given.items() if key not in _REPLACED and value is not None}
            body.forward = functools.partial(original, **rest)
            try:
                output, final = self._read(model, rows, state)
            finally:
                body.forward = forward
            if torch.is_grad_enabled() or not reading:
                reading["final"] = final
            return _without(self.family.cache_argument, output)

        body.forward = forward
        try:
            yield reading
        finally:
            if replaced:
                body.forward = original
            else:
                del body.forward

    def _check_call(self, given: dict[str, Any], rows: Rows, reading: dict[str, RecurrentState]) -> None:
        ids, name = given.get("input_ids"), type(self).__name__
        if ids is None or given.get("inputs_embeds") is not None:
            raise LongrollError(
                f"{name} calls the model with `inputs_embeds`, whose tokens the state cannot follow: use an "
                "adapter that takes `input_ids` (LoRA, not prompt tuning)."
            )
        if ids is not rows.input_ids and not (
            ids.shape == rows.input_ids.shape and torch.equal(ids, rows.input_ids)
        ):
            raise LongrollError(
                f"{name} calls the model with other rows than its batch's `input_ids`, for which no state "
                "was chosen: it cannot train with an intervention."
            )
        if reading and torch.is_grad_enabled():
            raise LongrollError(
                f"{name} reads its batch several times for one loss, and a state is passed on once: it "
                "cannot train with an intervention."
            )

    # ---- the host's machinery

    def create_accelerator_and_postprocess(self) -> None:
        """The host's, with FSDP2 by the rules of `longroll.training.sharding`, and DDP of one order."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if self.accelerator.ddp_handler is not None and self.args.ddp_find_unused_parameters is None:
            # else DDP reorders its buckets after one step, and a resumed run adds in another order
            self.accelerator.ddp_handler.find_unused_parameters = True
        self.is_fsdp_enabled = sharding.set_up(self.accelerator, self.args)

    def autocast_smart_context_manager(self, *arguments: Any, **kwargs: Any) -> Any:
        """Return the host's; accelerate wraps no autocast around a model that FSDP2 shards."""
        if self.is_fsdp_enabled:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(*arguments, **kwargs)  # type: ignore[misc]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        self._signature_columns = [*self._signature_columns, *sorted(KNOWN - set(self._signature_columns))]

    def _prepare_for_training(self, *arguments: Any, **kwargs: Any) -> Any:
        """Return the host's; FSDP2 shards what each rank holds, which must be the same model."""
        if self.is_fsdp_enabled and not is_sharded(self.model):
            sharding.same_everywhere(self.model, self.args.device)
            sharding.choose_layers(self.accelerator.state.fsdp_plugin, self.model)
        return super()._prepare_for_training(*arguments, **kwargs)  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset  # type: ignore[attr-defined]
        if _in_order(dataset):
            return SequentialSampler(dataset)
        sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        return sampler

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Return parameters that weight decay shrinks: matrices (`weights.projects`)."""
        names = [name for name, _ in model.named_parameters()]
        return [name for name in names if _WRAPPERS.sub("", name) in self._projections]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the host's; the gradients are ready, and the optimizer has not moved."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        self._guard.before_step(
            getattr(self.optimizer, "optimizer", self.optimizer),
            self.state.global_step + 1,
            self._tr_loss,
            norm.full_tensor() if hasattr(norm, "full_tensor") else norm,
            stop=bool(stop.asked()),
            scaled=getattr(self.accelerator, "scaler", None) is not None,
            intervention=self.intervention,
        )
        self._log_dropped()
        return norm

    def _log_dropped(self) -> None:
        """Log the steps at which states were dropped."""
        while self._guard.dropped:
            self.log(self._guard.dropped.pop(0))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._guard.settle()
        self._log_dropped()
        check_weights(self.model)
        super()._save_checkpoint(model, trial)

    def _memory_file(self, folder: str) -> Path:
        return Path(folder) / f"intervention_{self.args.process_index}.pt"

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.intervention is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)  # rank 0 may not have come to it
            torch.save(self.intervention.state_dict(), self._memory_file(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # an earlier run of this process may have ended inside a step; FSDP2 loads by a step without effect
        self.accelerator.gradient_state._set_sync_gradients(True)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.intervention is None:
            return
        with checkpoints.readable(checkpoint):
            self._load_memory(checkpoint, self.intervention)

    def _load_memory(self, checkpoint: str, intervention: Intervention) -> None:
        files = [Path(checkpoint) / f"intervention_{rank}.pt" for rank in range(len(os.listdir(checkpoint)))]
        found = [file for file in files if file.is_file()]
        if not found:
            raise LongrollError(
                f"{checkpoint} has no intervention_0.pt: it was not saved by longroll with an intervention."
            )
        rank, world_size = self.args.process_index, self.args.world_size
        device = self.args.device
        place = "cpu" if device.type == "cpu" else device  # torch does not load to "cpu:0"
        load = functools.partial(torch.load, map_location=place, weights_only=True)
        if len(found) == world_size:
            intervention.load_state_dict(load(found[rank]))
        else:
            intervention.load_ranks([load(file) for file in found], rank, world_size)


class _Stop(TrainerCallback):
    """Ends a run that was asked to stop after its step, with a checkpoint."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Trainer saves, then stops."""
        if self.trainer._guard.stop:
            control.should_save = control.should_training_stop = True


def _targets_within(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the batch without targets that would be predicted from padding, or from the document before
    them.
    """
    names = [name for name in ("labels", "shift_labels") if inputs.get(name) is not None]
    if "input_ids" not in inputs or not names:
        return inputs
    rows = read_batch(inputs, strict=False)
    if rows.attention_mask is None and rows.starts is None:
        return inputs
    given = {"labels": aligned(rows.targets), "shift_labels": rows.targets}
    return {**inputs, **{name: given[name] for name in names}}


def _checked_restart(restart: Restart, intervention: Intervention | None) -> Restart:
    if restart not in get_args(Restart):
        raise LongrollError(f"restart={restart!r} is none of {', '.join(get_args(Restart))}.")
    if restart == "state" and isinstance(intervention, TBPTT):
        raise LongrollError(
            "TBPTT's state is that of the text before a row, from which no other document goes on: leave "
            "`restart` at zero."
        )
    return restart


def _in_order(dataset: Any) -> bool:
    """Return whether a data set is in the order that it is meant to be read in."""
    return getattr(dataset, "lanes", None) is not None or isinstance(dataset, Windows)


def _checkpoint_without_reentry(args: TrainingArguments) -> None:
    """A reentrant checkpoint loses the gradient into the state, and is the default of torch."""
    for flag in ("activation_checkpointing", "gradient_checkpointing"):
        if getattr(args, flag, None):
            kept = getattr(args, f"{flag}_kwargs", None) or {}
            setattr(args, f"{flag}_kwargs", kept | {"use_reentrant": False})


def _without(name: str, output: Any) -> Any:
    """Return a model's output without its cache, which holds the final state on the graph."""
    if getattr(output, name, None) is None:
        return output
    return type(output)(**{key: value for key, value in output.items() if key != name})
