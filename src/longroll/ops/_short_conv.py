"""The short causal convolution in front of every recurrence, with its own small state."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longroll.ops._backend import choose
from longroll.ops._common import cast, check_floats, check_shape, no_autocast, state_dtype, turns

WORK = 1 << 18  # numbers of work space that stay in a CPU's second-level cache


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve each channel with its own W causal weights: `y_t = sum_w weight[:, w] x_{t-W+1+w} + bias`.

    The state is the last W inputs, oldest first, as transformers' `conv_states` keeps them; the oldest is
    carried for that layout only and never read. Gradients flow into every argument and from both outputs.

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
        ValueError: a shape does not fit, an input is complex or of integers, T is 0, or the activation is
            unknown.
    """
    check_floats("x", x)
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x must have shape (B, T, D) with T >= 1, got {tuple(x.shape)}")
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation must be None, 'silu' or 'swish', got {activation!r}")
    batch, _, channels = x.shape
    width = weight.shape[-1]
    check_shape("weight", weight, (channels, width), "D, W")
    check_shape("bias", bias, (channels,), "D")
    check_shape("initial_state", initial_state, (batch, channels, width), "B, D, W")
    inputs = (x, weight, bias, initial_state)
    dtype = state_dtype(*inputs)
    past = None if initial_state is None else initial_state.to(dtype).mT  # (B, W, D)
    recent = None if past is None else past[:, 1:]
    run = choose("short_conv", x.device, dtype).kernel or _Conv.apply
    y: Tensor = run(x, weight.to(dtype), cast(bias, dtype), recent, activation is not None)
    if not output_final_state:
        return y
    return y, last_inputs(x, width, initial_state)


def last_inputs(x: Tensor, width: int, initial_state: Tensor | None = None) -> Tensor:
    """Return the final state of `short_conv`: (B, D, width) in float32 (float64)."""
    final, dtype = x[:, -width:].mT, state_dtype(x, initial_state)
    missing = width - final.shape[2]
    if missing == 0:
        return final.to(dtype, copy=True, memory_format=torch.contiguous_format)  # in separate memory
    older = (
        final.new_zeros(*final.shape[:2], missing) if initial_state is None else initial_state[..., -missing:]
    )
    return torch.cat([older.to(dtype), final.to(dtype)], 2)


class _Conv(torch.autograd.Function):
    """Keeps only the inputs: what the activation needs is convolved again in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, silu: bool
    ) -> Tensor:
        with no_autocast(x):
            y = _convolve(x.to(weight.dtype), weight, bias, past)
            if silu:
                F.silu(y, inplace=True)
        ctx.save_for_backward(x, weight, bias, past)
        ctx.silu = silu
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, past = ctx.saved_tensors
        with no_autocast(x):
            x_, dy = x.to(weight.dtype), dy.to(weight.dtype)
            if ctx.silu:
                dy = torch.ops.aten.silu_backward(dy, _convolve(x_, weight, bias, past))
            reach = weight.shape[1] - 1  # steps that an input is felt after its own
            dx = _slide(dy, weight.flip(1), None)  # (B, W - 1 + T, D): past first
            dbias = dy.sum((0, 1)) if ctx.needs_input_grad[2] else None
            dweight = _weight_gradient(x_, dy, past, reach) if ctx.needs_input_grad[1] else None
        dpast = dx[:, :reach] if ctx.needs_input_grad[3] else None
        return dx[:, reach:].to(x.dtype), dweight, dbias, dpast, None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None) -> Tensor:
    """Convolve x (B, T, D) after the W - 1 inputs of `past`; the result is the caller's to overwrite."""
    time, reach = x.shape[1], weight.shape[1] - 1
    y = _slide(x, weight, bias)[:, :time]
    if past is not None and reach:  # the first outputs were computed from zeros
        head = torch.cat([past, x[:, :reach]], 1)
        y[:, :reach] = _slide(head, weight, bias)[:, reach : reach + min(time, reach)]
    return y


def _slide(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return full convolution with zeros on both sides, (B, W - 1 + T, D)."""
    batch, time, channels = x.shape
    width = weight.shape[1]
    if x.device.type == "cpu" and x.dtype == torch.float32:
        # As a channels-last image one pixel high: oneDNN's depthwise kernel, 3 to 6 times conv1d's speed.
        image = x.transpose(1, 2).unsqueeze(2).contiguous(memory_format=torch.channels_last)
        kernel = weight.reshape(channels, 1, 1, width)
        return (
            F.conv2d(image, kernel, bias, padding=(0, width - 1), groups=channels).squeeze(2).transpose(1, 2)
        )
    y = x.new_zeros(batch, time + width - 1, channels)
    if bias is not None:
        y += bias
    for w in range(width):
        y[:, width - 1 - w : width - 1 - w + time].addcmul_(x, weight[:, w])
    return y


def _weight_gradient(x: Tensor, dy: Tensor, past: Tensor | None, reach: int) -> Tensor:
    """Sum over batch and time of each output's gradient times the input its weight saw, (D, W)."""
    batch, time, channels = x.shape
    columns = torch.zeros(reach + 1, channels, dtype=x.dtype, device=x.device)
    block = max(1, WORK // (batch * channels))
    work = x.new_empty(batch, min(block, time), channels)
    for start in turns(range(0, time, block)):
        for w in range(reach + 1):
            lag = reach - w
            first, stop = max(start, lag), min(start + block, time)
            if first < stop:
                part = work[:, : stop - first]
                torch.mul(dy[:, first:stop], x[:, first - lag : stop - lag], out=part)
                columns[w] += part.sum((0, 1))
    if past is not None:
        for w in range(reach):
            felt = min(reach - w, time)
            columns[w] += (dy[:, :felt] * past[:, w : w + felt]).sum((0, 1))
    return columns.t()
