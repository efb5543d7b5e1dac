"""Checkpoints of a Trainer that are whole or not there, on any number of ranks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from longroll import ranks
from longroll.errors import LongrollError
from longroll.training import checkpoints

_NEEDED = {"optimizer.pt": "optimizer*", "scheduler.pt": "scheduler.pt", "rng_state.pth": "rng_state*"}
"""What a run goes on by besides the model; Trainer goes on without them, as after `save_only_model`."""


class WholeCheckpointsMixin:
    """Have a `transformers.Trainer` write checkpoints aside and resume only from whole ones.

    Every rank writes its part into `output_dir`/.partial; once all are there, rank 0 commits the checkpoint
    (`longroll.training.checkpoints`). `resume_from_checkpoint=True` takes the newest whole one.
    """

    args: TrainingArguments
    state: TrainerState
    accelerator: Any
    _aside = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train`.

        Raises:
            LongrollError: for a checkpoint that is damaged or was not written to its end.
        """
        folder = Path(str(self.args.output_dir))

        def prepare() -> str | None:
            checkpoints.clear_partial(folder)
            found = checkpoints.checkpoint_to_resume(folder, resume_from_checkpoint)
            with checkpoints.readable(found):
                if found is not None:
                    _check_state(Path(found) / TRAINER_STATE_NAME)
            return found

        return super().train(  # type: ignore[misc]
            ranks.on_first(prepare), *args, **kwargs
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with checkpoints.readable(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        for name, pattern in _NEEDED.items():
            if checkpoint is not None and not any(Path(checkpoint).glob(pattern)):
                raise LongrollError(
                    f"{checkpoint} has no {name}, without which a run goes on to other weights: resume from "
                    "another checkpoint, or begin a run with the model in it."
                )
        with checkpoints.readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with checkpoints.readable(checkpoint):
            super()._load_rng_state(checkpoint)  # type: ignore[misc]

    def _load_scaler(self, checkpoint: str | None) -> None:
        with checkpoints.readable(checkpoint):
            super()._load_scaler(checkpoint)  # type: ignore[misc]

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)  # type: ignore[misc]
        return os.path.join(folder, checkpoints.PARTIAL) if self._aside else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        whole = checkpoints.checkpoint_of(folder, self.state.global_step)
        partial = folder / checkpoints.PARTIAL / whole.name
        self._aside = True
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self._aside = False
        self._finish_current_push()  # type: ignore[attr-defined]  # of a folder about to be renamed
        if self.state.best_model_checkpoint == str(partial):
            self.state.best_model_checkpoint = str(whole)
            if self.args.should_save:
                self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if (folder / checkpoints.RUN).is_file():
                shutil.copy(folder / checkpoints.RUN, partial)
            checkpoints.commit(partial, whole)
            checkpoints.rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()


def _check_state(file: Path) -> None:
    """Read Trainer's note of a run; raises what is wrong with it."""
    state = TrainerState.load_from_json(str(file))
    counts = {"global_step": state.global_step, "max_steps": state.max_steps, "epoch": state.epoch}
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int | float) or count < 0:
            raise ValueError(f"{file.name} has {name} {count!r}")
    if not all(isinstance(entry, dict) for entry in state.log_history):
        raise ValueError(f"{file.name} has a log_history that is no list of entries")
