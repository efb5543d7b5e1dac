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
    D = D[:, None] if D is not None and D.dim() == 1 else D  # (H, 1) or (H, P)
    return _skip_and_gate(torch.stack(outputs, 1), x, D, z), h


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


def gla_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated linear attention: `S_t = exp(g_t) S_{t-1} + k_t v_t^T`, `o_t = scale S_t^T q_t`.

    Shapes as in `longroll.ops.gla`; always returns `(o, final_state)`.
    Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2024.
    """
    scale, S = _scale(scale, k), _first_state(k, v, initial_state)
    outputs = []
    for t in range(q.shape[1]):
        S = torch.exp(g[:, t])[..., None] * S + _outer(k[:, t], v[:, t])
        outputs.append(scale * _read(S, q[:, t]))
    return torch.stack(outputs, 1), S


def retention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    g_gamma: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Retention: gated linear attention with a fixed decay, `1 - 2^(-5 - h)` in head h or `e^g_gamma`.

    Shapes as in `longroll.ops.retention`; always returns `(o, final_state)`.
    Source: Sun et al., "Retentive Network", 2023.
    """
    if g_gamma is None:
        g_gamma = (1 - 2.0 ** (-5 - torch.arange(q.shape[2], dtype=q.dtype, device=q.device))).log()
    return gla_reference(q, k, v, g_gamma[:, None].expand_as(k), scale, initial_state)


def rwkv6_reference(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-6: `o_t = scale (S_{t-1} + (u * k_t) v_t^T)^T r_t`, `S_t = exp(w_t) S_{t-1} + k_t v_t^T`.

    Shapes as in `longroll.ops.rwkv6`; always returns `(o, final_state)`.
    Source: Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States", 2024, section 4.
    """
    scale, S = _scale(scale, k), _first_state(k, v, initial_state)
    outputs = []
    for t in range(r.shape[1]):
        outputs.append(scale * _read(S + _outer(u * k[:, t], v[:, t]), r[:, t]))
        S = torch.exp(w[:, t])[..., None] * S + _outer(k[:, t], v[:, t])
    return torch.stack(outputs, 1), S


def rwkv7_reference(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-7: `S_t = exp(w_t) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T`, `o_t = scale S_t^T r_t`.

    Shapes as in `longroll.ops.rwkv7`; always returns `(o, final_state)`.
    Source: Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", 2025, section 4.
    """
    S = _first_state(k, v, initial_state)
    outputs = []
    for t in range(r.shape[1]):
        erased = _outer(b[:, t], _read(S, a[:, t]))
        S = torch.exp(w[:, t])[..., None] * S + erased + _outer(k[:, t], v[:, t])
        outputs.append(scale * _read(S, r[:, t]))
    return torch.stack(outputs, 1), S


def delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor]:
    """Delta rule: `S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T`, `o_t = scale S_t^T q_t`.

    Shapes as in `longroll.ops.delta_rule`; always returns `(o, final_state)`.
    Source: Yang et al., "Parallelizing Linear Transformers with the Delta Rule", 2024.
    """
    g = torch.zeros_like(beta)
    return gated_delta_rule_reference(q, k, v, g, beta, scale, initial_state, use_qk_l2norm_in_kernel)


def gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule: the delta rule on the decayed state `exp(g_t) S_{t-1}`.

    Shapes as in `longroll.ops.gated_delta_rule`; always returns `(o, final_state)`.
    Source: Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule", 2025.
    """
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    scale, S = _scale(scale, k), _first_state(k, v, initial_state)
    outputs = []
    for t in range(q.shape[1]):
        S = torch.exp(g[:, t])[..., None, None] * S
        S = S + _outer(k[:, t], beta[:, t, :, None] * (v[:, t] - _read(S, k[:, t])))
        outputs.append(scale * _read(S, q[:, t]))
    return torch.stack(outputs, 1), S


def kda_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor]:
    """Kimi delta attention: the delta rule on the decayed state `exp(g_t) S_{t-1}`, one decay for each row of
    S.

    Shapes as in `longroll.ops.kda`; always returns `(o, final_state)`.
    Source: Kimi Team, "Kimi Linear: An Expressive, Efficient Attention Architecture", 2025, section 3.
    """
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    scale, S = _scale(scale, k), _first_state(k, v, initial_state)
    outputs = []
    for t in range(q.shape[1]):
        S = torch.exp(g[:, t])[..., None] * S
        S = S + _outer(k[:, t], beta[:, t, :, None] * (v[:, t] - _read(S, k[:, t])))
        outputs.append(scale * _read(S, q[:, t]))
    return torch.stack(outputs, 1), S


def _scale(scale: float | None, k: Tensor) -> float:
    return k.shape[-1] ** -0.5 if scale is None else scale


def _first_state(k: Tensor, v: Tensor, initial_state: Tensor | None) -> Tensor:
    shape = (v.shape[0], v.shape[2], k.shape[-1], v.shape[-1])  # (B, H, K, V)
    return v.new_zeros(shape) if initial_state is None else initial_state


def _outer(k: Tensor, v: Tensor) -> Tensor:
    return k[..., :, None] * v[..., None, :]


def _read(S: Tensor, q: Tensor) -> Tensor:
    return (q[..., None] * S).sum(-2)


def _skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    y = y if D is None else y + D * x
    return y if z is None else y * F.silu(z)
