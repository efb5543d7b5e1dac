"""The model card takes the diagnoses before and after a repair."""

import pytest
from typer.testing import CliRunner

from longroll import RecurrentLM
from longroll.cli import app
from longroll.conformance.tiny import build
from longroll.results import DiagnosisResult
from longroll.training.card import model_card, with_diagnosis


def run(label, in_range, far, sentence="It breaks."):
    levels = {"in_range": in_range, "far": far}
    return DiagnosisResult(
        label=label, verdict="explodes", sentence=sentence, levels=levels, sequences=4, max_position=512,
        train_length=32,
    )  # fmt: skip


BEFORE, AFTER = run("base", 1.5, None), run("sp", 1.625, 1.75, "It holds; costs .13 nats in range.")


def test_a_new_diagnosis_takes_the_place_of_the_old_one():
    card = "---\ntags: [longroll]\n---\n# repaired\nText of one's own.\n"
    once = with_diagnosis(card, [BEFORE, AFTER])
    assert once.startswith(card)
    assert "| base | 1.500 | not finite | explodes |" in once and "| sp | 1.625 | 1.750 |" in once
    assert "It holds; costs .13 nats in range." in once and "4 texts of 512 tokens, T = 32" in once
    assert with_diagnosis(once, [BEFORE, AFTER]) == once
    assert "sp" not in with_diagnosis(once, [BEFORE])
    more = once + "\n## Licence\nFree.\n"
    assert "## Licence\nFree." in with_diagnosis(more, [AFTER])
    assert with_diagnosis(more, [AFTER]).count("## Diagnosis") == 1


def test_names_of_the_user_are_not_read_as_markdown():
    card = with_diagnosis("# x\n", [run("a|b\n## Diagnosis <img>", 1.0, 1.0)])
    assert "| a\\|b ## Diagnosis \\<img\\> | 1.000 |" in card
    assert card.count("\n## Diagnosis") == 1


@pytest.mark.parametrize("name", ["me/hub-model", "x: y/<b>a|b", "# a/b\nlicense: mit"])
def test_the_name_of_a_model_is_text_in_its_card(name):
    lm = RecurrentLM(build("mamba2"), name=name)
    arguments = {"batch_size": 2, "length": 8, "steps": 4, "intervention": "sp"}
    run = {"arguments": arguments, "tokenizer": "<i>|", "versions": {"torch": "2"}, "world_size": 1}
    card = model_card(lm, run)
    head, _, body = card.removeprefix("---\n").partition("---\n")
    stated = [f"base_model: {name}"] if name == "me/hub-model" else []
    assert head.splitlines() == ["tags: [longroll]", "library_name: transformers", *stated]
    assert "<b>" not in body and "license: mit\n" not in body and "| tokenizer | \\<i\\>\\| |" in body


@pytest.mark.parametrize("model", ["specimen", "no/where", "me/hub"])
def test_a_model_without_a_card_is_refused_before_it_is_read(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("# of a project\n")
    ran = CliRunner().invoke(app, ["diagnose", model, "--card"])
    assert f"--card: {model} is not a folder with a README.md" in str(ran.exception)
    assert (tmp_path / "README.md").read_text() == "# of a project\n"
