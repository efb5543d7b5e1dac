"""The split of blame: planted sides are told apart, and each hold is what it says."""

import math

import pytest
import torch
from planted_hybrid import TRAIN_LENGTH, texts, twin_lm

from longroll.errors import LongrollError
from longroll.measure._attention_readings import Clipped, Positions, Window
from longroll.measure._blame import Blame, Share, split_blame
from longroll.measure._coverage import coverage
from longroll.measure._diagnose import diagnose
from longroll.measure._state_ablation import DAMAGE
from longroll.measure.advice import Advice, of_blame
from longroll.results import DiagnosisResult
from zoo import assert_close, lm_of, tokens


@pytest.mark.parametrize("planted", ["state", "attention", "both"])
def test_planted_sides_are_told_apart(planted):
    state, attention = planted in ("state", "both"), planted in ("attention", "both")
    lm, text, done = twin_lm(state=state, attention=attention), texts(attention), []
    found = split_blame(lm, text, coverage(lm, text, TRAIN_LENGTH), TRAIN_LENGTH, progress=done.append)
    assert found.verdict == planted and found.damage > DAMAGE
    assert found.positions == "rotary" and found.factor == 16
    assert done == list(range(1, 10))
    assert [share.what for share in found.parts.values()] == ["state", "attention"]
    total = sum(part.recovered for part in found.parts.values())
    assert found.left["attention"].recovered == pytest.approx(total - found.states[0].recovered)
    assert found.together is not None and total == pytest.approx(found.together.recovered)
    assert "do damage" in found.sentence or "the damage, not" in found.sentence


def test_diagnose_says_which_side_and_what_to_do():
    found = diagnose(twin_lm(attention=True), texts(True), train_length=TRAIN_LENGTH)
    saved = DiagnosisResult.from_json(found.to_json()).blame
    assert saved is not None and saved.verdict == "attention" and len(saved.attentions) == 6
    assert "window of 16 tokens" in found.advice and "no intervention on them" in found.advice


@pytest.mark.slow
def test_damage_that_begins_late_is_split_where_it_is():
    """Past 16 T; positions are scaled to the end of the texts that were read."""
    lm, text = twin_lm(state=True), texts(False, rows=4, length=480)[:, :481]
    with torch.no_grad():
        lm.model.model.layers[2].mamba.dt_bias[:] = -0.5  # its state grows slowly
    found = diagnose(lm, text, train_length=8).to_json()
    assert found["edge"] > 16 * 8 and found["blame"]["verdict"] == "state"
    assert found["blame"]["length"] == 8 * found["blame"]["factor"] > 16 * 8
    assert "No damage" not in found["coverage"]["causal_sentence"]


@pytest.mark.parametrize("explain", [True, False])
def test_damage_that_was_not_split_is_said_to_be(explain):
    found = diagnose(twin_lm(attention=True), texts(True), train_length=TRAIN_LENGTH, explain=explain)
    assert ("Its attention may do the damage instead" in found.advice) == (not explain)


def test_refusals():
    text = tokens(4, 64)
    with pytest.raises(LongrollError, match="no hybrid"):
        split_blame(lm_of("mamba2"), text, None, 16)  # type: ignore[arg-type]
    with pytest.raises(LongrollError, match="give at least 80"):
        split_blame(lm_of("bamba"), text, None, 40)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("bamba", "rotary"), ("zamba2", "rotary"), ("recurrent_gemma", "rotary"), ("qwen3_next", "rotary"),
     ("gla_hybrid", "rotary"), ("jamba", "none"), ("nemotron_h", "none"),
     ("bailing_hybrid", "other"), ("gpt2", "other")],
)  # fmt: skip
def test_how_attention_takes_positions(name, kind):
    found = Positions(lm_of(name))
    assert found.kind == kind and (found.frequencies is not None) == (kind == "rotary")
    assert found.windows


@pytest.mark.parametrize("name", ["bamba", "falcon_h1", "qwen3_next", "gla_hybrid"])
def test_positions_are_seen_where_the_padding_token_has_no_embedding(name):
    lm = lm_of(name)
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[0] = 0
    assert Positions(lm).kind == "rotary"


@pytest.mark.parametrize("first", [0, 4])
def test_a_window_is_a_fresh_start_on_what_it_keeps(first):
    """Of one layer of attention: deeper ones remember more through their values."""
    lm, text, keep = lm_of("llama", num_hidden_layers=1), tokens(2, 40), 11
    hold, state = Window(keep, first, Positions(lm).frequencies), None
    with torch.no_grad():
        for position in range(40):
            logits, state = lm(
                text[:, position : position + 1], state if state is None else hold(position, state)
            )
        kept = torch.cat([text[:, :first], text[:, 40 - 1 - keep + first :]], dim=1)
        expected, _ = lm(kept)
    assert_close(logits[:, -1], expected[:, -1], 1e-5)


def test_clipped_keys_all_stand_at_one_distance():
    lm, text, keep = lm_of("llama", num_hidden_layers=1), tokens(2, 40), 8
    other = torch.cat([text[:, torch.randperm(24)], text[:, 24:]], dim=1)
    read = []
    with torch.no_grad():
        for ids in (text, other):
            hold, state = Clipped(keep, Positions(lm).frequencies), None
            for position in range(40):
                logits, state = lm(
                    ids[:, position : position + 1], state if state is None else hold(position, state)
                )
            read.append(logits[:, -1])
        plain, _ = lm(text)
        unclipped, _ = lm(other)
    assert_close(read[0], read[1], 1e-5)
    assert (plain[:, -1] - unclipped[:, -1]).abs().max() > 1e-3  # there the order counts


def test_attention_that_cannot_be_read_otherwise_is_not_blamed(monkeypatch):
    lm, text = twin_lm(attention=True), texts(True)
    monkeypatch.setattr(Positions, "__init__", lambda self, lm: vars(self).update(UNKNOWN))
    monkeypatch.setattr("longroll.measure._blame.KINDS", ())
    found = split_blame(lm, text, coverage(lm, text, TRAIN_LENGTH), TRAIN_LENGTH)
    assert found.verdict is None and "cannot be read otherwise" in found.sentence and len(found.states) == 2


UNKNOWN = {"windows": False, "kind": "other", "frequencies": None}


def share(what: str, value: float, spread: float = 0.05) -> Share:
    return Share(what, value, value - spread, value + spread)


@pytest.mark.parametrize(
    ("state", "attention", "spread", "verdict"),
    [(0.9, 0.05, 0.05, "state"), (0.05, 0.9, 0.05, "attention"), (0.5, 0.4, 0.1, "both"),
     (0.02, 0.03, 0.05, "neither"), (0.1, 0.1, 0.5, None), (0.3, 0.3, 0.5, None), (0.54, 0.67, 0.6, None),
     (float("nan"), 0.3, 0.5, None)],
)  # fmt: skip
def test_verdicts(state, attention, spread, verdict):
    parts = {"state": share("state", state, spread), "attention": share("attention", attention, spread)}
    readings = [share("window", 0.9), share("yarn", 0.8), share("ntk", 0.2)]
    found = Blame(1.0, 8.0, [share("norms", 0.5)], readings, share("norms and window", 0.9), parts, "rotary")
    assert found.verdict == verdict and str(found.scaling) == "yarn:8"
    assert found.to_json()["parts"][0]["what"] == "state"


def test_a_side_is_not_called_sound_where_its_interval_does_not_say_so():
    parts = {"state": Share("state", 0.54, -0.03, 1.08), "attention": Share("attention", 0.67, 0.24, 1.24)}
    found = Blame(
        0.07, 8.0, [share("norms", 0.5)], [share("window", 0.9)], share("both", 0.9), parts, "rotary"
    )
    assert found.verdict is None and "too few or too short" in found.sentence


@pytest.mark.parametrize(
    ("damage", "left", "spread", "verdict"),
    [(0.74, 0.21, 0.05, "both"), (0.1, 0.21, 0.05, "state"), (5.0, 0.0, 0.01, "state"),
     (0.74, 0.1, 0.12, "state"), (5.0, 0.06, 0.02, "both")],
)  # fmt: skip
def test_a_side_with_a_small_part_is_named_if_it_breaks_the_model_by_itself(damage, left, spread, verdict):
    parts = {"state": share("state", 0.85), "attention": share("attention", 0.15)}
    found = Blame(
        damage, 8.0, [share("norms", 0.8)], [share("window", 0.1)], share("norms and window", 1.0), parts,
        "rotary", {"state": share("state", 0.9), "attention": share("attention", left, spread)},
    )  # fmt: skip
    assert found.verdict == verdict and found.to_json()["left"][1]["recovered"] == left


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("verdict", ["state", "attention", "both", "neither", None])
def test_advice_follows_the_verdict(verdict, scaled):
    values = {"state": (0.9, 0.0), "attention": (0.0, 0.9), "both": (0.5, 0.5), "neither": (0.0, 0.0)}
    spread = 0.5 if verdict is None else 0.05
    state, attention = values.get(verdict, (0.3, 0.3))
    parts = {"state": share("state", state, spread), "attention": share("attention", attention, spread)}
    readings = [share("window", 0.9), share("yarn", 0.8 if scaled else 0.1)]
    found = Blame(1.0, 8.0, [share("norms", 0.5)], readings, share("norms and window", 0.9), parts, "rotary")
    repair = Advice(
        "sp", "Repair it by State Passing.", "longroll posttrain m --intervention sp", 500, 1, 1.0
    )
    told = of_blame(repair, found, "m", 128, ["--dtype", "bfloat16"], length=1024)
    if verdict in ("state", None):
        assert told == repair
    elif verdict == "neither":
        assert told.command is None and "helps either" in told.sentence
    elif verdict == "both":
        assert told.intervention == "sp" and "breaks too" in told.sentence
        assert (told.command == f"{repair.command} --rope-scaling yarn:8") == scaled
    elif scaled:
        assert told.intervention == "none" and "--intervention none --rope-scaling yarn:8" in told.command
    else:
        assert "window of 128 tokens" in told.sentence
        assert told.command == (
            "longroll evaluate loss m --dtype bfloat16 --reading window --window 128 --length 1024"
        )


@pytest.mark.parametrize(
    ("shares", "said"),
    [({"window": 0.9, "window+first": 1.0}, "--reading window "),
     ({"window": 0.5, "window+first": 1.0}, "--reading window+first"),
     ({"clipped": 1.0, "yarn": 0.4, "ntk": 0.3}, "--rope-scaling yarn:8"),
     ({"window": 0.9, "yarn": 0.4}, "--reading window "), ({"clipped": 0.9, "yarn": -0.1}, None)],
)  # fmt: skip
def test_attention_is_read_by_what_recovers_and_can_be_had(shares, said):
    """A scaling that recovers little is advised where no key can be dropped."""
    parts = {"state": share("state", 0.0), "attention": share("attention", 0.9)}
    readings = sorted((share(*one) for one in shares.items()), key=lambda one: -one.recovered)
    found = Blame(1.0, 8.0, [share("norms", 0.0)], readings, share("both", 0.9), parts, "rotary")
    told = of_blame(Advice("sp", "Repair it."), found, "m", 128)
    if said is None:
        assert told.command is None and "no reading that longroll has" in told.sentence
    else:
        assert said in told.command


@pytest.mark.parametrize(
    ("model", "output"),
    [("a/model", "repaired"), ("runs/repaired", "repaired-2"), ("repaired-2", "repaired-3"),
     ("repaired-x", "repaired")],
)  # fmt: skip
def test_a_repaired_model_is_repaired_into_another_folder(model, output):
    parts = {"state": share("state", 0.0), "attention": share("attention", 0.9)}
    found = Blame(1.0, 8.0, [share("norms", 0.1)], [share("yarn", 0.9)], share("both", 0.9), parts, "rotary")
    told = of_blame(Advice("sp", "Repair it.", None, 500, 1, 1.0), found, model, 128)
    assert told.command is not None and told.command.endswith(f"--output {output}")


@pytest.mark.parametrize("whose", ["attention", "state"])
def test_a_loss_that_is_not_finite_is_blamed_too(whose):
    """Angles, or heads of a state that never forget, overflow past T."""
    lm, text = lm_of("bamba"), tokens(6, 128)
    if whose == "attention":
        rotary = lm.model.model.rotary_emb
        turn = rotary.forward

        def forward(x, position_ids):
            cos, sin = turn(x, position_ids)
            return cos.masked_fill((position_ids[..., None] * rotary.inv_freq[0]) > 40, torch.nan), sin

        rotary.forward = forward
    else:
        mixer = lm.model.model.layers[2].mamba
        with torch.no_grad():
            mixer.A_log[:], mixer.dt_bias[:], mixer.D[:] = -14.0, 0.0, 0.0
        sizes: list[torch.Tensor] = []
        seen = mixer.norm.register_forward_hook(lambda _, given, out: sizes.append(given[0].abs().max()))
        lm(text[:, :16])
        seen.remove()
        limit = 1.5 * max(sizes)
        mixer.norm.register_forward_hook(
            lambda _, given, out: out.masked_fill(given[0].abs().amax(-1, keepdim=True) > limit, torch.nan)
        )
    found = split_blame(lm, text, coverage(lm, text, 16), 16)
    assert found.verdict == whose and not math.isfinite(found.damage)
    assert "of the texts whose loss is not finite" in found.sentence
    assert found.to_json()["damage"] != found.to_json()["damage"]  # NaN, null in a file
