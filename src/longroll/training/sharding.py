"""FSDP2: weights, gradients and the optimizer's moments in shards, one a process; states stay with rows.

Trainer and accelerate shard the model (`torch.distributed.fsdp.fully_shard`). Here is what they leave open:
what is refused, weights that differ between processes, CPUs, the precision in which weights are gathered, and
one ordinary model at the end.
"""

from __future__ import annotations

import copy
import os
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import AutocastKwargs, DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import TrainingArguments

from longroll import ranks
from longroll.errors import LongrollError

T = TypeVar("T")

_SWITCH = "ACCELERATE_USE_FSDP"


def asked(args: TrainingArguments | None = None) -> bool:
    """Return whether `args`, or accelerate's launcher, asks for FSDP."""
    return bool(args and args.fsdp) or os.environ.get(_SWITCH, "").lower() in ("1", "true")


def check_launch() -> None:
    """Refuse FSDP without processes to shard over, and FSDP1.

    Raises:
        LongrollError: naming the argument, or accelerate's setting.
    """
    if "RANK" not in os.environ:
        raise LongrollError(
            "`fsdp` spreads the weights over the processes of a launcher, and there is none: start with "
            "torchrun or accelerate launch, or leave it out."
        )
    if asked() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise LongrollError(
            "FSDP_VERSION of accelerate launch: FSDP1 flattens the weights that states are computed by; set "
            "fsdp_version: 2 in its config file."
        )


def set_up(accelerator: Any, args: TrainingArguments) -> bool:
    """Prepare the accelerator of a Trainer; return whether the model will be sharded.

    Weights are gathered in the precision in which they are held, so that decays (`A_log`, `dt_bias`) are read
    in float32 as without FSDP; matrices are multiplied in bfloat16 by autocast. accelerate leaves out FSDP on
    CPUs, so that its plugin is put in place here.
    """
    state = accelerator.state
    if not asked(args):
        return False
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None:
        if torch.cuda.is_available():
            raise LongrollError(
                "`fsdp` on CPUs needs a process that sees no GPU: set CUDA_VISIBLE_DEVICES to nothing, or "
                "train on the GPUs."
            )
        plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
        state.fsdp_plugin = plugin
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    # a copy of each weight in bfloat16 would stay to the end of the forward, and one that is made without a
    # gradient (`LiveCheck`) would cut off that of the step
    accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
    if args.fsdp:
        os.environ.pop(_SWITCH, None)  # accelerate sets it for good, and the next Trainer would shard too
    return True


def choose_layers(plugin: Any, model: nn.Module) -> None:
    """Have FSDP2 shard the layers of `model` one by one, where the user does not say which modules.

    transformers lists layers that a model may have (`_no_split_modules`). Left out are those of towers that
    this one lacks, and those that share weights with another (Zamba): these are gathered with the rest.

    Raises:
        LongrollError: for modules that the user names and the model lacks, or that share weights.
    """
    instances: dict[str, list[nn.Module]] = {}
    for module in model.modules():
        instances.setdefault(type(module).__name__, []).append(module)
    given = plugin.transformer_cls_names_to_wrap
    names = [name for name in given or getattr(model, "_no_split_modules", None) or () if name in instances]
    uses = {name: Counter(id(p) for m in instances[name] for p in set(m.parameters())) for name in names}
    apart = [name for name in names if max(uses[name].values(), default=0) < 2]
    wrong = set(given or ()) - set(apart)
    if wrong:
        raise LongrollError(
            f"`fsdp_config` transformer_layer_cls_to_wrap {', '.join(sorted(wrong))}: the model has no such "
            f"module, or its instances share weights: leave it out, or take of {', '.join(instances)}."
        )
    plugin.transformer_cls_names_to_wrap = apart


def same_everywhere(model: nn.Module, device: torch.device) -> None:
    """Copy the parameters and buffers of rank 0 to all ranks, as DDP does.

    Args:
        model: not yet sharded.
        device: that the ranks exchange tensors on.
    """
    if ranks.alone():
        return
    for tensor in (*model.parameters(), *model.buffers()):
        there = tensor.detach().to(device)
        dist.broadcast(there, src=0)
        if there.data_ptr() != tensor.data_ptr():
            tensor.data.copy_(there)


def skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of `model` whose parameters have no numbers, to be filled by `whole`."""
    empty: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, empty)  # tied parameters stay tied


def whole(empty: nn.Module, sharded: nn.Module) -> nn.Module | None:
    """Gather the weights of `sharded` on the CPU of rank 0; all ranks call it.

    Args:
        empty: the `skeleton` of the model before it was sharded.
        sharded: the model.

    Returns:
        `empty` with the numbers, an ordinary model on the CPU; on other ranks None.
    """
    found = full_state(sharded)
    if ranks.rank() > 0:
        return None
    filled = {id(p): nn.Parameter(found[name], p.requires_grad) for name, p in empty.named_parameters()}
    for module in empty.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = filled[id(parameter)]
    return empty.cpu()


def full_state(sharded: nn.Module) -> dict[str, Tensor]:
    """Return the whole state dict of a sharded model on the CPU of rank 0, an empty one on other ranks."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found: dict[str, Any] = get_model_state_dict(sharded, options=options)
    first: dict[int, str] = {}
    for wrapped, parameter in sharded.named_parameters(remove_duplicate=False) if found else ():
        name = wrapped.replace("_checkpoint_wrapped_module.", "")
        found[name] = found[first.setdefault(id(parameter), name)]  # tied ones are one tensor again
    return found


def within(module: nn.Module, compute: Callable[[], T], *inputs: Tensor) -> T:
    """Return what `compute` returns, called as the forward of a module, whose own forward it may call.

    FSDP2 gathers the weights of a module for one call of it, and in backward from what the call returned.
    accelerate shards the output embedding together with the last norm, so that a loss that is made of pieces
    of the logits has to be one call of the embedding.

    Args:
        module: a part of a model; one that is not sharded by itself is not called.
        compute: a function without arguments.
        *inputs: arguments of the module, which FSDP2 sees.
    """
    if not isinstance(module, FSDPModule):
        return compute()
    replaced = vars(module).get("forward")
    hooks = {name: getattr(module, name) for name in ("_forward_pre_hooks", "_forward_hooks")}

    def set_hooks(*, of_fsdp: bool) -> None:
        for name, found in hooks.items():
            chosen = [(key, hook) for key, hook in found.items() if is_fsdp_hook(hook) == of_fsdp]
            setattr(module, name, OrderedDict(chosen))

    def set_forward(forward: Any) -> None:
        vars(module).pop("forward", None)
        if forward is not None:
            module.forward = forward

    def called(*_: Any) -> T:
        set_forward(replaced)
        set_hooks(of_fsdp=False)
        try:
            return compute()
        finally:
            set_hooks(of_fsdp=True)

    set_forward(called)
    set_hooks(of_fsdp=True)
    try:
        found: T = module(*inputs)
        return found
    finally:
        set_forward(replaced)
        for name, before in hooks.items():
            setattr(module, name, before)


def is_fsdp_hook(hook: Any) -> bool:
    """Return whether a hook of a module is FSDP2's."""
    return str(hook.__module__).startswith("torch.distributed.fsdp")


def local(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor that this rank holds: its shard, or all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
