"""Checkpoints are whole or not there: torn and damaged ones are passed over, and nothing good is removed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranked import run
from safetensors.torch import load_file

from longroll import LongrollError
from longroll.training import checkpoints, identity

OPTIONS = {"length": 8, "steps": 6, "batch_size": 2, "learning_rate": 1e-2, "save_steps": 2}


class Died(Exception):
    """Stands for SIGKILL: nothing of ours catches it."""


def fill(folder: Path, step: int) -> Path:
    """A committed checkpoint of two files, one in a folder."""
    partial = folder / checkpoints.PARTIAL / f"checkpoint-{step}"
    (partial / "inner").mkdir(parents=True)
    (partial / "one.pt").write_bytes(os.urandom(100))
    (partial / "inner" / "two.json").write_text(json.dumps(list(range(step))))
    checkpoints.commit(partial, folder / f"checkpoint-{step}")
    return folder / f"checkpoint-{step}"


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


DAMAGES = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "flipped": flip,
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"0"),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "a link to itself": lambda file: (file.unlink(), file.symlink_to(file.name)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["one.pt", "inner/two.json", checkpoints.MANIFEST])
def test_a_damaged_checkpoint_is_passed_over(name, damage, tmp_path, caplog):
    older, newer = fill(tmp_path, 9), fill(tmp_path, 10)
    assert checkpoints.newest_whole(tmp_path) == newer and not caplog.records
    DAMAGES[damage](newer / name)
    if name == checkpoints.MANIFEST and damage in ("flipped", "longer"):
        (newer / name).write_bytes(b"{" + (newer / name).read_bytes())  # one bit may leave it readable
    assert checkpoints.newest_whole(tmp_path) == older
    assert "checkpoint-10" in caplog.text and Path(name).name in caplog.text
    with pytest.raises(LongrollError, match=r"checkpoint-10.*" + Path(name).name):
        checkpoints.checkpoint_to_resume(tmp_path, str(newer))


MANIFESTS = [
    "[" * 100_000,
    *(json.dumps({"files": {name: {"bytes": 0, "sha256": ""}}}) for name in ("a\0b", "/dev/zero", "\ud800")),
    *(json.dumps({"files": files}) for files in ({}, [], {"one.pt": 1}, {"one.pt": {"bytes": []}}, "x")),
]


@pytest.mark.parametrize("text", MANIFESTS, ids=range(len(MANIFESTS)))
def test_a_manifest_of_any_contents_is_read_or_passed_over(text, tmp_path):
    older, newer = fill(tmp_path, 1), fill(tmp_path, 2)
    (newer / checkpoints.MANIFEST).write_text(text)
    assert checkpoints.newest_whole(tmp_path) == older


PLACES = {
    "a file": lambda path, _: path.write_text("x"),
    "a link to itself": lambda path, _: path.symlink_to(path.name),
    "a link to a folder": lambda path, other: path.symlink_to(other),
    "a folder": lambda path, _: (path / "inner").mkdir(parents=True),
}


@pytest.mark.parametrize("what", PLACES)
@pytest.mark.parametrize("name", [".partial", ".removed-checkpoint-2", "checkpoint-4", "checkpoint-²"])
def test_whatever_lies_where_a_checkpoint_is_made_or_removed(name, what, tmp_path):
    """Links are removed and not what they point to."""
    folder, other = tmp_path / "checkpoints", tmp_path / "other"
    other.mkdir()
    (other / "kept").write_text("x")
    fill(folder, 2), shutil.rmtree(folder / checkpoints.PARTIAL)
    PLACES[what](folder / name, other)
    checkpoints.clear_partial(folder)
    assert checkpoints.newest_whole(folder) == folder / "checkpoint-2"
    assert fill(folder, 4) == checkpoints.newest_whole(folder)
    checkpoints.rotate(folder, 1)
    with checkpoints.aside(folder) as partial:
        (partial / "config.json").write_text("{}")
    left = {path.name for path in folder.iterdir()} - {name if name == "checkpoint-²" else ""}
    assert left == {"checkpoint-4", "config.json"} and [path.name for path in other.iterdir()] == ["kept"]


def test_killed_anywhere_in_a_commit_the_older_one_is_found(tmp_path, monkeypatch):
    """Each file operation in turn is the last that is done."""
    older, reached = fill(tmp_path, 1), 0
    for last in range(100):
        count = 0

        def die(function, last=last):
            def counted(*args, **kwargs):
                nonlocal count
                count += 1
                if count > last:
                    raise Died
                return function(*args, **kwargs)

            return counted

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", die(os.fsync))
            patch.setattr(os, "replace", die(os.replace))
            patch.setattr(Path, "rename", die(Path.rename))
            try:
                fill(tmp_path, 2)
            except Died:
                found = checkpoints.newest_whole(tmp_path)
                assert found == older or checkpoints.damage(found) is None
                reached += found == older
            else:
                break
        shutil.rmtree(tmp_path / "checkpoint-2", ignore_errors=True)
        checkpoints.clear_partial(tmp_path)
    assert reached > 5 and checkpoints.newest_whole(tmp_path).name == "checkpoint-2"


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    best, *_ = (fill(tmp_path, step) for step in (1, 2, 10, 9))
    torn = fill(tmp_path, 3)
    (torn / checkpoints.MANIFEST).unlink()
    checkpoints.rotate(tmp_path, 2, str(best))
    assert {path.name for path in tmp_path.glob("check*")} == {
        "checkpoint-1",
        "checkpoint-9",
        "checkpoint-10",
    }


# ---- in a run


def killed_at(step, output, kind="sp"):
    class Kill(Exception):
        pass

    from transformers import TrainerCallback

    class Killer(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == step:
                raise Kill

    import ranked

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Kill):
        patch.setattr(ranked, "Killed", lambda *_: Killer())
        run(kind, str(output), options=OPTIONS, kill=step)


def weights(output):
    return load_file(Path(output) / "model.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    run("sp", str(output), options=OPTIONS)
    return weights(output)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("trainer_state.json", "empty"),
        ("optimizer.pt", "missing"),
        ("model.safetensors", "flipped"),
        ("intervention_0.pt", "flipped"),
        ("intervention_0.pt", "missing"),
        ("rng_state.pth", "missing"),
        ("scheduler.pt", "empty"),
    ],
)
def test_a_run_resumes_past_damage(name, damage, tmp_path, undisturbed, caplog):
    output = tmp_path / "out"
    killed_at(5, output)
    DAMAGES[damage](output / "checkpoints" / "checkpoint-4" / name)
    run("sp", str(output), options=OPTIONS, resume=True)
    assert f"checkpoint-4 is damaged and not used: {name}" in caplog.text
    assert_same(weights(output), undisturbed)


def test_a_run_whose_checkpoints_are_all_damaged_starts_anew(tmp_path, undisturbed, caplog):
    output = tmp_path / "out"
    killed_at(5, output)
    for checkpoint in (output / "checkpoints").glob("checkpoint-*"):
        flip(checkpoint / "optimizer.pt")
    run("sp", str(output), options=OPTIONS, resume=True)
    assert "starts from the beginning" in caplog.text
    assert_same(weights(output), undisturbed)


@pytest.mark.parametrize("where", ["aside", "finish", "remove"])
def test_a_run_killed_while_it_ends_is_finished_by_resume(where, tmp_path, undisturbed, monkeypatch):
    """In the final save, in what follows it, and in the removal of the checkpoints."""
    import ranked

    output = tmp_path / "out"

    def die(*_, **__):
        raise Died

    with monkeypatch.context() as patch, pytest.raises(Died):
        if where == "aside":
            replace = Path.replace
            patch.setattr(
                Path, "replace", lambda self, to: die() if self.suffix == ".json" else replace(self, to)
            )
        elif where == "finish":
            patch.setattr(ranked.json, "dumps", die)  # in `finish`, and in nothing before it
            patch.setattr(checkpoints.json, "dumps", json.dumps)
        else:
            patch.setattr(shutil, "rmtree", lambda path, **_: die() if path.exists() else None)
        run("sp", str(output), options=OPTIONS)
    run("sp", str(output), options=OPTIONS, resume=True)
    assert_same(weights(output), undisturbed)
    assert {path.name for path in output.iterdir()} >= {"config.json", "log.json"}
    assert not [path for path in output.iterdir() if path.is_dir()]


@pytest.mark.parametrize("what", ["model", "text", "tokenizer", "intervention", "learning_rate", "versions"])
def test_another_run_is_refused_by_name(what, tmp_path, monkeypatch, caplog, undisturbed):
    """Another version is no other run, and is warned of."""
    import dataclasses

    import ranked

    output = tmp_path / "out"
    killed_at(5, output)
    kind, options, corpus, build = "sp", OPTIONS, ranked.corpus_of(), ranked.build
    if what == "model":
        monkeypatch.setattr(ranked, "build", lambda *_: build("mamba2", 1))
    elif what == "text":
        monkeypatch.setattr(ranked, "corpus_of", lambda **_: ranked_corpus(corpus))
    elif what == "tokenizer":
        monkeypatch.setattr(ranked, "corpus_of", lambda **_: dataclasses.replace(corpus, tokenizer="other"))
    elif what == "intervention":
        kind = "fitted"
    elif what == "learning_rate":
        options = OPTIONS | {what: 2e-2}
    else:
        now = identity.package_versions() | {"torch": "99.0"}
        monkeypatch.setattr(identity, "package_versions", lambda: now)
        run(kind, str(output), options=options, resume=True)
        assert f"started with torch {torch.__version__}, not 99.0" in caplog.text
        assert_same(weights(output), undisturbed)
        return
    with pytest.raises(LongrollError, match=f"`resume`.*{what}"):
        run(kind, str(output), options=options, resume=True)


@pytest.mark.parametrize("damage", ["missing", "empty", "flipped", "longer"])
def test_a_damaged_description_of_a_run_is_put_back(damage, tmp_path, caplog, undisturbed):
    """Another run is refused all the same."""
    output = tmp_path / "out"
    killed_at(5, output)
    DAMAGES[damage](output / "checkpoints" / checkpoints.RUN)
    with pytest.raises(LongrollError, match=r"`resume`.*learning_rate"):
        run("sp", str(output), options=OPTIONS | {"learning_rate": 2e-2}, resume=True)
    assert "the copy in checkpoint-4 is used" in caplog.text
    run("sp", str(output), options=OPTIONS, resume=True)
    assert_same(weights(output), undisturbed)


@pytest.mark.parametrize(
    "change",
    [{name: to} for name in ("arguments", "world_size", "versions", "device") for to in (0, "1", [], {})],
    ids=str,
)
def test_a_description_of_another_form_is_refused(change, tmp_path):
    run = {"arguments": {"batch_size": 2}, "world_size": 1, "versions": {}, "device": "cpu", "held_out": None}
    (tmp_path / "run.json").write_text(json.dumps(run | change))
    if run | change == run | {"versions": {}} or change == {"device": "1"}:
        identity.check_same_run(tmp_path / "run.json", run)
    else:
        with pytest.raises(LongrollError, match="describes no run"):
            identity.check_same_run(tmp_path / "run.json", run)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_was_saved_without_a_part_is_refused(name, tmp_path):
    """Its manifest names what it holds, as after `save_only_model`."""
    output = tmp_path / "out"
    killed_at(5, output, "none")
    newest = checkpoints.newest_whole(output / "checkpoints")
    newest.rename(partial := newest.with_name("again"))
    (partial / checkpoints.MANIFEST).unlink(), (partial / name).unlink()
    checkpoints.commit(partial, newest)
    with pytest.raises(LongrollError, match=f"{newest.name} has no {name}"):
        run("none", str(output), options=OPTIONS, resume=True)


@pytest.mark.parametrize("place", ["out", "out/checkpoints"])
def test_a_folder_that_cannot_be_is_one_line(place, tmp_path):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("mine")
    for resume in (False, True):
        with pytest.raises(
            LongrollError, match=r"`output`.* (is a file: name a folder|cannot be written: Not)"
        ):
            run("sp", str(tmp_path / "out"), options=OPTIONS, resume=resume)
    assert (tmp_path / place).read_text() == "mine"


def test_an_output_that_is_taken_away_is_one_line(tmp_path, monkeypatch):
    output = tmp_path / "out"
    sealed = checkpoints.commit

    def taken(partial, folder):
        shutil.rmtree(output)
        sealed(partial, folder)

    monkeypatch.setattr(checkpoints, "commit", taken)
    with pytest.raises(LongrollError, match=r"cannot be written to: .*No such file"):
        run("sp", str(output), options=OPTIONS)


def test_checkpoints_of_an_unknown_run_are_refused(tmp_path):
    output = tmp_path / "out"
    killed_at(5, output)
    for file in output.rglob(checkpoints.RUN):
        file.unlink()
    with pytest.raises(LongrollError, match=r"run\.json is missing"):
        run("sp", str(output), options=OPTIONS, resume=True)


def ranked_corpus(corpus):
    """The same text but for its last token."""
    import dataclasses

    ids = corpus.ids.copy()
    ids[-1] = (ids[-1] + 1) % 5
    return dataclasses.replace(corpus, ids=ids)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "intervention_0.pt",
        "trainer_state.json",
    ],
)
def test_a_file_that_is_committed_and_cannot_be_read_is_one_line(name, tmp_path):
    """Its sum is right: written so, by a faulty or a hostile hand."""
    output = tmp_path / "out"
    killed_at(5, output)
    newest = checkpoints.newest_whole(output / "checkpoints")
    partial = newest.with_name("again")
    newest.rename(partial)
    (partial / checkpoints.MANIFEST).unlink()
    (partial / name).write_bytes((partial / name).read_bytes()[: 40 if name.endswith("json") else 300])
    checkpoints.commit(partial, newest)
    with pytest.raises(LongrollError, match=f"{newest.name} cannot be read: .*Remove it"):
        run("sp", str(output), options=OPTIONS, resume=True)


def test_an_output_that_a_living_process_writes_is_refused(tmp_path, undisturbed):
    """Until that process ends, by SIGKILL too."""
    output = tmp_path / "out"
    killed_at(5, output)
    code = "import sys, time; from pathlib import Path; from longroll.files import Lock\n"
    code += "lock = Lock(Path(sys.argv[1])); lock.take(); print('taken', flush=True); time.sleep(60)"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(output / "checkpoints")], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "taken\n"
    try:
        with pytest.raises(LongrollError, match=rf"checkpoints is in use by process {other.pid} on "):
            run("sp", str(output), options=OPTIONS, resume=True)
    finally:
        other.kill()
        other.wait()
    run("sp", str(output), options=OPTIONS, resume=True)
    assert_same(weights(output), undisturbed)
