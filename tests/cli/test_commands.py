"""The commands as a user runs them: in their own process, on a small random model and small texts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Mamba2Config, Mamba2ForCausalLM

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def longroll(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from longroll.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=300)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny byte-level model, twelve texts, and a word on its training length."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=256,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=16,
        num_heads=4,
        head_dim=16,
        n_groups=1,
        tie_word_embeddings=True,
        train_length=32,
    )
    Mamba2ForCausalLM(config).save_pretrained(folder / "model")
    (folder / "text").mkdir()
    for i in range(12):
        (folder / "text" / f"{i}.txt").write_text(f"Text {i}: " + "to be or not to be, " * 600)
    return folder


MEASURE = ("--text", "text", "--length", 512, "--sequences", 4, "--concatenate")


def test_from_diagnosis_to_report(place):
    ran = longroll("diagnose", "model", *MEASURE, "--json", "base.json", cwd=place)
    assert ran.returncode == 0, ran.stderr
    base = json.loads((place / "base.json").read_text())
    assert base["verdict"] in {"healthy", "fades", "explodes"}
    assert base["levels"]["2x"] and base["provenance"]["versions"]["torch"]
    assert base["sentence"].split()[0] in " ".join(ran.stdout.split())

    train = ("posttrain", "model", "--text", "text", "--steps", 4, "--batch-size", 2, "--force")
    for name in ("sp", "tbptt", "fitted", "random", "none"):
        ran = longroll(*train, "--intervention", name, "--output", name, "--json", f"{name}.json", cwd=place)
        assert ran.returncode == 0, ran.stderr
        told = json.loads((place / f"{name}.json").read_text())
        assert told["intervention"] == name and ("zero_probability" in told["options"]) == (name != "none")
        assert not (place / name / "checkpoints").exists()
    before, after = load_file(place / "model/model.safetensors"), load_file(place / "sp/model.safetensors")
    assert before.keys() == after.keys() and any(not before[k].equal(after[k]) for k in before)

    ran = longroll("diagnose", "none", *MEASURE, "--no-explain", "--json", "plain.json", cwd=place)
    assert ran.returncode == 0, ran.stderr
    assert json.loads((place / "plain.json").read_text())["label"] == "none"
    compared = ("--against", "base.json", "--control", "plain.json")
    ran = longroll("diagnose", "sp", *MEASURE, *compared, "--card", "--json", "after.json", cwd=place)
    assert ran.returncode == 0, ran.stderr
    card = (place / "sp/README.md").read_text()
    assert "| steps | 4 |" in card and all(f"\n| {label} | " in card for label in ("base", "none", "sp"))
    after = json.loads((place / "after.json").read_text())
    assert after["label"] == "sp" and after["comparisons"]["control"]["in_range"]["paired"]
    assert " in range against base" in after["sentence"] and " against none" in after["sentence"]
    assert "eave it alone" not in ran.stdout
    ran = longroll("diagnose", "sp", *MEASURE, "--against", "none.json", cwd=place)
    assert ran.returncode == 2 and "none.json is no diagnosis" in ran.stderr
    drawn = ("base.json", "after.json", "--output", "page", "--figures", "figures", "--format", "svg")
    ran = longroll("report", *drawn, cwd=place)
    assert ran.returncode == 0, ran.stderr
    assert "<svg" in (place / "page/report.html").read_text()
    assert list((place / "figures").glob("*.svg"))


def test_evaluate_and_doctor(place):
    ran = longroll(
        "evaluate", "loss", "model", *MEASURE, "--json", "loss.json", "--output", "loss", cwd=place
    )
    assert ran.returncode == 0, ran.stderr
    assert "T = 32 (train_length in the model's config)." in ran.stderr
    assert "<svg" in (place / "loss/position.svg").read_text()
    assert len(json.loads((place / "loss.json").read_text())["loss"]) == 512
    ran = longroll("doctor", "--json", "doctor.json", cwd=place)
    assert ran.returncode == 0, ran.stderr
    families = {row["family"] for row in json.loads((place / "doctor.json").read_text())["families"]}
    assert {"mamba", "falcon_mamba", "mamba2", "gpt2", "llama"} <= families


def test_an_interrupted_run_is_kept_and_resumed(place):
    train = [
        "posttrain",
        "model",
        "--text",
        "text",
        "--batch-size",
        "2",
        "--output",
        "cut",
        "--save-steps",
        "2",
    ]
    train += ["--steps", "60", "--json", "cut.json", "--force"]
    command = [sys.executable, "-c", "from longroll.cli import main; main()", *train]
    with subprocess.Popen(command, cwd=place, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as running:
        while not list((place / "cut").glob("checkpoints/checkpoint-*/intervention_0.pt")):
            assert running.poll() is None, "it must not end before it can be interrupted"
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "interrupted" in errors and "Traceback" not in errors
    again = longroll(*train, cwd=place)
    assert again.returncode == 2 and "--resume" in again.stderr
    for flags, name in ((("--steps", 30), "--steps"), (("--intervention", "fitted"), "--intervention")):
        other = longroll(*train, *flags, "--resume", cwd=place)
        assert other.returncode == 2 and name in other.stderr, other.stderr
    (place / "cut/checkpoints/checkpoint-59").mkdir()  # as a kill in the midst of saving leaves it
    ran = longroll(*train, "--resume", cwd=place)
    assert ran.returncode == 0, ran.stderr
    steps = [entry["step"] for entry in json.loads((place / "cut.json").read_text())["log"]]
    assert steps == sorted(steps) and steps[-1] == 60
    assert (place / "cut/model.safetensors").is_file() and not (place / "cut/checkpoints").exists()


def test_a_full_disk_is_one_line_and_the_run_goes_on(place):
    train = ["posttrain", "model", "--text", "text", "--batch-size", "2", "--output", "full"]
    train += ["--steps", "6", "--save-steps", "3", "--force"]
    few = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
    command = [sys.executable, "-c", few + "from longroll.cli import main; main()", *train]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=place, env=ENVIRONMENT, timeout=300)
    assert ran.returncode == 2 and "--resume" in ran.stderr and "Traceback" not in ran.stderr, ran.stderr
    ran = longroll(*train, "--resume", cwd=place)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("diagnose", "model", "--json", "text"), "folder"),
        (("diagnose", "model", "--json", "/proc/none/x.json"), "Cannot write"),
        (("diagnose", "model", "--output", "model/config.json"), "Cannot write"),
        (
            ("posttrain", "model", "--output", "short", "--text", "tiny", "--intervention", "tbptt"),
            "more text",
        ),
    ],
)
def test_what_cannot_work_is_said_before_the_work(place, arguments, said):
    (place / "tiny").mkdir(exist_ok=True)
    (place / "tiny/a.txt").write_text("x = 1")
    ran = longroll(*arguments, cwd=place)
    assert ran.returncode == 2 and said in ran.stderr and "Traceback" not in ran.stderr, ran.stderr
    assert not ran.stdout


def test_a_seed_is_a_seed_and_a_label_no_path(place):
    ran = longroll("diagnose", "model", *MEASURE, "--seed", -1, cwd=place)
    assert ran.returncode == 2 and "--seed" in ran.stderr
    ran = longroll("diagnose", "model", *MEASURE, "--label", "../Out of it", "--output", "lab", cwd=place)
    assert ran.returncode == 0 and (place / "lab/out-of-it.json").is_file(), ran.stderr


def test_a_run_that_diverges_is_stopped_and_saves_no_model(place):
    train = ("posttrain", "model", "--text", "text", "--batch-size", 2, "--output", "diverged", "--steps", 20)
    train += ("--force",)
    ran = longroll(*train, "--learning-rate", 1e30, cwd=place)
    assert ran.returncode == 2 and "--learning-rate" in ran.stderr
    assert not (place / "diverged/model.safetensors").exists()


def _mistakes(place: Path) -> dict[str, tuple[tuple, str]]:
    (place / "empty.txt").write_text("")
    broken = place / "nan"
    if not broken.exists():
        broken.mkdir()
        (broken / "config.json").write_text((place / "model/config.json").read_text())
        weights = load_file(place / "model/model.safetensors")
        weights["backbone.layers.1.mixer.D"][0] = float("nan")
        save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    train = ("posttrain", "model", "--text", "text", "--steps", 2, "--output", "wrong")
    return {
        "no such model": (("diagnose", "nowhere/at/all"), "nowhere/at/all"),
        "no such text": (("diagnose", "model", "--text", "./missing"), "missing"),
        "empty text": (("diagnose", "model", "--text", "empty.txt"), "empty.txt"),
        "text too short": (("diagnose", "model", "--text", "text", "--length", 10**6), "--length"),
        "not past training": (("diagnose", "model", "--text", "text", "--length", 16), "--length"),
        "nan in weights": (("diagnose", "nan", "--text", "text"), "layers.1.mixer.D"),
        "probability": ((*train, "--zero-probability", 2), "--zero-probability"),
        "steps": ((*train, "--steps", 0), "--steps"),
        "output": (("diagnose", "model", *MEASURE, "--json", "/proc/none/x.json"), "/proc/none"),
        "train output": (("posttrain", "model", "--text", "text", "--output", "/proc/none"), "/proc/none"),
        "a report of no run": (("report", "model/config.json"), "no diagnosis"),
        "dtype": (("diagnose", "model", "--dtype", "float31"), "float31"),
    }


MISTAKES = (
    "no such model",
    "no such text",
    "empty text",
    "text too short",
    "not past training",
    "nan in weights",
    "probability",
    "steps",
    "output",
    "train output",
    "a report of no run",
    "dtype",
)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line(place, mistake):
    arguments, named = _mistakes(place)[mistake]
    ran = longroll(*arguments, cwd=place)
    assert ran.returncode == 2, ran.stdout + ran.stderr
    errors = [line for line in ran.stderr.splitlines() if line.startswith("longroll: ")]
    assert len(errors) == 1 and named in ran.stderr, ran.stderr
    assert "Traceback" not in ran.stderr
