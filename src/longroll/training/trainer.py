"""HF Trainer with an initial state: one state in, one state out, each micro-batch."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from longroll.errors import LongrollError
from longroll.families._family import is_sharded, unwrapped
from longroll.interventions import Intervention
from longroll.model import RecurrentLM, load
from longroll.state import RecurrentState
from longroll.training._batch import Rows, aligned, read_batch
from longroll.training._collate import Collator
from longroll.training._mixin import InitialStateMixin
from longroll.training.graphs import StepGraph
from longroll.training.lora import lean
from longroll.training.loss import hidden_loss, next_token_loss
from longroll.training.sharding import full_state, is_fsdp_hook, same_everywhere, within
from longroll.training.weights import check_decay_speed, hold_weights, precision, trained_decays

logger = logging.getLogger("longroll")


class InitialStateTrainer(InitialStateMixin, Trainer):
    """A `transformers.Trainer` whose sequences start from the state that an intervention chooses.

    Gradient accumulation, bf16, gradient checkpointing, LoRA (a peft model) and DDP work as in Trainer; a
    checkpoint also holds the intervention's memory, one file for each rank, so that a resumed run is the same
    run. What becomes of each argument is in `longroll.training._arguments`, of each key of a batch in
    `longroll.training._batch`.

    The loss is the cross-entropy of `shift_labels` (B, T), the token after each input (as
    `longroll.data.Windows` and `Lanes` give; else made from `labels`, losing each row's last target), with
    `label_smoothing_factor`, or `compute_loss_func(outputs, labels, num_items_in_batch)`. A model whose
    config has `output_router_logits` adds its router's loss as its own forward does.

    Args:
        model: a transformers causal LM, peft's wrapper of one, a RecurrentLM, or a folder or hub id of one,
            which is loaded in float32.
        args: see Trainer.
        intervention: an intervention or its short name; None trains from the zero state: the plain control.
        decay_speed: learning rate of the parameters that set how fast a state is forgotten (`DECAYS`), as a
            multiple of the others'. Adam moves them too slowly for few steps: dev/LOG.md.
        cuda_graphs: replay a step as one CUDA graph, which spares the GPU to wait for Python; no fp16, the
            plain loss, no experts that wait for the GPU. Batches of another shape than the first, padded and
            packed ones run as without. On several GPUs the graph sums the gradients, in the place of DDP;
            such batches, FSDP and adapters are refused. None: where it is known to be right, which is Mamba
            and Mamba-2 on one GPU without attention, gradient checkpointing and adapters.
        weights: `float32`: parameters in 16 bits are trained in float32, under bf16 autocast on a GPU, and
            `save_model` writes matrices in 16 bits again. `bf16`: matrices stay in (or come to) bfloat16.
        **kwargs: as for Trainer, and `restart` and `on_not_finite` as for `InitialStateMixin`.

    Raises:
        LongrollError: as `InitialStateMixin`; for a decay speed where no decay is trained, and CUDA graphs
            where there can be none.
    """

    def __new__(cls, *arguments: Any, **kwargs: Any) -> Any:
        """Refuse another trainer's loss, which would not be computed."""
        rest = cls.__mro__[cls.__mro__.index(InitialStateMixin) + 1 :]
        host = next(kind for kind in rest if "compute_loss" in vars(kind))
        if host is not Trainer:
            raise LongrollError(
                f"{cls.__name__} would ignore the loss of {host.__name__} for its own: class "
                f"{cls.__name__}(InitialStateMixin, {host.__name__})."
            )
        return super().__new__(cls, *arguments, **kwargs)

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        *arguments: Any,
        intervention: Intervention | str | None = None,
        decay_speed: float = 1.0,
        cuda_graphs: bool | None = False,
        weights: str = "float32",
        **kwargs: Any,
    ) -> None:
        if isinstance(model, str | Path):
            on_cpu = args is not None and args.use_cpu
            model = load(model, device="cpu" if on_cpu else None, dtype=torch.float32)
        source = model.checkpoint if isinstance(model, RecurrentLM) else None
        if isinstance(model, RecurrentLM):
            model = model.adapted or model.model
        lean(model)
        self._saved_dtype = None if model is None else hold_weights(model, args, weights)
        if source is not None and source.dtype in (torch.bfloat16, torch.float16):
            self._saved_dtype = source.dtype
        self.decay_speed = decay_speed
        self._replaced_forward = model is not None and _replaces_forward(unwrapped(model))
        super().__init__(model, args, data_collator, *arguments, intervention=intervention, **kwargs)
        drop = self.args.remove_unused_columns
        self.data_collator: Any = Collator(self.processing_class, data_collator, drop=drop)
        # the loss here is a sum over the tokens of all micro-batches, as transformers' own
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = True
        check_decay_speed(decay_speed, self.base)
        if decay_speed != 1 and self.optimizer is not None:
            raise LongrollError(
                "`decay_speed` sets the learning rates of an optimizer that Trainer makes: leave out "
                "`optimizers`, or `decay_speed`."
            )
        if self.label_smoother is not None and self._adds_losses():
            raise LongrollError(
                "transformers' LabelSmoother leaves out the router's loss: remove `label_smoothing_factor`, "
                "or set config.output_router_logits = False."
            )
        self._graph: StepGraph | None = None
        self._by_default = cuda_graphs is None
        if cuda_graphs or (self._by_default and self._gains_from_graphs()):
            self._graph = self._new_graph()

    def _gains_from_graphs(self) -> bool:
        """Return whether steps as CUDA graphs are known to be the plain ones, and faster."""
        if self._graph_refusal() or self.args.gradient_checkpointing or self.base is not self.model:
            return False
        if self.args.world_size > 1:
            return False
        if self.args.device.type != "cuda" or self.lm.family.op not in ("ssd", "selective_scan"):
            return False
        if self.lm.has_attention or _hooked(self.base) or self._replaced_forward:
            return False
        logger.warning(
            "Each step is replayed as one CUDA graph. `cuda_graphs` False runs the steps without a graph."
        )
        return True

    def _graph_refusal(self) -> str | None:
        """Return why a step cannot be one CUDA graph; None where it can."""
        if self.args.fp16:
            return "in fp16"
        if self.args.world_size > 1 and (self.is_fsdp_enabled or self.base is not self.model):
            return "on several GPUs with FSDP or adapters"
        if self.args.world_size > 1 and not self.args.average_tokens_across_devices:
            return "on several GPUs without `average_tokens_across_devices`"
        if self._adds_losses() or self.label_smoother is not None or self.compute_loss_func is not None:
            return (
                "with another than the plain loss: label smoothing, compute_loss_func, output_router_logits"
            )
        if self.args.gradient_checkpointing and any(map(_drops, self.model.modules())):
            return "with gradient checkpointing of a model that has dropout"
        return None

    def _new_graph(self) -> StepGraph:
        if refusal := self._graph_refusal():
            raise LongrollError(
                f"A step cannot be one CUDA graph {refusal}: leave out `cuda_graphs`, or these."
            )
        for flag in ("activation_checkpointing", "gradient_checkpointing"):
            if getattr(self.args, flag, None):  # there is nothing random to draw again
                kept = getattr(self.args, f"{flag}_kwargs", None) or {}
                setattr(self.args, f"{flag}_kwargs", kept | {"preserve_rng_state": False})
        several = self.args.world_size > 1
        if several:  # the graph sums gradients itself, which DDP would do outside of it
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = functools.partial(prepare, evaluation_mode=True)
        dtype = torch.bfloat16 if self.args.bf16 else None
        return StepGraph(self.lm, dtype=dtype, states=self.intervention is not None, exchange=several)

    def _prepare_for_training(self, *arguments: Any, **kwargs: Any) -> Any:
        if self._graph is not None and self._graph.exchange:
            same_everywhere(self.model, self.args.device)
        return super()._prepare_for_training(*arguments, **kwargs)

    def _adds_losses(self) -> bool:
        """Return whether the model's own forward adds to the cross-entropy."""
        return bool(getattr(self.base.config.get_text_config(), "output_router_logits", False))

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return Trainer's step, or its replay, which does not call `compute_loss`."""
        if self._graph is None or num_items_in_batch is None or not self._graph.fits(inputs["input_ids"]):
            return self._without_graph(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        rows = read_batch(inputs)
        if rows.attention_mask is not None or rows.starts is not None:
            return self._without_graph(model, inputs, num_items_in_batch)
        model.train()
        if train := getattr(self.optimizer, "train", None):  # schedule-free ones, which evaluation switches
            train()
        if not self._captured(rows.input_ids):
            return super().training_step(model, inputs, num_items_in_batch)
        state = self._choose(model, inputs)
        with self.accelerator.autocast():
            self._check_state(model, rows, state)  # by eager forwards: a graph cannot be asked
        loss, final = self._graph(rows.input_ids, rows.targets, state, num_items_in_batch)
        self._observe(model, final)
        if self._graph.exchange:
            loss = loss * self.args.world_size  # Trainer will take the mean, as under DDP
        return self._guard.see_loss(loss)

    def _without_graph(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        if self._graph is not None and self._graph.exchange:
            raise LongrollError(
                "On several GPUs with `cuda_graphs` each batch has the shape of the first, without padding "
                "or packing: set `dataloader_drop_last`, or leave out `cuda_graphs`."
            )
        return super().training_step(model, inputs, num_items_in_batch)

    def _captured(self, input_ids: Tensor) -> bool:
        """Return whether there is a graph now; one by default is given up where it cannot be captured."""
        assert self._graph is not None
        try:
            self._graph.capture(input_ids)
        except (torch.OutOfMemoryError, LongrollError) as error:
            if not self._by_default:
                raise
            why = "there is no memory for it" if isinstance(error, torch.OutOfMemoryError) else str(error)
            logger.warning("Steps are not replayed as a CUDA graph, and run one by one: %s", why)
            self._graph = None
            self.base.zero_grad()
            torch.cuda.empty_cache()
        return self._graph is not None

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss from the intervention's state; evaluation starts from zero and leaves it alone."""
        rows = read_batch(inputs)
        if self._adds_losses() and self.compute_loss_func is None:
            given = {**inputs, "labels": rows.targets, "shift_labels": rows.targets}
            found = super().compute_loss(model, given, return_outputs, num_items_in_batch)
            return (found[0], {"logits": found[1].logits}) if return_outputs else found
        state = self._choose(model, inputs)
        outputs: Any = None
        final: RecurrentState | None
        plain = self.label_smoother is None and self.compute_loss_func is None and not return_outputs
        if plain and not self._replaced_forward and self._only_forwards(model):
            loss, final = self._fused_loss(model, rows, state, num_items_in_batch)
        elif self.base.base_model is self.base:  # a wrapped module: nothing lies below its wrappers
            outputs, final = self._read(model, rows, state, logits=True)
        else:
            with self._from_state(model, rows, state) as reading:
                outputs = model(input_ids=rows.input_ids, use_cache=False)
            final = reading.get("final")
        if outputs is not None:
            loss = self._loss_of(outputs, rows, inputs, num_items_in_batch, keep=return_outputs)
        self._observe(model, final)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP will take the mean
        return (loss, {"logits": outputs.logits}) if return_outputs else loss

    def _only_forwards(self, model: torch.nn.Module) -> bool:
        """Return whether `model` is the model, or wrappers of it, in which a loss may stand in for the
        logits.
        """
        if _hooked(self.base):
            return False
        if model is self.base and not isinstance(model, FSDPModule):
            return True
        known = isinstance(model, DistributedDataParallel | FSDPModule) or hasattr(model, "get_base_model")
        return known and self.base.base_model is not self.base and not _hooked(model)

    def _fused_loss(
        self,
        model: torch.nn.Module,
        rows: Rows,
        state: RecurrentState | None,
        num_items_in_batch: Tensor | int | None,
    ) -> tuple[Tensor, RecurrentState]:
        """Return the loss, made of hidden states rather than of all logits, and the final state."""
        found: dict[str, Any] = {}

        def loss_of(*_: Any, **__: Any) -> Tensor:
            with self.accelerator.autocast():
                output, found["final"] = self._read(model, rows, state)
                hidden = output.last_hidden_state

                def loss() -> Tensor:
                    return hidden_loss(self.lm, hidden, rows.targets, num_items_in_batch)

                return within(self.lm.model.get_output_embeddings(), loss, hidden)

        if model is self.base and not isinstance(model, FSDPModule):
            return loss_of(), found["final"]
        replaced = vars(self.base).get("forward")  # accelerate's, for autocast
        self.base.forward = loss_of
        try:
            loss: Tensor = model(input_ids=rows.input_ids)
        finally:
            if replaced is None:
                del self.base.forward
            else:
                self.base.forward = replaced
        return loss, found["final"]

    def _loss_of(
        self,
        outputs: Any,
        rows: Rows,
        inputs: Mapping[str, Any],
        num_items_in_batch: Tensor | int | None,
        *,
        keep: bool,
    ) -> Tensor:
        loss: Tensor
        if self.compute_loss_func is not None:
            labels = aligned(rows.targets)
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
            return loss
        if self.label_smoother is not None:
            loss = self.label_smoother(outputs, rows.targets, num_items_in_batch=num_items_in_batch)
            return loss
        # the loss overwrites logits that it takes a gradient of
        logits = outputs.logits.clone() if keep and torch.is_grad_enabled() else outputs.logits
        return next_token_loss(logits, rows.targets, num_items_in_batch)

    def _get_num_items_in_batch(
        self, batch_samples: list[Mapping[str, Any]], device: torch.device
    ) -> Tensor | int | None:
        counted = [
            {"labels": t, "shift_labels": t} for t in (read_batch(batch).targets for batch in batch_samples)
        ]
        found = super()._get_num_items_in_batch(counted, device)
        return found.clamp_min(1) if isinstance(found, Tensor) else found  # a batch may have no target

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        return dataset  # the collator does

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        return data_collator

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's; matrices that were in 16 bits are saved in them, but in checkpoints to resume from.

        A model that FSDP2 shards is saved whole, by rank 0; all ranks call it.
        """
        if is_sharded(self.model) and not (_internal_call and self._keeps_shards()):
            tensors = full_state(self.model)
            if self._saved_dtype is not None and not _internal_call:
                wide = {id(tensors[name]): tensors[name] for name in self._projections & tensors.keys()}
                narrow = {key: tensor.to(self._saved_dtype) for key, tensor in wide.items()}
                tensors = {name: narrow.get(id(tensor), tensor) for name, tensor in tensors.items()}
            return self._save(output_dir or self.args.output_dir, state_dict=tensors)
        if self._saved_dtype is None or _internal_call:
            return super().save_model(output_dir, _internal_call)
        with precision(self.base, self._saved_dtype):
            return super().save_model(output_dir, _internal_call)

    def _keeps_shards(self) -> bool:
        """Return whether a checkpoint to resume from holds the shards rather than whole weights."""
        return "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    @torch.no_grad()
    def loss_from_zero(self, batch: dict[str, Any]) -> float:
        """Return the loss of a batch from the zero state, without autocast; under FSDP2 all ranks call it."""
        self.model.eval()
        loss: float = self.compute_loss(self.model, self._prepare_inputs(batch)).item()
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Return Trainer's optimizer, with the decays in groups of their own."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.decay_speed != 1 and made:
            decays = {id(p) for p in trained_decays(self.base)}
            for group in list(optimizer.param_groups):
                faster = [p for p in group["params"] if id(p) in decays]
                if faster:
                    group["params"] = [p for p in group["params"] if id(p) not in decays]
                    rate = group["lr"] * self.decay_speed
                    optimizer.add_param_group({**group, "params": faster, "lr": rate})
        return optimizer


def _drops(module: torch.nn.Module) -> bool:
    rates = (getattr(module, name, 0) for name in ("p", "dropout", "attention_dropout"))
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _replaces_forward(model: torch.nn.Module) -> bool:
    """Return whether a model has another forward than its class, not counting accelerate's for autocast."""
    forward = vars(model).get("_original_forward", vars(model).get("forward"))
    return forward is not None and getattr(forward, "__func__", None) is not type(model).forward


def _hooked(model: torch.nn.Module) -> bool:
    """Return whether calling `model` does more than its forward and FSDP2, as with accelerate's
    `device_map`.
    """
    hooks = (*model._forward_pre_hooks.values(), *model._forward_hooks.values())
    others = [hook for hook in hooks if not is_fsdp_hook(hook)]
    return bool(others) or hasattr(model, "_hf_hook")
