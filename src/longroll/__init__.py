"""longroll: recurrent language models past their training length. The public names, loaded when used."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longroll import ops
    from longroll.errors import LongrollError
    from longroll.families import Family, register_family
    from longroll.interventions import TBPTT, FittedNoise, Intervention, RandomNoise, StatePassing
    from longroll.measure._coverage import coverage
    from longroll.measure._diagnose import Diagnosis, diagnose
    from longroll.measure._position_loss import PositionLoss, position_loss
    from longroll.measure._state_ablation import causal, state_ablation
    from longroll.measure._state_statistics import state_statistics
    from longroll.measure.remembrance import effective_remembrance, remembrance_map
    from longroll.model import RecurrentLM, load, wrap
    from longroll.state import RecurrentState, StateKey
    from longroll.training._mixin import InitialStateMixin
    from longroll.training._posttrain import posttrain
    from longroll.training.options import PosttrainOptions
    from longroll.training.trainer import InitialStateTrainer

    __version__: str

_HOME = {
    "LongrollError": "errors",
    "load": "model",
    "wrap": "model",
    "Family": "families",
    "register_family": "families",
    "RecurrentLM": "model",
    "RecurrentState": "state",
    "StateKey": "state",
    "Diagnosis": "measure",
    "PositionLoss": "measure",
    "diagnose": "measure",
    "coverage": "measure",
    "causal": "measure",
    "position_loss": "measure",
    "effective_remembrance": "measure",
    "remembrance_map": "measure",
    "state_ablation": "measure",
    "state_statistics": "measure",
    "Intervention": "interventions",
    "RandomNoise": "interventions",
    "FittedNoise": "interventions",
    "StatePassing": "interventions",
    "TBPTT": "interventions",
    "InitialStateMixin": "training",
    "InitialStateTrainer": "training",
    "PosttrainOptions": "training",
    "posttrain": "training",
}

__all__ = [
    "TBPTT",
    "Diagnosis",
    "Family",
    "FittedNoise",
    "InitialStateMixin",
    "InitialStateTrainer",
    "Intervention",
    "LongrollError",
    "PositionLoss",
    "PosttrainOptions",
    "RandomNoise",
    "RecurrentLM",
    "RecurrentState",
    "StateKey",
    "StatePassing",
    "causal",
    "coverage",
    "diagnose",
    "effective_remembrance",
    "load",
    "ops",
    "position_loss",
    "posttrain",
    "register_family",
    "remembrance_map",
    "state_ablation",
    "state_statistics",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("longroll")
    if name == "ops":
        return import_module("longroll.ops")
    if name in _HOME:
        return getattr(import_module(f"longroll.{_HOME[name]}"), name)
    raise AttributeError(f"module 'longroll' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
