"""A module of the user, `forward(ids, state) -> (logits, state)`, behind transformers' model class.

The class brings what the rest needs of a model: a config, a device, safetensors, HF Trainer and peft. Nothing
of it enters a forward: `PlainFamily` calls the module, and `StateTree` translates its state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from longroll.errors import LongrollError, named
from longroll.families._family import Family, unwrapped
from longroll.families._padding import Padding
from longroll.families._probe import describe, probe, unwritten
from longroll.state import Part, RecurrentState, StateKey

MODEL_TYPE = "longroll_module"
Head = Callable[[Tensor], Tensor]


class PlainConfig(PreTrainedConfig):
    """Config that is saved with the weights of a wrapped module: its sizes, and what built it."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        vocab_size: int = 0,
        hidden_size: int = 0,
        train_length: int | None = None,
        plugin: str | None = None,
        built: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the sizes, the plug-in that built the module, and the name that the plug-in was given."""
        self.vocab_size, self.hidden_size, self.train_length = vocab_size, hidden_size, train_length
        self.plugin, self.built = plugin, built
        super().__init__(**kwargs)


class PlainModel(PreTrainedModel):
    """A module and, where it returns hidden states, its head: see `longroll.wrap` for the arguments."""

    config_class = PlainConfig
    supports_gradient_checkpointing = False

    def __init__(
        self,
        module: nn.Module,
        *,
        vocab_size: int,
        train_length: int | None = None,
        head: Head | None = None,
        name: str = "",
        batch_axis: int | Mapping[str, int] | None = None,
        part: Mapping[str, Part] | None = None,
    ) -> None:
        name = name or type(module).__name__
        _check_arguments(module, vocab_size, train_length, head)
        super().__init__(PlainConfig(vocab_size, train_length=train_length, built=name, name_or_path=name))
        self.module = module
        self._head_function, self._head_path = head, None
        if isinstance(head, nn.Module):  # by path: deepcopy and peft may put another module there
            self._head_function = None
            inside = (path for path, found in self.named_modules() if found is head)
            self._head_path = next(inside, "head_module")
            if self._head_path == "head_module":
                self.head_module = head
        self.post_init()
        self.all_tied_weights_keys = self._tied_weights_keys = _tied(self)
        with _saying(name):
            self.tree = probe(self, batch_axis, dict(part or {}))

    def init_weights(self) -> None:
        """Leave the weights as they are: transformers would draw new ones."""

    def forward(self, input_ids: Tensor, state: Any = None, *, logits: bool = True) -> tuple[Tensor, Any]:
        """Return logits, or what the module returns before the head, and the state as the module lays it
        out.
        """
        returned = self.module(input_ids, state)
        if not isinstance(returned, tuple | list) or len(returned) != 2:
            raise LongrollError(f"forward returns {describe(returned)}, not (logits, state).")
        output, final = returned
        if not isinstance(output, Tensor) or output.ndim != 3 or output.shape[:2] != input_ids.shape:
            raise LongrollError(
                f"forward returns {describe(output)} for ids {tuple(input_ids.shape)}: its first output "
                "is (batch, tokens, ...)."
            )
        return (self.head(output) if logits else output), final

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) of what the module returns."""
        head = self.get_submodule(self._head_path) if self._head_path else self._head_function
        logits = hidden if head is None else head(hidden)
        # the loss overwrites logits that it takes a gradient of, and their own backward may read them
        return logits if isinstance(head, nn.Linear) or not torch.is_grad_enabled() else logits.clone()

    def head_parameters(self) -> list[nn.Parameter]:
        """Return the weights of the head, those among them that are trained."""
        if self._head_path:
            return [p for p in self.get_submodule(self._head_path).parameters() if p.requires_grad]
        if self._head_function is None:
            return []
        weights = [p for p in self.parameters() if p.requires_grad]
        with torch.enable_grad():  # of a function there is nothing to ask but its gradient
            hidden = torch.zeros(1, 1, self.config.hidden_size, dtype=self.dtype, device=self.device)
            logits = self.head(hidden)
            if not (weights and logits.requires_grad):
                return []
            found = torch.autograd.grad(logits.sum(), weights, allow_unused=True)
        return [p for p, g in zip(weights, found, strict=True) if g is not None]

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of the vocabulary, where the module has one.

        Raises:
            LongrollError: where it has none.
        """
        for module in self.module.modules():
            if isinstance(module, nn.Embedding) and module.num_embeddings == self.config.vocab_size:
                return module
        raise LongrollError(f"{self.name_or_path} has no nn.Embedding of {self.config.vocab_size} entries.")

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head, where it is a module."""
        return self.get_submodule(self._head_path) if self._head_path else None

    def load_weights(self, folder: Path) -> None:
        """Take the weights that were saved in `folder`.

        Raises:
            LongrollError: for a file that is missing or broken, and weights that are not those of the module.
        """
        try:
            tensors: dict[str, Tensor] = {}
            files = sorted(folder.glob("model*.safetensors"))
            for file in files:
                tensors |= load_file(file, device=str(self.device))
            missing, strange = self.load_state_dict(tensors, strict=False)
        except Exception as error:
            raise LongrollError(f"{folder}: its weights cannot be loaded: {named(error)}") from error
        missing = [name for name in missing if name not in self.all_tied_weights_keys]
        for problem, names in (("are missing", missing), ("are not the module's", strange)):
            if names:
                raise LongrollError(
                    f"{folder}: {len(names)} weights {problem}: {names[:3]}. Name the plug-in that built it."
                )

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: which parts of a module can be recomputed, its author knows.

        Raises:
            LongrollError: always.
        """
        raise LongrollError(
            f"{self.name_or_path}: `gradient_checkpointing` knows no layers of a wrapped module. Leave it "
            "out, and use torch.utils.checkpoint inside the forward."
        )

    def extra_repr(self) -> str:
        """Return how the state is laid out."""
        return f"vocab_size={self.config.vocab_size}, state=({self.tree})"

    @property
    def has_head(self) -> bool:
        """Whether the module returns hidden states."""
        return bool(self._head_path or self._head_function)


@contextlib.contextmanager
def _saying(name: str) -> Iterator[None]:
    """Begin the LongrollErrors of the block with the model's name."""
    try:
        yield
    except LongrollError as error:
        raise LongrollError(f"{name}: {error}") from error.__cause__


def _check_arguments(module: Any, vocab_size: int, train_length: int | None, head: Any) -> None:
    if isinstance(module, PreTrainedModel):
        raise LongrollError(
            f"`module` is a {type(module).__name__}: for a model of transformers use longroll.RecurrentLM, "
            "and longroll.register_family where longroll does not know it."
        )
    if not isinstance(module, nn.Module):
        raise LongrollError(f"`module` is a {type(module).__name__}, not an nn.Module.")
    if head is not None and not callable(head):
        raise LongrollError(f"`head` is {head!r}: give a submodule of the module, or a function.")
    for name, size in (("vocab_size", vocab_size), ("train_length", train_length)):
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise LongrollError(f"`{name}` is {size!r}: give a number, 1 or above.")


def _tied(model: nn.Module) -> dict[str, str]:
    """Return names of weights that are another's, which the file then holds once."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied


def _plain_head(model: Any, hidden: Tensor) -> Tensor:
    return model.head(hidden)


@dataclass(frozen=True)
class PlainFamily(Family):
    """A wrapped module: its forward takes and gives the state as the module lays it out."""

    kind: str = "own"
    head: Callable[[Any, Tensor], Tensor] = _plain_head

    def prepare(self, model: Any) -> None:
        """Leave the module as it is."""

    def vocab_size(self, model: Any) -> int:
        """Return the size given to `longroll.wrap`."""
        return model.config.vocab_size

    def width(self, model: Any) -> int:
        """Return the width of what the module returns for a token."""
        return model.config.hidden_size

    def architecture(self, model: Any) -> str:
        """Return the module's class."""
        return type(model.module).__name__

    def layerdescribe(self, model: Any, key: StateKey) -> str:
        """Return the module's own name of the state tensor."""
        return model.tree.path_of(key)

    def head_parameters(self, model: Any) -> list[nn.Parameter]:
        """Return the trained weights of the head given to `longroll.wrap`."""
        return model.head_parameters()

    def state_name(self, model: Any, key: StateKey) -> str:
        """Return the module's own name of a state tensor, and its layer."""
        path = model.tree.path_of(key)
        return f"{path} (layer {key.layer})"

    def _run_rows(
        self,
        module: nn.Module,
        input_ids: Tensor,
        state: RecurrentState | None,
        padding: Padding | None,
        logits: bool,
    ) -> tuple[Any, RecurrentState]:
        """Return one forward of the module; `padding` is None, since a wrapped module masks no
        padding.
        """
        model = unwrapped(module)
        rows, tokens = input_ids.shape
        with _saying(model.name_or_path):
            initial = model.tree.unflatten(state, rows, model.dtype, input_ids.device)
            with unwritten(initial):
                output, final = module(input_ids, initial, logits=logits)
            tensors = model.tree.flatten(final, rows)
        seen = tokens + (0 if state is None else state.seen)
        whole = CausalLMOutput(logits=output) if logits else BaseModelOutput(output)
        return whole, RecurrentState(tensors, seen=seen)
