"""A dry run allocates what a real run does, byte for byte; gradient checkpointing keeps one layer."""

import contextlib

import pytest
import torch

import zoo
from longroll import LongrollError, RecurrentLM
from longroll.conformance.tiny import CONFIGS, from_config
from longroll.dry_run import Ledger, dry_model, dry_run, forward_bytes, sizes_of
from longroll.outline import check_entries
from longroll.training.loss import hidden_loss


def step(lm: RecurrentLM, ledger: Ledger, *, rows: int = 2, length: int = 48) -> tuple[int, int, int]:
    """Bytes that live after a forward, at the peak, and after the backward."""
    lm.train()
    before = ledger.start()
    ids = torch.zeros(rows, length, dtype=torch.long)
    state = lm.zero_state(rows) if lm.family.recurrent else None
    hidden, _final = lm(ids, state, logits=False)
    loss = hidden_loss(lm, hidden, ids)
    forward = ledger.live - before
    loss.backward()
    return forward, ledger.peak - before, ledger.live - before


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["mamba2", "bamba"])
@pytest.mark.filterwarnings("ignore")
def test_a_dry_step_takes_what_a_real_one_takes(name, checkpointing):
    found = []
    for dry in (True, False):
        with dry_run() if dry else contextlib.nullcontext(Ledger()) as ledger, ledger:
            model_type, entries = CONFIGS[name]
            model = from_config(model_type, entries)
            lm = dry_model(model.config, dtype=torch.float32) if dry else RecurrentLM(model)
            if checkpointing:
                lm.model.gradient_checkpointing_enable()
            found.append(step(lm, ledger))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["mamba2", "gla"])
@pytest.mark.filterwarnings("ignore")
def test_gradient_checkpointing_keeps_the_activations_of_one_layer(name):
    peaks = []
    for checkpointing in (False, True):
        with dry_run() as ledger:
            model_type, entries = CONFIGS[name]
            config = from_config(model_type, entries | {"num_hidden_layers": 8}).config
            lm = dry_model(config, dtype=torch.float32)
            if checkpointing:
                lm.model.gradient_checkpointing_enable()
            _, peak, gradients = step(lm, ledger)
            peaks.append(peak - gradients)
    assert peaks[1] < 0.4 * peaks[0]


@pytest.mark.parametrize("name", ["mamba2", "bamba", "gla"])
@torch.no_grad()
def test_a_forward_takes_what_is_planned_for_each_token(name):
    lm = zoo.lm_of(name)
    peaks = []
    for length in (512, 1024):
        with Ledger() as ledger:
            before = ledger.start()
            lm(torch.zeros(1, length, dtype=torch.long), logits=False)
            peaks.append(ledger.peak - before)
    planned = forward_bytes(lm.model.config, torch.float32, torch.device("cpu"))
    assert planned == pytest.approx((peaks[1] - peaks[0]) / 512, rel=0.01)


QUICK = {"mamba", "falcon_h1", "recurrent_gemma", "gla_hybrid", "lfm2_moe"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CONFIGS]
)
@pytest.mark.filterwarnings("ignore")
def test_sizes_are_those_of_the_model(name):
    real = zoo.lm_of(name)
    with dry_run():
        found = sizes_of(dry_model(real.model.config, dtype=torch.float32))
    linear = [m for m in real.model.modules() if isinstance(m, torch.nn.Linear)]
    if not any("expert" in path for path, _ in real.model.named_modules()):
        assert found.operations >= 1.9 * sum(m.weight.numel() for m in linear)
    assert found.parameters == sum(p.numel() for p in real.model.parameters())
    assert found.weights == sum(p.nbytes for p in real.model.parameters())
    for length in (1, 2, 37):
        _, state = real(torch.zeros(1, length, dtype=torch.long), logits=False)
        taken = {part: sum(t.nbytes for k, t in state.items() if k.part == part) for part in
                 ("recurrent", "conv", "attention")}  # fmt: skip
        assert (found.recurrent, found.conv) == (taken["recurrent"], taken["conv"])
        assert found.keys_and_values(length) == taken["attention"]


@pytest.mark.parametrize(
    "entry", [{"num_hidden_layers": 10**9}, {"hidden_size": 2**50}, {"a": [{"b": 10**30}]}]
)
def test_absurd_sizes_are_refused_by_name(entry):
    with pytest.raises(LongrollError, match="is no size of a model"):
        check_entries({"model_type": "mamba2"} | entry, "here")
