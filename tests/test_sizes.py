"""Counts and sizes that no machine holds are refused with the number, before anything is taken."""

import numpy as np
import pytest
import torch

from longroll import LongrollError, PosttrainOptions
from longroll import sizes as sizes_module
from longroll.cli._flags import too_little_memory
from longroll.data import ByteTokenizer, Corpus, Lanes, long_sequences
from longroll.errors import out_of_memory
from longroll.measure.calibration import calibrate, readings_of
from longroll.measure.roll_out import check_rows
from longroll.reproduce import Work
from longroll.reproduce.plan import _divisors
from longroll.sizes import MOST_TOKENS, check_bytes, check_tokens
from longroll.tasks import Copying, Row, evaluate_grid
from longroll.training.options import check_sizes
from zoo import lm_of, tokens


def cells(**sizes):
    told = {"samples": 1, "batch_size": 1, "lengths": [4]} | sizes
    evaluate_grid(lm_of("mamba2"), [Row(None, Copying(ByteTokenizer()))], **told)


def lanes(steps):
    Lanes(Corpus(np.zeros(9, np.int32), np.array([0, 9]), 0), 4, 2, steps=steps)


def sizes(**told):
    check_sizes(lm_of("mamba2"), PosttrainOptions(**{"length": 16, "batch_size": 2, "steps": 3} | told))


def texts(length):
    long_sequences(Corpus(np.zeros(9, np.int32), np.array([0, 9]), 0), length, 2)


REFUSED = {
    "length of texts": (texts, "not enough text: asked for 2 sequences of N tokens"),
    "samples": (lambda n: cells(samples=n), "`samples` N"),
    "batch size of samples": (lambda n: cells(samples=n // 10**4, batch_size=n, lengths=[10**9]), "GiB"),
    "lengths": (lambda n: cells(lengths=[n]), "`lengths` N"),
    "steps": (lambda n: PosttrainOptions(16, steps=n), "`steps` N x "),
    "steps of lanes": (lanes, "`steps` N of 2 lanes"),
    "batch size": (lambda n: sizes(batch_size=n), "`batch_size` N x "),
    "accumulation": (lambda n: sizes(accumulation=n // 1000), "`accumulation` "),
    "lora rank": (lambda n: sizes(lora_rank=n), "`lora_rank` N"),
    "steps of a reproduction": (lambda n: Work(n, 16, 8192, 16, 4, 5), "`steps` N x "),
    "rows of a reproduction": (lambda n: Work(500, n, 8192, 16, 4, 5), "`batch_size` N x "),
    "texts of a reproduction": (lambda n: Work(500, 16, 8192, n, 4, 5), "`sequences` N x "),
}


@pytest.mark.parametrize("count", [10**12, 10**15, 10**400], ids=["1e12", "1e15", "1e400"])
@pytest.mark.parametrize("name", REFUSED)
def test_an_absurd_count_is_refused_with_the_number(name, count):
    call, words = REFUSED[name]
    if name == "steps of a reproduction" and count == 10**12:
        count *= 100
    with pytest.raises(LongrollError, match=words.replace("N", str(count))):
        call(count)


def test_rows_that_no_machine_holds_are_refused():
    many = tokens(1, 3).expand(10**10, 3)
    with pytest.raises(LongrollError, match=rf"`tokens.shape\[0\]` {10**10} of which 2 tokens .* GiB"):
        check_rows(lm_of("mamba2"), len(many), 2, None)


@pytest.mark.parametrize("library", ["python", "cuda", "torch", "numpy"])
def test_too_little_memory_is_known_by_any_library(library):
    takes = {"torch": lambda: torch.empty(2**50), "numpy": lambda: np.empty(2**50)}
    error = MemoryError() if library == "python" else torch.OutOfMemoryError("CUDA out of memory")
    if library in takes:
        with pytest.raises((RuntimeError, MemoryError)) as found:
            takes[library]()
        error = found.value
    assert out_of_memory(error) and not out_of_memory(ValueError("can't allocate memory"))
    said = too_little_memory(error, {"sequences": "--sequences", "model": "MODEL", "dtype": "--dtype"})
    assert said.startswith("Out of memory: take a smaller --sequences, or --dtype bfloat16.")


def test_the_memory_of_a_container_counts(tmp_path, monkeypatch):
    whole = sizes_module.machine_bytes()
    for text, expected in (("max", whole), (str(2**30), 2**30), (str(2**62), whole)):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr(sizes_module, "_LIMITS", (str(tmp_path / "memory.max"), "/nowhere"))
        assert sizes_module.machine_bytes() == expected


def test_what_can_be_is_not_refused():
    check_bytes("`samples` 9", 2**30, "ask for fewer", held=2**30)
    check_tokens("`steps` 9", MOST_TOKENS, "ask for fewer")
    sizes(lora_rank=64, accumulation=1000)


def test_what_it_takes_is_said():
    with pytest.raises(LongrollError, match=r"takes at least 1,024 GiB, and there are 8: ask for fewer\."):
        check_bytes("`samples` 9", 2**40, "ask for fewer", held=2**33)
    with pytest.raises(
        LongrollError, match=r"is 3\.15e\+16 tokens, 1,000 years at 1,000,000 tokens a second"
    ):
        check_tokens("`steps` 9", 1000 * MOST_TOKENS, "ask for fewer")


def test_sweeps_end_where_no_scale_moves():
    lm = lm_of("mamba2")
    text = tokens(2, 33)
    found = [calibrate(lm_of("mamba2"), text, train_length=8, sweeps=sweeps) for sweeps in (30, 10**15)]
    assert found[0] == found[1] and found[0].passes < readings_of(lm, "A", "layer", 30)


@pytest.mark.parametrize("number", [1, 2, 12, 16, 97, 360])
def test_divisors(number):
    assert _divisors(number) == [n for n in range(number, 0, -1) if number % n == 0]
