"""A measurement that was killed goes on from what it kept, and finds what one that was not killed finds."""

import json
import os
import random
import shutil
from functools import partial

import pytest
import torch
from planted import TRAIN_LENGTH, planted_lm, texts_of_twin

import zoo
from longroll import LongrollError, diagnose, position_loss
from longroll.measure import Kept
from longroll.measure.holds import loss_under


class KilledError(Exception):
    """Stands for the end of the process."""


def of_planted(folder, progress=None, **more):
    options = {"train_length": TRAIN_LENGTH, "chunk_size": 16, **more}
    texts = texts_of_twin()[:4, :81]
    found = diagnose(planted_lm(), texts, progress=progress, kept=Kept(folder, every=0.0), **options)
    found = found.to_json()
    del found["provenance"], found["advice"]  # which hold seconds
    return json.dumps(found)


@pytest.mark.parametrize(
    ("name", "hold"),
    [
        *(("mamba2", ""), ("granitemoehybrid", ""), ("llama", "")),
        *(("granitemoehybrid", "window"), ("mamba2", "clip"), ("mamba2", "reset")),
        ("granitemoehybrid", "window+first"),
    ],
)
def test_a_reading_goes_on_where_it_was_killed(name, hold, tmp_path):
    killed = 24
    lm, tokens, told = zoo.lm_of(name), zoo.tokens(2, 50), []
    ways = {"chunk_size": 8} if not hold else {"window": 32}
    measure = partial(loss_under, hold) if hold else position_loss
    expected = measure(lm, tokens, **ways).losses

    def die(position):
        if position == killed:
            raise KilledError

    def read(progress):
        kept = Kept(tmp_path / "kept", every=0.0)
        kept.begin(lm, tokens)
        return measure(lm, tokens, kept=kept, progress=progress, **ways).losses, kept

    with pytest.raises(KilledError):
        read(die)
    found, kept = read(told.append)
    assert torch.equal(found, expected)
    again = 0 if hold == "window+first" else killed  # which starts again
    assert told == [p for p in (8, 16, 24, 32, 40, 48, 49) if p >= again]  # the piece was not yet kept
    kept.remove()
    assert not (tmp_path / "kept").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A diagnosis: what it found, all its pieces, and its reports of progress."""
    told, folder = [], tmp_path_factory.mktemp("whole") / "kept"
    return of_planted(folder, lambda *report: told.append(report)), folder, told


def test_a_diagnosis_goes_on_where_it_was_killed(whole, tmp_path):
    """Killed in the midst of each stage; what was done is not done again, and every number is the same."""
    expected, _, told = whole
    assert of_planted(None) == expected
    stages = list(dict.fromkeys(stage for stage, *_ in told))
    pieces = [("reading on",), ("restarting",), ("comparing states", "holding heads in range")]
    pieces += [("forgetting the past",)]
    assert stages == [stage for piece in pieces for stage in piece]
    before = 0
    for stage in stages:
        reports = [done for name, done, _ in told if name == stage]
        last, seen = (stage, reports[len(reports) // 2]), []

        def die(name, done, _, last=last, seen=seen):
            seen.append(name)
            if (name, done) == last:
                raise KilledError

        with pytest.raises(KilledError):
            of_planted(tmp_path / "kept", die)
        here = next(i for i, piece in enumerate(pieces) if stage in piece)
        assert set(seen) <= {one for piece in pieces[before : here + 1] for one in piece}
        before = here
    seen = []
    assert of_planted(tmp_path / "kept", lambda name, *_: seen.append(name)) == expected
    assert set(seen) == {stages[-1]}


@pytest.mark.parametrize("name", ["pieces.json", "reading-0-of-1.piece", "coverage.piece"])
@pytest.mark.parametrize("torn", [True, False])
def test_damaged_pieces_are_measured_again(name, torn, whole, tmp_path, caplog):
    expected = whole[0]
    shutil.copytree(whole[1], tmp_path / "kept")
    file, rng = tmp_path / "kept" / name, random.Random(name)
    data = bytearray(file.read_bytes())
    if torn:
        data = data[: rng.randrange(len(data))]
    else:
        data[rng.randrange(len(data))] ^= 1 + rng.randrange(255)
    file.write_bytes(data)
    stages = []
    assert of_planted(tmp_path / "kept", lambda stage, *_: stages.append(stage)) == expected
    assert f"{file} is damaged" in caplog.text
    again = {"reading-0-of-1.piece": ["reading on"]}
    again["coverage.piece"] = ["comparing states", "holding heads in range"]
    assert name not in again or list(dict.fromkeys(stages)) == again[name]


@pytest.mark.parametrize("what", ["folder", "pipe", "link", "versions"])
def test_whatever_lies_where_a_piece_is_kept(what, tmp_path, caplog):
    lm, tokens, folder = planted_lm(), texts_of_twin()[:1, :9], tmp_path / "kept"
    for name in ("pieces.json", "two.piece"):
        before = Kept(folder)
        before.begin(lm, tokens)
        before.write("two", 2)
        file = folder / name
        if what == "versions":
            held = json.loads((folder / "pieces.json").read_text())
            (folder / "pieces.json").write_text(json.dumps(held | {"versions": [1]}))
        else:
            file.unlink(missing_ok=True)
            makes = {"folder": file.mkdir, "pipe": partial(os.mkfifo, file)}
            makes.get(what, partial(file.symlink_to, file.name))()
        kept = Kept(folder)
        kept.begin(lm, tokens)
        assert kept.once("two", lambda: 2) == 2 == kept.read("two")
        assert what != "versions" or "pieces.json is damaged" in caplog.text
        kept.remove()
        assert not folder.exists()


def test_a_measurement_without_a_piece_leaves_nothing_and_binds_nobody(tmp_path):
    """It was refused, or killed before its first piece."""
    lm, tokens, folder = planted_lm(), texts_of_twin()[:1, :9], tmp_path / "kept"
    Kept(folder).begin(lm, tokens, seed=1)
    assert not folder.exists()
    kept = Kept(folder)
    kept.begin(lm, tokens, seed=2)
    kept.write("two", 2)
    (folder / "two.piece").unlink()
    other = Kept(folder)
    other.begin(lm, tokens, seed=3)
    other.write("two", 3)
    again = Kept(folder)
    again.begin(lm, tokens, seed=3)
    assert again.read("two") == 3


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"seed": 1}, "seed = 0, not 1"), ({"train_length": 8}, "train_length = 16, not 8"), ({}, "weights = ")],
)
def test_pieces_of_something_else_are_refused(changed, named, whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "kept")
    weight = planted_lm().model.backbone.norm_f.weight.data
    before = weight.clone()
    weight.mul_(1.0 if changed else 1.5)
    try:
        with pytest.raises(LongrollError, match=f"kept holds results with {named}.*or use the same settings"):
            of_planted(tmp_path / "kept", **changed)
    finally:
        weight.copy_(before)


def test_a_folder_of_ones_own_keeps_what_is_not_a_piece(whole, tmp_path, caplog):
    """Half-written pieces go, and a reading of other processes is said to begin anew."""
    folder = tmp_path / "kept"
    shutil.copytree(whole[1], folder)
    (folder / "reading-0-of-1.piece").rename(folder / "reading-0-of-2.piece")
    (folder / ".excess.piece.x1").write_bytes(b"half")
    (folder / "model.pt").write_bytes(b"mine")
    kept = Kept(folder)
    settings = {"train_length": TRAIN_LENGTH, "chunk_size": 16, "seed": 0, "explain": True}
    kept.begin(planted_lm(), texts_of_twin()[:4, :81], **settings)
    assert "A reading of 2 processes is kept, and starts again on 1." in caplog.text
    assert not (folder / ".excess.piece.x1").exists() and (folder / "excess.piece").exists()
    kept.remove()
    assert [path.name for path in folder.iterdir()] == ["model.pt"]
