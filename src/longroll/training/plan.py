"""What a reading or a training run needs: memory by part, which settings fit, and how long it takes.

Memory is counted in a dry run (`longroll.dry_run`), from the config alone. Time is operations over speed. The
operations of a token are those of the matrix products that a forward makes, counted in a dry run. Training
all weights takes three times as many, training adapters twice as many, and gradient checkpointing once more.
The speed is the rate at which this device multiplies matrices, measured here, times the share of that rate
that our own runs reached (`SHARES`).
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig

from longroll import ranks
from longroll.dry_run import Ledger, Sizes, dry_model, dry_run, forward_bytes, sizes_of
from longroll.errors import LongrollError, first_line, out_of_memory
from longroll.families._room import assume_free
from longroll.families.int8 import large_layers
from longroll.measure._position_loss import token_losses
from longroll.measure.roll_out import most_tokens, tokens_beside, tokens_within
from longroll.memory import GIB, MOMENTS, ends_of, gathered_bytes, layer_bytes, memory_of, parameter_bytes
from longroll.model import RecurrentLM
from longroll.sizes import ROOM
from longroll.state import RecurrentState
from longroll.training.lora import with_lora
from longroll.training.loss import LOGITS, hidden_loss
from longroll.training.options import PosttrainOptions, autocasts
from longroll.training.weights import TRAINABLE, train_only

T = TypeVar("T")

logger = logging.getLogger("longroll")

SHARES = {"reading": (0.32, 0.59), "training": (0.36, 0.36)}
"""Share of the rate of matrix products that a run reached, for models of .4 and of 10 billion parameters, on
an H100: the loss of a 370M Mamba-2 and of a 9.8B Bamba; steps of a 370M Mamba-2 (benchmarks/results)."""
_SMALL, _LARGE = 4e8, 1e10
_SQUARE = {"cuda": 8192, "cpu": 1024}  # sizes of the product whose rate is measured


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a model is trained, as far as memory depends on it."""

    rows: int
    """Rows of a micro-batch."""
    length: int
    """Tokens of a row."""
    lora_rank: int = 0
    """Rank of the adapters; 0: there are none."""
    trainable: str = "all"
    """Which weights are trained, one of `longroll.training.weights.TRAINABLE`."""
    gradient_checkpointing: bool = False
    """Layers run again in the backward pass."""
    shards: int = 1
    """Processes over which weights, gradients and moments are spread (FSDP2)."""
    replicas: int = 1
    """Processes of the run. Each holds the whole model without shards, and DDP holds its gradients twice."""
    autocast: bool = True
    """Matrices are multiplied in bfloat16."""
    accumulates: bool = False
    """Gradients of earlier micro-batches are there."""
    int8: bool = False
    """Large linear layers lie in 8 bits under the adapters."""

    @property
    def arguments(self) -> str:
        """The arguments of a run that make the setting, in backticks."""
        parts = [f"`lora_rank` {self.lora_rank}"] if self.lora_rank else []
        parts += [f"`trainable` {self.trainable}"] if self.trainable != "all" else []
        parts += ["`dtype` int8"] if self.int8 else []
        parts += ["`gradient_checkpointing`"] if self.gradient_checkpointing else []
        parts += [f"`fsdp` on {self.shards} GPUs"] if self.shards > 1 else []
        return " ".join(parts) or "all weights"

    @property
    def name(self) -> str:
        """What a table calls it."""
        parts = [f"LoRA {self.lora_rank}" if self.lora_rank else TRAINABLE[self.trainable]]
        parts += ["int8"] if self.int8 else []
        parts += ["checkpointing"] if self.gradient_checkpointing else []
        parts += [f"FSDP {self.shards}"] if self.shards > 1 else []
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at the peak, by part."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    activations: int
    """What has no part of its own: what backward reads, and work space."""
    states: int
    """Initial and final recurrent and conv states of all rows."""
    keys_and_values: int
    logits: int

    @property
    def total(self) -> int:
        """The peak."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = [
            f"{name.replace('_', ' ')} {size / GIB:.3g}"
            for name, size in asdict(self).items()
            if size >= 0.005 * self.total
        ]
        return f"{self.total / GIB:.3g} GiB ({', '.join(parts)})"


class Outline:
    """A model by its config.

    Args:
        config: of the model.
        dtype: of its weights as they are loaded.
        device: where it is to run. GPU kernels are planned for on a machine that has the GPU; elsewhere, and
            where a dry run of the kernels fails, PyTorch's own operations are, which take more.
        int8: whether it is read with large linear layers in 8 bits.
        held: bytes of the device's memory; default: those of this machine's.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        device: torch.device,
        *,
        int8: bool = False,
        held: int | None = None,
    ) -> None:
        self.config, self.dtype, self.device, self.int8 = config, dtype, device, int8
        self.held = memory_of(device) if held is None else held
        self._planned: dict[Setting, Memory] = {}

    @functools.cached_property
    def sizes(self) -> Sizes:
        """Parameters, operations, bytes of weights and of the state."""
        with self._model(self.dtype, torch.device("cpu"), self.int8) as (lm, _):
            return sizes_of(lm)

    @property
    def recurrent(self) -> bool:
        """Whether it has recurrent layers, without which `posttrain` refuses it."""
        return self.sizes.recurrent > 0

    @functools.cached_property
    def takes_int8(self) -> bool:
        """Whether it has layers that can lie in 8 bits."""
        with self._model(self.dtype, torch.device("cpu"), False) as (lm, _):
            return bool(large_layers(lm.model, lm.width))

    @contextmanager
    def _model(
        self, dtype: torch.dtype, device: torch.device, int8: bool
    ) -> Iterator[tuple[RecurrentLM, Ledger]]:
        with dry_run() as ledger:
            yield dry_model(self.config, dtype=dtype, device=device, int8=int8), ledger

    def _counted(self, count: Callable[..., T], *arguments: Any) -> T:
        """Return what a dry run on the device counts, or one of PyTorch's own operations on a CPU."""
        try:
            return count(*arguments, device=self.device)
        except LongrollError:
            raise
        except Exception as error:  # an operation that a dry run does not know there
            if self.device.type == "cpu":
                raise
            logger.debug("a dry run on %s failed: %s", self.device, first_line(error))
            return count(*arguments, device=torch.device("cpu"))

    def chunk(self, rows: int, length: int, room: float, gpus: int = 1) -> int:
        """Return how many tokens of each of `rows` texts a reading takes at a time in `room` bytes a GPU."""
        keys = rows * self.sizes.keys_and_values(length) / gpus
        tokens = self._counted(self._chunk, room - self.sizes.weights / gpus, keys)
        return max(64, tokens // rows)

    def _chunk(self, free: float, keys: float, *, device: torch.device) -> int:
        with self._model(self.dtype, device, self.int8) as (lm, _):
            most = most_tokens(lm)
        each = forward_bytes(self.config, self.dtype, device) if device.type == "cuda" else 0.0
        return tokens_beside(tokens_within(most, free, each), each, keys, self.sizes.weights)

    def reading(self, rows: int, length: int, chunk: int, gpus: int = 1) -> Memory:
        """Return the memory that the loss of `rows` texts takes, read `chunk` tokens of each at a time.

        Keys and values of the text are counted whole. Over several GPUs, whose layers `device_map` "auto"
        deals evenly, the memory is that of the fullest, which also holds the embedding or the head.
        """
        one = self._counted(self._reading, rows, length, min(chunk, length))
        if gpus == 1:
            return one
        share, ends = self._share(gpus)
        return replace(
            one,
            weights=int(share * (one.weights - sum(ends))) + max(ends),
            states=int(share * one.states),
            keys_and_values=int(share * one.keys_and_values),
        )

    def _share(self, gpus: int) -> tuple[float, list[int]]:
        """Return the share of the layers that the fullest GPU holds; bytes of the embedding and the head."""
        with self._model(self.dtype, torch.device("cpu"), self.int8) as (lm, _):
            layers = len(layer_bytes(lm.model)) or 1
            return math.ceil(layers / gpus) / layers, [parameter_bytes(m) for m in ends_of(lm.model)]

    def _reading(self, rows: int, length: int, chunk: int, *, device: torch.device) -> Memory:
        with self._model(self.dtype, device, self.int8) as (lm, ledger), torch.no_grad():
            before = ledger.start()
            ids = torch.zeros(rows, chunk, dtype=torch.long, device=device)
            state = _zero_state(lm, rows)
            hidden, final = lm(ids, state, logits=False)
            body, held = ledger.peak - before, ledger.live - before
            ledger.start()
            token_losses(lm, hidden, ids)
            head = ledger.peak - before
            del final
        keys = rows * self.sizes.keys_and_values(chunk)
        states = 2 * rows * self.sizes.state
        logits = min(max(0, head - held), max(body, head))
        return Memory(
            weights=self.sizes.weights,
            activations=max(0, max(body, head) - states - keys - logits),
            states=states,
            keys_and_values=rows * self.sizes.keys_and_values(length),
            logits=logits,
        )

    def training(self, setting: Setting) -> Memory:
        """Return the memory that a step takes on one device, the moments of AdamW included."""
        if setting not in self._planned:
            self._planned[setting] = self._counted(self._training, setting)
        return self._planned[setting]

    def _training(self, setting: Setting, *, device: torch.device) -> Memory:
        adapters = setting.lora_rank > 0
        held = self.dtype if adapters else torch.float32
        with self._model(held, device, setting.int8) as (lm, ledger):
            model = lm.model
            if adapters:
                with_lora(model, setting.lora_rank)
            train_only(model, setting.trainable)
            if setting.gradient_checkpointing:
                model.gradient_checkpointing_enable()
            lm.train()
            weights, trained = parameter_bytes(model), parameter_bytes(model, trained=True)
            gathered = gathered_bytes(model) if setting.shards > 1 else 0
            before = ledger.start()
            ids = torch.zeros(setting.rows, setting.length, dtype=torch.long, device=device)
            free = ROOM * self.held - (weights + MOMENTS * trained) // setting.shards - gathered
            for _ in range(1 + setting.accumulates):
                state = _zero_state(lm, setting.rows)
                autocast = torch.autocast(device.type, torch.bfloat16, enabled=setting.autocast)
                with autocast, assume_free(free):
                    hidden, final = lm(ids, state, logits=False)
                    loss = hidden_loss(lm, hidden, ids)
                loss.backward()
                del hidden, loss, final
            peak, vocabulary = ledger.peak - before, lm.vocab_size
        states = 2 * setting.rows * self.sizes.state
        keys = setting.rows * self.sizes.keys_and_values(setting.length)
        tokens = min(setting.rows * setting.length, max(1, LOGITS // vocabulary))
        rest = max(0, peak - trained - states - keys)
        logits = min(tokens * vocabulary * (2 if setting.autocast else 4), rest)
        return Memory(
            weights=weights // setting.shards,
            gradients=(2 if setting.shards == 1 < setting.replicas else 1) * trained // setting.shards,
            optimizer=MOMENTS * trained // setting.shards,
            activations=rest - logits + gathered,
            states=states,
            keys_and_values=keys,
            logits=logits,
        )

    def tokens_per_second(self, setting: Setting | None = None) -> float:
        """Return the tokens a second that a reading, or training in a setting, is estimated to reach."""
        small, large = SHARES["reading" if setting is None else "training"]
        place = math.log(max(self.sizes.parameters, 1) / _SMALL) / math.log(_LARGE / _SMALL)
        share = small + (large - small) * min(1.0, max(0.0, place))
        passes = 1
        if setting is not None:  # forward, gradients of inputs, those of weights; forward again
            narrow = setting.lora_rank or setting.trainable != "all"
            passes = (2 if narrow else 3) + setting.gradient_checkpointing
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return share * matrix_rate(self.device, dtype) / (passes * max(self.sizes.operations, 1))


def _zero_state(lm: RecurrentLM, rows: int) -> RecurrentState | None:
    return lm.zero_state(rows) if lm.family.recurrent else None


def outline_of(lm: RecurrentLM) -> Outline | None:
    """Return the outline of a model that is open; None for a module without a config of transformers."""
    if lm.wrapped:
        return None
    return Outline(lm.model.config, lm.model.dtype, lm.device, int8=lm.int8)


def reading_line(lm: RecurrentLM, rows: int, length: int, chunk: int) -> str | None:
    """Return what the loss of texts is estimated to take, in one line; None where that cannot be told."""
    outline = outline_of(lm)
    try:
        if outline is None:
            return None
        needs, speed = outline.reading(rows, length, chunk), outline.tokens_per_second()
    except Exception as error:
        logger.debug("no plan of a reading: %s", first_line(error))
        return None
    seconds = rows * length / speed
    pace = f"an estimated {speed:,.0f} tokens/s, {in_words(seconds)} a reading"
    return f"Plan: {needs} for {rows} x {length:,} positions; {pace}."


def training_line(lm: RecurrentLM, setting: Setting, tokens: int) -> str | None:
    """Return what a run over `tokens` is estimated to take, in one line; None where that cannot be told."""
    outline = outline_of(lm)
    try:
        if outline is None:
            return None
        needs = outline.training(setting)
        speed = outline.tokens_per_second(setting)
    except Exception as error:
        logger.debug("no plan of the training: %s", first_line(error))
        return None
    return (
        f"Plan: {needs} for {setting.rows} x {setting.length:,} tokens; an estimated {speed:,.0f} tokens/s, "
        f"{in_words(tokens / speed)}."
    )


def setting_of(lm: RecurrentLM, options: PosttrainOptions) -> Setting:
    """Return the setting that `PosttrainOptions` ask for."""
    return Setting(
        rows=options.batch_size,
        length=options.length,
        lora_rank=options.lora_rank,
        trainable=options.trainable or "all",
        gradient_checkpointing=options.gradient_checkpointing,
        shards=ranks.world_size() if options.fsdp else 1,
        replicas=ranks.world_size(),
        autocast=autocasts(lm, options),
        accumulates=options.accumulation > 1,
        int8=lm.int8,
    )


def fitting_line(lm: RecurrentLM, options: PosttrainOptions) -> str:
    """Return which setting would fit the device where `options` did not; empty where none is known."""
    outline = outline_of(lm)
    asked = setting_of(lm, options)
    try:
        if outline is None or outline.training(asked).total <= (room := ROOM * outline.held):
            return ""
        fits = what_fits(outline, asked, room, ranks.world_size())
        if fits is None:
            return ""
        takes = outline.training(fits).total / GIB
    except Exception as error:
        logger.debug("no plan of what fits: %s", first_line(error))
        return ""
    held = f"{takes:.3g} GiB of {room / GIB:.3g}"
    return f" By `longroll plan`, {fits.rows} rows with {fits.arguments} take {held}."


def settings_for(setting: Setting, gpus: int, *, int8: bool = False) -> list[Setting]:
    """Return the settings worth a comparison: the given one, and those that take less memory.

    Args:
        setting: what is asked for.
        gpus: over how many weights may be spread.
        int8: whether layers of the model can lie in 8 bits.
    """
    rank = setting.lora_rank or 16
    choices = [setting, replace(setting, gradient_checkpointing=True)]
    adapters = [replace(choice, lora_rank=rank, trainable="all") for choice in choices]
    choices += [] if setting.lora_rank else [replace(setting, trainable="scales")]
    choices += adapters
    least = replace(choices[-1], int8=True, shards=1)
    if gpus > 1 and not setting.int8:
        choices += [replace(choice, shards=gpus) for choice in choices]
    choices += [least] if int8 else []
    return list(dict.fromkeys(choices))


def what_fits(outline: Outline, setting: Setting, room: float, gpus: int = 1) -> Setting | None:
    """Return the first of `settings_for`, and then of fewer rows, that takes at most `room` bytes."""
    for rows in (setting.rows, *(setting.rows >> i for i in range(1, setting.rows.bit_length()))):
        for choice in settings_for(replace(setting, rows=rows), gpus, int8=outline.takes_int8):
            if outline.training(choice).total <= room:
                return choice
    return None


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of a large matrix product on a device, measured.

    Raises:
        LongrollError: the device has no memory for the matrices.
    """
    size = _SQUARE.get(device.type, 1024)
    best = math.inf
    try:
        numbers = torch.Generator(device).manual_seed(0)  # random ones: a GPU multiplies equal ones faster
        a = torch.randn(size, size, dtype=dtype, device=device, generator=numbers)
        for _ in range(4):
            began = time.perf_counter()
            (a @ a)[0, 0].item()
            best = min(best, time.perf_counter() - began)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise LongrollError(
            f"`device` {device} has no free memory: end the programs that fill it, or name another device."
        ) from error
    return 2 * size**3 / best


def in_words(seconds: float) -> str:
    """Return a duration as people say it."""
    for size, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes"), (1, "seconds")):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:.0f} {unit}"
    return "about a second"
