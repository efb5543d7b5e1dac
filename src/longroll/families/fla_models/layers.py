"""Modules that the six families are built from, with fla's parameter names, shapes and numbers (fla
0.6.0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longroll import ops
from longroll.blocks import Blocks, own_memory
from longroll.errors import LongrollError
from longroll.families.fla_models.cache import LayerState
from longroll.ops._block_attention import block_attention

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "sqrelu": lambda x: F.relu(x).square(),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
}


class ShortConv(nn.Conv1d):
    """Depthwise causal convolution (B, T, D) -> (B, T, D) with nn.Conv1d's parameters."""

    def __init__(self, channels: int, width: int, activation: str | None = "silu") -> None:
        super().__init__(channels, channels, width, groups=channels, bias=False)
        self.activation = activation

    def forward(self, x: Tensor, state: LayerState, slot: int) -> Tensor:  # type: ignore[override]
        """Convolve after the inputs kept in the conv state's `slot`."""
        initial = state.read("conv", slot)
        weight = self.weight.squeeze(1)
        y, final = ops.short_conv(
            x, weight, None, self.activation, initial_state=initial, output_final_state=True
        )
        if state.padding is not None:
            final = state.padding.last_inputs(x, weight.shape[-1], initial).to(final.dtype)
        state.keep("conv", final, slot)
        return y


class QKV(nn.Module):
    """Queries, keys and values of a layer, each through its own short convolution where there is one.

    Args:
        hidden: size of the inputs.
        sizes: sizes of q, k and v.
        conv: width of the convolutions; None for none.
        qk_activation: after the convolutions of q and k; v's is silu.
    """

    def __init__(
        self, hidden: int, sizes: tuple[int, int, int], conv: int | None, qk_activation: str | None = "silu"
    ) -> None:
        super().__init__()
        self.convolves = conv is not None
        for name, size in zip("qkv", sizes, strict=True):
            setattr(self, f"{name}_proj", nn.Linear(hidden, size, bias=False))
            if conv is not None:
                activation = "silu" if name == "v" else qk_activation
                setattr(self, f"{name}_conv1d", ShortConv(size, conv, activation))

    def qkv(self, x: Tensor, state: LayerState) -> list[Tensor]:
        """Return the three projections of x, (B, T, size) each."""
        projected = [getattr(self, f"{name}_proj")(x) for name in "qkv"]
        if not self.convolves:
            return projected
        return [getattr(self, f"{name}_conv1d")(projected[i], state, i) for i, name in enumerate("qkv")]


class GatedHeads(QKV):
    """What GLA and RetNet share: grouped keys and values, a feature map, the normed and gated output.

    Args:
        config: the config of GLA or RetNet.
        conv: width of the convolutions; None for none.
        activations: what the config's `feature_map` can name.
    """

    def __init__(self, config, *, conv: int | None, activations: Mapping[str, Any]) -> None:
        heads = config.num_heads
        kv_heads = config.num_kv_heads or heads
        self_k, self_v = head_size(config, "expand_k"), head_size(config, "expand_v")
        sizes = (heads * self_k, kv_heads * self_k, kv_heads * self_v)
        super().__init__(config.hidden_size, sizes, conv)
        self.k_size, self.v_size = self_k, self_v
        self.groups = heads // kv_heads
        self.feature_map = activation(config, "feature_map", activations)
        norm = {"eps": config.norm_eps, "elementwise_affine": config.elementwise_affine}
        self.gated = config.use_output_gate
        if self.gated:
            self.g_proj = nn.Linear(config.hidden_size, heads * self_v, bias=False)
        # one name for fla's fused kernel and another for its parts: the same function
        self.norm_name = "g_norm_swish_gate" if self.gated and config.fuse_norm else "g_norm"
        self.add_module(self.norm_name, RMSNorm(self_v, **norm))
        self.o_proj = nn.Linear(heads * self_v, config.hidden_size, bias=False)

    def grouped(self, x: Tensor, size: int) -> Tensor:
        """Return heads (B, T, H, size) of x (B, T, kv heads * size)."""
        return x.unflatten(-1, (-1, size)).repeat_interleave(self.groups, dim=-2)

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        """Return the layer's output (B, T, hidden) of the recurrence's o (B, T, H, V)."""
        o = getattr(self, self.norm_name)(o)
        if self.gated:
            o = o * F.silu(self.g_proj(x)).unflatten(-1, (-1, self.v_size))
        return self.o_proj(o.flatten(-2))


class RMSNorm(nn.RMSNorm):
    """RMSNorm in float32 or wider, whatever goes in and comes out."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., size) -> (..., size)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = None if self.weight is None else self.weight.to(wide)
        return F.rms_norm(x.to(wide), self.normalized_shape, weight, self.eps).to(x.dtype)


class GatedRMSNorm(RMSNorm):
    """RMSNorm, then a gate."""

    def __init__(self, size: int, *, eps: float, activation: str = "swish") -> None:
        super().__init__(size, eps=eps)
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS[activation]

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """Return norm of x (..., size) times the activated gate (..., size)."""
        return super().forward(x) * self.activation(gate)


class GatedMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config) -> None:
        super().__init__()
        if config.hidden_act != "swish":
            raise unsupported(config, "hidden_act", "only 'swish' is")
        size = config.intermediate_size
        if size is None:
            ratio = 4 if config.hidden_ratio is None else config.hidden_ratio
            size = 256 * math.ceil(int(config.hidden_size * ratio * 2 / 3) / 256)
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, hidden) -> (B, T, hidden)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """Softmax attention with rotary positions, for the layers that `config.attn` lists (hybrids)."""

    def __init__(self, config, spec: dict) -> None:
        super().__init__()
        heads = spec["num_heads"]
        kv_heads = spec.get("num_kv_heads") or heads
        self.size = config.hidden_size // heads
        self.window = spec.get("window_size")
        self.base = spec.get("rope_theta", 10000.0)
        bias = spec.get("qkv_bias", False)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.size, bias=bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, state: LayerState) -> Tensor:
        """Return (B, T, hidden) -> (B, T, hidden); the state holds keys and values (B, kv heads, tokens,
        size).
        """
        q, k, v = (p(x).unflatten(-1, (-1, self.size)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rotary(t, state.seen, self.base).transpose(1, 2) for t in (q, k))
        v = v.transpose(1, 2)
        past_k, past_v = state.blocks(0), state.blocks(1)
        if self.window is None and not torch.is_grad_enabled():
            past = () if past_k is None or past_v is None else zip(past_k.pieces, past_v.pieces, strict=True)
            o = block_attention(q, k, v, past)
            state.keep("attention", Blocks.after(past_k, k), 0)
            state.keep("attention", Blocks.after(past_v, v), 1)
            return self.o_proj(o.transpose(1, 2).flatten(-2))
        if past_k is not None and past_v is not None:
            k, v = (torch.cat([t.whole().to(new), new], dim=-2) for t, new in ((past_k, k), (past_v, v)))
        kept = slice(None) if self.window is None else slice(-self.window, None)
        state.keep("attention", own_memory(k[..., kept, :]), 0)
        state.keep("attention", own_memory(v[..., kept, :]), 1)
        query, key = x.shape[1], k.shape[-2]
        ahead = torch.arange(key, device=x.device) - torch.arange(key - query, key, device=x.device)[:, None]
        seen = ahead <= 0 if self.window is None else (ahead <= 0) & (ahead > -self.window)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return self.o_proj(o.transpose(1, 2).flatten(-2))


class LoRA(nn.Module):
    """Two small linear layers with an activation between (RWKV)."""

    lora: Any

    def __init__(
        self,
        size_in: int,
        size_out: int,
        rank: int,
        *,
        bias: bool = True,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.lora = nn.Sequential(
            nn.Linear(size_in, rank, bias=False),
            activation or nn.Identity(),
            nn.Linear(rank, size_out, bias=bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., size_in) -> (..., size_out)."""
        return self.lora(x)


def token_shift(x: Tensor, state: LayerState, slot: int) -> Tensor:
    """Return the input before each input, minus it, (B, T, D); the state is the last input, (B, D)."""
    last = state.read("conv", slot)
    last = torch.zeros_like(x[:, 0]) if last is None else last.to(x.dtype)
    # a view would keep all of x
    state.keep("conv", x[:, -1].clone() if state.padding is None else state.padding.last(x), slot)
    return torch.cat([last[:, None], x[:, :-1]], dim=1) - x


def rotary(x: Tensor, start: int = 0, base: float = 10000.0) -> Tensor:
    """Turn x (B, T, H, D) by its positions, the first being `start` (RoFormer, halves paired)."""
    positions = torch.arange(start, start + x.shape[1], device=x.device, dtype=torch.float64)
    return turn(x, positions[:, None, None], base)


def turn(x: Tensor, position: Tensor | int, base: float = 10000.0) -> Tensor:
    """Turn the pairs (i, i + D / 2) of x (..., D) to a position; (..., 1) where there are several.

    Angles are float64: fla's float32 ones are off by 0.06 at position one million.
    """
    size = x.shape[-1]
    exponents = torch.arange(0, size, 2, device=x.device, dtype=torch.float32) / size
    angles = position * (1.0 / base**exponents).double()  # the frequencies are fla's float32 numbers
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def l2_norm(x: Tensor) -> Tensor:
    """Return unit vectors of x (..., D), as fla's kernels make them."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def activation(config, option: str, activations: Mapping[str, Any] = ACTIVATIONS) -> Any:
    """Return the function that a config's option names; None where it names none."""
    name = getattr(config, option)
    if name is None:
        return None
    if name not in activations:
        raise unsupported(config, option, f"known are {', '.join(activations)}")
    return activations[name]


def head_size(config, option: str) -> int:
    """Return size of a head when the heads together have `hidden_size` times the option's expansion."""
    size = config.hidden_size * getattr(config, option) / config.num_heads
    if not math.isclose(size, round(size)):
        raise unsupported(config, option, f"heads would have size {size}")
    return round(size)


def unsupported(config, option: str, why: str) -> LongrollError:
    """Return the error for a config that asks for something else."""
    return LongrollError(
        f"{config.model_type} with {option} = {getattr(config, option)!r} cannot run: {why}."
    )
