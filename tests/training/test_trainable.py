"""`trainable`: only the parameters that are named learn, and the others stay bit for bit."""

import pytest
import torch

from longroll import LongrollError, PosttrainOptions, RecurrentLM, StatePassing
from longroll.data import ByteTokenizer, Corpus
from longroll.training import posttrain
from longroll.training.weights import DECAYS, projects, train_only
from zoo import build

FAMILIES = ["mamba", "mamba2", "bamba", "kimi_linear", "qwen3_next", "gla", "rwkv7", "rwkv6", "rwkv", "xlstm"]
TEXT = ["A text that is read, and read on. " * 40]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", ["all", "scales", "decays"])
def test_matrices_are_frozen_and_decays_never(family, what):
    model = build(family)
    one = next(iter(model.parameters())).requires_grad_(False)  # frozen by the user
    frozen = {id(p) for p in train_only(model, what)}
    assert id(one) not in frozen
    matrices = projects(model)
    for name, parameter in model.named_parameters():
        if parameter is one:
            continue
        stays = {"all": True, "scales": name not in matrices, "decays": name.endswith(DECAYS)}[what]
        assert parameter.requires_grad == stays, name
        assert (id(parameter) in frozen) != stays, name
    assert any(p.requires_grad for name, p in model.named_parameters() if name.endswith(DECAYS))


@pytest.mark.parametrize("what", ["scales", "decays"])
def test_a_run_changes_what_it_trains_and_nothing_else(what, tmp_path):
    lm = RecurrentLM(build("mamba2"))
    before = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    wanted = {name: p.requires_grad for name, p in lm.model.named_parameters()}
    ids = ByteTokenizer().encode(TEXT[0]) % lm.vocab_size
    corpus = Corpus(ids, torch.tensor([0, len(ids)]).numpy(), len(ids))
    options = PosttrainOptions(length=16, steps=3, batch_size=2, trainable=what, decay_speed=30.0)
    told = []
    posttrain(lm, corpus, StatePassing(), options, tmp_path / "out", tell=told.append)
    matrices = projects(lm.model)
    sizes = {name: p.numel() for name, p in lm.model.named_parameters()}
    trains = {n for n in sizes if (n not in matrices if what == "scales" else n.endswith(DECAYS))}
    counts = f"{sum(sizes[n] for n in trains):,} of {sum(sizes.values()):,} parameters"
    assert [said for said in told if counts in said] == told[:1]
    assert ("new text" in told[0]) == (what == "scales")
    for name, parameter in lm.model.named_parameters():
        trained = name not in matrices if what == "scales" else name.endswith(DECAYS)
        assert trained or torch.equal(parameter, before[name]), name
        assert parameter.requires_grad == wanted[name]
    changed = {name for name, p in lm.model.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.endswith("A_log") for name in changed)
    assert any("norm" in name for name in changed) == (what == "scales")


def test_what_cannot_be_trained_is_refused(tmp_path):
    for options in ({"trainable": "norms"}, {"trainable": "scales", "lora_rank": 4}):
        with pytest.raises(LongrollError, match="trainable"):
            PosttrainOptions(length=8, **options)
    with pytest.raises(LongrollError, match="trainable"):
        train_only(build("mamba2"), "everything")
    with pytest.raises(LongrollError, match="trainable"):
        train_only(build("mamba2").requires_grad_(False), "scales")
