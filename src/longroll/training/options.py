"""How to post-train, and what Trainer is told of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from longroll.errors import LongrollError
from longroll.families._rope import RopeScaling
from longroll.interventions.recipes import Settings
from longroll.measure.advice import WORTH_SAVING
from longroll.memory import check_micro_batch, memory_of
from longroll.model import RecurrentLM
from longroll.sizes import check_bytes, check_tokens
from longroll.training.guard import Guard, OnNotFinite
from longroll.training.lora import adapter_bytes
from longroll.training.saving import FORMATS
from longroll.training.weights import TRAINABLE, WEIGHTS, has_bf16, in_16_bits

REPORTERS = ("none", "tensorboard", "wandb", "mlflow")


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
        run = f"`steps` {self.steps} x `accumulation` {self.accumulation} x `batch_size` {self.batch_size}"
        row = f"`length` {self.length}" if self.length > 2**20 else f"{self.length} tokens"
        check_tokens(f"{run} x {row}", self.tokens, "ask for fewer")
        if not 0 <= self.warmup <= 1:
            raise LongrollError(f"`warmup` {self.warmup} is a share of the steps: 0 to 1.")

    @property
    def tokens(self) -> int:
        """Tokens that each process reads."""
        return self.steps * self.accumulation * self.batch_size * self.length


def _check_reporter(name: str) -> None:
    if name not in REPORTERS:
        raise LongrollError(f"`report_to` {name} is not one of {', '.join(REPORTERS)}.")
    if name != "none" and find_spec(name) is None:
        raise LongrollError(f"`report_to` {name} needs a package that is not here: pip install {name}.")


def check_sizes(lm: RecurrentLM, options: PosttrainOptions, device: torch.device | None = None) -> None:
    """Refuse a run whose smallest part exceeds the memory of the device, or of the machine.

    Raises:
        LongrollError: with the arguments, and the bytes of both.
    """
    rows, length, accumulation = options.batch_size, options.length, options.accumulation
    check_micro_batch(lm, rows, length, device)
    items = accumulation * rows * length * 16  # ids and labels of a step, which Trainer holds at once
    step = f"`accumulation` {accumulation} x `batch_size` {rows} x `length` {length}"
    check_bytes(step, items, "take fewer rows a step")
    adapters = adapter_bytes(lm.model, options.lora_rank)
    held = memory_of(device or lm.device)
    check_bytes(f"`lora_rank` {options.lora_rank}", adapters, "take a smaller rank", held=held)


def settled(options: PosttrainOptions) -> PosttrainOptions:
    """Return the options with what no recipe has set."""
    plain = Settings()
    rate = plain.learning_rate if options.learning_rate is None else options.learning_rate
    speed = plain.decay_speed if options.decay_speed is None else options.decay_speed
    return replace(
        options, learning_rate=rate, decay_speed=speed, trainable=options.trainable or plain.trainable
    )


def trainer_arguments(lm: RecurrentLM, options: PosttrainOptions, folder: Path) -> TrainingArguments:
    """Return what Trainer is told; its checkpoints lie in `folder`."""
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
        bf16=autocasts(lm, options),
        gradient_checkpointing=options.gradient_checkpointing,
        use_cpu=trains_on(lm, options).type == "cpu",
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


def trains_on(lm: RecurrentLM, options: PosttrainOptions) -> torch.device:
    """Return where the weights are trained: shards of a model on the CPU go to the GPUs."""
    return torch.device("cuda") if options.fsdp and torch.cuda.is_available() else lm.device


def autocasts(lm: RecurrentLM, options: PosttrainOptions) -> bool:
    """Return whether the run autocasts to bfloat16."""
    if options.bf16 is None:
        return has_bf16(trains_on(lm, options)) and any(in_16_bits(p) for p in lm.model.parameters())
    return options.bf16
