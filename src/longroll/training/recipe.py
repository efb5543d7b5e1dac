"""Prepare a run by a recipe: the intervention that fits the data, with the recipe's settings."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from longroll import ranks
from longroll.data import Corpus, DocumentLengths, Lanes, Windows
from longroll.data.windows import Item
from longroll.errors import LongrollError
from longroll.interventions import INTERVENTIONS, Intervention
from longroll.interventions.recipes import (
    DEFAULT,
    NAMES,
    NON_STATIONARY,
    Choice,
    Settings,
    choose,
    recipe_of,
)
from longroll.model import RecurrentLM
from longroll.training.weights import TRAINABLE, trained_decays

if TYPE_CHECKING:
    from longroll.training.options import PosttrainOptions


@dataclass(frozen=True)
class Prepared:
    """A run as a recipe wants it."""

    intervention: Intervention | None
    """None is the control."""
    options: PosttrainOptions
    """With every setting of the recipe, and its name."""
    name: str
    """The intervention's short name; "none" is the control."""
    sentence: str
    """The intervention, its settings and the reason, in one line."""


def by_recipe(
    lm: RecurrentLM,
    data: Corpus | Dataset[Item],
    options: PosttrainOptions,
    *,
    recipe: str = DEFAULT,
    intervention: str | None = None,
    zero_probability: float | None = None,
    documents: DocumentLengths | None = None,
    **more: Any,
) -> Prepared:
    """Choose an intervention and settings by a recipe; what is given has precedence over the recipe.

    Args:
        lm: the model.
        data: the text, or rows of a task, that the run will read.
        options: the options of the run; `learning_rate`, `decay_speed` and `trainable` are the recipe's
            where they are None.
        recipe: a name in `longroll.interventions.recipes.RECIPES`.
        intervention: a short name; None: chosen by the recipe from the documents of the text.
        zero_probability: share of rows that start from the zero state; None: the recipe's.
        documents: lengths of the text's documents; None: those of `data`.
        **more: arguments of the intervention's class.

    Raises:
        LongrollError: for a recipe that does not exist, for an argument that the intervention does not take,
            and as the intervention's class and its options.
    """
    if intervention is None:
        choice = _choose(recipe, data, options, documents)
    else:
        choice = Choice(intervention, "the intervention was named")
    asked, why = recipe_of(recipe), choice.why
    table = asked.text if isinstance(data, Corpus | Lanes | Windows) else asked.task
    settings = table.get(choice.intervention, Settings())
    whole = _needs_matrices(lm, options)
    if whole and settings.trainable != "all" and options.trainable is None:
        settings = replace(settings, trainable="all")
        why = f"{why}; {whole}"
    if not _trains_decays(lm, options):
        settings = replace(settings, decay_speed=1.0)
        if settings.frozen_zero_probability is not None:
            settings = replace(settings, zero_probability=settings.frozen_zero_probability)
    trainable = settings.trainable if options.trainable is None else options.trainable
    rate = settings.whole_rate if trainable == "all" else settings.learning_rate
    chosen = replace(
        options,
        learning_rate=rate if options.learning_rate is None else options.learning_rate,
        decay_speed=settings.decay_speed if options.decay_speed is None else options.decay_speed,
        trainable=trainable,
        recipe=recipe,
    )
    rates = f"decay speed {chosen.decay_speed:g}, learning rate {chosen.learning_rate:g}"
    adapted = options.lora_rank or lm.adapted is not None
    told = f"trains {'adapters' if adapted else TRAINABLE[trainable]}, {rates}"
    made = None
    if choice.intervention != "none":
        zero = settings.zero_probability if zero_probability is None else zero_probability
        made = _made(choice.intervention, more, zero_probability=zero, seed=options.seed)
        told = f"zero probability {zero:g}, {told}"
    sentence = f"Recipe {recipe}: {NAMES[choice.intervention]}, {told} ({why})."
    return Prepared(made, chosen, choice.intervention, sentence)


def _choose(recipe: str, data: Any, options: PosttrainOptions, documents: DocumentLengths | None) -> Choice:
    if isinstance(data, Corpus):
        ranked = ranks.world_size()
        found = documents or DocumentLengths.of(data, options.tokens * ranked)
        rows = options.batch_size * ranked
        return choose(recipe, found.tokens, options.length, rows, whole=found.whole)
    asked = recipe_of(recipe)
    if isinstance(data, Lanes):
        return Choice(asked.long, "a document goes on from row to row")
    if isinstance(data, Windows):
        return Choice(asked.short, "no window continues another")
    windows = getattr(data, "windows", 1)
    tasks = getattr(data, "tasks", [getattr(data, "task", None)])
    if windows > 1:
        return Choice(asked.long, f"each sample goes on over {windows} rows")
    if not all(getattr(task, "stationary", True) for task in tasks):
        return Choice(NON_STATIONARY, "the final state of one sample starts no other: it holds an answer")
    return Choice(asked.short, "each row is a sample of its own")


def _made(name: str, more: dict[str, Any], **common: Any) -> Intervention:
    """Return the intervention of a name; refuse arguments that are another's."""
    made, taken = INTERVENTIONS[name], inspect.signature(INTERVENTIONS[name]).parameters
    for argument in more:
        if argument not in taken:
            others = [
                other for other, cls in INTERVENTIONS.items() if argument in inspect.signature(cls).parameters
            ]
            mend = f"`intervention` {' or '.join(others)}" if others else "another `intervention`"
            raise LongrollError(
                f"`{argument}` is no argument of {NAMES[name]}: leave it out, or name {mend}."
            )
    return made(**common, **more)


def _needs_matrices(lm: RecurrentLM, options: PosttrainOptions) -> str:
    """Return why a run must train matrices, or adapters of them; an empty string where it may train
    either.
    """
    if options.lora_rank or lm.adapted is not None:
        return "adapters are trained"
    if options.rope_scaling is not None:
        return "matrices have to learn the scaled positions"
    return "" if _trains_decays(lm, options) else "the model has no decays of its own that could be trained"


def _trains_decays(lm: RecurrentLM, options: PosttrainOptions) -> bool:
    return not options.lora_rank and bool(trained_decays(lm.model))
