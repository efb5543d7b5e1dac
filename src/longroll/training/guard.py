"""Stop a run whose loss is no number."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

from longroll.errors import LongrollError


class LossGuard(TrainerCallback):
    """Raises as soon as a logged loss is NaN or infinite, before more time is lost."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any) -> None:
        """Look at each logged loss."""
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise LongrollError(
                f"The loss is {loss} at step {state.global_step}: lower `learning_rate`. Checkpoints so far "
                f"are in {args.output_dir}."
            )
