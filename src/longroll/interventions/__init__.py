"""The four interventions: which state a training sequence starts from."""

from longroll.errors import LongrollError
from longroll.interventions._base import Batch, Intervention
from longroll.interventions.fitted_noise import FittedNoise
from longroll.interventions.random_noise import RandomNoise
from longroll.interventions.state_passing import StatePassing
from longroll.interventions.tbptt import TBPTT

INTERVENTIONS: dict[str, type[Intervention]] = {
    kind.name: kind for kind in (RandomNoise, FittedNoise, StatePassing, TBPTT)
}


def intervention_of(choice: Intervention | str | None) -> Intervention | None:
    """Return an intervention by its short name, with its default options; "none" is None.

    Raises:
        LongrollError: for a name that is not one.
    """
    if not isinstance(choice, str):
        return choice
    if choice not in (*INTERVENTIONS, "none"):
        raise LongrollError(f"intervention={choice!r} is none of {', '.join(INTERVENTIONS)}, none.")
    return None if choice == "none" else INTERVENTIONS[choice]()


__all__ = [
    "INTERVENTIONS",
    "TBPTT",
    "Batch",
    "FittedNoise",
    "Intervention",
    "RandomNoise",
    "StatePassing",
    "intervention_of",
]
