"""The forecast of a break: the state put together is that of the texts read one after another."""

import pytest
import torch
from typer.testing import CliRunner

import longroll
from longroll.cli import app
from longroll.conformance import tiny
from longroll.data import Corpus, long_sequences
from longroll.errors import LongrollError
from longroll.measure import forecast
from longroll.model import RecurrentLM
from longroll.results import ForecastResult, read_result
from zoo import tokens

T = 24


@pytest.mark.parametrize("seed", [0, 1])
def test_the_state_of_many_texts_is_exact_where_decays_do_not_depend_on_the_text(seed):
    lm = RecurrentLM(tiny.build("gla", seed, torch.float64, num_hidden_layers=1))
    for name, weight in lm.model.named_parameters():
        if "gk_proj" in name and weight.ndim == 2:
            weight.data.zero_()
    texts = tokens(9, T + 1, seed=seed)
    found = forecast(lm, texts, T, times=8)
    losses = {}
    with torch.no_grad():
        for n in [0, *found.times]:
            read = []
            for row in range(9):
                ids = torch.cat([texts[(row + k) % 9, :T] for k in range(n, -1, -1)])[None]
                logits, _ = lm(ids)
                scores = logits[:, -T:].log_softmax(-1)
                read.append(-scores.gather(2, texts[row : row + 1, 1:, None])[..., 0])
            losses[n] = torch.cat(read)
    far = {n: losses[n][:, T // 2 :].mean().item() for n in found.times}
    assert found.times == [1, 2, 4, 8]
    assert found.mean == pytest.approx([far[n] - far[1] for n in found.times], abs=1e-9)
    gained = (losses[0].mean() - losses[0][:, T // 2 :].mean()).item()
    assert found.rise == pytest.approx([far[n] - far[1] - gained for n in found.times], abs=1e-9)


def test_the_specimen_is_forecast_to_break_and_one_that_forgets_is_not():
    lm = longroll.load("specimen")
    texts = long_sequences(Corpus.from_source("stdlib", split="validation"), 128, 16)
    found = forecast(lm, texts)
    assert found.edge is not None and 128 < found.edge < 8192 and found.mean[-1] > 1
    assert "breaks near" in found.sentence and found.to_json()["edge"] == found.edge
    with torch.no_grad():
        for name, weight in lm.model.named_parameters():
            if name.endswith("A_log"):
                weight.clamp_(min=3.0)
    held = forecast(lm, texts)
    assert held.edge is None and "holds to 8k" in held.sentence and abs(held.mean[-1]) < 0.05


def test_refusals():
    lm = RecurrentLM(tiny.build("mamba2"))
    with pytest.raises(LongrollError, match="3 texts are too few"):
        forecast(lm, tokens(3, 20), 16)
    with pytest.raises(
        LongrollError, match="`train_length` 16 tokens and one more, at least 3: `tokens` have 16"
    ):
        forecast(lm, tokens(4, 16), 16)
    with pytest.raises(LongrollError, match="no recurrent state"):
        forecast(RecurrentLM(tiny.build("llama")), tokens(4, 20), 16)


def test_the_command_reads_short_texts_only_and_says_what_it_does_not_read(tmp_path):
    told = ["diagnose", "specimen", "--no-long", "--length", "1k", "--sequences", "4"]
    ran = CliRunner().invoke(app, [*told, "--json", str(tmp_path / "f.json")])
    assert ran.exit_code == 0 and "Forecast from texts of 128 tokens" in ran.stdout
    found = read_result(tmp_path / "f.json")
    assert isinstance(found, ForecastResult) and found.times == [1, 2, 4, 8] and found.sequences == 4
    refused = CliRunner().invoke(app, [*told, "--output", str(tmp_path / "page")])
    assert "needs long texts" in f"{refused.stderr} {refused.exception}"
