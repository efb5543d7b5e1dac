"""The official checkpoints of state-spaces, by family and size, and what the paper reports of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longroll.checkpoint import weight_files
from longroll.errors import LongrollError
from longroll.interventions.recipes import NAMES
from longroll.outline import outline

TRAIN_LENGTH = 2048
"""T of every checkpoint (Gu and Dao 2023, section 4.2; Dao and Gu 2024, section 9.2)."""
TOKENIZER = "EleutherAI/gpt-neox-20b"
"""The tokenizer of every checkpoint."""

ARMS = {
    "none": "none: plain steps",
    **{name: NAMES[name] for name in ("random", "fitted", "sp", "tbptt")},
    "longroll": "default recipe of longroll",
}
"""What a model is post-trained by: the paper's interventions and control, and longroll's default recipe."""


@dataclass(frozen=True)
class Checkpoint:
    """An official checkpoint and its sizes."""

    family: str
    """`mamba` or `mamba2`."""
    size: str
    """The size as the family names it."""
    parameters: int
    width: int
    layers: int

    @property
    def name(self) -> str:
        """The repository's name without its owner: `mamba2-370m`."""
        return f"{self.family}-{self.size}"

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding: 50,277 words, padded to a multiple of 8 or 16."""
        return 50_280 if self.family == "mamba" else 50_288

    @property
    def repository(self) -> str:
        """The repository on the hub."""
        return f"state-spaces/{self.name}"


CHECKPOINTS = {
    made.name: made
    for made in (
        Checkpoint("mamba", "130m", 129_135_360, 768, 24),
        Checkpoint("mamba", "370m", 371_516_416, 1024, 48),
        Checkpoint("mamba", "790m", 793_204_224, 1536, 48),
        Checkpoint("mamba", "1.4b", 1_372_178_432, 2048, 48),
        Checkpoint("mamba", "2.8b", 2_768_345_600, 2560, 64),
        Checkpoint("mamba2", "130m", 128_989_632, 768, 24),
        Checkpoint("mamba2", "370m", 368_346_624, 1024, 48),
        Checkpoint("mamba2", "780m", 780_161_280, 1536, 48),
        Checkpoint("mamba2", "1.3b", 1_343_757_312, 2048, 48),
        Checkpoint("mamba2", "2.7b", 2_702_599_680, 2560, 64),
    )
}
"""By name. The parameters follow from width, layers and vocabulary (tests/test_reproduce.py counts them)."""

_SAME_SIZE = {"780m": "790m", "1.3b": "1.4b", "2.7b": "2.8b"}  # of Mamba-2, as Mamba-1 names it

PAPER: dict[str, dict[str, tuple[float | None, float | None]]] = {
    "mamba2-370m": {
        "base": (7.9, 12.3),
        "random": (8.2, 8.75),
        "fitted": (None, 7.92),
        "sp": (None, 7.73),
        "tbptt": (None, 7.68),
    },
    "mamba2-780m": {"base": (7.0, None), "fitted": (7.0, 7.2), "sp": (None, 6.87), "tbptt": (None, 6.80)},
    "mamba2-1.3b": {"base": (6.45, None), "fitted": (6.4, 11.7), "sp": (None, 6.36), "tbptt": (None, 6.32)},
}
"""Perplexity at position 2k and at 32k, read off the paper's plots to about 3 %; None: off the plot.

Source: Buitrago Ruiz and Gu 2025 (arXiv 2507.02782), figures of perplexity by position. Its text is not the
user's: the figures to compare are the changes, not the levels.
"""


def find_checkpoints(sizes: Sequence[str], family: str = "mamba2") -> list[Checkpoint]:
    """Return the checkpoints of some sizes, the smallest first.

    Args:
        sizes: `130m`, `370m`, `780m`, `1.3b`, `2.7b`; Mamba-1's own names (`790m`, `1.4b`, `2.8b`) too.
        family: `mamba`, `mamba2` or `both`.

    Raises:
        LongrollError: for a size or a family that does not exist, and for no size.
    """
    families = {"mamba": ["mamba"], "mamba2": ["mamba2"], "both": ["mamba", "mamba2"]}.get(family)
    if families is None:
        raise LongrollError(f"`family` {family} is not one of mamba, mamba2, both.")
    wanted = [size.strip().lower() for size in sizes if size.strip()]
    if not wanted:
        raise LongrollError("`models` names no size: give some of 130m, 370m, 780m, 1.3b, 2.7b.")
    found: dict[str, Checkpoint] = {}
    for size in wanted:
        names = {_SAME_SIZE.get(size, size), {b: a for a, b in _SAME_SIZE.items()}.get(size, size), size}
        some = [c for c in CHECKPOINTS.values() if c.family in families and c.size in names]
        if not some:
            raise LongrollError(f"`models`: {size} is not one of 130m, 370m, 780m, 1.3b, 2.7b.")
        found |= {c.name: c for c in some}
    return sorted(found.values(), key=lambda c: (c.parameters, c.name))


def check_present(checkpoints: Sequence[Checkpoint], folder: Path) -> None:
    """Check that a folder holds every checkpoint, before hours are spent on the first.

    Raises:
        LongrollError: one is missing, lacks its weights, or has a config of no model or of another family.
    """
    missing = [one.name for one in checkpoints if not _is_whole(folder / one.name)]
    if missing:
        raise LongrollError(
            f"`checkpoints` {folder} has no {' and no '.join(missing)}: each is a folder of that name with "
            "its config.json and weights."
        )
    for one in checkpoints:
        config, _, _ = outline(folder / one.name, device="cpu")
        if config.model_type != one.family:
            raise LongrollError(
                f"`checkpoints`: {folder / one.name} holds a model of {config.model_type}, not of "
                f"{one.family}."
            )


def _is_whole(folder: Path) -> bool:
    files = weight_files(folder)
    return (folder / "config.json").is_file() and bool(files) and all(file.is_file() for file in files)
