"""Linear layers that hold their weights in 8 bits and multiply in the dtype of their input.

Each row of a weight has a scale of its own, the largest absolute number of the row over 127. Products see the
numbers that the codes stand for; inputs, states and outputs keep their dtype. What decides how fast a state
is forgotten keeps its numbers: an error there grows with every token that is read. So do small projections,
which hold few numbers, the embedding and the output embedding, experts (which are no linear layers in
transformers), convolutions and norms.

Both passes make the weight of one layer at a time in the dtype of the product. torchao's int8 weights keep
such a copy of every layer for the backward pass, which takes what 8 bits save; bitsandbytes' `load_in_8bit`
rounds the inputs to 8 bits too.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from longroll.errors import LongrollError
from longroll.ops._common import plainly, product_dtype

_SMALL = 4
"""A projection to or from less than a quarter of the width keeps its numbers: routers, steps of heads,
low-rank decays."""
_DECAYS = ("f_proj",)
"""Projections of full width that give decays: those of HGRN-2 and gated slot attention."""


class Int8Linear(nn.Linear):
    """A linear layer in 8 bits, which is not trained. Each read of `weight` computes it from the codes.

    Args:
        linear: the layer that it stands for.
        exact: how many of the last rows keep their numbers.
        device: where its weight is to lie; None: where that of `linear` does.
        keep: whether the weight of `linear` is kept in the memory of the machine, for `restore`.
    """

    scale: Tensor

    def __init__(self, linear: nn.Linear, exact: int, device: torch.device | None, keep: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        here = weight.to(device or weight.device)
        rows = self.out_features - exact
        wide = here[:rows].float()
        scale = wide.abs().amax(dim=1, keepdim=True) / 127
        codes = (wide / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale)  # float32 in any model, and no number of the model
        self.exact = nn.Parameter(here[rows:].clone(), requires_grad=False)
        bias = linear.bias
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.detach().to(here.device), bias.requires_grad)
        )
        self.full = weight.cpu() if keep else None
        self.training = linear.training

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(out_features, in_features): the numbers that the codes stand for, in the dtype that they had."""
        with torch.no_grad():
            return plainly(_numbers, self.codes, self.scale, self.exact, self.exact.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_features) of (..., in_features)."""
        dtype = product_dtype(self.exact, x)
        y: Tensor = _Product.apply(x, self.codes, self.scale, self.exact, dtype)
        return y if self.bias is None else y + self.bias.to(dtype)


class _Product(torch.autograd.Function):
    """A product with a weight that exists within a pass only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, exact: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(codes, scale, exact)
        ctx.dtypes = dtype, x.dtype
        return F.linear(x.to(dtype), _numbers(codes, scale, exact, dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dtype, wanted = ctx.dtypes
        codes, scale, exact = ctx.saved_tensors
        weight = _numbers(codes, scale, exact, dtype)
        return (grad.to(dtype) @ weight).to(wanted), None, None, None, None


def _numbers(codes: Tensor, scale: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Return codes x scale, and the rows of `exact` below them, in one pass over memory."""
    rows = len(codes)
    weight = torch.empty(rows + len(exact), codes.shape[1], dtype=dtype, device=codes.device)
    with torch.no_grad():
        torch.mul(codes, scale, out=weight[:rows])
        weight[rows:] = exact
    return weight


def to_int8(
    model: nn.Module, width: int, *, device: torch.device | None = None, keep: bool = True
) -> tuple[int, int]:
    """Hold the weights of the large linear layers of `model` in 8 bits, layer by layer, in place.

    Args:
        model: the model, whose weights are frozen where they are in 8 bits.
        width: numbers of a hidden state.
        device: where these weights are to lie.
        keep: whether the weights before are kept in the memory of the machine, for `restore`.

    Returns:
        How many numbers are in 8 bits, and how many there are.

    Raises:
        LongrollError: where no layer is large enough.
    """
    total = sum(p.numel() for p in model.parameters())
    chosen = large_layers(model, width)
    if not chosen:
        raise LongrollError(
            f"`dtype` int8: {type(model).__name__} has no large linear layer of its own: take bfloat16."
        )
    for name, linear in chosen.items():
        model.set_submodule(name, Int8Linear(linear, _step_rows(model, name, linear), device, keep))
    model.save_pretrained = _refuse_saving  # type: ignore[assignment]
    return sum(linear.codes.numel() for linear in _layers(model).values()), total


def large_layers(model: nn.Module, width: int) -> dict[str, nn.Linear]:
    """Return the layers that `to_int8` would hold in 8 bits, by name."""
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not head
        and uses[id(module.weight)] == 1  # a shared one would be held twice
        and _SMALL * min(module.weight.shape) >= width
        and name.rpartition(".")[2] not in _DECAYS
    }


def _step_rows(model: nn.Module, name: str, linear: nn.Linear) -> int:
    """Return how many of the last rows of Mamba-2's `in_proj` give the steps of its heads; else 0."""
    owner, _, leaf = name.rpartition(".")
    bias = getattr(model.get_submodule(owner), "dt_bias", None)
    return bias.numel() if leaf == "in_proj" and isinstance(bias, Tensor) and bias.ndim == 1 else 0


def holds_int8(model: nn.Module) -> bool:
    """Return whether layers of `model` hold their weights in 8 bits."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


def restore(model: nn.Module) -> None:
    """Give the layers of `model` the weights back that they had before `to_int8`, on the CPU.

    Raises:
        LongrollError: for a model whose weights were not kept.
    """
    for module in model.modules():
        if vars(module).get("save_pretrained") is _refuse_saving:
            del module.save_pretrained
    for name, layer in _layers(model).items():
        if layer.full is None:
            raise LongrollError(f"{name}: its weights before 8 bits were not kept: open the model again.")
        linear = nn.Linear(
            layer.in_features, layer.out_features, bias=False, device="meta", dtype=layer.full.dtype
        )
        linear.weight = nn.Parameter(layer.full, requires_grad=False)
        linear.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().cpu())
        linear.train(layer.training)
        model.set_submodule(name, linear)


def _refuse_saving(*_: Any, **__: Any) -> None:
    raise LongrollError("`dtype` int8: codes of 8 bits are no checkpoint: open the model without it.")


def _layers(model: nn.Module) -> dict[str, Int8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


__all__ = ["Int8Linear", "holds_int8", "large_layers", "restore", "to_int8"]
