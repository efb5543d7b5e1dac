"""Training under an intervention: HF Trainer plus a state."""

from longroll.measure.held_out import HeldOut
from longroll.training._mixin import InitialStateMixin
from longroll.training._posttrain import posttrain
from longroll.training.options import PosttrainOptions
from longroll.training.recipe import Prepared, by_recipe
from longroll.training.stop import stops_between_steps
from longroll.training.trainer import InitialStateTrainer
from longroll.training.until_healthy import Declined, NoGain

__all__ = [
    "Declined",
    "HeldOut",
    "InitialStateMixin",
    "InitialStateTrainer",
    "NoGain",
    "PosttrainOptions",
    "Prepared",
    "by_recipe",
    "posttrain",
    "stops_between_steps",
]
