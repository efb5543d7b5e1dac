"""HF Trainer with an initial state: one state in, one state out, each micro-batch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainingArguments

from longroll.data import Lanes, Windows
from longroll.errors import LongrollError
from longroll.families._family import unwrapped
from longroll.interventions import TBPTT, Intervention
from longroll.model import RecurrentLM
from longroll.training.graphs import StepGraph
from longroll.training.loss import loss_and_state, next_token_loss
from longroll.training.weights import DECAYS, projects

_WRAPPERS = re.compile(r"\b(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.|^module\.")


class InitialStateTrainer(Trainer):
    """A `transformers.Trainer` whose sequences start from the state that an intervention chooses.

    Gradient accumulation, bf16, gradient checkpointing, LoRA (a peft model) and DDP work as in Trainer; a
    checkpoint also holds the intervention's memory, a file a rank, so that a resumed run is the same run.
    The loss is the cross-entropy of `shift_labels` (B, T), the token after each input (as
    `longroll.data.Windows` and `Lanes` give; else made from `labels`, losing each row's last target).

    Args:
        model: a transformers causal LM, peft's wrapper of one, or a RecurrentLM.
        args: as for Trainer. `remove_unused_columns` and reentrant checkpointing are turned off.
        intervention: None trains from the zero state: the plain control.
        decay_speed: learning rate of the parameters that set how fast a state is forgotten (`DECAYS`), as a
            multiple of the others'. Adam moves them too slowly for few steps: recipes/README.md.
        cuda_graphs: replay a step as one CUDA graph, which small models gain from; one GPU, no attention, no
            gradient checkpointing, no fp16. Batches of another shape than the first run as without.
        **kwargs: as for Trainer.

    Raises:
        LongrollError: for a model without recurrent state, a decay speed where no decay is trained,
            nn.DataParallel, lanes that do not fit, and CUDA graphs where there can be none.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        intervention: Intervention | None = None,
        decay_speed: float = 1.0,
        cuda_graphs: bool = False,
        **kwargs: Any,
    ) -> None:
        model = model.model if isinstance(model, RecurrentLM) else model
        self.base: PreTrainedModel = unwrapped(model)
        self.lm = RecurrentLM(self.base)
        self.family = self.lm.family
        self.intervention = intervention
        self.decay_speed = decay_speed
        if intervention is not None and not self.family.recurrent:
            raise LongrollError(
                f"{self.base.config.model_type} has no recurrent state, so there is none to intervene on: "
                "train it without an intervention."
            )
        if decay_speed != 1 and not any(p.requires_grad for p in self._decays()):
            raise LongrollError(
                f"`decay_speed`: no parameter that is trained sets how fast {self.base.config.model_type} "
                "forgets; LoRA leaves those as they are. Leave it out."
            )
        args.remove_unused_columns = False  # they hold shift_labels and starts
        if args.gradient_checkpointing:  # a reentrant checkpoint loses the gradient into the state
            args.gradient_checkpointing_kwargs = {"use_reentrant": False}
        use_cache = getattr(self.base.config, "use_cache", None)
        kwargs.setdefault("data_collator", collate)
        self._projections = projects(model)  # now: FSDP flattens matrices
        super().__init__(model=model, args=args, **kwargs)
        self.base.config.use_cache = use_cache  # Trainer turns it off, and it would be saved so
        if use_cache is None:
            del self.base.config.use_cache  # of its text model's config, say
        # the loss here is a sum over the tokens of all micro-batches, as transformers' own
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = True
        if args.n_gpu > 1:
            raise LongrollError(
                "Several GPUs in one process would share one state: start with `torchrun` or `accelerate "
                "launch`, or make one GPU visible with CUDA_VISIBLE_DEVICES."
            )
        self._check_lanes()
        self._graph = self._new_graph() if cuda_graphs else None

    def _new_graph(self) -> StepGraph:
        if self.args.gradient_checkpointing or self.args.world_size > 1 or self.args.fp16:
            raise LongrollError(
                "A step cannot be one CUDA graph with gradient checkpointing, on several GPUs, or in fp16: "
                "leave out `cuda_graphs`, or these."
            )
        dtype = torch.bfloat16 if self.args.bf16 else None
        return StepGraph(self.lm, dtype=dtype, states=self.intervention is not None)

    def _check_lanes(self) -> None:
        if not isinstance(self.intervention, TBPTT) or self.train_dataset is None:
            return
        rows = self.args.per_device_train_batch_size * self.args.world_size
        lanes = getattr(self.train_dataset, "lanes", None)
        if lanes != rows:
            raise LongrollError(
                f"TBPTT reads {rows} rows a step (all ranks together) and the data have {lanes} lanes: build "
                f"longroll.data.Lanes(..., lanes={rows})."
            )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, Lanes | Windows):
            return SequentialSampler(dataset)  # these are in the order they are meant to be read in
        return super()._get_train_sampler(train_dataset)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Trainer's step, or its replay, which does not call `compute_loss`."""
        if self._graph is None or num_items_in_batch is None or not self._graph.fits(inputs["input_ids"]):
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        if train := getattr(self.optimizer, "train", None):  # schedule-free ones, which evaluation switches
            train()
        inputs = self._prepare_inputs(inputs)
        state = None if self.intervention is None else self.intervention.initial_state(inputs)
        loss, final = self._graph(inputs["input_ids"], _shifted(inputs), state, num_items_in_batch)
        if self.intervention is not None:
            self.intervention.observe(final)
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy from the intervention's state; evaluation starts from zero and leaves it alone."""
        intervention = self.intervention if model.training else None
        state = None if intervention is None else intervention.initial_state(inputs)
        if model is self.base and not (return_outputs or _hooked(model)):  # no wrapper, no adapter
            with self.accelerator.autocast():
                loss, final = loss_and_state(
                    self.lm, inputs["input_ids"], _shifted(inputs), state, num_items_in_batch
                )
        else:
            outputs, final = self.family.run(model, inputs["input_ids"], state)
            # the loss overwrites logits that it takes a gradient of
            logits = outputs.logits.clone() if return_outputs and torch.is_grad_enabled() else outputs.logits
            loss = next_token_loss(logits, _shifted(inputs), num_items_in_batch)
        if intervention is not None:
            intervention.observe(final)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP will take the mean
        return (loss, {"logits": outputs.logits}) if return_outputs else loss

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Parameters that weight decay shrinks: matrices (`weights.projects`)."""
        names = [name for name, _ in model.named_parameters()]
        return [name for name in names if _WRAPPERS.sub("", name) in self._projections]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's optimizer, with the decays in groups of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.decay_speed != 1:
            decays = {id(p) for p in self._decays()}
            for group in list(optimizer.param_groups):
                faster = [p for p in group["params"] if id(p) in decays]
                if faster:
                    group["params"] = [p for p in group["params"] if id(p) not in decays]
                    rate = group["lr"] * self.decay_speed
                    optimizer.add_param_group({**group, "params": faster, "lr": rate})
        return optimizer

    def _decays(self) -> list[torch.nn.Parameter]:
        return [p for name, p in self.base.named_parameters() if name.endswith(DECAYS)]

    def _memory_file(self, folder: str) -> Path:
        return Path(folder) / f"intervention_{self.args.process_index}.pt"

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.intervention is not None:
            torch.save(self.intervention.state_dict(), self._memory_file(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.intervention is None:
            return
        file = self._memory_file(checkpoint)
        if not file.is_file():
            raise LongrollError(
                f"{checkpoint} has no {file.name}: it was not saved by longroll with an intervention and as "
                "many processes."
            )
        memory = torch.load(file, map_location=self.args.device, weights_only=True)
        if memory["generator"] is not None:
            memory["generator"] = memory["generator"].cpu()
        self.intervention.load_state_dict(memory)


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack items of `Windows` or `Lanes`; `labels` is there for Trainer to count tokens by."""
    batch = {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in items[0]}
    if "shift_labels" in batch:
        batch.setdefault("labels", batch["shift_labels"])
    return batch


def _hooked(model: torch.nn.Module) -> bool:
    """Whether calling `model` does more than its forward, as with FSDP2 and accelerate's `device_map`."""
    return bool(model._forward_pre_hooks or model._forward_hooks or hasattr(model, "_hf_hook"))


def _shifted(inputs: dict[str, Any]) -> Tensor:
    if "shift_labels" in inputs:
        return inputs["shift_labels"]
    return F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
