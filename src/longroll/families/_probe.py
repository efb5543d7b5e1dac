"""How a module lays its state out: seen in a few forwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from longroll.errors import LongrollError, named
from longroll.families._state_tree import Leaf, StateTree, batch_axes, check_paths, keys_of, named_leaves
from longroll.state import Part

if TYPE_CHECKING:
    from longroll.families.plain import PlainModel

_ROWS, _TOKENS = (2, 3), (3, 5)  # of the forwards from the zero state
_TAIL = 16  # tokens after which a short convolution has forgotten


@torch.no_grad()
def probe(model: PlainModel, batch_axis: int | Mapping[str, int] | None, part: dict[str, Part]) -> StateTree:
    """Find batch axis, part and layer of each tensor of the state; note the size of the hidden states.

    Args:
        model: the module and its head.
        batch_axis: where it is declared, for all tensors or by name.
        part: parts of the tensors whose part is declared.

    Raises:
        LongrollError: for a forward, a head or a state that is not as `longroll.wrap` says.
    """
    was_training = model.training
    model.eval()
    try:
        first, *longer_and_wider = (_forward(model, rows, tokens) for rows in _ROWS for tokens in _TOKENS)
        output, state = first
        model.config.hidden_size = output.shape[-1]
        _check_logits(model, output)
        examples = named_leaves(state)
        longer, wider, _ = (named_leaves(state) for _, state in longer_and_wider)
        _check_fixed(examples, longer)
        axes = batch_axes(dict(zip(_ROWS, (examples, wider), strict=True)), batch_axis)
        check_paths("part", part, list(examples))
        for path, chosen in part.items():
            if chosen not in get_args(Part):
                raise LongrollError(f"part of {path}: {chosen!r} is not one of {', '.join(get_args(Part))}.")
        _, spec = pytree.tree_flatten(state)
        parts = _parts(model, spec, examples) | part
    finally:
        model.train(was_training)
    if "recurrent" not in parts.values():
        raise LongrollError(
            f"no tensor of the state is recurrent: {', '.join(f'{p} is {k}' for p, k in parts.items())}. "
            "Set part={path: 'recurrent'} where that is wrong."
        )
    keys = keys_of(axes, parts, examples)
    return StateTree(
        spec,
        tuple(
            Leaf(
                path,
                axes[path],
                parts[path],
                tuple(size for axis, size in enumerate(tensor.shape) if axis != axes[path]),
                None if tensor.dtype == model.dtype else tensor.dtype,
                keys[path],
            )
            for path, tensor in examples.items()
        ),
    )


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


def describe(value: Any) -> str:
    """Return what a value is, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    name = type(value).__name__
    return f"{name} of {len(value)}" if isinstance(value, tuple | list) else name


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    """Say in one line what an error of the user's code means."""
    try:
        yield
    except LongrollError:
        raise
    except Exception as error:
        raise LongrollError(f"{what}: {named(error)}") from error


def _forward(model: PlainModel, rows: int, tokens: int, state: Any = None) -> tuple[Tensor, Any]:
    ids = torch.randint(model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
    given = "None, which is the zero state" if state is None else "one that it returned"
    with unwritten(state), _failing(f"forward(ids, state) fails where state is {given}"):
        return model(ids.to(model.device), state, logits=False)


def _check_logits(model: PlainModel, output: Tensor) -> None:
    with _failing(f"`head` fails on what forward returns, {describe(output)}"):
        logits = model.head(output)
    vocabulary = model.config.vocab_size
    if not isinstance(logits, Tensor) or logits.shape != (*output.shape[:2], vocabulary):
        returns = "head gives" if model.has_head else "forward returns"
        mend = "" if model.has_head else " If these are hidden states, give head=."
        raise LongrollError(f"{returns} {describe(logits)}, and vocab_size is {vocabulary}.{mend}")


def _check_fixed(short: Mapping[str, Tensor], longer: Mapping[str, Tensor]) -> None:
    sizes = [", ".join(f"{path} {tuple(t.shape)}" for path, t in state.items()) for state in (short, longer)]
    if sizes[0] != sizes[1]:
        raise LongrollError(
            f"the state is {sizes[0]} after {_TOKENS[0]} tokens and {sizes[1]} after {_TOKENS[1]}: a state "
            "that grows, as keys and values do, needs its own family (longroll.register_family)."
        )


def _parts(model: PlainModel, spec: Any, examples: Mapping[str, Tensor]) -> dict[str, Part]:
    """Return the part of each leaf: what forgets where it started within a few tokens is a short convolution.

    Integers (positions, token ids) are context, which goes under `attention`.
    """
    parts: dict[str, Part] = {
        path: "recurrent" if t.is_floating_point() else "attention" for path, t in examples.items()
    }
    noise = [_noise(t, 0) if t.is_floating_point() else t.clone() for t in examples.values()]
    rows = _ROWS[0]
    _forward(model, rows, 1, pytree.tree_unflatten(noise, spec))  # in place: said before autograd says it
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):  # cudnn's GRU: not in eval mode
        noise = [t.clone().requires_grad_(t.is_floating_point()) for t in noise]
        start = pytree.tree_unflatten(noise, spec)
        output, after_one = _forward(model, rows, 1, start)
        _, after_all = _forward(model, rows, _TAIL, start)
        soon, late = named_leaves(after_one), named_leaves(after_all)
        for path, leaf in zip(examples, noise, strict=True):
            used = leaf.requires_grad and _reaches([output, *soon.values()], leaf)
            # of a final state that is detached nothing can be measured: the self-check refuses it
            if used and late[path].requires_grad and not _reaches([late[path]], leaf):
                parts[path] = "conv"
    return parts


def _reaches(targets: list[Tensor], start: Tensor) -> bool:
    ends = [t for t in targets if t.requires_grad]
    if not ends:
        return False
    weights = [_noise(t, 1) for t in ends]
    (gradient,) = torch.autograd.grad(ends, [start], weights, retain_graph=True, allow_unused=True)
    return gradient is not None and bool(gradient.ne(0).any())


def _noise(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)
