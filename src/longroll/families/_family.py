"""How a family of models takes and gives its state."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from longroll.errors import LongrollError
from longroll.families import _heads
from longroll.families._cache import StateCache
from longroll.families._dispatch import attention_in_blocks, clean_handoffs, own_recurrence, torch_on_cpu
from longroll.families._documents import Documents, Results
from longroll.families._mixers import own_mixers
from longroll.families._norms import fuse_norms
from longroll.families._padding import Padding
from longroll.ops._backend import FLA, KERNELS
from longroll.state import RecurrentState, StateKey

Restart = Literal["zero", "state"]
_FORWARD = {"cpu": 64, "cuda": 4096}
"""Tokens whose time a forward of few takes: a GPU waits for Python (measured: benchmarks/documents.py)."""


@dataclass(frozen=True)
class Family:
    """How one `model_type` of transformers takes and gives its state.

    A family whose state travels in another container is a subclass that overrides `prepare` and `cache`.
    """

    kind: str
    """What a layer's recurrence is called; `attention` (the control) and `conv` have none."""
    cache_argument: str = "past_key_values"
    """The forward argument that takes the cache."""
    op: str | None = None
    """Longroll's op that runs in the place of transformers' own recurrence (see `_dispatch`)."""
    kernel: str | None = None
    """The GPU kernel, package first, that transformers' own recurrence is where the package is installed."""
    scans: str | None = None
    """The config entry that says how many scans a layer runs, if not one."""
    reads_tail: bool = False
    """Mixers prepend the conv tail themselves (see `StateCache`)."""
    blocks: bool = False
    """Attention layers hand what the cache returns to the attention function as it is, so that they can read
    earlier keys and values in the blocks that hold them."""
    learned_positions: str | None = None
    """The config entry that bounds the positions the model has embeddings for."""
    masks_padding: bool = False
    """The cache keeps padding on the right (its `real`) out of the state."""
    reference: str = "transformers' own logits"
    """Reference that the numbers are checked against."""
    head: Callable[[PreTrainedModel, Tensor], Tensor] = _heads.plain
    """Hidden states (..., d_model) to logits (..., V)."""

    @property
    def recurrent(self) -> bool:
        """Whether there is a state for an intervention to choose."""
        return self.kind not in ("attention", "conv")

    @property
    def on_fla(self) -> bool:
        """Whether its recurrence runs on fla's kernels, on a GPU that has them."""
        return KERNELS.get(self.op or "") == FLA or (self.kernel or "").startswith("fla.")

    def vocab_size(self, model: PreTrainedModel) -> int:
        """Return rows of the embedding: ids at or above it are outside the vocabulary."""
        weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
        return weight.shape[0]

    def width(self, model: PreTrainedModel) -> int:
        """Return the width of a hidden state."""
        return model.get_input_embeddings().embedding_dim  # type: ignore[return-value]

    def head_parameters(self, model: PreTrainedModel) -> list[nn.Parameter]:
        """Return the weights that `head` reads, those among them that are trained."""
        return [p for p in model.get_output_embeddings().parameters() if p.requires_grad]

    def architecture(self, model: PreTrainedModel) -> str:
        """Return what a model is called in results."""
        return model.config.model_type

    def layer_kind(self, model: PreTrainedModel, key: StateKey) -> str:
        """Name of the recurrence of a layer in `RecurrentLM.layers`."""
        return self.kind

    def state_name(self, model: PreTrainedModel, key: StateKey) -> str:
        """Return what a state tensor is called in messages."""
        return f"layer {key.layer}, {key.part} state"

    def prepare(self, model: PreTrainedModel) -> None:
        """Make `model` ready to take a state: once, after loading."""
        if self.op is not None:
            _check_activation(model)
            own_recurrence(_modeling(model))
        torch_on_cpu(_modeling(model))
        if self.blocks:
            attention_in_blocks(_modeling(model))
        fuse_norms(model)
        own_mixers(model)
        for module in model.modules():
            if hasattr(module, "_can_checkpoint_with_cache"):
                # StateCache is idempotent: a recompute reads what the forward read
                module._can_checkpoint_with_cache = True  # type: ignore[assignment]

    def run(
        self,
        module: nn.Module,
        input_ids: Tensor,
        state: RecurrentState | None = None,
        *,
        attention_mask: Tensor | None = None,
        starts: Tensor | None = None,
        restart: Restart = "zero",
        logits: bool = True,
    ) -> tuple[Any, RecurrentState]:
        """Read tokens from an initial state: the one forward through which every state enters and leaves.

        Args:
            module: the model, or DDP's, peft's or torch.compile's wrapper of it.
            input_ids: (B, T) token ids, T >= 1.
            state: the initial state; None is the zero state.
            attention_mask: (B, T), 1 at real tokens and 0 at padding; None: every token is real.
            starts: (B, T), nonzero at the first token of each document inside a row; None: each row is one
                document, which goes on from `state`.
            restart: what a document marked in `starts` starts from: the zero state, or `state`'s of its row.
            logits: False runs the model without its head; `module` is then the model itself.

        Returns:
            The model's output (`.logits` or `.last_hidden_state`), and the final state on the graph.

        Raises:
            LongrollError: for positions that the model has no embeddings for, a mask or starts of another
                shape than the tokens, and a state whose keys and values were not kept.
        """
        if state is not None and state.ragged:
            raise LongrollError(
                "The rows of this state have read different numbers of tokens, and their keys and values are "
                "not kept: start a new text from state.part('recurrent', 'conv')."
            )
        if attention_mask is not None or starts is not None:
            overhead = _FORWARD.get(input_ids.device.type, 0)
            documents = Documents(attention_mask, starts, input_ids.shape, overhead=overhead)
            if not documents.whole:
                return self._run_documents(module, input_ids, state, documents, restart, logits)
        return self._run_rows(module, input_ids, state, None, logits)

    def _run_rows(
        self,
        module: nn.Module,
        input_ids: Tensor,
        state: RecurrentState | None,
        padding: Padding | None,
        logits: bool,
    ) -> tuple[Any, RecurrentState]:
        """Return one forward of rows that are a document each."""
        model = unwrapped(module)
        inputs = self._inputs(model, input_ids, state)
        cache = inputs[self.cache_argument]
        if padding is not None:
            cache.padding = padding
        with clean_handoffs():
            output = module(**inputs) if logits else model.base_model(**inputs)
        return output, cache.final(input_ids.shape[1])

    def _run_documents(
        self,
        module: nn.Module,
        input_ids: Tensor,
        state: RecurrentState | None,
        documents: Documents,
        restart: Restart,
        logits: bool,
    ) -> tuple[Any, RecurrentState]:
        """Return a forward for each group of documents; outputs and final states back in their places."""
        results = Results(input_ids.shape, state)
        anew = None if state is None or restart == "zero" else state.part("recurrent", "conv")
        # keys and values of the row are another document's, and zeros are no absence of them
        apart = state is not None and any(key.part == "attention" for key in state)
        once = isinstance(module, DistributedDataParallel) or is_sharded(module)
        for group in documents.groups(padded=self.masks_padding, together=not apart, once=once):
            group = group.to(input_ids.device)
            padding = None
            if group.lengths is not None:
                padding = Padding(group.lengths, group.place.shape[1], input_ids.device)
            if group.rows:
                initial = state
            elif state is None or (apart and group.fresh[0]):
                initial = anew and anew.rows(group.row)
            elif apart or restart == "state":
                initial = state.rows(group.row)
            else:
                initial = state.rows(group.row).where(~group.fresh)
            ids = input_ids.flatten()[group.place]
            output, final = self._run_rows(module, ids, initial, padding, logits)
            values = output.logits if logits else output.last_hidden_state
            results.add(group, values, final, getattr(output, "router_logits", None) or ())
        outputs, final = results.whole()
        router_logits: Any = results.router_logits
        if logits:
            return MoeCausalLMOutputWithPast(logits=outputs, router_logits=router_logits), final
        return _BodyOutput(last_hidden_state=outputs, router_logits=router_logits), final

    def cache(self, model: PreTrainedModel, input_ids: Tensor, state: RecurrentState | None) -> Any:
        """Return the container that starts a forward from `state`; its `final(tokens)` is the state
        afterwards.
        """
        return StateCache(
            model.config,
            state,
            owns_recurrence=self.op is not None,
            scans=getattr(model.config, self.scans) if self.scans else None,
            reads_tail=self.reads_tail,
            context=not self.recurrent,
            in_blocks=self.in_blocks(model) and not (model.training or torch.is_grad_enabled()),
        )

    def in_blocks(self, model: PreTrainedModel) -> bool:
        """Return whether attention reads earlier keys and values in blocks where no gradient is asked for."""
        return self.blocks and model.config.get_text_config()._attn_implementation == "sdpa"

    def _inputs(
        self, model: PreTrainedModel, input_ids: Tensor, state: RecurrentState | None
    ) -> dict[str, Any]:
        """Return forward arguments that start from `state`; their `cache_argument` holds the cache."""
        cache = self.cache(model, input_ids, state)
        # use_cache stays False: the cache is written anyway, and gradient checkpointing lets it be
        arguments = {"input_ids": input_ids, self.cache_argument: cache, "use_cache": False}
        if _takes_positions(model):  # explicit: some default to starting at 0 whatever the cache holds
            first, tokens = 0 if state is None else state.seen, input_ids.shape[1]
            self._check_positions(model, first + tokens)
            positions = torch.arange(first, first + tokens, device=input_ids.device)
            arguments["position_ids"] = positions.expand(input_ids.shape[0], -1)
        return arguments

    def _check_positions(self, model: PreTrainedModel, stop: int) -> None:
        limit = getattr(model.config, self.learned_positions) if self.learned_positions else None
        if limit is not None and stop > limit:
            raise LongrollError(
                f"{model.config.model_type} has embeddings for {limit} positions and was asked for {stop}: "
                f"read {limit} tokens or less (`tokens.shape[1]`)."
            )
        for kind, limit in _switching_rope(model):
            if stop > limit:
                raise LongrollError(
                    f"{model.config.model_type} turns its keys by other angles once it has read more than "
                    f"{limit} positions (rope_type {kind!r}), so that chunks of one text would not fit: read "
                    f"{limit} tokens or less (`tokens.shape[1]`), or set a rope_type that stays, as yarn, in "
                    "its config."
                )


@dataclass
class _BodyOutput(MoeModelOutputWithPast):
    """With what the forwards of heads read of a body's output besides."""

    cache_params: Any = None
    state: Any = None


def unwrapped(module: Any) -> Any:
    """Return the model inside the wrappers of torch.compile, DDP and peft; FSDP2 wraps in place."""
    while True:
        if isinstance(module, DataParallel | DistributedDataParallel):
            module = module.module
        elif hasattr(module, "_orig_mod"):
            module = module._orig_mod
        elif hasattr(module, "get_base_model"):
            module = module.get_base_model()
        else:
            return module


def is_sharded(module: nn.Module) -> bool:
    """Return whether FSDP2 holds `module` or a module in it, so that all ranks make the same forwards."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def _check_activation(model: PreTrainedModel) -> None:
    for module in model.modules():
        activation = getattr(module, "activation", None) if hasattr(module, "conv1d") else None
        if isinstance(activation, str) and activation not in ("silu", "swish"):
            raise LongrollError(
                f"{model.config.model_type} with {activation!r} after its short convolution cannot run: "
                "longroll's ops, as mamba-ssm's kernels, compute silu."
            )


def _modeling(model: PreTrainedModel) -> ModuleType:
    return importlib.import_module(type(model).__module__)


def _switching_rope(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    """Return the kinds of RoPE whose frequencies depend on the length read, and up to which length they do
    not.
    """
    config = model.config.get_text_config()
    entries = getattr(config, "rope_parameters", None) or {}
    for rope in (entries, *entries.values()):  # of some models, one for each kind of layer
        kind = rope.get("rope_type") if isinstance(rope, dict) else None
        if kind in ("dynamic", "longrope"):
            yield kind, rope.get("original_max_position_embeddings") or config.max_position_embeddings


def _takes_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters
