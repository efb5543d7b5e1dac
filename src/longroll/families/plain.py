"""A module of one's own, `forward(ids, state) -> (logits, state)`, behind transformers' model class.

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
from torch.utils import _pytree as pytree
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from longroll.errors import LongrollError
from longroll.families._family import Family, unwrapped
from longroll.families._padding import Padding
from longroll.families._state_tree import Leaf, StateTree, batch_axes, check_paths, keys_of, named_leaves
from longroll.state import Part, RecurrentState, StateKey

MODEL_TYPE = "longroll_module"
_ROWS, _TOKENS = (2, 3), (3, 5)  # of the forwards that show how a state is laid out
_TAIL = 16  # tokens after which a short convolution has forgotten

Head = Callable[[Tensor], Tensor]


class PlainConfig(PreTrainedConfig):
    """What is saved beside the weights of a wrapped module: its sizes, and what built it."""

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
            self.tree = self._probe(batch_axis, dict(part or {}))

    def init_weights(self) -> None:
        """Leave the weights as they are: transformers would draw new ones."""

    def forward(self, input_ids: Tensor, state: Any = None, *, logits: bool = True) -> tuple[Tensor, Any]:
        """Logits, or what the module returns before the head, and the state as the module lays it out."""
        returned = self.module(input_ids, state)
        if not isinstance(returned, tuple | list) or len(returned) != 2:
            raise LongrollError(f"forward returns {_kind(returned)}, not (logits, state).")
        output, final = returned
        if not isinstance(output, Tensor) or output.ndim != 3 or output.shape[:2] != input_ids.shape:
            raise LongrollError(
                f"forward returns {_kind(output)} for ids {tuple(input_ids.shape)}: its first output "
                "is (batch, tokens, ...)."
            )
        return (self.head(output) if logits else output), final

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of what the module returns."""
        head = self.get_submodule(self._head_path) if self._head_path else self._head_function
        logits = hidden if head is None else head(hidden)
        # the loss overwrites logits that it takes a gradient of, and their own backward may read them
        return logits if isinstance(head, nn.Linear) or not torch.is_grad_enabled() else logits.clone()

    def head_parameters(self) -> list[nn.Parameter]:
        """The weights of the head, those among them that are trained."""
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
        """The embedding of the vocabulary, where the module has one.

        Raises:
            LongrollError: where it has none.
        """
        for module in self.module.modules():
            if isinstance(module, nn.Embedding) and module.num_embeddings == self.config.vocab_size:
                return module
        raise LongrollError(f"{self.name_or_path} has no nn.Embedding of {self.config.vocab_size} entries.")

    def get_output_embeddings(self) -> nn.Module | None:
        """The head, where it is a module."""
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
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise LongrollError(f"{folder}: its weights cannot be loaded: {said}") from error
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
        """How the state is laid out."""
        return f"vocab_size={self.config.vocab_size}, state=({self.tree})"

    @torch.no_grad()
    def _probe(self, batch_axis: int | Mapping[str, int] | None, part: dict[str, Part]) -> StateTree:
        """See how the state is laid out: in forwards of several sizes, and from a state of noise."""
        was_training, vocabulary = self.training, self.config.vocab_size
        self.eval()
        seen: dict[tuple[int, int], tuple[Tensor, Any]] = {}
        for rows in _ROWS:
            for tokens in _TOKENS:
                seen[rows, tokens] = self._try(self._ids(rows, tokens), None)
        output, first = seen[_ROWS[0], _TOKENS[0]]
        self.config.hidden_size = output.shape[-1]
        with _failing(f"`head` fails on what forward returns, {_kind(output)}"):
            logits = self.head(output)
        if not isinstance(logits, Tensor) or logits.shape != (*output.shape[:2], vocabulary):
            returns = "head gives" if self.has_head else "forward returns"
            mend = "" if self.has_head else " If these are hidden states, give head=."
            raise LongrollError(f"{returns} {_kind(logits)}, and vocab_size is {vocabulary}.{mend}")
        leaves = {sizes: named_leaves(final) for sizes, (_, final) in seen.items()}
        for path, tensor in leaves[_ROWS[0], _TOKENS[0]].items():
            longer = leaves[_ROWS[0], _TOKENS[1]][path]
            if tensor.shape != longer.shape:
                raise LongrollError(
                    f"{path} has shape {tuple(tensor.shape)} after {_TOKENS[0]} tokens and "
                    f"{tuple(longer.shape)} after {_TOKENS[1]}: a state that grows, as keys and values do, "
                    "needs a family of its own (longroll.register_family)."
                )
        axes = batch_axes({rows: leaves[rows, _TOKENS[0]] for rows in _ROWS}, batch_axis)
        examples = leaves[_ROWS[0], _TOKENS[0]]
        check_paths("part", part, list(examples))
        for path, chosen in part.items():
            if chosen not in ("recurrent", "conv", "attention"):
                raise LongrollError(f"part of {path}: {chosen!r} is not recurrent, conv or attention.")
        _, spec = pytree.tree_flatten(first)
        parts: dict[str, Part] = self._parts(spec, examples) | part
        if "recurrent" not in parts.values():
            raise LongrollError(
                f"no tensor of the state is recurrent: {', '.join(f'{p} is {k}' for p, k in parts.items())}. "
                "Set part={path: 'recurrent'} where that is wrong."
            )
        keys = keys_of(axes, parts, examples)
        self.train(was_training)
        return StateTree(
            spec,
            tuple(
                Leaf(
                    path,
                    axes[path],
                    parts[path],
                    tuple(size for axis, size in enumerate(tensor.shape) if axis != axes[path]),
                    None if tensor.dtype == self.dtype else tensor.dtype,
                    keys[path],
                )
                for path, tensor in examples.items()
            ),
        )

    @property
    def has_head(self) -> bool:
        """Whether the module returns hidden states."""
        return bool(self._head_path or self._head_function)

    def _try(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        with unwritten(state):
            given = "None, which is the zero state" if state is None else "one that it returned"
            with _failing(f"forward(ids, state) fails where state is {given}"):
                return self(ids, state, logits=False)

    def _ids(self, rows: int, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.config.vocab_size, (rows, tokens), generator=generator)
        return ids.to(self.device)

    def _parts(self, spec: Any, examples: Mapping[str, Tensor]) -> dict[str, Part]:
        """The part of each leaf: what forgets where it started within a few tokens is a short convolution.

        Integers (positions, token ids) are context, which goes under `attention`.
        """
        parts: dict[str, Part] = {
            path: "recurrent" if t.is_floating_point() else "attention" for path, t in examples.items()
        }
        noise = {path: _noise(t, 0) if t.is_floating_point() else t.clone() for path, t in examples.items()}
        ids = self._ids(_ROWS[0], _TAIL)
        self._try(ids, _tree(noise, spec))  # a state written in place: said before autograd says it
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):  # cudnn's GRU: not in eval mode
            start = {path: t.clone().requires_grad_(t.is_floating_point()) for path, t in noise.items()}
            output, after_one = self._try(ids[:, :1], _tree(start, spec))
            _, after_all = self._try(ids, _tree(start, spec))
            soon, late = named_leaves(after_one), named_leaves(after_all)
            for path in start:
                used = parts[path] == "recurrent" and _reaches([output, *soon.values()], start[path])
                # of a final state that is detached nothing can be told: the self-check refuses it
                if used and late[path].requires_grad and not _reaches([late[path]], start[path]):
                    parts[path] = "conv"
        return parts


@contextlib.contextmanager
def unwritten(state: Any) -> Iterator[None]:
    """Raise a LongrollError where the block writes into a tensor of `state`."""
    tensors = [t for t in pytree.tree_leaves(state) if isinstance(t, Tensor) and not t.is_inference()]
    before = [t._version for t in tensors]
    yield
    if before != [t._version for t in tensors]:
        raise LongrollError(
            "forward writes in place into the state that it is given: make a new tensor (h = h * a, not "
            "h *= a), since the caller may read the old state again."
        )


@contextlib.contextmanager
def _saying(name: str) -> Iterator[None]:
    """Begin the LongrollErrors of the block with the model's name."""
    try:
        yield
    except LongrollError as error:
        raise LongrollError(f"{name}: {error}") from error.__cause__


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    """Say in one line what an error of the user's code means."""
    try:
        yield
    except LongrollError:
        raise
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise LongrollError(f"{what}: {said}") from error


def _check_arguments(module: Any, vocab_size: int, train_length: int | None, head: Any) -> None:
    if isinstance(module, PreTrainedModel):
        raise LongrollError(
            f"`module` is a {type(module).__name__}: for a model of transformers use longroll.RecurrentLM, and "
            "longroll.register_family where longroll does not know it."
        )
    if not isinstance(module, nn.Module):
        raise LongrollError(f"`module` is a {type(module).__name__}, not an nn.Module.")
    if head is not None and not callable(head):
        raise LongrollError(f"`head` is {head!r}: give a submodule of the module, or a function.")
    for name, size in (("vocab_size", vocab_size), ("train_length", train_length)):
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise LongrollError(f"`{name}` is {size!r}: give a number, 1 or above.")


def _noise(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)


def _reaches(targets: list[Tensor], start: Tensor) -> bool:
    ends = [t for t in targets if t.requires_grad]
    weights = [_noise(t, 1) for t in ends]
    if not ends:
        return False
    (gradient,) = torch.autograd.grad(ends, [start], weights, retain_graph=True, allow_unused=True)
    return gradient is not None and bool(gradient.ne(0).any())


def _tree(leaves: Mapping[str, Tensor], spec: Any) -> Any:
    return pytree.tree_unflatten(list(leaves.values()), spec)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return (
        f"{type(value).__name__} of {len(value)}" if isinstance(value, tuple | list) else type(value).__name__
    )


def _tied(model: nn.Module) -> dict[str, str]:
    """Names of weights that are another's, which the file then holds once."""
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
        """The size given to `longroll.wrap`."""
        return model.config.vocab_size

    def width(self, model: Any) -> int:
        """Numbers of what the module returns for a token."""
        return model.config.hidden_size

    def architecture(self, model: Any) -> str:
        """The module's class."""
        return type(model.module).__name__

    def layer_kind(self, model: Any, key: StateKey) -> str:
        """The module's own name of the state tensor."""
        return model.tree.path_of(key)

    def head_parameters(self, model: Any) -> list[nn.Parameter]:
        """The trained weights of the head given to `longroll.wrap`."""
        return model.head_parameters()

    def state_name(self, model: Any, key: StateKey) -> str:
        """The module's own name of a state tensor, and its layer."""
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
        """One forward of the module; `padding` is None, since a module of one's own masks no padding."""
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
