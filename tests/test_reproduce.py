"""`longroll reproduce`: the table of checkpoints, the plan, and the whole run on a small checkpoint."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig
from typer.testing import CliRunner

import longroll
from longroll import LongrollError
from longroll.cli import app
from longroll.reproduce import CHECKPOINTS, PAPER, Machine, Work, find_checkpoints, fit, needs, rows_of
from longroll.reproduce.plan import training_bytes
from longroll.results import DiagnosisResult


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_parameters_are_those_of_the_sizes(name):
    one = CHECKPOINTS[name]
    sizes = {"vocab_size": one.vocabulary, "hidden_size": one.width, "num_hidden_layers": one.layers}
    if one.family == "mamba":
        config = MambaConfig(**sizes)
    else:
        heads = 2 * one.width // 64
        config = Mamba2Config(**sizes, num_heads=heads, head_dim=64, n_groups=1, tie_word_embeddings=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == one.parameters


def test_sizes_are_found_under_the_names_of_both_families():
    assert [c.name for c in find_checkpoints(["2.7b", "780m"], "both")] == [
        "mamba2-780m", "mamba-790m", "mamba2-2.7b", "mamba-2.8b",
    ]  # fmt: skip
    assert [c.name for c in find_checkpoints([" 1.4B "], "mamba2")] == ["mamba2-1.3b"]
    for sizes, family, named in (
        (["7b"], "mamba2", "7b"),
        ([""], "mamba2", "models"),
        (["130m"], "rwkv", "rwkv"),
    ):
        with pytest.raises(LongrollError, match=named):
            find_checkpoints(sizes, family)


@pytest.mark.parametrize("memory", [2e9, 2e10, 8e10, 8e11])
def test_a_micro_batch_divides_the_batch_and_is_the_largest_that_fits(memory):
    for one in CHECKPOINTS.values():
        rows, checkpointing, taken = fit(one, 12, memory)
        assert 12 % rows == 0
        assert taken == training_bytes(one, rows, checkpointing=checkpointing)
        more = [r for r in range(rows + 1, 13) if 12 % r == 0]
        assert all(training_bytes(one, r, checkpointing=checkpointing) > 0.8 * memory for r in more)
        if checkpointing:
            assert training_bytes(one, 1, checkpointing=False) > 0.8 * memory


def test_more_work_takes_more_time_and_kept_models_more_disk():
    chosen, machine = find_checkpoints(["130m", "2.7b"]), Machine(80e9, 8e14)
    small, large = (
        needs(chosen, Work(steps, 16, 131_072, 16, 6, 7), machine, keep=keep)
        for steps, keep in ((50, False), (500, True))
    )
    assert all(a.seconds < b.seconds and a.disk < b.disk for a, b in zip(small, large, strict=True))
    assert small[0].seconds < small[1].seconds
    (done,) = needs(chosen[:1], Work(50, 16, 131_072, 16, 0, 0), machine, keep=False)
    assert done.seconds == 0 and done.rows == small[0].rows
    assert not needs(chosen, Work(1, 1, 8192, 4, 1, 2), Machine(1e9, 1e12), keep=False)[1].fits


def test_rows_hold_the_octave_to_32k_and_the_paper_beside():
    T, stops = 2048, [2048, 16_384, 32_768, 65_536]
    found = DiagnosisResult.from_json(
        {
            "label": "base",
            "verdict": "fades",
            "train_length": T,
            "levels": {"in_range": 2.0, "far": 3.0},
            "curve": {
                "position": [1, 2, 3, 4],
                "start": [0, *stops[:-1]],
                "stop": stops,
                "loss": [2, 9, 2.5, 3],
            },
            "remembrance": {
                "starts": [0, 4096, 8000],
                "ends": [2048, 8192],
                "mean": [[0, 0], [None, 0.25], [None, 1]],
            },
            "states": {"position": [1024, 2048, 65_536], "layers": [{"layer": 0, "std": [1, 2, 5]}]},
        }
    )  # fmt: skip
    (row,) = rows_of({"mamba2-370m": {"base": found}})
    assert row.far == pytest.approx(math.exp(2.5))
    assert row.last == pytest.approx(math.exp(3))
    assert (row.remembrance, row.std) == (0.25, 2.5)
    assert (row.paper_in_range, row.paper_far) == PAPER["mamba2-370m"]["base"]


def small_checkpoint(folder):
    """A Mamba-2 of 256 words in the layout of state-spaces/mamba2-130m."""
    sizes = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 128}
    config = Mamba2Config(**sizes, num_heads=2, head_dim=32, n_groups=1, tie_word_embeddings=True)
    torch.manual_seed(0)
    weights = AutoModelForCausalLM.from_config(config).state_dict()
    weights = {name.replace("embeddings", "embedding"): t.clone() for name, t in weights.items()}
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    place = folder / "mamba2-130m"
    place.mkdir(parents=True)
    torch.save(weights, place / "pytorch_model.bin")
    layout = {"d_model": 32, "n_layer": 1, "vocab_size": 256, "ssm_cfg": {"layer": "Mamba2", "headdim": 32}}
    (place / "config.json").write_text(json.dumps(layout | {"rms_norm": True}))
    return folder


def run(tmp_path, *more):
    command = [
        "reproduce", "--models", "130m", "--checkpoints", str(tmp_path / "given"), "--tokenizer", "bytes",
        "--text", "stdlib", "--concatenate", "--steps", "1", "--batch-size", "2", "--length", "8192",
        "--sequences", "4", "--output", str(tmp_path / "out"), "--device", "cpu", *more,
    ]  # fmt: skip
    return CliRunner().invoke(app, command, catch_exceptions=True)


@pytest.mark.slow
def test_a_run_ends_in_pages_goes_on_and_refuses_other_settings(tmp_path):
    small_checkpoint(tmp_path / "given")
    found = run(tmp_path, "--interventions", "sp")
    assert found.exit_code == 0, found.output
    model = tmp_path / "out/mamba2-130m"
    made = {path: path.stat().st_mtime_ns for path in (model / "base.json", model / "sp.json")}
    assert not (model / "sp").exists()  # its weights are not kept
    assert {"position.pdf", "states.pdf"} & {path.name for path in (model / "figures").iterdir()}
    assert (model / "report.html").is_file()

    found = run(tmp_path, "--interventions", "sp,longroll")
    assert found.exit_code == 0, found.output
    assert all(path.stat().st_mtime_ns == before for path, before in made.items())
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    rows = summary["rows"]
    assert summary["provenance"]["seconds"] > 0
    assert [row["arm"] for row in rows] == ["base", "sp", "longroll"]
    assert "default recipe" in (tmp_path / "out/index.html").read_text()

    refused = run(tmp_path, "--interventions", "sp", "--seed", "3")
    assert isinstance(refused.exception, LongrollError)
    assert "--seed" in str(refused.exception)
    for flags, named in (("--interventions", "sps"), "sps"), (("--models", "9b"), "9b"):
        assert named in str(run(tmp_path, *flags).exception)


def test_a_refused_start_binds_nothing_and_comes_before_the_first_model(tmp_path):
    small_checkpoint(tmp_path / "given")
    for flags, named in (
        (("--models", "130m,370m"), "mamba2-370m"),
        (("--text", str(tmp_path / "no")), "no"),
        (("--length", "131072", "--text", str(tmp_path / "given")), "given"),
    ):
        refused = run(tmp_path, *flags)
        assert isinstance(refused.exception, LongrollError) and named in str(refused.exception)
        assert not (tmp_path / "out").exists()


def test_a_plan_writes_nothing(tmp_path):
    small_checkpoint(tmp_path / "given")
    found = run(tmp_path, "--plan")
    assert found.exit_code == 0, found.output
    assert "mamba2-130m" in found.output
    assert not (tmp_path / "out").exists()


def spoil(what, place):
    """Make the small checkpoint one that no run could read."""
    if what == "weights":
        (place / "pytorch_model.bin").unlink()
    elif what == "config":
        (place / "config.json").write_text("{")
    elif what == "family":
        (place / "config.json").write_text('{"model_type": "llama"}')
    else:
        shutil.rmtree(place)


REFUSED = {
    "text": (("--text", "no/such/text.txt"), "no/such/text.txt: no such file"),
    "hub text": (("--text", "no-such-owner/no-such-text"), "no-such-owner/no-such-text"),
    "empty text": (("--text", "given/mamba2-130m/empty.txt"), "has no text"),
    "column": (("--text-column", "body"), "--text-column body"),
    "tokenizer": (("--tokenizer", "no/tokenizer"), "no/tokenizer"),
    "device": (("--device", "cuda:77"), "--device cuda:77"),
    "dtype": (("--dtype", "float17"), "--dtype float17"),
    "output": (("--output", "given/mamba2-130m/config.json"), "Name a folder"),
    "checkpoints": (("--checkpoints", "nowhere"), "nowhere has no mamba2-130m"),
    "models": (("--models", "130m,370m"), "has no mamba2-370m"),
    **{name: ((), "mamba2-130m") for name in ("folder", "weights", "config", "family")},
}


@pytest.mark.parametrize("plan", [True, False], ids=["plan", "run"])
@pytest.mark.parametrize("what", REFUSED)
def test_a_plan_refuses_what_a_run_refuses(what, plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    small_checkpoint(tmp_path / "given")
    place, (flags, named) = tmp_path / "given/mamba2-130m", REFUSED[what]
    (place / "empty.txt").touch()
    if not flags:
        spoil(what, place)
    found = run(tmp_path, *flags, *["--plan"] * plan)
    assert found.exit_code and named in f"{found.exception} {found.output}"
    assert isinstance(found.exception, LongrollError), found.exception
    assert "Plan: estimates" not in found.output and not (tmp_path / "out").exists()


@pytest.mark.parametrize("plan", [True, False], ids=["plan", "run"])
def test_a_plan_refuses_other_settings_than_the_results(plan, tmp_path):
    small_checkpoint(tmp_path / "given")
    model = tmp_path / "out/mamba2-130m"
    model.mkdir(parents=True)
    (tmp_path / "out/settings.json").write_text(json.dumps({"text": "another"}))
    curve = {"position": [1], "start": [0], "stop": [2048], "loss": [2]}
    levels = {"in_range": 2.0, "far": 3.0}
    measured = {"label": "base", "verdict": "fades", "train_length": 2048, "levels": levels, "curve": curve}
    DiagnosisResult.from_json(measured).write(model / "base.json")
    found = run(tmp_path, *["--plan"] * plan)
    assert "was 'another' when" in str(found.exception) and "Plan: estimates" not in found.output


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_of_each_width_opens(name, tmp_path):
    sys.path.append(str(Path(__file__).parent.parent / "recipes"))
    from random_checkpoints import write_checkpoint

    one = CHECKPOINTS[name]
    place = write_checkpoint(one, tmp_path, width=one.width, layers=1)
    lm = longroll.load(place, device="cpu")
    (place / "pytorch_model.bin").unlink()  # half a gigabyte
    logits, _ = lm(torch.arange(8)[None])
    assert logits.shape == (1, 8, one.vocabulary)
