"""A look before a repair, and repairs that end in time: on data that training does not read."""

import argparse
import inspect
import json
import math
import shutil
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from ranked import run
from test_ranks import assert_same_result, torchrun
from transformers import TrainerCallback
from typer.testing import CliRunner

import longroll
import zoo
from longroll.cli import app
from longroll.data import ByteTokenizer, Corpus
from longroll.errors import LongrollError
from longroll.measure.held_out import FEWEST, LENGTHS, HeldOut, Reading
from longroll.tasks import Passkey, TaskRows
from longroll.tasks.held_out import HeldOutSamples
from longroll.training import Declined, NoGain, PosttrainOptions, posttrain
from longroll.training.until_healthy import PATIENCE, Measure, decide, look_in, measures_of

sys.path.insert(0, str(Path(__file__).parents[1] / "measure"))
from planted import TRAIN_LENGTH as T
from planted import planted_lm, texts_of_twin, twin_lm

OPTIONS = {"length": T, "steps": 12, "batch_size": 4, "learning_rate": 3e-3, "save_steps": 4}


def corpus_of(tokens: torch.Tensor) -> Corpus:
    ids = tokens.numpy().astype(np.int32)
    return Corpus(ids.ravel(), np.arange(len(ids) + 1) * ids.shape[1], ids.size)


def texts() -> tuple[Corpus, HeldOut]:
    """Texts to train on, and others held out."""
    rows = texts_of_twin()
    held_out = HeldOut.from_corpus(corpus_of(rows[4:]), T)
    assert held_out is not None
    return corpus_of(rows[:4]), held_out


def broken() -> longroll.RecurrentLM:
    lm = zoo.lm_of("mamba2")
    lm.model.load_state_dict(planted_lm().model.state_dict())
    return lm


# ---- what is held out


def test_the_longest_whole_texts_are_taken_else_joined_ones():
    long = HeldOut.from_corpus(corpus_of(texts_of_twin()), T)
    assert not long.joined and long.texts.shape == (8, 16 * T + 1) and long.beginnings.shape == (64, T + 1)
    documents = [document.tolist() for document in texts_of_twin()]
    assert all(row.tolist() in [d[: 16 * T + 1] for d in documents] for row in long.texts)
    short = HeldOut.from_corpus(corpus_of(texts_of_twin().reshape(-1, 11)), T)
    assert short.joined and short.texts.shape[1] > 16 * T
    assert long.fingerprint != short.fingerprint


@pytest.mark.parametrize("seed", range(20))
def test_texts_of_fewer_than_16_training_lengths_tell_nothing(seed):
    random = np.random.default_rng(seed)
    length = int(random.integers(1, 40))
    size = int(random.choice([random.integers(2, 200), random.integers(2, 20_000)]))
    rows = random.integers(1, 3) if size > 200 else random.integers(1, 200)
    found = HeldOut.from_corpus(corpus_of(torch.zeros(rows, size, dtype=torch.int64)), length)
    assert (found is None) == (rows * size // (16 * length + 1) < FEWEST)
    if found is not None:
        held = found.texts.shape[1] - 1
        assert held in [times * length for times in LENGTHS] and held >= 16 * length
    _, held_out = texts()
    with pytest.raises(LongrollError, match=f"give texts of {16 * T} or more"):
        HeldOut(held_out.texts[:, :-1], held_out.beginnings, held_out.joined)


def test_the_loss_in_range_is_the_mean_over_the_first_training_length_from_zero():
    _, held_out = texts()
    lm = broken()
    reading = held_out.read(lm)
    expected = longroll.position_loss(lm, held_out.beginnings).between(0, T)
    assert reading.in_range == pytest.approx(expected, rel=1e-12)
    told = longroll.diagnose(lm, held_out.texts, train_length=T, explain=False)
    same = longroll.position_loss(lm, held_out.texts).between(0, T)
    assert told.levels["in_range"] == pytest.approx(same, rel=1e-6)
    assert reading.far == pytest.approx(told.levels["far"], rel=1e-6)
    assert reading.sentence == told.sentence and not reading.holds


# ---- the look


def test_a_model_that_holds_is_declined_and_nothing_is_written(tmp_path):
    corpus, held_out = texts()
    sound = zoo.lm_of("mamba2")
    sound.model.load_state_dict(twin_lm().model.state_dict())
    options, told = PosttrainOptions(**OPTIONS), []
    with pytest.raises(Declined, match=r"Holds to 256.*Leave it alone.*`force`") as declined:
        posttrain(sound, corpus, "sp", options, tmp_path / "out", held_out=held_out, tell=told.append)
    assert declined.value.reading.holds and not (tmp_path / "out").exists() and not told
    before = sound.model.state_dict()
    assert all(torch.equal(t, before[name]) for name, t in twin_lm().model.state_dict().items())
    posttrain(sound, corpus, "sp", options, tmp_path / "out", held_out=held_out, force=True)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    posttrain(broken(), corpus, "sp", options, tmp_path / "other", held_out=held_out, tell=told.append)
    assert told[0].startswith("Breaks at t ~ ") and "a look at 4 held-out texts of 256 tokens" in told[0]
    posttrain(sound, corpus, None, options, tmp_path / "control", held_out=held_out)  # a control is no repair


def test_the_command_declines_with_status_0(tmp_path):
    zoo.build("mamba2", vocab_size=256).save_pretrained(tmp_path / "in")
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} to be or not to be " * 40)
    (tmp_path / "tiny").mkdir()
    for i in range(12):
        (tmp_path / "tiny" / f"{i}.txt").write_text(f"{i} to be or not")

    def run(*more):
        told = ["posttrain", tmp_path / "in", "--train-length", 8, "--steps", 2, "--batch-size", 2]
        ran = CliRunner().invoke(app, [*map(str, told), "--device", "cpu", *map(str, more)])
        return ran.exit_code, " ".join(f"{ran.output} {ran.exception or ''}".split())

    out, json_file = tmp_path / "out", tmp_path / "out.json"
    status, said = run("--text", tmp_path / "text", "--output", out, "--json", json_file)
    assert status == 0 and "Leave it alone" in said and "without --force" in said, said
    found = json.loads(json_file.read_text())
    assert found["declined"] and found["look"]["holds"] and found["log"] == []
    assert "16 T" not in said and "Recipe" not in said and "Plan" not in said
    assert not out.exists()
    status, said = run("--text", tmp_path / "text", "--output", out, "--force", "--json", json_file)
    assert status == 0 and (out / "model.safetensors").is_file(), said
    assert json.loads(json_file.read_text())["declined"] is None
    status, said = run("--text", tmp_path / "tiny", "--output", tmp_path / "unseen")
    assert status == 0 and "Not looked whether the model breaks: the " in said, said
    assert (tmp_path / "unseen" / "model.safetensors").is_file()
    status, said = run("--text", tmp_path / "tiny", "--output", tmp_path / "no", "--until-healthy")
    assert "--until-healthy: the " in said and "are too few" in said, said


@pytest.mark.parametrize("kind", ["60 short documents", "one line of 60 kB"])
def test_a_model_that_breaks_is_not_declined_on_short_text(kind, tmp_path):
    """The specimen breaks at about 9 T."""
    place = tmp_path / "text"
    if kind == "one line of 60 kB":
        place.write_text(" ".join(f"word {i} of a long line" for i in range(3_000))[:60_000])
    else:
        place.mkdir()
        for i in range(60):
            (place / f"{i}.txt").write_text(f"{i}: " + "to be or not to be, that is the question. " * 6)
    told = ["posttrain", "specimen", "--text", place, "--steps", 1, "--batch-size", 2, "--device", "cpu"]

    def run(*more):
        ran = CliRunner().invoke(app, list(map(str, (*told, *more))))
        return ran.exit_code, " ".join(f"{ran.output} {ran.exception or ''}".split())

    status, said = run("--output", tmp_path / "out", "--json", tmp_path / "out.json")
    assert status == 0 and (tmp_path / "out/model.safetensors").is_file(), said
    assert "Not looked whether the model breaks: the " in said and "4 texts of 16 T = 2,048 tokens" in said
    assert "Holds" not in said and "alone" not in said
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["look"] is None and found["declined"] is None
    status, said = run("--output", tmp_path / "no", "--until-healthy")
    assert status and "--until-healthy: the " in said and "give more, or longer, text" in said
    assert not (tmp_path / "no").exists()


# ---- when a run ends, and what it keeps


def measure(step: int, in_range: float, far: float, holds: bool = False) -> Measure:
    return Measure(step, in_range, far, holds)


@pytest.mark.parametrize("seed", range(200))
def test_decisions_keep_their_word(seed):
    random = np.random.default_rng(seed)
    price = random.choice([0.0, 0.05, 0.3])
    found = [
        measure(i, random.normal(1.0, 0.1), random.choice([math.nan, random.normal(2.0, 1.0)], p=[0.1, 0.9]),
                bool(random.integers(2)))
        for i in range(random.integers(1, 9))
    ]  # fmt: skip
    before, *after = found
    decision = decide(found, price)
    gained = [m for m in after if math.isfinite(m.far) and not m.far >= before.far]
    within = [m for m in gained if m.in_range - before.in_range <= price]
    assert (decision.best is None) == (not within)
    if decision.best:
        assert decision.best in within
        assert not any(m.far < decision.best.far - 0.01 for m in within)
    if decision.stop and decision.best is None:
        assert all(m.in_range - before.in_range > price for m in after[-PATIENCE:])
    assert not decision.stop or len(after) >= PATIENCE
    for cut in range(1, len(found)):  # what a run decides at a step, it decides again when it is resumed
        assert decide(found[:cut], price) == decide(list(found[:cut]), price)


@pytest.mark.parametrize("before", [5.0, math.nan, math.inf])
def test_a_far_loss_that_is_not_finite_is_no_gain(before):
    start = measure(0, 1.0, before)
    for worse in (math.nan, math.inf, 6.0 if before == 5.0 else math.nan):
        assert decide([start, measure(1, 1.0, worse)], 0.05).best is None
        assert decide([start, measure(1, 1.0, worse), measure(2, 1.02, 4.0)], 0.05).best.step == 2


def test_a_run_ends_when_nothing_is_gained_or_the_budget_is_spent():
    before = measure(0, 1.0, 5.0)
    level = [measure(1, 1.02, 1.1, True), measure(2, 1.02, 1.1, True)]
    assert decide([before, *level], 0.05) == decide(
        [before, *level[:1]], 0.05
    )  # one measure without progress
    stopped = decide([before, *level, measure(3, 1.021, 1.101, True)], 0.05)
    assert stopped.best.step == 1 and "level" in stopped.stop
    assert decide([before, *level, measure(3, 1.0, 1.1, True)], 0.05).best.step == 3  # cheaper
    assert (
        decide([before, measure(1, 1.0, 4.0), measure(2, 1.0, 4.0), measure(3, 1.0, 4.0)], 0.05).stop is None
    )
    spent = decide([before, measure(1, 1.2, 1.1, True), measure(2, 1.2, 1.1, True)], 0.05)
    assert spent.best is None and "spent" in spent.stop
    assert decide([before, measure(1, 1.2, 1.1), measure(2, 1.04, 1.1)], 0.05).best.step == 2


class Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def logged(log: list[dict]) -> list[Measure]:
    return measures_of(log)


KINDS = ("plain", "lora", "task")


class Moved:
    """Held-out data that are read the better, the farther a model's logits are from those it had."""

    fingerprint = "moved"

    @torch.no_grad()
    def read(self, lm) -> Reading:
        ids = texts_of_twin()[:2, :20]
        moved = (lm(ids)[0] - broken().eval()(ids)[0]).abs().mean().item()
        return Reading(1.0 - moved / 100, 5.0 - moved, False, "", "", 0.0)


def run_until(kind: str, output: Path, **more):
    """A run that measures every 2 steps; the model, its log and what it told."""
    options = {**OPTIONS, "until_healthy": True, "measure_steps": 2, "price": 9.0}
    told: list[str] = []
    if kind == "task":
        tok = ByteTokenizer()
        lm = zoo.lm_of("mamba2", vocab_size=256)
        tasks = [Passkey(tok, instruction=False)]
        length = 180
        options |= {"length": length, "steps": 6, "batch_size": 2, "learning_rate": 1e-2}
        data = TaskRows(tasks, length, 6 * 2, lanes=2)
        held_out = HeldOutSamples.of_tasks(tasks, length)
    else:
        lm, (data, held_out) = broken(), texts()
        if kind == "lora":  # which cannot mend a decay
            options |= {"lora_rank": 2, "learning_rate": 3e-2}
            held_out = Moved()
    options |= more.pop("options", {})
    log = posttrain(
        lm, data, "fitted" if kind == "task" else "tbptt", PosttrainOptions(**options), output,
        held_out=held_out, force=True, tell=told.append, **more,
    )  # fmt: skip
    return lm, log, told, held_out


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_checkpoint_is_kept_and_a_killed_run_resumes(kind, tmp_path, monkeypatch):
    for name, value in (("FAR", 4), ("FAR_SAMPLES", 2), ("BEGINNINGS", 4)):
        monkeypatch.setattr(f"longroll.tasks.held_out.{name}", value)
    lm, log, told, held_out = run_until(kind, tmp_path / "never")
    measures = logged(log)
    assert [m.step for m in measures] == list(range(0, measures[-1].step + 1, 2))
    kept, best = log[-1]["kept_step"], decide(measures, 9.0).best
    assert kept == best.step and log[-1]["paid"] == best.in_range - measures[0].in_range
    again = held_out.read(longroll.load(tmp_path / "never", device="cpu"))
    assert again.in_range == pytest.approx(best.in_range, abs=1e-4)
    assert again.far == pytest.approx(best.far, abs=1e-4)
    assert sum(line.startswith("Step ") for line in told) == len(measures)
    said = next(line for line in told if line.startswith(f"Kept step {kept} of "))
    assert "(budget: 9)" in said and log[-1]["holds"] == best.holds
    assert told[-1].startswith("Kept step" if best.holds else "The kept model still breaks.")
    (run,) = lm.model.config.longroll["posttrain"]
    assert run["kept_step"] == kept and run["until_healthy"]
    for step in (3, 5) if kind == "plain" else (5,):
        output = tmp_path / f"killed-{step}"
        with pytest.raises(KeyboardInterrupt):
            run_until(kind, output, callbacks=[Kill(step)])
        shutil.move(output, tmp_path / f"moved-{step}")
        other, other_log, *_ = run_until(kind, tmp_path / f"moved-{step}", resume=True)
        assert logged(other_log) == measures and other_log[-1]["kept_step"] == kept
        for name, tensor in lm.model.state_dict().items():
            assert torch.equal(tensor, other.model.state_dict()[name]), name


def test_measuring_changes_no_step(tmp_path):
    corpus, _ = texts()
    plain = broken()
    options = PosttrainOptions(**OPTIONS)
    log = posttrain(plain, corpus, "tbptt", options, tmp_path / "plain")
    _, watched_log, *_ = run_until("plain", tmp_path / "watched")
    losses, seen = ([e["loss"] for e in entries if "loss" in e] for entries in (log, watched_log))
    assert seen == losses[: len(seen)] and len(seen) > 1


def test_without_a_checkpoint_in_the_budget_nothing_is_saved_and_resume_takes_a_larger_one(tmp_path):
    output = tmp_path / "out"
    with pytest.raises(NoGain, match=r"better far out.*The checkpoints stay in ") as declined:
        run_until("plain", output, options={"price": 0.0, "learning_rate": 0.1})
    assert not (output / "model.safetensors").exists() and (output / "checkpoints").is_dir()
    measures = logged(declined.value.log)
    assert all(m.in_range > measures[0].in_range or m.far >= measures[0].far for m in measures[1:])
    if "`resume` with a" in str(declined.value):
        _, log, *_ = run_until("plain", output, resume=True, options={"price": 99.0, "learning_rate": 0.1})
        assert log[-1]["kept_step"] and (output / "model.safetensors").is_file()


class Counted:
    """Held-out data that count how often they are read."""

    def __init__(self, data: HeldOut) -> None:
        self.data, self.fingerprint, self.readings = data, data.fingerprint, 0

    def read(self, lm) -> Reading:
        self.readings += 1
        return self.data.read(lm)


def test_the_untouched_model_is_measured_once_and_the_log_holds_the_look(tmp_path):
    corpus, held_out = texts()
    counted, told = Counted(held_out), []
    options = PosttrainOptions(**OPTIONS, until_healthy=True, measure_steps=2, price=9.0)

    def run(output, **more):
        return posttrain(broken(), corpus, "tbptt", options, output, held_out=counted, **more)

    log = run(tmp_path / "out", tell=told.append)
    first, *after = measures_of(log)
    assert counted.readings == 1 + len(after) and after
    forced = posttrain(broken(), corpus, "tbptt", options, tmp_path / "forced", held_out=held_out, force=True)
    assert measures_of(forced) == [first, *after] and look_in(forced) is None
    look = look_in(log)
    assert (look["in_range"], look["far"], look["holds"]) == (first.in_range, first.far, False)
    assert sum(line.startswith("Breaks at") for line in told) == 1
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", callbacks=[Kill(5)])
    assert look_in(run(tmp_path / "killed", resume=True))["far"] == first.far


def test_the_command_tells_a_run_without_a_gain_by_its_status(tmp_path):
    """And the result of a model that was trained holds what the look saw."""
    text = ",".join(inspect.getsourcefile(module) for module in (argparse, typing))
    told = ["posttrain", "specimen", "--text", text, "--steps", 2, "--batch-size", 2, "--device", "cpu"]
    told += ["--json", tmp_path / "out.json"]

    def run(*more):
        ran = CliRunner().invoke(app, list(map(str, (*told, *more))))
        return ran.exit_code, " ".join(ran.output.split()), json.loads((tmp_path / "out.json").read_text())

    until = ("--until-healthy", "--measure-steps", 2, "--price", 0, "--learning-rate", 0.1)
    status, said, found = run(*until, "--output", tmp_path / "out")
    assert status == 3 and "No model is saved" in said and "checkpoints stay in" in said, said
    assert found["declined"] and found["look"]["holds"] is False and found["log"]
    assert (tmp_path / "out/checkpoints").is_dir() and not (tmp_path / "out/config.json").exists()
    status, said, found = run("--output", tmp_path / "other")
    assert status == 0 and found["declined"] is None and found["look"]["holds"] is False
    assert (tmp_path / "other/config.json").is_file()
    told = [
        said.index(part) for part in (found["look"]["sentence"], "Recipe longroll: ", "Trains ", "2 steps")
    ]
    assert told == sorted(told)


class Sudden:
    """Held-out data that any step repairs whole, as far as they can tell."""

    fingerprint = "sudden"

    def __init__(self) -> None:
        self.first = [p.detach().clone() for p in broken().model.parameters()]

    def read(self, lm) -> Reading:
        same = all(map(torch.equal, self.first, lm.model.parameters()))
        return Reading(1.0, 5.0 if same else 1.0, not same, "", "", 0.0)


def test_a_run_that_was_killed_after_its_last_step_only_keeps_its_best(tmp_path, monkeypatch):
    corpus, _ = texts()
    options = PosttrainOptions(**OPTIONS, until_healthy=True, measure_steps=2)

    def run(output, **more):
        lm = broken()
        return lm, posttrain(lm, corpus, "tbptt", options, output, held_out=Sudden(), force=True, **more)

    lm, log = run(tmp_path / "never")
    assert [m.step for m in measures_of(log)] == [0, 2, 4, 6] and log[-1]["kept_step"] == 2
    assert log[-1]["paid"] == 0
    monkeypatch.setattr("longroll.training._posttrain.keep_best", _die)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out")
    monkeypatch.undo()
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            steps.append(state.global_step)

    again, more = run(tmp_path / "out", resume=True, callbacks=[Count()])
    assert steps == [] and more[-1]["kept_step"] == 2
    assert all(torch.equal(t, again.model.state_dict()[k]) for k, t in lm.model.state_dict().items())


def _die(*_):
    raise KeyboardInterrupt


def test_other_held_out_text_or_none_is_refused(tmp_path):
    corpus, held_out = texts()
    options = PosttrainOptions(**OPTIONS, until_healthy=True, measure_steps=2, price=9.0)
    with pytest.raises(LongrollError, match="`until_healthy` needs `held_out`"):
        posttrain(broken(), corpus, "sp", options, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        posttrain(broken(), corpus, "sp", options, tmp_path / "out", held_out=held_out, callbacks=[Kill(5)])
    other = HeldOut(held_out.texts.flip(0), held_out.beginnings, held_out.joined)
    with pytest.raises(LongrollError, match="other held-out text"):
        posttrain(broken(), corpus, "sp", options, tmp_path / "out", held_out=other, resume=True)


@pytest.mark.slow
def test_two_processes_measure_and_keep_what_one_does(tmp_path):
    """The texts are dealt to the ranks, all of which decide the same; a killed run resumes bit for bit."""
    base = {"length": 8, "steps": 6, "learning_rate": 1e-2, "save_steps": 2, "batch_size": 2}
    base |= {"until_healthy": True, "measure_steps": 2, "price": 9.0}

    def spec(name: str, **more) -> dict:
        return {"kind": "sp", "output": str(tmp_path / name), "options": base, **more}

    assert torchrun([spec("two"), spec("killed", kill=5)]).returncode == 0
    assert torchrun([spec("killed", resume=True)]).returncode == 0
    run("sp", str(tmp_path / "one"), options=base | {"batch_size": 4})
    logs = {name: json.loads((tmp_path / name / "log.json").read_text()) for name in ("one", "two", "killed")}
    one, two, killed = (np.array([[m.in_range, m.far] for m in measures_of(log)]) for log in logs.values())
    assert len(two) > 2 and np.allclose(one, two, rtol=1e-5) and np.array_equal(two, killed)
    assert len({log[-1]["kept_step"] for log in logs.values()}) == 1
    assert_same_result(tmp_path / "killed", tmp_path / "two", 0.0)
    assert_same_result(tmp_path / "two", tmp_path / "one", 1e-5)
