"""Training under an intervention: HF Trainer plus a state."""

from longroll.training._mixin import InitialStateMixin
from longroll.training._posttrain import PosttrainOptions, posttrain
from longroll.training.stop import stops_between_steps
from longroll.training.trainer import InitialStateTrainer

__all__ = [
    "InitialStateMixin",
    "InitialStateTrainer",
    "PosttrainOptions",
    "posttrain",
    "stops_between_steps",
]
