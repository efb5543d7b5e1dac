"""The loss of training."""

import torch.nn.functional as F
from torch import Tensor


def next_token_loss(logits: Tensor, targets: Tensor, items: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of `targets` (B, T; -100 counts not) by logits (B, T, V), summed, divided by `items`.

    By default the mean: `items` are the tokens that count.
    """
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    return loss / ((targets != -100).sum().clamp_min(1) if items is None else items)
