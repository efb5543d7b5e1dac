"""A few of the files that benchmarks/mutated_files.py damages: each works or is refused in one line."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import mutated_files


@pytest.mark.parametrize("kind", ["config.json", "state-spaces", ".pth"])
def test_damaged_files_work_or_are_refused(tmp_path, kind):
    make, _, read = mutated_files.KINDS[kind]
    whole = tmp_path / "whole"
    whole.mkdir()
    make(whole)
    folders = sorted(whole.iterdir())
    for folder in folders[:2]:
        assert mutated_files.limited(read, folder) == "works"
    for seed in range(12):
        outcome = mutated_files.trial(kind, folders, seed, tmp_path)
        assert outcome.startswith(("works", "refused")), outcome
        assert "weights_only" not in outcome  # advice of torch.load that would run the file's code
