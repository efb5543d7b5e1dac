"""The four interventions: which state a training sequence starts from."""

from longroll.interventions._base import Batch, Intervention
from longroll.interventions.fitted_noise import FittedNoise
from longroll.interventions.random_noise import RandomNoise
from longroll.interventions.state_passing import StatePassing
from longroll.interventions.tbptt import TBPTT

INTERVENTIONS: dict[str, type[Intervention]] = {
    kind.name: kind for kind in (RandomNoise, FittedNoise, StatePassing, TBPTT)
}

__all__ = ["INTERVENTIONS", "TBPTT", "Batch", "FittedNoise", "Intervention", "RandomNoise", "StatePassing"]
