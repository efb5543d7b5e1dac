"""The short causal convolution in front of every recurrence, with its own small state."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longroll.ops._common import check_shape, state_dtype


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve each channel with its own W causal weights: `y_t = sum_w weight[:, w] x_{t-W+1+w} + bias`.

    The state is the last W inputs, oldest first, as transformers' `conv_states` keeps them; the oldest is carried
    for that layout only and never read. Gradients flow into every argument and from both outputs.

    Args:
        x: inputs, (B, T, D), T >= 1.
        weight: (D, W), the last column for the current input.
        bias: (D,).
        activation: None, or "silu" (also called "swish"), applied to the output.
        initial_state: (B, D, W), the inputs before the first; zero when None.
        output_final_state: also return the last W inputs.

    Returns:
        y (B, T, D) in x's dtype, or `(y, final_state)` with the state (B, D, W) in float32 (float64).

    Raises:
        ValueError: a shape does not fit, T is 0, or the activation is unknown.
    """
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x must have shape (B, T, D) with T >= 1, got {tuple(x.shape)}")
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation must be None, 'silu' or 'swish', got {activation!r}")
    batch, time, channels = x.shape
    width = weight.shape[-1]
    check_shape("weight", weight, (channels, width), "D, W")
    check_shape("bias", bias, (channels,), "D")
    check_shape("initial_state", initial_state, (batch, channels, width), "B, D, W")
    past = x.new_zeros(batch, width, channels) if initial_state is None else initial_state.mT.to(x.dtype)
    padded = torch.cat([past[:, 1:], x], 1)  # (B, W - 1 + T, D)
    y = padded[:, :time] * weight[:, 0]
    for w in range(1, width):
        y = y.addcmul(padded[:, w : w + time], weight[:, w])
    y = y if bias is None else y + bias
    y = y if activation is None else F.silu(y)
    y = y.to(x.dtype)
    if not output_final_state:
        return y
    final = padded[:, -width:] if time > 0 and padded.shape[1] >= width else padded
    return y, final.mT.to(state_dtype(x, initial_state))
