"""Sequential oracles: the recurrences as the papers write them, one time step after another.

Slow and obviously right, in whatever precision they are called with. The tests hold every fast path to these;
nothing else uses them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-1: `h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t`, `y_t = h_t C_t + D x_t`, times `silu(z_t)`.

    Shapes as in `longroll.ops.selective_scan`; always returns `(y, final_state)`.
    Source: Gu and Dao, "Mamba", 2023, algorithm 2.
    """
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    h = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state  # (B, D, N)
    outputs = []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        outputs.append((h * C[:, t, None, :]).sum(-1))
    return _skip_and_gate(torch.stack(outputs, 1), x, D, z), h


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> tuple[Tensor, Tensor]:
    """Mamba-2: as Mamba-1 with one scalar decay `exp(dt_t A)` per head and a (P, N) state.

    Shapes as in `longroll.ops.ssd`; always returns `(y, final_state)`.
    Source: Dao and Gu, "Transformers are SSMs", 2024, section 6.
    """
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    heads_per_group = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(heads_per_group, 2), C.repeat_interleave(heads_per_group, 2)  # (B, T, H, N)
    h = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None] * x[:, t]  # (B, H, P)
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + step[..., None] * B[:, t, :, None, :]
        outputs.append((h * C[:, t, :, None, :]).sum(-1))
    return _skip_and_gate(torch.stack(outputs, 1), x, None if D is None else D[:, None], z), h


def short_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution, `y_t = sum_w weight[:, w] x_{t - W + 1 + w} + bias`.

    Shapes as in `longroll.ops.short_conv`; always returns `(y, final_state)`.
    """
    window = x.new_zeros(x.shape[0], *weight.shape) if initial_state is None else initial_state  # (B, D, W)
    outputs = []
    for t in range(x.shape[1]):
        window = torch.cat([window[..., 1:], x[:, t, :, None]], -1)
        outputs.append((window * weight).sum(-1))
    y = torch.stack(outputs, 1)
    y = y if bias is None else y + bias
    return (F.silu(y) if activation in ("silu", "swish") else y), window


def _skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    y = y if D is None else y + D * x
    return y if z is None else y * F.silu(z)
