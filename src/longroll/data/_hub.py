"""What comes from the Hugging Face hub: whether it can be reached, and the documents of a dataset."""

from collections.abc import Iterator
from itertools import chain

from ..errors import LongrollError
from ._rows import texts
from ._split import divide_documents

SECONDS = 5.0  # libraries retry an unreachable hub for half a minute and more: ask once, shortly, before


def offline() -> bool:
    """Return whether the user forbade the network (HF_HUB_OFFLINE): then only what is cached can be used."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def why_not_there(name: str, kind: str) -> str | None:
    """Return why the hub does not give this "model" or "dataset" (`kind`), as a clause; None if it does."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=SECONDS)
    except HFValidationError:
        return "that is not a name the hub could have"
    except GatedRepoError:  # a subclass of the next one
        return "the hub asks you to accept its terms and to log in (hf auth login)"
    except RepositoryNotFoundError:
        return f"the hub has no such {kind}, or it is private (hf auth login)"
    except HfHubHTTPError as problem:
        return f"the hub answered: {_one_line(problem)}"
    except Exception as problem:  # the HTTP client differs between releases, and so do its exceptions
        return (
            f"the hub cannot be reached, this machine seems to be offline ({_one_line(problem)}); "
            "HF_HUB_OFFLINE=1 uses what was downloaded before"
        )
    return None


def hub_documents(source: str, *, split: str, text_column: str | None) -> Iterator[str]:
    """Return the documents of a hub dataset, `name` or `name:config`, streamed.

    `split` is one of its own splits, or "all". A dataset that has only "train" is divided as the rows of one
    file are, so that its train and validation do not overlap.

    Raises:
        LongrollError: not there, not reachable, no such config, split or column, or lost on the way.
    """
    name, _, config = source.partition(":")
    if not offline() and (reason := why_not_there(name, "dataset")):
        raise LongrollError(
            f"{name!r}: no such file or folder here, and {reason}; a local path works offline"
        )
    from datasets import load_dataset

    try:
        parts = load_dataset(name, config or None, streaming=True)
    except Exception as problem:
        hint = "offline mode is on (HF_HUB_OFFLINE); " if offline() else ""
        raise LongrollError(
            f"dataset {source!r} cannot be loaded: {hint}{_one_line(problem)} "
            "(a configuration is named as name:config; a local path works too)"
        ) from None

    divided = set(parts) == {"train"} and split in ("train", "validation")
    if not divided and split != "all" and split not in parts:
        raise LongrollError(
            f"dataset {source!r} has no split {split!r}: name one of {', '.join(parts)}, or all"
        )
    chosen = [parts["train"]] if divided else [parts[key] for key in parts if split in ("all", key)]
    documents = chain.from_iterable(texts(part, text_column, f"dataset {source!r}") for part in chosen)
    try:
        yield from divide_documents(documents, split if divided else "all")
    except LongrollError:
        raise
    except Exception as problem:
        raise LongrollError(f"reading dataset {source!r} failed: {_one_line(problem)}") from problem


def _one_line(problem: Exception) -> str:
    """Return the message of an exception on one line of at most 300 characters."""
    return " ".join(f"{problem or type(problem).__name__}".split())[:300]
