"""Families by model type: longroll's own, those that users register, those that packages name."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from longroll.errors import LongrollError, named
from longroll.families import fla_models  # noqa: F401 (fills the table)
from longroll.families.architectures import FAMILIES, Family

BUILT_IN = frozenset({*FAMILIES})
"""The model types that longroll brings."""

ENTRY_POINTS = "longroll.families"
"""The group of entry points by which a package names its families: `model_type = "package.module:FAMILY"`."""


def register_family(model_type: str, family: Family) -> None:
    """Let longroll open checkpoints of an architecture that it does not know.

    A `Family` says how the model takes and gives its state. One whose layers speak transformers' cache API
    for linear attention (`Cache.update_recurrent_state`, `update_conv_state`) needs nothing but its `kind`.
    Another is a subclass that overrides

    - `prepare(model)`, called once after loading;
    - `cache(model, input_ids, state)`, which returns the object that the forward argument `cache_argument`
      takes. It starts the forward from `state` (None: zero), and its `final(tokens)` returns the state after;
    - or all of `run`, where no cache is passed at all.

    docs/own-models.md has an example of each. A package can name its families as entry points of the group
    `longroll.families` instead: they are found by their model type.

    Args:
        model_type: the `model_type` of the config; the class must be registered with transformers'
            `AutoModelForCausalLM`, or come with the checkpoint (`trust_remote_code`).
        family: how its state travels. The last one registered is used.

    Raises:
        LongrollError: for a model type that longroll brings, and what is no `Family`.
    """
    if not isinstance(family, Family):
        raise LongrollError(f"register_family({model_type!r}, ...) takes a longroll.Family, not {family!r}.")
    if model_type in BUILT_IN:
        raise LongrollError(f"{model_type!r} is a built-in family: give yours another model_type.")
    FAMILIES[model_type] = family


def family_of(model_type: str | None) -> Family:
    """Return the row for a `model_type`: longroll's own, a registered one, or an entry point's.

    Raises:
        LongrollError: for an architecture that nothing names, and an entry point that cannot be loaded.
    """
    found = known_family(model_type)
    if found is None:
        raise LongrollError(
            f"model_type {model_type!r} is not one longroll can open yet; it opens: "
            f"{', '.join([*FAMILIES, *_entry_points()])}, and original state-spaces checkpoints. For a model "
            "of your own, `plugin` names the module that registers its family (docs/own-models.md)."
        )
    return found


def known_family(model_type: str | None) -> Family | None:
    """Return the row for a `model_type`, or None.

    Raises:
        LongrollError: for an entry point that cannot be loaded.
    """
    if model_type not in FAMILIES and model_type in (entries := _entry_points()):
        _load_entry(entries[model_type])
    return FAMILIES.get(model_type)  # type: ignore[arg-type]


def register_packages() -> list[str]:
    """Register every family that an installed package names; a problem with one of them is one line."""
    problems = []
    for model_type in _entry_points():
        try:
            known_family(model_type)
        except LongrollError as error:
            problems.append(str(error))
    return problems


def _entry_points() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def _load_entry(entry: EntryPoint) -> None:
    """Register what an entry point names: a Family, or a module that registers it."""
    package = entry.dist.name if entry.dist is not None else entry.module
    try:
        found = entry.load()
        if isinstance(found, Family):
            register_family(entry.name, found)
    except Exception as error:
        raise LongrollError(
            f"The package {package} names {entry.value} for the model type {entry.name!r} (entry points of "
            f"{ENTRY_POINTS}), which cannot be loaded: {named(error)}. Correct or remove {package}."
        ) from error
    if entry.name not in FAMILIES:
        raise LongrollError(
            f"The package {package} names {entry.value} for the model type {entry.name!r} (entry points of "
            f"{ENTRY_POINTS}), which is not a longroll.Family and registers none. "
            f"Correct or remove {package}."
        )
